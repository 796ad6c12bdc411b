"""A rehearsal of a run: an optimizer step of each stage, and the teacher's work for it, on fake tensors of the real sizes.

It needs no weights and no GPU. The trainer's own code runs in ComfyUI's and transformers' modules: memory and floating-point operations are
counted, not estimated by a formula.
"""

# B batch, L text tokens, D text width

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.memory_management
import comfy.model_management
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.grad_scaler import GradScaler
from torch.nn import Module
from torch.optim import Optimizer

from ..diffusion.files import check_family, check_guidance
from ..diffusion.frozen import FrozenModel
from ..diffusion.gradients import replaced
from ..encoder.teacher_text import TeacherText
from ..runtime.ranks import Ranks
from ..runtime.weights import FLOAT_NAMES
from ..students import KINDS
from .cache_plan import expected
from .distill import Learner, new_learner, train_step
from .ledger import MODEL, Ledger
from .memory import Need, Rehearsal, StageRehearsal
from .objectives import OBJECTIVES
from .optimizer import MuonAndAdamW, trained
from .recipe import Recipe, Stage
from .trajectory import Draw, Position, start
from .unloaded import check_blocks, diffusion_model, found, teacher_model, teacher_of, weights_from_ram

# Parts of memory beside the diffusion model's weights.
STUDENT, MOMENTS, GRADIENTS = "student's weights", "optimizer's running means", "student's gradients"
TEXTS, STUDENTS_PASS, STUDENTS_BACKWARD = "teacher's embeddings", "student's activations", "student's backward pass"
TEACHERS_PASS, PASS, BACKWARD = "pass for the teacher's text", "diffusion model's activations", "diffusion model's backward pass"
OPTIMIZER, ENCODING = "optimizer's step", "teacher's activations"
# Where torch's optimizers update all weights at once, which takes a copy of them.
AT_ONCE = ("cuda", "xpu")
Flops = Counter[torch.dtype]


@dataclass(frozen=True)
class Target:
    """Where the run is rehearsed: the device of the fake tensors, and whether it stands for a GPU that this machine lacks."""

    device: torch.device
    as_gpu: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.as_gpu or self.device.type != "cpu"


def rehearse(recipe: Recipe, target: Target, processes: int = 1, with_time: bool = False) -> Rehearsal:
    """What the run takes at its greatest prompt length. with_time: also the operations of a mean step.

    Raises ValueError for a model whose sizes are not known, UnfittingModel for one that is not the recipe's, and whatever torch and
    ComfyUI raise where they cannot do it."""
    lengths = recipe.sampling.token_lengths
    longest, mean = max(lengths), round(sum(lengths) / len(lengths))
    with _without_a_server(), FakeTensorMode(allow_non_fake_inputs=True):
        teacher = _Teacher(recipe, target)
        with Ledger(target.device) as ledger:
            scene = _Scene(recipe, target, ledger)
            check_blocks(recipe, scene.model)
            if file := found(recipe.diffusion_model.file, "diffusion_models"):
                check_family(file.name, scene.model.model, recipe.family)
                check_guidance(file.name, scene.model, recipe.sampling.guidance)
            if recipe.teacher.cache:
                teacher.text(1, longest)  # before others, which stay
            texts = expected(recipe, scene.model.text_width).texts if with_time and recipe.teacher.cache else None
            stages = []
            for stage in recipe.stages:
                need, flops = scene.step(stage, teacher.text(stage.batch, longest), stage.batches_per_rank(processes))
                if with_time and mean != longest:
                    _, flops = scene.step(stage, teacher.text(stage.batch, mean), stage.batches_per_rank(processes))
                encoding = teacher.flops(stage.batch, mean) if with_time else Flops()
                batches = stage.batches_per_rank(processes) / recipe.trajectory_steps(stage)
                if texts is not None:
                    # A step's share of what is encoded once.
                    steps = sum(each.steps for each in recipe.stages)
                    batches = texts / stage.batch / steps / processes
                stages.append(StageRehearsal(stage.name, stage.steps, need, _by_name(flops), _by_name(encoding, batches)))
            return Rehearsal(
                stages,
                model=ledger.live[MODEL] if recipe.needs_diffusion_model else 0,
                teacher=teacher.held,
                student=ledger.live[STUDENT],
                moments=ledger.live[MOMENTS],
                parameters=sum(one.student_layout(scene.model.text_width).parameters for one in recipe.each),
                text_width=scene.model.text_width,
                encoding=teacher.need([1] if recipe.teacher.cache else [stage.batch for stage in recipe.stages], longest),
                on_gpu=target.on_gpu,
                cached=bool(recipe.teacher.cache),
            )


@contextlib.contextmanager
def _without_a_server() -> Iterator[None]:
    """ComfyUI as the command `train` starts it. In its server, layers have no weights before a file is loaded, and copies use buffers that
    stay: fake tensors must not get into these."""
    with (
        replaced(comfy.memory_management, "aimdo_enabled", False),
        replaced(comfy.model_management, "NUM_STREAMS", 0),
    ):
        yield


def _by_name(flops: Flops, times: float = 1) -> dict[str, float]:
    return {FLOAT_NAMES.get(dtype, str(dtype)): times * count for dtype, count in flops.items()}


def _need(ledger: Ledger, without_model: bool = False) -> Need:
    if without_model:
        return Need(ledger.offloaded.parts, ledger.offloaded.parts, ledger.offloaded.during)
    return Need(ledger.all_here.parts, ledger.offloaded.parts, ledger.all_here.during)


class _Teacher:
    """The teacher without weights: its texts by batch and length, and what it takes to make them."""

    def __init__(self, recipe: Recipe, target: Target) -> None:
        self.recipe, self.device, self.ledger = recipe, target.device, Ledger(target.device)
        with self.ledger, self.ledger.of(MODEL), target.device:
            self.model = teacher_model(recipe, target.device)
        weights_from_ram(self.model)
        self.held = self.ledger.live[MODEL]
        self._made: dict[tuple[int, int], tuple[TeacherText, Flops, Need]] = {}

    def text(self, batch: int, length: int) -> TeacherText:
        """The texts of a batch of prompts of this length."""
        if (batch, length) not in self._made:
            teacher = teacher_of(self.model, self.recipe.family, length, self.device)
            with self.ledger, self.ledger.of(ENCODING):
                self.ledger.restart()
                text = teacher.encode(["a"] * batch, length, with_empty=bool(self.recipe.sampling.cfg))
            self._made[batch, length] = text, Flops(self.ledger.flops), _need(self.ledger)
        return self._made[batch, length][0]

    def flops(self, batch: int, length: int) -> Flops:
        """The operations that these texts take."""
        self.text(batch, length)
        return self._made[batch, length][1]

    def need(self, batches: Sequence[int], length: int) -> Need:
        """The most that it takes to encode batches of texts of this length, which it has encoded."""
        return max((self._made[batch, length][2] for batch in batches), key=lambda need: need.total)


class _Scene:
    """The other models without weights, and the ledger in which the work of a step is counted."""

    def __init__(self, recipe: Recipe, target: Target, ledger: Ledger) -> None:
        self.recipe, self.ledger = recipe, ledger
        # Not every weight is made on the device that a model is given.
        with ledger.of(MODEL), target.device:
            self.model = diffusion_model(recipe, target.device, target.as_gpu)
        weights_from_ram(self.model.model)
        self.learners = [self._learner(one, target) for one in recipe.each]
        self._update = self._first_update()
        self._seen: dict[tuple[object, ...], tuple[Need, Flops]] = {}

    def _learner(self, recipe: Recipe, target: Target) -> Learner:
        """The learner of the student of a recipe with one, and its parts named in the ledger."""
        layout = recipe.student_layout(self.model.text_width)
        with self.ledger.of(STUDENT), target.device:
            student = KINDS[layout.kind].trained(layout, recipe.student.dropout, not recipe.family.masked)
        if recipe.student.trunk == "frozen":
            student.freeze_trunk()
        # A scaled loss takes no more memory; the scaler would read from a fake number that there was an overflow, and skip the update.
        learner = replace(new_learner(recipe, Ranks(), student, self.model), scaler=GradScaler(enabled=False))
        if target.as_gpu or target.device.type in AT_ONCE:
            # torch does not choose it for fake tensors.
            for group in learner.optimizer.param_groups:
                group["foreach"] = True
        name_parts(self.ledger, learner, self.model)
        return learner

    def _first_update(self) -> Flops:
        """Make the optimizers' states; the operations of their step."""
        self._make_gradients()
        self.ledger.restart()
        for learner in self.learners:
            learner.optimizer.step()
            for value in (value for state in learner.optimizer.state.values() for value in state.values()):
                if isinstance(value, Tensor):
                    self.ledger.is_part(value, MOMENTS)
            learner.optimizer.zero_grad(set_to_none=True)
        return Flops(self.ledger.flops)

    def _make_gradients(self) -> None:
        with self.ledger.of(GRADIENTS):
            for weight in (weight for learner in self.learners for weight in filter(trained, learner.student.parameters())):
                weight.grad = torch.zeros_like(weight)

    def step(self, stage: Stage, text: TeacherText, batches: int) -> tuple[Need, Flops]:
        """Peak and operations of an optimizer step over so many batches with texts like these."""
        key = (stage.objective, stage.blocks, self.recipe.trajectory_steps(stage), stage.resolution_px, batches, text.text_BLD.shape)
        if key not in self._seen:
            self._seen[key] = self._step(stage, text, batches)
        return self._seen[key]

    def _step(self, stage: Stage, text: TeacherText, batches: int) -> tuple[Need, Flops]:
        """The peak of a step, and the mean operations of those of a trajectory."""
        need, flops = self._step_at(0, stage, text, batches)
        steps = self.recipe.trajectory_steps(stage)
        if OBJECTIVES[stage.objective].at != "streams":
            return need, flops
        # The last one ends early for the teacher's text too.
        _, last = self._step_at(steps - 1, stage, text, batches)
        return need, Flops({dtype: count + (last[dtype] - count) / steps for dtype, count in flops.items()})

    def _step_at(self, step: int, stage: Stage, text: TeacherText, batches: int) -> tuple[Need, Flops]:
        ledger = self.ledger
        with ledger.of(TEXTS):
            position = replace(self._position(stage, text), step=step)
            ledger.is_part(position.text_BLD, TEXTS)
            objective = replace(OBJECTIVES[stage.objective], blocks=stage.blocks, variance_D=torch.ones(1))
            if objective.at == "projection":
                _ = self.model.text_projection  # made now, and kept
            # Of every other batch: its text, its latent before and after the step, and the velocity.
            latents = [position.x] * 3
            others = [torch.empty_like(value) for _ in range(batches - 1) for value in (position.text_BLD, *latents)]
        if others:
            # Every batch but the first one adds to gradients that are there.
            self._make_gradients()
        ledger.restart()
        with ledger.of(BACKWARD), self.model.differentiable(self.recipe.diffusion_model.checkpoint_blocks):
            train_step([position], self.model, self.learners, objective)
        one = Flops(ledger.flops)
        one.subtract(self._update)
        flops = Flops({dtype: batches * count for dtype, count in one.items()}) + self._update
        return _need(ledger, not self.recipe.needs_diffusion_model), flops

    def _position(self, stage: Stage, text: TeacherText) -> Position:
        sampling, some_B = self.recipe.sampling, torch.ones(stage.batch)
        noise = torch.empty(stage.batch, *self.recipe.family.latent_shape(stage.resolution_px))
        drawn = Draw(noise, some_B if sampling.guidance else None, text.text_BLD.shape[1], some_B if sampling.cfg else None)
        return start(self.model, self.recipe.trajectory_steps(stage), drawn, text)


def name_parts(ledger: Ledger, learner: Learner, model: FrozenModel) -> None:
    """Count what a step allocates by the part of it that is being computed."""

    def begin(part: str) -> None:
        ledger.part = part

    def encoded(_module: Module, _inputs: Any, text_BLD: Tensor) -> None:
        begin(BACKWARD)
        if text_BLD.requires_grad:
            text_BLD.register_hook(lambda _: begin(STUDENTS_BACKWARD))

    student, inner = learner.student, model.model.diffusion_model
    student.register_forward_pre_hook(lambda *_: begin(STUDENTS_PASS))
    student.register_forward_hook(encoded)
    inner.register_forward_pre_hook(lambda *_: begin(PASS if torch.is_grad_enabled() else TEACHERS_PASS))
    # Also of a pass that ends early.
    inner.register_forward_hook(lambda *_: begin(BACKWARD), always_call=True)
    for weight in filter(trained, student.parameters()):
        weight.register_post_accumulate_grad_hook(lambda weight: ledger.is_part(weight.grad, GRADIENTS))
    for optimizer in _parts(learner):
        optimizer.register_step_pre_hook(lambda *_: begin(OPTIMIZER))


def _parts(learner: Learner) -> list[Optimizer]:
    return list(learner.optimizer.parts) if isinstance(learner.optimizer, MuonAndAdamW) else [learner.optimizer]
