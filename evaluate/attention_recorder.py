"""Follows a diffusion model while it samples, through ComfyUI's own wrappers, and keeps how much attention each image token pays to a word.

Two entry points of ComfyUI, both in 0.16.3 and in 0.30.0: a wrapper around the model knows what is sampled (text, size, step), and the
attention override inside it sees queries and keys of joint attention after the rotary embedding. Both hand on what they were given.
ComfyUI calls no override for PixArt's cross-attention: there, a hook on the module of each block computes queries and keys once more.

The family says which of the two it is. Image tokens are patches of 2 x 2; in joint attention they follow the text's tokens, and those of
reference images follow them.
"""

# B rows of a forward pass, N images, A heads, Q queries, K keys, D width of a head, L text tokens, H W rows and columns of image tokens

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..families import FAMILIES
from ..families.family import Family
from .attention import attention_on

KEY = "distilled_t5_attention"
OVERRIDE = "optimized_attention_override"
PATCH = 2
POSITIVE = 0
# A sampler with inner steps evaluates between two noise levels, and floats are compared.
SIGMA_TOLERANCE = 1e-5
# Some hundred kilobytes each; several samplers may run on one model before the first map is asked for.
KEPT_RUNS = 8


@dataclass
class Sampling:
    """One sampling: its result, float32 [N, C, h, w], and by step and image the sum [H, W] and number of its maps."""

    samples: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: int = 0
    sums: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict)

    def add(self, step: int, image: int, map_HW: Tensor) -> None:
        """Add a map. Maps of different sizes (areas, tiles) cancel the sum, which `map_of` refuses."""
        earlier, count = self.sums.get((step, image), (torch.zeros_like(map_HW), 0))
        fits = earlier.shape == map_HW.shape
        self.sums[step, image] = (earlier + map_HW, count + 1) if fits else (torch.empty(0), 0)


class AttentionRecorder:
    """What the sampled images attend to, for one prompt, known by its embeddings, and for positions of their rows."""

    def __init__(self, family: Family, word: str, positions: Sequence[int], embeddings: Sequence[Tensor]) -> None:
        self.family, self.word, self.positions = family, word, list(positions)
        self._embeddings = [embedding.reshape(-1, embedding.shape[-1]).cpu() for embedding in embeddings]
        self._runs: deque[Sampling] = deque(maxlen=KEPT_RUNS)
        self._now: Sampling | None = None

    def begin(self, steps: int) -> None:
        """A sampling starts."""
        self._now = Sampling(steps=steps)

    def end(self, samples: Tensor) -> None:
        """The current sampling gave these samples, and is kept."""
        assert self._now is not None, "the wrapper around sampling begins before it ends"
        self._now.samples = samples.detach().float().cpu().clone()
        self._runs.append(self._now)

    def forget(self) -> None:
        """No sampling is running any more; one that failed or was interrupted leaves nothing."""
        self._now = None

    def forward(self, call: Mapping[str, Any]) -> Forward | None:
        """What to record in a forward pass with these arguments; None if the prompt is not in it, or no sampling runs."""
        options, context_BLD = call.get("transformer_options", {}), call.get("c_crossattn")
        if self._now is None or context_BLD is None or "cond_or_uncond" not in options or "sample_sigmas" not in options:
            return None
        chunks, x_BCHW = options["cond_or_uncond"], call["x"]
        images = len(x_BCHW) // len(chunks)
        expected = [embedding.to(context_BLD) for embedding in self._embeddings]
        rows = [row for row in range(len(x_BCHW)) if _starts_with(context_BLD[row], expected)]
        if not rows:
            return None
        # A negative prompt of the same text is left out; guiders with more than two texts give the positive one another place.
        rows = [row for row in rows if chunks[row // images] == POSITIVE] or rows
        step = step_of(float(options["sigmas"][0]), options["sample_sigmas"].tolist())
        text, image = context_BLD.shape[1], _tokens(x_BCHW)
        together = text + image + sum(_tokens(latent) for latent in call.get("ref_latents") or [])
        first, lengths = (0, (image, text)) if self.family.cross_attention else (text, (together, together))
        return Forward(self.positions, rows, [row % images for row in rows], step, _grid(x_BCHW), first, lengths)

    def keep(self, forward: Forward) -> None:
        """Add what a forward pass has shown."""
        if self._now is None or forward.sum_BQ is None:
            return
        maps_BHW = (forward.sum_BQ / forward.blocks).cpu().reshape(-1, *forward.grid)
        for image, map_HW in zip(forward.images, maps_BHW, strict=True):
            self._now.add(forward.step, image, map_HW)

    def run_of(self, samples: Tensor) -> Sampling:
        """The last sampling that gave this latent. Raises ValueError if none is kept that did."""
        for run in reversed(self._runs):
            if run.samples.shape == samples.shape and torch.equal(run.samples.to(samples.dtype), samples.cpu()):
                return run
        raise ValueError(
            "This LATENT does not come from a sampler that ran on the MODEL of this ATTENTION, or that was too many samplings ago.\n"
            "What to do: connect the LATENT of the sampler behind the Cross-Attention Map; if it is, change its seed to sample again."
        )


@dataclass
class Forward:
    """One forward pass: rows to record and their images, step, rows and columns of image tokens, the first query that is one of them,
    numbers of queries and keys; and the sum of what its attention blocks have shown, [B, Q], over so many blocks."""

    positions: list[int]
    rows: list[int]
    images: list[int]
    step: int
    grid: tuple[int, int]
    first: int
    lengths: tuple[int, int]
    sum_BQ: Tensor | None = None
    blocks: int = 0

    def see(self, query_BAQD: Tensor, key_BAKD: Tensor, mask: Tensor | None = None) -> None:
        """Add the attention of one block; attention of other lengths is not that of image to text."""
        if (query_BAQD.shape[2], key_BAKD.shape[2]) != self.lengths:
            return
        of_image = slice(self.first, self.first + self.grid[0] * self.grid[1])
        mask = None if mask is None else _rows_of_mask(mask, self.rows, of_image)
        shares_BQ = attention_on(query_BAQD[self.rows, :, of_image], key_BAKD[self.rows], self.positions, mask)
        self.sum_BQ = shares_BQ if self.sum_BQ is None else self.sum_BQ + shares_BQ
        self.blocks += 1


def _rows_of_mask(mask: Tensor, rows: Sequence[int], queries: slice) -> Tensor:
    """Those rows and queries of a mask that ComfyUI broadcasts to [B, A, Q, K]."""
    mask = mask if mask.ndim == 4 else mask[:, None] if mask.ndim == 3 else mask[None, None]
    mask = mask[list(rows)] if mask.shape[0] > 1 else mask
    return mask[:, :, queries] if mask.shape[2] > 1 else mask


def _starts_with(context_LD: Tensor, embeddings: Sequence[Tensor]) -> bool:
    """Whether a text is one of these prompts, with nothing or something (a Redux image) appended."""
    return any(len(context_LD) >= len(one) and torch.equal(context_LD[: len(one)], one) for one in embeddings)


def _grid(latent_BCHW: Tensor) -> tuple[int, int]:
    """Rows and columns of image tokens of a latent, which is padded to complete patches."""
    return -(-latent_BCHW.shape[-2] // PATCH), -(-latent_BCHW.shape[-1] // PATCH)


def _tokens(latent_BCHW: Tensor) -> int:
    height, width = _grid(latent_BCHW)
    return height * width


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The step, from 0, whose noise levels enclose sigma; `sigmas` fall, one more than there are steps."""
    return max(0, sum(level >= sigma * (1 - SIGMA_TOLERANCE) for level in sigmas[:-1]) - 1)


def map_of(run: Sampling, step: int = 0) -> Tensor:
    """The maps [N, H, W] of a step from 1, or their mean over all steps for 0. Raises ValueError if there are none."""
    if not run.sums:
        raise ValueError(
            "The sampler did not get the prompt of the Cross-Attention Map as its positive conditioning.\n"
            "What to do: connect the CONDITIONING of that node to the sampler, through no node that changes its text."
        )
    if step > run.steps or step < 0:
        raise ValueError(f"There is no step {step}; the sampling had {run.steps}.\nWhat to do: set step to 1 to {run.steps}, or 0 for all.")
    seen = sorted({key for key, _ in run.sums})
    if step and step - 1 not in seen:
        raise ValueError(f"The prompt was not in use at step {step}.\nWhat to do: choose one of {', '.join(str(one + 1) for one in seen)}.")
    wanted = [step - 1] if step else seen
    per_image = [torch.stack([_mean(run, one, image) for one in wanted]).mean(dim=0) for image in range(len(run.samples))]
    return torch.stack(per_image)


def _mean(run: Sampling, step: int, image: int) -> Tensor:
    total, count = run.sums.get((step, image), (torch.empty(0), 0))
    if not count or total.shape != _grid(run.samples):
        raise ValueError(
            "The prompt was sampled in areas or tiles, or for a part of the batch only, so no map covers the image.\n"
            "What to do: give the sampler the CONDITIONING of the Cross-Attention Map for the complete image."
        )
    return total / count


def followed_family(model: Any) -> Family:
    """The family of a model patcher, of those whose attention is known. Raises ValueError for another kind of model."""
    network = type(model.get_model_object("diffusion_model"))
    found = next((family for family in FAMILIES.values() if family.network == f"{network.__module__}.{network.__qualname__}"), None)
    if found is None:
        known = ", ".join(family.display_name for family in FAMILIES.values() if family.network)
        raise ValueError(
            f"Attention maps work for {known}; this MODEL is a {network.__name__}.\nWhat to do: connect the MODEL of one of these families."
        )
    return found


def recording_model(model: Any, recorder: AttentionRecorder) -> Any:
    """A clone of a model patcher whose samplings the recorder follows."""
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, around_sampling(recorder))
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, around_model(recorder))
    return clone


def _by_name(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}


def around_sampling(recorder: AttentionRecorder) -> Callable[..., Tensor]:
    """A wrapper of ComfyUI's `outer_sample`. A function, as ComfyUI deep-copies objects in a model's options."""

    def sample(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        recorder.begin(len(_by_name(executor.original, args, kwargs)["sigmas"]) - 1)
        try:
            samples = executor(*args, **kwargs)
            recorder.end(samples)
        finally:
            recorder.forget()
        return samples

    return sample


def around_model(recorder: AttentionRecorder) -> Callable[..., Tensor]:
    """A wrapper of ComfyUI's `apply_model` that shows its attention to the recorder while it lasts."""

    def run(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        call = _by_name(executor.original, args, kwargs)
        forward = recorder.forward(call)
        if forward is None:
            return executor(*args, **kwargs)
        options = call["transformer_options"]
        changed = {**options, OVERRIDE: watching(forward, options.get(OVERRIDE))}
        args = tuple(changed if value is options else value for value in args)
        kwargs = {name: changed if value is options else value for name, value in kwargs.items()}
        with cross_attention_shown(executor.class_obj.diffusion_model, recorder.family, forward):
            denoised = executor(*args, **kwargs)
        recorder.keep(forward)
        return denoised

    return run


def watching(forward: Forward, earlier: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """An attention override that shows queries and keys to `forward` and leaves attention to ComfyUI, or to an earlier override."""

    def attend(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        query, key = args[:2]
        if not kwargs.get("skip_reshape"):
            query, key = (by_head(each, kwargs["heads"] if "heads" in kwargs else args[3]) for each in (query, key))
        forward.see(query, key, kwargs.get("mask"))
        return original(*args, **kwargs) if earlier is None else earlier(original, *args, **kwargs)

    return attend


def by_head(each: Tensor, heads: int) -> Tensor:
    """Queries or keys [B, L, A x D] as [B, A, L, D]."""
    return each.unflatten(-1, (heads, -1)).transpose(1, 2)


@contextlib.contextmanager
def cross_attention_shown(network: Any, family: Family, forward: Forward) -> Iterator[None]:
    """Show queries and keys of the blocks' cross-attention to `forward` while the context is open, where the family has one."""
    with contextlib.ExitStack() as stack:
        for block in (block for name in family.block_lists for block in getattr(network, name)) if family.cross_attention else ():
            attention = getattr(block, family.cross_attention[0])
            show = functools.partial(_show_cross_attention, forward, family.cross_attention[1:])
            stack.callback(attention.register_forward_pre_hook(show).remove)
        yield


def _show_cross_attention(forward: Forward, layers: Sequence[str], attention: Any, inputs: tuple[Tensor, ...]) -> None:
    """Text comes as one sequence [1, B x L, D]; keys stand before values."""
    image_BQD, text_1LD = inputs[:2]
    to_query, to_key_and_value = (getattr(attention, name) for name in layers)
    key_BKD = to_key_and_value(text_1LD).chunk(2, dim=-1)[0].reshape(len(image_BQD), -1, image_BQD.shape[-1])
    forward.see(by_head(to_query(image_BQD), attention.num_heads), by_head(key_BKD, attention.num_heads))
