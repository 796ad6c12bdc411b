"""Which texts a run takes from its teacher, and what they take on disk."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..encoder.text_shards import FORMATS
from ..runtime.errors import UserError
from .batches import Schedule
from .recipe import Recipe

# Bytes of a token's id, of the scale of a token's row, and of a number of the pooled vector.
ID_BYTES = SCALE_BYTES = FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """How many texts a run needs and their bytes on disk; `known`: their number is expected, else at most this."""

    texts: float
    size: float
    known: bool

    def __str__(self) -> str:
        return f"{'about' if self.known else 'at most'} {self.texts:,.0f} texts, {shown(self.size)}"


def shown(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def key_of(prompt: str, length: int) -> str:
    """The name of a prompt's text at a token length in the cache of one teacher."""
    return f"{length}-{hashlib.sha256(prompt.encode()).hexdigest()[:32]}"


def wanted(schedule: Schedule) -> dict[str, tuple[str, int]]:
    """The prompt and token length of every text that the run takes from its teacher, by key, in the order in which it trains.

    With CFG also the empty prompt. Longer stages and other previews, which a resumed run may have, need more.
    """
    return _by_key(schedule.texts(), schedule.recipe)


def of_an_estimate(schedule: Schedule) -> dict[str, tuple[str, int]]:
    """The texts of the first trajectory of every stage, and of those from which the teacher's variance is measured."""
    stages = range(len(schedule.recipe.stages))
    batches = [batch for stage in stages for batch in (*schedule.first(stage), *schedule.sample(stage))]
    return _by_key(((prompt, batch.drawn.token_length) for batch in batches for prompt in batch.prompts), schedule.recipe)


def _by_key(texts: Iterable[tuple[str, int]], recipe: Recipe) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    for prompt, length in texts:
        found[key_of(prompt, length)] = prompt, length
        if recipe.sampling.cfg:
            found[key_of("", length)] = "", length
    return found


def text_bytes(recipe: Recipe, length: float, width: int) -> float:
    """Bytes on disk of a text of so many tokens and channels, where no rows are equal."""
    part, family = recipe.teacher, recipe.family
    number = FORMATS[part.cache_format].itemsize
    scale = SCALE_BYTES if part.cache_format == "fp8" else 0
    channels = sum(family.companions.values())
    rows_before = family.most_rows_before if part.companions else 0
    return length * (width * number + scale + ID_BYTES) + rows_before * (channels * number + scale) + channels * FLOAT32_BYTES


def expected(recipe: Recipe, width: int) -> Plan:
    """About how many texts a run needs: prompts are counted, their token lengths are not drawn.

    Where the prompts are not there, as many as the run draws: at most so many.
    """
    lengths = recipe.sampling.token_lengths
    extra = (len(recipe.preview.prompts) if recipe.preview.vae else 0) + (len(lengths) if recipe.sampling.cfg else 0)
    try:
        times = Counter(prompt for prompts, _, _ in Schedule(recipe).prompts() for prompt in prompts)
    except UserError:
        drawn = sum(-(-stage.steps // recipe.trajectory_steps(stage)) * stage.batch * stage.accumulate for stage in recipe.stages)
        texts, known = float(drawn + recipe.validation.prompts), False
    else:
        # A prompt that is drawn n times has so many different ones of k lengths.
        missed = 1 - 1 / len(lengths)
        texts, known = sum(count * len(lengths) * (1 - missed**n) for n, count in Counter(times.values()).items()), True
    mean = sum(lengths) / len(lengths)
    return Plan(texts + extra, (texts + extra) * text_bytes(recipe, mean, width), known)
