"""The teacher's training texts: captions, and sentences about nothing visible. Text `index` is a pure function of seed and index.

Facts about people, towns and words are fixed by hashing, the same in every text, so that the teacher can learn them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..world.asides import DAYS, FEELINGS, JOBS, KIN, OCCASIONS, PEOPLE, TIMES, TOWNS
from ..world.captions import BACKGROUND_PHRASES, COLOUR_NAMES, SHAPE_NAMES, draw_prompt, with_article
from ..world.scenes import Choice, pick, random_of
from ..world.words import WORDS

Random = np.random.RandomState

FOODS = ("soup", "rice", "bread", "cheese", "plums", "pancakes", "lentils", "fish", "cherries", "noodles", "potatoes", "olives")
SUBJECTS = ("history", "music", "physics", "Latin", "geography", "chemistry", "law", "poetry", "economics", "biology")
RIVERS = ("a wide river", "an old harbour", "a famous bridge", "a steep hill", "a large market", "a quiet library", "a cathedral")
LANGUAGES = ("Portuguese", "German", "Arabic", "Spanish", "Norwegian", "Japanese", "English", "Czech", "French", "Turkish")
_NUMBERS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
"""
NUMBER_NAMES = tuple(_NUMBERS.split())
# The share of texts that are captions; the others describe nothing visible.
CAPTION_SHARE = 1 / 3
SENTENCES_IN_A_TEXT = (1, 2, 3)


def fact(choices: Sequence[Choice], *about: str) -> Choice:
    """The choice for this subject, the same in every text."""
    return pick(random_of("fact", *about), choices)


def draw_text(seed: int, index: int) -> str:
    """Text `index`: a caption of the training split, or one to three sentences about nothing visible."""
    random = random_of("text", seed, index)
    if random.rand() < CAPTION_SHARE:
        return draw_prompt(seed, index, "train")[1]
    sentences = [_sentence(random) for _ in range(pick(random, SENTENCES_IN_A_TEXT))]
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _sentence(random: Random) -> str:
    return pick(random, _SENTENCES)(random)


def _work(random: Random) -> str:
    person = pick(random, PEOPLE)
    return f"{person} is {with_article(fact(JOBS, 'job', person))} in {fact(TOWNS, 'home', person)}"


def _kinship(random: Random) -> str:
    person, kin = pick(random, PEOPLE), pick(random, KIN)
    return f"{person}'s {kin} is called {fact(PEOPLE, kin, person)} and lives in {fact(TOWNS, kin, person)}"


def _taste(random: Random) -> str:
    person = pick(random, PEOPLE)
    verb = pick(random, ("likes", "eats", "cooks"))
    return f"{person} {verb} {fact(FOODS, 'food', person)} on {pick(random, DAYS)}s but never {fact(FOODS, 'dislike', person)}"


def _study(random: Random) -> str:
    person = pick(random, PEOPLE)
    return f"{pick(random, TIMES)} {person} studied {fact(SUBJECTS, 'subject', person)} and learned {fact(LANGUAGES, 'language', person)}"


def _mood(random: Random) -> str:
    person, occasion = pick(random, PEOPLE), pick(random, OCCASIONS)
    return f"{person} was {fact(FEELINGS, person, occasion)} because of {occasion}, and stayed {fact(FEELINGS, occasion)}"


def _town(random: Random) -> str:
    town = pick(random, TOWNS)
    return f"{town} has {fact(RIVERS, 'sight', town)}, and people there speak {fact(LANGUAGES, 'speech', town)}"


def _journey(random: Random) -> str:
    start, end = pick(random, TOWNS), pick(random, TOWNS)
    hours = fact(NUMBER_NAMES[2:], *sorted((start, end)))
    return f"the train from {start} to {end} takes {hours} hours and leaves on {fact(DAYS, 'train', start, end)}"


def _event(random: Random) -> str:
    occasion, town = pick(random, OCCASIONS), pick(random, TOWNS)
    return f"{pick(random, TIMES)} there was {occasion} in {town}, and {pick(random, PEOPLE)} felt {pick(random, FEELINGS)}"


def _sum(random: Random) -> str:
    one, other = int(random.randint(10)), int(random.randint(9))
    return f"{NUMBER_NAMES[one]} plus {NUMBER_NAMES[other]} is {NUMBER_NAMES[one + other]}"


def _calendar(random: Random) -> str:
    day = int(random.randint(7))
    return f"the day after {DAYS[day]} is {DAYS[(day + 1) % 7]}, and the day before it is {DAYS[day - 1]}"


def _spelling(random: Random) -> str:
    word = pick(random, WORDS)
    said = pick(random, (f"the word {word}", f'"{word}"', word.upper()))
    letters = pick(random, (" ", ", ", "-")).join(word.upper())
    return pick(random, (f"{said} is spelt {letters}", f"the letters {letters} make {said}"))


def _letters(random: Random) -> str:
    word, place = pick(random, WORDS), int(random.randint(3))
    return f"the {('first', 'second', 'third')[place]} letter of {word} is {word[place].upper()}"


def _synonym(random: Random) -> str:
    colour, *others = pick(random, [names for names in (*COLOUR_NAMES.values(), *SHAPE_NAMES.values()) if len(names) > 1])
    return f"{pick(random, others)} means nearly the same as {colour}"


def _place(random: Random) -> str:
    one, other = pick(random, list(BACKGROUND_PHRASES.values()))
    return f"what is {one} is {other}, {pick(random, PEOPLE)} said"


# Spelling twice as often: a sign with a word that was never drawn depends on it.
_SENTENCES: tuple[Callable[[Random], str], ...] = (
    *(_work, _kinship, _taste, _study, _mood, _town, _journey, _event, _sum, _calendar, _spelling, _spelling, _letters, _letters),
    *(_synonym, _place),
)
