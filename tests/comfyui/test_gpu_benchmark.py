"""The GPU's benchmark: what it measures, at small sizes in this process, and how it plans with time, disk and memory."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_detection
import folder_paths
import pytest
import torch
from distilled_t5.benchmarks import gpu
from distilled_t5.benchmarks.support import gpu_parts, measuring
from distilled_t5.benchmarks.support.random_files import draw_any, fill, lay_out, published_shapes
from distilled_t5.config.files import SHIPPED
from distilled_t5.families import FAMILIES
from distilled_t5.train.recipe import load_recipe
from safetensors.torch import load_file

DEVICE = {"write_gb_per_s": 1.0, "product_flops_per_s": 5e14}
PLENTY = gpu.Room(time_s=600, disk_gb=64, ram_gb=128, there=set())
STUDENT = gpu_parts.STUDENT_FILE
# Bytes of the published models whose teacher is a Qwen3, GB; the benchmark does not measure them.
OF_QWEN3_GB = (
    dict.fromkeys(("z_image_turbo_bf16.safetensors", "z_image_bf16.safetensors"), 12.3)
    | dict.fromkeys(("flux-2-klein-4b.safetensors", "flux-2-klein-base-4b.safetensors"), 7.8)
    | dict.fromkeys(("flux-2-klein-9b.safetensors", "flux-2-klein-base-9b.safetensors"), 18.2)
)


@pytest.fixture(autouse=True)
def written() -> Iterator[Callable[[], set[Path]]]:
    """The model files that a test has written so far; they are removed after it."""
    before = set(Path(folder_paths.models_dir).rglob("*.safetensors"))

    def new() -> set[Path]:
        return set(Path(folder_paths.models_dir).rglob("*.safetensors")) - before

    yield new
    for path in new():
        path.unlink()


def rows(measure: str, **arguments: Any) -> list[dict[str, Any]]:
    found = [*gpu_parts.PARTS[measure](gpu_parts.SMALL, **arguments)]
    json.dumps(found)
    return found


def test_an_encoder_is_loaded_and_encodes_the_same_and_other_prompts():
    [row] = rows("encoders", encoders=[STUDENT])
    assert min(row[key] for key in ("load_s", "first_encode_s", "next_encode_s", "new_prompt_s")) > 0
    assert (row["encoder"], row["tokens"], row["device_peak_gb"]) == (STUDENT, 256, None)


def test_the_pipeline_makes_the_same_image_with_offload_and_without():
    resident, offload = rows("pipeline", encoders=[STUDENT], modes=["resident", "offload"])
    assert (resident["mode"], offload["mode"]) == ("resident", "offload")
    assert resident["latent_sha256"] == offload["latent_sha256"]
    assert resident["on_device_gb"] == resident["model_gb"] > 0


def test_a_recipe_takes_steps_of_each_stage_that_costs_something_else():
    first, second = rows("recipe", name="flux-dev-paper", settings=["stage.1.resolution_px=128"])
    assert (first["stage"], first["resolution_px"], second["resolution_px"]) == ("compositions", 64, 128)
    assert len(first["losses"]) == 1 + first["steps"] == 3 and first["skipped"] == 0
    assert second["step_tflop"] > first["step_tflop"] > 0


@pytest.mark.parametrize("file", [file for family in FAMILIES.values() for file in family.published])
def test_comfyui_knows_a_published_model_by_the_random_files_tensors(file):
    family = next(family for family in FAMILIES.values() if file in family.published)
    shapes = published_shapes(family, file)
    held = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}
    found = comfy.model_detection.model_config_from_unet(held, "").unet_config
    sizes = {**family.small[1], **family.published[file]}
    assert {name: found.get(name) for name in sizes} == sizes
    assert sum(tensor.nbytes for tensor in held.values()) / 1e9 == pytest.approx((gpu.SIZES_GB | OF_QWEN3_GB)[file], rel=0.03)


@pytest.mark.full
def test_a_recipe_that_does_not_fit_is_left_out_before_its_weights_are_written(monkeypatch, written):
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_: 12 * 1024**3)
    why, seconds = gpu.measured([("paper", "recipe", {"name": "flux-dev-paper"})], full=True)
    assert why["part"] == "paper" and why["left_out"].startswith("Not enough memory on cpu")
    assert seconds["seconds"] > 0 and not written()


def test_a_part_that_fails_does_not_stop_the_next_one_a_resume_to_the_bit():
    failing = ("large", "recipe", {"name": "flux-dev-paper", "settings": ["sampling.guidance=[]"]})
    why, _, row, _ = gpu.measured([failing, ("resume", "resume", {"formats": ["bf16"]})], full=False)
    assert why["failed"].startswith("stand-in needs guidance")
    assert row == {"part": "resume", "row": {"format": "bf16", "same_bits": True, "repeatable": True}}


def test_a_random_file_repeats_drawn_rows_at_the_right_scale(tmp_path):
    shapes = {"a.weight": (3000, 400), "a.bias": (5,), "b": (1, 7, 3)}
    path = fill(lay_out(tmp_path / "random.safetensors", shapes, torch.float8_e4m3fn), draw_any())
    found = {name: tensor.float() for name, tensor in load_file(path).items()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert found["a.weight"].std() == pytest.approx(400**-0.5, rel=0.02)
    drawn = (1 << 18) // 400
    assert torch.equal(found["a.weight"][:drawn], found["a.weight"][drawn : 2 * drawn])


def test_every_shipped_recipe_of_full_size_is_measured():
    full = {path.stem for path in SHIPPED.glob("*.toml")}
    # The benchmark writes T5s as teachers, and no Qwen3.
    of_t5 = {name for name in full if load_recipe(name).family.kind.name == "t5"}
    assert set(gpu.RECIPES) == {name for name in of_t5 if not name.startswith(("miniature-", "smoke"))}
    # For the same reason, families of Qwen3 are left out.
    assert {load_recipe(name).family.name for name in gpu.EVERY_FAMILY} == {
        name for name, family in FAMILIES.items() if family.kind.name == "t5"
    }
    names = [part.name for part in gpu.parts()]
    assert len(set(names)) == len(names)
    assert {name for part in gpu.parts() for name in part.files} <= set(gpu.SIZES_GB)


@pytest.mark.parametrize(
    ("room", "reason"),
    [
        (PLENTY, None),
        (dataclasses.replace(PLENTY, time_s=60), r"time: about \d+ s needed, 60 s left"),
        (dataclasses.replace(PLENTY, disk_gb=20), "disk: 33.6 GB of files to write, 20.0 GB free"),
        (dataclasses.replace(PLENTY, disk_gb=20, there={gpu.FLUX}), None),
        (dataclasses.replace(PLENTY, ram_gb=24), "RAM: 33.6 GB of weights to load, 24.0 GB available"),
    ],
)
def test_a_part_is_left_out_with_its_reason(room, reason):
    [pipeline] = [part for part in gpu.parts() if part.name == "pipeline"]
    why = room.too_small_for(pipeline, DEVICE)
    assert why is None if reason is None else why is not None and re.fullmatch(reason, why)


def test_a_killed_process_leaves_the_results_that_it_had(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(f"import time\nprint('{measuring.RESULT}1', flush=True)\ntime.sleep(60)\n")
    results = measuring.in_fresh_process(str(script), {}, limit_s=2)
    assert next(results) == 1
    with pytest.raises(RuntimeError, match="ended after 2 s"):
        next(results)


def test_what_streams_and_fp16_change_is_said():
    def streams(two: str) -> dict[str, list[dict[str, Any]]]:
        return {f"pipeline, {stream}": [{"latent_sha256": sha}] for stream, sha in zip(gpu.STREAMS, (two, "a"), strict=True)}

    losses = {"flux-dev-paper": [{"losses": [2.0, 1.0]}], "flux-dev-paper, fp16": [{"losses": [2.0, 1.1]}]}
    assert gpu.compared(streams("a") | losses) == {"two_streams_change_nothing": True, "fp16_losses_differ_by": pytest.approx(0.1)}
    assert gpu.compared(streams("b"))["two_streams_change_nothing"] is False
    assert gpu.compared({}) == {"two_streams_change_nothing": None, "fp16_losses_differ_by": None}


@pytest.mark.parametrize(
    ("device", "share"), [("AMD EPYC", None), ("NVIDIA H100 PCIe", None), ("NVIDIA H200", 0.1), ("NVIDIA GeForce RTX 4090", 98.9 / 165.2)]
)
def test_the_share_of_the_published_peak_is_that_of_the_very_gpu_or_none(device, share, tmp_path):
    run = object.__new__(gpu.Run)
    run.device = {"device_name": device, "product_flops_per_s": 1e15}
    run.found = {"parts": {}}
    run.path = tmp_path / "gpu.json"
    usual = dict.fromkeys(gpu.COLUMNS["recipe"][:3], 1.0) | {"device_peak_gb": 1.0, "rehearsed_peak_gb": 1.0}
    run._keep({"part": "a", "row": {"stage": "first", "tflop_per_s": 98.9, **usual}})
    [row] = run.found["parts"]["a"]
    assert row["share_of_peak"] == pytest.approx(share) and row["share_of_product"] == pytest.approx(0.0989)
    assert "share_of_peak" in gpu.rows_table("recipe", "a", [row])
