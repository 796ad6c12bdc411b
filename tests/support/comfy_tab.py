"""ComfyUI's page driven as a user would: searching, placing, running, saving, and reading what it shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from distilled_t5.devtools.docs.browser import ComfyPage
from playwright.sync_api import Locator, expect

Point = tuple[float, float]

DROP = """([name, text]) => {
    const data = new DataTransfer()
    data.items.add(new File([text], name, {type: 'application/json'}))
    const at = {clientX: 800, clientY: 500, bubbles: true, cancelable: true, dataTransfer: data}
    document.querySelector('#graph-canvas').dispatchEvent(new DragEvent('drop', at))
}"""
ADD_NODE = """([type, at]) => { const node = LiteGraph.createNode(type); node.pos = at; app.graph.add(node) }"""
SET_WIDGETS = """([type, values]) => {
    for (const node of app.graph.nodes.filter(node => node.type === type))
        for (const [name, value] of Object.entries(values)) {
            const widget = node.widgets.find(widget => widget.name === name)
            widget.value = value
            widget.callback?.(value)
        }
}"""
TITLE_POINT = """(type) => {
    const node = app.graph.nodes.find(node => node.type === type), frame = app.canvas.canvas.getBoundingClientRect()
    const [x, y] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + 60, node.pos[1] - 15])
    return [frame.left + x, frame.top + y]
}"""
# What the canvas writes while it draws once; in Nodes 2.0, what the nodes on the page show.
DRAWN_TEXTS = """(nodes2) => {
    if (nodes2) return [...document.querySelectorAll('[data-node-id]')].flatMap(node => node.innerText.split('\\n'))
    const texts = [], prototype = CanvasRenderingContext2D.prototype, draw = prototype.fillText
    prototype.fillText = function (text, ...rest) { texts.push(String(text)); return draw.call(this, text, ...rest) }
    app.canvas.draw(true, true)
    prototype.fillText = draw
    return texts
}"""
# As the template browser opens a workflow, without its dialog.
OPEN_AS_TEMPLATE = "graph => app.loadGraphData(graph, true, true, null, {openSource: 'template'})"
# The rectangle of the only node of a type on the screen: left, top, right, bottom.
ON_SCREEN = """(type) => {
    const [node] = app.graph.nodes.filter(node => node.type === type), frame = app.canvas.canvas.getBoundingClientRect()
    const [left, top] = app.canvas.ds.convertOffsetToCanvas([node.pos[0], node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT])
    const [right, bottom] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + node.size[0], node.pos[1] + node.size[1]])
    return [frame.left + left, frame.top + top, frame.left + right, frame.top + bottom]
}"""
WATCH_RUN = """() => {
    window.runEnded = null
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(kind, () => { window.runEnded ??= kind })
}"""
RUN_ENDED = "() => window.runEnded || document.querySelector('[data-testid=error-overlay]')"
PICTURES_SHOWN = """([type, nodes2, side, count]) => {
    const inDom = node => [...document.querySelectorAll(`[data-node-id="${node.id}"] img`)]
    const pictures = app.graph.nodes.filter(node => node.type === type).flatMap(node => nodes2 ? inDom(node) : node.imgs ?? [])
    return pictures.filter(one => one.complete && one.naturalWidth === side && one.naturalHeight === side).length === count
}"""


class ComfyTab(ComfyPage):
    """A tab with ComfyUI's page, for tests."""

    def reload(self) -> None:
        """Reload the page, as F5 does."""
        self.page.reload()
        self.wait_until_ready()

    def add(self, node_type: str, at: Point = (300, 200)) -> None:
        """Put a node on the canvas without the mouse."""
        self.page.evaluate(ADD_NODE, [node_type, at])

    def wait_for_node(self, node_type: str, count: int = 1) -> None:
        """Wait until the canvas has that many nodes of a type."""
        self.wait_for("([type, count]) => app.graph.nodes.filter(node => node.type === type).length === count", [node_type, count])

    def set_widgets(self, node_type: str, **values: Any) -> None:
        """Set widgets of all nodes of a type."""
        self.page.evaluate(SET_WIDGETS, [node_type, values])

    def make_small(self, side_px: int = 256, steps: int = 2, seed: int = 1) -> None:
        """Make an image workflow fast enough for a CPU; a seed that no other test uses keeps ComfyUI from answering from its cache."""
        self.set_widgets("EmptySD3LatentImage", width=side_px, height=side_px)
        self.set_widgets("KSampler", steps=steps, seed=seed)

    def search(self, query: str) -> Locator:
        """Type into the node search, which a double click on the canvas opens; returns the results."""
        box = self.page.get_by_role("combobox", name="Add a node...")
        if not box.is_visible():
            self.page.mouse.dblclick(800, 780, delay=30)  # the page ignores two clicks at the same moment
        box.fill(query)
        return self.page.get_by_role("search").get_by_test_id("result-item")

    def place_from_search(self, query: str, title: str, at: Point = (800, 400)) -> None:
        """Search, choose the result with that title and place it on the canvas."""
        self.search(query).filter(has=self.page.get_by_text(title, exact=True)).click()
        self.page.get_by_role("search").wait_for(state="hidden")
        self.page.mouse.move(*at)
        self.page.mouse.click(*at)

    def drag_from_library(self, title: str, at: Point) -> None:
        """Find a node in the node library and drag it onto the canvas."""
        self.page.get_by_role("button", name="Node Library").click()
        self.page.get_by_placeholder(re.compile(r"^Search( Nodes)?\.\.\.$")).fill(title)
        leaf = self.page.locator("[role=treeitem][draggable=true]").filter(has_text=title)
        leaf.drag_to(self.page.locator("#graph-canvas"), target_position={"x": at[0], "y": at[1]})

    def find_model(self, query: str) -> Locator:
        """Search the model library by file name; returns the entry, after the page has read its metadata."""
        self.page.get_by_role("button", name="Model Library").click()
        self.page.get_by_placeholder("Search Models...").fill(query)
        return self.page.locator("[role=treeitem]").last

    def select(self, node_type: str) -> None:
        """Click on the title of the first node of a type."""
        self.wait_for("(type) => app.canvas.visible_nodes.some(node => node.type === type)", node_type)
        self.settle()
        self.page.mouse.click(*self.page.evaluate(TITLE_POINT, node_type))
        self.wait_for("(type) => [...app.canvas.selectedItems].some(item => item.type === type)", node_type)

    def open_help(self, node_type: str) -> Locator:
        """Select a node and open its help page."""
        self.select(node_type)
        self.page.get_by_test_id("info-button").click()
        return self.page.locator(".node-help-content")

    def browse_templates(self) -> Locator:
        """Open the template browser at this pack's templates; returns the dialog."""
        self.page.get_by_role("button", name="Templates").click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_role("button", name=self.server.pack.name).click()
        return dialog

    def load_template(self, name: str) -> None:
        """Open one of this pack's templates from the template browser."""
        self.browse_templates().get_by_test_id(f"template-workflow-{name}").click()
        self.wait_for_workflow(name)

    def drop(self, name: str, text: str) -> None:
        """Drop a workflow file on the canvas."""
        self.page.evaluate(DROP, [f"{name}.json", text])
        self.wait_for_workflow(name)

    def save_as(self, name: str) -> None:
        """Save the workflow under a name, with Ctrl-S."""
        self.page.keyboard.press("Control+s")
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_role("textbox").fill(name)
        dialog.get_by_role("button", name="Confirm").click()
        self.wait_for_workflow(name)
        self.wait_for("() => !app.extensionManager.workflow.activeWorkflow.isModified")

    def open_saved(self, name: str) -> None:
        """Open a saved workflow from the sidebar."""
        self.page.get_by_role("button", name="Workflows").click()
        self.page.get_by_test_id("workflows-sidebar").get_by_text(name, exact=True).click()
        self.wait_for_workflow(name)

    def switch_to(self, name: str) -> None:
        """Click on the tab of an open workflow."""
        self.page.get_by_text(name, exact=True).first.click()
        self.page.mouse.move(800, 500)  # the tab shows a preview while the mouse is on it
        self.wait_for_workflow(name)

    def open_as_template(self, graph: dict[str, Any]) -> None:
        """Open a workflow as the template browser does."""
        self.page.evaluate(OPEN_AS_TEMPLATE, graph)
        self.settle()

    def zoom(self) -> float:
        """The zoom of the canvas: 1 is 100 %."""
        return self.page.evaluate("() => app.canvas.ds.scale")

    def drawn_texts(self) -> list[str]:
        """The texts that the nodes show at this zoom."""
        return self.page.evaluate(DRAWN_TEXTS, self.nodes_2)

    def screen_rect(self, node_type: str) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the only node of a type, in pixels of the window."""
        left, top, right, bottom = self.page.evaluate(ON_SCREEN, node_type)
        return left, top, right, bottom

    def missing_nodes(self) -> list[str]:
        """Types on the canvas that the page has not registered."""
        return self.page.evaluate("() => app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))")

    def draws_removed_nodes(self) -> bool:
        """Whether the canvas still draws a node that was removed from the graph."""
        self.settle()
        return self.page.evaluate("() => app.canvas.visible_nodes.some(node => !node.graph)")

    def missing_models(self) -> list[str]:
        """Model files named by the graph that the server does not have, as the page reports them."""
        found = self.page.evaluate("() => app.refreshMissingModels({silent: true})")
        return [candidate["name"] for candidate in found["confirmedCandidates"]]

    def run(self, timeout_s: float = 120) -> str:
        """Press Run and wait; returns execution_success, execution_error, execution_interrupted, or "" if nothing was queued."""
        self.page.evaluate(WATCH_RUN)
        buttons = self.page.get_by_test_id("queue-button").or_(
            self.page.get_by_test_id("linear-run-button").get_by_role("button", name="Run")
        )
        buttons.locator("visible=true").click()
        self.page.wait_for_function(RUN_ENDED, timeout=timeout_s * 1000)
        return self.page.evaluate("() => window.runEnded ?? ''")

    def wait_for_picture(self, node_type: str, side_px: int, count: int = 1) -> None:
        """Wait until nodes of a type show that many square images of a size."""
        self.wait_for(PICTURES_SHOWN, [node_type, self.nodes_2, side_px, count])

    def error_details(self) -> Locator:
        """Press View details in the message of an error; returns the panel."""
        overlay = self.page.get_by_test_id("error-overlay")
        expect(overlay).to_be_visible()
        overlay.get_by_test_id("error-overlay-see-errors").click()
        return self.page.get_by_test_id("properties-panel")

    def screenshot(self, path: Path) -> None:
        """Save an image of the tab."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.settle()
        self.page.screenshot(path=path)
