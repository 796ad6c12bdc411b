"""A T5-XXL teacher in the formats in use (bf16, plain fp8, scaled fp8): it encodes what its numbers give, and a student learns from it.

The layout is small, since the trainer refuses an incomplete T5-XXL; ComfyUI reads these files as it reads those of full size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distilled_t5.encoder.teacher import Teacher
from distilled_t5.students.t5.trained import DistilledT5
from distilled_t5.tests.support.training_worlds import small_world
from distilled_t5.train.distill import train_step
from distilled_t5.train.objectives import OBJECTIVES
from distilled_t5.train.trajectory import Position, draw
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
LENGTH = 24
WORLD = small_world(128, 1, 1, side_px=64, text_tokens=LENGTH)
PROMPTS = WORLD.prompts(3)
Form = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def bf16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def plain_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(FP8) for name, tensor in tensors.items()}


def scaled_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The products' matrices with a scale each, as in the file that ComfyUI's makers share."""
    written = dict(tensors) | {"scaled_fp8": torch.zeros(0, dtype=FP8)}
    for name in filter(is_product, tensors):
        scale = tensors[name].float().abs().max().clamp(min=1e-12) / LARGEST
        written |= {name: (tensors[name].float() / scale).to(FP8), name.replace(".weight", ".scale_weight"): scale}
    return written


def is_product(name: str) -> bool:
    return ".block." in name and "norm" not in name and "bias" not in name


def numbers_of(written: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file's tensors stand for, float32."""
    scales = {name: tensor for name, tensor in written.items() if name.endswith(".scale_weight")}
    weights = {name: tensor.float() for name, tensor in written.items() if name not in scales and name != "scaled_fp8"}
    return weights | {name: weights[name] * scale for key, scale in scales.items() if (name := key.replace(".scale_weight", ".weight"))}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with the frozen models of a small world, and its teacher's weights."""
    folder = tmp_path_factory.mktemp("world")
    WORLD.write(folder, torch.bfloat16)
    return folder, load_file(folder / "t5xxl.safetensors")


@pytest.fixture(scope="module", params=[bf16, plain_fp8, scaled_fp8], ids=lambda form: form.__name__)
def teacher(request: pytest.FixtureRequest, weights: tuple[Path, dict[str, Tensor]]) -> tuple[Teacher, dict[str, Tensor]]:
    """The teacher as ComfyUI loads it in one format, and its numbers in float32."""
    folder, tensors = weights
    written = request.param(tensors)
    save_file(written, folder / "t5xxl.safetensors")
    loaded = WORLD.load_teacher(folder)
    modules = list(loaded.text_model.modules())
    dtypes = {weight.dtype for weight in loaded.text_model.parameters()}
    assert any(getattr(module, "layout_type", None) for module in modules) == (request.param is scaled_fp8)
    assert (FP8 in dtypes) == (request.param is plain_fp8)
    return loaded, numbers_of(written)


def test_it_encodes_what_transformers_encodes_with_the_same_numbers(teacher):
    loaded, numbers = teacher
    text = loaded.encode(PROMPTS, LENGTH)
    reference = DistilledT5(WORLD.teacher)
    names = {name.removeprefix("encoder."): name for name in WORLD.teacher.tensors()}
    reference.load_tensors({names[name]: tensor for name, tensor in numbers.items() if name in names and tensor.ndim})
    with torch.no_grad():
        expected = reference.train(False)(text.token_ids_BL)
    torch.testing.assert_close(text.text_BLD, expected, atol=1e-4, rtol=1e-4)
    assert (text.text_BLD[0] - text.text_BLD[1]).abs().max() > 0.1


def test_a_student_learns_from_it(teacher, weights):
    loaded, _ = teacher
    text = loaded.encode(PROMPTS, LENGTH)
    flow = WORLD.load_flow(weights[0])
    flow.load()
    learner = WORLD.learner(flow.device)
    drawn = draw(0, 0, len(PROMPTS), flow.family.latent_shape(WORLD.side_px), (2.0, 3.5), (LENGTH,))
    sigmas_T, extras = flow.training_sigmas(4, *drawn.noise.shape[-2:]), {"pooled_output": text.pooled_BP}
    position = Position(0, drawn.noise, sigmas_T, text.text_BLD, extras, drawn.guidance_B, text.token_ids_BL)
    with flow.differentiable(checkpoint_blocks=True):
        losses = [train_step([position], flow, [learner], OBJECTIVES["velocity"])[0][0].loss for _ in range(4)]
    assert losses[0] > losses[-1] > 0
