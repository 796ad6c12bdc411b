"""What a run's models will take, read from the headers of their files, so that nothing is loaded that cannot fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from ..families.family import Family
from ..runtime.header import Entry
from ..runtime.weights import CHOICES
from ..students import kind_of
from .memory import ModelSize

# ComfyUI may hold and compute in two bytes what a file has in four.
USUAL_BYTES = 2
IN_CHECKPOINT = "model.diffusion_model."
# Lists of blocks in files of diffusers, whatever the family. ComfyUI renames their tensors while it loads them.
IN_DIFFUSERS = ("transformer_blocks", "single_transformer_blocks")
# What language models have beside their encoder, and ComfyUI does not load.
NOT_ENCODER = ("decoder.", "lm_head.")


def teacher_bytes_in(files: Iterable[Mapping[str, Entry]]) -> int:
    """Bytes that a teacher takes at least, from the headers of its files."""
    return sum(_held(entry) for each in files for name, entry in each.items() if not name.startswith(NOT_ENCODER))


def text_width_in(files: Iterable[Mapping[str, Entry]], family: Family) -> int:
    """Channels of the text that a teacher gives, judged by the headers of its files; the family's if they do not tell."""
    return next((width for each in files if (width := _width_in(each)) is not None), family.text_width)


def _width_in(entries: Mapping[str, Entry]) -> int | None:
    kind = kind_of(list(entries))
    names, _ = kind.published_names(entries)
    return kind.width_in({name: entries[source].shape for name, source in names.items()})


def size_in_file(entries: Mapping[str, Entry], dtype: str, family: Family) -> ModelSize:
    """The sizes of a diffusion model from its tensors; never more than those of the loaded model."""
    inner = {name: entry for name, entry in entries.items() if name.startswith(IN_CHECKPOINT)} or entries
    block = re.compile(rf"(?:^|\.)(?:{'|'.join((*family.block_lists, *IN_DIFFUSERS))})\.\d+\.")
    weights, columns = Counter[str](), Counter[int]()
    for name, entry in inner.items():
        if found := block.search(name):
            weights[found[0].strip(".")] += entry.numbers
            columns.update(entry.shape[1:] if len(entry.shape) == 2 else ())
    return ModelSize(
        held_bytes=sum(_held(entry, CHOICES.get(dtype)) for entry in inner.values()),
        weights=sum(entry.numbers for entry in inner.values()),
        largest_block=max(weights.values(), default=0),
        blocks=len(weights),
        # Most matrices of a block take as many channels as the block has.
        width=max(columns, key=lambda width: columns[width], default=0),
        compute_bytes=4 if dtype == "fp32" else USUAL_BYTES,
    )


def _held(entry: Entry, dtype: torch.dtype | None = None) -> int:
    return entry.numbers * dtype.itemsize if dtype else min(entry.size, entry.numbers * USUAL_BYTES)
