"""Which prompts, noise and guidance each process works on at which step: a pure function of recipe and step number."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..prompts.corpora import Prompt
from ..prompts.mix import PromptMix, hold_out, read_corpus
from ..prompts.negatives import some_replaced
from .recipe import Recipe, Stage
from .trajectory import Draw, draw

# Batches of a stage have numbers below this, so that no two stages draw the same noise.
STAGE_SPAN = 1 << 24
# Held-out batches are drawn from numbers that no stage reaches.
HELD_OUT_BASE = 1 << 31
# Of them the teacher's variance is measured.
SAMPLED_PROMPTS = 256


@dataclass(frozen=True)
class Batch:
    """Prompts, and the random choices that belong to them."""

    prompts: tuple[str, ...]
    drawn: Draw


@dataclass(frozen=True)
class Place:
    """Where a run is: stage, trajectory in it, denoising step on it."""

    stage: int
    trajectory: int
    step: int


class Schedule:
    """The order of a run: from optimizer step to place, and from place to the batches of this process."""

    def __init__(self, recipe: Recipe, rank: int = 0, ranks: int = 1) -> None:
        self.recipe, self.rank, self.ranks = recipe, rank, ranks
        for stage in recipe.stages:
            stage.batches_per_rank(ranks)
        corpora = [[(read_corpus(corpus, seed=recipe.seed), corpus.repeat) for corpus in stage.corpora] for stage in recipe.stages]
        every = [pair for stage in corpora for pair in stage]
        self.held_out: list[Prompt] = hold_out(every, recipe.validation.prompts, recipe.seed)
        named = {f"prompts of stage {stage.name}": pairs for stage, pairs in zip(recipe.stages, corpora, strict=True)}
        self.digests = {name: _digest(pairs) for name, pairs in named.items()} | {"held-out prompts": _digest([(self.held_out, 1)])}
        self.mixes = [PromptMix(stage, recipe.seed, self.held_out) for stage in corpora]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.recipe.stages)

    def place(self, step: int) -> Place:
        """Where optimizer step `step` (from 0) takes place."""
        assert 0 <= step < self.total_steps
        for number, stage in enumerate(self.recipe.stages):
            if step < stage.steps:
                return Place(number, *divmod(step, self.recipe.sampling.steps))
            step -= stage.steps
        raise AssertionError(step)

    def trajectories(self, stage: int) -> int:
        """Trajectories of a stage; the last one may be cut short."""
        return math.ceil(self.recipe.stages[stage].steps / self.recipe.sampling.steps)

    def prompts_per_trajectory(self, stage: int) -> int:
        """Prompts that this process has on one trajectory."""
        part = self.recipe.stages[stage]
        return part.batch * part.batches_per_rank(self.ranks)

    def batches(self, stage: int, trajectory: int) -> list[Batch]:
        """The batches of this process on one trajectory: every `ranks`-th of all of them."""
        part = self.recipe.stages[stage]
        numbers = [trajectory * part.accumulate + number for number in range(self.rank, part.accumulate, self.ranks)]
        return [self._training_batch(stage, number) for number in numbers]

    def sample(self, stage: int) -> list[Batch]:
        """The first batches of a stage over all processes, of some SAMPLED_PROMPTS prompts."""
        part = self.recipe.stages[stage]
        count = min(math.ceil(SAMPLED_PROMPTS / part.batch), self.trajectories(stage) * part.accumulate)
        return [self._training_batch(stage, number) for number in range(count)]

    def _training_batch(self, stage: int, number: int) -> Batch:
        recipe, index = self.recipe, stage * STAGE_SPAN + number
        batch = self._batch(self.mixes[stage].batch(number, recipe.stages[stage].batch), recipe.stages[stage], index)
        return replace(batch, prompts=some_replaced(batch.prompts, recipe.sampling.negatives, recipe.seed, index))

    def held_out_batches(self) -> list[Batch]:
        """This process's share of the held-out prompts, at the last stage's size, always with the same noise."""
        part = self.recipe.stages[-1]
        groups = [self.held_out[start : start + part.batch] for start in range(0, len(self.held_out), part.batch)]
        numbered = list(enumerate(groups))[self.rank :: self.ranks]
        return [self._batch(group, part, HELD_OUT_BASE + number) for number, group in numbered]

    def _batch(self, prompts: Sequence[Prompt], stage: Stage, number: int) -> Batch:
        sampling, shape = self.recipe.sampling, self.recipe.family.latent_shape(stage.resolution_px)
        drawn = draw(self.recipe.seed, number, len(prompts), shape, sampling.guidance, sampling.token_lengths, sampling.cfg)
        return Batch(tuple(prompt.text for prompt in prompts), drawn)


def _digest(corpora: Sequence[tuple[Sequence[Prompt], int]]) -> str:
    """The number and SHA-256 of some prompts in their order, and of how often each corpus is repeated."""
    digest = hashlib.sha256()
    for prompts, repeat in corpora:
        digest.update(repr((repeat, [prompt.text for prompt in prompts])).encode())
    return f"{sum(len(prompts) for prompts, _ in corpora):,} prompts, SHA-256 {digest.hexdigest()[:16]}"
