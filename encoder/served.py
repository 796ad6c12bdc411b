"""The student inside ComfyUI: a subclass of the host's own T5 with the projection, in a `comfy.sd.CLIP` made the host's way."""

# B batch, L text tokens, D text width, P pooled width

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy import sd1_clip
from comfy.text_encoders import long_clipl
from comfy.text_encoders.flux import FluxTokenizer
from comfy.text_encoders.t5 import T5
from torch import Tensor, nn

from ..families import FAMILIES
from ..runtime.errors import StudentFileError, listed
from ..students.t5.layout import StudentLayout
from .clip_l import load_for_host, open_clip_l
from .files import FLOAT_NAMES, Progress, StudentFile, not_finite, open_student
from .lora_log import fold_t5xxl_lora_lines
from .metadata import MAX_TOKENS, StudentMetadata, of_changed_weights

# 32,000 pieces and 100 extra ids.
TOKENS = 32100
# Where the student's weights stand in the host's state dict, and in its table of patches.
STUDENT_PREFIX = "t5base.transformer."
TokenWeights = list[list[tuple[Any, float]]]


class ProjectedT5(T5):
    """ComfyUI's T5 encoder followed by the projection, both made of the host's `operations`."""

    def __init__(self, config_dict: dict[str, Any], dtype: torch.dtype, device: torch.device, operations: Any) -> None:
        super().__init__(config_dict, dtype, device, operations)
        self.final_projection = _projection(config_dict["student"], dtype, device, operations)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        last_BLD, intermediate_BLD = super().forward(*args, **kwargs)
        return self.final_projection(last_BLD), None if intermediate_BLD is None else self.final_projection(intermediate_BLD)


def _projection(layout: StudentLayout, dtype: torch.dtype, device: torch.device, operations: Any) -> nn.Module:
    if layout.hidden_width is None or layout.projected_width is None:
        return nn.Identity()
    linear = functools.partial(operations.Linear, dtype=dtype, device=device)
    # Places 1 and 2 hold ReLU and Dropout in training, so that the published names final_projection.0 and .3 fit.
    return nn.Sequential(
        linear(layout.d_model, layout.hidden_width, bias=layout.hidden_bias),
        nn.ReLU(),
        nn.Identity(),
        linear(layout.hidden_width, layout.projected_width, bias=layout.output_bias),
    )


def t5_config(layout: StudentLayout) -> dict[str, Any]:
    """The layout as the config that ComfyUI's T5 takes."""
    return {
        "d_model": layout.d_model,
        "d_ff": layout.d_ff,
        "d_kv": layout.d_kv,
        "num_heads": layout.num_heads,
        "num_layers": layout.num_layers,
        "vocab_size": layout.vocab_size,
        "is_gated_act": layout.gated,
        # T5 v1.0 is ungated with ReLU, v1.1 and flan gated with the tanh approximation of GELU.
        "dense_act_fn": "gelu_pytorch_tanh" if layout.gated else "relu",
        "model_type": "t5",
        "student": layout,
    }


class StudentTextModel(sd1_clip.SDClipModel):
    """The student as ComfyUI's text model: tokens in, embeddings [B, L, D] out; no pooled vector."""

    def __init__(self, layout: StudentLayout, device: Any, dtype: torch.dtype | None, model_options: dict[str, Any]) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=t5_config(layout),
            special_tokens={"end": 1, "pad": 0},
            model_class=ProjectedT5,
            model_options={**model_options, "model_name": "t5base"},
        )

    def encode_token_weights(self, token_weight_pairs: TokenWeights) -> Any:
        check_length(token_weight_pairs)
        pad = (self.special_tokens["pad"], 1.0)
        return super().encode_token_weights([without_embeddings(pairs, pad) for pairs in token_weight_pairs])


def check_length(token_weight_pairs: TokenWeights) -> None:
    """Raise ValueError for a prompt whose attention maps would not fit into any memory."""
    longest = max((len(pairs) for pairs in token_weight_pairs), default=0)
    if longest > MAX_TOKENS:
        raise ValueError(
            f"The prompt has {longest:,} T5 tokens; a distilled T5 takes at most {MAX_TOKENS:,} (students are trained at 256 or so).\n"
            "What to do: shorten the prompt. What is far beyond the trained length does not reach the picture."
        )


def without_embeddings(pairs: list[tuple[Any, float]], pad: tuple[int, float]) -> list[tuple[Any, float]]:
    """Tokens without textual-inversion vectors, padded back to the same length, as ComfyUI does when widths differ.

    A textual inversion for CLIP-L is 768 wide, and so is T5-Base: without this it would be taken for a T5 vector.
    """
    tokens = [pair for pair in pairs if isinstance(pair[0], numbers.Integral)]
    return tokens + [pad] * (len(pairs) - len(tokens))


class DistilledFluxTextEncoder(nn.Module):
    """CLIP-L (or zeros) and the student, in the place of CLIP-L and T5-XXL.

    The student's module is called `t5base` whatever its size: CLIPSave writes a file of its own for that name, and LoRAs for T5-XXL look
    for `t5xxl`. Token keys stay `l` and `t5xxl`, which other nodes index.
    """

    def __init__(
        self,
        layout: StudentLayout,
        metadata: StudentMetadata,
        token_length: int,
        student_dtype: torch.dtype,
        has_clip_l: bool,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        model_options = model_options or {}
        self.layout, self.metadata, self.token_length = layout, metadata, token_length
        self.clip_l = None
        if has_clip_l:
            self.clip_l = sd1_clip.SDClipModel(device=device, dtype=dtype, return_projected_pooled=False, model_options=model_options)
        self.t5base = StudentTextModel(layout, device, student_dtype, model_options)
        self.dtypes = {student_dtype} | ({dtype} if has_clip_l else set())

    def parts(self) -> list[sd1_clip.SDClipModel]:
        return [self.t5base] if self.clip_l is None else [self.clip_l, self.t5base]

    def set_clip_options(self, options: dict[str, Any]) -> None:
        for part in self.parts():
            part.set_clip_options(options)

    def reset_clip_options(self) -> None:
        for part in self.parts():
            part.reset_clip_options()

    def encode_token_weights(self, token_weight_pairs: dict[str, TokenWeights]) -> tuple[Tensor, Tensor]:
        """Embedding [1, L, D] of the student and pooled vector [1, P] of CLIP-L (zeros without it)."""
        text_BLD, _ = self.t5base.encode_token_weights(token_weight_pairs["t5xxl"])
        if self.clip_l is None:
            return text_BLD, torch.zeros(1, FAMILIES[self.metadata.family].pooled_width, device=text_BLD.device)
        _, pooled_BP = self.clip_l.encode_token_weights(token_weight_pairs["l"])
        return text_BLD, pooled_BP

    def load_sd(self, sd: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Load CLIP-L's or the student's tensors, whichever they are. All of the student's must be there."""
        if "text_model.embeddings.token_embedding.weight" in sd and self.clip_l is not None:
            return self.clip_l.load_sd(sd)
        missing, unexpected = self.t5base.load_sd(sd)
        assert not missing and not unexpected, (missing, unexpected)
        return missing, unexpected


@dataclass(frozen=True)
class ServedEncoder:
    """A CLIP for the graph, and in one line what it is."""

    clip: comfy.sd.CLIP
    info: str


@dataclass(frozen=True)
class ServingOptions:
    """How to serve: a host type such as `flux`, the dtype of the student's weights (None: as the host would choose), the padded length
    (None: as trained), the device (None: as the host would choose), folders of textual inversions."""

    family: str = "flux"
    dtype: torch.dtype | None = None
    token_length: int | None = None
    device: torch.device | None = None
    embedding_folders: tuple[str, ...] = ()


def load_encoder(student_path: str, clip_l_path: str | None, options: ServingOptions, progress: Progress | None = None) -> ServedEncoder:
    """Load a distilled T5, with CLIP-L or without, as an ordinary ComfyUI CLIP.

    Raises StudentFileError for a file that is no whole distilled T5 for this family or no CLIP-L; nothing is loaded by half.
    """
    fold_t5xxl_lora_lines()
    student = open_student(student_path)
    if student.metadata.family != options.family:
        raise StudentFileError(
            f"{student.path.name} was distilled for {FAMILIES[student.metadata.family].display_name}, but the type is {options.family}.",
            f"set type to {student.metadata.family}, or pick another file.",
        )
    if student.layout.vocab_size < TOKENS:
        raise StudentFileError(
            f"{student.path.name} knows {student.layout.vocab_size:,} tokens, but T5's tokenizer makes {TOKENS:,}.",
            "use a file whose token table is whole (32,128 rows in every published T5).",
        )
    clip_l = None if clip_l_path is None else open_clip_l(Path(clip_l_path), student.between(progress))
    clip = _build(student, clip_l, options, progress)
    # With dynamic VRAM the host makes a second, fully loaded copy of a model by calling this.
    clip.patcher.cached_patcher_init = (_load_patcher, (student_path, clip_l_path, options))
    return ServedEncoder(clip, describe(clip, student.path.name, None if clip_l_path is None else Path(clip_l_path).name))


def _load_patcher(student_path: str, clip_l_path: str | None, options: ServingOptions, disable_dynamic: bool = False) -> Any:
    clip_l = None if clip_l_path is None else open_clip_l(Path(clip_l_path))
    return _build(open_student(student_path), clip_l, options, None, disable_dynamic).patcher


def _build(
    student: StudentFile,
    clip_l: dict[str, Tensor] | None,
    options: ServingOptions,
    progress: Progress | None,
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    dtype = options.dtype or usual_dtype(student.dtype, options.device)
    tensors = host_tensors(student, dtype, progress)
    state_dicts = [tensors] if clip_l is None else [clip_l, tensors]
    token_length = options.token_length or student.metadata.token_length
    tokenizer_data: dict[str, Any] = {"t5xxl_min_length": token_length}
    model_options: dict[str, Any] = {}
    if options.device is not None:
        model_options["load_device"] = options.device
        if options.device.type == "cpu":
            model_options["offload_device"] = options.device
    if clip_l is not None:
        tokenizer_data, model_options = long_clipl.model_options_long_clip(clip_l, tokenizer_data, model_options)
    target = SimpleNamespace(
        params={},
        tokenizer=FluxTokenizer,
        clip=functools.partial(
            DistilledFluxTextEncoder,
            layout=student.layout,
            metadata=student.metadata,
            token_length=token_length,
            student_dtype=dtype,
            has_clip_l=clip_l is not None,
        ),
    )
    return comfy.sd.CLIP(
        target,
        embedding_directory=list(options.embedding_folders),
        tokenizer_data=tokenizer_data,
        parameters=sum(comfy.utils.calculate_parameters(part) for part in state_dicts),
        state_dict=state_dicts,
        model_options=model_options,
        disable_dynamic=disable_dynamic,
    )


def usual_dtype(stored: torch.dtype, device: torch.device | None) -> torch.dtype:
    """The dtype in which the host would hold weights that are stored as `stored`: its flags for text encoders decide."""
    device = device or comfy.model_management.text_encoder_device()
    return comfy.model_management.pick_weight_dtype(stored, comfy.model_management.text_encoder_dtype(device), device)


def host_tensors(student: StudentFile, dtype: torch.dtype, progress: Progress | None) -> dict[str, Tensor]:
    """The student's checked tensors under the names of ComfyUI's T5, read by the host so that it can keep them in the file.

    Raises StudentFileError if a number is too large for `dtype`.
    """
    passes = 1 if dtype == student.dtype else 2
    told = progress or (lambda _done, _total: None)
    loaded = load_for_host(student.path, student.between(progress))
    tensors = student.checked(loaded, lambda done, total: told(done, passes * total))
    if dtype != student.dtype:
        names = len(tensors)
        tensors = in_dtype(tensors.items(), dtype, student.path.name, lambda done: told(names + done, passes * names))
    return {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}


def in_dtype(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, where: str, progress: Callable[[int], None]) -> dict[str, Tensor]:
    """Named tensors in another dtype. `progress(tensors done)` may raise to cancel.

    Raises StudentFileError that lists those with numbers too large for it; what was not finite before stays so.
    """
    held: dict[str, Tensor] = {}
    overflowed = []
    for done, (name, tensor) in enumerate(tensors, start=1):
        held[name] = tensor.to(dtype)
        if not_finite({name: held[name]}) and not not_finite({name: tensor}):
            overflowed.append(name)
        progress(done)
    if overflowed:
        raise StudentFileError(
            f"{where}: {len(overflowed)} tensors hold numbers that are too large for {FLOAT_NAMES[dtype]}.",
            f"set dtype to {'fp32' if dtype == torch.bfloat16 else 'bf16 or fp32'}.",
            listed(overflowed),
        )
    return held


def student_of(clip: Any) -> DistilledFluxTextEncoder:
    """The distilled encoder inside a CLIP. Raises ValueError if it is another kind of CLIP."""
    model = getattr(clip, "cond_stage_model", None)
    if not isinstance(model, DistilledFluxTextEncoder):
        raise ValueError(
            f"This CLIP is not a distilled T5 (it is a {type(model).__name__}).\nWhat to do: connect the CLIP of a Distilled T5 Loader."
        )
    return model


def metadata_in_use(clip: Any) -> StudentMetadata:
    """What a file of the student's weights, as they are in use, may say about itself: LoRAs and merges make them another encoder."""
    model = student_of(clip)
    changed = any(name.startswith(STUDENT_PREFIX) for name in clip.patcher.patches)
    return of_changed_weights(model.metadata) if changed else model.metadata


def student_tensors(clip: Any, dtype: torch.dtype | None = None, progress: Progress = lambda _done, _total: None) -> dict[str, Tensor]:
    """The student's weights by published name as they are in use, LoRAs and merges included; in `dtype` if it is given.

    `progress` is called between tensors with nothing done yet: it may raise to cancel.
    """
    count = len(student_of(clip).layout.tensors())

    def between_steps() -> None:
        progress(0, count)

    between_steps()
    weights = _weights_in_use(clip, between_steps)
    tensors = _published(weights, between_steps)
    if dtype is None:
        return dict(tensors)
    return in_dtype(tensors, dtype, "This CLIP", lambda _done: None)


def _weights_in_use(clip: Any, between_steps: Callable[[], None]) -> Mapping[str, Any]:
    """The host's state dict of a CLIP with patches applied, or with stand-ins that apply them."""
    # Hosts since 0.24 un-patch what they keep in another form (fp8, files) by state_dict_for_saving; before, patches had to be forced in.
    if hasattr(clip, "state_dict_for_saving"):
        clip.load_model()
        between_steps()
        return clip.state_dict_for_saving()
    comfy.model_management.load_models_gpu([clip.load_model()], force_patch_weights=True)
    between_steps()
    return clip.get_sd()


def _published(weights: Mapping[str, Any], between_steps: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
    """The student's weights of a host's state dict, one by one, by published name."""
    for name in weights:
        if name.startswith(STUDENT_PREFIX):
            between_steps()
            bare = name.removeprefix(STUDENT_PREFIX)
            # Weights that the host keeps elsewhere are stand-ins that only `.to("cpu")`, and nothing else, turns into patched numbers.
            tensor = weights[name].to("cpu").detach()
            yield bare if bare.startswith("final_projection.") else "encoder." + bare, tensor


def describe(clip: Any, student_name: str, clip_l_name: str | None) -> str:
    """What was loaded, for a person: size, parameters, resident megabytes, dtype, device, token length, pooled vector."""
    model = student_of(clip)
    weights = list(model.t5base.parameters())
    resident_mb = sum(weight.numel() * weight.element_size() for weight in weights) / 1e6
    widest = max(weights, key=torch.numel)
    memory = f"{resident_mb:.0f} MB as {FLOAT_NAMES[widest.dtype]}"
    pooled = f"CLIP-L from {clip_l_name}" if clip_l_name else "no CLIP-L: pooled vector of zeros"
    lines = [
        f"{model.layout.size_name} from {student_name}: {model.layout.parameters / 1e6:.1f} M parameters, {memory}",
        f"runs on {clip.patcher.load_device}, rests on {clip.patcher.offload_device}; prompts are padded to {model.token_length} tokens",
        f"text width {model.layout.output_width} ({FAMILIES[model.metadata.family].display_name}); {pooled}",
    ]
    if model.token_length != model.metadata.token_length:
        lines.append(f"note: trained at {model.metadata.token_length} tokens, used at {model.token_length} (padding reaches the picture)")
    return "\n".join(lines)
