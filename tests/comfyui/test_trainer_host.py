"""ComfyUI under the trainer: the flags that it is started with."""

from __future__ import annotations

from pathlib import Path

import pytest
from distilled_t5.tests.support.prepared import run_prepared
from distilled_t5.tests.support.trainer import command, finish

STARTED = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
from pathlib import Path
from distilled_t5.runtime.comfyui import start_comfyui
import torch
flags, accelerator = sys.argv[3:], torch.accelerator
if "torch before 2.6" in flags:
    flags.remove("torch before 2.6")
    del torch.accelerator
start_comfyui(Path(sys.argv[2]), flags)
torch.accelerator = accelerator
from comfy.cli_args import args
import comfy.model_management
print(args.cpu, comfy.model_management.NUM_STREAMS, args.reserve_vram)
"""


def started_with(comfyui: Path, *flags: str) -> list[str]:
    """Whether on the CPU, asynchronous streams and reserved GB of a ComfyUI that the trainer has started in a process of its own."""
    tests = Path(__file__).resolve().parent.parent
    status, said = run_prepared(["-c", STARTED, str(tests), str(comfyui), "--cpu", *flags], tests, 400)
    assert status == 0, said
    return said.splitlines()[-1].split()


@pytest.mark.parametrize(
    ("flags", "streams"),
    [((), "0"), (("--reserve-vram", "1.5"), "0"), (("--async-offload", "3"), "3"), (("--disable-async-offload",), "0")],
)
def test_weights_never_lie_in_buffers_that_are_written_over_unless_asked_for(comfyui_path, flags, streams):
    reserved = "1.5" if "--reserve-vram" in flags else "None"
    assert started_with(comfyui_path, *flags) == ["True", streams, reserved]


@pytest.mark.parametrize("flags", [["--fast"], ["--fast", "fp8_matrix_mult"], ["--fast", "fp16_accumulation", "cublas_ops"]])
def test_fast_products_without_a_gradient_are_refused_before_anything_is_loaded(comfyui_path, tmp_path, flags):
    said = finish([*command(comfyui_path, tmp_path, tmp_path / "run"), *flags], tmp_path, code=1)
    assert "has no gradient" in said
    assert "What to do: leave --fast out" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_fast_accumulation_may_stay(comfyui_path):
    assert started_with(comfyui_path, "--fast", "fp16_accumulation") == ["True", "0", "None"]


def test_a_torch_that_knows_no_accelerators_by_that_name_starts_too(comfyui_path):
    assert started_with(comfyui_path, "torch before 2.6") == ["True", "0", "None"]


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--cuda-device", "1"], "choose the GPU before the command instead: CUDA_VISIBLE_DEVICES=N python"),
        (["--default-device", "0"], "torchrun gives every process its own"),
        (["--listen", "--cuda-malloc", "--port=8189"], "--cuda-malloc --listen --port: ComfyUI's main.py alone applies this"),
    ],
)
def test_flags_that_only_comfyuis_server_applies_are_refused(comfyui_path, tmp_path, flags, advice):
    said = finish([*command(comfyui_path, tmp_path, tmp_path / "run"), *flags], tmp_path, code=1)
    assert advice in said
    assert "What to do: " in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_what_is_so_in_the_trainer_anyway_may_be_said(comfyui_path):
    assert started_with(comfyui_path, "--disable-all-custom-nodes", "--disable-dynamic-vram") == ["True", "0", "None"]


def test_the_flag_of_every_portable_comfyui_is_taken(comfyui_path):
    """It sets --auto-launch as well, which nobody typed."""
    assert started_with(comfyui_path, "--windows-standalone-build") == ["True", "0", "None"]
