"""T2I-CompBench's formulas on phrases and detections made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from distilled_t5.evaluate.compbench import (
    RELATIONS_2D,
    RELATIONS_3D,
    Detection,
    attribute_score,
    counted_objects,
    depth_score,
    metric_name,
    noun_phrases,
    numeracy_score,
    overlap,
    position_score,
    relation_in,
    singular,
    spatial_3d_score,
    spatial_score,
    without_doubles,
)

# In a picture of this size the benchmark's distances count as they are.
SIZE_PX = (479, 479)
LEFT, RIGHT = (0.0, 200.0, 100.0, 300.0), (300.0, 220.0, 400.0, 320.0)


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a green bench and a blue bowl", ["a green bench", "a blue bowl"]),
        ("The red hat was on top of the brown coat.", ["the red hat", "the brown coat"]),
        ("rubber ball and plastic bottle", ["rubber ball", "plastic bottle"]),
        ("a cat on the left of a dog", ["a cat", "a dog"]),
        ("a left shoe, two red birds", ["a left shoe", "two red birds"]),
        ("The a of", []),
        (" and ".join(["a cat"] * 10), ["a cat"] * 8),
    ],
)
def test_noun_phrases(prompt, phrases):
    assert noun_phrases(prompt) == phrases


def test_attributes_are_a_product_over_phrases():
    assert attribute_score([0.5, 0.25, 1.0]) == 0.125
    assert attribute_score([]) == 1


@pytest.mark.parametrize(
    ("prompt", "relations", "found"),
    [
        ("a cat on the left of a dog", RELATIONS_2D, ("cat", "on the left of", "dog")),
        ("A red bird is next to the old man.", RELATIONS_2D, ("red bird", "next to", "old man")),
        ("a candle in front of a desk", RELATIONS_3D, ("candle", "in front of", "desk")),
        ("a mouse hidden by a key", RELATIONS_3D, ("mouse", "hidden", "key")),
    ],
)
def test_what_a_prompt_says_of_two_objects(prompt, relations, found):
    assert relation_in(prompt, relations) == found


@pytest.mark.parametrize("prompt", ["a cat and a dog", "on the left of a dog", "a cat on the left of"])
def test_a_prompt_without_two_objects_in_a_relation_is_refused(prompt):
    with pytest.raises(ValueError, match=r"relates no two objects(.|\n)*What to do"):
        spatial_score(prompt, [], SIZE_PX)


def test_overlap_by_hand():
    assert overlap((0, 0, 100, 100), (50, 0, 150, 100)) == pytest.approx(5000 / 15000)
    assert overlap(LEFT, RIGHT) == 0
    assert overlap(LEFT, LEFT) == 1
    assert overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0


@pytest.mark.parametrize(
    ("relation", "first", "second", "score"),
    [
        ("on the left of", LEFT, RIGHT, 1),
        ("on the left of", RIGHT, LEFT, 0),
        ("on the right of", RIGHT, LEFT, 1),
        ("on the right of", LEFT, RIGHT, 0),
        ("on the top of", (0, 0, 100, 100), (20, 200, 120, 300), 1),
        ("on the top of", (20, 200, 120, 300), (0, 0, 100, 100), 0),
        ("on the bottom of", (20, 200, 120, 300), (0, 0, 100, 100), 1),
        ("on the top of", LEFT, RIGHT, 0),  # more beside than above
        ("on the left of", (0, 0, 100, 100), (100, 100, 200, 200), 0),  # as much beside as above
        ("on the left of", (0, 0, 100, 100), (50, 0, 150, 100), 0.3),  # an overlap of 1/3, of which 0.1 is allowed
        ("on the left of", (0, 0, 100, 100), (90, 0, 190, 100), 1),  # 1/19
        ("next to", LEFT, RIGHT, 1),  # far apart, but in one row
        ("near", (0, 0, 100, 100), (200, 300, 300, 400), 0.5),  # 200 and 300 apart: 150 / 300
        ("on side of", (0, 0, 100, 100), (0, 0, 100, 100), 1),
        ("on top of", (0, 0, 100, 100), (20, 200, 120, 300), 0),  # which the benchmark does not score
    ],
)
def test_positions(relation, first, second, score):
    assert position_score(relation, first, second, SIZE_PX) == pytest.approx(score)


def test_distances_count_in_a_picture_of_the_benchmarks_size():
    boxes = (0, 0, 100, 100), (200, 300, 300, 400)
    twice = [tuple(2 * edge for edge in box) for box in boxes]
    assert position_score("near", *twice, (958, 958)) == pytest.approx(0.5)
    assert position_score("near", *boxes, (958, 958)) == pytest.approx(1)
    assert position_score("near", *boxes, (479, 960)) == pytest.approx(1), "the longer side has 480 pixels at most"


def test_spatial_scores_by_hand():
    cat, dog, bird = Detection("cat", LEFT, 0.8), Detection("dog", RIGHT, 0.6), Detection("bird", RIGHT, 0.9)
    prompt = "a cat on the left of a dog"
    assert spatial_score(prompt, [dog, cat, bird], SIZE_PX) == pytest.approx(0.2 + 0.15 + 0.5)
    assert spatial_score("a cat on the right of a dog", [dog, cat], SIZE_PX) == 0, "0.35 is less than a half"
    assert spatial_score(prompt, [cat], SIZE_PX) == 0
    assert spatial_score(prompt, [], SIZE_PX) == 0
    surer = Detection("cat", RIGHT, 0.95)
    assert spatial_score(prompt, [cat, dog, surer], SIZE_PX) == 0, "the surest cat counts, and that is on the right"
    assert spatial_score("a black cat on the left of an old man", [cat, Detection("person", RIGHT, 1.0)], SIZE_PX) == pytest.approx(0.95)


def nearness() -> np.ndarray:
    """Nearer on the left: 2 in the first 75 columns, 1 in the others. 100 rows, 150 columns."""
    return np.where(np.arange(150) < 75, 2.0, 1.0)[None].repeat(100, axis=0)


def test_depth_by_hand():
    first, second = (0, 0, 100, 100), (50, 0, 150, 100)  # means 1.75 and 1.25, overlap 1/3 of the half that is asked for
    assert depth_score("in front of", first, second, nearness()) == pytest.approx(2 / 3)
    assert depth_score("in front of", second, first, nearness()) == 0
    assert depth_score("behind", second, first, nearness()) == depth_score("hidden", second, first, nearness()) == pytest.approx(2 / 3)
    assert depth_score("in front of", (0, 0, 100, 100), (10, 0, 110, 100), nearness()) == 1
    assert depth_score("in front of", (0, 0, 50, 100), (60, 0, 150, 100), nearness()) == 0, "without overlap nothing is in front"
    assert depth_score("next to", first, second, nearness()) == 0
    assert depth_score("in front of", (-9, -9, 0, 0), (-9, -9, 0, 0), nearness()) == 0


def test_a_box_cuts_rows_by_its_height_and_columns_by_its_width():
    nearer_above = nearness().T  # 150 rows, 100 columns: 2 in the upper 75 rows
    assert depth_score("in front of", (0, 0, 100, 100), (0, 50, 100, 150), nearer_above) == pytest.approx(2 / 3)


def test_scores_in_depth_by_hand():
    candle, desk = Detection("candle", (0, 0, 100, 100), 0.8), Detection("desk/table", (50, 0, 150, 100), 0.4)
    prompt = "a candle in front of a desk"
    assert spatial_3d_score(prompt, [desk, candle], nearness()) == pytest.approx(0.2 + 0.1 + 1 / 3)
    assert spatial_3d_score("a candle behind a desk", [desk, candle], nearness()) == pytest.approx(0.3)
    assert spatial_3d_score(prompt, [desk], nearness()) == pytest.approx(0.1)
    assert spatial_3d_score(prompt, [], nearness()) == 0


@pytest.mark.parametrize(
    ("many", "one"),
    [
        ("cats", "cat"),
        ("red birds", "red bird"),
        ("butterflies", "butterfly"),
        ("ties", "tie"),
        ("benches", "bench"),
        ("boxes", "box"),
        ("glasses", "glass"),
        ("tomatoes", "tomato"),
        ("shoes", "shoe"),
        ("knives", "knife"),
        ("mice", "mouse"),
        ("fish", "fish"),
        ("bus", "bus"),
        ("glass", "glass"),
    ],
)
def test_singulars(many, one):
    assert singular(many) == one


def test_what_a_prompt_counts():
    assert counted_objects("three cats, a red bird and eight mice on the table") == [(3, "cat"), (1, "bird"), (8, "mouse")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("three clocks ticked on the wall", [(3, "clock")]),
        ("four chairs and one giraffe provided seating at the zoo", [(4, "chair"), (1, "giraffe")]),
        ("a chicken, four birds, and four microphones sang a lively tune", [(1, "chicken"), (4, "bird"), (4, "microphone")]),
        ("three camels shared a burger", [(3, "camel")]),
        ("two computers and one television", [(2, "computer"), (1, "television")]),
    ],
)
def test_what_the_benchmarks_sentences_count_is_not_taken_for_their_verbs(prompt, expected):
    assert counted_objects(prompt) == expected


def test_a_verb_costs_no_score_and_cocos_own_names_do():
    assert numeracy_score("three clocks ticked on the wall", row_of("clock", 3)) == 1
    assert numeracy_score("two phones and one sofa", row_of("cell phone", 2) + row_of("couch", 1, 50)) == 1
    left, right = Detection("couch", (0, 0, 10, 10), 1.0), Detection("dining table", (300, 0, 310, 10), 1.0)
    assert spatial_score("a sofa on the left of a table", [left, right], (400, 400)) == 1


def row_of(label: str, count: int, top: float = 0.0) -> list[Detection]:
    return [Detection(label, (20.0 * number, top, 20.0 * number + 10, top + 10), 0.9) for number in range(count)]


def test_numbers_by_hand():
    prompt = "three cats and two dogs"
    assert numeracy_score(prompt, row_of("cat", 3) + row_of("dog", 2, 50)) == 1
    assert numeracy_score(prompt, row_of("cat", 2) + row_of("dog", 2, 50)) == 0.75
    assert numeracy_score(prompt, row_of("cat", 4)) == 0.25
    assert numeracy_score(prompt, row_of("bird", 3)) == 0
    assert numeracy_score("two men and one painting", row_of("person", 2) + row_of("picture/frame", 1, 50)) == 1
    assert numeracy_score("two red birds", row_of("bird", 2)) == 1
    assert numeracy_score("two cars", row_of("car", 2) + row_of("car wheel", 4, 50)) == 1, "a label that is the name comes first"
    with pytest.raises(ValueError, match="counts no objects"):
        numeracy_score("the cats", [])


def test_one_object_seen_twice_counts_once():
    large, inside, beside = (
        Detection("cat", box, sure) for box, sure in (((0, 0, 99, 99), 0.6), ((5, 5, 50, 50), 0.9), ((60, 0, 160, 99), 0.7))
    )
    assert without_doubles([large, inside, beside]) == [inside, beside]
    other = Detection("dog", large.box, 0.5)
    assert without_doubles([large, other]) == [large, other]
    # Shifted by 4 of 100 pixels: 96 of 104 shared, more than 0.9; by 6: 94 of 106, and 94 of 100 within each other.
    shifted = [Detection("cat", (left, 0.0, left + 99, 99.0), 0.5) for left in (4.0, 11.0)]
    assert without_doubles([large, *shifted]) == [large, shifted[1]]


def test_names_of_metrics_say_what_stands_in_for_the_benchmarks_judges():
    assert metric_name("color") == "CompBench color (BLIP-VQA, phrases by rule)"
    assert metric_name("spatial", "yolos-base") == "CompBench spatial (yolos-base, not UniDet)"
    assert metric_name("numeracy", "UniDet") == "CompBench numeracy"
