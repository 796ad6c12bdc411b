"""What is measured of an encoder besides images: a function for each probe's record, which gives numbers with intervals by name."""

# B batch, N prompts, C H W latent, L text tokens, D text width, T steps

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
from torch import Tensor

from ..diffusion.frozen import held_bytes
from ..runtime.accelerator import timed
from ..train.trajectory import Position
from .distances import latent_rms, velocity_gaps
from .embeddings import effective_rank, pooled_distance
from .encoders import LoadedEncoder, Text, by_length, together
from .generate import ImageGenerator
from .measured import Measured, exact, jackknife, mean
from .metrics import PROBES, CostPart, EmbeddingPart, LatentDistancePart, VelocityGapPart
from .questions import Question
from .scores import Unfinished

if TYPE_CHECKING:
    from .probe_encoders import Probed

Found = dict[str, Measured]
# Prompts that can go through the diffusion model together, with the teacher's and the student's texts.
Pair = tuple[list[Question], list[Text], list[Text]]


def collapse(of: Probed, part: EmbeddingPart, _unfinished: Unfinished) -> Found:
    """How far apart the prompts are, and how many directions they fill."""
    vectors_ND = of.vectors(PROBES["collapse"], part)
    return {"pooled distance": jackknife(vectors_ND, pooled_distance), "effective rank": jackknife(vectors_ND, effective_rank)}


def _by_batch(of: Probed, probe: str, part: Any, work: Callable[[Pair], Any], unfinished: Unfinished) -> list[Any]:
    """`work` of every batch of prompts, shared by the processes."""
    batch, images = of.work.suite.sampling.batch, PROBES[probe].images * part.prompts
    pairs = _pairs(of.asked(part), of.teacher_texts(), of.texts(), batch)
    return of.work.processes.map(work, pairs, images, unfinished.also_decided_by(batch=batch))


def _pairs(questions: Sequence[Question], teacher: Sequence[Text], student: Sequence[Text], batch: int) -> list[Pair]:
    """Batches of prompts whose texts have one length with the teacher and one with the student."""
    alike = by_length(teacher[: len(questions)], student[: len(questions)])
    groups = [places[start : start + batch] for places in alike for start in range(0, len(places), batch)]
    return [
        ([questions[place] for place in group], [teacher[place] for place in group], [student[place] for place in group])
        for group in groups
    ]


def velocity_gap(of: Probed, part: VelocityGapPart, unfinished: Unfinished) -> Found:
    """The mean squared gap of the velocities along the teacher's trajectories, by band of noise level, on the schedule of the images."""
    per_batch = _by_batch(of, "velocity_gap", part, lambda pair: _gap_of_batch(of.work.generator, pair, part.sigma_bands), unfinished)
    names = sorted({band for batch in per_batch for band in batch}, reverse=True)
    return {f"sigma {band}": mean([value for batch in per_batch for value in batch[band]]) for band in names}


def _gap_of_batch(generator: ImageGenerator, pair: Pair, bands: int) -> dict[str, list[float]]:
    """The gap of each prompt, by band, on the trajectories of the teacher's images."""
    questions, teacher, student = pair
    model = generator.model
    noise = generator.noise([question.seed for question in questions])
    model.load_for_sampling(noise.shape)
    sigmas_T = model.sigmas(generator.sampling.steps)
    text_BLD, pooled_BP = together(teacher)
    start = Position(
        step=0,
        x=model.noisy(noise.to(model.device), sigmas_T),
        sigmas_T=sigmas_T,
        text_BLD=text_BLD.to(model.device),
        extras=generator.extras(pooled_BP),
        guidance_B=None,
        token_ids_BL=torch.zeros(len(questions), 0, dtype=torch.long),
        cfg_B=torch.full((len(questions),), generator.sampling.cfg),
        unconditional=generator.negative(teacher),
    )
    student_BLD = together(student)[0].to(model.device)
    return velocity_gaps(start, model, lambda _ids: student_BLD, bands)


def latent_distance(of: Probed, part: LatentDistancePart, unfinished: Unfinished) -> Found:
    """The root mean square of the difference of teacher's and student's latents after each step, as the diffusion model sees them."""
    per_batch = _by_batch(of, "latent_distance", part, lambda pair: _distance_of_batch(of.work.generator, pair), unfinished)
    per_step = zip(*(prompt for batch in per_batch for prompt in batch), strict=True)
    return {f"after step {step}": mean(values) for step, values in enumerate(per_step, start=1)}


def _distance_of_batch(generator: ImageGenerator, pair: Pair) -> list[list[float]]:
    """The distance of each prompt's latents after each step."""
    questions, *both = pair
    seeds = [question.seed for question in questions]
    teacher, student = (_trajectory(generator, texts, seeds) for texts in both)
    return latent_rms(teacher, student).T.tolist()


def _trajectory(generator: ImageGenerator, texts: Sequence[Text], seeds: Sequence[int]) -> list[Tensor]:
    """The latents [B, C, H, W] after each of T steps, float32 on the CPU."""
    starts: list[Tensor] = []
    last = generator.latents(texts, seeds, lambda _step, x: starts.append(x.float().cpu().clone()))
    return [*starts[1:], generator.model.model.process_latent_in(last).float().cpu()]


def cost(of: Probed, part: CostPart, _unfinished: Unfinished) -> Found:
    """Resident bytes, and seconds of loading, of encoding, and of a prompt change: encoding while the diffusion model is loaded before and
    after, which is the wait between pressing Run and the first step of the next image. On the first process, while the others wait."""
    if not of.work.processes.ranks.is_main:
        return {}
    prompts = [question.prompt for question in of.asked(part)]
    load = functools.partial(of.work.load, of.encoder)
    # Each encoder is released before the next one is loaded.
    loads = [_timed_load(load)[0] for _ in range(part.repeats - 1)]
    seconds, encoder = _timed_load(load)
    loads.append(seconds)
    device = encoder.clip.patcher.load_device

    def change(prompt: str) -> None:
        encoder.text(prompt)
        of.work.generator.model.load()

    encoder.text("a first prompt, which brings the encoder to its device")
    encodes = [timed(lambda prompt=prompt: encoder.text(prompt), device)[0] for prompt in _cycled(prompts, part.repeats)]
    changes = [timed(lambda prompt=prompt: change(prompt), device)[0] for prompt in _cycled(prompts, part.repeats + 1)]
    return {
        "weights": exact(sum(weight.numel() for weight in encoder.clip.cond_stage_model.parameters())),
        "resident bytes": exact(held_bytes(encoder.clip.cond_stage_model)),
        "load s": mean(loads),
        "encode s": mean(encodes),
        # The first one only brings the diffusion model to its device.
        "prompt change s": mean(changes[1:]),
    }


def _timed_load(load: Callable[[], LoadedEncoder]) -> tuple[float, LoadedEncoder]:
    """Seconds of a load that begins with nothing on the device, and the encoder."""
    comfy.model_management.unload_all_models()
    return timed(load, comfy.model_management.text_encoder_device())


def _cycled(prompts: Sequence[str], count: int) -> list[str]:
    return [prompts[number % len(prompts)] for number in range(count)]
