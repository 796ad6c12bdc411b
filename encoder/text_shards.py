"""A teacher's texts on disk, in shards that are complete or absent. Several processes may read and write in one folder."""

# K rows of the companions, L text tokens, D text width

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..families.family import Family
from ..runtime.disk import remove_abandoned, sync_file, sync_folder, unfinished
from ..runtime.errors import StudentFileError, UserError
from ..runtime.header import Entry, read_header
from ..runtime.weights import DTYPES
from .rows import Rows
from .teacher_text import TeacherText

FORMATS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# The metadata of a shard, JSON: whose texts it holds, and the checksum of each by its key. One entry, as the library keeps no order.
TEXTS = "distilled_t5.texts"
DIGITS = 16
Parts = Mapping[str, Tensor]
# What tells a file from one that has replaced it: its number in the file system, and when it was written.
Seen = tuple[int, int]
log = logging.getLogger(__name__)


class DamagedShard(UserError):
    """A shard whose texts cannot be read, or are not those that were written. `seen`: which file it was, None if there was none."""

    def __init__(self, path: Path, reason: str, seen: Seen | None = None) -> None:
        super().__init__(f"{path} is damaged: {reason}", "nothing, its texts are made again; if it is damaged once more, check the disk.")
        self.path, self.seen = path, seen


def packed(text: TeacherText, dtype: torch.dtype) -> dict[str, Tensor]:
    """The text of a single prompt as named tensors, its rows rounded to `dtype`; in 8 bits each row has a scale of its own.

    Equal rows that follow each other are stored once; zeros beyond the last channel of the companions' rows are not stored.
    """
    parts = {"ids": text.token_ids_BL[0].int(), "pooled": text.pooled_BP[0].clone(), **_rounded("text", text.text_BLD[0], dtype)}
    if text.rows is not None and len(before_KD := text.rows.before[0]):
        used = before_KD.any(0).nonzero()
        parts |= _rounded("before", before_KD[:, : int(used[-1]) + 1 if len(used) else 1], dtype)
    return parts


def _rounded(name: str, rows_LD: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    scale_L = torch.ones(len(rows_LD))
    if dtype.itemsize == 1:
        largest_L = rows_LD.abs().amax(1)
        scale_L = torch.where(largest_L > 0, largest_L / torch.finfo(dtype).max, 1)
    bytes_LX = (rows_LD / scale_L[:, None]).to(dtype).view(torch.uint8)
    stored_LX = torch.cat([bytes_LX, scale_L[:, None].view(torch.uint8)], dim=1)
    new_L = torch.ones(len(rows_LD), dtype=torch.bool)
    new_L[1:] = (stored_LX[1:] != stored_LX[:-1]).any(1)
    parts = {name: bytes_LX[new_L].view(dtype)}
    if dtype.itemsize == 1:
        parts[f"{name}_scale"] = scale_L[new_L]
    if not new_L.all():
        parts[f"{name}_row"] = (new_L.cumsum(0) - 1).int()
    return parts


def unpacked(parts: Parts, family: Family) -> TeacherText:
    """The text of a single prompt, float32, of what `packed` made of it."""
    text_LD = _restored("text", parts)
    rows = None
    if not family.padded or family.rows_before is not None:
        before_KD = _restored("before", parts) if "before" in parts else text_LD[:0]
        before_KD = torch.nn.functional.pad(before_KD, (0, text_LD.shape[1] - before_KD.shape[1]))
        rows = Rows((len(text_LD),), (before_KD,))
    return TeacherText(parts["ids"].long()[None], text_LD[None], parts["pooled"][None], rows)


def _restored(name: str, parts: Parts) -> Tensor:
    rows = parts[name].float()
    if f"{name}_scale" in parts:
        rows = rows * parts[f"{name}_scale"][:, None]
    return rows[parts[f"{name}_row"].long()] if f"{name}_row" in parts else rows


def joined(texts: Sequence[TeacherText], family: Family) -> TeacherText:
    """The texts of single prompts as that of a batch, as `Teacher.encode` returns it: zeros beyond a prompt's own rows."""
    longest, width = max(text.text_BLD.shape[1] for text in texts), texts[0].text_BLD.shape[2]
    text_BLD = torch.zeros(len(texts), longest, width)
    for place, text in enumerate(texts):
        text_BLD[place, : text.text_BLD.shape[1]] = text.text_BLD[0]
    ids_BL = torch.tensor([family.kind.fit(text.token_ids_BL[0].tolist(), longest) for text in texts])
    found = [text.rows for text in texts if text.rows is not None]
    rows = Rows(tuple(row.own[0] for row in found), tuple(row.before[0] for row in found)) if found else None
    return TeacherText(ids_BL, text_BLD, torch.cat([text.pooled_BP for text in texts]), rows)


class TextShards:
    """The texts in a folder, by key. `teacher`: the identity of the teacher that made them, which each shard names.

    `find` takes in what this process or another has written since.
    """

    def __init__(self, folder: Path, teacher: str) -> None:
        self.folder, self.teacher = folder, teacher
        self._places: dict[str, Path] = {}
        self._known: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    @property
    def size(self) -> int:
        """Bytes of the shards on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def find(self) -> None:
        """Read the headers of shards that are new. Damaged ones are removed with a warning.

        Raises UserError for a shard of another teacher.
        """
        with os.scandir(self.folder) as entries:
            new = {entry.name for entry in entries if entry.name.endswith(".safetensors")} - self._known
        for path in (self.folder / name for name in sorted(new)):
            try:
                self._add(path)
            except DamagedShard as damage:  # noqa: PERF203 (the others stay)
                self.remove(damage)

    def _add(self, path: Path) -> None:
        seen = _seen(path)
        try:
            teacher, checksums = json.loads(read_header(path)[1][TEXTS])
        except StudentFileError as error:
            raise self._damage(path, error, seen) from error
        except (KeyError, ValueError, TypeError) as error:
            raise DamagedShard(path, "it does not say what it holds.", seen) from error
        if teacher != self.teacher:
            raise UserError(
                f"{path} holds texts of another teacher: expected {self.teacher}, got {teacher}.",
                f"move it to {path.parent.with_name(teacher)}, or delete it.",
            )
        self._places |= dict.fromkeys(checksums, path)
        self._known.add(path.name)

    def remove(self, damage: DamagedShard) -> None:
        """Forget a damaged shard. Remove its file with a warning, unless another process has removed or replaced it."""
        if damage.seen and damage.seen == _seen(damage.path):
            log.warning("%s The file is removed.", damage)
            with contextlib.suppress(PermissionError):  # Windows removes no file that another process reads
                damage.path.unlink(missing_ok=True)
        self._known.discard(damage.path.name)
        self._places = {key: path for key, path in self._places.items() if path != damage.path}

    def read(self, key: str) -> dict[str, Tensor]:
        """The parts of a text. Raises DamagedShard.

        They are read, not mapped into memory: if a mapped file becomes shorter, the system ends the process.
        """
        path = self._places[key]
        seen = _seen(path)
        try:
            entries, strings = read_header(path)
            checksum = json.loads(strings[TEXTS])[1][key]
            with path.open("rb") as file:
                own = {name.partition(".")[2]: entry for name, entry in entries.items() if name.startswith(f"{key}.")}
                parts = {name: _tensor(file, entry) for name, entry in own.items()}
        except (StudentFileError, FileNotFoundError) as error:
            raise self._damage(path, error, seen) from error
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise DamagedShard(path, "its header does not fit its content.", seen) from error
        if _checksum(parts) != checksum:
            raise DamagedShard(path, "its checksum differs.", seen)
        return parts

    def _damage(self, path: Path, error: Exception, seen: Seen | None) -> Exception:
        """What an error in reading means: a disk that does not answer, or a folder that is gone, is not a damaged file."""
        if not self.folder.is_dir():
            return UserError(f"{self.folder}, the folder of the teacher's texts, is gone.", "connect its disk again, then resume the run.")
        if isinstance(error.__cause__, OSError):
            return error
        return DamagedShard(path, error.problem if isinstance(error, StudentFileError) else "it does not exist.", seen)

    def write(self, texts: Mapping[str, Parts]) -> None:
        """Write a shard, completely or not at all. Of processes that write the same texts at the same time, the first one's file stays.

        Raises OSError or SafetensorError; then nothing is left behind.
        """
        path = self.folder / f"{hashlib.sha256(chr(10).join(texts).encode()).hexdigest()[:DIGITS]}.safetensors"
        checksums = {key: _checksum(parts) for key, parts in texts.items()}
        tensors = {f"{key}.{name}": part.contiguous() for key, parts in texts.items() for name, part in parts.items()}
        with unfinished(path) as aside:
            save_file(tensors, aside, {TEXTS: json.dumps([self.teacher, checksums])})
            sync_file(aside)
            _name_if_free(aside, path)
        sync_folder(self.folder)
        self._add(path)


def _name_if_free(aside: Path, path: Path) -> None:
    """Give a shard its name unless another process, whose last bits may differ, has written it: that file may be in use."""
    try:
        os.link(aside, path)
    except FileExistsError:
        pass
    except OSError:  # no hard links here (exFAT, some network shares)
        if not path.is_file():
            os.replace(aside, path)


def _seen(path: Path) -> Seen | None:
    with contextlib.suppress(OSError):
        state = path.stat()
        return state.st_ino, state.st_mtime_ns
    return None


def _tensor(file: io.BufferedReader, entry: Entry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    file.seek(entry.begin)
    file.readinto(_bytes(tensor))
    return tensor


def _checksum(parts: Parts) -> int:
    checksum = 0
    for _, part in sorted(parts.items()):
        checksum = zlib.crc32(_bytes(part), checksum)
    return checksum


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
