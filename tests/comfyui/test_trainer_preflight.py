"""Everything that a run lacks is listed at once, before torch is imported; what cannot fit is refused before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
from distilled_t5.families import FAMILIES
from distilled_t5.families.flux_tensors import FluxLayout
from distilled_t5.runtime.errors import UserError
from distilled_t5.runtime.header import read_entries
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.small_flux import diffusion_model_file
from distilled_t5.tests.support.tiny_students import sparse_file
from distilled_t5.tests.support.trainer import PACK
from distilled_t5.train.file_sizes import size_in_file
from distilled_t5.train.models import load_frozen_model, size_of
from distilled_t5.train.preflight import preflight
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.workshop import open_workshop

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


def test_files_of_the_right_kind_are_accepted(stand_ins):
    preflight(load_recipe("smoke", settings_for(stand_ins, **RIGHT)))


def test_every_file_of_a_wrong_kind_is_listed(stand_ins):
    wrong = dict(zip(RIGHT, [RIGHT["t5"], RIGHT["flux"], RIGHT["vae"], RIGHT["clip"], RIGHT["start"]], strict=True))
    with pytest.raises(UserError) as refused:
        preflight(load_recipe("smoke", settings_for(stand_ins, **wrong)))
    said = str(refused.value)
    assert "diffusion_model.file: t5xxl_fp16.safetensors is a T5 text encoder; expected a diffusion model." in said
    assert "teacher.t5: flux1-dev.safetensors is a Flux diffusion model; expected a T5 text encoder." in said
    assert "teacher.clip_l: ae.safetensors is a VAE; expected a CLIP text encoder." in said
    assert "student.start: clip_l.safetensors is a CLIP text encoder; expected a T5 text encoder." in said
    assert "preview.vae: distilled_t5_base.safetensors is a T5 text encoder; expected a VAE." in said


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
def test_sizes_in_a_header_are_those_of_the_loaded_model_and_bytes_no_more(tmp_path, layout):
    path = sparse_file(tmp_path / "flux.safetensors", layout.tensors())
    recipe = load_recipe("smoke", [f"diffusion_model.file={path}"])
    told, loaded = size_in_file(read_entries(path), "auto", FAMILIES["flux"]), size_of(load_frozen_model(recipe))
    assert (told.weights, told.largest_block, told.blocks, told.width) == (
        loaded.weights,
        loaded.largest_block,
        loaded.blocks,
        loaded.width,
    )
    assert 0 < told.held_bytes <= loaded.held_bytes and told.compute_bytes <= loaded.compute_bytes


def test_full_size_models_that_cannot_fit_are_refused_before_anything_is_loaded(stand_ins, tmp_path, monkeypatch, caplog):
    def load(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("a diffusion model was loaded")

    monkeypatch.setattr(comfy.sd, "load_diffusion_model", load)
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_device: 24 * 2**30)
    large = {name.removeprefix("encoder."): shape for name, shape in StudentLayout.named("xxl", None).tensors().items()}
    settings = [
        f"diffusion_model.file={sparse_file(tmp_path / 'flux1-dev.safetensors', FluxLayout().tensors())}",
        f"teacher.t5={sparse_file(tmp_path / 't5xxl_fp16.safetensors', large, 'F16')}",
        f"teacher.clip_l={stand_ins / 'models' / RIGHT['clip']}",
        "sampling.guidance=[3.5]",
    ]
    with pytest.raises(ValueError, match=r"Not enough memory on cpu: .* needs \d\d\.\d GB; cpu has 25\.8 GB"):
        open_workshop(load_recipe("smoke", settings), Ranks())
    assert "No GPU is used" in caplog.text


def test_a_small_model_on_the_cpu_gets_one_sentence(tmp_path, caplog):
    open_workshop(load_recipe("smoke", [f"diffusion_model.file={diffusion_model_file(tmp_path)}"]), Ranks())
    assert "days" not in caplog.text


def test_a_start_of_another_size_is_refused_before_the_diffusion_model_is_loaded(stand_ins, monkeypatch):
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", None)
    with pytest.raises(ValueError, match="whose layout is not that of the recipe's student"):
        open_workshop(load_recipe("smoke", [f"student.start={stand_ins / 'models' / RIGHT['start']}"]), Ranks())
