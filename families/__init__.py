"""The families of diffusion models that a student can serve: one file each, and one entry here."""

from __future__ import annotations

from .chroma import CHROMA
from .family import Family
from .flux import FLUX
from .flux2_klein import KLEIN_4B, KLEIN_9B
from .pixart import PIXART_ALPHA, PIXART_SIGMA
from .sd3 import SD3
from .z_image import Z_IMAGE

FAMILIES: dict[str, Family] = {
    family.name: family for family in (FLUX, SD3, PIXART_ALPHA, PIXART_SIGMA, CHROMA, Z_IMAGE, KLEIN_4B, KLEIN_9B)
}
# Those whose text depends on the first layers of their large encoder alone.
TRIMMABLE = {name: family for name, family in FAMILIES.items() if family.layers_read}
# The family of encoder files without metadata (the authors'), and of nodes whose type is not set.
DEFAULT = FLUX
