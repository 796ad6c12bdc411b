"""CommonText: generated prompts that ask for a written text, `{subject} {action} {text}` (section 4.1 of arXiv:2503.19897).

Subjects, actions and short sentences are in words/*.txt. The common words come from the package wordfreq: its data are CC BY-SA 4.0, which
an Apache-2.0 repository cannot redistribute, so the list is made at run time. MIXES holds the proportions: `paper` has the authors', in
`varied` some texts have several words, mixed case or numbers. The lists, and so the prompts, are not the authors'.

One stable hash decides to which split a prompt belongs, another which words are never trained on; the seed only chooses within a split. So
splits never overlap, whatever their seeds and sizes.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Literal, TypeVar

from ..runtime.optional import needed, pip_install
from .corpora import MixName, Prompt, PromptError

Split = Literal["train", "validation", "unseen_words"]
Item = TypeVar("Item")

# Percent of the prompts by the kind of their text: one word, one of the 500 sentences, two to four words, one to three words in mixed case,
# a text with digits.
VARIED = {"word": 40, "sentence": 20, "words": 15, "case": 15, "number": 10}
PAPER = {"word": 96, "sentence": 4}
MIXES: dict[MixName, dict[Split, dict[str, int]]] = {
    "varied": {"train": VARIED, "validation": VARIED, "unseen_words": {"word": 50, "words": 25, "case": 25}},
    "paper": {"train": PAPER, "validation": PAPER, "unseen_words": {"word": 100}},
}
COUNTS: dict[Split, int] = {"train": 50_000, "validation": 1_000, "unseen_words": 1_000}
VALIDATION_SHARE = 1 / 16
UNSEEN_SHARE = 1 / 16

WORDS = Path(__file__).parent / "words"
COMMON_WORDS = 5_000
FREQUENT = 6_000  # before those are removed that are not words or are in words/left_out.txt
TWO_LETTERS = re.compile("a[dhmnst]|b[ey]|do|go|h[aei]|i[fnst]|m[ery]|no|o[fhknr]|so|t[ov]|u[ps]|we")
WORDFREQ = "3.1.1"
COMMON_WORDS_SHA256 = "211858b79472a108a1ea8a88be3e79155286261e17e796599da4301e6539cf4a"

PRICE_OR_TIME = ("{hour}:{minute:02}", "${hour}.{minute:02}")
NUMBERS = (*PRICE_OR_TIME, "{n}", "{n}%", "{year}", "No. {n}", "Room {n}", "Route {n}", "{word} {n}", "{n} {word}")


@functools.cache
def own_list(name: str) -> tuple[str, ...]:
    """The lines of a list in words/, without comments."""
    lines = (WORDS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


@functools.cache
def subjects() -> tuple[tuple[str, str], ...]:
    """(kind, subject): human, animal, thing, sign, vehicle, food."""
    pairs = (line.partition(": ") for line in own_list("subjects"))
    return tuple((kind, subject) for kind, _, subject in pairs)


@functools.cache
def actions(kind: str) -> tuple[str, ...]:
    """The actions of a kind of subject."""
    pairs = (line.partition(": ") for line in own_list("actions"))
    return tuple(action for kinds, _, action in pairs if kind in kinds.split(", "))


@functools.cache
def common_words() -> tuple[str, ...]:
    """The 5,000 most frequent English words of letters alone, without those in words/left_out.txt.

    Raises ValueError if wordfreq is missing or has other words (a resumed run would train on other prompts).
    """
    wordfreq = needed("wordfreq", f"wordfreq=={WORDFREQ}", "CommonText")
    left_out = frozenset(own_list("left_out"))
    frequent = wordfreq.top_n_list("en", FREQUENT, wordlist="best")
    plain = (word for word in frequent if re.fullmatch("[a-z]{3,}|[ai]", word) or TWO_LETTERS.fullmatch(word))
    words = tuple(word for word in plain if word not in left_out)[:COMMON_WORDS]
    if hashlib.sha256("\n".join(words).encode()).hexdigest() != COMMON_WORDS_SHA256:
        problem = f"CommonText needs the common words of wordfreq {WORDFREQ}; the installed version has different ones."
        raise PromptError(problem, pip_install(f"wordfreq=={WORDFREQ}"))
    return words


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _words_in(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.casefold()))


@functools.cache
def unseen_words() -> frozenset[str]:
    """The common words that no training prompt contains: about one in sixteen of those that are not in words/."""
    ours = _words_in(" ".join([*own_list("subjects"), *own_list("actions"), *own_list("sentences"), *NUMBERS, "number words"]))
    return frozenset(word for word in common_words() if word not in ours and _share(f"unseen {word}") < UNSEEN_SHARE)


@functools.cache
def _vocabulary(split: Split) -> tuple[str, ...]:
    """The common words of a split."""
    return tuple(word for word in common_words() if (word in unseen_words()) == (split == "unseen_words"))


def _pick(random: Random, items: Sequence[Item]) -> Item:
    """One of the items. Of Random's methods only random() is guaranteed to stay reproducible between Python versions."""
    return items[int(random.random() * len(items))]


def _number(random: Random, word: str) -> str:
    n = int(10 ** (random.random() * 4))  # one to four digits, equally often
    hour, minute, year = 1 + int(random.random() * 12), int(random.random() * 60), 1800 + int(random.random() * 300)
    return _pick(random, NUMBERS).format(n=n, hour=hour, minute=minute, year=year, word=word)


def _mixed_case(random: Random, words: list[str]) -> str:
    """Words in one of five cases: CAPITALS, Title Case, one of them in CAPITALS, RunTogether, aT rAnDom."""
    case = int(random.random() * 5)
    loud = int(random.random() * len(words))
    every = " ".join(words)
    return (
        every.upper(),
        every.title(),
        " ".join(word.upper() if index == loud else word for index, word in enumerate(words)),
        every.title().replace(" ", ""),
        "".join(letter.upper() if random.random() < 0.5 else letter for letter in every),
    )[case]


def _target(random: Random, split: Split, mix: MixName) -> str:
    """A text to render, its kind drawn by the proportions of mix and split."""
    kinds = [kind for kind, percent in MIXES[mix][split].items() for _ in range(percent)]
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
    """The noun for a text in a prompt."""
    if not any(character.isalpha() for character in target):
        return "number"
    return "words" if " " in target else "word"


def _draw(random: Random, split: Split, mix: MixName) -> Prompt:
    kind, subject = _pick(random, subjects())
    target = _target(random, split, mix)
    action = _pick(random, actions(kind)).replace("{words}", _noun(target)).replace("{text}", target)
    return Prompt(f"{subject} {action}", target)


def _belongs(prompt: Prompt, split: Split) -> bool:
    """Whether a prompt belongs to a split."""
    if split == "unseen_words":
        return True
    if not unseen_words().isdisjoint(_words_in(prompt.text)):
        return False  # RunTogether can form an unseen word, as "work" and "shop" do
    return (_share(prompt.text) < VALIDATION_SHARE) == (split == "validation")


def common_text(split: Split, count: int, seed: int, mix: MixName = "varied") -> list[Prompt]:
    """`count` different prompts of a split, each with its `target`, the text to render.

    Depends on its arguments alone; a smaller count gives the beginning of the same list. No prompt is in two splits, and no word of
    `unseen_words` occurs in the other two, in whichever mix.

    Raises ValueError if wordfreq is missing, PromptError if there are fewer prompts.
    """
    random = Random(f"CommonText {split} {seed}")
    prompts: dict[Prompt, None] = {}
    for _ in range(100_000 + 100 * count):
        if len(prompts) >= count:
            return list(prompts)
        prompt = _draw(random, split, mix)
        if _belongs(prompt, split):
            prompts[prompt] = None
    raise PromptError(f"CommonText, split {split}: expected {count:,} different prompts, got {len(prompts):,}.", "ask for fewer.")
