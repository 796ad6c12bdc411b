"""The student inside ComfyUI: in the family's own text model, in the place of its large encoder, as an ordinary `comfy.sd.CLIP`."""

# B batch, L text tokens, D text width, P pooled width

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.text_encoders import long_clipl
from torch import Tensor, nn

from ..families import DEFAULT, FAMILIES
from ..families.family import Family
from ..runtime.errors import StudentFileError, listed, printable
from ..runtime.progress import Progress, silent, waiting
from ..runtime.weights import FLOAT_NAMES, not_finite
from ..students import KINDS
from ..students.kind import StudentKind
from .companions import open_companion
from .files import StudentFile, open_student
from .large import WithoutLastLayers, load_large
from .lora_log import fold_lora_lines
from .metadata import MAX_TOKENS, StudentMetadata, of_changed_weights, served_as
from .needed_tensors import CLIPS
from .prompt_length import TokenWeight, seen_by_encoder
from .trim import check_trimmed, read_trimmed

# What ComfyUI builds where a student or nothing goes, and what is dropped at once. Its CLIPs take a hidden layer of at least three.
SMALL_COMPANION = {"num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
TokenWeights = list[list[TokenWeight]]


class StudentTokens:
    """What a student's text encoder does before ComfyUI's class, which follows in the method resolution order."""

    kind: StudentKind

    def encode_token_weights(self, token_weight_pairs: TokenWeights) -> Any:
        check_length(token_weight_pairs, self.kind)
        return super().encode_token_weights([seen_by_encoder(pairs, self.kind.pad) for pairs in token_weight_pairs])  # pyright: ignore

    def load_sd(self, sd: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        missing, unexpected = super().load_sd(sd)  # pyright: ignore
        assert not missing and not unexpected, (missing, unexpected)
        return missing, unexpected


def check_length(token_weight_pairs: TokenWeights, kind: StudentKind) -> None:
    """Raise ValueError for a prompt whose attention maps would not fit into any memory."""
    longest = max((len(pairs) for pairs in token_weight_pairs), default=0)
    if longest > MAX_TOKENS:
        raise ValueError(
            f"The prompt has {longest:,} {kind.display_name} tokens; a distilled {kind.display_name} takes at most {MAX_TOKENS:,}.\n"
            "What to do: shorten the prompt. Tokens far beyond the trained length have no effect on the image."
        )


class NoCompanion(nn.Module):
    """In the place of a companion where no file was given: embeddings and a pooled vector of zeros, no weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def encode_token_weights(self, token_weight_pairs: TokenWeights) -> tuple[Tensor, Tensor]:
        zeros = functools.partial(torch.zeros, device=comfy.model_management.intermediate_device())
        return zeros(1, sum(map(len, token_weight_pairs)), self.width), zeros(1, self.width)

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """No layers to choose from."""

    def reset_clip_options(self) -> None:
        """Nothing was set."""

    def load_sd(self, sd: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        return [], list(sd)


def text_model(
    student: StudentFile,
    token_length: int,
    student_dtype: torch.dtype,
    companions: frozenset[str],
    device: Any = "cpu",
    dtype: torch.dtype | None = None,
    model_options: Mapping[str, Any] | None = None,
) -> Any:
    """ComfyUI's text model of the student's family with the student in the place of the large encoder, and the companions that are given.

    The student is registered as `module` of its kind and answers under the family's name too, without being registered twice. It keeps the
    class that ComfyUI has for the large encoder, so that masks and padding are the family's.
    """
    family, kind = FAMILIES[student.metadata.family], KINDS[student.layout.kind]
    absent = {name: width for name, width in family.companions.items() if name not in companions}
    small = {f"{family.part}_model_config": dict(kind.small)}
    small |= {f"{name}_model_config": SMALL_COMPANION for name in absent}
    _, factory = family.text_classes()
    model = factory(device=device, dtype=dtype, model_options={**(model_options or {}), **small})
    part = model._modules.pop(family.part)
    part.__class__ = type(f"Student{type(part).__name__}", (StudentTokens, type(part)), {"kind": kind})
    part.transformer = kind.served(student.layout, student_dtype, device, part.operations)
    part.num_layers = part.transformer.num_layers
    part.transformer.usual_layer = part.layer_idx
    part.freeze()
    model.add_module(kind.module, part)
    vars(model)[family.part] = part
    for name, width in absent.items():
        setattr(model, name, None if family.companions_optional else NoCompanion(width))
    model.dtypes = {student_dtype} | ({dtype} if companions else set())
    model.layout, model.metadata, model.token_length = student.layout, student.metadata, token_length
    return model


@dataclass(frozen=True)
class ServedEncoder:
    """A CLIP for the graph, and in one line what it is."""

    clip: comfy.sd.CLIP
    info: str


@dataclass(frozen=True)
class ServingOptions:
    """How to serve: the family, the dtype of the student's weights (None: ComfyUI's choice), the padded length (None: as trained), the
    device (None: ComfyUI's choice), folders of textual inversions."""

    family: str = DEFAULT.name
    dtype: torch.dtype | None = None
    token_length: int | None = None
    device: torch.device | None = None
    embedding_folders: tuple[str, ...] = ()


def load_encoder(student_path: str, companions: Mapping[str, str], options: ServingOptions, progress: Progress = silent) -> ServedEncoder:
    """Load a student, with the companions of these names and paths, as an ordinary ComfyUI CLIP.

    Raises StudentFileError for a file that is not a complete student of this family, or not that companion; then nothing is loaded.
    """
    family = FAMILIES[options.family]
    trimmed = read_trimmed(Path(student_path))
    if trimmed is not None:
        check_trimmed(*trimmed, Path(student_path).name, family)
        return _trimmed(student_path, family, options)
    student = opened(student_path, family)
    for name in companions:
        if name not in family.companions:
            clip = CLIPS[name].display_name
            raise StudentFileError(f"{family.display_name} has no {clip}.", f"choose none for the {clip} file.")
    tokens = KINDS[student.layout.kind].tokens
    if student.layout.vocab_size < tokens:
        raise StudentFileError(
            f"{student.path.name} has {student.layout.vocab_size:,} tokens; its tokenizer produces {tokens:,}.",
            "use a file with a complete token table.",
        )
    tensors = {name: open_companion(name, Path(path), waiting(progress, len(student.names))) for name, path in companions.items()}
    clip = _build(student, tensors, options, progress)
    # With dynamic VRAM, ComfyUI calls this for a second, fully loaded copy of the model.
    clip.patcher.cached_patcher_init = (_load_patcher, (student_path, dict(companions), options))
    return ServedEncoder(clip, describe(clip, student.path.name, {name: Path(path).name for name, path in companions.items()}))


def _trimmed(path: str, family: Family, options: ServingOptions) -> ServedEncoder:
    """A large encoder's file of `encoder.trim` as ComfyUI loads it, without what is not in the file."""
    where = Path(path).name
    if options.dtype is not None:
        raise StudentFileError(
            f"{where} is a trimmed {family.teacher_layout.size_name}, which keeps its number format.", "set dtype to auto."
        )
    clip = load_large([path], family, _devices(options.device), options.embedding_folders)
    if options.token_length is not None:
        clip.set_tokenizer_option(f"{family.part}_min_length", options.token_length)
    large = family.teacher_layout
    resident_gb = sum(weight.numel() * weight.element_size() for weight in clip.cond_stage_model.parameters()) / 1e9
    info = (
        f"{large.size_name} from {printable(where)}: {family.layers_read} of {large.num_layers} layers, {resident_gb:.1f} GB\n"
        f"runs on {clip.patcher.load_device}, rests on {clip.patcher.offload_device}\n"
        f"text width {family.text_width} ({family.display_name})"
    )
    return ServedEncoder(clip, info)


def _devices(device: torch.device | None) -> dict[str, Any]:
    """ComfyUI's model options for an encoder on a device; None: ComfyUI's choice."""
    if device is None:
        return {}
    return {"load_device": device, **({"offload_device": device} if device.type == "cpu" else {})}


def opened(student_path: str, family: Family) -> StudentFile:
    """A student's file as that of a family. Raises StudentFileError for one that does not say that it serves this family."""
    student = open_student(student_path)
    return replace(student, metadata=served_as(student.metadata, family, student.path.name))


def _load_patcher(student_path: str, companions: Mapping[str, str], options: ServingOptions, disable_dynamic: bool = False) -> Any:
    tensors = {name: open_companion(name, Path(path)) for name, path in companions.items()}
    return _build(opened(student_path, FAMILIES[options.family]), tensors, options, silent, disable_dynamic).patcher


def _build(
    student: StudentFile,
    companions: Mapping[str, dict[str, Tensor]],
    options: ServingOptions,
    progress: Progress,
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    family = FAMILIES[options.family]
    dtype = options.dtype or usual_dtype(student.dtype, options.device)
    state_dicts = [*companions.values(), served_tensors(student, dtype, progress)]
    token_length = options.token_length or student.metadata.token_length
    tokenizer_data: dict[str, Any] = {f"{family.part}_min_length": token_length}
    model_options = _devices(options.device)
    for tensors in companions.values():
        tokenizer_data, model_options = long_clipl.model_options_long_clip(tensors, tokenizer_data, model_options)
    build = functools.partial(text_model, student, token_length, dtype, frozenset(companions))
    clip = comfy.sd.CLIP(
        SimpleNamespace(params={}, tokenizer=family.text_classes()[0], clip=build),
        embedding_directory=list(options.embedding_folders),
        tokenizer_data=tokenizer_data,
        parameters=sum(comfy.utils.calculate_parameters(part) for part in state_dicts),
        state_dict=state_dicts,
        model_options=model_options,
        disable_dynamic=disable_dynamic,
    )
    fold_lora_lines(clip.cond_stage_model, KINDS[student.layout.kind], family.teacher_layout.size_name)
    return clip


def usual_dtype(stored: torch.dtype, device: torch.device | None) -> torch.dtype:
    """The dtype in which ComfyUI holds weights that are stored as `stored`, according to its flags for text encoders."""
    device = device or comfy.model_management.text_encoder_device()
    return comfy.model_management.pick_weight_dtype(stored, comfy.model_management.text_encoder_dtype(device), device)


def served_tensors(student: StudentFile, dtype: torch.dtype, progress: Progress) -> dict[str, Tensor]:
    """The student's checked tensors under the names of the served module.

    Raises StudentFileError if a number is too large for `dtype`.
    """
    count = len(student.names)
    waiting(progress, count)(0, 0)
    loaded = student.read(progress)
    passes = 1 if all(tensor.dtype == dtype for tensor in loaded.values()) else 2
    tensors = student.checked(loaded, lambda done, total: progress(done, passes * total))
    if passes == 2:
        tensors = in_dtype(tensors.items(), dtype, student.path.name, lambda done, _total: progress(count + done, 2 * count))
    prefix = KINDS[student.layout.kind].prefix
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def in_dtype(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, where: str, progress: Progress = silent) -> dict[str, Tensor]:
    """Named tensors in another dtype.

    Raises StudentFileError that lists those with numbers too large for it; what was not finite before stays so.
    """
    converted: dict[str, Tensor] = {}
    overflowed = []
    for name, tensor in tensors:
        converted[name] = tensor.to(dtype)
        if not_finite({name: converted[name]}) and not not_finite({name: tensor}):
            overflowed.append(name)
        progress(len(converted), 0)
    if overflowed:
        raise StudentFileError(
            f"{where}: {len(overflowed)} tensors hold numbers that are too large for {FLOAT_NAMES[dtype]}.",
            f"set dtype to {'fp32' if dtype == torch.bfloat16 else 'bf16 or fp32'}.",
            listed(overflowed),
        )
    return converted


def student_of(clip: Any) -> Any:
    """The text model of a CLIP with a student. Raises ValueError if it is another kind of CLIP."""
    model = getattr(clip, "cond_stage_model", None)
    if isinstance(model, nn.Module) and any(isinstance(part, WithoutLastLayers) for part in model.children()):
        raise ValueError(
            "This CLIP is a trimmed text encoder, not a distilled one: it is a file already.\n"
            "What to do: copy the file that the loader read."
        )
    if not isinstance(getattr(model, "metadata", None), StudentMetadata):
        raise ValueError(
            f"This CLIP is not a distilled encoder (it is a {type(model).__name__}).\n"
            "What to do: connect the CLIP of a Distilled Text Encoder Loader."
        )
    return model


def _prefix(model: Any) -> str:
    """The prefix of the student's weights in ComfyUI's state dict, and in its table of patches."""
    return f"{KINDS[model.layout.kind].module}.transformer."


def metadata_in_use(clip: Any) -> StudentMetadata:
    """The metadata that fits the student's weights as they are in use: LoRAs and merges make them another encoder."""
    model = student_of(clip)
    changed = any(name.startswith(_prefix(model)) for name in clip.patcher.patches)
    return of_changed_weights(model.metadata) if changed else model.metadata


def student_tensors(clip: Any, dtype: torch.dtype | None = None, progress: Progress = silent) -> dict[str, Tensor]:
    """The student's weights by published name as they are in use, LoRAs and merges included; in `dtype` if it is given.

    `progress` is called between tensors, always with nothing done.
    """
    model = student_of(clip)
    idle = waiting(progress, len(model.layout.tensors()))
    idle(0, 0)
    weights = _weights_in_use(clip, idle)
    tensors = _published(model, weights, idle)
    return dict(tensors) if dtype is None else in_dtype(tensors, dtype, "This CLIP")


def _weights_in_use(clip: Any, progress: Progress) -> Mapping[str, Any]:
    """ComfyUI's state dict of a CLIP with patches applied, or with objects that apply them when they are moved to the CPU."""
    # ComfyUI since 0.24 un-patches what it keeps in another form (fp8, files) in state_dict_for_saving; before, patches are forced in.
    if hasattr(clip, "state_dict_for_saving"):
        clip.load_model()
        progress(0, 0)
        return clip.state_dict_for_saving()
    comfy.model_management.load_models_gpu([clip.load_model()], force_patch_weights=True)
    progress(0, 0)
    return clip.get_sd()


def _published(model: Any, weights: Mapping[str, Any], progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """The student's weights of ComfyUI's state dict, one by one, by published name."""
    prefix = _prefix(model)
    bare = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
    names, _ = KINDS[model.layout.kind].published_names(bare)
    for published, name in names.items():
        progress(0, 0)
        # Only `.to("cpu")` turns weights that ComfyUI keeps elsewhere into patched numbers.
        yield published, weights[prefix + name].to("cpu").detach()


def describe(clip: Any, student_name: str, companions: Mapping[str, str]) -> str:
    """What was loaded: size, parameters, resident megabytes, dtype, device, token length, companions with the names of their files."""
    model = student_of(clip)
    family = FAMILIES[model.metadata.family]
    weights = list(getattr(model, family.part).parameters())
    resident_mb = sum(weight.numel() * weight.element_size() for weight in weights) / 1e6
    memory = f"{resident_mb:.0f} MB as {FLOAT_NAMES[max(weights, key=torch.numel).dtype]}"
    padding = f"prompts are padded to {model.token_length} tokens" if model.token_length > 1 else "prompts are not padded"
    parts = [f"text width {model.layout.output_width} ({family.display_name})"]
    for name in family.companions:
        known = CLIPS[name].display_name
        parts.append(f"{known} from {printable(companions[name])}" if name in companions else f"no {known}: pooled vector of zeros")
    lines = [
        f"{model.layout.size_name} from {printable(student_name)}: {model.layout.parameters / 1e6:.1f} M parameters, {memory}",
        f"runs on {clip.patcher.load_device}, rests on {clip.patcher.offload_device}; {padding}",
        "; ".join(parts),
    ]
    if model.token_length != model.metadata.token_length:
        lines.append(f"note: trained at {model.metadata.token_length} tokens, used at {model.token_length} (padding changes the image)")
    return "\n".join(lines)
