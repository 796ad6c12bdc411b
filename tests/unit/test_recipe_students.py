"""Recipes with several students: each is the recipe that trains it alone."""

from __future__ import annotations

import pytest
from distilled_t5.config.files import SHIPPED
from distilled_t5.tests.support.recipes import SMOKE, recipe_of, refusal
from distilled_t5.train.recipe import load_recipe

TWO = (SHIPPED / "smoke-two-students.toml").read_text(encoding="utf-8")


def test_a_recipe_with_two_students_is_two_recipes_with_one_that_share_the_rest():
    recipe = load_recipe("smoke-two-students", ["report.wandb=true"])
    wide, narrow = recipe.each
    assert [one.output.name for one in recipe.each] == ["distilled_t5_smoke-wide", "distilled_t5_smoke-narrow"]
    assert [one.name for one in recipe.each] == ["smoke-two-students-wide", "smoke-two-students-narrow"]
    assert load_recipe("smoke").differences(wide) == [
        'name: "smoke" -> "smoke-two-students-wide"',
        'output.name: "distilled_t5_smoke" -> "distilled_t5_smoke-wide"',
    ]
    assert {line.split(":")[0] for line in wide.differences(narrow)} >= {"student.layout.d_model", "student.dropout", "output.name"}
    assert recipe.report.wandb and not wide.report.wandb
    assert load_recipe("smoke").each == (load_recipe("smoke"),)


def test_one_table_and_a_list_of_one_are_the_same_recipe_with_the_text_of_before(tmp_path):
    listed = recipe_of(tmp_path, SMOKE.replace("[student]", "[[student]]"))
    assert listed == load_recipe("smoke")
    assert "\n[student]\nlayout" in listed.to_toml()


def test_settings_of_one_of_several_students_are_given_by_its_number():
    recipe = load_recipe("smoke-two-students", ["student.1.dropout=0.2", "student.0.layout.num_heads=3"])
    assert [student.dropout for student in recipe.students] == [0.0, 0.2]
    assert load_recipe("smoke-two-students").differences(recipe) == [
        "student.0.layout.num_heads: 2 -> 3",
        "student.1.dropout: 0.1 -> 0.2",
    ]


def test_of_recipes_with_other_students_the_difference_is_their_names(tmp_path):
    recipe = load_recipe("smoke-two-students")
    first, _, rest = TWO.partition('[[student]]\nname = "narrow"')
    fewer = recipe_of(tmp_path, first + rest.partition("\n\n")[2])
    assert recipe.differences(fewer) == ['student: ["wide", "narrow"] -> ["wide"]']
    assert fewer.each == recipe.each[:1], "a student stays the same without the others"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name = "narrow"', 'name = "wide"', "the recipe: expected a different name for every student, got wide, wide"),
        ('name = "narrow"', 'name = "Wide"', "the recipe: expected a different name for every student, got wide, Wide"),
        ('name = "narrow"', "", "the recipe: student.1.name is missing: each of several students needs a name"),
        ('name = "narrow"', 'name = "a/b"', "student.1.name: expected a file name of letters"),
        ("layout = { d_model = 32", 'size = "0.6b" # {', "the recipe: student.1: expected a T5, which Flux.1 can use, got a Qwen3"),
        ("dropout = 0.1", "dropout = 1.0", "student.1.dropout: expected less than 1, got 1.0"),
    ],
)
def test_students_with_equal_names_without_a_name_or_with_wrong_values_are_refused(old, new, expected, tmp_path):
    assert old in TWO
    (found,) = refusal(tmp_path, TWO.replace(old, new, 1))
    assert found.startswith(expected)


def test_an_empty_list_of_students_is_refused(tmp_path):
    assert refusal(tmp_path, SMOKE, "student=[]")[0].startswith("student: expected at least one entry, got []")
