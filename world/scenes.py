"""Random scenes, a pure function of seed and index, and the combinations that are held out from training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

from .pictures import (
    BACKGROUNDS,
    COLOURS,
    COLUMN,
    PLACES,
    ROW,
    SHAPES,
    TASKS,
    THREES,
    USUAL_ARRANGEMENT,
    USUAL_BACKGROUND,
    Scene,
    Thing,
    relations,
)
from .words import DRAWN, WORDS

Split = Literal["train", "held_out"]
Combination = tuple[str | int, ...]
Choice = TypeVar("Choice")

# A word that training never draws; the teacher knows its spelling from texts. No accuracy is expected of it.
NEW_WORD = "new_word"
# The kind of combination that is new in the held-out scenes of a task; the rest of a scene occurs in training.
NEW_IN_TASK = {
    "single_object": "object",
    "colour_shape_binding": "object",
    "position": "relation",
    "count": "count",
    "word": "sign",
    "two_words": "pair",
    NEW_WORD: "word",
}
# One in this many combinations is held out; of objects one shape per colour.
HELD_OUT_ONE_OF = {"relation": 10, "count": 8, "sign": 10, "pair": 10}
# The share of position scenes with three things.
THREE_SHARE = 0.25
# The share of each task in training.
SHARES = {"single_object": 0.14, "colour_shape_binding": 0.18, "position": 0.24, "count": 0.14, "word": 0.16, "two_words": 0.14}
MOST_TRIES = 10_000


def random_of(*key: str | int) -> np.random.RandomState:
    """A random generator for a key. NumPy guarantees the numbers of RandomState in all versions."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


def pick(random: np.random.RandomState, choices: Sequence[Choice]) -> Choice:
    """One of the choices, uniformly at random."""
    return choices[random.randint(len(choices))]


def held_out(combination: Combination) -> bool:
    """Whether this combination is held out from training."""
    kind, *parts = combination
    if kind == "object":
        colour, shape = list(COLOURS).index(str(parts[0])), list(SHAPES).index(str(parts[1]))
        return (3 * colour + shape) % len(SHAPES) == 0
    if kind == "word":
        return parts[0] not in DRAWN
    digest = hashlib.sha256(repr(combination).encode()).digest()
    return int.from_bytes(digest[:8], "little") % HELD_OUT_ONE_OF[str(kind)] == 0


def combinations(scene: Scene) -> set[Combination]:
    """The combinations in a scene: colours with shapes, shapes with relations, counts, words with colours and with words."""
    found: set[Combination] = {("object", thing.colour, thing.shape) for thing in scene.things}
    found |= {("relation", one.shape, relation, other.shape) for one, relation, other in relations(scene) if scene.task != "count"}
    if scene.task == "count":
        found.add(("count", len(scene.things), scene.things[0].colour, scene.things[0].shape))
    new = {("word", word) for word in scene.words if held_out(("word", word))}
    if new:
        # A word that was never drawn makes every combination with it new.
        return found | new
    found |= {("sign", word, scene.ink) for word in scene.words} | {("word", word) for word in scene.words}
    return found | ({("pair", *scene.words)} if len(scene.words) > 1 else set())


def new_kinds(scene: Scene) -> set[str]:
    """The kinds of held-out combinations in the scene; empty for a scene of the training split."""
    return {str(combination[0]) for combination in combinations(scene) if held_out(combination)}


def draw_scene(seed: int, index: int, split: Split, task: str | None = None) -> Scene:
    """Scene `index` of a split, of the given task (NEW_WORD only held out) or of a task drawn by SHARES."""
    random = random_of("scene", seed, index, split, task or "")
    chosen = task or TASKS[int(random.choice(len(TASKS), p=[SHARES[name] for name in TASKS]))]
    wanted = {NEW_IN_TASK[chosen]} if split == "held_out" else set()
    for _ in range(MOST_TRIES):
        scene = _any_scene(random, chosen)
        if new_kinds(scene) == wanted:
            return scene
    raise ValueError(f"No scene of {split} for {chosen} in {MOST_TRIES} tries.\nWhat to do: ask for one of {', '.join(NEW_IN_TASK)}.")


def _any_scene(random: np.random.RandomState, task: str) -> Scene:
    background = USUAL_BACKGROUND if random.rand() < 0.4 else pick(random, list(BACKGROUNDS))
    if task == NEW_WORD:
        return Scene("word", background, words=(pick(random, WORDS),), ink=pick(random, list(COLOURS)))
    if task in ("word", "two_words"):
        words = tuple(pick(random, DRAWN) for _ in range(1 if task == "word" else 2))
        return Scene(task, background, words=words, ink=pick(random, list(COLOURS)))
    return Scene(task, background, things=_any_things(random, task))


def _any_things(random: np.random.RandomState, task: str) -> tuple[Thing, ...]:
    if task == "single_object":
        return _things(random, ["centre" if random.rand() < 0.4 else pick(random, list(PLACES))])
    if task == "count":
        arrangement = USUAL_ARRANGEMENT[1 + random.randint(4)]
        [one] = _things(random, ["centre"])
        return tuple(Thing(one.colour, one.shape, place) for place in arrangement)
    if task == "colour_shape_binding":
        return _things(random, USUAL_ARRANGEMENT[2 + int(random.rand() < 0.3)])
    assert task == "position", task
    return _things(random, pick(random, THREES) if random.rand() < THREE_SHARE else pick(random, [ROW, COLUMN]))


def _things(random: np.random.RandomState, places: Sequence[str]) -> tuple[Thing, ...]:
    """Things with different shapes and colours, so that captions are unambiguous."""
    colours = [list(COLOURS)[number] for number in random.permutation(len(COLOURS))]
    shapes = [list(SHAPES)[number] for number in random.permutation(len(SHAPES))]
    return tuple(Thing(colour, shape, place) for colour, shape, place in zip(colours, shapes, places, strict=False))
