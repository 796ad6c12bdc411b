"""A T5 of the student's size, pretrained on the miniature's texts alone, as a start for students like the paper's.

It has seen neither the teacher nor what images show.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import safetensors.torch
from torch.utils.flop_counter import FlopCounterMode

from ..miniature.corruption import load_tokenizer
from ..miniature.teacher import Pretraining, draw_batch
from ..miniature.training import Plan, train
from ..runtime.disk import replace_file
from ..runtime.stop import StopRequest
from ..students.t5.layout import StudentLayout
from ..train.recipe import load_recipe
from .commands import ROOT

# As the miniature's teacher is pretrained, without its captions.
COUNTED_BATCHES = 8
PLAN = Plan(steps=1_500, batch=24, learning_rate=1e-2, muon_learning_rate=5e-3)


def pretrain(recipe: str, out: Path, comfyui: Path, plan: Plan) -> bool:
    """Pretrain, or continue, and write the T5 with the names of Hugging Face; False after a request to stop."""
    table = load_recipe(recipe).student.layout
    assert table is not None, "students of the miniature have sizes of their own"
    layout, tokenizer, run = StudentLayout(**table.model_dump()), load_tokenizer(comfyui), out.with_suffix("")
    model, resume = Pretraining(layout, plan.seed), any(run.glob("checkpoints/step-*"))

    with StopRequest() as stop:
        trainee = train(
            model,
            lambda step: model.loss(*draw_batch(tokenizer, plan.seed, step, plan.batch)),
            plan,
            {"pretrained": str(layout)},
            run,
            resume,
            lambda: stop.requested,
        )
    if trainee is None:
        return False
    tensors = {name.removeprefix("t5."): tensor for name, tensor in trainee.averaged().items() if name.startswith("t5.")}
    replace_file(out, safetensors.torch.save(tensors))
    return True


def sources() -> str:
    """A digest of the code that pretrains."""
    files = [*sorted((ROOT / "miniature").glob("*.py")), Path(__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


def tflop(recipe: str, comfyui: Path) -> float:
    """The floating-point operations, 10^12, of a pretraining, counted on its first batches."""
    table = load_recipe(recipe).student.layout
    assert table is not None, "students of the miniature have sizes of their own"
    model, tokenizer = Pretraining(StudentLayout(**table.model_dump()), PLAN.seed), load_tokenizer(comfyui)
    with FlopCounterMode(display=False) as counter:
        for step in range(COUNTED_BATCHES):
            model.loss(*draw_batch(tokenizer, PLAN.seed, step, PLAN.batch)).backward()
    return counter.get_total_flops() / COUNTED_BATCHES * PLAN.steps / 1e12


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="recipe of the students")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's main.py")
    parser.add_argument("--steps", type=int, default=PLAN.steps, help="optimizer steps (default: %(default)s, as the teacher)")
    options = parser.parse_args()
    plan = Plan(options.steps, PLAN.batch, 0, PLAN.learning_rate, PLAN.muon_learning_rate)
    sys.exit(0 if pretrain(options.recipe, options.out, options.comfyui, plan) else 130)


if __name__ == "__main__":
    main()
