"""What a text encoder costs in ComfyUI: parameters, bytes, and the time to load it, to encode, and to change the prompt."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..encoder.prompt_length import t5_tokens
from ..runtime.progress import Progress
from .annotate import table_picture

if TYPE_CHECKING:
    from PIL import Image

Found = TypeVar("Found")
HEADING = ("encoder", "parameters", "weights", "tokens", "runs on", "rests on", "load", "encode", "prompt change")
EVERYTHING = 1e30  # bytes


@dataclass(frozen=True)
class Cost:
    """An encoder by name; how many numbers it holds, in how many bytes; T5 tokens of the prompt, padding included; where it runs and rests;
    seconds of each repetition."""

    name: str
    parameters: int
    resident_bytes: int
    tokens: int
    runs_on: str
    rests_on: str
    load_s: tuple[float, ...]
    encode_s: tuple[float, ...]
    prompt_change_s: tuple[float, ...]


def encoder_name(clip: Any) -> str:
    """What a CLIP is, as short as can be: the size of a distilled T5, else the host's names of its parts."""
    model = clip.cond_stage_model
    layout = getattr(model, "layout", None)
    if layout is not None:
        return layout.size_name + (" + CLIP-L" if any(True for _ in model.clip_l.parameters()) else "")
    return " + ".join(name for name, _ in model.named_children()) or type(model).__name__


def different_names(names: Sequence[str]) -> list[str]:
    """The names, numbered where one comes again."""
    return [name if name not in names[:place] else f"{name} ({names[: place + 1].count(name)})" for place, name in enumerate(names)]


def measure(clip: Any, name: str, prompt: str, repeats: int, progress: Progress | None = None) -> Cost:
    """Measure a CLIP of ComfyUI; `progress(done, total)` may raise to cancel. Other models stay where they are.

    load: from where the encoder rests to where it runs. encode: from the prompt to its conditioning, the encoder being in place; one that
    is not counted comes first. prompt change: both in one, as after a picture has been sampled.
    """

    def encode() -> None:
        clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

    tokens, patcher = len(t5_tokens(clip.tokenize(prompt))), clip.patcher
    told, device = progress or (lambda _done, _total: None), patcher.load_device
    kinds: list[tuple[Callable[[], Any], bool]] = [(clip.load_model, True), (encode, False), (encode, True)]
    times, total = [list[float]() for _ in kinds], len(kinds) * repeats
    told(0, total)
    encode()
    for done in range(total):
        kind = done % len(kinds)
        action, from_rest = kinds[kind]
        if from_rest:
            put_to_rest(clip)
        times[kind].append(timed(action, device)[0])
        told(done + 1, total)
    sizes = (sum(weight.numel() for weight in clip.cond_stage_model.parameters()), patcher.model_size(), tokens)
    return Cost(name, *sizes, str(patcher.load_device), str(patcher.offload_device), *map(tuple, times))


def timed(action: Callable[[], Found], device: Any) -> tuple[float, Found]:
    """Seconds by the clock that an action takes, what it leaves to the device included, and what it gives."""
    import torch

    def wait() -> None:
        if device.type in ("cuda", "xpu", "npu", "mlu"):
            torch.get_device_module(device).synchronize(device)

    wait()
    start = time.perf_counter()
    result = action()
    wait()
    return time.perf_counter() - start, result


def put_to_rest(clip: Any) -> None:
    """Take an encoder off the device that it runs on, and nothing else."""
    import comfy.model_management

    others = [loaded for loaded in comfy.model_management.current_loaded_models if loaded.model is not clip.patcher]
    comfy.model_management.free_memory(EVERYTHING, clip.patcher.load_device, keep_loaded=others)


def rows(costs: Sequence[Cost]) -> list[list[str]]:
    """A heading and a line for each encoder."""
    return [list(HEADING), *(_row(cost) for cost in costs)]


def _row(cost: Cost) -> list[str]:
    from statistics import median  # ComfyUI does not import it, so its start need not

    times = (cost.load_s, cost.encode_s, cost.prompt_change_s)
    return [
        cost.name,
        f"{cost.parameters / 1e6:,.1f} M",
        f"{cost.resident_bytes / 1e6:,.1f} MB",
        str(cost.tokens),
        cost.runs_on,
        cost.rests_on,
        *(f"{median(each):.3f} s ({min(each):.3f} to {max(each):.3f})" for each in times),
    ]


def notes(costs: Sequence[Cost]) -> list[str]:
    """What the numbers are, and where they were measured."""
    stays = [cost.name for cost in costs if cost.runs_on == cost.rests_on]
    lines = [
        f"Medians of {len(costs[0].encode_s)} (least to most) on {machine(costs)}. tokens: the prompt's for T5, padding included.",
        "weights: bytes of all parts, CLIP-L included. load: from where it rests to where it runs; its file was read before, not counted.",
        "encode: prompt to conditioning with the encoder in place. prompt change: load and encode, as after a picture was sampled.",
    ]
    return lines + ([f"No load to speak of, as it rests where it runs: {', '.join(stays)}."] if stays else [])


def machine(costs: Sequence[Cost]) -> str:
    """The devices by name, and torch's version."""
    import torch

    kinds = sorted({cost.runs_on for cost in costs})
    named = [torch.cuda.get_device_name(kind) if kind.startswith("cuda") else kind for kind in kinds]
    cpu = f"{platform.processor() or platform.machine()} CPU with {torch.get_num_threads()} threads"
    return f"{', '.join(cpu if name == 'cpu' else name for name in named)}, torch {torch.__version__}"


def text_table(costs: Sequence[Cost]) -> str:
    """The table as Markdown, with its notes."""
    heading, *lines = rows(costs)
    table = [heading, ["---"] * len(heading), *lines]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in table), "", *notes(costs)])


def picture_table(costs: Sequence[Cost]) -> Image.Image:
    """The same as a picture."""
    return table_picture(rows(costs), notes(costs))
