"""Makes assets/screenshot.png and example_workflows/*.jpg: `python -m distilled_t5.devtools.docs.screenshots [NAME ...]`.

A thumbnail is a card: what the template does, under its results where the miniature draws them, else under a headline.
"""

import base64
import html
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import BrowserContext

from ..comfyui.server import ComfyServer
from ..comfyui.workflow import set_inputs, to_api_prompt
from ..models.random_models import ensure_all, link_into
from .browser import ComfyPage, chromium, pack_server

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "example_workflows"
CARD_PAGE = Path(__file__).with_name("card.html")
README_IMAGE, README_TEMPLATE = ROOT / "assets" / "screenshot.png", "01-Flux-dev-start-here"
README_PX = (1600, 900)
README_GROUPS = ("1. Models", "2. Prompt", "3. Size and sampling")
THUMBNAIL_PX = 600
MARGIN = 20  # of the graph, around what is shown


@dataclass(frozen=True)
class Card:
    """What a thumbnail says, and what it shows: the images of the nodes with these titles after a run, or a headline."""

    title: str
    line: str
    headline: str = ""
    nodes: tuple[str, ...] = ()


CARDS = {
    "01-Flux-dev-start-here": Card("Flux dev: start here", "A small text encoder in the place of T5-XXL", "0.26 GB"),
    "02-Flux-dev-on-12-GB": Card("Flux dev on 12 GB", "fp8 weights and the distilled T5", "12 GB"),
    "03-Flux-schnell-4-steps": Card("Flux schnell", "Four steps, no guidance, Apache-2.0", "4 steps"),
    "04-Flux-dev-as-a-form": Card("Flux dev as a form", "Prompt, size and seed, without a graph", "Prompt…"),
    "05-Flux-dev-with-a-LoRA": Card("Flux with a LoRA", "Any LoRA for Flux works as usual", "+ LoRA"),
    "06-Flux-dev-with-a-ControlNet": Card("Flux with a ControlNet", "A new image with the edges of yours", "Edges"),
    "07-T5-XXL-against-distilled-T5": Card("Against T5-XXL", "One prompt, one seed, side by side", "9.5 : 0.26"),
    "08-Miniature-draw-on-a-CPU": Card("Draw on a CPU", "The miniature, a small Flux in this pack", nodes=("Save Image",)),
    "09-Miniature-teacher-and-student": Card(
        "Teacher and student", "Same prompt, same seed, a quarter of the weights", nodes=("Left: teacher. Right: student.",)
    ),
    "10-Miniature-distil-an-encoder": Card("Distil an encoder", "Train a student, in minutes on a CPU", nodes=("Distil Text Encoder",)),
    "11-Where-Flux-looks-at-a-word": Card(
        "Where Flux looks", "The image, and its attention to a word", nodes=("The image", "Where Flux looks")
    ),
    "12-Check-written-text": Card("Check written text", "OCR reads the image back and counts", nodes=("Distilled T5 OCR Accuracy",)),
    "13-Compare-two-encoders": Card(
        "Compare two encoders", "Short lines: both see a prompt alike", nodes=("Distilled T5 Text Encoder Map",)
    ),
    "14-What-encoders-cost": Card("What encoders cost", "Memory and time, on your own machine", "MB, ms"),
    "15-Save-a-copy": Card("Save a copy", "An encoder file in another number format", "bf16\u2192fp8"),
    "16-Stable-Diffusion-3-5-medium": Card("Stable Diffusion 3.5", "CLIP-L, CLIP-G and a distilled T5; you train it", "SD 3.5"),
    "17-PixArt-Sigma": Card("PixArt-Sigma", "With a distilled T5, which you train", "Sigma"),
    "18-PixArt-alpha": Card("PixArt-alpha", "With a distilled T5, by the paper's Appendix B", "alpha"),
    "19-Chroma": Card("Chroma", "With a distilled T5, which you train", "Chroma"),
    "20-Trim-a-text-encoder": Card("Trim a text encoder", "FLUX.2 klein's, without the layers that it does not read", "8.0\u21926.2"),
}

# Only the graph: no tabs, no sidebar, no menus, no note.
BARE = """() => {
    app.extensionManager.focusMode = true
    app.extensionManager.setting.set('Comfy.Graph.CanvasMenu', false)
    app.graph.nodes.filter(node => node.type === 'MarkdownNote').forEach(node => app.graph.remove(node))
}"""
NO_BUTTONS = "button[aria-label='Show Menu'] { display: none !important }"
LOOK_AT = """([left, top, width]) => {
    const view = app.canvas.ds
    view.scale = window.innerWidth / width
    view.offset[0] = -left
    view.offset[1] = -top
    app.canvas.setDirty(true, true)
}"""


def make_all(comfyui: Path, only: Sequence[str] = ()) -> None:
    """Make all images, or those of the named templates, in one browser on one server, and print their names."""
    with tempfile.TemporaryDirectory(prefix="distilled-t5-pictures-") as folder:
        base = Path(folder)
        link_into(ensure_all(ROOT / ".dev" / "stand-ins"), base)
        with pack_server(comfyui, base, ROOT) as server, chromium() as context:
            if not only:
                take_readme_image(ComfyPage(context, server))
            for name in only or CARDS:
                target = EXAMPLES / f"{name}.jpg"
                card_image(context, CARDS[name], results(server, name)).save(target, quality=88, optimize=True, progressive=True)
                say(target)


def take_readme_image(tab: ComfyPage) -> None:
    """The Flux dev workflow, from the models to the sampler."""
    tab.open_template(README_TEMPLATE, nodes_2=True)
    bare(tab, README_PX)
    frame(tab, README_GROUPS)
    capture(tab.page.screenshot()).save(README_IMAGE, optimize=True)
    say(README_IMAGE)
    tab.close()


def results(server: ComfyServer, name: str) -> list[Image.Image]:
    """The images of a card's nodes after a run of its template; none if it shows a headline."""
    wanted = CARDS[name].nodes
    if not wanted:
        return []
    prompt = to_api_prompt(json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8")), server.object_info())
    if any(node["class_type"] == "DistilledT5OCRAccuracy" for node in prompt.values()):
        set_inputs(prompt, "DistilledT5OCRAccuracy", reader="tesseract")
    by_node = server.images_by_node(server.run(prompt))
    by_title = {prompt[node_id]["_meta"]["title"]: images for node_id, images in by_node.items()}
    return [image for title in wanted for image in by_title[title]]


def card_image(context: BrowserContext, card: Card, shown: Sequence[Image.Image]) -> Image.Image:
    """A square card, because the template browser shows squares."""
    top = "".join(f'<img src="{data_url(image)}">' for image in shown) or f'<span class="headline">{html.escape(card.headline)}</span>'
    text = CARD_PAGE.read_text(encoding="utf-8").replace("TITLE", html.escape(card.title)).replace("LINE", html.escape(card.line))
    page = context.new_page()
    page.set_viewport_size({"width": THUMBNAIL_PX, "height": THUMBNAIL_PX})
    page.set_content(text.replace("TOP", top))
    taken = capture(page.screenshot())
    page.close()
    return taken


def data_url(image: Image.Image) -> str:
    """An image as a URL that contains it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def bare(tab: ComfyPage, size_px: tuple[int, int]) -> None:
    """Show only the graph, without its note, at a size."""
    tab.page.set_viewport_size({"width": size_px[0], "height": size_px[1]})
    tab.page.evaluate(BARE)
    tab.page.add_style_tag(content=NO_BUTTONS)


def frame(tab: ComfyPage, titles: tuple[str, ...]) -> None:
    """Move the view so that the groups with these titles fill it."""
    rects: list[Any] = [group["bounding"] for group in tab.graph()["groups"] if group["title"] in titles]
    left, top = min(rect[0] for rect in rects), min(rect[1] for rect in rects)
    right, bottom = max(rect[0] + rect[2] for rect in rects), max(rect[1] + rect[3] for rect in rects)
    aspect = README_PX[0] / README_PX[1]
    width = max(right - left + 2 * MARGIN, (bottom - top + 2 * MARGIN) * aspect)
    tab.page.evaluate(LOOK_AT, [(left + right - width) / 2, (top + bottom - width / aspect) / 2, width])
    tab.settle()


def capture(screenshot: bytes) -> Image.Image:
    """A screenshot as an image."""
    return Image.open(io.BytesIO(screenshot)).convert("RGB")


def say(path: Path) -> None:
    print(f"wrote {path.relative_to(ROOT)} ({path.stat().st_size / 1000:.0f} kB)", flush=True)


def main() -> None:
    """Make the images, or those of the named templates, with the ComfyUI in COMFYUI_PATH, else with the one that dev.py set up."""
    comfyui, unknown = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".dev" / "comfyui"), sorted(set(sys.argv[1:]) - set(CARDS))
    if unknown:
        sys.exit(f"no template is called {', '.join(unknown)}.\nWhat to do: name one of {', '.join(CARDS)}.")
    if not (comfyui / "main.py").is_file():
        sys.exit(f"{comfyui} is not a ComfyUI: run `python dev.py test` once, or set COMFYUI_PATH to a folder with ComfyUI's main.py.")
    make_all(comfyui, sys.argv[1:])


if __name__ == "__main__":
    main()
