"""Which prompts, noise and guidance each process works on at which step: a pure function of recipe and step number."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..prompts.corpora import Prompt
from ..prompts.mix import PromptMix, hold_out, read_corpus
from ..prompts.negatives import some_replaced
from .recipe import Recipe, Stage
from .trajectory import Draw, draw

# Batches of a stage have numbers below this, so that no two stages draw the same noise.
STAGE_SPAN = 1 << 24
# Held-out batches are drawn from numbers that no stage reaches, batches of previews from numbers that neither reach.
HELD_OUT_BASE = 1 << 31
PREVIEW_BASE = 1 << 30
# The prompts from which the variance of the teacher is measured.
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


# Prompts, the stage to whose size they belong, and the number of their draw.
BatchPrompts = tuple[tuple[str, ...], Stage, int]


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
                return Place(number, *divmod(step, self.recipe.trajectory_steps(stage)))
            step -= stage.steps
        raise AssertionError(step)

    def trajectories(self, stage: int) -> int:
        """Trajectories of a stage; the last one may be cut short."""
        part = self.recipe.stages[stage]
        return math.ceil(part.steps / self.recipe.trajectory_steps(part))

    def prompts_per_trajectory(self, stage: int) -> int:
        """Prompts that this process has on one trajectory."""
        part = self.recipe.stages[stage]
        return part.batch * part.batches_per_rank(self.ranks)

    def batches(self, stage: int, trajectory: int) -> list[Batch]:
        """The batches of this process on one trajectory: every `ranks`-th of all of them."""
        part = self.recipe.stages[stage]
        numbers = [trajectory * part.accumulate + number for number in range(self.rank, part.accumulate, self.ranks)]
        return [self._training_batch(stage, number) for number in numbers]

    def first(self, stage: int) -> list[Batch]:
        """The batches of all processes on the first trajectory of a stage."""
        return [self._training_batch(stage, number) for number in range(self.recipe.stages[stage].accumulate)]

    def sample(self, stage: int) -> list[Batch]:
        """The first batches of a stage over all processes, of some SAMPLED_PROMPTS prompts."""
        part = self.recipe.stages[stage]
        count = min(math.ceil(SAMPLED_PROMPTS / part.batch), self.trajectories(stage) * part.accumulate)
        return [self._training_batch(stage, number) for number in range(count)]

    def _training_batch(self, stage: int, number: int) -> Batch:
        return self._batch(*self._training_prompts(stage, number))

    def _training_prompts(self, stage: int, number: int) -> BatchPrompts:
        recipe, index = self.recipe, stage * STAGE_SPAN + number
        prompts = [prompt.text for prompt in self.mixes[stage].batch(number, recipe.stages[stage].batch)]
        return some_replaced(prompts, recipe.sampling.negatives, recipe.seed, index), recipe.stages[stage], index

    def held_out_batches(self) -> list[Batch]:
        """This process's share of the held-out prompts, at the last stage's size, always with the same noise."""
        return [self._batch(*each) for each in self._held_out_prompts()[self.rank :: self.ranks]]

    def _held_out_prompts(self) -> list[BatchPrompts]:
        part, texts = self.recipe.stages[-1], [prompt.text for prompt in self.held_out]
        groups = [tuple(texts[start : start + part.batch]) for start in range(0, len(texts), part.batch)]
        return [(group, part, HELD_OUT_BASE + number) for number, group in enumerate(groups)]

    def _batch(self, prompts: tuple[str, ...], stage: Stage, number: int) -> Batch:
        sampling, shape = self.recipe.sampling, self.recipe.family.latent_shape(stage.resolution_px)
        drawn = draw(self.recipe.seed, number, len(prompts), shape, sampling.guidance, sampling.token_lengths, sampling.cfg)
        return Batch(prompts, drawn)

    def prompts(self) -> Iterator[BatchPrompts]:
        """The prompts of every batch of all processes: stage by stage, then those held out."""
        for stage, part in enumerate(self.recipe.stages):
            for number in range(self.trajectories(stage) * part.accumulate):
                yield self._training_prompts(stage, number)
        yield from self._held_out_prompts()

    def texts(self) -> Iterator[tuple[str, int]]:
        """Every prompt that the run takes from its teacher and its token length, in the order in which it trains; some more than once."""
        lengths = self.recipe.sampling.token_lengths
        for prompts, stage, number in self.prompts():
            # The noise is drawn before the length, which takes minutes for the longest runs.
            length = lengths[0] if len(lengths) == 1 else self._batch(prompts, stage, number).drawn.token_length
            yield from ((prompt, length) for prompt in prompts)
        for batch in preview_batches(self.recipe) if self.recipe.preview.vae else ():
            yield from ((prompt, batch.drawn.token_length) for prompt in batch.prompts)


def preview_batches(recipe: Recipe) -> list[Batch]:
    """A batch for each prompt, at the last stage's size, the token length at which the student is served, the usual guidance and CFG.

    Where prompts are not padded, the longest length is only where they are cut.
    """
    family, sampling = recipe.family, recipe.sampling
    lengths = (served_length(recipe) if family.padded else max(sampling.token_lengths),)
    guidance, cfg = usual_guidance(sampling.guidance, family.default_guidance), sorted(sampling.cfg)[len(sampling.cfg) // 2 :][:1]
    shape = family.latent_shape(recipe.stages[-1].resolution_px)
    return [
        Batch((prompt,), draw(recipe.seed, PREVIEW_BASE + index, 1, shape, guidance, lengths, cfg))
        for index, prompt in enumerate(recipe.preview.prompts)
    ]


def usual_guidance(trained_at: Sequence[float], default: float) -> tuple[float, ...]:
    """The family's default if the student is trained at it, else the middle one of its values; nothing for models without guidance."""
    if not trained_at or default in trained_at:
        return (default,) if trained_at else ()
    return (sorted(trained_at)[len(trained_at) // 2],)


def served_length(recipe: Recipe) -> int:
    """The padded length at which the student is served: ComfyUI's own if it was trained at it or without padding, else its longest."""
    lengths, usual = recipe.sampling.token_lengths, recipe.family.token_length
    return usual if usual in lengths or not recipe.family.padded else max(lengths)


def _digest(corpora: Sequence[tuple[Sequence[Prompt], int]]) -> str:
    """The number and SHA-256 of some prompts in their order, and of how often each corpus is repeated."""
    digest = hashlib.sha256()
    for prompts, repeat in corpora:
        digest.update(repr((repeat, [prompt.text for prompt in prompts])).encode())
    return f"{sum(len(prompts) for prompts, _ in corpora):,} prompts, SHA-256 {digest.hexdigest()[:16]}"
