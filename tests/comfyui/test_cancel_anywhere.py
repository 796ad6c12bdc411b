"""Cancel at a known moment of loading or saving in this process: every long part stops, and no partial file or model remains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from distilled_t5.encoder.files import write_student
from distilled_t5.encoder.served import ServingOptions, load_encoder, student_tensors
from distilled_t5.nodes import DistilledT5Save
from distilled_t5.runtime.disk import UNFINISHED
from distilled_t5.tests.support.tiny_students import FULL_VOCABULARY, tiny_tensors
from safetensors import safe_open

TENSORS = len(FULL_VOCABULARY.tensors())


@pytest.fixture
def clip_l(stand_ins: Path) -> Path:
    return stand_ins / "models" / "text_encoders" / "clip_l.safetensors"


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A student in bf16 with a checksum in its metadata."""
    return write_student(tmp_path / "ours.safetensors", tiny_tensors(FULL_VOCABULARY))


class Listener:
    """Records reported progress and cancels at call number `cancel_at` (never if None)."""

    def __init__(self, cancel_at: int | None = None) -> None:
        self.heard: list[tuple[int, int]] = []
        self.cancel_at = cancel_at

    def __call__(self, done: int, total: int) -> None:
        self.heard.append((done, total))
        if len(self.heard) - 1 == self.cancel_at:
            raise InterruptProcessingException


def heard_in(act: Callable[[Listener], object]) -> list[tuple[int, int]]:
    listener = Listener()
    act(listener)
    return listener.heard


def assert_every_call_can_cancel(act: Callable[[Listener], object], calls: list[int]) -> None:
    for call in calls:
        listener = Listener(cancel_at=call)
        with pytest.raises(InterruptProcessingException):
            act(listener)
        assert len(listener.heard) == call + 1, "it continued after the cancel"


def test_cancel_stops_every_part_of_loading_and_progress_never_decreases(student, clip_l):
    with safe_open(clip_l, "pt") as file:
        of_clip_l = len(file.keys())

    def load(listener: Listener) -> None:
        load_encoder(str(student), {"clip_l": str(clip_l)}, ServingOptions(dtype=torch.float32), listener)

    heard = heard_in(load)
    shares = [done / total for done, total in heard]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    nothing_yet = shares.count(0)
    # CLIP-L's numbers and the checksum come first, then the student's numbers, then their conversion.
    assert nothing_yet > of_clip_l
    assert len(heard) - nothing_yet == 2 * TENSORS
    assert_every_call_can_cancel(load, [0, of_clip_l // 2, nothing_yet - 1, nothing_yet + 1, nothing_yet + TENSORS + 1, len(heard) - 1])


def test_cancel_stops_every_part_of_reading_the_weights_from_a_clip(student):
    clip = load_encoder(str(student), {}, ServingOptions()).clip

    def take(listener: Listener) -> None:
        student_tensors(clip, torch.float32, listener)

    heard = heard_in(take)
    # Before and after ComfyUI loads the model into memory, then once per tensor.
    assert heard == [(0, TENSORS)] * (TENSORS + 2)
    assert_every_call_can_cancel(take, list(range(TENSORS + 2)))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only text encoder folder that ComfyUI knows."""
    folder = tmp_path / "text_encoders"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(folder)], folder_paths.supported_pt_extensions))
    return folder


def test_cancel_while_the_file_is_half_written_leaves_nothing(models, student, monkeypatch):
    clip = load_encoder(str(student), {}, ServingOptions()).clip
    half_written: list[int] = []

    def press_cancel_when_it_is_there(*_arguments: Any, **_more: Any) -> None:
        for path in models.glob(f".*{UNFINISHED}"):
            half_written.append(path.stat().st_size)
            comfy.model_management.interrupt_current_processing()

    # ComfyUI shows at most ten updates per second; show every one here, however fast the machine is.
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", press_cancel_when_it_is_there)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", -1.0, raising=False)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_PERCENT", -1.0, raising=False)
    with pytest.raises(InterruptProcessingException):
        DistilledT5Save.execute(clip, "mine", "as loaded")
    assert len(half_written) == 1
    assert list(models.iterdir()) == []
