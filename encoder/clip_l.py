"""The CLIP-L file of the pooled vector: recognised, read and checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.utils
from torch import Tensor

from ..runtime.errors import StudentFileError, listed
from ..runtime.progress import Progress, silent, waiting
from ..runtime.weights import check_finite, load_tensors, read_header, widest_float
from ..students.foreign import refuse_quantised
from ..students.kind import Shape

# Sizes of the text half of OpenAI's CLIP ViT-L/14, as in ComfyUI's configuration of CLIP-L.
WIDTH, LAYERS, FEED_FORWARD = 768, 12, 3072
TOKENS = 49408


def _linear(name: str, rows: int, columns: int) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str) -> dict[str, Shape]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


@dataclass(frozen=True)
class Naming:
    """How a kind of CLIP-L file names its tensors.

    layer: the prefix of a layer's number. parts: the tensors of each layer. others: those that occur once. positions: the table whose
    number of rows varies: 77 in CLIP-L, 248 in long CLIP. widest: the part of a layer whose shape identifies CLIP-L.
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
        """Every tensor that ComfyUI needs, the positions with as many rows as the file's; the projection if the file has one."""
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
# OpenAI's own files and OpenCLIP's; ComfyUI converts them.
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
PICK_CLIP_L = "pick clip_l.safetensors as the CLIP-L file (clip_name1), or none for a pooled vector of zeros."


def naming_of(shapes: Mapping[str, Shape]) -> Naming | None:
    """The naming of tensors of these shapes if they are a CLIP-L text encoder's, else None."""
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


def open_clip_l(path: Path, progress: Progress = silent) -> dict[str, Tensor]:
    """The tensors of a CLIP-L file by transformers' names.

    Raises StudentFileError for another kind of file, for a quantised one, and for tensors that are missing, misshapen or not finite.
    Tensors that CLIP-L does not use are ignored.
    """
    shapes, dtypes, _ = read_header(path)
    naming = naming_of(shapes)
    if naming is None:
        raise _no_clip_l(shapes, path.name)
    refuse_quantised(shapes, path.name, PICK_CLIP_L)
    needed = naming.needed(shapes)
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise StudentFileError(f"{path.name}: {len(missing)} tensors of CLIP-L are missing.", "download it again.", listed(missing))
    wrong = [f"{name}: expected {list(shape)}, got {list(shapes[name])}" for name, shape in needed.items() if shapes[name] != shape]
    if wrong:
        raise StudentFileError(f"{path.name}: {len(wrong)} tensors of CLIP-L have a wrong shape.", "download it again.", listed(wrong))
    widest_float({name: dtypes[name] for name in needed}, path.name)
    tensors = load_tensors(path, needed, waiting(progress, len(needed)))
    check_finite(tensors, path.name, progress)
    if naming is OPENAI:
        return comfy.utils.clip_text_transformers_convert(tensors, "", "")
    # Old files of CLIPSave, whose projection ComfyUI's own loader transposes as well.
    turned = {"text_projection.weight": tensors["text_projection"].transpose(0, 1)} if "text_projection" in tensors else {}
    return {name: tensor for name, tensor in tensors.items() if name != "text_projection"} | turned


def _no_clip_l(shapes: Mapping[str, Shape], where: str) -> StudentFileError:
    problem = f"{where} is not a CLIP-L text encoder."
    if any(f"{naming.layer}0." in name for naming in NAMINGS for name in shapes):
        problem = f"{where} is a CLIP, but not CLIP-L: it has another size or other tensor names."
    return StudentFileError(
        problem,
        PICK_CLIP_L,
        f"It holds {len(shapes)} tensors, the first being:\n{listed(sorted(shapes)[:5])}",
    )
