"""Loading and saving in a real server: the bar moves, and Cancel stops it without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.encoder.files import open_student
from distilled_t5.runtime.weights import data_sha256
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.small_encoders import student_file
from distilled_t5.tests.support.watch import Watched

OURS = "zz_t5_base.safetensors"


@pytest.fixture(scope="module")
def host(server: ComfyServer) -> Iterator[ComfyServer]:
    """A server with a T5-Base of ours, whose checksum and size make loading and saving take a moment."""
    folder = server.base / "models" / "text_encoders"
    path = student_file(folder, StudentLayout.named("base"), OURS, dtype=torch.bfloat16)
    yield server
    server.free()
    path.unlink()


@pytest.fixture(autouse=True)
def _no_copies_stay(host: ComfyServer) -> Iterator[None]:
    yield
    for name in copies(host):
        (host.base / "models" / "text_encoders" / name).unlink()


def load_and_save(seed: int, saves: int = 1) -> dict[str, Any]:
    """Load T5-Base and save copies; a new `seed` makes it a prompt that ComfyUI has not cached."""
    prompt = {"load": {"class_type": "DistilledT5Loader", "inputs": loader(seed), "_meta": {"title": "Load"}}}
    for number in range(saves):
        inputs = {"clip": ["load", 0], "filename": f"copy_{seed}_{number}", "dtype": "as loaded"}
        prompt[f"save {number}"] = {"class_type": "DistilledT5Save", "inputs": inputs, "_meta": {"title": "Save"}}
    return prompt


def load_many(seed: int, loads: int) -> dict[str, Any]:
    """Load T5-Base many times, and show what was loaded."""
    prompt: dict[str, Any] = {}
    for number in range(loads):
        prompt[f"load {number}"] = {"class_type": "DistilledT5Loader", "inputs": loader(seed + number)}
        prompt[f"show {number}"] = {"class_type": "PreviewAny", "inputs": {"source": [f"load {number}", 1]}}
    return prompt


def loader(seed: int) -> dict[str, Any]:
    return {"clip_name1": "none", "clip_name2": OURS, "type": "flux", "token_length": 256 + seed}


def copies(host: ComfyServer) -> list[str]:
    return sorted(path.name for path in (host.base / "models" / "text_encoders").iterdir() if "copy" in path.name)


def test_the_bars_of_loading_and_saving_go_from_nothing_to_the_end(host: ComfyServer) -> None:
    watched = Watched(host, load_and_save(seed=1))
    assert watched.run()[0] == "execution_success"
    for node in ("load", "save 0"):
        values = [value / total for value, total in watched.progress[node]]
        assert values == sorted(values), "a bar never runs backwards"
        assert (values[0], values[-1]) == (0, 1)
    folder = host.base / "models" / "text_encoders"
    [copy] = copies(host)
    assert open_student(folder / copy).metadata.sha256 == open_student(folder / OURS).metadata.sha256


# So many that the last is far away when Cancel arrives, however fast the machine is.
MANY = 12


@pytest.mark.parametrize("prompt", [load_many(20, MANY), load_and_save(2, MANY)], ids=["loading", "saving"])
def test_cancel_ends_the_prompt_and_leaves_no_unfinished_file(host: ComfyServer, prompt: dict[str, Any]) -> None:
    of_interest = "save" if any(name.startswith("save") for name in prompt) else "load"
    kind, _ = Watched(host, prompt).run(lambda node, _done: node.startswith(of_interest))
    assert kind == "execution_interrupted"
    folder = host.base / "models" / "text_encoders"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    finished = copies(host)
    assert len(finished) < MANY
    whole = open_student(folder / OURS).metadata.sha256
    assert all(data_sha256(folder / name) == whole for name in finished)
    assert Watched(host, load_and_save(seed=3)).run()[0] == "execution_success"
    assert len(copies(host)) == len(finished) + 1
