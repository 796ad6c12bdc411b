"""What an optimizer step takes beside the weights that are there already, so that the host keeps that much of the device free.

Left to itself it would leave room for inference only: a little under 1 GB beside as much of the teacher as fits. Reasoned from shapes, as
in the shipped recipes, and not measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recipe import Recipe

PATCH_PX = 16
BF16_BYTES, FLOAT32_BYTES = 2, 4
# Kept by autograd inside one block, per token and channel.
VALUES_IN_BLOCK = 50
# The student's own activations, one weight of the diffusion model in bf16, CUDA itself.
OTHER_BYTES = 1_500_000_000


def step_memory_bytes(recipe: Recipe, blocks: int, width: int, weights: int, has_moments: bool) -> int:
    """Bytes for the largest stage on a diffusion model of `blocks` blocks of `width` channels, and a student of `weights` weights.

    has_moments: whether AdamW's are allocated already, as they are after the first step.
    """
    longest = max(recipe.sampling.token_lengths)
    tokens = max(stage.batch * ((stage.resolution_px // PATCH_PX) ** 2 + longest) for stage in recipe.stages)
    block_input = tokens * width * BF16_BYTES
    block = block_input * VALUES_IN_BLOCK
    kept = blocks * block_input + block if recipe.diffusion_model.checkpoint_blocks else blocks * block
    return kept + weights * FLOAT32_BYTES * (1 if has_moments else 3) + OTHER_BYTES
