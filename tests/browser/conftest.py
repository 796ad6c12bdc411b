"""One ComfyUI with the pack and stand-in models, one Chromium, and a new tab for each test."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.devtools.docs.browser import PACK, chromium, find_chromium, pack_server
from distilled_t5.devtools.models.random_models import ensure_all, link_into
from distilled_t5.tests.support.comfy_tab import ComfyTab
from filelock import FileLock
from playwright.sync_api import BrowserContext, Route, expect

ROOT = Path(__file__).resolve().parent.parent.parent
# With the files of another frontend than ComfyUI's own, the pack is in the folder that an archive of the main branch unpacks to.
FRONTEND = os.environ.get("FRONTEND_PATH", "")
FLAGS = ("--front-end-root", FRONTEND) if FRONTEND else ()
FOLDER = "distilled-t5-main" if FRONTEND else PACK
PICTURES = ROOT / ".dev" / ("screenshots-newest" if FRONTEND else "screenshots")

# A machine that also runs a server and a browser is slow; the wait ends as soon as the condition holds.
expect.set_options(timeout=30_000)


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The folder of the ComfyUI under test: COMFYUI_PATH (dev.py sets it), else the one that dev.py set up."""
    path = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".dev" / "comfyui").resolve()
    if not (path / "main.py").is_file():
        pytest.fail(f"COMFYUI_PATH is {path}, which is not a ComfyUI: run `python dev.py test`, or set COMFYUI_PATH.", pytrace=False)
    return path


@pytest.fixture(scope="session")
def browser_context() -> Iterator[BrowserContext]:
    """The system's Chromium; without one, the tests fail."""
    try:
        find_chromium()
    except RuntimeError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    with chromium() as context:
        yield context


@pytest.fixture(scope="session")
def server(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI with the pack and every model that the example workflows name."""
    base = tmp_path_factory.mktemp("browser")
    with FileLock(ROOT / ".dev" / "stand-ins.lock"):  # one worker makes them
        link_into(ensure_all(ROOT / ".dev" / "stand-ins"), base)
    with pack_server(comfyui_path, base, ROOT, FLAGS, FOLDER) as running:
        yield running


@pytest.fixture
def comfy(request: pytest.FixtureRequest, browser_context: BrowserContext, server: ComfyServer) -> Iterator[ComfyTab]:
    """A tab for the test to open; afterwards its picture is kept, and an error on it fails the test."""
    yield from recorded(ComfyTab(browser_context, server), request.node.name)


def recorded(tab: ComfyTab, test_name: str) -> Iterator[ComfyTab]:
    """Give a tab to a test; afterwards keep a picture of it, close it, and fail if it reported errors."""
    yield tab
    name = re.sub(r"[^a-z0-9]+", "-", test_name.removeprefix("test_").lower()).strip("-")
    tab.screenshot(PICTURES / f"{name}.png")
    tab.close()
    assert not tab.errors, "the page reported errors:\n" + "\n".join(tab.errors)


@pytest.fixture(scope="module")
def server_without_pack(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI whose user has disabled the pack."""
    base = tmp_path_factory.mktemp("off")
    link_into(ensure_all(ROOT / ".dev" / "stand-ins"), base)
    with pack_server(comfyui_path, base, ROOT, (*FLAGS, "--whitelist-custom-nodes", "nothing")) as running:
        yield running


def without_pack(route: Route) -> None:
    """Answer for a server that has other nodes alone."""
    answer = route.fetch()
    route.fulfill(response=answer, json={name: node for name, node in answer.json().items() if not name.startswith("DistilledT5")})


@pytest.fixture(params=["server", pytest.param("server_without_pack", marks=pytest.mark.full)])
def comfy_without_pack(request: pytest.FixtureRequest, browser_context: BrowserContext) -> Iterator[ComfyTab]:
    """A tab that gets none of the pack's nodes, from a server that has them, and from one that does not."""
    tab = ComfyTab(browser_context, request.getfixturevalue(request.param))
    if request.param == "server":
        tab.page.route("**/object_info", without_pack)
    yield from recorded(tab, request.node.name)
