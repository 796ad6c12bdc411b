"""T2I-CompBench's scores as pure functions of what judges found (Huang et al. 2023, arXiv:2307.06350, and its published evaluation).

Colour, shape, texture: the product of the probabilities of "yes" to every noun phrase of the prompt, asked of BLIP one by one.
Position: a quarter of each detection's confidence, and half for the relation of their boxes. Numbers: for each object of the prompt, half
for its presence and half for the right count.

Differences: the benchmark finds noun phrases and objects with spaCy, here rules do (its prompts are regular), so the metrics' names say
"phrases by rule". The benchmark cuts an object's depth out of the map with rows and columns exchanged; here they are not. Its detector is
UniDet, its depth DPT-hybrid: `metric_name` names what is used instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]
ATTRIBUTES = ("color", "shape", "texture")
BENCHMARK_DETECTOR = "UniDet"
# The benchmark detects in images whose shorter side has 479 pixels, and whose longer one has at most 480.
SHORTER_PX, LONGER_PX = 479, 480
NEAR_PX = 150
MOST_OVERLAP, MOST_OVERLAP_IN_DEPTH, SAME_OBJECT = 0.1, 0.5, 0.9
LEAST_SCORE_2D = 0.5
MOST_PHRASES = 8

BESIDE = ("on side of", "next to", "near")
# From the second object to the first: the axis and the direction in which it must be.
SIDES = {"on the left of": (0, -1), "on the right of": (0, 1), "on the top of": (1, -1), "on the bottom of": (1, 1)}
# The benchmark also looks for "on top of", but gives no half for that relation.
RELATIONS_2D = (*BESIDE, *SIDES, "on top of")
IN_FRONT, BEHIND = ("in front of",), ("behind", "hidden")
RELATIONS_3D = (*IN_FRONT, *BEHIND)

PEOPLE = ("boy", "girl", "man", "woman")
OTHER_NAMES = {**dict.fromkeys(PEOPLE, "person"), "ship": "boat", "goldfish": "fish", "painting": "picture", "television": "tv"}
# COCO's labels for objects that prompts call otherwise.
ALSO_CALLED = {"sofa": "couch", "table": "dining table", "phone": "cell phone", "bag": "handbag"}
# What the benchmark counts: the names in its examples/dataset/new_objects.txt.
OBJECTS = """
    airplane apple backpack bag balloon banana bear bee bicycle bird boat book bottle bowl boy bread butterfly cake camel camera candle
    car cat chair chicken clock computer couch cow cup deer desk dog drum duck egg fish flag frog giraffe girl goldfish guitar hamburger
    helicopter helmet horse key kite knife lamp lemon man microphone microwave mouse paddle painting peach pear pen person phone pig
    pillow plate printer rabbit refrigerator sheep ship shrimp sink sofa stool strawberry suitcase swan table television tent tomato toy
    train truck turtle vase woman
"""
COUNTED = frozenset(OBJECTS.split())
# A number may be at most so many words before its object.
REACH_WORDS = 2
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
SINGULARS = """
    men=man women=woman people=person children=child mice=mouse geese=goose feet=foot teeth=tooth
    knives=knife leaves=leaf loaves=loaf shelves=shelf wolves=wolf scarves=scarf
"""
IRREGULAR: dict[str, str] = {many: one for many, _, one in (pair.partition("=") for pair in SINGULARS.split())}

OPENING = "the this that these those its his her their my your our some"
DETERMINERS = frozenset(OPENING.split()) | frozenset(NUMBERS)
JOINTS = """
    and or but with without on in at of off to from by for under over above below behind beside beneath between near next into onto through
    across against around inside outside along toward towards is are was were be been being has have had there while as than then which who
    whose when where not very side top left right front bottom
"""
BETWEEN_PHRASES = frozenset(JOINTS.split())
# Words that are part of a relation only after "the": "a left shoe" keeps its word.
PLACES = frozenset(("side", "top", "left", "right", "front", "bottom"))


@dataclass(frozen=True)
class Detection:
    """An object that a detector found: box is left, top, right, bottom in pixels of the image; confidence in 0..1."""

    label: str
    box: Box
    confidence: float


def metric_name(category: str, judge: str = "") -> str:
    """The name of a score, which says where judge or method differ from the benchmark's."""
    if category in ATTRIBUTES:
        return f"CompBench {category} (BLIP-VQA, phrases by rule)"
    return f"CompBench {category}" + (f" ({judge}, not {BENCHMARK_DETECTOR})" if judge != BENCHMARK_DETECTOR else "")


def noun_phrases(prompt: str) -> list[str]:
    """The phrases that name a thing, at most eight as in the benchmark: a new one starts at each article or number, and after each joint.

    "A green bench and the blue bowl." has "a green bench" and "the blue bowl".
    """
    phrases: list[list[str]] = [[]]
    for word in re.findall(r"[\w'-]+|[^\w\s]", prompt.lower()):
        before = phrases[-1]
        joint = word in BETWEEN_PHRASES and (word not in PLACES or not before or before == ["the"])
        if joint or not re.match(r"\w", word) or word in DETERMINERS:
            phrases.append([word] if word in DETERMINERS else [])
        else:
            before.append(word)
    return [" ".join(words) for words in phrases if set(words) - DETERMINERS][:MOST_PHRASES]


def attribute_score(probabilities_of_yes: Sequence[float]) -> float:
    """The product over the noun phrases of a prompt; 1 without any, as in the benchmark."""
    return math.prod(probabilities_of_yes)


def relation_in(prompt: str, relations: Sequence[str]) -> tuple[str, str, str]:
    """First object, relation, second object of a prompt. Raises ValueError if it has none of the relations or lacks an object."""
    relation = next((words for words in relations if words in prompt.lower()), None)
    if relation is not None:
        first, _, second = prompt.lower().partition(relation)
        objects = noun_phrases(first)[:1], noun_phrases(second)[-1:]
        if all(objects):
            return _bare(objects[0][0]), relation, _bare(objects[1][0])
    raise ValueError(
        f'"{prompt}" relates no two objects: expected one of {", ".join(relations)} between them.\n'
        "What to do: leave the prompt out of this category."
    )


def _bare(phrase: str) -> str:
    """A noun phrase without its article or number."""
    first, _, rest = phrase.partition(" ")
    return rest if rest and first in DETERMINERS else phrase


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    shared = _shared(a, b)
    return shared / (_area(a) + _area(b) - shared) if shared else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def position_score(relation: str, first: Box, second: Box, size_px: Sequence[int]) -> float:
    """How well two boxes fit a 2D relation, in 0..1, in an image of these two sides."""
    scale = min(SHORTER_PX / min(size_px), LONGER_PX / max(size_px))
    apart = [scale * ((first[axis] + first[axis + 2]) - (second[axis] + second[axis + 2])) / 2 for axis in (0, 1)]
    if relation in BESIDE:
        near = min(abs(apart[0]), abs(apart[1])) < NEAR_PX
        return 1.0 if near else NEAR_PX / max(abs(apart[0]), abs(apart[1]))
    if relation not in SIDES:
        return 0.0
    axis, direction = SIDES[relation]
    if apart[axis] * direction <= 0 or abs(apart[axis]) <= abs(apart[1 - axis]):
        return 0.0
    return min(1.0, MOST_OVERLAP / max(overlap(first, second), MOST_OVERLAP))


def depth_score(relation: str, first: Box, second: Box, nearness_HW: np.ndarray) -> float:
    """How well two boxes fit a 3D relation, in 0..1: they must overlap, and the right one must be nearer (larger in the map)."""
    shared = overlap(first, second)
    difference = _mean_within(nearness_HW, first) - _mean_within(nearness_HW, second)
    right = difference > 0 if relation in IN_FRONT else difference < 0 if relation in BEHIND else False
    return min(1.0, shared / MOST_OVERLAP_IN_DEPTH) if right else 0.0


def _mean_within(map_HW: np.ndarray, box: Box) -> float:
    left, top, right, bottom = (max(0, int(edge)) for edge in box)
    within = map_HW[top:bottom, left:right]
    return float(within.mean()) if within.size else math.nan


def labels_for(name: str) -> list[str]:
    """Labels that a detector may give an object of a prompt: its complete name, else its last word ("a red bird" is a bird), else COCO's
    word."""
    last = name.rpartition(" ")[2]
    names = [OTHER_NAMES.get(last, name), OTHER_NAMES.get(last, last), ALSO_CALLED.get(last)]
    return list(dict.fromkeys(filter(None, names)))


def _found(name: str, detections: Sequence[Detection], loosely: bool) -> Detection | None:
    """The most confident detection of an object; loosely, a label that contains its name counts."""
    for wanted in labels_for(name):
        fits = [one for one in detections if (wanted in one.label if loosely else wanted == one.label)]
        if fits:
            return max(fits, key=lambda detection: detection.confidence)
    return None


def spatial_score(prompt: str, detections: Sequence[Detection], size_px: Sequence[int]) -> float:
    """The benchmark's 2D score of one image in 0..1; below one half it counts as none. Raises ValueError if there is no relation."""
    first, relation, second = relation_in(prompt, RELATIONS_2D)
    a, b = (_found(name, detections, loosely=False) for name in (first, second))
    position = position_score(relation, a.box, b.box, size_px) if a and b else 0.0
    score = _quarters(a, b) + position / 2
    return score if score >= LEAST_SCORE_2D else 0.0


def spatial_3d_score(prompt: str, detections: Sequence[Detection], nearness_HW: np.ndarray) -> float:
    """The benchmark's 3D score of one image in 0..1. Raises ValueError if the prompt has no such relation."""
    first, relation, second = relation_in(prompt, RELATIONS_3D)
    a, b = (_found(name, detections, loosely=True) for name in (first, second))
    return _quarters(a, b) + (depth_score(relation, a.box, b.box, nearness_HW) / 2 if a and b else 0.0)


def _quarters(*found: Detection | None) -> float:
    return sum(detection.confidence / 4 for detection in found if detection)


def counted_objects(prompt: str) -> list[tuple[int, str]]:
    """Number and singular name of each object that a prompt counts, of those that the benchmark knows: "three cats and a red bird ate" has
    3 cat, 1 bird."""
    words, counted = re.findall(r"[\w'-]+|[^\w\s]", prompt.lower()), []
    for place, number in enumerate(words):
        if number in NUMBERS:
            after = words[place + 1 : place + 1 + REACH_WORDS]
            known = [name for word in after for name in (word, singular(word)) if name in COUNTED]
            counted += [(NUMBERS[number], name) for name in known[:1]]
    return counted


def singular(name: str) -> str:
    """An English noun's singular by rule, for names of things; words before it are unchanged."""
    before, space, word = name.rpartition(" ")
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith(("ches", "shes", "sses", "xes", "toes")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    return before + space + word


def without_doubles(detections: Sequence[Detection]) -> list[Detection]:
    """Detections of one label whose boxes are nearly the same, or one inside the other, count once: the most confident."""
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda detection: -detection.confidence):
        if not any(detection.label == other.label and _nearly_same(detection.box, other.box) for other in kept):
            kept.append(detection)
    return kept


def _nearly_same(a: Box, b: Box) -> bool:
    """In pixels, both edges included, as in the benchmark."""
    a, b = ((box[0], box[1], box[2] + 1, box[3] + 1) for box in (a, b))
    return max(overlap(a, b), _shared(a, b) / _area(a), _shared(a, b) / _area(b)) > SAME_OBJECT


def numeracy_score(prompt: str, detections: Sequence[Detection]) -> float:
    """The benchmark's score of the numbers of objects in one image, in 0..1. Raises ValueError if the prompt counts nothing."""
    asked = counted_objects(prompt)
    if not asked:
        raise ValueError(
            f'"{prompt}" counts no objects: expected a number from one to eight before one of {", ".join(sorted(COUNTED))}.\n'
            "What to do: leave the prompt out of this category."
        )
    labels = [detection.label for detection in without_doubles(detections)]
    return sum(_count_score(number, name, labels) for number, name in asked) / len(asked)


def _count_score(number: int, name: str, labels: Sequence[str]) -> float:
    """Half for presence, half for the right count; labels that contain the name count if none equals it."""
    for wanted in labels_for(name):
        count = labels.count(wanted) or sum(wanted in label for label in labels)
        if count:
            return 0.5 + 0.5 * (count == number)
    return 0.0
