"""The projection from a network's width to the diffusion model's text width: its modules, and its tensors in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch.nn import Module

    from .kind import Shape

PROJECTION = "final_projection."
PROJECTION_IN, PROJECTION_OUT = f"{PROJECTION}0", f"{PROJECTION}3"


class Projected(Protocol):
    """The part of a layout that describes the projection; both widths are None where there is none."""

    @property
    def hidden_width(self) -> int | None: ...
    @property
    def projected_width(self) -> int | None: ...
    @property
    def hidden_bias(self) -> bool: ...
    @property
    def output_bias(self) -> bool: ...


def projection(layout: Projected, width: int, linear: Callable[..., Module], dropout: Module) -> Module:
    """Linear, ReLU, `dropout` and Linear, as published under final_projection.0 and .3; an identity where the layout has none."""
    from torch.nn import Identity, ReLU, Sequential

    if layout.hidden_width is None or layout.projected_width is None:
        return Identity()
    return Sequential(
        linear(width, layout.hidden_width, bias=layout.hidden_bias),
        ReLU(),
        dropout,
        linear(layout.hidden_width, layout.projected_width, bias=layout.output_bias),
    )


def projection_tensors(layout: Projected, width: int) -> dict[str, Shape]:
    """The projection's tensors by published name, for a network of this width."""
    if layout.hidden_width is None or layout.projected_width is None:
        return {}
    shapes: dict[str, Shape] = {
        f"{PROJECTION_IN}.weight": (layout.hidden_width, width),
        f"{PROJECTION_OUT}.weight": (layout.projected_width, layout.hidden_width),
    }
    if layout.hidden_bias:
        shapes[f"{PROJECTION_IN}.bias"] = (layout.hidden_width,)
    if layout.output_bias:
        shapes[f"{PROJECTION_OUT}.bias"] = (layout.projected_width,)
    return shapes


def projection_matrices(shapes: Mapping[str, Shape]) -> list[str]:
    """The names of the projection's matrices; none where a file has no tensor of it."""
    names = [f"{PROJECTION_IN}.weight", f"{PROJECTION_OUT}.weight"]
    return names if any(name in shapes for name in names) else []


def read_projection(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of a layout that describe the projection of these tensors; empty without one."""
    if not projection_matrices(shapes):
        return {}
    return {
        "hidden_width": shapes[f"{PROJECTION_IN}.weight"][0],
        "projected_width": shapes[f"{PROJECTION_OUT}.weight"][0],
        "hidden_bias": f"{PROJECTION_IN}.bias" in shapes,
        "output_bias": f"{PROJECTION_OUT}.bias" in shapes,
    }
