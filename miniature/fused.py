"""The Flux's forward pass for training, written without changes in place, so that its gradients are right and torch.compile can fuse it.

ComfyUI's module keeps the weights and is what every picture is drawn with; `velocity` is its forward pass for the miniature's case alone:
no masks, no patches, a pooled vector of zeros. tests/comfyui/test_miniature.py holds the two together.
"""

# B batch, C H W latent, L text tokens, N latent and text tokens, D width, M modulation

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.flux.layers import timestep_embedding
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention, silu

PATCH = 2
NORM_EPSILON = 1e-6


def velocity(flux: Any, x_BCHW: Tensor, sigma_B: Tensor, text_BLD: Tensor, guidance_B: Tensor) -> Tensor:
    """The velocity [B, C, H, W] of a Flux of the miniature; `flux` is ComfyUI's module in float32."""
    vec_BD = _embedded(flux.time_in, sigma_B) + _embedded(flux.guidance_in, guidance_B) + _of_nothing(flux.vector_in)
    vec_BD = silu(vec_BD)
    pairs_ND = rotations(flux, text_BLD.shape[1], x_BCHW.shape[2] // PATCH, x_BCHW.shape[3] // PATCH)
    image_BND, text_BND = _apply(flux.img_in, _patches(x_BCHW)), _apply(flux.txt_in, text_BLD)
    for block in flux.double_blocks:
        image_BND, text_BND = _double(block, image_BND, text_BND, vec_BD, pairs_ND)
    both_BND = torch.cat([text_BND, image_BND], dim=1)
    for block in flux.single_blocks:
        both_BND = _single(block, both_BND, vec_BD, pairs_ND)
    shift_BD, scale_BD = _apply(flux.final_layer.adaLN_modulation[1], vec_BD).unsqueeze(1).chunk(2, dim=-1)
    out_BND = _apply(flux.final_layer.linear, _modulated(both_BND[:, text_BLD.shape[1] :], shift_BD, scale_BD))
    return _picture(out_BND, x_BCHW)


def _apply(layer: Any, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _embedded(embedder: Any, value_B: Tensor) -> Tensor:
    return _apply(embedder.out_layer, silu(_apply(embedder.in_layer, timestep_embedding(value_B, embedder.in_layer.in_features))))


def _of_nothing(embedder: Any) -> Tensor:
    """What a pooled vector of zeros comes to, [D]."""
    return _apply(embedder.out_layer, silu(embedder.in_layer.bias))


def rotations(flux: Any, text_tokens: int, rows: int, columns: int) -> Tensor:
    """Cosines and sines of the rotary embedding, [2, N, head width / 2]: text stands at the origin, latent tokens in rows and columns."""
    ids_N3 = torch.zeros(text_tokens + rows * columns, 3)
    ids_N3[text_tokens:, 1] = torch.arange(rows).repeat_interleave(columns)
    ids_N3[text_tokens:, 2] = torch.arange(columns).repeat(rows)
    angles = []
    for axis, width in enumerate(flux.params.axes_dim):
        rate = flux.params.theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(ids_N3[:, axis, None] * rate)
    angles_ND = torch.cat(angles, dim=-1)
    return torch.stack([angles_ND.cos(), angles_ND.sin()]).float()


def _patches(x_BCHW: Tensor) -> Tensor:
    b, c, h, w = x_BCHW.shape
    cut = x_BCHW.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(b, h * w // PATCH**2, c * PATCH**2)


def _picture(out_BND: Tensor, like_BCHW: Tensor) -> Tensor:
    b, c, h, w = like_BCHW.shape
    return out_BND.reshape(b, h // PATCH, w // PATCH, c, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def _modulated(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    return layer_norm(x_BND, x_BND.shape[-1:], eps=NORM_EPSILON) * (1 + scale_B1D) + shift_B1D


def _parts(modulation: Any, vec_BD: Tensor) -> tuple[Tensor, ...]:
    """Shifts, scales and gates, [B, 1, D] each."""
    return _apply(modulation.lin, vec_BD).unsqueeze(1).chunk(modulation.multiplier, dim=-1)


def _evens_first(rows: Tensor, heads: int) -> Tensor:
    """Rows that make heads, the even ones of each head before the odd ones.

    In queries and keys alike that leaves every product as it is, and the rotary embedding turns halves instead of neighbours, which
    vectorises.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _projected(layer: Any, x_BND: Tensor, heads: int) -> Tensor:
    """Queries, keys (evens first), values, and whatever else the layer gives."""
    width = 2 * x_BND.shape[-1]
    weight, bias = (torch.cat([_evens_first(part[:width], 2 * heads), part[width:]]) for part in (layer.weight, layer.bias))
    return linear(x_BND, weight, bias)


def _heads(qkv_BND: Tensor, norm: Module, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    b, n, width = qkv_BND.shape
    q, k, v = qkv_BND.reshape(b, n, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    return _normed(q, norm.query_norm), _normed(k, norm.key_norm), v


def _normed(x: Tensor, norm: Any) -> Tensor:
    return rms_norm(x, x.shape[-1:], _evens_first(norm.weight, 1), norm.eps)


def _rotated(x: Tensor, pairs_ND: Tensor) -> Tensor:
    cos_ND, sin_ND = pairs_ND
    even, odd = x.chunk(2, dim=-1)
    return torch.cat([cos_ND * even - sin_ND * odd, sin_ND * even + cos_ND * odd], dim=-1)


def _attended(q: Tensor, k: Tensor, v: Tensor, pairs_ND: Tensor) -> Tensor:
    out = scaled_dot_product_attention(_rotated(q, pairs_ND), _rotated(k, pairs_ND), v)
    return out.transpose(1, 2).flatten(2)


def _double(block: Any, image_BND: Tensor, text_BND: Tensor, vec_BD: Tensor, pairs_ND: Tensor) -> tuple[Tensor, Tensor]:
    image_parts, text_parts = _parts(block.img_mod, vec_BD), _parts(block.txt_mod, vec_BD)
    heads = block.num_heads
    image_qkv = _heads(_projected(block.img_attn.qkv, _modulated(image_BND, *image_parts[:2]), heads), block.img_attn.norm, heads)
    text_qkv = _heads(_projected(block.txt_attn.qkv, _modulated(text_BND, *text_parts[:2]), heads), block.txt_attn.norm, heads)
    q, k, v = (torch.cat([of_text, of_image], dim=2) for of_text, of_image in zip(text_qkv, image_qkv, strict=True))
    attended_BND = _attended(q, k, v, pairs_ND)
    length = text_BND.shape[1]
    image_BND = image_BND + image_parts[2] * _apply(block.img_attn.proj, attended_BND[:, length:])
    text_BND = text_BND + text_parts[2] * _apply(block.txt_attn.proj, attended_BND[:, :length])
    return _fed_forward(block.img_mlp, image_BND, image_parts[3:]), _fed_forward(block.txt_mlp, text_BND, text_parts[3:])


def _fed_forward(mlp: Any, x_BND: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    shift, scale, gate = parts
    return x_BND + gate * _apply(mlp[2], gelu(_apply(mlp[0], _modulated(x_BND, shift, scale)), approximate="tanh"))


def _single(block: Any, x_BND: Tensor, vec_BD: Tensor, pairs_ND: Tensor) -> Tensor:
    shift, scale, gate = _parts(block.modulation, vec_BD)
    inner = _projected(block.linear1, _modulated(x_BND, shift, scale), block.num_heads)
    width = 3 * x_BND.shape[-1]
    attended_BND = _attended(*_heads(inner[..., :width], block.norm, block.num_heads), pairs_ND)
    return x_BND + gate * _apply(block.linear2, torch.cat([attended_BND, gelu(inner[..., width:], approximate="tanh")], dim=-1))
