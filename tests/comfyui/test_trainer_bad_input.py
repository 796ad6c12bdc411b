"""Failures of a run: each error says what was expected, what was given and what to do, and no work is lost."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import folder_paths
import pytest
import safetensors.torch
import torch
from distilled_t5.encoder.teacher import check_large
from distilled_t5.runtime.comfyui import check_output_folder
from distilled_t5.runtime.failure import explained, is_out_of_memory
from distilled_t5.runtime.random_weights import drawn
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.small_encoders import student_file
from distilled_t5.tests.support.small_flux import FLUX
from distilled_t5.tests.support.tiny_students import sparse_file
from distilled_t5.tests.support.trainer import command, finish, start
from distilled_t5.train import teacher_cache
from distilled_t5.train.__main__ import command_line, memory_advice
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.workshop import open_workshop

NARROW = StudentLayout(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, hidden_width=32, projected_width=512)
THIN = StudentLayout(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, hidden_width=8, projected_width=4096)
posix = pytest.mark.skipif(os.name != "posix", reason="kill -9 and limits on the size of a file are POSIX")


def refusal(*settings: str) -> str:
    """What the command says about the smoke recipe with these settings, when it has read and loaded all that a run begins with."""
    with pytest.raises(ValueError, match="What to do: ") as caught:
        open_workshop(load_recipe("smoke", settings), Ranks())
    message = str(caught.value)
    assert explained(caught.value) == message
    assert message.splitlines()[-1].startswith("What to do: ")
    return message


@pytest.fixture(scope="module")
def models(stand_ins: Path) -> Path:
    return stand_ins / "models"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """A folder of incomplete models and of files that are not models."""
    folder = tmp_path_factory.mktemp("broken")
    flux = drawn(FLUX.tensors(), seed=2)
    safetensors.torch.save_file(
        {name: tensor for name, tensor in flux.items() if "double_blocks.0.txt_mlp" not in name}, folder / "lacking.safetensors"
    )
    safetensors.torch.save_file({name: tensor for name, tensor in flux.items() if "_in." not in name}, folder / "headless.safetensors")
    safetensors.torch.save_file(flux | {"img_in.weight": torch.zeros(128, 384)}, folder / "fill.safetensors")
    longcat = replace(FLUX, text_width=3584, guidance=False).tensors()
    longcat = {name.replace("_norm.scale", "_norm.weight"): shape for name, shape in longcat.items() if "vector_in" not in name}
    safetensors.torch.save_file(drawn(longcat, seed=2), folder / "longcat.safetensors")
    safetensors.torch.save_file(drawn(replace(FLUX, pooled_width=512).tensors(), seed=2), folder / "pooled.safetensors")
    whole = safetensors.torch.save(flux)
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "garbage.safetensors").write_bytes(random.Random(1).randbytes(5000))
    (folder / "garbage.ckpt").write_bytes(random.Random(2).randbytes(5000))
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "flux.gguf").write_bytes(b"GGUF" + bytes(100))
    (folder / "folder").mkdir()
    (folder / "empty.txt").write_text("\n \n")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    student_file(folder, NARROW, "narrow.safetensors")
    student_file(folder, THIN, "thin.safetensors")
    return folder


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("vae/ae.safetensors", "ae.safetensors is not a diffusion model that ComfyUI knows"),
        ("text_encoders/clip_l.safetensors", "clip_l.safetensors is not a diffusion model"),
        ("text_encoders/t5xxl_fp16.safetensors", "t5xxl_fp16.safetensors is not a diffusion model"),
        ("text_encoders/distilled_t5_base.safetensors", "distilled_t5_base.safetensors is not a diffusion model"),
        ("loras/FLUX-dev-lora-add_details.safetensors", "FLUX-dev-lora-add_details.safetensors is a LoRA, not a diffusion model."),
        ("controlnet/flux-canny-controlnet-v3.safetensors", "flux-canny-controlnet-v3.safetensors is a ControlNet, not a diffusion model."),
    ],
)
def test_a_file_that_is_not_a_diffusion_model_is_refused(models, file, message):
    said = refusal(f"diffusion_model.file={models / file}")
    assert message in said
    assert said.endswith("name a complete Flux.1 file (.safetensors) of models/diffusion_models in diffusion_model.file.")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("garbage.safetensors", "not a complete safetensors file (5,000 bytes)"),
        ("cut.safetensors", "not a complete safetensors file"),
        ("empty.safetensors", "empty (0 bytes)"),
        ("garbage.ckpt", "is a file of torch.save; expected .safetensors"),
        ("flux.gguf", "a GGUF file, which ComfyUI itself does not load"),
        ("folder", "is a folder"),
        ("binary.txt", "has the ending '.txt'"),
        ("lacking.safetensors", "unet missing: ['double_blocks.0.txt_mlp.0.weight'"),
        ("headless.safetensors", "headless.safetensors is not a diffusion model"),
        ("longcat.safetensors", "longcat.safetensors is a LongCatImage, not a Flux"),
        ("pooled.safetensors", "takes pooled text of width 512, expected CLIP-L's 768"),
        ("fill.safetensors", "takes 96 channels, expected the 16 of a latent"),
    ],
)
def test_a_diffusion_model_that_is_incomplete_or_needs_more_than_a_latent_is_refused(broken, file, message):
    assert message in refusal(f"diffusion_model.file={broken / file}")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("text_encoders/clip_l.safetensors", "clip_l.safetensors is a CLIP text encoder"),
        ("diffusion_models/flux1-dev.safetensors", "flux1-dev.safetensors is a diffusion model"),
        ("vae/ae.safetensors", "ae.safetensors is a VAE"),
    ],
)
def test_a_teacher_that_is_not_a_t5_is_refused_by_its_kind(models, file, message):
    said = refusal(f"teacher.t5={models / file}")
    assert message in said
    assert "The teacher must be a complete T5-XXL or distilled T5" in said
    assert said.endswith("in teacher.t5.")


def test_an_incomplete_teacher_is_refused(models, broken):
    for file in ("garbage", "cut", "empty"):
        assert f"{file}.safetensors is " in refusal(f"teacher.t5={broken / file}.safetensors")
    # The stand-in has only the embedding and the norms of a T5-XXL.
    t5xxl, clip_l = (f"{models}/text_encoders/{name}.safetensors" for name in ("t5xxl_fp16", "clip_l"))
    said = refusal(f"teacher.t5={t5xxl}", f"teacher.clip_l={clip_l}")
    assert "t5xxl_fp16.safetensors is not a complete T5-XXL: 167 of 219 tensors are missing" in said


@pytest.mark.parametrize("dtype", ["F16", "F8_E4M3"])
def test_a_complete_t5xxl_is_accepted_even_with_extra_tensors(tmp_path, dtype):
    shapes = {name.removeprefix("encoder."): shape for name, shape in StudentLayout.named("xxl", None).tensors().items()}
    extras = {"scaled_fp8": (2,), "encoder.block.0.layer.0.SelfAttention.q.scale_weight": (1,), "spiece_model": (790_000,)}
    check_large(sparse_file(tmp_path / "whole.safetensors", shapes | extras, dtype))
    packed = shapes | {"encoder.block.7.layer.1.DenseReluDense.wo.weight": (20_971_520, 1)}
    with pytest.raises(
        ValueError, match=r"1 of 219 tensors .*\n  encoder\.encoder\.block\.7\.layer\.1\.DenseReluDense\.wo\.weight\nWhat to do"
    ):
        check_large(sparse_file(tmp_path / "packed.safetensors", packed, dtype))


def test_a_file_that_is_not_clip_l_is_refused_for_either_kind_of_teacher(models):
    t5xxl = models / "text_encoders" / "t5xxl_fp16.safetensors"
    for teacher in ("stand-in", str(t5xxl)):
        said = refusal(f"teacher.t5={teacher}", f"teacher.clip_l={t5xxl}")
        assert "t5xxl_fp16.safetensors is not a CLIP-L text encoder" in said
        assert said.endswith('in teacher.clip_l, or "none" for zeros.')
    assert "is loaded with CLIP-L" in refusal(f"teacher.t5={t5xxl}")


def test_a_teacher_of_another_width_than_the_diffusion_models_is_refused(broken):
    assert "gives text of width 512, but stand-in takes 4096" in refusal(f"teacher.t5={broken / 'narrow.safetensors'}")


def test_swapped_teacher_and_student_files_are_refused_in_both_places(models, broken):
    text_encoders = models / "text_encoders"
    exchanged = (
        f"teacher.t5={text_encoders / 'distilled_t5_base.safetensors'}",
        f"student.start={text_encoders / 't5xxl_fp16.safetensors'}",
    )
    said = refusal(*exchanged)
    assert "t5xxl_fp16.safetensors is a T5 of width 4096; the recipe's student (T5 of width 64, 2 layers) has width 64" in said
    assert "Were teacher.t5 and student.start swapped?" in said
    said = refusal(f"teacher.t5={broken / 'thin.safetensors'}")
    assert "0.3 million weights, the student (T5 of width 64, 2 layers) 2.7 million" in said
    assert "exchange teacher.t5 and student" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["stage.0.corpora.0.path={broken}/empty.txt"], "empty.txt contains no prompts"),
        (["stage.1.corpora.0.path={broken}/binary.txt"], "binary.txt, line 1: not valid UTF-8 text"),
        (["stage.0.corpora.0.path={broken}/folder"], "is a folder"),
        (["stage.0.corpora.0.path={broken}/none.txt"], 'none.txt" was not found'),
        (["validation.prompts=9000"], "9000 prompts cannot be held out"),
        (["student.start={broken}/binary.txt"], "binary.txt has the ending '.txt'"),
        (["student.start={broken}/folder"], "holds no weights"),
    ],
)
def test_invalid_prompts_and_initial_weights_are_refused(broken, settings, message):
    assert message in refusal(*(setting.format(broken=broken) for setting in settings))


def test_an_output_name_with_a_folder_and_a_resolution_that_does_not_divide_are_refused_with_the_recipe():
    with pytest.raises(ValueError, match="without folder and extension, got") as caught:
        load_recipe("smoke", ["output.name=elsewhere/student", "stage.1.resolution_px=100"])
    assert "stage.1.resolution_px: expected a multiple of 16, got 100" in str(caught.value)
    assert explained(caught.value) == str(caught.value)


def test_the_folder_of_finished_encoders_is_made_and_tried_before_training(tmp_path, monkeypatch):
    table, endings = folder_paths.folder_names_and_paths, folder_paths.folder_names_and_paths["text_encoders"][1]
    monkeypatch.setitem(table, "text_encoders", ([str(tmp_path / "models" / "text_encoders")], endings))
    check_output_folder()
    assert list((tmp_path / "models" / "text_encoders").iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(table, "text_encoders", ([str(tmp_path / "file" / "text_encoders")], endings))
    with pytest.raises(OSError, match=r"cannot be written to .+: .+\nWhat to do"):
        check_output_folder()


def test_memory_that_runs_out_in_a_run_is_explained_with_what_makes_it_smaller(tmp_path):
    options = command_line().parse_args(["smoke", "--run", str(tmp_path), "--set", "diffusion_model.checkpoint_blocks=false"])
    advice = memory_advice(options)
    assert advice.startswith("run the same command again (on a GPU with -- --reserve-vram 2") and "student.start" not in advice
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True)
    advice = memory_advice(options)
    assert advice.startswith("continue with --resume (on a GPU with -- --reserve-vram 2") and "(student.start)" in advice
    assert re.search(r"^  \d+\.\d GB, (fits|does not fit): .*diffusion_model\.checkpoint_blocks: false -> true", advice, re.MULTILINE)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    errors = [
        caught.value,
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: Out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    ]
    for error in errors:
        said = explained(error, lambda: advice)
        assert said is not None and said.startswith("Out of memory: ")
        assert said.endswith(f"What to do: {advice}")
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_memory_that_runs_out_while_the_teachers_texts_are_encoded_is_explained_with_what_makes_these_smaller(tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(teacher_cache, "load_teacher_of", full)
    settings = [f"teacher.cache={tmp_path}"]
    options = command_line().parse_args(["smoke", "--set", *settings])
    try:
        open_workshop(load_recipe("smoke", settings), Ranks())
    except MemoryError as error:
        said = explained(error, lambda: memory_advice(options))
    assert said is not None and "name a smaller file of the teacher in teacher.t5" in said and "--resume" not in said


def test_a_bug_is_not_explained():
    lacking = ModuleNotFoundError("No module named 'comfy.new'", name="comfy.new")
    for error in (RuntimeError("shapes do not match"), ValueError("expected 3, got 4"), KeyError("weight"), AssertionError(), lacking):
        assert explained(error) is None
    said = explained(PermissionError(13, "Permission denied", "checkpoints"))
    assert said is not None and "'checkpoints'\nWhat to do: " in said


def a_comfyui_that_starts_with(code: str, folder: Path, version: str = "0.30.0") -> None:
    """A folder that looks like ComfyUI's and runs `code` when it is started."""
    (folder / "comfy").mkdir()
    (folder / "main.py").write_text("")
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    (folder / "comfy" / "options.py").write_text(f"def enable_args_parsing():\n    {code}\n")


def test_a_bug_keeps_its_traceback_and_says_where_to_report_it(tmp_path):
    a_comfyui_that_starts_with("raise RuntimeError('no such option')", tmp_path)
    said = finish(command(tmp_path, tmp_path, tmp_path / "run"), tmp_path, code=1)
    assert "What to do: report it at https://" in said
    assert "in enable_args_parsing" in said
    assert said.rstrip().endswith("RuntimeError: no such option")


@posix
def test_an_interrupt_while_everything_starts_is_not_an_error(tmp_path):
    a_comfyui_that_starts_with("print('starting', flush=True); import time; time.sleep(100)", tmp_path)
    process = start(command(tmp_path, tmp_path, tmp_path / "run"), tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == f"ComfyUI 0.30.0: {tmp_path}\n"
    assert process.stdout.readline() == "starting\n"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert (process.returncode, said.strip()) == (130, "Stopped before anything began.")


def test_a_python_without_comfyuis_packages_is_named(tmp_path):
    said = finish(command(tmp_path, tmp_path, tmp_path / "run"), tmp_path, code=1, launcher=["-I", "-S"])
    assert f"This Python ({sys.executable}) has no package pydantic" in said
    assert "run the command with the Python that runs ComfyUI" in said
    assert "Traceback" not in said


def test_an_output_folder_that_cannot_be_written_is_reported_before_training(comfyui_path, tmp_path):
    (tmp_path / "base" / "models").mkdir(parents=True)
    (tmp_path / "base" / "models" / "text_encoders").write_text("a file in the folder's place")
    said = finish(command(comfyui_path, tmp_path / "base", tmp_path / "run"), tmp_path, code=1)
    assert "The finished encoder cannot be written to" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
