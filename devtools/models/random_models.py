"""Stand-in models: real file layouts, random weights, small enough for a laptop's CPU. Their images are coloured noise.

The student and CLIP-L have their real sizes, because ComfyUI fixes them; the VAE is the miniature's; the Flux models are 128 wide with
two blocks of each kind. The T5-XXL file has only its token table, its norms and the tensor by which ComfyUI detects it. ComfyUI leaves the
other weights as allocated: on Linux zero pages that never become resident, 0.35 GB instead of 9.5 GB (devtools/comfyui/server.py ensures
that the memory is fresh; patching the model, as a LoRA does, makes all of it resident).

Stable Diffusion 3.5 is 128 wide, PixArt has one block; they have random weights. Chroma and CLIP-G have sizes that ComfyUI fixes, so most
of their weights are zeros, which take no room on the disk.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...encoder.files import write_student
from ...encoder.metadata import StudentMetadata
from ...encoder.needed_tensors import NAMINGS
from ...families import FAMILIES, flux_tensors
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
# What ComfyUI fixes: the widths of PixArt and of Chroma's guidance layer. A Stable Diffusion 3.5 has as many blocks as its width has 64s.
SD35_WIDTH, PIXART_WIDTH, CHROMA_GUIDE_WIDTH = 128, 1152, 5120
IMAGE = "input/example.png"
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


def ensure_all(folder: Path) -> Path:
    """Write every stand-in below `folder` (models/<kind>/<name>, input/<name>) unless it is up to date; returns `folder`."""
    sources = (__file__, layout.__file__, flux_tensors.__file__)
    key, stamp = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest(), folder / "made-by.txt"
    if stamp.is_file() and stamp.read_text() == key and all((folder / name).is_file() for name in FILES):
        return folder
    print(f"Making stand-in models in {folder} ...", flush=True)
    for relative, make in MODEL_FILES.items():
        _write_aside(folder / relative, lambda path, make=make: _save(make(), path))
    for relative, (family, pooled) in STUDENTS.items():
        metadata = StudentMetadata(family=family.name, token_length=family.token_length, pooled=pooled)
        write_student(folder / relative, _weights(SMALL_STUDENT.tensors(), seed=11), metadata)
    # For the ControlNet.
    _write_aside(folder / IMAGE, lambda path: Image.open(ROOT / "assets" / "icon.png").convert("RGB").resize((512, 512)).save(path, "PNG"))
    _write_aside(stamp, lambda path: path.write_text(key))
    return folder


def link_into(folder: Path, base: Path) -> None:
    """Add the stand-ins of `folder` to ComfyUI's base folder `base` as hard links, or as copies on another disk; existing files stay."""
    for relative in FILES:
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


def _save(weights: Weights, path: Path) -> None:
    """Write a safetensors file in which tensors of zeros are holes."""
    header, end = {}, 0
    for name, weight in weights.items():
        begin, end = end, end + weight.numel() * weight.element_size()
        header[name] = {"dtype": SAFETENSORS_NAMES[weight.dtype], "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            content = weight.contiguous().reshape(-1).view(torch.uint8).numpy()
            if content.any():
                file.write(content.data)
            else:
                file.seek(content.nbytes, os.SEEK_CUR)
        file.truncate()


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


def sd35() -> Weights:
    """A checkpoint of a small Stable Diffusion 3.5 for images of up to 1024 pixels, with the VAE."""
    width, patches = SD35_WIDTH, (1024 // 16) ** 2
    shapes: Shapes = {"pos_embed": (1, patches, width), "x_embedder.proj.weight": (width, 16, 2, 2), "x_embedder.proj.bias": (width,)}
    for name, inputs in {"y_embedder": 2048, "t_embedder": 256}.items():
        shapes |= linear(f"{name}.mlp.0", width, inputs) | linear(f"{name}.mlp.2", width, width)
    shapes |= linear("context_embedder", width, 4096) | linear("final_layer.linear", PATCH_VALUES, width)
    shapes |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    last = SD35_WIDTH // 64 - 1
    for block in range(last + 1):
        for stream in ("context_block", "x_block"):
            shapes |= _sd35_stream(f"joint_blocks.{block}.{stream}", width, only_first=stream == "context_block" and block == last)
    diffusion = {f"model.diffusion_model.{name}": weight for name, weight in _weights(shapes, seed=8).items()}
    return diffusion | {f"first_stage_model.{name}": weight for name, weight in vae_tensors().items()}


def _sd35_stream(name: str, width: int, only_first: bool) -> Shapes:
    """One stream of a joint block; with `only_first`, no more than its keys and values are used."""
    shapes = linear(f"{name}.attn.qkv", 3 * width, width) | linear(f"{name}.adaLN_modulation.1", (2 if only_first else 6) * width, width)
    shapes |= {f"{name}.attn.{norm}.weight": (64,) for norm in ("ln_q", "ln_k")}
    if only_first:
        return shapes
    shapes |= linear(f"{name}.attn.proj", width, width)
    return shapes | linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)


def pixart(alpha: bool) -> Weights:
    """A PixArt of one block, by the names of diffusers; alpha has embedders of the image's size and shape."""
    width, times, block = PIXART_WIDTH, "adaln_single.emb", "transformer_blocks.0"
    shapes: Shapes = {"pos_embed.proj.weight": (width, 4, 2, 2), "pos_embed.proj.bias": (width,), "scale_shift_table": (2, width)}
    shapes |= linear(f"{times}.timestep_embedder.linear_1", width, 256) | linear(f"{times}.timestep_embedder.linear_2", width, width)
    for name in ("resolution_embedder", "aspect_ratio_embedder") if alpha else ():
        shapes |= linear(f"{times}.{name}.linear_1", width // 3, 256) | linear(f"{times}.{name}.linear_2", width // 3, width // 3)
    shapes |= linear("caption_projection.linear_1", width, 4096) | linear("caption_projection.linear_2", width, width)
    shapes |= linear("adaln_single.linear", 6 * width, width) | linear("proj_out", 32, width) | {f"{block}.scale_shift_table": (6, width)}
    for attention in ("attn1", "attn2"):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= linear(f"{block}.{attention}.{part}", width, width)
    return _weights(shapes | linear(f"{block}.ff.net.0.proj", 4 * width, width) | linear(f"{block}.ff.net.2", width, 4 * width), seed=9)


def chroma() -> Weights:
    """A Chroma of two blocks. Only what embeds and returns the image has weights other than zeros: it returns noise."""
    full = FluxLayout(double=1, single=1)
    others = ("_in.in_layer", "_in.out_layer", "_mod.lin", "modulation.lin", "adaLN_modulation")
    shapes = {name: shape for name, shape in full.tensors().items() if not any(part in name for part in others)}
    guide, width = "distilled_guidance_layer", CHROMA_GUIDE_WIDTH
    shapes |= linear(f"{guide}.in_proj", width, 64) | linear(f"{guide}.out_proj", full.width, width)
    for index in range(5):
        shapes |= linear(f"{guide}.layers.{index}.in_layer", width, width) | linear(f"{guide}.layers.{index}.out_layer", width, width)
        shapes |= {f"{guide}.norms.{index}.scale": (width,)}
    drawn_ones = {name: shape for name, shape in shapes.items() if name.startswith(("img_in", "final_layer"))}
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()} | _weights(drawn_ones, seed=10)


def clip_g() -> Weights:
    """CLIP-G's text model, all zeros."""
    naming = NAMINGS["clip_g"][1]
    return {name: torch.zeros(shape, dtype=torch.float16) for name, shape in naming.needed({naming.positions: (77, 1280)}).items()}


def vae_of_four_channels() -> Weights:
    """The VAE with the first four channels of its latent alone, as Stable Diffusion 1.5 and XL have."""
    weights = vae_tensors()
    first, last = "taesd_decoder.1.weight", "taesd_encoder.14"
    kept = {first: weights[first][:, :4]} | {f"{last}.{part}": weights[f"{last}.{part}"][:4] for part in ("weight", "bias")}
    return weights | kept


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
    "models/text_encoders/clip_g.safetensors": clip_g,
    "models/checkpoints/sd3.5_medium.safetensors": sd35,
    "models/diffusion_models/pixart_sigma_1024_ms.safetensors": lambda: pixart(alpha=False),
    "models/diffusion_models/pixart_alpha_1024_ms.safetensors": lambda: pixart(alpha=True),
    "models/diffusion_models/Chroma1-HD.safetensors": chroma,
    "models/vae/ae.safetensors": vae_tensors,
    "models/vae/sdxl_vae.safetensors": vae_of_four_channels,
    "models/vae/vae-ft-mse-840000-ema-pruned.safetensors": vae_of_four_channels,
    "models/loras/FLUX-dev-lora-add_details.safetensors": lora,
    "models/controlnet/flux-canny-controlnet-v3.safetensors": controlnet,
}
# Students of the other families, by the names that recipes give them: small ones, with their family and companions in their metadata.
SMALL_STUDENT = StudentLayout(d_model=64, d_ff=128, num_layers=2, num_heads=2, d_kv=32, hidden_width=64, projected_width=4096)
STUDENTS = {
    "models/text_encoders/distilled_t5_base_sd35_medium.safetensors": (FAMILIES["sd3"], "clip_l+clip_g"),
    "models/text_encoders/distilled_t5_base_pixart_sigma.safetensors": (FAMILIES["pixart_sigma"], "zero"),
    "models/text_encoders/distilled_t5_base_pixart_alpha.safetensors": (FAMILIES["pixart_alpha"], "zero"),
    "models/text_encoders/distilled_t5_base_chroma.safetensors": (FAMILIES["chroma"], "zero"),
}
FILES = (*MODEL_FILES, *STUDENTS, IMAGE)
