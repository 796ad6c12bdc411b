"""Make the miniature's files: the VAE by hand, the teacher from text, the Flux and its LoRA from images. Stock nodes and ours load them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.nn import Module

from ..diffusion.gradients import blocks_of
from ..families import FAMILIES
from ..runtime.accelerator import accelerator_type
from ..runtime.weights import data_sha256
from ..world.pictures import Scene
from . import flow, teacher
from .autoencoder import vae_tensors
from .corruption import load_tokenizer
from .files import FLUX_FILE, LORA_FILE, TEACHER_FILE, VAE_FILE, place
from .flow import FluxSize
from .grounding import QUESTIONS
from .lora import load_flux, repainted, save_lora, trained_part, with_lora
from .teacher import FrozenTeacher
from .training import Plan, train

DTYPE = torch.bfloat16
# T5 does not scale its attention scores: at the Flux's Muon rate it learned almost nothing.
TEACHER_PLAN = Plan(steps=1_500, batch=64, learning_rate=1e-2, muon_learning_rate=5e-3)
FLUX_PLAN = Plan(steps=3_200, batch=64, learning_rate=2e-3, muon_learning_rate=1e-2)
LORA_PLAN = Plan(steps=400, batch=32, learning_rate=5e-3, muon_learning_rate=5e-2, average_steps=50)
Stop = Callable[[], bool]


def default_device() -> torch.device:
    """The accelerator if torch finds one, else the CPU. A run resumes bit for bit only on the kind of device on which it started."""
    return torch.device(accelerator_type() or "cpu")


def make_vae(out: Path) -> Path:
    """Write the VAE's file; nothing is trained."""
    path = _with_folder(place(out, VAE_FILE))
    safetensors.torch.save_file({name: tensor.to(DTYPE) for name, tensor in vae_tensors().items()}, path)
    return path


def make_teacher(out: Path, comfyui: Path, plan: Plan, resume: bool, stop: Stop) -> Path | None:
    """Pretrain the teacher on text and write its encoder; None if `stop` returned true."""
    tokenizer, layout, device = load_tokenizer(comfyui), teacher.LAYOUT, default_device()
    model = teacher.Pretraining(layout, plan.seed).to(device)

    def loss_at(step: int) -> torch.Tensor:
        inputs_BL, targets_BT = teacher.draw_batch(tokenizer, plan.seed, step, round(plan.batch * teacher.TEXT_SHARE))
        captions_BL, answers_BQ = teacher.draw_captions(tokenizer, plan.seed, step, plan.batch)
        text_loss = model.loss(inputs_BL.to(device), targets_BT.to(device))
        return text_loss + model.caption_loss(captions_BL.to(device), answers_BQ.to(device))

    what = {"teacher": asdict(layout), "neighbours": teacher.NEIGHBOURS, "grounded": QUESTIONS}
    trainee = train(model, loss_at, plan, what, out / "teacher-run", resume, stop)
    if trainee is None:
        return None
    return teacher.save_teacher(_with_folder(place(out, TEACHER_FILE)), trainee.averaged(), layout, _facts(plan, what), DTYPE)


def make_flux(out: Path, comfyui: Path, plan: Plan, resume: bool, stop: Stop) -> Path | None:
    """Train the Flux on the teacher in `out` and write its file; None if `stop` returned true. ComfyUI must be importable.

    Raises ValueError if there is no teacher.
    """
    from ..diffusion.frozen import differentiable

    size, teacher_path = FluxSize(), _existing(out, TEACHER_FILE, "teacher")
    frozen = FrozenTeacher(teacher_path, load_tokenizer(comfyui), default_device())
    flux = flow.make_flux(size, frozen.width, plan.seed).to(default_device())
    what: dict[str, Any] = {"flux": asdict(size), "teacher": data_sha256(teacher_path), "shift": flow.SHIFT}
    with differentiable(flux, blocks_of(flux, FAMILIES["flux"].block_lists), False):
        trainee = train(flux, _loss_on(flux, frozen, plan), plan, what, out / "flux-run", resume, stop)
    if trainee is None:
        return None
    return flow.save_flux(_with_folder(place(out, FLUX_FILE)), trainee.averaged(), _facts(plan, what), DTYPE)


def make_lora(out: Path, comfyui: Path, plan: Plan, resume: bool, stop: Stop) -> Path | None:
    """Train the palette LoRA on the Flux and the teacher in `out` and write its file; None if `stop` returned true.

    Raises ValueError if there is no Flux.
    """
    from ..diffusion.frozen import differentiable

    flux_path, teacher_path = _existing(out, FLUX_FILE, "flux"), _existing(out, TEACHER_FILE, "teacher")
    frozen = FrozenTeacher(teacher_path, load_tokenizer(comfyui), default_device())
    flux = load_flux(flux_path, frozen.width)
    low_ranks = with_lora(flux, seed=plan.seed)
    flux.to(default_device())
    what = {"lora": len(low_ranks), "flux": data_sha256(flux_path), "teacher": data_sha256(teacher_path)}
    with differentiable(flux, blocks_of(flux, FAMILIES["flux"].block_lists), False):
        trainee = train(trained_part(low_ranks), _loss_on(flux, frozen, plan, repainted), plan, what, out / "lora-run", resume, stop)
    if trainee is None:
        return None
    return save_lora(_with_folder(place(out, LORA_FILE)), trainee.averaged(), low_ranks, _facts(plan, what))


# The models that are trained, each on those before it: plan and maker by the name on the command line.
TRAINED = {"teacher": (TEACHER_PLAN, make_teacher), "flux": (FLUX_PLAN, make_flux), "lora": (LORA_PLAN, make_lora)}


def _loss_on(
    flux: Module, frozen: FrozenTeacher, plan: Plan, shown: Callable[[Scene], Scene] = flow.as_asked
) -> Callable[[int], torch.Tensor]:
    """The loss of the Flux as a function of the step; `shown` as in `draw_batch`."""

    def loss_at(step: int) -> torch.Tensor:
        batch = flow.draw_batch(plan.seed, step, plan.batch, shown)
        return flow.loss_of(flow.predictor(flux), frozen, batch, default_device())

    return loss_at


def _existing(out: Path, name: str, what: str) -> Path:
    path = place(out, name)
    if not path.is_file():
        raise ValueError(f"{path} does not exist.\nWhat to do: make it first, with `miniature {what}` and the same --out.")
    return path


def _with_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _facts(plan: Plan, what: Mapping[str, Any]) -> dict[str, str]:
    """Metadata that says what made a file."""
    return {
        "distilled_t5.miniature_plan_sha256": plan.sha256(what),
        "distilled_t5.steps": str(plan.steps),
        "modelspec.author": "The Distilled T5 contributors",
        "modelspec.license": "Apache-2.0",
    }
