"""Takes assets/nodes/*.png, one image of each node for the README: `python -m distilled_t5.devtools.docs.node_images`."""

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from ..models.random_models import ensure_all, link_into
from .browser import ComfyPage, chromium, pack_server
from .build_locales import locale_path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "assets" / "nodes"
SCALE, COLOURS = 1.5, 64
MARGINS_PX = (-12, -12, 12, 12)  # left, top, right, bottom
PLACE = """([type, values]) => {
    const node = LiteGraph.createNode(type)
    node.pos = [120, 120]
    app.graph.add(node)
    for (const [name, value] of Object.entries(values)) node.widgets.find(widget => widget.name === name).value = value
}"""
# Values that say more than the defaults.
SHOWN: dict[str, dict[str, Any]] = {
    "DistilledT5Loader": {"clip_name1": "clip_l.safetensors", "clip_name2": "distilled_t5_base.safetensors"},
    "DistilledT5TextEncode": {"text": "A red fox in a blue scarf reads a newspaper, morning light"},
    "DistilledT5CrossAttentionMap": {"prompt": "A red fox in a blue scarf reads a newspaper", "word": "red fox"},
    "DistilledT5OCRAccuracy": {"expected": "OPEN ON SUNDAYS"},
}


def take(tab: ComfyPage, node_type: str) -> Path:
    """The image of a node on an empty canvas, as Nodes 2.0 shows it."""
    tab.open(nodes_2=True, empty=True)
    tab.page.evaluate(PLACE, [node_type, SHOWN.get(node_type, {})])
    tab.settle()
    box = tab.page.locator("[data-node-id]").first.bounding_box()
    assert box is not None, "the node is on the canvas"
    corners = (box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])
    left, top, right, bottom = (round(SCALE * (edge + margin)) for edge, margin in zip(corners, MARGINS_PX, strict=True))
    image = Image.open(io.BytesIO(tab.page.screenshot())).convert("RGB").crop((left, top, right, bottom))
    path = FOLDER / f"{node_type}.png"
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def main() -> None:
    """Take the images of all nodes, or of those named, on the ComfyUI that dev.py set up."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="distilled-t5-nodes-") as folder:
        base = Path(folder)
        link_into(ensure_all(ROOT / ".dev" / "stand-ins"), base)
        with pack_server(ROOT / ".dev" / "comfyui", base, ROOT) as server, chromium(scale=SCALE) as context:
            tab = ComfyPage(context, server)
            for node_type in sys.argv[1:] or json.loads(locale_path("en").read_text(encoding="utf-8")):
                print(f"wrote {take(tab, node_type).relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    main()
