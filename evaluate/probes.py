"""What is measured of an encoder without painting: collapse, the velocity gap to the teacher, the way of the latents, cost."""

# B batch, N prompts, C H W latent, L text tokens, D text width, P pooled width, T steps

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import comfy.model_management
import numpy as np
import torch
from torch import Tensor

from ..diffusion.frozen import FrozenModel, held_bytes
from ..families import FAMILIES
from ..train.trajectory import Position
from .cost import timed
from .distances import latent_rms, velocity_gaps
from .embeddings import effective_rank, pooled, pooled_distance
from .encoders import LoadedEncoder, Text, together
from .intervals import Measured, exact, jackknife, mean_of
from .painter import Painter
from .questions import Question
from .team import Team

if TYPE_CHECKING:
    from .scores import Part

Numbers = dict[str, Measured]
# Teacher's and student's texts of prompts that can go through the diffusion model together.
Pair = tuple[list[Question], list[Text], list[Text]]


def pooled_vectors(encoder: LoadedEncoder, questions: Sequence[Question], team: Team) -> np.ndarray:
    """The mean embedding of each prompt's own tokens, [N, D], float32."""

    def of_one(question: Question) -> np.ndarray:
        text = encoder.text(question.prompt)
        return pooled(text.text_1LD[:, : text.own_tokens].numpy())[0]

    return np.stack(team.share_out(questions, of_one, f"{encoder.file.name}: embeddings", "prompt"))


def collapse(vectors_ND: np.ndarray) -> Numbers:
    """How far apart the prompts lie, and how many directions they fill."""
    return {
        "pooled distance": jackknife(vectors_ND, pooled_distance),
        "effective rank": jackknife(vectors_ND, effective_rank),
    }


def texts_of(encoder: LoadedEncoder, questions: Sequence[Question], team: Team) -> list[Text]:
    """The texts of some questions, in RAM of every process. Raises Stopped after a signal to one of them."""
    texts = []
    for question in questions:
        team.leave_if_asked()
        texts.append(encoder.text(question.prompt))
    return texts


def pairs(questions: Sequence[Question], teacher: Sequence[Text], student: Sequence[Text], batch: int) -> Iterator[Pair]:
    """Batches of prompts whose texts are of one length with the teacher and of one with the student."""
    groups: dict[tuple[int, int], list[int]] = {}
    for place, (one, other) in enumerate(zip(teacher, student, strict=True)):
        groups.setdefault((one.text_1LD.shape[1], other.text_1LD.shape[1]), []).append(place)
    for places in groups.values():
        for start in range(0, len(places), batch):
            some = places[start : start + batch]
            yield [questions[place] for place in some], [teacher[place] for place in some], [student[place] for place in some]


def velocity_gap(painter: Painter, found: Sequence[Pair], bands: int, team: Team, part: Part | None = None) -> Numbers:
    """The mean squared gap of the velocities along the teacher's trajectories, by band of noise level: the trainer's held-out loss."""
    # A clone, since the trainer's own view of the model has it compute with quantised weights otherwise than the sampler.
    flow = FrozenModel(painter.model.clone(), FAMILIES["flux"])
    flow.load()
    per_batch = team.share_out(found, lambda pair: _gap_of_batch(painter, flow, pair, bands), "velocity gap", part=part)
    names = sorted({band for batch in per_batch for band in batch}, reverse=True)
    return {f"sigma {band}": mean_of([value for batch in per_batch for value in batch[band]]) for band in names}


def _gap_of_batch(painter: Painter, flow: FrozenModel, pair: Pair, bands: int) -> dict[str, list[float]]:
    """The gap of each prompt, by band."""
    questions, teacher, student = pair
    spoken_BLD = together(student)[0].to(flow.device)
    return velocity_gaps(_start(painter, flow, questions, teacher), flow, lambda _ids: spoken_BLD, bands)


def _start(painter: Painter, flow: FrozenModel, questions: Sequence[Question], teacher: Sequence[Text]) -> Position:
    """Where the teacher's trajectories begin: at the noise of the pictures, of the same seeds."""
    _, height, width = flow.family.latent_shape(painter.sampling.resolution_px)
    text_BLD, pooled_BP = together(teacher)
    guidance = painter.sampling.guidance
    return Position(
        step=0,
        x=painter.noise([question.seed for question in questions]).to(flow.device),
        sigmas_T=flow.training_sigmas(painter.sampling.steps, height, width),
        text_BLD=text_BLD.to(flow.device),
        extras={"pooled_output": pooled_BP.to(flow.device)},
        guidance_B=None if guidance is None else torch.full((len(questions),), guidance, device=flow.device),
        token_ids_BL=torch.zeros(len(questions), 0, dtype=torch.long),
    )


def latent_distance(painter: Painter, found: Sequence[Pair], team: Team, part: Part | None = None) -> Numbers:
    """The root mean square of the difference of teacher's and student's latents after each step, as the diffusion model sees them."""
    per_batch = team.share_out(found, lambda pair: _way_apart(painter, pair), "latent distance", part=part)
    per_prompt = [prompt for batch in per_batch for prompt in batch]
    return {f"after step {step}": mean_of([prompt[step - 1] for prompt in per_prompt]) for step in range(1, painter.sampling.steps + 1)}


def _way_apart(painter: Painter, pair: Pair) -> list[list[float]]:
    """The distance of each prompt's latents after each step."""
    questions, teacher, student = pair
    seeds = [question.seed for question in questions]
    ways = [_way(painter, texts, seeds) for texts in (teacher, student)]
    return latent_rms(*ways).T.tolist()


def _way(painter: Painter, texts: Sequence[Text], seeds: Sequence[int]) -> list[Tensor]:
    """The latents [B, C, H, W] after each of T steps, float32 on the CPU."""
    starts: list[Tensor] = []
    last = painter.sample(*together(texts), seeds, lambda _step, x_BCHW: starts.append(x_BCHW.float().cpu().clone()))
    return [*starts[1:], painter.model.model.process_latent_in(last).float().cpu()]


def cost(load: Callable[[], LoadedEncoder], painter: Painter, prompts: Sequence[str], repeats: int) -> Numbers:
    """Resident bytes, and seconds of loading, of encoding, and of a change of the prompt, in which the diffusion model is loaded before and
    after: what waits between pressing Run and the first step of the next picture."""
    # Each is given back before the next one comes.
    loads = [_timed_load(load)[0] for _ in range(repeats - 1)]
    seconds, encoder = _timed_load(load)
    loads.append(seconds)
    device = encoder.clip.patcher.load_device
    encoder.text("a first prompt, which brings the encoder to its device")
    encodes = [timed(lambda prompt=prompt: encoder.text(prompt), device)[0] for prompt in _cycled(prompts, repeats)]
    changes = [timed(lambda prompt=prompt: _change(encoder, painter, prompt), device)[0] for prompt in _cycled(prompts, repeats + 1)]
    return {
        "weights": exact(sum(weight.numel() for weight in encoder.clip.cond_stage_model.parameters())),
        "resident bytes": exact(held_bytes(encoder.clip.cond_stage_model)),
        "load s": mean_of(loads),
        "encode s": mean_of(encodes),
        # The first one only brings the diffusion model there.
        "prompt change s": mean_of(changes[1:]),
    }


def _timed_load(load: Callable[[], LoadedEncoder]) -> tuple[float, LoadedEncoder]:
    """Seconds of a load that begins with nothing on the device, and the encoder."""
    comfy.model_management.unload_all_models()
    return timed(load, comfy.model_management.text_encoder_device())


def _change(encoder: LoadedEncoder, painter: Painter, prompt: str) -> None:
    encoder.text(prompt)
    comfy.model_management.load_models_gpu([painter.model])


def _cycled(prompts: Sequence[str], count: int) -> list[str]:
    return [prompts[number % len(prompts)] for number in range(count)]
