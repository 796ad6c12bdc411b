"""Searching for the nodes, placing them and reading their help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.encoder.files import write_student
from distilled_t5.encoder.metadata import StudentMetadata
from distilled_t5.tests.support.comfy_tab import ComfyTab
from distilled_t5.tests.support.renderers import ONE_IN_NODES_2, ONE_ON_THE_CANVAS
from distilled_t5.tests.support.tiny_students import FULL_VOCABULARY, tiny_tensors
from playwright.sync_api import expect

NODES = {
    "DistilledT5Loader": "Distilled Text Encoder Loader",
    "DistilledT5TextEncode": "Distilled T5 Text Encode",
    "DistilledT5Save": "Distilled T5 Save",
    "DistilledT5Trim": "Trim Text Encoder",
    "DistilledT5OCRAccuracy": "Distilled T5 OCR Accuracy",
    "DistilledT5EncoderMap": "Distilled T5 Text Encoder Map",
    "DistilledT5CrossAttentionMap": "Distilled T5 Cross-Attention Map",
    "DistilledT5AttentionMapImage": "Distilled T5 Attention Map Image",
    "DistilledT5EncoderReport": "Distilled T5 Encoder Report",
    "DistilledT5CommonTextPrompt": "Distilled T5 CommonText Prompt",
}
BLUEPRINT = "Flux text with Distilled T5"


def headings_of(page: Path) -> list[str]:
    """The headings of a help page."""
    headings = [line.lstrip("# ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert len(headings) > 2
    return headings


@pytest.mark.parametrize(
    ("nodes_2", "query"),
    [
        pytest.param(False, "Distilled T5", id="canvas-Distilled T5"),
        pytest.param(True, "small T5", id="nodes-2-small T5"),
        pytest.param(True, "Distilled T5", id="nodes-2-Distilled T5", marks=pytest.mark.full),
        pytest.param(False, "small T5", id="canvas-small T5", marks=pytest.mark.full),
    ],
)
def test_the_loader_is_found_by_name_and_by_alias_and_placed(comfy: ComfyTab, nodes_2: bool, query: str) -> None:
    comfy.open(nodes_2=nodes_2, empty=True)
    comfy.place_from_search(query, "Distilled Text Encoder Loader")
    comfy.wait_for_node("DistilledT5Loader")
    [node] = comfy.graph()["nodes"]
    assert node["widgets_values"] == ["clip_l.safetensors", "distilled_t5_base.safetensors", "flux", "default", "auto", 0, "none"]


def test_the_loader_is_found_by_every_name_in_use(comfy: ComfyTab) -> None:
    comfy.open(empty=True)
    for query in ("DistillT5", "DistilT5", "T5-Base dual clip", "DualCLIPLoaderT5Base"):
        expect(comfy.search(query).filter(has_text="Distilled Text Encoder Loader")).to_be_visible()
    results = comfy.search("Distilled T5")
    for title in (*NODES.values(), BLUEPRINT):
        expect(results.filter(has=comfy.page.get_by_text(title, exact=True))).to_be_visible()


@pytest.mark.parametrize("nodes_2", ONE_IN_NODES_2)
def test_a_node_is_dragged_from_the_library(comfy: ComfyTab, nodes_2: bool) -> None:
    comfy.open(nodes_2=nodes_2, empty=True)
    comfy.drag_from_library("Distilled Text Encoder Loader", at=(900, 400))
    comfy.wait_for_node("DistilledT5Loader")
    comfy.settle()
    left, top, right, bottom = comfy.screen_rect("DistilledT5Loader")
    assert left <= 900 <= right, "the node is not where it was dropped"
    assert top <= 400 <= bottom, "the node is not where it was dropped"
    assert {"Distilled Text Encoder Loader", "CLIP-L file"} <= set(comfy.drawn_texts())


@pytest.mark.parametrize("nodes_2", ONE_ON_THE_CANVAS)
def test_the_blueprint_becomes_a_subgraph_with_our_nodes(comfy: ComfyTab, nodes_2: bool) -> None:
    comfy.open(nodes_2=nodes_2, empty=True)
    comfy.place_from_search(BLUEPRINT, BLUEPRINT)
    comfy.wait_for("() => app.graph.nodes.length === 1 && app.graph.nodes[0].isSubgraphNode()")
    [inner] = comfy.graph()["definitions"]["subgraphs"]
    assert {"DistilledT5Loader", "DistilledT5TextEncode"} <= {node["type"] for node in inner["nodes"]}


def test_the_model_library_describes_a_file_of_this_pack(comfy: ComfyTab, server: ComfyServer) -> None:
    path = server.base / "models" / "text_encoders" / "mine.safetensors"
    write_student(path, tiny_tensors(FULL_VOCABULARY), StudentMetadata(title="A student of foxes"))
    try:
        comfy.open(empty=True)
        entry = comfy.find_model("mine")
        expect(entry).to_have_text("A student of foxes")
        entry.hover()
        shown = comfy.page.locator(".model_preview")
        for part in ("mine.safetensors", "flux-1/text-encoder", "Distilled Text Encoder Loader", "T5 of width 8"):
            expect(shown).to_contain_text(part)
        listed = server.get_json("/object_info/DistilledT5Loader")["DistilledT5Loader"]["input"]["required"]["clip_name2"][1]["options"]
    finally:
        path.unlink()
    assert listed.index("mine.safetensors") < listed.index("clip_l.safetensors"), "distilled files come first"


@pytest.mark.parametrize(
    ("locale", "nodes_2"),
    [("en", False), ("zh", True), pytest.param("zh", False, marks=pytest.mark.full), pytest.param("en", True, marks=pytest.mark.full)],
)
def test_names_and_help_pages_are_those_of_the_pack(comfy: ComfyTab, pack_root: Path, locale: str, nodes_2: bool) -> None:
    names = json.loads((pack_root / "locales" / locale / "nodeDefs.json").read_text(encoding="utf-8"))
    comfy.open(nodes_2=nodes_2, locale=locale, empty=True)
    for place, (node_type, english) in enumerate(NODES.items()):
        comfy.add(node_type, at=(50 + 350 * (place % 3), 100 + 260 * (place // 3)))
        [title] = comfy.page.evaluate("(type) => app.graph.nodes.filter(node => node.type === type).map(node => node.title)", node_type)
        assert title == names[node_type]["display_name"]
        assert (title == english) == (locale == "en")
        shown = comfy.open_help(node_type)
        for heading in headings_of(pack_root / "web" / "docs" / node_type / f"{locale}.md"):
            expect(shown.get_by_role("heading", name=heading, exact=True)).to_be_visible()
