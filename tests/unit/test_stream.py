"""The streaming writer: the library's own bytes, progress, and a cancelled file that leaves nothing."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from distilled_t5.encoder import stream
from distilled_t5.encoder.files import open_student, write_student
from distilled_t5.encoder.stream import write_stream
from distilled_t5.runtime.disk import sync_folder
from distilled_t5.tests.support.tiny_students import taken_apart, tensor_digest, tiny_tensors
from torch import Tensor

MIXED = {
    "a.half": torch.arange(7, dtype=torch.float16).reshape(7, 1),
    "b.wide": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "c.eighth": torch.arange(5).to(torch.float8_e4m3fn),
    "d.brain": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).T,
    "e.none": torch.zeros(0, 4),
    "f.scalar": torch.tensor(2.5),
    "g.\u5c0f": torch.ones(1, dtype=torch.float8_e5m2),
}


class Cancelled(Exception):
    """What the user's Cancel raises."""


def written(path: Path, tensors: dict[str, Tensor], **options: object) -> str:
    sizes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_stream(path, sizes, tensors.__getitem__, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("metadata", [None, {"title": 'a "quoted" \u5c0f name'}])
def test_the_file_is_byte_for_byte_the_one_that_the_library_writes(tmp_path, metadata):
    digest = written(tmp_path / "ours.safetensors", MIXED, metadata=metadata)
    ready = {name: tensor.contiguous() for name, tensor in MIXED.items()}
    safetensors.torch.save_file(ready, tmp_path / "theirs.safetensors", metadata)
    ours, theirs = ((tmp_path / f"{whose}.safetensors").read_bytes() for whose in ("ours", "theirs"))
    assert ours == theirs
    assert digest == hashlib.sha256(taken_apart(ours)[1]).hexdigest()


def test_progress_counts_every_byte_and_large_tensors_go_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE_BYTES", 1000)
    seen: list[tuple[int, int]] = []
    written(
        tmp_path / "file.safetensors",
        {"big": torch.ones(900), "small": torch.ones(2)},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 3608) for done in (0, 1000, 2000, 3000, 3600, 3608)]


def test_a_tensor_is_asked_for_only_when_its_turn_comes(tmp_path):
    asked: list[str] = []
    done_when_asked: dict[str, int] = {}

    def tensor_of(name: str) -> Tensor:
        asked.append(name)
        done_when_asked[name] = progressed[-1]
        return torch.ones(10)

    progressed: list[int] = []
    sizes = dict.fromkeys(("b", "a", "c"), (torch.float32, (10,)))
    write_stream(tmp_path / "file.safetensors", sizes, tensor_of, progress=lambda done, _total: progressed.append(done))
    assert asked == ["a", "b", "c"]
    assert done_when_asked == {"a": 0, "b": 40, "c": 80}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_cancelling_leaves_the_old_file_and_nothing_else(tmp_path, share):
    path = write_student(tmp_path / "student.safetensors", tiny_tensors())

    def cancel(done: int, total: int) -> None:
        if done >= share * total:
            raise Cancelled

    with pytest.raises(Cancelled):
        write_student(path, tiny_tensors(seed=1), progress=cancel)
    assert os.listdir(tmp_path) == [path.name]
    assert tensor_digest(open_student(path).load()) == tensor_digest(tiny_tensors())


def test_a_folder_is_synced_and_one_that_cannot_be_opened_is_left_alone(tmp_path, monkeypatch):
    synced: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_dev, os.fstat(handle).st_ino)))
    sync_folder(tmp_path / "not there")
    assert not synced and not list(tmp_path.iterdir())
    sync_folder(tmp_path)
    assert synced == ([(tmp_path.stat().st_dev, tmp_path.stat().st_ino)] if os.name == "posix" else [])
