"""The projection from a T5's width to the diffusion model's text width."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn import Identity, Module, ReLU, Sequential

from .layout import StudentLayout


def projection(layout: StudentLayout, linear: Callable[..., Module], dropout: Module) -> Module:
    """Linear, ReLU, `dropout` and Linear, as published under final_projection.0 and .3; an identity where the layout has none."""
    if layout.hidden_width is None or layout.projected_width is None:
        return Identity()
    return Sequential(
        linear(layout.d_model, layout.hidden_width, bias=layout.hidden_bias),
        ReLU(),
        dropout,
        linear(layout.hidden_width, layout.projected_width, bias=layout.output_bias),
    )
