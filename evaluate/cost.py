"""The cost of a text encoder in ComfyUI: parameters, bytes, and the time to load it, to encode, and to change the prompt."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..encoder.prompt_length import encoder_tokens, tokenized
from ..runtime.accelerator import device_name, timed
from ..runtime.progress import Progress
from .annotate import table_image

if TYPE_CHECKING:
    from PIL import Image

HEADING = ("encoder", "parameters", "weights", "tokens", "runs on", "kept on", "load", "encode", "prompt change")
EVERYTHING = 1e30  # bytes


@dataclass(frozen=True)
class Cost:
    """An encoder's name; parameters and their bytes; T5 tokens of the prompt, padding included; devices; seconds of each repetition."""

    name: str
    parameters: int
    resident_bytes: int
    tokens: int
    runs_on: str
    kept_on: str
    load_s: tuple[float, ...]
    encode_s: tuple[float, ...]
    prompt_change_s: tuple[float, ...]


def encoder_name(clip: Any) -> str:
    """A short name for a CLIP: the size of a distilled T5, else ComfyUI's names of its parts."""
    model = clip.cond_stage_model
    layout, clip_l = getattr(model, "layout", None), getattr(model, "clip_l", None)
    if layout is not None:
        return layout.size_name + (" + CLIP-L" if clip_l is not None and any(True for _ in clip_l.parameters()) else "")
    return " + ".join(name for name, _ in model.named_children()) or type(model).__name__


def different_names(names: Sequence[str]) -> list[str]:
    """The names, numbered where one repeats."""
    return [name if name not in names[:place] else f"{name} ({names[: place + 1].count(name)})" for place, name in enumerate(names)]


def measure(clip: Any, name: str, prompt: str, repeats: int, progress: Progress | None = None) -> Cost:
    """Measure a CLIP of ComfyUI; `progress(done, total)` may raise to cancel. Other models stay where they are.

    load: from the device that keeps the encoder to the one that runs it. encode: from the prompt to its conditioning, with the encoder
    loaded; an uncounted one comes first. prompt change: both together, as after sampling an image.
    """

    def encode() -> None:
        clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

    tokens, patcher = len(encoder_tokens(clip, tokenized(clip, prompt))), clip.patcher
    report, device = progress or (lambda _done, _total: None), patcher.load_device
    kinds: list[tuple[Callable[[], Any], bool]] = [(clip.load_model, True), (encode, False), (encode, True)]
    times, total = [list[float]() for _ in kinds], len(kinds) * repeats
    report(0, total)
    encode()
    for done in range(total):
        kind = done % len(kinds)
        action, unloaded = kinds[kind]
        if unloaded:
            unload(clip)
        times[kind].append(timed(action, device)[0])
        report(done + 1, total)
    sizes = (sum(weight.numel() for weight in clip.cond_stage_model.parameters()), patcher.model_size(), tokens)
    return Cost(name, *sizes, str(patcher.load_device), str(patcher.offload_device), *map(tuple, times))


def unload(clip: Any) -> None:
    """Unload an encoder, and nothing else, from the device that it runs on."""
    import comfy.model_management

    others = [loaded for loaded in comfy.model_management.current_loaded_models if loaded.model is not clip.patcher]
    comfy.model_management.free_memory(EVERYTHING, clip.patcher.load_device, keep_loaded=others)


def rows(costs: Sequence[Cost]) -> list[list[str]]:
    """A heading and a row for each encoder."""
    return [list(HEADING), *(_row(cost) for cost in costs)]


def _row(cost: Cost) -> list[str]:
    from statistics import median  # ComfyUI does not import it at its start

    times = (cost.load_s, cost.encode_s, cost.prompt_change_s)
    return [
        cost.name,
        f"{cost.parameters / 1e6:,.1f} M",
        f"{cost.resident_bytes / 1e6:,.1f} MB",
        str(cost.tokens),
        cost.runs_on,
        cost.kept_on,
        *(f"{median(each):.3f} s ({min(each):.3f} to {max(each):.3f})" for each in times),
    ]


def notes(costs: Sequence[Cost]) -> list[str]:
    """What the numbers mean, and where they were measured."""
    stays = [cost.name for cost in costs if cost.runs_on == cost.kept_on]
    lines = [
        f"Medians of {len(costs[0].encode_s)} (least to most) on {machine(costs)}. tokens: the prompt's for T5, padding included.",
        "weights: bytes of all parts, CLIP-L included. load: from the device that keeps it to the one that runs it; no file is read.",
        "encode: prompt to conditioning with the encoder loaded. prompt change: load and encode, as after sampling an image.",
    ]
    return lines + ([f"Kept on the device that runs it, so there is nothing to load: {', '.join(stays)}."] if stays else [])


def machine(costs: Sequence[Cost]) -> str:
    """The devices' names, and torch's version."""
    import torch

    kinds = sorted({cost.runs_on for cost in costs})
    cpu = f"{platform.processor() or platform.machine()} CPU with {torch.get_num_threads()} threads"
    return f"{', '.join(cpu if kind == 'cpu' else device_name(kind) for kind in kinds)}, torch {torch.__version__}"


def text_table(costs: Sequence[Cost]) -> str:
    """The table as Markdown, with its notes."""
    heading, *lines = rows(costs)
    table = [heading, ["---"] * len(heading), *lines]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in table), "", *notes(costs)])


def image_table(costs: Sequence[Cost]) -> Image.Image:
    """The same table as an image."""
    return table_image(rows(costs), notes(costs))
