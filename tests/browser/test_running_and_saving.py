"""A workflow is dropped, run, saved, closed and opened again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.tests.support.comfy_tab import ComfyTab
from distilled_t5.tests.support.renderers import ONE_IN_NODES_2, ONE_ON_THE_CANVAS
from distilled_t5.tests.support.workflows import FLUX_DEV, LORA, SCHNELL
from playwright.sync_api import expect

FOLDER = Path(__file__).resolve().parent.parent.parent / "example_workflows"
SIDE_PX = 256
LOADED = "T5-Base from distilled_t5_base.safetensors"
SHOWN = """(text) => app.graph.nodes.some(node => node.type === 'PreviewAny'
    && node.widgets?.some(widget => String(widget.value).startsWith(text)))"""
IN_DRAFT = "(text) => Object.values(localStorage).some(draft => draft.includes(text))"


def content(graph: dict[str, Any]) -> dict[str, Any]:
    """What must be kept: everything but the view and the order in which nodes run."""
    nodes = {node["id"]: {key: value for key, value in node.items() if key != "order"} for node in graph["nodes"]}
    kept = {key: graph[key] for key in ("id", "last_node_id", "last_link_id", "links", "groups", "version")}
    return {"nodes": nodes} | kept


@pytest.mark.parametrize("nodes_2", [pytest.param(False, id="canvas"), pytest.param(True, id="nodes-2", marks=pytest.mark.every_version)])
def test_a_dropped_workflow_runs_to_its_picture(comfy: ComfyTab, server: ComfyServer, nodes_2: bool) -> None:
    comfy.open(nodes_2=nodes_2)
    comfy.drop("my-fox", (FOLDER / f"{FLUX_DEV}.json").read_text(encoding="utf-8"))
    comfy.make_small(SIDE_PX, seed=21 + nodes_2)
    assert comfy.run() == "execution_success"
    comfy.wait_for_picture("SaveImage", SIDE_PX)
    shown = comfy.page.evaluate("() => Object.values(app.nodeOutputs).flatMap(output => output.text ?? []).join()")
    assert "T5-Base from distilled_t5_base.safetensors" in shown
    entry = next(iter(server.get_json("/history?max_items=1").values()))
    [picture] = server.images(entry)
    assert picture.size == (SIDE_PX, SIDE_PX)
    comfy.page.get_by_role("button", name="Assets").click()
    [image] = [image for output in entry["outputs"].values() for image in output.get("images", [])]
    expect(comfy.page.locator(f"img[src*='{image['filename']}']").first).to_be_visible()


@pytest.mark.parametrize("nodes_2", ONE_IN_NODES_2)
def test_the_text_of_what_was_loaded_stays_and_returns_after_a_reload_without_loading_again(
    comfy: ComfyTab, server: ComfyServer, nodes_2: bool
) -> None:
    """ComfyUI's text node is empty after F5; the server has cached its text and sends it again when Run is pressed."""
    comfy.open_template(FLUX_DEV, nodes_2=nodes_2)
    comfy.make_small(seed=51 + nodes_2)
    assert comfy.run() == "execution_success"
    comfy.wait_for(SHOWN, LOADED)
    comfy.select("DistilledT5Loader")  # the page notes a change when the mouse is released
    comfy.wait_for(IN_DRAFT, f"[{51 + nodes_2},")
    comfy.load_template(SCHNELL)
    comfy.switch_to(FLUX_DEV)
    comfy.wait_for(SHOWN, LOADED)
    comfy.reload()
    assert comfy.run() == "execution_success"
    comfy.wait_for(SHOWN, LOADED)
    entry = next(iter(server.get_json("/history?max_items=1").values()))
    [kept] = [set(detail["nodes"]) for kind, detail in entry["status"]["messages"] if kind == "execution_cached"]
    assert kept == set(entry["prompt"][2])


@pytest.mark.parametrize("nodes_2", ONE_ON_THE_CANVAS)
def test_a_saved_and_loaded_workflow_is_unchanged(comfy: ComfyTab, nodes_2: bool) -> None:
    comfy.open(nodes_2=nodes_2)
    for path in sorted(FOLDER.glob("*.json")):
        comfy.page.evaluate("(graph) => app.loadGraphData(graph)", json.loads(path.read_text(encoding="utf-8")))
        before = comfy.graph()
        comfy.page.evaluate("(graph) => app.loadGraphData(graph)", before)
        assert content(comfy.graph()) == content(before), path.name


@pytest.mark.parametrize("nodes_2", ONE_IN_NODES_2)
def test_a_reload_and_saving_keep_every_value(comfy: ComfyTab, server: ComfyServer, nodes_2: bool) -> None:
    name = f"mine-{'new' if nodes_2 else 'old'}"
    comfy.open_template(LORA, nodes_2=nodes_2)
    comfy.set_widgets("DistilledT5TextEncode", text="two blue cubes", guidance=2.5)
    comfy.set_widgets("DistilledT5Loader", dtype="fp16", token_length=77)
    comfy.select("DistilledT5Loader")  # the page notes a change when the mouse is released
    comfy.wait_for(IN_DRAFT, "two blue cubes")
    before = content(comfy.graph())
    comfy.reload()
    assert content(comfy.graph()) == before
    comfy.save_as(name)
    saved = server.get_json(f"/userdata/workflows%2F{name}.json")
    assert content(saved) == before
    comfy.open(nodes_2=nodes_2)
    comfy.open_saved(name)
    assert content(comfy.graph()) == before
