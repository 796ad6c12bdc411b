"""Workflows with the authors' DualCLIPLoaderT5Base open, the page replaces the node, and they run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.tests.support.comfy_tab import ComfyTab
from distilled_t5.tests.support.workflows import FLUX_DEV
from playwright.sync_api import expect

FOLDER = Path(__file__).resolve().parent.parent.parent / "example_workflows"
OLD = {
    "type": "DualCLIPLoaderT5Base",
    # The authors' own workflow names the T5 first.
    "widgets_values": ["t5base_fp16.safetensors", "clip_l.safetensors", "flux_t5base"],
    "properties": {"Node name for S&R": "DualCLIPLoaderT5Base"},
    "inputs": [],
}


def old_workflow() -> dict[str, Any]:
    """The Flux dev example with the authors' loader, which has no text output."""
    workflow = json.loads((FOLDER / f"{FLUX_DEV}.json").read_text(encoding="utf-8"))
    [loader] = [node for node in workflow["nodes"] if node["type"] == "DistilledT5Loader"]
    loader.update(OLD, outputs=loader["outputs"][:1])
    workflow["links"] = [link for link in workflow["links"] if link[1:3] != [loader["id"], 1]]
    workflow["nodes"] = [node for node in workflow["nodes"] if node["type"] != "PreviewAny"]
    return workflow


@pytest.fixture(scope="module")
def old_file(server: ComfyServer) -> Iterator[None]:
    """The distilled T5 under the name that the authors' workflow gives it."""
    folder = server.base / "models" / "text_encoders"
    old = folder / "t5base_fp16.safetensors"
    shutil.copyfile(folder / "distilled_t5_base.safetensors", old)
    yield
    old.unlink()


@pytest.mark.usefixtures("old_file")
@pytest.mark.parametrize(
    "nodes_2",
    [pytest.param(False, id="canvas"), pytest.param(True, id="nodes-2", marks=[pytest.mark.full, pytest.mark.every_version])],
)
def test_the_old_loader_is_replaced_and_the_workflow_runs(comfy: ComfyTab, nodes_2: bool) -> None:
    comfy.open(nodes_2=nodes_2)
    comfy.drop("authors", json.dumps(old_workflow()))
    assert comfy.missing_nodes() == ["DualCLIPLoaderT5Base"]
    panel = comfy.error_details()
    expect(panel).to_contain_text("DualCLIPLoaderT5Base")
    panel.get_by_role("button", name="Replace Node", exact=True).click()
    comfy.wait_for_node("DistilledT5Loader")
    [loader] = [node for node in comfy.graph()["nodes"] if node["type"] == "DistilledT5Loader"]
    assert loader["widgets_values"] == ["t5base_fp16.safetensors", "clip_l.safetensors", "flux", "default", "auto", 0, "none"]
    assert comfy.missing_nodes() == []
    # Frontend 1.58.1 still draws the replaced node, with an error in every frame until a reload; 1.47.12 does not.
    if comfy.draws_removed_nodes():
        comfy.reload()
        comfy.errors[:] = [error for error in comfy.errors if "NullGraphError" not in error]
        assert comfy.missing_nodes() == []
    comfy.make_small(seed=31 + nodes_2)
    assert comfy.run() == "execution_success"
    comfy.wait_for_picture("SaveImage", 256)
