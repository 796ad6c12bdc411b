"""Writes locales/en/nodeDefs.json from the schemas of the nodes: `python -m distilled_t5.devtools.docs.build_locales`.

Run it after a text of a node has changed, with .dev/python on PYTHONPATH. The frontend shows an `en` file instead of the Python texts, so
the file is made from them, and a test compares the two. Other languages are written by hand, with the same keys.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

from ..comfyui.in_process import ROOT, start_comfyui

LOCALES = ROOT / "locales"
# The frontend compiles most of these texts as vue-i18n messages, where these characters have a special meaning.
MESSAGE_SYNTAX = re.compile(r"[{}|@]")

NodeTexts = dict[str, Any]


def locale_path(language: str) -> Path:
    """The file that ComfyUI reads for a language."""
    return LOCALES / language / "nodeDefs.json"


def pack_nodes() -> list[Any]:
    """The node classes of the pack; ComfyUI must be importable."""
    from ...nodes import DistilledT5Extension

    return asyncio.run(DistilledT5Extension().get_node_list())


def schema_texts(nodes: list[Any]) -> dict[str, NodeTexts]:
    """All texts of the nodes, in the layout of nodeDefs.json. An input without a display name is shown by its id."""
    texts = {}
    for schema in (node.define_schema() for node in nodes):
        texts[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {slot.id: {"name": slot.display_name or slot.id, "tooltip": slot.tooltip} for slot in schema.inputs},
            "outputs": {str(index): {"name": slot.display_name, "tooltip": slot.tooltip} for index, slot in enumerate(schema.outputs)},
        }
    return texts


def plain_messages(texts: NodeTexts) -> NodeTexts:
    """The texts without those that vue-i18n would change; for a missing key the frontend shows the Python text."""
    nested = {key: plain_messages(value) if isinstance(value, dict) else value for key, value in texts.items()}
    return {key: value for key, value in nested.items() if isinstance(value, dict) or not MESSAGE_SYNTAX.search(value)}


def main() -> None:
    """Write the English file."""
    start_comfyui("--cpu")
    path = locale_path("en")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain_messages(schema_texts(pack_nodes())), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
