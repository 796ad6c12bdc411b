"""ComfyUI under the trainer: how it is found, which version it is, the flags that it is started with."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
from distilled_t5.runtime.comfyui import OLDEST, model_file, refuse_old_comfyui, refuse_without_gradient
from distilled_t5.tests.support.prepared import run_prepared
from distilled_t5.tests.support.trainer import QUICK, command, finish, metrics, wait_for_step

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
def test_asynchronous_offload_is_off_unless_requested(comfyui_path, flags, streams):
    """Its buffers are reused, so weights that a gradient still needs would be overwritten."""
    reserved = "1.5" if "--reserve-vram" in flags else "None"
    assert started_with(comfyui_path, *flags) == ["True", streams, reserved]


@pytest.mark.parametrize("flag", ["--use-sage-attention", "--use-flash-attention"])
def test_attention_without_a_gradient_is_refused(comfyui_path, flag):
    known = SimpleNamespace(fast=None, **{flag.removeprefix("--").replace("-", "_"): True})
    assert f'"{flag}"' in (comfyui_path / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=rf"ComfyUI's {flag} has no gradient.*\nWhat to do: start ComfyUI without {flag} \("):
        refuse_without_gradient(known)


@pytest.mark.parametrize("flags", [["--fast"], ["--fast", "fp8_matrix_mult"], ["--fast", "fp16_accumulation", "cublas_ops"]])
def test_fast_products_without_a_gradient_are_refused_before_anything_is_loaded(comfyui_path, tmp_path, flags):
    said = finish([*command(comfyui_path, tmp_path, tmp_path / "run"), *flags], tmp_path, code=1)
    assert "has no gradient" in said
    assert "What to do: start ComfyUI without --fast" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_fast_fp16_accumulation_is_accepted(comfyui_path):
    assert started_with(comfyui_path, "--fast", "fp16_accumulation") == ["True", "0", "None"]


def test_training_starts_under_a_torch_without_torch_accelerator(comfyui_path):
    assert started_with(comfyui_path, "torch before 2.6") == ["True", "0", "None"]


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--cuda-device", "1"], "choose the GPU before the command instead: CUDA_VISIBLE_DEVICES=N python"),
        (["--default-device", "0"], "torchrun assigns one visible GPU"),
        (["--listen", "--cuda-malloc", "--port=8189"], "--cuda-malloc --listen --port: only ComfyUI's main.py applies this"),
    ],
)
def test_flags_that_only_comfyuis_server_applies_are_refused(comfyui_path, tmp_path, flags, advice):
    said = finish([*command(comfyui_path, tmp_path, tmp_path / "run"), *flags], tmp_path, code=1)
    assert advice in said
    assert "What to do: " in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_flags_that_match_the_trainers_own_settings_are_accepted(comfyui_path):
    assert started_with(comfyui_path, "--disable-all-custom-nodes", "--disable-dynamic-vram") == ["True", "0", "None"]


def test_the_flag_of_every_portable_comfyui_is_taken(comfyui_path):
    """It sets --auto-launch as well, which nobody typed."""
    assert started_with(comfyui_path, "--windows-standalone-build") == ["True", "0", "None"]


def a_comfyui(folder: Path, version: str) -> Path:
    """A folder that looks like ComfyUI of this version and ends the process when it is started."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text("")
    (folder / "comfyui_version.py").write_text(f'# generated\n__version__ = "{version}"\n')
    (folder / "comfy" / "options.py").write_text("raise SystemExit('started')\n")
    return folder


@pytest.mark.parametrize("arguments", [["train", "smoke"], ["evaluate", "miniature"], ["miniature", "prompts"]], ids=lambda one: one[0])
@pytest.mark.parametrize("from_below", [False, True], ids=["from outside", "from the folder above"])
def test_a_pack_that_is_linked_into_custom_nodes_uses_that_comfyui(tmp_path, pack_root, arguments, from_below):
    comfyui = a_comfyui(tmp_path / "ComfyUI", "0.30.0")
    (comfyui / "custom_nodes").mkdir()
    (comfyui / "custom_nodes" / "my-pack").symlink_to(pack_root)
    folder, start = (comfyui / "custom_nodes", Path("my-pack")) if from_below else (tmp_path, comfyui / "custom_nodes" / "my-pack")
    done = subprocess.run(
        [sys.executable, str(start / arguments[0]), *arguments[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines() == [f"ComfyUI 0.30.0: {comfyui}", "started"]


@pytest.mark.parametrize("arguments", [["train", "smoke"], ["evaluate", "miniature"], ["miniature", "prompts"]], ids=lambda one: one[0])
def test_a_comfyui_that_is_too_old_is_refused_in_one_sentence(tmp_path, pack_root, arguments):
    comfyui = a_comfyui(tmp_path / "ComfyUI", "0.3.64")
    said = finish([str(pack_root / arguments[0]), *arguments[1:], "--comfyui", str(comfyui)], tmp_path, code=1)
    assert said == f"\nComfyUI 0.3.64 is too old: {OLDEST} or newer is needed.\nWhat to do: update ComfyUI.\n"


def test_versions_of_comfyui_are_compared_as_numbers(pack_root):
    for version in ("0.16.3", "0.16.10", "0.30.0", "1.0", "0.17.0rc1"):
        refuse_old_comfyui(version)
    for version in ("0.3.64", "0.16.2", "0.9.9", "without a version"):
        with pytest.raises(ValueError, match="is too old"):
            refuse_old_comfyui(version)
    assert re.search('requires-comfyui = ">=(.+)"', (pack_root / "pyproject.toml").read_text())[1] == OLDEST


@pytest.mark.skipif(os.name != "posix", reason="making links needs rights on Windows")
def test_a_model_that_is_a_link_keeps_its_name_and_extension(tmp_path, monkeypatch):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "5ac3").write_bytes(b"weights")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "t5.safetensors").symlink_to(tmp_path / "blobs" / "5ac3")
    endings = folder_paths.folder_names_and_paths["text_encoders"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path / "models")], endings))
    monkeypatch.chdir(tmp_path / "models")
    for name in ("t5.safetensors", "./t5.safetensors", "../models/t5.safetensors", str(tmp_path / "models" / "t5.safetensors")):
        assert model_file(name, "text_encoders") == tmp_path / "models" / "t5.safetensors"


@pytest.mark.skipif(os.name != "posix", reason="pseudo terminals are POSIX")
@pytest.mark.full
def test_a_run_whose_terminal_is_closed_is_saved(comfyui_path, tmp_path):
    run = tmp_path / "run"
    ours, theirs = pty.openpty()
    arguments = command(comfyui_path, tmp_path / "base", run, settings=[*QUICK, "stage.1.steps=400", "checkpoints.every_steps=400"])
    process = subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        wait_for_step(process, run, 3)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
    stopped_at = metrics(run)[-1]["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{stopped_at:06d}"]
