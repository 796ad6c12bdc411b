"""Which tensors the files of a teacher must hold, by their headers: read without torch and ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..families import DEFAULT
from ..families.family import Family
from ..runtime.errors import StudentFileError, listed
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


def check_clip_l(shapes: Mapping[str, Shape], where: str) -> Naming:
    """The naming of a CLIP-L's tensors. Raises StudentFileError for another kind of file, a quantised one, and an incomplete one."""
    naming = naming_of(shapes)
    if naming is None:
        raise _not_clip_l(shapes, where)
    refuse_quantised(shapes, where, PICK_CLIP_L)
    needed = naming.needed(shapes)
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise StudentFileError(f"{where}: {len(missing)} tensors of CLIP-L are missing.", "download it again.", listed(missing))
    wrong = [f"{name}: expected {list(shape)}, got {list(shapes[name])}" for name, shape in needed.items() if shapes[name] != shape]
    if wrong:
        raise StudentFileError(f"{where}: {len(wrong)} tensors of CLIP-L have a wrong shape.", "download it again.", listed(wrong))
    return naming


def _not_clip_l(shapes: Mapping[str, Shape], where: str) -> StudentFileError:
    problem = f"{where} is not a CLIP-L text encoder."
    if any(f"{naming.layer}0." in name for naming in NAMINGS for name in shapes):
        problem = f"{where} is a CLIP, but not CLIP-L: it has another size or other tensor names."
    return StudentFileError(
        problem,
        PICK_CLIP_L,
        f"It holds {len(shapes)} tensors, the first being:\n{listed(sorted(shapes)[:5])}",
    )


def check_large_tensors(shapes: Mapping[str, Shape], where: str, family: Family = DEFAULT) -> None:
    """Raise StudentFileError unless every tensor of the network that students replace is there, whatever else is (fp8 scales).

    ComfyUI only warns about missing weights, and would teach with uninitialised memory.
    """
    layout = family.teacher_layout
    names, _ = family.kind.published_names(shapes)
    wanted = layout.tensors()
    wrong = [name for name, shape in wanted.items() if name not in names or shapes[names[name]] != shape]
    if wrong:
        raise StudentFileError(
            f"{where} is not a complete {layout.size_name}: {len(wrong)} of {len(wanted)} tensors are missing or misshapen.",
            f"name a complete {layout.size_name} (fp16, bf16 or fp8, not packed in 4 bits) in teacher.t5.",
            listed(wrong, 10),
        )


def check_teacher_tensors(shapes: Mapping[str, Shape], where: str, family: Family = DEFAULT) -> None:
    """Raise StudentFileError unless the tensors are those of the network that students replace, or of a student."""
    kind = family.kind
    names, _ = kind.published_names(shapes)
    by_name = {name: shapes[source] for name, source in names.items()}
    try:
        kind.read_layout(by_name, where)
    except StudentFileError:
        width = family.teacher_layout.output_width
        if by_name.get(kind.table, ())[-1:] != (width,):
            refuse_quantised(by_name, where, "use the encoder file that is not quantised.")
            raise
        check_large_tensors(shapes, where, family)
