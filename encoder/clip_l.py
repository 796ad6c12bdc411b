"""The CLIP-L file that gives the pooled vector: recognised, read and checked before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.utils
from torch import Tensor

from ..runtime.errors import StudentFileError, listed
from ..students.t5.layout import Shape
from .files import SAFETENSORS, check_finite, load_tensors, read_header

# Width and depth of the text half of OpenAI's CLIP ViT-L/14, which the host's own config fixes.
WIDTH, LAYERS, FEED_FORWARD = 768, 12, 3072
TOKENS = 49408


def _linear(name: str, rows: int, columns: int) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str) -> dict[str, Shape]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


@dataclass(frozen=True)
class Naming:
    """How a kind of CLIP-L file names what the host has to be given.

    layer: what stands before the number of a layer. parts: the tensors of each layer. others: those that are there once. positions: the
    table whose rows, 77 in CLIP-L, 248 in the long CLIP that the host takes too, are not fixed. widest: the part that tells the width.
    """

    layer: str
    parts: Mapping[str, Shape]
    others: Mapping[str, Shape]
    positions: str
    widest: str

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether the first layer is CLIP-L's and there are not more layers than it has."""
        first, beyond = (f"{self.layer}{number}.{self.widest}" for number in (0, LAYERS))
        return shapes.get(first) == (FEED_FORWARD, WIDTH) and beyond not in shapes

    def needed(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Every tensor that the host has to be given, the positions with as many rows as the file's; the projection if the file has one."""
        layers = {f"{self.layer}{number}.{part}": shape for number in range(LAYERS) for part, shape in self.parts.items()}
        projections = {name: (WIDTH, WIDTH) for name in ("text_projection", "text_projection.weight") if name in shapes}
        return {**self.others, **layers, **projections, self.positions: (*shapes.get(self.positions, ())[:1], WIDTH)}


TRANSFORMERS = Naming(
    layer="text_model.encoder.layers.",
    parts={
        **{name: shape for part in ["q", "k", "v", "out"] for name, shape in _linear(f"self_attn.{part}_proj", WIDTH, WIDTH).items()},
        **_linear("mlp.fc1", FEED_FORWARD, WIDTH),
        **_linear("mlp.fc2", WIDTH, FEED_FORWARD),
        **_norm("layer_norm1"),
        **_norm("layer_norm2"),
    },
    others={"text_model.embeddings.token_embedding.weight": (TOKENS, WIDTH), **_norm("text_model.final_layer_norm")},
    positions="text_model.embeddings.position_embedding.weight",
    widest="mlp.fc1.weight",
)
# OpenAI's own files and OpenCLIP's; the host converts them.
OPENAI = Naming(
    layer="transformer.resblocks.",
    parts={
        "attn.in_proj_weight": (3 * WIDTH, WIDTH),
        "attn.in_proj_bias": (3 * WIDTH,),
        **_linear("attn.out_proj", WIDTH, WIDTH),
        **_linear("mlp.c_fc", FEED_FORWARD, WIDTH),
        **_linear("mlp.c_proj", WIDTH, FEED_FORWARD),
        **_norm("ln_1"),
        **_norm("ln_2"),
    },
    others={"token_embedding.weight": (TOKENS, WIDTH), **_norm("ln_final")},
    positions="positional_embedding",
    widest="mlp.c_fc.weight",
)
NAMINGS = (OPENAI, TRANSFORMERS)


def naming_of(shapes: Mapping[str, Shape]) -> Naming | None:
    """How tensors of these shapes are named if they are those of a CLIP-L text encoder, else None."""
    return next((naming for naming in NAMINGS if naming.fits(shapes)), None)


def in_order(first: str | None, second: str) -> tuple[str | None, str]:
    """CLIP-L's path and the student's, from two paths in either order, as DualCLIPLoader takes them; `first` may be None (no CLIP-L)."""
    if first is not None and not _is_clip_l_file(first) and _is_clip_l_file(second):
        return second, first
    return first, second


def _is_clip_l_file(path: str) -> bool:
    try:
        return naming_of(read_header(Path(path))[0]) is not None
    except StudentFileError:
        return False


def load_for_host(path: Path, between_chunks: Callable[[], None]) -> dict[str, Tensor]:
    """Every tensor of a file by its name there: the host's own way, which may map it, but for torch zips, which are checked first."""
    if path.suffix.lower() in SAFETENSORS:
        return comfy.utils.load_torch_file(str(path), safe_load=True)
    return load_tensors(path, between_chunks)


def open_clip_l(path: Path, between_tensors: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """The tensors of a CLIP-L file by transformers' names. `between_tensors` may raise to cancel.

    Raises StudentFileError for another kind of file, tensors missing, misshapen or not finite.
    """
    shapes, _, _ = read_header(path)
    naming = naming_of(shapes)
    if naming is None:
        raise _no_clip_l(shapes, path.name)
    needed = naming.needed(shapes)
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise StudentFileError(f"{path.name}: {len(missing)} tensors of CLIP-L are missing.", "download it again.", listed(missing))
    wrong = [f"{name}: expected {list(shape)}, found {list(shapes[name])}" for name, shape in needed.items() if shapes[name] != shape]
    if wrong:
        raise StudentFileError(f"{path.name}: {len(wrong)} tensors of CLIP-L have a wrong shape.", "download it again.", listed(wrong))
    tensors = load_for_host(path, between_tensors)
    numbers = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    check_finite(numbers, path.name, lambda _done, _total: between_tensors())
    if naming is OPENAI:
        return comfy.utils.clip_text_transformers_convert(tensors, "", "")
    # Old files of CLIPSave, which the stock loader turns as well.
    turned = {"text_projection.weight": tensors["text_projection"].transpose(0, 1)} if "text_projection" in tensors else {}
    return {name: tensor for name, tensor in tensors.items() if name != "text_projection"} | turned


def _no_clip_l(shapes: Mapping[str, Shape], where: str) -> StudentFileError:
    problem = f"{where} is not a CLIP-L text encoder."
    if any(f"{naming.layer}0." in name for naming in NAMINGS for name in shapes):
        problem = f"{where} is a CLIP, but not the CLIP-L that Flux takes: its size or the names of its tensors are others."
    return StudentFileError(
        problem,
        "pick clip_l.safetensors in clip_name1, or none for a pooled vector of zeros.",
        f"It holds {len(shapes)} tensors, the first being:\n{listed(sorted(shapes)[:5])}",
    )
