"""CommonText: prompts that ask for a written text, `{subject} {action} {text}` (section 4.1 of arXiv:2503.19897), generated here.

Subjects, actions and short sentences are our own (words/*.txt). The common words come from the package wordfreq: its data are CC BY-SA 4.0,
which an Apache-2.0 repository cannot pass on as its own, so the list is made where it is used. MIX holds the proportions; several words,
mixed case and numbers are what the authors' set lacks.

One stable hash decides which split a prompt may be in, another which words are never trained on; the seed only chooses among what a split
may hold. So two splits never overlap, whatever their seeds and sizes.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Literal, TypeVar

from ..runtime.optional import pip_install
from .corpora import Prompt, PromptError

Split = Literal["train", "validation", "unseen_words"]
Item = TypeVar("Item")

# Percent of the prompts, by what their text is: one word, one of the 500 sentences, two to four words, one to three words in mixed case,
# something with digits.
MIX: dict[Split, dict[str, int]] = {
    "train": {"word": 40, "sentence": 20, "words": 15, "case": 15, "number": 10},
    "validation": {"word": 40, "sentence": 20, "words": 15, "case": 15, "number": 10},
    "unseen_words": {"word": 50, "words": 25, "case": 25},
}
COUNTS: dict[Split, int] = {"train": 50_000, "validation": 1_000, "unseen_words": 1_000}
VALIDATION_SHARE = 1 / 16
UNSEEN_SHARE = 1 / 16

WORDS = Path(__file__).parent / "words"
COMMON_WORDS = 5_000
LOOKED_AT = 6_000  # the most frequent ones, before those are left out that are no words or that nobody should draw
TWO_LETTERS = re.compile("a[dhmnst]|b[ey]|do|go|h[aei]|i[fnst]|m[ery]|no|o[fhknr]|so|t[ov]|u[ps]|we")
WORDFREQ = "3.1.1"
COMMON_WORDS_SHA256 = "211858b79472a108a1ea8a88be3e79155286261e17e796599da4301e6539cf4a"

PRICE_OR_TIME = ("{hour}:{minute:02}", "${hour}.{minute:02}")
NUMBERS = (*PRICE_OR_TIME, "{n}", "{n}%", "{year}", "No. {n}", "Room {n}", "Route {n}", "{word} {n}", "{n} {word}")


@functools.cache
def own_list(name: str) -> tuple[str, ...]:
    """The lines of one of our lists in words/, without comments."""
    lines = (WORDS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


@functools.cache
def subjects() -> tuple[tuple[str, str], ...]:
    """(kind, subject): humans, animals and objects, these as things, signs, vehicles and food."""
    pairs = (line.partition(": ") for line in own_list("subjects"))
    return tuple((kind, subject) for kind, _, subject in pairs)


@functools.cache
def actions(kind: str) -> tuple[str, ...]:
    """What a subject of this kind can do with a text."""
    pairs = (line.partition(": ") for line in own_list("actions"))
    return tuple(action for kinds, _, action in pairs if kind in kinds.split(", "))


@functools.cache
def common_words() -> tuple[str, ...]:
    """The 5,000 most frequent English words of letters alone, without those in words/left_out.txt.

    Raises PromptError: wordfreq is missing, or is one with other words (a resumed run would train on other prompts).
    """
    try:
        import wordfreq
    except ModuleNotFoundError as error:
        raise PromptError("CommonText needs the package wordfreq.", pip_install(f"wordfreq=={WORDFREQ}")) from error
    left_out = frozenset(own_list("left_out"))
    frequent = wordfreq.top_n_list("en", LOOKED_AT, wordlist="best")
    plain = (word for word in frequent if re.fullmatch("[a-z]{3,}|[ai]", word) or TWO_LETTERS.fullmatch(word))
    words = tuple(word for word in plain if word not in left_out)[:COMMON_WORDS]
    if hashlib.sha256("\n".join(words).encode()).hexdigest() != COMMON_WORDS_SHA256:
        problem = f"The installed wordfreq has other common words than wordfreq {WORDFREQ}, so CommonText would differ."
        raise PromptError(problem, pip_install(f"wordfreq=={WORDFREQ}"))
    return words


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, on every machine the same."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _words_in(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.casefold()))


@functools.cache
def unseen_words() -> frozenset[str]:
    """The common words that no training prompt contains: about one in sixteen of those that our own lists do not use."""
    ours = _words_in(" ".join([*own_list("subjects"), *own_list("actions"), *own_list("sentences"), *NUMBERS, "number words"]))
    return frozenset(word for word in common_words() if word not in ours and _share(f"unseen {word}") < UNSEEN_SHARE)


@functools.cache
def _vocabulary(split: Split) -> tuple[str, ...]:
    """The common words that a split may ask for."""
    return tuple(word for word in common_words() if (word in unseen_words()) == (split == "unseen_words"))


def _pick(random: Random, items: Sequence[Item]) -> Item:
    """One of the items. Of Python's generators only random() is promised to give the same numbers for ever."""
    return items[int(random.random() * len(items))]


def _number(random: Random, word: str) -> str:
    n = int(10 ** (random.random() * 4))  # as many of one digit as of four
    hour, minute, year = 1 + int(random.random() * 12), int(random.random() * 60), 1800 + int(random.random() * 300)
    return _pick(random, NUMBERS).format(n=n, hour=hour, minute=minute, year=year, word=word)


def _mixed_case(random: Random, words: list[str]) -> str:
    """Words in one of five ways of writing: CAPITALS, Title Case, one of them in CAPITALS, RunTogether, aT rAnDom."""
    way = int(random.random() * 5)
    loud = int(random.random() * len(words))
    every = " ".join(words)
    return (
        every.upper(),
        every.title(),
        " ".join(word.upper() if index == loud else word for index, word in enumerate(words)),
        every.title().replace(" ", ""),
        "".join(letter.upper() if random.random() < 0.5 else letter for letter in every),
    )[way]


def _target(random: Random, split: Split) -> str:
    """A text to be rendered, its kind drawn by the split's proportions."""
    kinds = [kind for kind, percent in MIX[split].items() for _ in range(percent)]
    kind = _pick(random, kinds)
    words = [_pick(random, _vocabulary(split)) for _ in range(4)]
    if kind == "word":
        return words[0]
    if kind == "words":
        return " ".join(words[: 2 + int(random.random() * 3)])
    if kind == "case":
        return _mixed_case(random, words[: 1 + int(random.random() * 3)])
    return _pick(random, own_list("sentences")) if kind == "sentence" else _number(random, words[0])


def _noun(target: str) -> str:
    """What an English sentence calls a text."""
    if not any(character.isalpha() for character in target):
        return "number"
    return "words" if " " in target else "word"


def _draw(random: Random, split: Split) -> Prompt:
    kind, subject = _pick(random, subjects())
    target = _target(random, split)
    action = _pick(random, actions(kind)).replace("{words}", _noun(target)).replace("{text}", target)
    return Prompt(f"{subject} {action}", target)


def _belongs(prompt: Prompt, split: Split) -> bool:
    """Whether a prompt may be in a split."""
    if split == "unseen_words":
        return True
    if not unseen_words().isdisjoint(_words_in(prompt.text)):
        return False  # "work" and "shop" run together
    return (_share(prompt.text) < VALIDATION_SHARE) == (split == "validation")


def common_text(split: Split, count: int, seed: int) -> list[Prompt]:
    """`count` different prompts of a split, each with its `target`, the text to be rendered.

    A function of its arguments alone; a smaller count gives the beginning of the same list. Prompts of different splits never coincide, nor
    does a word of `unseen_words` occur in the other two. Raises PromptError: wordfreq is missing, or there are not so many prompts.
    """
    random = Random(f"CommonText {split} {seed}")
    prompts: dict[Prompt, None] = {}
    for _ in range(100_000 + 100 * count):
        if len(prompts) >= count:
            return list(prompts)
        prompt = _draw(random, split)
        if _belongs(prompt, split):
            prompts[prompt] = None
    raise PromptError(f"CommonText has no {count:,} different prompts in its split {split}: {len(prompts):,} were found.", "ask for fewer.")
