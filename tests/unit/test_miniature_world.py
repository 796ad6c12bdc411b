"""The miniature's world: whatever is drawn is read back, whatever is otherwise is not, and training never sees what is held out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from distilled_t5.devtools.demo_sheet import LINE_PX, verdict_sheet
from distilled_t5.world.captions import COLOUR_NAMES, SHAPE_NAMES, draw_prompt
from distilled_t5.world.font import GLYPHS
from distilled_t5.world.pictures import ARRANGEMENTS, COLOURS, PALETTE, PLACES, SHAPES, SIDE, TASKS, Scene, Thing, relations, render
from distilled_t5.world.reader import MOST_WRONG_CELLS, read, verdict
from distilled_t5.world.scenes import NEW_IN_TASK, NEW_WORD, Split, combinations, draw_scene, held_out, new_kinds
from distilled_t5.world.words import DRAWN, WORDS
from PIL import Image

pytestmark = pytest.mark.slow

CASES = [(task, split) for task in NEW_IN_TASK for split in ("train", "held_out") if (task, split) != (NEW_WORD, "train")]
EACH = 40


def scenes(task: str, split: Split = "train", count: int = EACH) -> list[Scene]:
    return [draw_scene(3, index, split, task) for index in range(count)]


@pytest.mark.parametrize(("task", "split"), CASES)
@pytest.mark.parametrize("cell_px", [1, 8])
def test_every_picture_is_read_back_for_what_it_shows(task, split, cell_px):
    for scene in scenes(task, split):
        picture = render(scene, cell_px)
        reading = read(picture)
        assert reading is not None
        assert (reading.background, reading.words, reading.ink) == (scene.background, scene.words, scene.ink)
        assert set(reading.things) == set(scene.things)
        assert reading.wrong_cells == 0
        assert verdict(scene, picture)


@pytest.mark.parametrize("task", TASKS)
def test_noise_a_cast_of_colour_and_whole_numbers_leave_the_verdict_as_it_is(task):
    random = np.random.RandomState(0)
    for scene in scenes(task):
        picture = render(scene, 8)
        noisy = picture + random.normal(0, 0.1, picture.shape)
        cast = picture * 0.9 + np.array([0.05, 0.0, 0.04])
        rounded = np.round(picture * 255).astype(np.uint8) / 255
        assert all(verdict(scene, changed) for changed in (noisy, cast, rounded))


def others(scene: Scene) -> list[Scene]:
    """Scenes that are wrong answers to this one."""
    wrong = [replace(scene, background="night" if scene.background != "night" else "fog"), Scene(scene.task, scene.background)]
    if scene.words:
        word = scene.words[0]
        near = word[:2] + ("x" if word[2] != "x" else "z")
        wrong += [replace(scene, words=(near, *scene.words[1:])), replace(scene, ink=next(name for name in COLOURS if name != scene.ink))]
        wrong += [replace(scene, words=(word, word) if len(scene.words) == 1 else (word,))]
        return wrong + ([replace(scene, words=scene.words[::-1])] if len(set(scene.words)) == 2 else [])
    first, *rest = scene.things
    colour = next(name for name in COLOURS if all(name != thing.colour for thing in scene.things))
    shape = next(name for name in SHAPES if all(name != thing.shape for thing in scene.things))
    wrong += [replace(scene, things=(replace(first, **change), *rest)) for change in ({"colour": colour}, {"shape": shape})]
    if len(scene.things) > 1:
        wrong.append(replace(scene, things=tuple(scene.things[:-1])) if len(scene.things) == 4 else replace(scene, things=(first,)))
    if scene.task == "single_object":
        wrong.append(replace(scene, things=(replace(first, place="left" if first.place != "left" else "right"),)))
    if scene.task in ("position", "colour_shape_binding"):
        second = rest[0]
        exchanged = (replace(first, colour=second.colour), replace(second, colour=first.colour), *rest[1:])
        wrong.append(replace(scene, things=exchanged))
    if scene.task == "position":
        swapped = (replace(first, place=rest[0].place), replace(rest[0], place=first.place), *rest[1:])
        wrong.append(replace(scene, things=swapped))
    return wrong


@pytest.mark.parametrize("task", TASKS)
def test_another_colour_shape_place_number_word_or_background_is_rejected(task):
    for scene in scenes(task):
        assert len(others(scene)) >= 4
        assert [other for other in others(scene) if verdict(scene, render(other))] == []


@pytest.mark.parametrize("task", TASKS)
def test_blank_grey_and_noise_are_rejected(task):
    random = np.random.RandomState(1)
    for scene in scenes(task, count=10):
        assert not verdict(scene, np.ones((SIDE, SIDE, 3)))
        assert not verdict(scene, np.full((96, 96, 3), 0.5))
        assert not any(verdict(scene, random.rand(SIDE, SIDE, 3)) for _ in range(5))


def test_binding_asks_for_colour_and_shape_and_not_for_the_place():
    one, other = Thing("red", "tree", "left"), Thing("blue", "ring", "right")
    exchanged = (replace(one, place="right"), replace(other, place="left"))
    scene = Scene("colour_shape_binding", things=(one, other))
    assert verdict(scene, render(replace(scene, things=exchanged)))
    assert not verdict(replace(scene, task="position"), render(replace(scene, things=exchanged)))


def test_as_many_wrong_cells_as_are_allowed_are_forgiven_and_one_more_is_not():
    scene = Scene("single_object", things=(Thing("red", "tree", "top left"),))
    for wrong in range(5):
        picture = render(scene)
        picture[-1, :wrong] = COLOURS["blue"]
        assert verdict(scene, picture) == (wrong <= MOST_WRONG_CELLS)


def test_a_letter_that_could_be_two_leaves_the_picture_unread():
    scene = Scene("word", words=("bed",), ink="red")
    picture = render(scene)
    assert (GLYPHS["b"] != GLYPHS["d"]).sum() == 2
    row, column = np.argwhere(GLYPHS["b"] != GLYPHS["d"])[0]
    picture[4 + row, column] = COLOURS["red"] if GLYPHS["d"][row, column] else PALETTE["snow"]
    assert read(picture) is None


def test_an_image_of_the_wrong_size_is_an_error_that_gives_the_right_size():
    with pytest.raises(ValueError, match=r"What to do: .* 96 pixels"):
        read(np.zeros((100, 100, 3)))


def test_shapes_letters_and_colours_differ_enough_to_be_distinguished():
    assert min((one != other).sum() for one, other in itertools.combinations(SHAPES.values(), 2)) > 2 * MOST_WRONG_CELLS
    assert min((one != other).sum() for one, other in itertools.combinations(GLYPHS.values(), 2)) >= 2
    assert min(np.abs(np.subtract(one, other)).max() for one, other in itertools.combinations(PALETTE.values(), 2)) == 0.5
    assert {channel for colour in PALETTE.values() for channel in colour} == {0.0, 0.5, 1.0}


def test_things_of_one_arrangement_never_overlap_or_touch():
    for arrangement in ARRANGEMENTS:
        boxes = [PLACES[place] for place in arrangement]
        assert all(max(abs(a - c), abs(b - d)) > 5 for (a, b), (c, d) in itertools.combinations(boxes, 2))
        assert all(0 <= number <= SIDE - 5 for box in boxes for number in box)


@pytest.mark.full
def test_training_never_shows_a_held_out_combination_in_twenty_thousand_prompts():
    drawn = [draw_scene(0, index, "train") for index in range(20_000)]
    seen = {combination for scene in drawn for combination in combinations(scene)}
    assert not {combination for combination in seen if held_out(combination)}
    objects = {(colour, shape) for colour in COLOURS for shape in SHAPES if not held_out(("object", colour, shape))}
    assert {(parts[0], parts[1]) for kind, *parts in seen if kind == "object"} == objects
    assert {scene.task for scene in drawn} == set(TASKS)


def test_each_colour_misses_exactly_one_shape_and_each_shape_a_colour_or_two():
    missing = [(colour, shape) for colour in COLOURS for shape in SHAPES if held_out(("object", colour, shape))]
    assert sorted(colour for colour, _ in missing) == sorted(COLOURS)
    by_shape = [sum(shape == name for _, shape in missing) for name in SHAPES]
    assert set(by_shape) == {1, 2}


@pytest.mark.parametrize("task", NEW_IN_TASK)
def test_a_held_out_scene_is_new_in_what_its_task_asks_and_in_nothing_else(task):
    assert all(new_kinds(scene) == {NEW_IN_TASK[task]} for scene in scenes(task, "held_out"))


def test_there_are_words_that_are_never_drawn_and_many_that_are():
    new = [word for word in WORDS if held_out(("word", word))]
    assert len(WORDS) - len(new) == len(DRAWN) == 108
    assert len(new) == 215
    assert len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize(("task", "split"), CASES)
def test_a_caption_names_every_colour_shape_and_word_and_nothing_else_that_shows(task, split):
    for index in range(EACH):
        scene, caption = draw_prompt(5, index, split, task)
        lower = f" {caption.lower().replace(',', ' ').replace(';', ' ')} "
        named_colours = {colour for colour, names in COLOUR_NAMES.items() if any(f" {name} " in lower for name in names)}
        assert named_colours == {thing.colour for thing in scene.things} | ({scene.ink} - {""})
        if scene.words:
            assert " ".join(scene.words) in lower
        else:
            named = {shape for shape, names in SHAPE_NAMES.items() if any(f" {name}" in lower for name in names)}
            assert named == {thing.shape for thing in scene.things}


def test_a_position_caption_says_the_relations_that_hold():
    for index in range(200):
        scene, caption = draw_prompt(6, index, "train", "position")
        assert relations(scene)
        left = any(f" {word}" in caption for word in ("left of", "right of"))
        above = any(f" {word} " in caption for word in ("above", "over", "higher than", "below", "under", "beneath"))
        kinds = {relation for _, relation, _ in relations(scene)}
        assert (left, above or "under water" in caption) == ("left of" in kinds, "above" in kinds or "under water" in caption)


def test_a_prompt_is_a_function_of_seed_index_split_and_task():
    assert draw_prompt(1, 2, "train") == draw_prompt(1, 2, "train")
    different = {draw_prompt(seed, index, "train")[1] for seed in (1, 2) for index in range(10)}
    assert len(different) > 15
    assert draw_prompt(0, 0, "train")[1] == "a purple plus sign over an azure block in the fog"


def test_a_long_name_above_the_demos_images_is_wrapped():
    scene, caption = draw_prompt(1, 0, "train", "word")
    image = Image.fromarray((render(scene, 8) * 255).astype(np.uint8))
    heights = [verdict_sheet([(scene, caption)], {name: [image]}).height for name in ("student", "a_student_of_a_longer_name_step-000200")]
    assert heights[1] == heights[0] + LINE_PX
