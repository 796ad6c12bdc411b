"""ComfyUI's page in a real Chromium: for the documentation's images, and for the browser tests, which extend it."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, ConsoleMessage, Page, sync_playwright

from ..comfyui.server import ComfyServer, link_folder

Json = dict[str, Any]

PACK = "distilled-t5"  # the name of the folder when the registry installs the pack
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
VIEW_PX = (1600, 900)
SETTINGS: Json = {
    "Comfy.TutorialCompleted": True,
    "Comfy.OnboardingCoachmarks.Seen": ["appMode", "firstRun"],  # frontend 1.58 starts with tours
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.Pointer.DoubleClickTime": 1000,  # ms; on a busy machine the second click arrives late
}
# Errors of the page without any pack: files that a new user does not have, and requests that --disable-api-nodes forbids.
HARMLESS = re.compile(
    r"404 \(Not Found\) \(.*(/api/userdata[/?]|/user\.css|/favicon\.ico|/models/preview/)|ComfyApp graph accessed before initialization"
    r"|violates the following Content Security Policy|Refused to connect because it violates"
)
READY = """() => window.app?.vueAppReady && window.graph && app.extensionManager?.workflow.activeWorkflow
    && !app.extensionManager.spinner && !document.querySelector('.p-blockui-mask')"""
ANIMATIONS_ENDED = """() => document.getAnimations()
    .every(one => one.playState !== 'running' || one.effect.getTiming().iterations === Infinity)"""


def find_chromium() -> str:
    """The system's Chromium or Chrome: CHROMIUM_PATH, else the first on PATH; RuntimeError if neither exists."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM_PATH", ""), *PROGRAMS))), None)
    if found is None:
        raise RuntimeError(
            "Neither Chromium nor Google Chrome was found on PATH.\n"
            "What to do: install one (Debian: apt-get install chromium), or set CHROMIUM_PATH to its program."
        )
    return found


@contextmanager
def chromium(scale: float = 1.0, size_px: tuple[int, int] = VIEW_PX) -> Iterator[BrowserContext]:
    """A headless Chromium with one profile; `scale` is the number of device pixels per pixel of the page."""
    program = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        try:
            yield browser.new_context(viewport={"width": size_px[0], "height": size_px[1]}, device_scale_factor=scale)
        finally:
            browser.close()


def pack_server(comfyui: Path, base: Path, pack: Path, flags: tuple[str, ...] = (), folder: str = PACK) -> ComfyServer:
    """A server, not started, with the pack in a folder named as the registry names it, or in `folder`."""
    link = base / "pack" / folder
    link.parent.mkdir(parents=True, exist_ok=True)
    link_folder(link, pack)
    server = ComfyServer(comfyui, base, pack, flags)
    server.pack = link
    return server


class ComfyPage:
    """A tab with ComfyUI's page. `errors` collects uncaught errors and console errors, except those of a ComfyUI without packs."""

    def __init__(self, context: BrowserContext, server: ComfyServer) -> None:
        self.page: Page = context.new_page()
        self.server = server
        self.errors: list[str] = []
        self.nodes_2 = False
        self.page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error.stack or error.message}"))
        self.page.on("console", self._on_console)

    def _on_console(self, message: ConsoleMessage) -> None:
        text = f"{message.text} ({message.location.get('url', '')})"
        if message.type == "error" and not HARMLESS.search(text):
            self.errors.append(text)

    def open(self, path: str = "/", nodes_2: bool = False, locale: str = "en", empty: bool = False) -> None:
        """Open a page of the server as a new user, with one of the two renderers; `empty` clears the canvas."""
        self.nodes_2 = nodes_2
        self.server.post_json("/settings", SETTINGS | {"Comfy.VueNodes.Enabled": nodes_2, "Comfy.Locale": locale})
        self.page.goto(f"{self.server.url}/system_stats")
        self.page.evaluate("() => { localStorage.clear(); sessionStorage.clear() }")
        self.page.goto(self.server.url + path)
        self.wait_until_ready()
        if empty:
            self.page.evaluate("() => app.graph.clear()")

    def open_template(self, name: str, nodes_2: bool = False) -> None:
        """Open the link to one of this pack's templates."""
        self.open(f"/?template={name}&source={self.server.pack.name}", nodes_2=nodes_2)
        self.wait_for_workflow(name)

    def wait_until_ready(self) -> None:
        """Wait until the page has loaded its nodes and its first workflow and accepts input."""
        self.page.wait_for_function(READY)

    def wait_for(self, condition: str, argument: Any = None) -> None:
        """Wait until a JavaScript function returns something true."""
        self.page.wait_for_function(condition, arg=argument)

    def graph(self) -> Json:
        """The graph on the canvas as it would be saved."""
        return json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def wait_for_workflow(self, name: str) -> None:
        """Wait until a workflow is active and the page accepts input."""
        self.wait_for("(path) => app.extensionManager.workflow.activeWorkflow?.path === path", f"workflows/{name}.json")
        self.page.get_by_role("dialog").wait_for(state="hidden")
        self.wait_until_ready()

    def settle(self) -> None:
        """Wait until everything is drawn and animations have ended."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.wait_for(ANIMATIONS_ENDED)

    def close(self) -> None:
        """Close the tab without saving."""
        self.page.close()
