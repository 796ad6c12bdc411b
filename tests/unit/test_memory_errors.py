"""Too little memory, or a driver that fails, while a file is read: said as what it is, and never blamed on the file."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled_t5.evaluate import pictures
from distilled_t5.evaluate.local_weights import load_folder, load_processor
from distilled_t5.evaluate.pictures import Inception
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.runtime.failure import explained, is_of_the_driver, is_out_of_memory
from distilled_t5.runtime.weights import reading
from distilled_t5.tests.support.tiny_judges import save_inception
from distilled_t5.train import state
from safetensors import SafetensorError

# As Python, torch and the safetensors library report memory that is not sufficient, on Linux and Windows.
NO_MEMORY = (
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError("Cannot allocate memory (os error 12)"),
    OSError("The paging file is too small for this operation to complete. (os error 1455)"),
    RuntimeError("unable to mmap 9787841024 bytes from file <t5.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    SafetensorError("Error while deserializing header: Cannot allocate memory (os error 12)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
)
OF_FILES = (
    OSError(errno.EACCES, "Permission denied"),
    OSError("Resource busy (os error 123)"),
    RuntimeError("PytorchStreamReader failed reading zip archive"),
    SafetensorError("Error while deserializing header: HeaderTooLarge"),
    ValueError("out of memory.safetensors is not an encoder"),
)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_arguments: object, **_named: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
def test_reading_a_file_reports_memory_as_memory(tmp_path, error):
    with (
        pytest.raises(MemoryError, match=r"Not enough memory to read t5\.safetensors(.|\n)*What to do: close other programs"),
        reading(tmp_path / "t5.safetensors"),
    ):
        raise error
    assert is_out_of_memory(error)
    assert (explained(error) or "").startswith("Out of memory: ")


@pytest.mark.parametrize("error", OF_FILES, ids=repr)
def test_other_errors_are_not_taken_for_memory_or_the_driver(error):
    assert not is_out_of_memory(error)
    assert not is_of_the_driver(error)


def test_reading_a_file_reports_an_error_of_the_driver_as_one(tmp_path):
    path = tmp_path / "t5.safetensors"
    with (
        pytest.raises(RuntimeError, match=r"could not be read: CUDA error: .*\nWhat to do: check the GPU and its driver") as caught,
        reading(path),
    ):
        raise RuntimeError("CUDA error: unspecified launch failure")
    assert not isinstance(caught.value, StudentFileError)


def test_a_folder_called_cuda_is_not_a_driver(tmp_path):
    path = tmp_path / "cuda" / "t5.safetensors"
    with pytest.raises(StudentFileError, match="is not a complete safetensors file"), reading(path):
        raise RuntimeError(f"Could not detect model type of: {path}")


@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
@pytest.mark.parametrize("load", [load_folder, load_processor])
def test_a_judges_folder_is_not_called_damaged_for_want_of_memory(tmp_path, load, error):
    (tmp_path / "config.json").write_text("{}")
    network = type("Network", (), {"from_pretrained": staticmethod(failing(error))})
    with pytest.raises(type(error)) as caught:
        load(network, tmp_path, "FID", "somewhere")
    assert caught.value is error


def test_an_inception_is_not_called_another_for_want_of_memory(tmp_path, monkeypatch):
    extractors = type("Module", (), {"FeatureExtractorInceptionV3": staticmethod(failing(NO_MEMORY[5]))})
    monkeypatch.setattr(pictures, "needed", lambda *_: extractors)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        Inception(save_inception(tmp_path / "weights.safetensors"))


def test_a_checkpoint_is_not_called_damaged_for_want_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "read_manifest", lambda _folder: {})
    monkeypatch.setattr(state, "check_files", lambda *_: None)
    monkeypatch.setattr(state, "_load", failing(NO_MEMORY[6]))
    Path(tmp_path / state.VALUES).write_text("{}")
    with pytest.raises(SafetensorError, match="Cannot allocate memory"):
        state.read_checkpoint(tmp_path)
