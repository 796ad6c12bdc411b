"""torch's counter of floating-point operations, which also counts the fused attention of CPUs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
}


def flop_counter() -> FlopCounterMode:
    """The counter, as a context."""
    return FlopCounterMode(display=False, custom_mapping=ATTENTION)
