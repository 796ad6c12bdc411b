"""Stand-in models: real file layouts, random weights, small enough for a laptop's CPU. Pictures made with them are coloured noise.

The student, CLIP-L and the VAE have their real sizes, because ComfyUI fixes them; the Flux models are 128 wide with two blocks of each
kind. The T5-XXL file holds only its token embedding, its norms and the tensor by which ComfyUI knows it. The host leaves its other weights
as it allocated them: on Linux zero pages that never become resident, so that this costs 0.35 GB and not 9.5 GB (devtools/server.py sees to
it that the memory is fresh; patching the model, as a LoRA does, makes all of it real).
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

from ...families import flux_tensors as flux_layout
from ...families.flux_tensors import HEAD_WIDTH, PATCH_VALUES, FluxLayout, Shapes, linear
from ...students.t5 import layout
from ...students.t5.layout import StudentLayout

Weights = dict[str, Tensor]

STAMP_NAME = "stand-ins.json"
FLUX = FluxLayout(width=HEAD_WIDTH, double=2, single=2)
LATENT_CHANNELS = 16
CLIP_WIDTH, CLIP_LAYERS, CLIP_VOCABULARY, CLIP_POSITIONS = 768, 12, 49408, 77
VAE_WIDTH, VAE_ENCODED_RANGE = 64, 3.0
LORA_RANK = 1


def ensure_all(folder: Path) -> Path:
    """Write every stand-in below `folder` (models/<kind>/<name>, input/<name>) unless a stamp says that it is there; returns `folder`."""
    if not _stamp_matches(folder):
        print(f"Making stand-in models in {folder} ...", flush=True)
        for relative, make in MODEL_FILES.items():
            _write_aside(folder / relative, lambda path, make=make: save_file(make(), path))
        _write_aside(folder / "input" / "example.png", _draw_input_picture)
        sizes = {path: (folder / path).stat().st_size for path in _file_names()}
        stamp = json.dumps({"source": _source_hash(), "sizes": sizes}, indent=1)
        _write_aside(folder / STAMP_NAME, lambda path: path.write_text(stamp, encoding="utf-8"))
    return folder


def link_into(folder: Path, base: Path) -> None:
    """Show the stand-ins of `folder` in ComfyUI's base folder `base` as hard links, or as copies on another disk.

    Links of an earlier call are renewed; a file that somebody else put there, a real model, stays.
    """
    record = base / STAMP_NAME
    earlier = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for relative in _file_names():
        target = base / relative
        if target.exists() and target.stat().st_size != earlier.get(relative):
            continue
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(folder / relative, target)
        earlier[relative] = target.stat().st_size
    record.write_text(json.dumps(earlier, indent=1), encoding="utf-8")


def _link_or_copy(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)


def _file_names() -> list[str]:
    return [*MODEL_FILES, "input/example.png"]


def _stamp_matches(folder: Path) -> bool:
    stamp_path = folder / STAMP_NAME
    if not stamp_path.exists():
        return False
    stamp = json.loads(stamp_path.read_text(encoding="utf-8"))
    if stamp["source"] != _source_hash() or list(stamp["sizes"]) != _file_names():
        return False
    return all((folder / path).exists() and (folder / path).stat().st_size == size for path, size in stamp["sizes"].items())


def _source_hash() -> str:
    sources = (__file__, layout.__file__, flux_layout.__file__)
    return hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()


def _write_aside(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    write(aside)
    aside.replace(path)


def draw_weights(shapes: Shapes, seed: int, dtype: torch.dtype) -> Weights:
    """Random weights that keep activations near 1: norms 1, biases 0, embeddings of deviation 1, the rest of 1/sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    return {name: draw_weight(name, shape, generator).to(dtype) for name, shape in shapes.items()}


def draw_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """One of those weights, float32."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    deviation = 1.0 if "embedding" in name or "shared" in name else math.prod(shape[1:]) ** -0.5
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)


def student() -> Weights:
    """A distilled T5-Base of full size in the published dialect, without metadata, as its authors publish it."""
    return draw_weights(StudentLayout.named("base").tensors(), seed=1, dtype=torch.bfloat16)


def clip_l() -> Weights:
    """CLIP-L's text model, whose sizes are fixed in ComfyUI; the last projection, which Flux does not use, is the identity."""
    weights = draw_weights(clip_l_shapes(), seed=2, dtype=torch.float16)
    return weights | {"text_projection.weight": torch.eye(CLIP_WIDTH, dtype=torch.float16)}


def clip_l_shapes(width: int = CLIP_WIDTH, layers: int = CLIP_LAYERS) -> Shapes:
    """Every tensor of CLIP-L's text model but the last projection; other sizes are for benchmarks, the host must be told of them."""
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (CLIP_VOCABULARY, width),
        "text_model.embeddings.position_embedding.weight": (CLIP_POSITIONS, width),
    }
    for index in range(layers):
        layer = f"text_model.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{name}", width, width)
        shapes |= linear(f"{layer}.mlp.fc1", 4 * width, width) | linear(f"{layer}.mlp.fc2", width, 4 * width)
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
    return shapes | norm("text_model.final_layer_norm", width)


def norm(name: str, width: int) -> Shapes:
    """Shapes of a layer norm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def t5xxl() -> Weights:
    """The few tensors that make ComfyUI load a T5-XXL; see the top of this file for the rest."""
    whole = StudentLayout.named("xxl", output_width=None)
    telling = f"encoder.encoder.block.{whole.num_layers - 1}.layer.1.DenseReluDense.wi_1.weight"
    kept = {name: shape for name, shape in whole.tensors().items() if "norm" in name or "bias" in name or "shared" in name}
    weights = draw_weights(kept, seed=3, dtype=torch.bfloat16)
    weights[telling] = torch.zeros(whole.tensors()[telling], dtype=torch.bfloat16)
    return {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}


def flux_dev() -> Weights:
    """A small Flux with guidance embedding."""
    return _flux(guidance=True, seed=4)


def flux_schnell() -> Weights:
    """A small Flux without guidance embedding."""
    return _flux(guidance=False, seed=5)


def _flux(guidance: bool, seed: int) -> Weights:
    return draw_weights(replace(FLUX, guidance=guidance).tensors(), seed, torch.bfloat16)


def controlnet() -> Weights:
    """A ControlNet for the small Flux dev in XLabs' layout: two double blocks, a hint of pixels."""
    shapes = replace(FLUX, single=0).trunk() | linear("pos_embed_input", FLUX.width, PATCH_VALUES)
    for index in range(2):
        shapes |= linear(f"controlnet_blocks.{index}", FLUX.width, FLUX.width)
    for index, inputs in zip(range(0, 16, 2), (3, *(16,) * 7), strict=True):
        shapes |= {f"input_hint_block.{index}.weight": (16, inputs, 3, 3), f"input_hint_block.{index}.bias": (16,)}
    return draw_weights(shapes, seed=6, dtype=torch.bfloat16)


def lora() -> Weights:
    """A LoRA with layers for the small Flux, for CLIP-L (kohya's names) and for the whole of T5-XXL (OneTrainer's names)."""
    layers = {"lora_unet_" + name: shape for name, shape in _matrices(FLUX.trunk(), "blocks.").items()}
    layers |= {"lora_te1_" + name: shape for name, shape in _matrices(clip_l_shapes(), "encoder.layers.").items()}
    t5_shapes = {name.removeprefix("encoder."): shape for name, shape in StudentLayout.named("xxl", output_width=None).tensors().items()}
    t5_layers = {name: shape for name, shape in _matrices(t5_shapes, "encoder.block.").items() if "bias" not in name}
    layers |= {"lora_te2_" + name: shape for name, shape in t5_layers.items()}
    shapes: Shapes = {}
    for name, (outputs, inputs) in layers.items():
        shapes |= {f"{name}.lora_down.weight": (LORA_RANK, inputs), f"{name}.lora_up.weight": (outputs, LORA_RANK)}
    weights = draw_weights(shapes, seed=7, dtype=torch.bfloat16)
    return weights | {f"{name}.alpha": torch.tensor(0.1 * LORA_RANK) for name in layers}


def _matrices(shapes: Shapes, part: str) -> dict[str, tuple[int, int]]:
    """Linear layers whose name holds `part`, with underscores for dots as LoRA files have them."""
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight") and part in name}
    return {name.replace(".", "_"): (shape[0], shape[1]) for name, shape in layers.items() if len(shape) == 2}


def vae() -> Weights:
    """A TAESD of 16 latent channels written by hand: three of them carry red, green and blue of an 8 x 8 block.

    Encoding subsamples, decoding repeats; all residual blocks are zero, so that every layer hands its input on. The decoder inverts the
    encoder's range up to the layout's own clamp tanh(x/3)*3, whose error is 0.04 at the ends of the range.
    """
    inner = (VAE_WIDTH, VAE_WIDTH)
    encoder = {0: (3, VAE_WIDTH), 2: inner, 6: inner, 10: inner, 14: (VAE_WIDTH, LATENT_CHANNELS)}
    decoder = {1: (LATENT_CHANNELS, VAE_WIDTH), 7: inner, 12: inner, 17: inner, 19: (VAE_WIDTH, 3)}
    weights = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for index, (inputs, outputs) in encoder.items():
        gain = VAE_ENCODED_RANGE if index == 14 else 1.0
        weights |= tap(f"taesd_encoder.{index}", outputs, inputs, gain, offset={0: 0.0, 14: -VAE_ENCODED_RANGE / 2}.get(index))
    for index, (inputs, outputs) in decoder.items():
        gain = 1 / VAE_ENCODED_RANGE if index == 1 else 1.0
        weights |= tap(f"taesd_decoder.{index}", outputs, inputs, gain, offset={1: 0.5, 19: 0.0}.get(index))
    for index in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        weights |= idle_block(f"taesd_encoder.{index}")
    for index in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        weights |= idle_block(f"taesd_decoder.{index}")
    return weights


def tap(name: str, outputs: int, inputs: int, gain: float, offset: float | None) -> Weights:
    """A 3 x 3 convolution that hands the first three channels of its middle pixel on, times `gain`; `offset` None: no bias."""
    weight = torch.zeros(outputs, inputs, 3, 3)
    weight[range(3), range(3), 1, 1] = gain
    if offset is None:
        return {f"{name}.weight": weight}
    bias = torch.zeros(outputs)
    bias[:3] = offset
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def idle_block(name: str) -> Weights:
    """A residual block of TAESD that adds nothing."""
    shape = (VAE_WIDTH, VAE_WIDTH, 3, 3)
    return {
        key: tensor
        for index in (0, 2, 4)
        for key, tensor in ((f"{name}.conv.{index}.weight", torch.zeros(shape)), (f"{name}.conv.{index}.bias", torch.zeros(VAE_WIDTH)))
    }


def _draw_input_picture(path: Path) -> None:
    """A picture with clear edges for the ControlNet: a house under a sun."""
    picture = Image.new("RGB", (512, 512), (150, 190, 230))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 380, 512, 512), fill=(90, 140, 70))
    pen.rectangle((150, 240, 360, 420), fill=(200, 90, 60))
    pen.polygon(((130, 240), (255, 130), (380, 240)), fill=(120, 50, 40))
    pen.rectangle((230, 330, 285, 420), fill=(70, 45, 35))
    pen.ellipse((390, 50, 460, 120), fill=(250, 220, 90))
    picture.save(path, format="PNG")


MODEL_FILES: dict[str, Callable[[], Weights]] = {
    "models/text_encoders/distilled_t5_base.safetensors": student,
    "models/text_encoders/clip_l.safetensors": clip_l,
    "models/text_encoders/t5xxl_fp16.safetensors": t5xxl,
    "models/diffusion_models/flux1-dev.safetensors": flux_dev,
    "models/diffusion_models/flux1-schnell.safetensors": flux_schnell,
    "models/vae/ae.safetensors": vae,
    "models/loras/FLUX-dev-lora-add_details.safetensors": lora,
    "models/controlnet/flux-canny-controlnet-v3.safetensors": controlnet,
}
