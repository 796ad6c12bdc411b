"""Training of the miniature's models: Muon on matrices, AdamW on the rest, averaged weights, exact resume.

All that a step draws is a function of seed and step, so a stopped run continues bit for bit. The learning rate is constant until the last
part of a run; before that, a run can be resumed with another length and equals one that was planned with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, autocast
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_

from ..runtime.randomness import random_states, restore_random_states
from ..train.optimizer import make_optimizer, set_rate
from ..train.state import Checkpoints, TrainerState

MAX_GRADIENT_NORM = 1.0
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.0
DECAY_SHARE = 0.3
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Steps, samples per step, seed, peak learning rates of AdamW and Muon, steps that the average of the weights spans, checkpoints.

    bf16: compute under bfloat16 autocast; weights stay float32.
    """

    steps: int
    batch: int = 64
    seed: int = 0
    learning_rate: float = 2e-3
    muon_learning_rate: float = 2e-2
    warmup_steps: int = 100
    average_steps: int = 500
    bf16: bool = False
    save_every: int = 200
    log_every: int = 20
    keep_last: int = 2

    @property
    def decay_steps(self) -> int:
        """The number of steps at the end in which the learning rate falls."""
        return max(round(self.steps * DECAY_SHARE), 1)

    def rate(self, step: int) -> float:
        """The learning rate of a step as a share of its peak: linear warm-up, constant, linear to 0 over the last `decay_steps`."""
        return min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / self.decay_steps)

    def level_at(self, step: int) -> bool:
        """Whether the steps before this one do not depend on the length of the run."""
        return step <= self.steps - self.decay_steps

    def sha256(self, what: Mapping[str, Any], length_too: bool = True) -> str:
        """Digest of the plan, with or without its length, and of what it trains. Only a checkpoint with the same digest is resumed."""
        idle = ("save_every", "log_every", "keep_last", *(() if length_too else ("steps",)))
        values = {name: value for name, value in asdict(self).items() if name not in idle}
        return hashlib.sha256(json.dumps([values, what], sort_keys=True).encode()).hexdigest()


class Trainee:
    """A model in training: weights, their average, optimizer, number of steps taken."""

    def __init__(self, module: Module, plan: Plan) -> None:
        self.module, self.plan, self.step = module, plan, 0
        self.optimizer = make_optimizer(module, plan.learning_rate, ADAM_BETAS, WEIGHT_DECAY, plan.muon_learning_rate)
        self.average = {name: weight.detach().clone() for name, weight in module.named_parameters()}

    def advance(self, loss_at: Callable[[int], Tensor]) -> float:
        """One optimizer step on `loss_at(step)`; returns the loss. Raises RuntimeError if it is not finite."""
        device = next(self.module.parameters()).device.type
        with autocast(device, dtype=torch.bfloat16, enabled=self.plan.bf16):
            loss = loss_at(self.step)
        if not torch.isfinite(loss):
            raise RuntimeError(f"The loss of step {self.step} is {float(loss)}.\nWhat to do: start a new run with a lower --learning-rate.")
        loss.backward()
        clip_grad_norm_(self.module.parameters(), MAX_GRADIENT_NORM)
        set_rate(self.optimizer, self.plan.learning_rate * self.plan.rate(self.step))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._move_average()
        return float(loss.detach())

    @torch.no_grad()
    def _move_average(self) -> None:
        """Exponential average over `average_steps`, over fewer at first, so that the random initial weights leave it."""
        share = 1 / min(self.plan.average_steps, 1 + self.step // 2)
        for name, weight in self.module.named_parameters():
            self.average[name].lerp_(weight, share)

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name; a shared parameter has its first name."""
        return {name: weight.clone() for name, weight in self.average.items()}

    def state(self, recipe_sha256: str) -> TrainerState:
        """All that is needed to continue bit for bit."""
        weights = {name: weight.detach().clone() for name, weight in self.module.named_parameters()}
        position = {"average": self.average, "planned_steps": self.plan.steps}
        moments = self.optimizer.state_dict()
        return TrainerState(self.step, 0, weights, moments, {}, random_states({}), recipe_sha256, position=position)

    def restore(self, state: TrainerState, recipe_sha256: str) -> None:
        """Continue from `state`. Raises ValueError if its plan differs, or only its length after the learning rate has begun to fall."""
        if state.recipe_sha256 != recipe_sha256:
            raise ValueError(
                "The checkpoint was made with other options: another size, seed, batch or learning rate.\n"
                "What to do: give the same options as at the start, or another folder with --out."
            )
        was = state.position["planned_steps"]
        if was != self.plan.steps and not (self.plan.level_at(state.step) and replace(self.plan, steps=was).level_at(state.step)):
            raise ValueError(
                f"The run was planned with {was} steps and cannot be resumed with {self.plan.steps}: at step {state.step} the learning "
                f"rate has begun to fall by one of the two plans.\n"
                f"What to do: resume with --steps {was}, or start a new run with another --out."
            )
        self.step = state.step
        with torch.no_grad():
            for name, weight in self.module.named_parameters():
                weight.copy_(state.student[name])
        self.average = {name: state.position["average"][name].to(weight.device) for name, weight in self.average.items()}
        self.optimizer.load_state_dict(state.optimizer)
        for note in restore_random_states(state.rng, {}):
            log.info(note)


def train(
    module: Module,
    loss_at: Callable[[int], Tensor],
    plan: Plan,
    what: Mapping[str, Any],
    folder: Path,
    resume: bool,
    stop: Callable[[], bool] = lambda: False,
) -> Trainee | None:
    """Train `module` to the end of the plan; writes checkpoints and metrics.jsonl to `folder`. None if `stop` returned true, after saving.

    `what` describes the module, for the digest. Raises ValueError if `folder` holds a run and `resume` is not set, or if the plan of that
    run differs; OSError if a checkpoint cannot be written.
    """
    trainee, sha256 = Trainee(module, plan), plan.sha256(what, length_too=False)
    checkpoints = Checkpoints(folder / "checkpoints", _write_weights, plan.keep_last)
    if resume:
        state, notes = checkpoints.load_latest()
        trainee.restore(state, sha256)
        for note in notes:
            log.warning(note)
    elif checkpoints.paths():
        raise ValueError(f"{folder} already holds a run.\nWhat to do: continue it with --resume, or give another folder with --out.")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics, contextlib.ExitStack() as modes:
        module.train()
        modes.callback(module.eval)
        while trainee.step < plan.steps:
            loss = trainee.advance(loss_at)
            if trainee.step % plan.log_every == 0 or trainee.step == plan.steps:
                metrics.write(json.dumps({"step": trainee.step, "loss": loss}) + "\n")
                metrics.flush()
                log.info("Step %d of %d: loss %.4f", trainee.step, plan.steps, loss)
            stopping = stop()
            if stopping or trainee.step % plan.save_every == 0 or trainee.step == plan.steps:
                checkpoints.save(trainee.state(sha256))
            if stopping and trainee.step < plan.steps:
                return None
    return trainee


def _write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
