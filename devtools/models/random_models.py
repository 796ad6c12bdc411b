"""Stand-in models: real file layouts, random weights, small enough for a laptop's CPU. Their images are coloured noise.

The student and CLIP-L have their real sizes, because ComfyUI fixes them; the VAE is the miniature's; the Flux models are 128 wide with
two blocks of each kind. The T5-XXL file has only its token table, its norms and the tensor by which ComfyUI detects it. ComfyUI leaves the
other weights as allocated: on Linux zero pages that never become resident, 0.35 GB instead of 9.5 GB (devtools/comfyui/server.py ensures
that the memory is fresh; patching the model, as a LoRA does, makes all of it resident).
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ...families import flux_tensors
from ...families.flux_tensors import HEAD_WIDTH, PATCH_VALUES, FluxLayout, Shapes, linear
from ...miniature.autoencoder import vae_tensors
from ...runtime.random_weights import drawn
from ...students.t5 import layout
from ...students.t5.layout import StudentLayout

Weights = dict[str, Tensor]

ROOT = Path(__file__).resolve().parents[2]
FLUX = FluxLayout(width=HEAD_WIDTH, double=2, single=2)
CLIP_WIDTH, CLIP_LAYERS, CLIP_VOCABULARY, CLIP_POSITIONS = 768, 12, 49408, 77
LORA_RANK = 1
IMAGE = "input/example.png"


def ensure_all(folder: Path) -> Path:
    """Write every stand-in below `folder` (models/<kind>/<name>, input/<name>) unless it is up to date; returns `folder`."""
    sources = (__file__, layout.__file__, flux_tensors.__file__)
    key, stamp = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest(), folder / "made-by.txt"
    if stamp.is_file() and stamp.read_text() == key and all((folder / name).is_file() for name in (*MODEL_FILES, IMAGE)):
        return folder
    print(f"Making stand-in models in {folder} ...", flush=True)
    for relative, make in MODEL_FILES.items():
        _write_aside(folder / relative, lambda path, make=make: save_file(make(), path))
    # For the ControlNet.
    _write_aside(folder / IMAGE, lambda path: Image.open(ROOT / "assets" / "icon.png").convert("RGB").resize((512, 512)).save(path, "PNG"))
    _write_aside(stamp, lambda path: path.write_text(key))
    return folder


def link_into(folder: Path, base: Path) -> None:
    """Add the stand-ins of `folder` to ComfyUI's base folder `base` as hard links, or as copies on another disk; existing files stay."""
    for relative in (*MODEL_FILES, IMAGE):
        target = base / relative
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            os.link(folder / relative, target)
            continue
        shutil.copy2(folder / relative, target)


def _write_aside(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    write(aside)
    aside.replace(path)


def _weights(shapes: Shapes, seed: int, dtype: torch.dtype = torch.bfloat16) -> Weights:
    return {name: weight.to(dtype) for name, weight in drawn(shapes, seed).items()}


def student() -> Weights:
    """A distilled T5-Base of full size in the published dialect, without metadata, as its authors publish it."""
    return _weights(StudentLayout.named("base").tensors(), seed=1)


def clip_l() -> Weights:
    """CLIP-L's text model; the last projection, which Flux does not use, is the identity."""
    weights = _weights(clip_l_shapes(), seed=2, dtype=torch.float16)
    return weights | {"text_projection.weight": torch.eye(CLIP_WIDTH, dtype=torch.float16)}


def clip_l_shapes(width: int = CLIP_WIDTH, layers: int = CLIP_LAYERS) -> Shapes:
    """Shapes of CLIP-L's text model without the last projection; other sizes are for benchmarks, which pass them to ComfyUI."""
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (CLIP_VOCABULARY, width),
        "text_model.embeddings.position_embedding.weight": (CLIP_POSITIONS, width),
    }
    for index in range(layers):
        layer = f"text_model.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{name}", width, width)
        shapes |= linear(f"{layer}.mlp.fc1", 4 * width, width) | linear(f"{layer}.mlp.fc2", width, 4 * width)
        shapes |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
    return shapes | _norm("text_model.final_layer_norm", width)


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def t5xxl() -> Weights:
    """The few tensors that make ComfyUI load a T5-XXL; see the top of this file for the rest."""
    shapes, layers = t5xxl_shapes(), StudentLayout.named("xxl").num_layers
    detected_by = f"encoder.block.{layers - 1}.layer.1.DenseReluDense.wi_1.weight"
    kept = {name: shape for name, shape in shapes.items() if "norm" in name or "bias" in name or "shared" in name}
    return _weights(kept, seed=3) | {detected_by: torch.zeros(shapes[detected_by], dtype=torch.bfloat16)}


def t5xxl_shapes() -> Shapes:
    """Shapes of T5-XXL by the names that the stock loader reads."""
    return {name.removeprefix("encoder."): shape for name, shape in StudentLayout.named("xxl", output_width=None).tensors().items()}


def flux_dev() -> Weights:
    """A small Flux with guidance embedding."""
    return _weights(replace(FLUX, guidance=True).tensors(), seed=4)


def flux_dev_fp8() -> Weights:
    """The same Flux with fp8 weights."""
    return {name: weight.to(torch.float8_e4m3fn) for name, weight in flux_dev().items()}


def flux_schnell() -> Weights:
    """A small Flux without guidance embedding."""
    return _weights(replace(FLUX, guidance=False).tensors(), seed=5)


def controlnet() -> Weights:
    """A ControlNet for the small Flux dev in XLabs' layout: two double blocks, a hint of pixels."""
    shapes = replace(FLUX, single=0).trunk() | linear("pos_embed_input", FLUX.width, PATCH_VALUES)
    for index in range(2):
        shapes |= linear(f"controlnet_blocks.{index}", FLUX.width, FLUX.width)
    for index, inputs in zip(range(0, 16, 2), (3, *(16,) * 7), strict=True):
        shapes |= {f"input_hint_block.{index}.weight": (16, inputs, 3, 3), f"input_hint_block.{index}.bias": (16,)}
    return _weights(shapes, seed=6)


def lora() -> Weights:
    """A LoRA with layers for the small Flux, for CLIP-L (kohya's names) and for the whole of T5-XXL (OneTrainer's names)."""
    layers = {"lora_unet_" + name: shape for name, shape in _matrices(FLUX.trunk(), "blocks.").items()}
    layers |= {"lora_te1_" + name: shape for name, shape in _matrices(clip_l_shapes(), "encoder.layers.").items()}
    t5_layers = {name: shape for name, shape in _matrices(t5xxl_shapes(), "encoder.block.").items() if "bias" not in name}
    layers |= {"lora_te2_" + name: shape for name, shape in t5_layers.items()}
    shapes: Shapes = {}
    for name, (outputs, inputs) in layers.items():
        shapes |= {f"{name}.lora_down.weight": (LORA_RANK, inputs), f"{name}.lora_up.weight": (outputs, LORA_RANK)}
    return _weights(shapes, seed=7) | {f"{name}.alpha": torch.tensor(0.1 * LORA_RANK) for name in layers}


def _matrices(shapes: Shapes, part: str) -> dict[str, tuple[int, int]]:
    """Linear layers whose name holds `part`, with underscores for dots as LoRA files have them."""
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight") and part in name}
    return {name.replace(".", "_"): (shape[0], shape[1]) for name, shape in layers.items() if len(shape) == 2}


MODEL_FILES: dict[str, Callable[[], Weights]] = {
    "models/text_encoders/distilled_t5_base.safetensors": student,
    "models/text_encoders/clip_l.safetensors": clip_l,
    "models/text_encoders/t5xxl_fp16.safetensors": t5xxl,
    "models/diffusion_models/flux1-dev.safetensors": flux_dev,
    "models/diffusion_models/flux1-dev-fp8-e4m3fn.safetensors": flux_dev_fp8,
    "models/diffusion_models/flux1-schnell.safetensors": flux_schnell,
    "models/vae/ae.safetensors": vae_tensors,
    "models/loras/FLUX-dev-lora-add_details.safetensors": lora,
    "models/controlnet/flux-canny-controlnet-v3.safetensors": controlnet,
}
