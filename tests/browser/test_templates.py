"""The example workflows in the template browser and by link, with and without their models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.devtools.docs.browser import PACK
from distilled_t5.tests.support.comfy_tab import ComfyTab
from distilled_t5.tests.support.renderers import ONE_IN_NODES_2
from distilled_t5.tests.support.workflows import EXAMPLE_NAMES, FLUX_DEV, FORM, MINIATURE, example
from playwright.sync_api import expect

WINDOWS_PX = ((1600, 1000), (1440, 900))
SMALLEST_ZOOM = 0.65


def sizes(workflow: dict[str, Any]) -> dict[int, list[float]]:
    return {node["id"]: node["size"] for node in workflow["nodes"]}


# Opened one by one in the default run; the others are opened by the test of the zoom.
OPENED = [pytest.param(name, marks=pytest.mark.every_version if name == FLUX_DEV else pytest.mark.full) for name in EXAMPLE_NAMES]


def widget_values(workflow: dict[str, Any]) -> dict[int, Any]:
    return {node["id"]: node.get("widgets_values") or [] for node in workflow["nodes"]}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name != MINIATURE)) for name in EXAMPLE_NAMES])
def test_a_template_opens_from_the_template_browser(comfy: ComfyTab, name: str) -> None:
    comfy.open()
    comfy.load_template(name)
    assert_complete(comfy, name)


@pytest.mark.parametrize("name", OPENED)
def test_a_template_opens_from_its_link_in_nodes_2(comfy: ComfyTab, name: str) -> None:
    comfy.open_template(name, nodes_2=True)
    assert_complete(comfy, name)


@pytest.mark.parametrize(
    ("nodes_2", "window_px"),
    [
        pytest.param(False, WINDOWS_PX[0], id="canvas-large"),
        pytest.param(True, WINDOWS_PX[1], id="nodes-2-small"),
        pytest.param(False, WINDOWS_PX[1], id="canvas-small", marks=pytest.mark.full),
        pytest.param(True, WINDOWS_PX[0], id="nodes-2-large", marks=pytest.mark.full),
    ],
)
def test_every_template_opens_at_a_zoom_at_which_its_text_is_drawn(comfy: ComfyTab, nodes_2: bool, window_px: tuple[int, int]) -> None:
    comfy.page.set_viewport_size({"width": window_px[0], "height": window_px[1]})
    comfy.open(nodes_2=nodes_2)
    for name in EXAMPLE_NAMES:
        workflow = example(name)
        workflow["extra"].pop("linearMode", None)  # a form hides the graph
        comfy.open_as_template(workflow)
        assert comfy.zoom() >= SMALLEST_ZOOM, name
        titles = comfy.page.evaluate("() => app.graph.nodes.map(node => node.title)")
        assert set(titles) - set(comfy.drawn_texts()) == set(), name
        assert sizes(comfy.graph()) == sizes(example(name)), name


def assert_complete(comfy: ComfyTab, name: str) -> None:
    """All nodes, widgets, links and models exist."""
    assert comfy.missing_nodes() == []
    assert comfy.missing_models() == []
    expect(comfy.page.get_by_test_id("error-overlay")).to_be_hidden()
    assert comfy.zoom() >= SMALLEST_ZOOM
    saved, shown = example(name), comfy.graph()
    assert widget_values(shown) == widget_values(saved)
    assert shown["links"] == saved["links"]
    assert sizes(shown) == sizes(saved)


def test_the_template_browser_shows_the_picture_of_each_template(comfy: ComfyTab) -> None:
    comfy.open()
    dialog = comfy.browse_templates()
    for name in EXAMPLE_NAMES:
        card = dialog.get_by_test_id(f"template-workflow-{name}")
        # A card loads its picture when it is scrolled into view.
        card.scroll_into_view_if_needed()
        expect(card.get_by_role("img", name=name)).to_have_js_property("naturalWidth", 600)
    shown = dialog.locator("[data-testid^=template-workflow-]")
    names = shown.evaluate_all("cards => cards.map(card => card.dataset.testid.replace('template-workflow-', ''))")
    assert sorted(names) == EXAMPLE_NAMES


def test_the_links_in_the_readme_open_templates(server: ComfyServer, pack_root: Path) -> None:
    links = re.findall(r"http://127\.0\.0\.1:8188/\?template=([\w.-]+)&source=([\w.-]+)", (pack_root / "README.md").read_text("utf-8"))
    assert len(links) > 2
    for name, source in links:
        assert source == PACK
        assert server.get_json(f"/api/workflow_templates/{server.pack.name}/{name}.json") == example(name)


def test_the_app_opens_from_the_readmes_link_runs_and_shows_its_picture(comfy: ComfyTab, pack_root: Path) -> None:
    readme = (pack_root / "README.md").read_text("utf-8")
    [link] = re.findall(rf"\(http://127\.0\.0\.1:8188(/\?template={FORM}[^)]*)\)", readme)
    assert "mode=linear" in link
    comfy.open(link.replace(f"source={PACK}", f"source={comfy.server.pack.name}"), nodes_2=True)
    comfy.wait_for_workflow(FORM)
    widgets = comfy.page.get_by_test_id("linear-widgets")
    expect(widgets.get_by_role("textbox").first).to_be_visible()
    expect(widgets).to_contain_text("Prompt")
    comfy.make_small(seed=11)
    assert comfy.run() == "execution_success"
    expect(comfy.page.get_by_test_id("linear-center-panel").locator("img[src*='flux-dev-app']").first).to_be_visible()


@pytest.fixture
def without_the_student(server: ComfyServer, tmp_path: Path) -> Iterator[None]:
    """A ComfyUI whose user has not downloaded the distilled T5 yet."""
    file, aside = server.base / "models" / "text_encoders" / "distilled_t5_base.safetensors", tmp_path / "aside"
    file.rename(aside)
    yield
    aside.rename(file)


@pytest.mark.usefixtures("without_the_student")
@pytest.mark.parametrize("nodes_2", ONE_IN_NODES_2)
def test_a_missing_model_is_named_with_its_folder_and_a_download(comfy: ComfyTab, nodes_2: bool) -> None:
    comfy.open_template(FLUX_DEV, nodes_2=nodes_2)
    expect(comfy.page.get_by_test_id("error-overlay")).to_contain_text("distilled_t5_base.safetensors")
    panel = comfy.error_details()
    expect(panel).to_contain_text("distilled_t5_base.safetensors")
    expect(panel).to_contain_text("text_encoders")
    expect(panel.get_by_test_id("missing-model-download")).to_be_enabled()


def test_without_the_pack_a_template_opens_and_names_the_missing_node(comfy_without_pack: ComfyTab) -> None:
    comfy_without_pack.open()
    comfy_without_pack.drop(FLUX_DEV, json.dumps(example(FLUX_DEV)))
    assert comfy_without_pack.missing_nodes() == ["DistilledT5Loader"]
    assert len(comfy_without_pack.graph()["nodes"]) == len(example(FLUX_DEV)["nodes"])
    expect(comfy_without_pack.page.get_by_test_id("error-overlay")).to_contain_text("DistilledT5Loader")
    expect(comfy_without_pack.error_details()).to_contain_text(PACK)
