"""Making the miniature: VAE by hand, teacher from text, Flux from pictures; each into a file that stock nodes and ours load."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ..runtime.weights import data_sha256
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
# T5 does not scale the products of its attention: at Muon's rate for the Flux it learnt hardly anything.
TEACHER_PLAN = Plan(steps=1_500, batch=64, learning_rate=1e-2, muon_learning_rate=5e-3)
FLUX_PLAN = Plan(steps=3_200, batch=64, learning_rate=2e-3, muon_learning_rate=1e-2)
LORA_PLAN = Plan(steps=400, batch=32, learning_rate=5e-3, muon_learning_rate=5e-2, average_steps=50)
Stop = Callable[[], bool]


def never() -> bool:
    """Nobody asks to stop."""
    return False


def usual_device() -> torch.device:
    """A CUDA device where there is one, else the CPU. Runs go on bit for bit only on the kind of device where they began."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_vae(out: Path) -> Path:
    """Write the VAE's file; no training, no chance."""
    path = _room_for(place(out, VAE_FILE))
    safetensors.torch.save_file({name: tensor.to(DTYPE) for name, tensor in vae_tensors().items()}, path)
    return path


def make_teacher(
    out: Path, comfyui: Path, plan: Plan = TEACHER_PLAN, resume: bool = False, stop: Stop = never, fuse: bool = False
) -> Path | None:
    """Pretrain the teacher on text and write its encoder; None if `stop` asked to leave. `fuse`: by torch.compile, as in make_flux."""
    tokenizer, layout = load_tokenizer(comfyui), teacher.LAYOUT
    device = usual_device()
    model = teacher.Pretraining(layout, plan.seed).to(device)
    if fuse:
        model.encode = torch.compile(model.encode, dynamic=False)

    def loss_at(step: int) -> torch.Tensor:
        inputs_BL, targets_BT = teacher.draw_batch(tokenizer, plan.seed, step, round(plan.batch * teacher.TEXT_SHARE))
        captions_BL, answers_BQ = teacher.draw_captions(tokenizer, plan.seed, step, plan.batch)
        of_texts = model.loss(inputs_BL.to(device), targets_BT.to(device))
        return of_texts + model.caption_loss(captions_BL.to(device), answers_BQ.to(device))

    what = {"teacher": asdict(layout), "neighbours": teacher.NEIGHBOURS, "grounded": QUESTIONS}
    trainee = train(model, loss_at, plan, what, out / "teacher-run", resume, stop)
    if trainee is None:
        return None
    return teacher.save_teacher(_room_for(place(out, TEACHER_FILE)), trainee.averaged(), layout, _facts(plan, what), DTYPE)


def predictor(flux: Any, fuse: bool) -> flow.Velocity:
    """The forward pass of the Flux; fused by torch.compile if asked for (a minute at the start, needs a C++ compiler)."""
    from .fused import velocity

    return functools.partial(torch.compile(velocity, dynamic=False) if fuse else velocity, flux)


def make_flux(
    out: Path,
    comfyui: Path,
    plan: Plan = FLUX_PLAN,
    size: FluxSize | None = None,
    resume: bool = False,
    stop: Stop = never,
    fuse: bool = False,
    start: Path | None = None,
) -> Path | None:
    """Train the Flux on the teacher in `out` and write its file; None if `stop` asked to leave. ComfyUI must be importable.

    It begins with random weights, or with those of the file `start`: so a training can go on whose checkpoints are lost.
    Raises ValueError if there is no teacher yet.
    """
    size, teacher_path = size or FluxSize(), place(out, TEACHER_FILE)
    if not teacher_path.is_file():
        raise ValueError(f"{teacher_path} is not there.\nWhat to do: make the teacher first.")
    frozen = FrozenTeacher(teacher_path, load_tokenizer(comfyui), usual_device())
    flux = flow.make_flux(size, frozen.width, plan.seed).to(usual_device())
    what: dict[str, Any] = {"flux": asdict(size), "teacher": data_sha256(teacher_path), "shift": flow.SHIFT}
    if start is not None:
        flow.load_weights(flux, start)
        what["start"] = data_sha256(start)
    predict = predictor(flux, fuse)

    def loss_at(step: int) -> torch.Tensor:
        return flow.loss_of(predict, frozen, flow.draw_batch(plan.seed, step, plan.batch), usual_device())

    trainee = train(flux, loss_at, plan, what, out / "flux-run", resume, stop)
    if trainee is None:
        return None
    return flow.save_flux(_room_for(place(out, FLUX_FILE)), trainee.averaged(), _facts(plan, what), DTYPE)


def make_lora(out: Path, comfyui: Path, plan: Plan = LORA_PLAN, resume: bool = False, stop: Stop = never) -> Path | None:
    """Train the palette LoRA on the Flux and the teacher in `out` and write its file; None if `stop` asked to leave.

    Raises ValueError if there is no Flux yet.
    """
    flux_path, teacher_path = place(out, FLUX_FILE), place(out, TEACHER_FILE)
    if not flux_path.is_file():
        raise ValueError(f"{flux_path} is not there.\nWhat to do: make the Flux first.")
    frozen = FrozenTeacher(teacher_path, load_tokenizer(comfyui), usual_device())
    flux = load_flux(flux_path, frozen.width)
    low_ranks = with_lora(flux, seed=plan.seed)
    flux.to(usual_device())
    what = {"lora": len(low_ranks), "flux": data_sha256(flux_path), "teacher": data_sha256(teacher_path)}

    def loss_at(step: int) -> torch.Tensor:
        return flow.loss_of(predict, frozen, flow.draw_batch(plan.seed, step, plan.batch, repainted), usual_device())

    predict = predictor(flux, fuse=False)
    trainee = train(trained_part(low_ranks), loss_at, plan, what, out / "lora-run", resume, stop)
    if trainee is None:
        return None
    return save_lora(_room_for(place(out, LORA_FILE)), trainee.averaged(), low_ranks, _facts(plan, what))


def _room_for(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _facts(plan: Plan, what: dict[str, Any]) -> dict[str, str]:
    """What made a file, for its header."""
    return {
        "distilled_t5.miniature_plan_sha256": plan.sha256(what),
        "distilled_t5.steps": str(plan.steps),
        "modelspec.author": "The Distilled T5 contributors",
        "modelspec.license": "Apache-2.0",
    }


def changed(plan: Plan, **values: Any) -> Plan:
    """The plan with those values that are given (not None)."""
    return replace(plan, **{name: value for name, value in values.items() if value is not None})
