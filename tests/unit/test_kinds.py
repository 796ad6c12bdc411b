"""A further kind of student, registered beside T5 and Qwen3, is known by its own record: no other room knows one."""

from __future__ import annotations

import dataclasses

import pytest
from distilled_t5.families import FAMILIES
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.runtime.header import Entry
from distilled_t5.students import KINDS, kind_of
from distilled_t5.students.foreign import foreign_kind, refuse_foreign
from distilled_t5.students.kind import StudentKind
from distilled_t5.train.file_sizes import text_width_in
from distilled_t5.train.preflight import models_of
from distilled_t5.train.recipe import load_recipe

SIGN = "model.layers.0.self_attn.other_norm.weight"
FILE = {SIGN: (128,), "model.embed_tokens.weight": (1000, 640)}


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> StudentKind:
    """A kind with the names of a language model and the sizes of T5, which alone serves Flux."""
    kind = dataclasses.replace(
        KINDS["t5"],
        name="other",
        display_name="Gemma",
        signs=(SIGN,),
        published_names=lambda names: ({name: name for name in names}, None),
        width_in=lambda shapes: next(iter(shapes.get("model.embed_tokens.weight", ())[-1:]), None),
    )
    monkeypatch.setitem(KINDS, "other", kind)
    monkeypatch.setitem(FAMILIES, "flux", dataclasses.replace(FAMILIES["flux"], students=("other",), teacher=("other", "xxl")))
    return kind


def test_a_file_of_a_registered_kind_is_not_foreign_and_any_other_is(other: StudentKind):
    assert kind_of(list(FILE)) is other
    refuse_foreign(FILE, "a.safetensors", other)
    llama = {"model.layers.0.self_attn.q_proj.weight": (8, 8)}
    for kind, file in ((other, llama), (KINDS["t5"], FILE)):
        with pytest.raises(StudentFileError, match=f"is a language model .*, not a distilled {kind.display_name}\\.\n.*the distilled"):
            refuse_foreign(file, "a.safetensors", kind)
    lora = foreign_kind([*FILE, "model.layers.0.self_attn.q_proj.lora_A.weight"], other)
    assert lora is not None and lora.name == "a LoRA"


def test_a_recipe_takes_the_size_from_a_kind_that_can_serve_the_family(other: StudentKind):
    recipe = load_recipe("flux-dev-paper")
    assert recipe.student_kind is other
    kinds = {model.key: (model.kind, model.signs) for model in models_of(recipe)}
    assert kinds["teacher.t5"] == kinds["student.start"] == ("a Gemma text encoder", other.signs)
    assert load_recipe("sd35-medium-24gb").student_kind is KINDS["t5"]


def test_the_text_width_of_a_teacher_is_read_by_its_kind(other: StudentKind):
    entries = {name: Entry("BF16", shape, 0, 0) for name, shape in FILE.items()}
    assert text_width_in([entries], FAMILIES["flux"]) == 640
