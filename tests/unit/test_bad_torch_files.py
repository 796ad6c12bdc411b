"""Torch files that carry code, lie or fill the memory: refused, and nothing in them runs."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled_t5.encoder.files import open_student, write_student
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.students.t5.layout import SHARED
from distilled_t5.tests.support.load_worker import LoadWorker
from distilled_t5.tests.support.tiny_students import joined, tiny_tensors


def refusal(path: Path) -> str:
    """The message with which a file is refused; its first line names the file and its last says what to do."""
    with pytest.raises(StudentFileError) as caught:
        open_student(path).load()
    message = str(caught.value)
    assert path.name in message.splitlines()[0]
    assert message.splitlines()[-1].startswith("What to do: ")
    return message


class RunsCode:
    """Unpickling this writes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("hidden", [False, True], ids=["alone", "beside all tensors"])
def test_torch_file_that_carries_code_is_refused_and_the_code_does_not_run(old_format, hidden, tmp_path):
    proof, path = tmp_path / "the code ran", tmp_path / "evil.pth"
    content = tiny_tensors() | {"hook": RunsCode(proof)} if hidden else RunsCode(proof)
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    message = refusal(path)
    assert not proof.exists()
    assert "code" in message or "torch 1.6" in message
    assert ".safetensors" in message
    torch.load(path, weights_only=False)  # the proof that the proof works
    assert proof.exists()


def test_torch_file_of_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    message = refusal(tmp_path / "module.pth")
    assert "carries code" in message
    assert "state dict" in message


def test_torch_file_from_before_torch_1_6_is_refused(tmp_path):
    torch.save(tiny_tensors(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "torch 1.6" in refusal(tmp_path / "old.pth")


CONTENTS: dict[str, Any] = {
    "a list": [torch.zeros(3)],
    "a tensor": torch.zeros(3),
    "numbers": {"a": 1.5},
    "number keys": {1: torch.zeros(3)},
    "nested": {"model": tiny_tensors()},
    "a sparse tensor": tiny_tensors() | {SHARED: torch.zeros(40, 8).to_sparse()},
    "a quantised tensor": tiny_tensors() | {SHARED: torch.quantize_per_tensor(torch.zeros(40, 8), 0.1, 0, torch.qint8)},
    "a tensor without numbers": tiny_tensors() | {SHARED: torch.empty(40, 8, device="meta")},
    "integers": tiny_tensors() | {SHARED: torch.zeros(40, 8, dtype=torch.int64)},
    "complex numbers": tiny_tensors() | {SHARED: torch.zeros(40, 8, dtype=torch.complex64)},
    "infinity": tiny_tensors() | {SHARED: torch.full((40, 8), torch.inf)},
    "nothing": {},
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.filterwarnings(
    "ignore:Sparse invariant:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
    "ignore:.*quantize:UserWarning",
    "ignore::DeprecationWarning",
)
def test_torch_file_with_anything_but_named_dense_tensors_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    refusal(tmp_path / "file.pth")


def refusal_within_memory(worker: LoadWorker, path: Path) -> str:
    answer = worker.verdict(path)
    assert answer["verdict"] == "refused", answer
    return answer["message"]


def zipped(path: Path, records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


def records_of(content: object) -> dict[str, bytes]:
    made = io.BytesIO()
    torch.save(content, made)
    with zipfile.ZipFile(made) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def test_zip_bomb_is_refused_before_it_unpacks(worker, tmp_path):
    records = records_of(tiny_tensors()) | {"archive/data/0": bytes(100_000_000)}
    path = zipped(tmp_path / "bomb.pth", records, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    assert "unpacks to more than its own size" in refusal_within_memory(worker, path)


def test_zip_that_was_compressed_afterwards_is_refused_and_not_misread(worker, tmp_path):
    path = zipped(tmp_path / "packed.pth", records_of(tiny_tensors()), zipfile.ZIP_DEFLATED)
    path.write_bytes(path.read_bytes() + bytes(200_000))
    refusal_within_memory(worker, path)


def test_tensor_that_stands_for_more_numbers_than_the_file_holds_is_refused(worker, tmp_path):
    endless = torch.zeros(1, dtype=torch.bfloat16).expand(10**12, 8)
    torch.save(tiny_tensors() | {SHARED: endless}, tmp_path / "endless.pth")
    assert "more than the file" in refusal_within_memory(worker, tmp_path / "endless.pth")


# Opcodes of protocol 2: ( mark, ) empty tuple, \x85 tuple of one, c global, t tuple, R call, } empty dict, s set item, N none, . stop
HOSTILE_PICKLES = {
    "nested tuples as a key": b"\x80\x02})" + b"\x85" * 2_000_000 + b"Ns.",
    "nested tuples": b"\x80\x02)" + b"\x85" * 2_000_000 + b".",
    "nested lists": b"\x80\x02" + b"]" * 150_000 + b"a" * 149_999 + b".",
    "a huge array": b"\x80\x02cbuiltins\nbytearray\n(J\x00\x00\x00\x70tR.",
    "many huge arrays": b"\x80\x02" + b"cbuiltins\nbytearray\n(J\x00\x00\x00\x70tR" * 40 + b".",
    "garbage": b"\x80\x02" + bytes(range(256)) * 40,
    "nothing": b"",
}


@pytest.mark.parametrize("kind", HOSTILE_PICKLES)
def test_hostile_pickles_neither_end_the_process_nor_fill_the_memory(worker, kind, tmp_path):
    path = zipped(tmp_path / "evil.pth", records_of(tiny_tensors()) | {"archive/data.pkl": HOSTILE_PICKLES[kind]})
    refusal_within_memory(worker, path)


def test_safetensors_header_of_100_megabytes_is_refused_within_memory(worker, tmp_path):
    path = tmp_path / "deep.safetensors"
    path.write_bytes(joined(b"[" * 90_000_000, b""))
    refusal_within_memory(worker, path)


def test_files_that_are_good_stay_good_after_all_that(worker, tmp_path):
    assert worker.verdict(write_student(tmp_path / "good.safetensors", tiny_tensors()))["verdict"] == "loaded"


def test_numbers_of_a_torch_file_are_read_for_their_checksums_once_and_in_steps_that_can_stop_it(tmp_path, monkeypatch):
    path, read = tmp_path / "authors.pth", []
    torch.save(tiny_tensors(), path)
    usual = zipfile.ZipExtFile.read

    def counted(file: zipfile.ZipExtFile, size: int | None = -1) -> bytes:
        content = usual(file, size)
        read.append(len(content))
        return content

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    open_student(path).load()
    assert sum(read) < 1.5 * path.stat().st_size

    def stop(_done: int, _total: int) -> None:
        raise RuntimeError("stopped")

    read.clear()
    with pytest.raises(RuntimeError, match="stopped"):
        open_student(path).load(stop)
    assert sum(read) < 0.5 * path.stat().st_size
