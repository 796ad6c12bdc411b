"""The teacher's texts of a run on disk (`teacher.cache`): encoded once, before the diffusion model is loaded, and shared by runs.

A text is known by its teacher (the folder; see `cache_folder`), its prompt and its token length.
"""

# B batch, L text tokens, D text width

from __future__ import annotations

import contextlib
import errno
import gc
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_management
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from ..diffusion.files import SMALL_WEIGHTS
from ..encoder.teacher import Teacher
from ..encoder.teacher_text import TeacherText
from ..encoder.text_shards import FORMATS, DamagedShard, TextShards, joined, packed, unpacked
from ..runtime.errors import UserError, printable
from ..runtime.logs import FILE_INTERVAL_S, TERMINAL_INTERVAL_S
from ..runtime.randomness import undisturbed
from ..runtime.ranks import Ranks
from ..runtime.stop import Stopped
from .cache_folder import description, made_otherwise, other_teachers, teachers_shards, tell, write_about
from .cache_plan import key_of, shown, text_bytes
from .distill import CURES
from .models import load_teacher_of, teacher_width
from .objectives import FLOOR, LEAST_VARIANCE
from .recipe import Recipe

PER_SHARD = 64
# After so long, look for shards of other processes: a folder may have thousands of files.
LOOK_AGAIN_S = 30.0
# The disk, the user's share of it, or what the file system allows a file is full; safetensors gives the number in its message.
FULL = (errno.ENOSPC, errno.EFBIG, *((errno.EDQUOT,) if hasattr(errno, "EDQUOT") else ()))
WINDOWS_FULL = 112


def open_cache(
    recipe: Recipe,
    wanted: Mapping[str, tuple[str, int]],
    ranks: Ranks,
    stopping: Callable[[], bool] = lambda: False,
    text_width: int | None = None,
    resumed: bool = False,
) -> CachedTexts:
    """The texts of a run, of which those that are missing are encoded first, each process some; all processes must call it.

    `text_width`: channels that the diffusion model takes, if they are known. Raises Stopped once `stopping`, and UserError for a folder
    that cannot be used, a disk that is full, and if `resumed`, where only another teacher's texts are; shards that are complete stay.
    """
    described = description(recipe)
    cache = CachedTexts(recipe, wanted, teachers_shards(recipe, described))
    missing = ranks.share(cache.missing())
    if ranks.is_main:
        others = other_teachers(cache.shards.folder, described) if missing else []
        if resumed and others and len(missing) == len(wanted):
            _refuse_other_teacher(cache.shards.folder, others)
        write_about(cache.shards.folder, described)
        for line in (cache.summary(missing), *others):
            tell(line)
    if missing:
        cache.make(missing, ranks, stopping, text_width)
    if lost := cache.missing():
        raise UserError(
            f"{len(lost):,} texts written by another process are missing from {cache.shards.folder}.",
            "name a folder in teacher.cache that all machines of the run share.",
        )
    return cache


@dataclass
class Rounding:
    """What rounding changes in texts, summed over their tokens for each channel."""

    tokens: int = 0
    gap_D: Tensor | float = 0.0
    sum_D: Tensor | float = 0.0
    square_D: Tensor | float = 0.0

    def add(self, exact_BLD: Tensor, stored_BLD: Tensor) -> None:
        """Take in some texts."""
        exact_TD, stored_TD = exact_BLD.double().flatten(0, 1), stored_BLD.double().flatten(0, 1)
        self.tokens += len(exact_TD)
        self.gap_D += (stored_TD - exact_TD).square().sum(0)
        self.sum_D += exact_TD.sum(0)
        self.square_D += exact_TD.square().sum(0)

    def shares(self) -> tuple[float, float, float]:
        """The root mean square of the change as a share of that of the values, of their standard deviation, and of the worst channel's.

        A channel that hardly varies counts as in `whitened_gap`.
        """
        gap_D, square_D = torch.as_tensor(self.gap_D), torch.as_tensor(self.square_D)
        centred_D = (square_D - torch.as_tensor(self.sum_D).square() / self.tokens).clamp_min(0)
        floored_D = centred_D.clamp_min(FLOOR * centred_D.median()).clamp_min(LEAST_VARIANCE)
        ratios = gap_D.sum() / square_D.sum(), gap_D.sum() / floored_D.sum(), (gap_D / floored_D).max()
        values, deviation, worst = (math.sqrt(ratio) for ratio in ratios)
        return values, deviation, worst

    def __str__(self) -> str:
        values, deviation, worst = self.shares()
        return f"{values:.2%} (relative root mean square), {deviation:.2%} of their standard deviation, {worst:.2%} in the worst channel"


def _refuse_other_teacher(folder: Path, others: Sequence[str]) -> None:
    raise UserError(
        f"{folder.parent} has no texts of the run's teacher, {folder.name}.",
        "put back what differs, or name a new folder in teacher.cache, in which all texts are encoded again.",
        "\n".join(f"  {line}" for line in others),
    )


class CachedTexts:
    """In the place of a teacher: its texts from disk. Those of a damaged shard are made again by the teacher, loaded for them alone."""

    def __init__(self, recipe: Recipe, wanted: Mapping[str, tuple[str, int]], shards: TextShards) -> None:
        self.recipe, self.wanted, self.shards = recipe, wanted, shards
        self.dtype, self._width = FORMATS[recipe.teacher.cache_format], teacher_width(recipe)
        self._rounding = Rounding()
        # Of the texts that this process has encoded.
        self.encoded, self.seconds = 0, 0.0
        self._looked_s = -math.inf

    def encode(self, prompts: Sequence[str], length: int, with_empty: bool = False) -> TeacherText:
        """The texts of some prompts at one token length, and that of the empty prompt."""
        empty = self.encode([""], length) if with_empty else None
        family = self.recipe.family
        texts = [unpacked(self._read(key_of(prompt, length)), family) for prompt in prompts]
        return replace(joined(texts, family), empty=empty)

    def _read(self, key: str) -> Mapping[str, torch.Tensor]:
        try:
            return self.shards.read(key)
        except DamagedShard as damage:
            self.shards.remove(damage)
            # Another process may have made them again meanwhile.
            if missing := self.missing():
                with undisturbed():
                    self.make(missing, Ranks())
        return self.shards.read(key)

    @property
    def text_width(self) -> int:
        """Channels of the texts."""
        prompt, length = next(iter(self.wanted.values()))
        return self.encode([prompt], length).text_BLD.shape[-1]

    def missing(self) -> list[str]:
        """The keys of the texts that the run needs and that are not on disk."""
        self.shards.find()
        return [key for key in self.wanted if key not in self.shards]

    def summary(self, missing: Sequence[str]) -> str:
        """How many texts there are, what they take, and what is missing."""
        there = len(self.wanted) - len(missing)
        said = f"Teacher's texts in {self.shards.folder}: {there:,} of the run's {len(self.wanted):,} are there"
        if otherwise := made_otherwise(self.shards.folder):
            said += f" (made with {otherwise}: the last bits may differ)"
        if not missing:
            return f"{said}; the teacher is not loaded. The folder takes {shown(self.shards.size)}."
        size = f"at most {shown(self._size(missing))} in {self.recipe.teacher.cache_format}"
        return f"{said}; {len(missing):,} are encoded now and take {size}."

    def _size(self, keys: Sequence[str]) -> float:
        return sum(text_bytes(self.recipe, self.wanted[key][1], self._width) for key in keys)

    def make(
        self,
        missing: Sequence[str],
        ranks: Ranks,
        stopping: Callable[[], bool] = lambda: False,
        text_width: int | None = None,
    ) -> None:
        """Encode texts and write them, shard by shard, each process every `ranks.world`-th shard of them."""
        shards = [missing[first : first + PER_SHARD] for first in range(0, len(missing), PER_SHARD)]
        own = shards[ranks.rank :: ranks.world]
        self._check_room(missing)
        teacher = load_teacher_of(self.recipe, text_width)
        with _one_thread_if_small(teacher), self._bar(ranks, sum(map(len, own))) as bar:
            for number in range(math.ceil(len(shards) / ranks.world)):
                if number < len(own):
                    self._make_shard(teacher, own[number], stopping, bar)
                # At each shard, so that no process waits long for another.
                if ranks.any_of(stopping()):
                    raise Stopped
        teacher.clip.patcher.detach()
        del teacher
        gc.collect()
        comfy.model_management.soft_empty_cache()
        if ranks.is_main and self._rounding.tokens:
            tell(f"Rounding to {self.recipe.teacher.cache_format} changed these texts by {self._rounding}.")

    def _bar(self, ranks: Ranks, texts: int) -> tqdm:
        interval_s = TERMINAL_INTERVAL_S if sys.stderr.isatty() else FILE_INTERVAL_S
        name = "teacher's texts" if ranks.world == 1 else f"teacher's texts, one of {ranks.world} processes"
        return tqdm(total=texts, desc=name, unit=" texts", mininterval=interval_s, dynamic_ncols=True, disable=not ranks.is_main)

    def _make_shard(self, teacher: Teacher, keys: Sequence[str], stopping: Callable[[], bool], bar: tqdm) -> None:
        """Encode and write what another run has not written meanwhile; a smaller shard once `stopping`."""
        if time.monotonic() - self._looked_s > LOOK_AGAIN_S:
            self.shards.find()
            self._looked_s = time.monotonic()
        texts: dict[str, Mapping[str, torch.Tensor]] = {}
        for key in keys:
            if stopping():
                break
            if key not in self.shards:
                begin_s = time.monotonic()
                texts[key] = self._encoded(teacher, *self.wanted[key])
                self.encoded, self.seconds = self.encoded + 1, self.seconds + time.monotonic() - begin_s
            bar.update()
        if texts:
            self._write(texts)

    def _encoded(self, teacher: Teacher, prompt: str, length: int) -> Mapping[str, torch.Tensor]:
        """A text as it is stored. It is encoded alone: its last bits would differ with the composition of a batch."""
        text = teacher.encode([prompt], length)
        if not (text.text_BLD.isfinite().all() and text.pooled_BP.isfinite().all()):
            what = "the teacher's text embedding or pooled vector"
            raise UserError(f'"{printable(prompt)}": {what} is not finite.', CURES[what])
        parts = packed(text, self.dtype)
        stored_BLD = unpacked(parts, self.recipe.family).text_BLD
        self._rounding.add(text.text_BLD, stored_BLD)
        return parts

    def _write(self, texts: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        try:
            self.shards.write(texts)
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            if getattr(error, "errno", None) in FULL or any(f"(os error {code})" in reason for code in (*FULL, WINDOWS_FULL)):
                raise self._no_room(self.missing(), reason) from error
            raise UserError(
                f"The teacher's texts cannot be written to {self.shards.folder}: {reason}.",
                "check that this user can write there, and that the disk answers; then run the same command again.",
            ) from error

    def _check_room(self, missing: Sequence[str]) -> None:
        free = shutil.disk_usage(self.shards.folder).free
        # Without padding, a text has fewer tokens than the length at which it is cut.
        if self.recipe.family.padded and free < self._size(missing):
            raise self._no_room(missing, f"{shown(free)} are free")

    def _no_room(self, missing: Sequence[str], reason: str) -> UserError:
        smaller = "" if self.dtype.itemsize == 1 else ', or set teacher.cache_format = "fp8", which takes half'
        return UserError(
            f"The teacher's texts cannot be written to {self.shards.folder} ({reason}): {len(self.wanted) - len(missing):,} of "
            f"{len(self.wanted):,} are there and stay, the others need at most {shown(self._size(missing))}.",
            f"free that much on its disk, or name a folder on another one in teacher.cache{smaller}; then run the same command again.",
        )


@contextlib.contextmanager
def _one_thread_if_small(teacher: Teacher) -> Iterator[None]:
    """One thread for a small teacher, whatever was used before: the number of threads may decide the last bits."""
    threads = torch.get_num_threads()
    if sum(weight.numel() for weight in teacher.clip.cond_stage_model.parameters()) < SMALL_WEIGHTS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
