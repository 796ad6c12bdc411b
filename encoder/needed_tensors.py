"""Which tensors the files of encoders must hold, by their headers: read without torch and ComfyUI."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from ..families import DEFAULT, FAMILIES
from ..families.family import Family
from ..runtime.errors import StudentFileError, UndistilledError, listed
from ..students import kind_of
from ..students.foreign import foreign_kind, refuse_foreign, refuse_quantised
from ..students.kind import Layout, Shape
from .metadata import TRIMMED_KEY, StudentMetadata, check_against_layout, of_kind, read_metadata

TOKENS = 49408
# What recipes and suites call the setting that decides the family.
RECIPE_SETTING = "diffusion_model.family"
# Endings of what ComfyUI's quantised layers have beside their weights.
QUANTISED_BY_COMFYUI = (".comfy_quant", ".weight_scale", ".weight_scale_2")


@dataclass(frozen=True)
class Clip:
    """The text half of a published CLIP: what people call it, the loader's input for it, and its sizes as ComfyUI has them.

    projected: whether ComfyUI projects its pooled vector.
    """

    display_name: str
    widget: str
    width: int
    layers: int
    feed_forward: int
    projected: bool


# The companions of large encoders, by attribute of ComfyUI's text model.
CLIPS = {"clip_l": Clip("CLIP-L", "clip_name1", 768, 12, 3072, False), "clip_g": Clip("CLIP-G", "clip_name3", 1280, 32, 5120, True)}


@dataclass(frozen=True)
class Naming:
    """How a kind of file names the tensors of a CLIP.

    layer: the prefix of a layer's number. parts: the tensors of each layer. others: those that occur once. positions: the table whose
    number of rows varies: 77 in CLIP-L, 248 in long CLIP. widest: the part of a layer whose shape identifies the CLIP. converted: whether
    ComfyUI converts the names. projection: what projects the pooled vector.
    """

    clip: Clip
    layer: str
    parts: Mapping[str, Shape]
    others: Mapping[str, Shape]
    positions: str
    widest: str
    converted: bool
    projection: str

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether the first layer is this CLIP's and there are not more layers than it has."""
        first, beyond = (f"{self.layer}{number}.{self.widest}" for number in (0, self.clip.layers))
        return shapes.get(first) == (self.clip.feed_forward, self.clip.width) and beyond not in shapes

    def needed(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Every tensor that ComfyUI needs, the positions with as many rows as the file's; a projection that is there, needed or not."""
        width = self.clip.width
        layers = {f"{self.layer}{number}.{part}": shape for number in range(self.clip.layers) for part, shape in self.parts.items()}
        projections = [name for name in ("text_projection", "text_projection.weight") if name in shapes]
        if self.clip.projected and not projections:
            projections = [self.projection]
        needed = {**self.others, **layers, **dict.fromkeys(projections, (width, width))}
        return {**needed, self.positions: (*shapes.get(self.positions, ())[:1], width)}


def _namings(clip: Clip) -> tuple[Naming, Naming]:
    """The names in files of OpenAI and OpenCLIP, and those of transformers."""
    width, inner = clip.width, clip.feed_forward

    def linear(name: str, rows: int, columns: int) -> dict[str, Shape]:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def norm(name: str) -> dict[str, Shape]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    attention = [linear(f"self_attn.{part}_proj", width, width) for part in ("q", "k", "v", "out")]
    mlp = linear("mlp.fc1", inner, width) | linear("mlp.fc2", width, inner)
    transformers = Naming(
        clip,
        layer="text_model.encoder.layers.",
        parts={name: shape for part in (*attention, mlp, norm("layer_norm1"), norm("layer_norm2")) for name, shape in part.items()},
        others={"text_model.embeddings.token_embedding.weight": (TOKENS, width), **norm("text_model.final_layer_norm")},
        positions="text_model.embeddings.position_embedding.weight",
        widest="mlp.fc1.weight",
        converted=False,
        projection="text_projection.weight",
    )
    openai = Naming(
        clip,
        layer="transformer.resblocks.",
        parts={
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            **linear("attn.out_proj", width, width),
            **linear("mlp.c_fc", inner, width),
            **linear("mlp.c_proj", width, inner),
            **norm("ln_1"),
            **norm("ln_2"),
        },
        others={"token_embedding.weight": (TOKENS, width), **norm("ln_final")},
        positions="positional_embedding",
        widest="mlp.c_fc.weight",
        converted=True,
        projection="text_projection",
    )
    return openai, transformers


NAMINGS = {name: _namings(clip) for name, clip in CLIPS.items()}


def naming_of(shapes: Mapping[str, Shape], name: str) -> Naming | None:
    """The naming of tensors of these shapes if they are those of a CLIP (`clip_l` or `clip_g`), else None."""
    return next((naming for naming in NAMINGS[name] if naming.fits(shapes)), None)


def check_companion(shapes: Mapping[str, Shape], where: str, name: str) -> Naming:
    """The naming of a CLIP's tensors. Raises StudentFileError for another kind of file, a quantised one, and an incomplete one."""
    naming, clip = naming_of(shapes, name), CLIPS[name].display_name
    if naming is None:
        raise _other_file(shapes, where, name)
    refuse_quantised(shapes, where, _pick(name))
    needed = naming.needed(shapes)
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise StudentFileError(f"{where}: {len(missing)} tensors of {clip} are missing.", "download it again.", listed(missing))
    wrong = [f"{name}: expected {list(shape)}, got {list(shapes[name])}" for name, shape in needed.items() if shapes[name] != shape]
    if wrong:
        raise StudentFileError(f"{where}: {len(wrong)} tensors of {clip} have a wrong shape.", "download it again.", listed(wrong))
    return naming


def _pick(name: str) -> str:
    return f"pick {name}.safetensors as the {CLIPS[name].display_name} file ({CLIPS[name].widget}), or none for a pooled vector of zeros."


def _other_file(shapes: Mapping[str, Shape], where: str, name: str) -> StudentFileError:
    clip = CLIPS[name].display_name
    problem = f"{where} is not a {clip} text encoder."
    if any(f"{naming.layer}0." in tensor for naming in NAMINGS[name] for tensor in shapes):
        problem = f"{where} is a CLIP, but not {clip}: it has another size or other tensor names."
    return StudentFileError(
        problem,
        _pick(name),
        f"It holds {len(shapes)} tensors, the first being:\n{listed(sorted(shapes)[:5])}",
    )


def check_large_tensors(
    shapes: Mapping[str, Shape], where: str, family: Family = DEFAULT, pick: str = "", setting: str = RECIPE_SETTING
) -> None:
    """Raise StudentFileError unless a file has every tensor of its large encoder that the family reads, whatever else is there (scales).

    ComfyUI only warns about missing weights, and would encode with uninitialised memory. Layers that are not read may be missing (Trim Text
    Encoder), and weights that are quantised as ComfyUI's have their own shapes. `pick`: what to do with another file.
    `setting`: what the user calls the setting that decides the family.
    """
    kind, layout = family.kind, family.teacher_layout
    pick = pick or f"name a complete {layout.size_name} (fp16, bf16 or fp8, not packed in 4 bits) in teacher.t5."
    names, _ = kind.published_names(shapes)
    by_name = {name: shapes[source] for name, source in names.items()}
    _refuse_other_large(by_name, where, family, pick, setting)
    quantised = {part_of(name) for name in by_name if name.endswith(QUANTISED_BY_COMFYUI)}
    wanted = family.read_layout.tensors()
    wrong = [name for name, shape in wanted.items() if name not in by_name or (by_name[name] != shape and part_of(name) not in quantised)]
    if wrong:
        raise StudentFileError(
            f"{where} is not a complete {layout.size_name}: {len(wrong)} of {len(wanted)} tensors are missing or misshapen.",
            pick,
            listed(wrong, 10),
        )


def part_of(name: str) -> str:
    """The layer that a tensor is of: its name without the last part, which its scales have in common with it."""
    return name.rpartition(".")[0]


def _refuse_other_large(by_name: Mapping[str, Shape], where: str, family: Family, pick: str, setting: str) -> None:
    """Raise StudentFileError for a file that is known as something else than the family's large encoder."""
    kind, size_name, width = family.kind, family.teacher_layout.size_name, family.teacher_layout.output_width
    foreign, other = foreign_kind(by_name, kind), kind_of(list(by_name))
    what = foreign.name if foreign else ""
    if other is not kind and any(name.endswith(other.signs) for name in by_name):
        what = f"a {other.display_name}"
    elif any(name.startswith(kind.projection) for name in by_name):
        what = f"a distilled {kind.display_name}, which is read to its end"
    elif any("visual." in name for name in by_name):
        what, pick = "a Qwen3-VL, with vision layers", f"for image input keep the complete encoder; for text, {pick}"
    fitting = [name for name, one in FAMILIES.items() if (one.kind, one.teacher_layout.output_width) == (kind, kind.width_in(by_name))]
    if not what and fitting and family.name not in fitting:
        what, pick = f"the text encoder of {FAMILIES[fitting[0]].display_name}", f"set {setting} to {' or '.join(fitting)}, or {pick}"
    if what:
        raise StudentFileError(f"{where} is {what}; expected a {size_name}, of width {width}.", pick)


@dataclass(frozen=True)
class StudentHeader:
    """What the header of an encoder file says. names: published name -> name in the file. twin: the file's name of a duplicate table."""

    layout: Layout
    metadata: StudentMetadata
    names: Mapping[str, str]
    twin: str | None


def student_header(shapes: Mapping[str, Shape], strings: Mapping[str, str], where: str) -> StudentHeader:
    """The header of an encoder file, of its tensors' shapes and its metadata.

    Raises UndistilledError for a network that students replace, StudentFileError for anything else that is not a complete student.
    """
    kind = kind_of(list(shapes))
    names, twin = kind.published_names(shapes)
    by_name = {name: shapes[source] for name, source in names.items()}
    refuse_foreign(by_name, where, kind)
    if TRIMMED_KEY in strings:
        raise UndistilledError(
            f"{where} is a trimmed {kind.display_name}, not a distilled one.", "load it with Distilled Text Encoder Loader."
        )
    metadata = read_metadata(strings, where)
    kind.refuse_relatives(by_name, where, metadata.described)
    refuse_quantised(by_name, where, "use the encoder file that is not quantised; dtype fp8_e4m3fn makes it as small.")
    layout = kind.read_layout(by_name, where)
    metadata = of_kind(metadata, layout)
    check_against_layout(metadata, layout, where)
    return StudentHeader(layout, metadata, names, twin)


def check_teacher_tensors(
    shapes: Mapping[str, Shape], strings: Mapping[str, str], where: str, companions: Container[str], family: Family = DEFAULT
) -> None:
    """Raise ValueError unless the header is a student's, or that of the network that students replace and its companions are given."""
    try:
        student_header(shapes, strings, where)
    except UndistilledError:
        check_companions_given(companions, family)
        check_large_tensors(shapes, where, family)


def check_companions_given(companions: Container[str], family: Family) -> None:
    """Raise ValueError if the network that students replace lacks a companion without which ComfyUI does not load it."""
    missing = [name for name in family.companions if name not in companions]
    if missing and not family.companions_optional:
        clip = CLIPS[missing[0]].display_name
        raise ValueError(
            f"A {family.teacher_layout.size_name} teacher is loaded with {clip}.\nWhat to do: name a {clip} file in teacher.{missing[0]}."
        )
