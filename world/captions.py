"""Captions of scenes, in several phrasings with synonyms, with or without a remark about nothing visible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .asides import DAYS, FEELINGS, KIN, OCCASIONS, PEOPLE, TIMES, TOWNS
from .pictures import USUAL_ARRANGEMENT, USUAL_BACKGROUND, Scene, Thing, relations
from .scenes import Split, draw_scene, pick, random_of

Random = np.random.RandomState

COLOUR_NAMES = {
    "red": ("red", "scarlet", "crimson"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "orange": ("orange", "amber"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
    "cyan": ("cyan", "turquoise"),
}
# Triangle, moon and star occur only in the teacher's texts.
SHAPE_NAMES = {
    "square": ("square", "block", "box"),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    "triangle": ("triangle", "pyramid"),
    "heart": ("heart",),
    "moon": ("moon", "crescent"),
    "star": ("star",),
    "tree": ("tree", "oak"),
}
BACKGROUND_PHRASES = {
    "snow": ("in the snow", "on white paper"),
    "night": ("at night", "in the dark"),
    "fog": ("in the fog", "in the mist"),
    "beach": ("on the beach", "on sand"),
    "sea": ("under water", "in the sea"),
    "meadow": ("on a meadow", "on the grass"),
}
PLACE_PHRASES = {
    "centre": ("in the middle", "in the centre"),
    "left": ("on the left", "at the left edge"),
    "right": ("on the right", "at the right edge"),
    "top": ("at the top", "at the upper edge"),
    "bottom": ("at the bottom", "at the lower edge"),
    "top left": ("at the top left", "in the upper left corner"),
    "top right": ("at the top right", "in the upper right corner"),
    "bottom left": ("at the bottom left", "in the lower left corner"),
    "bottom right": ("at the bottom right", "in the lower right corner"),
}
# Phrases for a relation of `relations`, and for its inverse.
RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
INVERSE = {"left of": "right of", "above": "below"}
NUMBERS = {1: ("one", "a single"), 2: ("two", "a pair of"), 3: ("three",), 4: ("four",)}
SIGNS = ("a sign that says {}", "a sign saying {}", "{} on a sign", "a sign with the words {}", "a board that reads {}", "a poster: {}")
OPENINGS = ("", "", "", "a picture of ", "we see ", "look, ", "here: ")
ASIDE_SHARE = 0.5
# Longer captions get no opening and no remark, so that all fit into TOKEN_LENGTH tokens of T5.
MANY_WORDS = 10
TOKEN_LENGTH = 34


def draw_prompt(seed: int, index: int, split: Split, task: str | None = None) -> tuple[Scene, str]:
    """Scene `index` of a split with a caption for it; a pure function of its arguments (see draw_scene)."""
    scene = draw_scene(seed, index, split, task)
    return scene, caption(scene, random_of("caption", seed, index, split, task or ""))


# Small versions of the paper's corpora, and their tasks.
CORPORA = {"objects": ("single_object",), "semantics": ("colour_shape_binding", "position", "count"), "text": ("word", "two_words")}


def write_prompts(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write the trainer's corpora: a file each, with `count` captions of the training split, one per line."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_corpus(folder / f"{name}.txt", tasks, count, seed) for name, tasks in CORPORA.items()]


def _write_corpus(path: Path, tasks: tuple[str, ...], count: int, seed: int) -> Path:
    captions = (draw_prompt(seed, index, "train", tasks[index % len(tasks)])[1] for index in range(count))
    path.write_text("".join(caption + "\n" for caption in captions), encoding="utf-8", newline="\n")
    return path


def caption(scene: Scene, random: Random) -> str:
    """One of the possible captions of a scene. It names the arrangement unless that is the usual one."""
    said = _signed(scene, random) if scene.words else _PHRASINGS[scene.task](scene, random)
    if scene.background != USUAL_BACKGROUND or random.rand() < 0.1:
        said = f"{said} {pick(random, BACKGROUND_PHRASES[scene.background])}"
    if len(said.split()) > MANY_WORDS:
        return said
    return _with_aside(said, random) if random.rand() < ASIDE_SHARE else pick(random, OPENINGS) + said


def _colour(name: str, random: Random) -> str:
    return pick(random, COLOUR_NAMES[name])


def _named(thing: Thing, random: Random) -> str:
    return with_article(f"{_colour(thing.colour, random)} {pick(random, SHAPE_NAMES[thing.shape])}")


def with_article(noun: str) -> str:
    """The noun with `a` or `an` before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The plural of a shape's name."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def _single(scene: Scene, random: Random) -> str:
    [thing] = scene.things
    usual = thing.place == "centre" and random.rand() < 0.7
    return _named(thing, random) + ("" if usual else f" {pick(random, PLACE_PHRASES[thing.place])}")


def _counted(scene: Scene, random: Random) -> str:
    count, one = len(scene.things), scene.things[0]
    colour, shape = _colour(one.colour, random), pick(random, SHAPE_NAMES[one.shape])
    return f"{pick(random, NUMBERS[count])} {colour} {shape if count == 1 else plural(shape)}"


def _bound(scene: Scene, random: Random) -> str:
    named = [_named(thing, random) for thing in scene.things]
    assert tuple(thing.place for thing in scene.things) == USUAL_ARRANGEMENT[len(named)], "expected the usual arrangement"
    return ", ".join(named[:-1]) + " and " + named[-1]


def _related(scene: Scene, random: Random) -> str:
    """Enough relations to determine all places: one for two things; for three, one between the pair and one of the third to both."""
    found = relations(scene)
    if len(scene.things) == 2:
        return _relation(found[0], random, _named(scene.things[0], random), _named(scene.things[1], random))
    names = {thing: _named(thing, random) for thing in scene.things}
    alone = next(thing for thing in scene.things if _stands_alone(thing, found))
    pair = next(triple for triple in found if alone not in triple)
    first = _relation(pair, random, names[pair[0]], names[pair[2]])
    one, relation, _ = next(triple for triple in found if alone in triple)
    phrases = RELATION_PHRASES[relation if one is alone else INVERSE[relation]]
    # The shortest if a background follows, since these are the longest captions.
    phrase = phrases[0] if scene.background != USUAL_BACKGROUND else pick(random, phrases)
    return f"{first}, and {names[alone]} {phrase} both"


def _stands_alone(thing: Thing, found: list[tuple[Thing, str, Thing]]) -> bool:
    """Whether the same relation holds between this thing and both others."""
    its = [(relation, one is thing) for one, relation, other in found if thing in (one, other)]
    return len(its) == 2 and len(set(its)) == 1


def _relation(triple: tuple[Thing, str, Thing], random: Random, one: str, other: str) -> str:
    _, relation, _ = triple
    if random.rand() < 0.5:
        return f"{one} {pick(random, RELATION_PHRASES[relation])} {other}"
    return f"{other} {pick(random, RELATION_PHRASES[INVERSE[relation]])} {one}"


def _signed(scene: Scene, random: Random) -> str:
    text = " ".join(scene.words)
    quoted = pick(random, (f'"{text}"', text.upper(), f"the words {text}" if len(scene.words) > 1 else f"the word {text}"))
    said = pick(random, SIGNS[:5] if quoted.startswith("the") else SIGNS)
    said = said.replace("with the words ", "with ") if len(scene.words) == 1 or quoted.startswith("the") else said
    return f"{said.format(quoted)} in {_colour(scene.ink, random)} letters"


_PHRASINGS: dict[str, Callable[[Scene, Random], str]] = {
    "single_object": _single,
    "count": _counted,
    "colour_shape_binding": _bound,
    "position": _related,
}


def _with_aside(said: str, random: Random) -> str:
    """The caption with a remark about people, times, places or feelings, which does not change the image."""
    person, kin, town = pick(random, PEOPLE), pick(random, KIN), pick(random, TOWNS)
    forms = (
        f"{person} painted this {pick(random, TIMES)}: {said}",
        f"{said}, a present for {person}'s {kin}",
        f"{said}, made by {person} from {town}",
        f"for {pick(random, OCCASIONS)} in {town}: {said}",
        f"{person} felt {pick(random, FEELINGS)} on {pick(random, DAYS)}; {said}",
        f"{said}; {person}'s {kin} likes it",
    )
    return pick(random, forms)
