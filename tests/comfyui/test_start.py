"""ComfyUI's start: the pack brings nothing with it but its own few files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.benchmarks.support.start_cost import measured


@pytest.fixture(scope="module")
def found(comfyui_path: Path, pack_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What starting with the pack did, in a fresh ComfyUI."""
    return measured(comfyui_path, pack_root, tmp_path_factory.mktemp("start"))


def test_the_pack_pulls_no_module_into_comfyui_but_its_own(found: dict[str, Any], pack_root: Path) -> None:
    assert found["nodes"] == sorted(json.loads((Path(__file__).parent / "schemas.json").read_text(encoding="utf-8")))
    parts = ("__init__.py", "nodes", "runtime", "config", "prompts", "students", "families", "encoder", "train", "evaluate")
    folders = [str(pack_root / part) for part in parts]
    foreign = {name: file for name, file in found["modules"].items() if not str(file).startswith(tuple(folders))}
    assert foreign == {}, "modules that ComfyUI had not imported itself"
    # The trained module needs transformers' model code, which takes seconds.
    assert not any(name.endswith("t5.trained") for name in found["modules"])
    assert len(found["modules"]) > 10


def test_the_pack_touches_nothing_outside_while_comfyui_starts(found: dict[str, Any]) -> None:
    assert found["touched"] == [], "network, processes, written files"
    assert found["routes"] == [], "the server's routes are ComfyUI's own"
    assert found["cuda_started"] is False


NOSY_PACK = """
import pathlib, socket
from server import PromptServer
with socket.socket() as line:
    line.bind(("127.0.0.1", 0))
pathlib.Path(__file__).with_name("left.txt").write_text("here")
PromptServer.instance.routes.get("/nosy")(lambda request: None)
NODE_CLASS_MAPPINGS = {}
"""


@pytest.mark.full
def test_a_pack_that_does_touch_something_is_seen(comfyui_path: Path, tmp_path: Path) -> None:
    (tmp_path / "nosy").mkdir()
    (tmp_path / "nosy" / "__init__.py").write_text(NOSY_PACK)
    found = measured(comfyui_path, tmp_path / "nosy", tmp_path)
    assert [touch.split()[0] for touch in found["touched"]] == ["socket.__new__", "socket.bind", "open"]
    assert [route for route in found["routes"] if "/nosy" in route] == found["routes"] != []
