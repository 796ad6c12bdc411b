"""Everything that a run lacks is listed at once, before torch is imported; what cannot fit is refused before anything is loaded."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from distilled_t5.diffusion.frozen import held_bytes
from distilled_t5.encoder.teacher import load_teacher
from distilled_t5.families import FAMILIES
from distilled_t5.families.flux_tensors import FluxLayout
from distilled_t5.runtime.errors import UserError
from distilled_t5.runtime.header import Entry
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.small_flux import diffusion_model_file
from distilled_t5.tests.support.small_models import SmallModel
from distilled_t5.tests.support.tiny_students import sparse_file
from distilled_t5.tests.support.trainer import PACK
from distilled_t5.train import models
from distilled_t5.train.memory import Rehearsal
from distilled_t5.train.models import load_frozen_model
from distilled_t5.train.preflight import preflight
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.rehearsal import Target, rehearse
from distilled_t5.train.unloaded import config_in
from distilled_t5.train.workshop import open_workshop
from safetensors.torch import load_file, save_file

# Python in which importing torch fails.
WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"


def test_everything_that_is_missing_is_listed_before_torch_is_imported(comfyui_path, tmp_path):
    arguments = [str(PACK / "train"), "flux-dev-paper", "--comfyui", str(comfyui_path), "--", "--base-directory", str(tmp_path), "--cpu"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for missing in ("flux1-dev.safetensors", "t5xxl_fp16.safetensors", "clip_l.safetensors", "flan-t5-base", "ae.safetensors"):
        assert f": {missing} was not found" in done.stderr
    for corpus in ("corpora/t2i-compbench", "corpora/laion-aesthetics-6.5.parquet"):
        assert done.stderr.count(f'"{corpus}" was not found') == 1
    for address in ("black-forest-labs/FLUX.1-dev", "flux_text_encoders", "google/flan-t5-base", "T2I-CompBench", "improved_aesthetics"):
        assert f"/{address}" in done.stderr
    assert "Packages of ComfyUI are missing: torch." in done.stderr
    assert done.stderr.rstrip().endswith("What to do: do what each point says, then run again.")


def settings_for(stand_ins: Path, **files: str) -> list[str]:
    names = {"diffusion_model.file": files["flux"], "teacher.t5": files["t5"], "teacher.clip_l": files["clip"]}
    names |= {"student.start": files["start"], "preview.vae": files["vae"]}
    return [f"{key}={stand_ins / 'models' / name}" for key, name in names.items()]


RIGHT = {
    "flux": "diffusion_models/flux1-dev.safetensors",
    "t5": "text_encoders/t5xxl_fp16.safetensors",
    "clip": "text_encoders/clip_l.safetensors",
    "start": "text_encoders/distilled_t5_base.safetensors",
    "vae": "vae/ae.safetensors",
}


def t5xxl_file(path: Path, **changed: tuple[int, ...]) -> Path:
    """A T5-XXL of zeros in fp16 that takes no room on the disk, with some shapes changed; () leaves a tensor out."""
    shapes = {name.removeprefix("encoder."): shape for name, shape in StudentLayout.named("xxl", None).tensors().items()} | changed
    return sparse_file(path, {name: shape for name, shape in shapes.items() if shape}, "F16")


def test_complete_files_of_the_right_kind_are_accepted(stand_ins, tmp_path):
    settings = settings_for(stand_ins, **RIGHT)
    for teacher in (t5xxl_file(tmp_path / "t5xxl_fp16.safetensors"), stand_ins / "models" / RIGHT["start"]):
        preflight(load_recipe("smoke", [*settings, f"teacher.t5={teacher}"]))
        with pytest.raises(UserError) as refused:
            preflight(load_recipe("smoke", [*settings, f"teacher.t5={teacher}", "preview.vae=missing.safetensors"]))
        assert "missing or wrong: 1.\n1. preview.vae: missing.safetensors was not found" in str(refused.value), "the others are accepted"


def test_encoders_that_lack_tensors_are_listed_together_from_their_headers(stand_ins, tmp_path):
    clip_l = load_file(stand_ins / "models" / RIGHT["clip"])
    del clip_l["text_model.final_layer_norm.bias"]
    save_file(clip_l, tmp_path / "clip_l.safetensors")
    incomplete = t5xxl_file(tmp_path / "t5xxl_fp16.safetensors", **{"encoder.block.7.layer.1.DenseReluDense.wo.weight": ()})
    settings = [*settings_for(stand_ins, **RIGHT), f"teacher.t5={incomplete}", f"teacher.clip_l={tmp_path / 'clip_l.safetensors'}"]
    with pytest.raises(UserError) as refused:
        preflight(load_recipe("smoke", settings))
    said = str(refused.value)
    assert "missing or wrong: 2." in said
    assert "teacher.t5: t5xxl_fp16.safetensors is not a complete T5-XXL: 1 of 219 tensors are missing or misshapen." in said
    assert "teacher.clip_l: clip_l.safetensors: 1 tensors of CLIP-L are missing." in said


def test_a_t5xxl_teacher_without_clip_l_is_listed(stand_ins, tmp_path):
    teacher = t5xxl_file(tmp_path / "t5xxl_fp16.safetensors")
    with pytest.raises(UserError) as refused:
        preflight(load_recipe("smoke", [*settings_for(stand_ins, **RIGHT), f"teacher.t5={teacher}", "teacher.clip_l=none"]))
    said = str(refused.value)
    assert "missing or wrong: 1.\n1. teacher.t5: A T5-XXL teacher is loaded with CLIP-L.\n   What to do: name a CLIP-L file" in said
    assert "Download" not in said


def test_a_plain_t5_as_teacher_is_listed_as_the_run_itself_refuses_it(stand_ins, tmp_path):
    shapes = {name.removeprefix("encoder."): shape for name, shape in StudentLayout.named("base", None).tensors().items()}
    plain, clip_l = sparse_file(tmp_path / "t5_base.safetensors", shapes, "F16"), stand_ins / "models" / RIGHT["clip"]
    message = "t5_base.safetensors is a T5 of width 768 without a projection"
    with pytest.raises(UserError, match=f"missing or wrong: 1.\n1. teacher.t5: {message}"):
        preflight(load_recipe("smoke", [*settings_for(stand_ins, **RIGHT), f"teacher.t5={plain}"]))
    with pytest.raises(ValueError, match=message):
        load_teacher(plain, {"clip_l": clip_l})
    described = {"distilled_t5.format_version": "1", "distilled_t5.projection": "none", "distilled_t5.text_width": "768"}
    described |= {"distilled_t5.family": "flux", "distilled_t5.pooled": "zero", "distilled_t5.token_length": "256"}
    student = sparse_file(tmp_path / "student.safetensors", shapes, "F16", described)
    preflight(load_recipe("smoke", [*settings_for(stand_ins, **RIGHT), f"teacher.t5={student}"]))


def test_every_file_of_a_wrong_kind_is_listed(stand_ins):
    wrong = dict(zip(RIGHT, [RIGHT["t5"], RIGHT["flux"], RIGHT["vae"], RIGHT["clip"], RIGHT["start"]], strict=True))
    with pytest.raises(UserError) as refused:
        preflight(load_recipe("smoke", settings_for(stand_ins, **wrong)))
    said = str(refused.value)
    assert "diffusion_model.file: t5xxl_fp16.safetensors is a T5 text encoder; expected a diffusion model." in said
    assert "teacher.t5: flux1-dev.safetensors is a diffusion model; expected a T5 text encoder." in said
    assert "teacher.clip_l: ae.safetensors is a VAE; expected a CLIP text encoder." in said
    assert "student.start: clip_l.safetensors is a CLIP text encoder; expected a T5 text encoder." in said
    assert "preview.vae: distilled_t5_base.safetensors is a T5 text encoder; expected a VAE." in said


def test_of_several_students_the_one_whose_start_is_missing_is_named():
    with pytest.raises(UserError, match=r"1\. student\.1\.start: nowhere was not found"):
        preflight(load_recipe("smoke-two-students", ["student.1.start=nowhere"]))


@pytest.mark.parametrize("place", ["flux", "t5", "clip", "start"])
def test_a_lora_is_refused_in_every_place(stand_ins, place):
    lora = "loras/FLUX-dev-lora-add_details.safetensors"
    with pytest.raises(UserError, match="is a LoRA; expected"):
        preflight(load_recipe("smoke", settings_for(stand_ins, **{**RIGHT, place: lora})))


def test_a_pretrained_folder_without_weights_is_listed(stand_ins, tmp_path):
    (tmp_path / "flan-t5-base").mkdir()
    settings = [*settings_for(stand_ins, **RIGHT), f"student.start={tmp_path / 'flan-t5-base'}"]
    with pytest.raises(UserError, match=r"holds neither model.safetensors nor model.safetensors.index.json[\s\S]*google/flan-t5-base"):
        preflight(load_recipe("smoke", settings))


@pytest.mark.parametrize("layout", [FluxLayout(width=256, double=2, single=3), replace(FluxLayout(width=256), double=1, single=1)])
def test_a_rehearsal_reads_the_sizes_in_a_header_as_the_loader_does(tmp_path, layout):
    path = sparse_file(tmp_path / "flux.safetensors", layout.tensors())
    recipe = load_recipe("smoke", [f"diffusion_model.file={path}"])
    loaded = load_frozen_model(recipe)
    assert rehearse(recipe, Target(loaded.device)).model == pytest.approx(held_bytes(loaded.model), rel=1e-3)


def in_diffusers(tensors: dict[str, tuple[int, ...]], renamed: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors in a file of diffusers, by ComfyUI's table of its names; some are parts of one of ComfyUI's."""
    shapes, taken = {}, set()
    for theirs, place in renamed.items():
        ours, part = (place, None) if isinstance(place, str) else place[:2]
        # The table has other tools' names too, after those of diffusers.
        if ours in tensors and not (part is None and ours in taken):
            axis, _, length = part or (0, 0, tensors[ours][0])
            shapes[theirs] = (*tensors[ours][:axis], length, *tensors[ours][axis + 1 :])
            taken.add(ours)
    return shapes


@pytest.mark.parametrize(
    ("name", "table", "sizes"),
    [
        ("sd3", comfy.utils.mmdit_to_diffusers, {"depth": 2, "num_blocks": 2}),
        ("flux", comfy.utils.flux_to_diffusers, {"depth": 1, "depth_single_blocks": 1, "hidden_size": 128}),
    ],
)
def test_a_header_of_diffusers_gives_the_sizes_that_comfyuis_names_give(name, table, sizes):
    family = FAMILIES[name]
    model = SmallModel(*family.small, (), 0, 0.7).patcher().model.diffusion_model
    ours = {tensor: tuple(weight.shape) for tensor, weight in model.state_dict().items() if tensor not in family.unused}
    told, expected = (
        config_in({tensor: Entry("BF16", shape, 0, 2 * math.prod(shape)) for tensor, shape in shapes.items()}, name)[0]
        for shapes in (in_diffusers(ours, table(sizes)), ours)
    )
    assert type(told) is type(expected)
    assert told.unet_config == expected.unet_config


# The widths of Flux and a fifth of its blocks, which a rehearsal takes one by one.
FLUX = FluxLayout(double=4, single=8)


def large(folder: Path, clip_l: Path) -> list[str]:
    """Settings of models that are too large for the machines below: a Flux of 5 GB and a T5-XXL of 9.5 GB, both without weights."""
    return [
        f"diffusion_model.file={sparse_file(folder / 'flux1-dev.safetensors', FLUX.tensors())}",
        f"teacher.t5={t5xxl_file(folder / 't5xxl_fp16.safetensors')}",
        f"teacher.clip_l={clip_l}",
        "sampling.guidance=[3.5]",
    ]


@pytest.fixture
def full_size(stand_ins, tmp_path, monkeypatch) -> list[str]:
    """Settings of large models, and a diffusion model that may not be loaded."""

    def load(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("a diffusion model was loaded")

    monkeypatch.setattr(comfy.sd, "load_diffusion_model", load)
    return large(tmp_path, stand_ins / "models" / RIGHT["clip"])


def test_models_that_cannot_fit_are_refused_before_anything_is_loaded(full_size, monkeypatch, caplog):
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_device: 12 * 2**30)
    with pytest.raises(ValueError, match=r"Not enough memory on cpu: .* needs \d\d\.\d GB; cpu has 12\.9 GB"):
        open_workshop(load_recipe("smoke", [*full_size, "stage.1.steps=100000"]), Ranks())
    assert "No GPU is used" in caplog.text


@pytest.fixture(scope="module")
def on_gpu(stand_ins, tmp_path_factory) -> Rehearsal:
    """What the large models take on a GPU."""
    settings = large(tmp_path_factory.mktemp("large"), stand_ins / "models" / RIGHT["clip"])
    return rehearse(load_recipe("smoke", settings), Target(torch.device("cpu"), as_gpu=True))


def test_processes_on_the_cpu_of_a_machine_share_its_ram(full_size, on_gpu, monkeypatch):
    monkeypatch.setattr(models, "_rehearsed", lambda *_run: replace(on_gpu, on_gpu=False))
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_device: 12 * 2**30)
    monkeypatch.setattr(Ranks, "on_this_machine", lambda _ranks: 2)
    with pytest.raises(ValueError, match=r"Not enough memory on cpu \(each of 2 processes\): .* has 6\.4 GB"):
        open_workshop(load_recipe("smoke", full_size), Ranks())


@pytest.mark.parametrize(
    ("gpu_gb", "ram_gb", "message"),
    [
        (8, 12, r"Not enough RAM beside the GPU: the run needs \d\d\.\d GB; this machine has 12\.9 GB\.\n  teacher's encoders"),
        (80, 8, "Not enough RAM beside the GPU"),
        (8, 64, "a diffusion model was loaded"),
        (80, 12, "a diffusion model was loaded"),  # both models stay on the GPU
    ],
)
def test_ram_that_is_too_small_beside_a_gpu_is_refused_before_anything_is_loaded(full_size, on_gpu, monkeypatch, gpu_gb, ram_gb, message):
    monkeypatch.setattr(models, "_rehearsed", lambda *_run: on_gpu)
    totals = {"cuda": gpu_gb * 2**30, "cpu": ram_gb * 2**30}
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: totals[device.type])
    with pytest.raises((AssertionError, ValueError), match=message):
        open_workshop(load_recipe("smoke", full_size), Ranks())


def test_a_small_model_on_the_cpu_gets_one_sentence(tmp_path, caplog):
    open_workshop(load_recipe("smoke", [f"diffusion_model.file={diffusion_model_file(tmp_path)}"]), Ranks())
    assert "days" not in caplog.text


def test_a_start_of_another_size_is_refused_before_the_diffusion_model_is_loaded(stand_ins, monkeypatch):
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", None)
    with pytest.raises(ValueError, match="whose layout is not that of the recipe's student"):
        open_workshop(load_recipe("smoke", [f"student.start={stand_ins / 'models' / RIGHT['start']}"]), Ranks())
