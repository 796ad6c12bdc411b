"""Follows a Flux while it samples, through ComfyUI's own wrappers, and keeps how much attention each image token pays to a word.

Two entry points of ComfyUI, both in 0.16.3 and in 0.30.0: a wrapper around the forward pass knows what is sampled (text, size, step), and
the attention override inside it sees queries and keys after the rotary embedding. Both hand on what they were given.

This file alone knows how a Flux computes: joint attention of text tokens, then image tokens in patches of 2 x 2, then those of reference
images, in every block of the model class that `recording_model` checks.
"""

# B rows of a forward pass, N images, A heads, Q queries, K keys, D width of a head, L text tokens, H W rows and columns of image tokens

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
    """What the sampled images attend to, for one prompt, known by its embeddings, and for positions of its tokens."""

    def __init__(self, word: str, positions: Sequence[int], embeddings: Sequence[Tensor]) -> None:
        self.word, self.positions = word, list(positions)
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
        options = call.get("transformer_options", {})
        if self._now is None or "cond_or_uncond" not in options or "sample_sigmas" not in options:
            return None
        chunks, x_BCHW, context_BLD = options["cond_or_uncond"], call["x"], call["context"]
        images = len(x_BCHW) // len(chunks)
        expected = [embedding.to(context_BLD) for embedding in self._embeddings]
        rows = [row for row in range(len(x_BCHW)) if _starts_with(context_BLD[row], expected)]
        if not rows:
            return None
        # A negative prompt of the same text is left out; guiders with more than two texts give the positive one another place.
        rows = [row for row in rows if chunks[row // images] == POSITIVE] or rows
        step = step_of(float(options["sigmas"][0]), options["sample_sigmas"].tolist())
        references = sum(_tokens(latent) for latent in call.get("ref_latents") or [])
        return Forward(self.positions, rows, [row % images for row in rows], step, context_BLD.shape[1], _grid(x_BCHW), references)

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
    """One forward pass: rows to record and their images, step, text tokens, image tokens, tokens of reference images; and the sum of what
    its attention blocks have shown, [B, Q], over so many blocks."""

    positions: list[int]
    rows: list[int]
    images: list[int]
    step: int
    text_tokens: int
    grid: tuple[int, int]
    reference_tokens: int
    sum_BQ: Tensor | None = None
    blocks: int = 0

    def see(self, query_BAQD: Tensor, key_BAKD: Tensor, mask: Tensor | None) -> None:
        """Add the attention of one block; attention that is not over all tokens of text and image is not a block's."""
        image_tokens = self.grid[0] * self.grid[1]
        if query_BAQD.ndim != 4 or {query_BAQD.shape[2], key_BAKD.shape[2]} != {self.text_tokens + image_tokens + self.reference_tokens}:
            return
        of_image = slice(self.text_tokens, self.text_tokens + image_tokens)
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


def recording_model(model: Any, recorder: AttentionRecorder) -> Any:
    """A clone of a Flux model patcher whose samplings the recorder follows. Raises ValueError for another kind of model."""
    from comfy.ldm.flux.model import Flux
    from comfy.patcher_extension import WrappersMP

    network = model.get_model_object("diffusion_model")
    if not isinstance(network, Flux):
        raise ValueError(
            f"Attention maps need a Flux model; this MODEL is a {type(network).__name__}.\nWhat to do: connect the MODEL of a Flux."
        )
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, around_sampling(recorder))
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, around_forward(recorder))
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


def around_forward(recorder: AttentionRecorder) -> Callable[..., Tensor]:
    """A wrapper of the diffusion model's forward pass that adds an attention override while it lasts."""

    def run(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        call = _by_name(executor.original, args, kwargs)
        forward = recorder.forward(call)
        if forward is None:
            return executor(*args, **kwargs)
        options = call["transformer_options"]
        changed = {**options, OVERRIDE: watching(forward, options.get(OVERRIDE))}
        args = tuple(changed if value is options else value for value in args)
        kwargs = {name: changed if value is options else value for name, value in kwargs.items()}
        velocity = executor(*args, **kwargs)
        recorder.keep(forward)
        return velocity

    return run


def watching(forward: Forward, earlier: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """An attention override that shows queries and keys to `forward` and leaves attention to ComfyUI, or to an earlier override."""

    def attend(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("skip_reshape"):
            query, key = args[:2]
            forward.see(query, key, kwargs.get("mask"))
        return original(*args, **kwargs) if earlier is None else earlier(original, *args, **kwargs)

    return attend
