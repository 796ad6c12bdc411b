"""Small encoders for tests in a ComfyUI: a distilled T5 or Qwen3 of three layers, CLIP-L, and the stock CLIP they are compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...encoder.files import write_student
from ...encoder.metadata import StudentMetadata
from ...encoder.served import ServedEncoder, ServingOptions, load_encoder
from ...families.family import Family
from ...students.kind import Layout
from ...students.qwen3.layout import Qwen3Layout
from ...students.t5.layout import StudentLayout

TINY = StudentLayout(d_model=64, d_ff=128, num_layers=3, num_heads=3, d_kv=16, hidden_width=96, projected_width=4096)
TINY_QWEN3 = Qwen3Layout(32, 64, num_layers=3, num_heads=4, num_kv_heads=2, hidden_width=96, projected_width=2560)
PROMPT = "a red cube left of a blue ball, with a sign that says hello"


def tiny(family: Family) -> Layout:
    """A small student of the family."""
    layout: Any = {"t5": TINY, "qwen3": TINY_QWEN3}[family.students[0]]
    return replace(layout, projected_width=family.text_width)


def random_tensors(layout: Layout, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights drawn as T5 draws its own (transformers' T5PreTrainedModel), so that attention is not saturated."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in layout.tensors().items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape, dtype=dtype)
            continue
        scale = 1.0 if "shared" in name or "embed_tokens" in name else shape[-1] ** -0.5
        if isinstance(layout, StudentLayout) and name.endswith(".q.weight"):
            scale *= layout.d_kv**-0.5
        tensors[name] = torch.randn(shape, generator=generator).mul_(scale).to(dtype)
    return tensors


def student_file(folder: Path, layout: Layout = TINY, name: str = "tiny.safetensors", seed: int = 0, **metadata: Any) -> Path:
    """A student of random weights, as our own writer leaves it."""
    path = folder / name
    dtype = metadata.pop("dtype", torch.float32)
    return path if path.exists() else write_student(path, random_tensors(layout, seed, dtype), StudentMetadata(**metadata))


def serve(path: Path, clip_l: Path | None = None, **options: Any) -> ServedEncoder:
    """The file as a CLIP, fp32 unless told otherwise."""
    options.setdefault("dtype", torch.float32)
    return load_encoder(str(path), {} if clip_l is None else {"clip_l": str(clip_l)}, ServingOptions(**options))


def stock_flux_clip(clip_l: Path) -> Any:
    """ComfyUI's own Flux CLIP: the same CLIP-L, and a T5-XXL reduced to one thin layer of full width."""
    # ComfyUI detects a T5-XXL by this tensor alone and leaves missing weights uninitialised, so every weight that is used is given here.
    known_by = {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": torch.zeros(8, 4096)}
    layout = StudentLayout(d_model=4096, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in random_tensors(layout).items()}
    config = {"num_layers": 1, "d_ff": 8, "num_heads": 1, "d_kv": 8}
    return comfy.sd.load_text_encoder_state_dicts(
        [comfy.utils.load_torch_file(str(clip_l), safe_load=True), tensors | known_by],
        clip_type=comfy.sd.CLIPType.FLUX,
        model_options={"t5xxl_model_config": config},
    )


def _known_t5xxl(_layout: Any) -> dict[str, Tensor]:
    return {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": torch.zeros(1).expand(10240, 4096)}


def _known_qwen3(layout: Any) -> dict[str, Tensor]:
    norms = {"post_attention_layernorm": layout.hidden_size, "self_attn.q_norm": 128}
    return {f"model.layers.0.{name}.weight": torch.ones(width) for name, width in norms.items()}


# By kind: the tensors by which ComfyUI detects the large encoder, and the sizes to which it is reduced.
STOCK: dict[str, tuple[Any, dict[str, int]]] = {
    "t5": (_known_t5xxl, {"num_layers": 1, "d_ff": 8, "num_heads": 1, "d_kv": 8}),
    "qwen3": (_known_qwen3, {"num_hidden_layers": 28, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}),
}


def stock_clip(family: Family, *companions: str) -> Any:
    """ComfyUI's own CLIP of the family's `clip_type`, of these files, with the tensors that identify them alone."""
    large, sizes = STOCK[family.kind.name]
    known_by = {
        family.part: large(family.teacher_layout),
        "clip_l": {f"text_model.encoder.layers.{layer}.mlp.fc1.weight": torch.zeros(8, 768) for layer in range(2)},
    }
    # Of three files ComfyUI makes the CLIP of SD3, whatever the type.
    needed = companions if family.companions_optional else family.companions
    return comfy.sd.load_text_encoder_state_dicts(
        [known_by[name] for name in (*needed, family.part)],
        clip_type=comfy.sd.CLIPType[family.clip_type],
        model_options={
            f"{family.part}_model_config": sizes,
            "clip_l_model_config": {"num_hidden_layers": 3, "intermediate_size": 8, "num_attention_heads": 4},
        },
    )


def alike(ours: list, theirs: list) -> None:
    """Two conditionings agree in everything but the numbers."""
    assert len(ours) == len(theirs)
    for (our_text, our_extras), (their_text, their_extras) in zip(ours, theirs, strict=True):
        assert (our_text.shape, our_text.dtype, our_text.device) == (their_text.shape, their_text.dtype, their_text.device)
        assert our_extras.keys() == their_extras.keys()
        for key, theirs_value in their_extras.items():
            if isinstance(theirs_value, torch.Tensor):
                mine = our_extras[key]
                assert (mine.shape, mine.dtype, mine.device) == (theirs_value.shape, theirs_value.dtype, theirs_value.device)
            else:
                assert our_extras[key] == theirs_value


def encode(clip: Any, text: str = PROMPT) -> Any:
    """The conditioning of the stock CLIPTextEncode node."""
    from nodes import CLIPTextEncode

    return CLIPTextEncode().encode(clip, text)[0]


def embedding(clip: Any, text: str = PROMPT) -> Tensor:
    """The text embedding [1, L, D] alone."""
    return encode(clip, text)[0][0]


def pooled(clip: Any, text: str = PROMPT) -> Tensor:
    """The pooled vector [1, P] alone."""
    return encode(clip, text)[0][1]["pooled_output"]
