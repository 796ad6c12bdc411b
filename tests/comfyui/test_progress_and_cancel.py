"""Loading and saving in a real server: the bar moves, and Cancel stops it without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distilled_t5.devtools.server import ComfyServer
from distilled_t5.devtools.small_encoders import student_file
from distilled_t5.devtools.watch import Watched
from distilled_t5.encoder.files import open_student
from distilled_t5.encoder.layout import StudentLayout

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


def load_and_save(seed: int) -> dict[str, Any]:
    """Load T5-Base and save a copy; another `seed` makes it a prompt that the host has not answered before."""
    loader = {"clip_name1": "none", "clip_name2": OURS, "type": "flux", "token_length": 256 + seed}
    return {
        "1": {"class_type": "DistilledT5Loader", "inputs": loader, "_meta": {"title": "Load"}},
        "2": {
            "class_type": "DistilledT5Save",
            "inputs": {"clip": ["1", 0], "filename": "copy", "dtype": "as loaded"},
            "_meta": {"title": "Save"},
        },
    }


def copies(host: ComfyServer) -> list[str]:
    return sorted(path.name for path in (host.base / "models" / "text_encoders").iterdir() if "copy" in path.name)


def test_the_bars_of_loading_and_saving_go_from_nothing_to_the_end(host: ComfyServer) -> None:
    watched = Watched(host, load_and_save(seed=1))
    assert watched.run()[0] == "execution_success"
    for node in ("1", "2"):
        values = [value / total for value, total in watched.progress[node]]
        assert values == sorted(values), "a bar never runs backwards"
        assert values[0] == 0
        assert values[-1] == 1
        # The host passes on ten values a second at most.
        assert len(set(values)) >= 3
    folder = host.base / "models" / "text_encoders"
    [copy] = copies(host)
    assert open_student(folder / copy).metadata.sha256 == open_student(folder / OURS).metadata.sha256


@pytest.mark.parametrize(("node", "seed"), [("1", 2), ("2", 3)], ids=["loading", "saving"])
def test_cancel_stops_it_before_its_end_and_leaves_nothing(host: ComfyServer, node: str, seed: int) -> None:
    watched = Watched(host, load_and_save(seed))
    kind, _ = watched.run(cancel_at_node=node)
    assert kind == "execution_interrupted"
    value, total = watched.progress[node][-1]
    assert value < total
    assert copies(host) == []
    assert not [path for path in (host.base / "models" / "text_encoders").iterdir() if path.name.startswith(".")]
    assert Watched(host, load_and_save(seed)).run()[0] == "execution_success"
    assert len(copies(host)) == 1
