"""The families of diffusion models a distilled T5 can serve: one entry each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What a family's diffusion models expect of their text: widths in channels, and how the family is called."""

    display_name: str
    modelspec: str
    text_width: int
    pooled_width: int


FAMILIES: dict[str, Family] = {
    "flux": Family(display_name="Flux.1", modelspec="flux-1", text_width=4096, pooled_width=768),
}
