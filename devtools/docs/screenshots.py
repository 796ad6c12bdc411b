"""Takes assets/screenshot.png and example_workflows/*.jpg: `python -m distilled_t5.devtools.docs.screenshots`.

Models are stand-ins, which draw noise: so the README shows the graph up to the sampler, and the template browser shows graphs.
"""

import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..models.random_models import ensure_all, link_into
from .browser import ComfyPage, chromium, pack_server

ROOT = Path(__file__).resolve().parents[2]
README_PICTURE = ROOT / "assets" / "screenshot.png"
README_PX = (1600, 900)
README_GROUPS = ("1. Models", "2. Prompt", "3. Size and sampling")
THUMBNAIL_PX, CAPTURE_PX, APP_PX = 600, 1200, 840
MARGIN = 20  # of the graph, around what is shown
APP = "flux-dev-app"
BEGINNING = ("1. Models", "What was loaded", "2. Prompt")
# The groups that distinguish a template from the others; all groups for templates that are not listed.
SHOWN_GROUPS = {
    "flux-dev": BEGINNING,
    "flux-schnell": BEGINNING,
    "flux-dev-lora": ("1. Models", "LoRA", "2. Prompt"),
    "flux-dev-controlnet": ("1. Models", "ControlNet", "2. Prompt", "Edges and their strength", "3. Size and sampling"),
}

# Only the graph: no tabs, no sidebar, no menus, no note.
BARE = """() => {
    app.extensionManager.focusMode = true
    app.extensionManager.setting.set('Comfy.Graph.CanvasMenu', false)
    app.graph.nodes.filter(node => node.type === 'MarkdownNote').forEach(node => app.graph.remove(node))
}"""
NO_BUTTONS = "button[aria-label='Show Menu'] { display: none !important }"
RESTORE = """(saved) => {
    for (const {id, widgets_values} of saved)
        app.graph.getNodeById(id).widgets?.forEach((widget, index) => { widget.value = widgets_values?.[index] ?? widget.value })
}"""
LOOK_AT = """([left, top, width]) => {
    const view = app.canvas.ds
    view.scale = window.innerWidth / width
    view.offset[0] = -left
    view.offset[1] = -top
    app.canvas.setDirty(true, true)
}"""


def take_all(comfyui: Path, only: Sequence[str] = ()) -> None:
    """Take all pictures, or those of the named templates, in one browser on one server, and print their names."""
    with tempfile.TemporaryDirectory(prefix="distilled-t5-pictures-") as folder:
        base = Path(folder)
        link_into(ensure_all(ROOT / ".dev" / "stand-ins"), base)
        with pack_server(comfyui, base, ROOT) as server, chromium() as context:
            if not only:
                take_readme_picture(ComfyPage(context, server))
            for path in sorted((ROOT / "example_workflows").glob("*.json")):
                if only and path.stem not in only:
                    continue
                tab = ComfyPage(context, server)
                take_thumbnail(tab, path)
                tab.close()


def take_readme_picture(tab: ComfyPage) -> None:
    """The Flux dev workflow after a run, from the models to the sampler."""
    tab.open_template("flux-dev", nodes_2=True)
    as_shipped = tab.graph()
    tab.make_small()
    tab.run()
    tab.wait_for_picture("SaveImage", 256)
    restore_widgets(tab, as_shipped)
    bare(tab, README_PX)
    frame(tab, README_GROUPS)
    README_PICTURE.parent.mkdir(exist_ok=True)
    capture(tab).save(README_PICTURE, optimize=True)
    say(README_PICTURE)
    tab.close()


def take_thumbnail(tab: ComfyPage, workflow: Path) -> None:
    """A square, because the template browser shows squares: the graph, or the form of the app."""
    tab.open_template(workflow.stem, nodes_2=True)
    if workflow.stem == APP:
        tab.page.set_viewport_size({"width": APP_PX, "height": APP_PX})
    else:
        bare(tab, (CAPTURE_PX, CAPTURE_PX))
        frame(tab, SHOWN_GROUPS.get(workflow.stem, ()))
    target = workflow.with_suffix(".jpg")
    picture = capture(tab).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    picture.save(target, quality=85, optimize=True, progressive=True)
    say(target)


def restore_widgets(tab: ComfyPage, graph: dict[str, Any]) -> None:
    """Set all widgets to their values in a saved graph."""
    tab.page.evaluate(RESTORE, graph["nodes"])


def bare(tab: ComfyPage, size_px: tuple[int, int]) -> None:
    """Show only the graph, without its note, at a size."""
    tab.page.set_viewport_size({"width": size_px[0], "height": size_px[1]})
    tab.page.evaluate(BARE)
    tab.page.add_style_tag(content=NO_BUTTONS)


def frame(tab: ComfyPage, titles: tuple[str, ...]) -> None:
    """Move the view so that the groups with these titles fill it; without titles, all groups."""
    rects = [group["bounding"] for group in tab.graph()["groups"] if not titles or group["title"] in titles]
    left, top = min(rect[0] for rect in rects), min(rect[1] for rect in rects)
    right, bottom = max(rect[0] + rect[2] for rect in rects), max(rect[1] + rect[3] for rect in rects)
    size = tab.page.viewport_size
    assert size is not None, "the browser was started with a viewport"
    width = max(right - left + 2 * MARGIN, (bottom - top + 2 * MARGIN) * size["width"] / size["height"])
    height = width * size["height"] / size["width"]
    tab.page.evaluate(LOOK_AT, [(left + right - width) / 2, (top + bottom - height) / 2, width])


def capture(tab: ComfyPage) -> Image.Image:
    """An image of the tab."""
    tab.settle()
    return Image.open(io.BytesIO(tab.page.screenshot())).convert("RGB")


def say(path: Path) -> None:
    print(f"wrote {path.relative_to(ROOT)} ({path.stat().st_size / 1000:.0f} kB)", flush=True)


def main() -> None:
    """Take the pictures, or those of the named templates, with the ComfyUI in COMFYUI_PATH, else with the one that dev.py set up."""
    comfyui = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".dev" / "comfyui")
    if not (comfyui / "main.py").is_file():
        sys.exit(f"{comfyui} is not a ComfyUI: run `python dev.py test` once, or set COMFYUI_PATH to a folder with ComfyUI's main.py.")
    take_all(comfyui, sys.argv[1:])


if __name__ == "__main__":
    main()
