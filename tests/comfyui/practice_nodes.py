"""On the practice accelerator: the nodes that encode, measure, record and train, each against the CPU.

`test_practice_accelerator.py` runs these in a process of their own; loader and save are in `practice_encoder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import safetensors.torch
import torch
from distilled_t5.encoder.files import open_student
from distilled_t5.families.flux_tensors import FluxLayout
from distilled_t5.nodes import DistilledT5Loader, DistilledT5TextEncode
from distilled_t5.nodes.attention_map import DistilledT5AttentionMapImage, DistilledT5CrossAttentionMap
from distilled_t5.nodes.common_text import DistilledT5CommonTextPrompt
from distilled_t5.nodes.distil import DistilledT5Distil
from distilled_t5.nodes.encoder_map import DistilledT5EncoderMap
from distilled_t5.nodes.encoder_report import DistilledT5EncoderReport
from distilled_t5.nodes.ocr_accuracy import DistilledT5OCRAccuracy
from distilled_t5.nodes.show import image_of
from distilled_t5.runtime.model_folders import add_model_folders
from distilled_t5.runtime.random_weights import drawn
from distilled_t5.tests.support import practice_accelerator as practice
from distilled_t5.tests.support.small_encoders import serve, student_file
from distilled_t5.tests.support.trainer import metrics
from PIL import Image, ImageDraw, ImageFont

import nodes

CPU = torch.device("cpu")
FLUX, TEACHER = "miniature_flux.safetensors", "miniature_teacher.safetensors"
PROMPTS = "\n".join(f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("heart", "ring", "tree"))
STEPS = 2


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student_file(tmp_path_factory.mktemp("students"), token_length=24)


@pytest.fixture
def on_both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """What some work gives on the accelerator, and what it gives with ComfyUI on the CPU."""

    def run(work: Callable[[], Any]) -> tuple[Any, Any]:
        comfy.model_management.unload_all_models()
        practice.reset_peak()
        before, ours = practice.memory.peak, work()
        assert practice.memory.peak > before, "the accelerator was used"
        comfy.model_management.unload_all_models()
        with monkeypatch.context() as patched:
            patched.setattr(comfy.model_management, "get_torch_device", lambda: CPU)
            return ours, work()

    return run


def test_a_prompt_is_encoded_as_on_the_cpu_and_its_tokens_are_counted(student, on_both):
    (ours, count), (theirs, count_on_cpu) = on_both(lambda: DistilledT5TextEncode.execute(serve(student).clip, "a (red:1.3) fox", 3.5).args)
    assert torch.equal(ours[0][0], theirs[0][0])
    assert count == count_on_cpu


def test_a_map_of_two_encoders_is_that_of_the_cpu(student, on_both):
    other = student_file(student.parent, name="other.safetensors", seed=1, token_length=24)

    def shown() -> tuple[Any, ...]:
        return DistilledT5EncoderMap.execute(serve(student).clip, PROMPTS, 0, clip_2=serve(other).clip).args

    (ours, info), (theirs, info_on_cpu) = on_both(shown)
    assert info == info_on_cpu
    assert torch.equal(ours, theirs)


def test_a_report_names_the_devices_and_measures_on_them(student):
    on_accelerator, on_cpu = serve(student).clip, serve(student, device=CPU).clip
    _, table = DistilledT5EncoderReport.execute(on_accelerator, "a red fox", 1, clip_3=on_cpu).args
    first, second = (line.split(" | ") for line in table.splitlines()[2:4])
    assert (first[4], second[4]) == ("npu:0", "cpu")
    assert first[1:4] == second[1:4], "parameters, bytes and tokens"
    assert "practice accelerator" in table


def test_the_attention_map_is_that_of_the_cpu_and_leaves_the_image_as_it_is(student, tmp_path, on_both):
    path = tmp_path / "flux.safetensors"
    safetensors.torch.save_file(drawn(FluxLayout(width=256, double=1, single=1).tensors(), seed=2), path)
    clip, empty = serve(student).clip, {"samples": torch.zeros(1, 16, 6, 8)}

    def sampled(model: Any, positive: Any) -> Any:
        return nodes.KSampler().sample(model, 0, 2, 1.0, "euler", "simple", positive, positive, empty)[0]

    def shown() -> tuple[Any, Any]:
        model = comfy.sd.load_diffusion_model(str(path), {"dtype": torch.float32})
        recording, positive, attention = DistilledT5CrossAttentionMap.execute(model, clip, "a red fox", "fox", 3.5).args
        latent = sampled(recording, positive)
        assert torch.equal(latent["samples"], sampled(model, positive)["samples"])
        return DistilledT5AttentionMapImage.execute(attention, latent, 0).args[1], latent["samples"]

    for found, expected in zip(*on_both(shown), strict=True):
        assert found.device == CPU
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def weights_set_in_place() -> Iterator[None]:
    """As on a GPU: EasyOCR's recurrent layers hold references to their weights, which cannot be swapped."""
    torch.__future__.set_swap_module_params_on_conversion(False)
    yield
    torch.__future__.set_swap_module_params_on_conversion(True)


@pytest.mark.usefixtures("weights_set_in_place")
def test_written_text_is_read_as_on_the_cpu(on_both):
    prompt, text = DistilledT5CommonTextPrompt.execute(7, "validation").args
    assert text in prompt
    picture = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(picture).text((20, 20), "Hello Word", font=ImageFont.load_default(48), fill=(20, 30, 40))
    (*scores, ours, report), (*scores_on_cpu, theirs, report_on_cpu) = on_both(
        lambda: DistilledT5OCRAccuracy.execute(image_of(picture), "hello world", "easyocr").args
    )
    assert (scores, report) == (scores_on_cpu, report_on_cpu)
    assert scores[0] > 0.8
    assert torch.equal(ours, theirs)


def test_a_student_that_is_distilled_in_the_graph_is_that_of_the_cpu(on_both):
    add_model_folders()
    names = iter(("on_accelerator", "on_cpu"))
    inputs = {"preset": "miniature-fortieth", "steps": STEPS, "prompts": PROMPTS, "seed": 7, "preview_vae": "none"}

    def distilled() -> tuple[Any, Any, str]:
        with torch.inference_mode():  # as ComfyUI executes graphs
            [model] = nodes.UNETLoader().load_unet(FLUX, "default")
            teacher, name = DistilledT5Loader.execute("none", TEACHER, "flux").args[0], next(names)
            DistilledT5Distil.execute(model, teacher, **inputs, name=name)
        run = Path(folder_paths.get_output_directory(), "distilled_t5", name)
        weights = open_student(folder_paths.get_full_path_or_raise("text_encoders", f"{name}.safetensors")).load()
        return weights, metrics(run), (run / "train.log").read_text(encoding="utf-8")

    (ours, rows, log), (theirs, rows_on_cpu, log_on_cpu) = on_both(distilled)
    assert " on npu:0" in log and " on cpu" in log_on_cpu
    for key in ("loss", "held_out_loss", "gradient_norm"):
        found, expected = ([row[key] for row in each if row.get(key) is not None] for each in (rows, rows_on_cpu))
        assert found == pytest.approx(expected, rel=1e-4) and found
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() <= 1e-3 * weight.norm(), name
