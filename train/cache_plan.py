"""Which texts a run takes from its teacher, and what they take on disk."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..encoder.text_shards import FORMATS
from ..prompts.common_text import COUNTS
from ..prompts.corpora import Corpus
from ..prompts.mix import read_corpus
from ..prompts.negatives import NEGATIVES
from ..runtime.errors import UserError
from .batches import Schedule
from .objectives import OBJECTIVES
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


def wanted(schedule: Schedule, step: int = 0) -> dict[str, tuple[str, int]]:
    """The prompt and token length of every text that the run takes from its teacher, by key, in the order in which it trains.

    With CFG also the empty prompt. Longer stages and other previews, which a resumed run may have, need more. step: where the run goes on;
    texts of stages that are over are left out.
    """
    return _by_key(schedule.texts(step), schedule.recipe)


def of_an_estimate(schedule: Schedule) -> dict[str, tuple[str, int]]:
    """The texts of the first trajectory of every stage, and of those from which the teacher's variance is measured."""
    batches = [batch for stage in range(len(schedule.recipe.stages)) for batch in schedule.first(stage)]
    scaled = (number for number, stage in enumerate(schedule.recipe.stages) if OBJECTIVES[stage.objective].scaled)
    batches += [batch for stage in scaled for batch in schedule.sample(stage)]
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

    Where prompts are not there, at most as many as the run draws, or as its corpora have at every token length.
    """
    lengths = recipe.sampling.token_lengths
    extra = (len(recipe.preview.prompts) if recipe.preview.vae else 0) + (len(lengths) if recipe.sampling.cfg else 0)
    try:
        times = Counter(prompt for prompts, _, _ in Schedule(recipe).prompts() for prompt in prompts)
    except UserError:
        texts, known = _at_most(recipe), False
    else:
        # A prompt that is drawn n times has so many different ones of k lengths.
        missed = 1 - 1 / len(lengths)
        texts, known = sum(count * len(lengths) * (1 - missed**n) for n, count in Counter(times.values()).items()), True
    mean = sum(lengths) / len(lengths)
    return Plan(texts + extra, (texts + extra) * text_bytes(recipe, mean, width), known)


def _at_most(recipe: Recipe) -> float:
    """The different texts that a run can draw, of corpora that are not all there."""
    drawn = sum(-(-stage.steps // recipe.trajectory_steps(stage)) * stage.batch * stage.accumulate for stage in recipe.stages)
    corpora = {str(corpus.model_copy(update={"repeat": 1})): corpus for stage in recipe.stages for corpus in stage.corpora}
    prompts = sum(map(_prompts_of, corpora.values())) + (1 + len(NEGATIVES) if recipe.sampling.negatives else 0)
    return min(float(drawn + recipe.validation.prompts), prompts * len(recipe.sampling.token_lengths))


def _prompts_of(corpus: Corpus) -> float:
    """At most how many prompts a corpus has; without limit if it is not there and has none."""
    if corpus.kind == "common_text":
        return corpus.limit or COUNTS["train"]
    try:
        return len(read_corpus(corpus))
    except UserError:
        return corpus.limit or math.inf
