"""The memory that is reckoned before a run, held against what torch's own profiler counts on ComfyUI's Flux and transformers' T5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.flux.model
import comfy.ops
import pytest
import torch
from distilled_t5.diffusion.gradients import blocks_of, differentiable
from distilled_t5.families import FAMILIES
from distilled_t5.students import KINDS
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.students.t5.trained import DistilledT5
from distilled_t5.train.memory import ModelSize, model_activations
from torch.profiler import ProfilerActivity, profile

TEXT_TOKENS, TEXT_WIDTH = 64, 256


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that torch holds at once of what it gets while `work` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events: Any = profiled.profiler
    changes = sorted((event.start_ns(), event.nbytes()) for event in events.kineto_results.events() if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def flux(width: int, blocks: tuple[int, int], device: str = "cpu", text_width: int = TEXT_WIDTH) -> Any:
    """A Flux as ComfyUI builds it, with random weights where it has any."""
    model = comfy.ldm.flux.model.Flux(
        image_model="flux",
        in_channels=16,
        out_channels=16,
        vec_in_dim=768,
        context_in_dim=text_width,
        hidden_size=width,
        mlp_ratio=4.0,
        num_heads=width // 128,
        depth=blocks[0],
        depth_single_blocks=blocks[1],
        axes_dim=[16, 56, 56],
        theta=10_000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        dtype=torch.float32,
        device=device,
        operations=comfy.ops.disable_weight_init,
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return model.requires_grad_(False)


def weights(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def test_a_full_size_flux_has_the_weights_that_the_estimate_assumes():
    model = flux(3072, (19, 38), device="meta", text_width=4096)
    assert weights(model) == 11_901_408_320
    assert max(map(weights, blocks_of(model, FAMILIES["flux"].block_lists))) == 339_831_296
    assert len(blocks_of(model, FAMILIES["flux"].block_lists)) == 57


@pytest.mark.parametrize("checkpoint_blocks", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("blocks", [(1, 1), (1, 3)], ids=["2 blocks", "4 blocks"])
def test_the_diffusion_model_uses_no_more_memory_than_estimated_and_little_less(blocks, checkpoint_blocks):
    model = flux(512, blocks)
    text_BLD = torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, requires_grad=True)
    latent_BCHW = torch.randn(2, 16, 32, 32)

    def work() -> None:
        velocity = model(latent_BCHW, torch.full((2,), 0.5), text_BLD, torch.zeros(2, 768), torch.full((2,), 3.0))
        velocity.square().mean().backward()

    with differentiable(model, blocks_of(model, FAMILIES["flux"].block_lists), checkpoint_blocks, FAMILIES["flux"].last_layers):
        peak = peak_bytes(work)
    size = ModelSize(4 * weights(model), weights(model), 0, sum(blocks), 512, compute_bytes=4)
    reckoned = sum(model_activations(FAMILIES["flux"], size, tokens=2 * (256 + TEXT_TOKENS), checkpoint_blocks=checkpoint_blocks).values())
    assert 0.8 * reckoned < peak <= reckoned


@pytest.mark.parametrize(
    ("layout", "length"),
    [
        (StudentLayout(256, 512, 6, 4, d_kv=64, vocab_size=64, hidden_width=512, projected_width=512), 128),
        (StudentLayout(128, 512, 12, 8, d_kv=32, vocab_size=64, hidden_width=256, projected_width=256), 256),
        (StudentLayout(512, 1024, 2, 4, d_kv=64, vocab_size=64, gated=False, hidden_width=512, projected_width=512), 64),
    ],
    ids=["wide", "deep and long", "shallow"],
)
def test_the_student_uses_no_more_memory_than_estimated_and_little_less(layout, length):
    student = DistilledT5(layout)
    token_ids_BL = torch.randint(layout.vocab_size, (2, length))
    for weight in student.parameters():
        weight.grad = torch.zeros_like(weight)

    def work() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text_BLD = student(token_ids_BL)
        text_BLD.float().square().mean().backward()

    peak = peak_bytes(work)
    copies_of_weights = 2 * layout.parameters
    reckoned = KINDS["t5"].activation_bytes(layout, 2, length) + copies_of_weights
    assert 0.5 * reckoned < peak <= reckoned
