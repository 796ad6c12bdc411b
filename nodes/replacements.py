"""Workflows with the authors' loader node open with ours, through ComfyUI's node replacement, and run with it when they come by API."""

from __future__ import annotations

import importlib
from typing import Any

from comfy_api.latest import ComfyAPI, io

from ..families import DEFAULT

OLD_NODE, NEW_NODE = "DualCLIPLoaderT5Base", "DistilledT5Loader"


async def register_replacements() -> None:
    """Tell ComfyUI that Distilled Text Encoder Loader replaces DualCLIPLoaderT5Base (DistillT5ComfyUI)."""
    from server import PromptServer  # which starts to import all of ComfyUI

    await ComfyAPI().node_replacement.register(
        io.NodeReplace(
            new_node_id=NEW_NODE,
            old_node_id=OLD_NODE,
            old_widget_ids=["clip_name1", "clip_name2", "type"],
            input_mapping=[
                # The authors' own workflow names the T5 first; the loader takes its two files in either order.
                {"new_id": "clip_name1", "old_id": "clip_name1"},
                {"new_id": "clip_name2", "old_id": "clip_name2"},
                {"new_id": "type", "set_value": DEFAULT.name},
                {"new_id": "device", "set_value": "default"},
                {"new_id": "dtype", "set_value": "auto"},
                {"new_id": "token_length", "set_value": 0},
            ],
            output_mapping=[{"new_idx": 0, "old_idx": 0}],
        )
    )
    PromptServer.instance.add_on_prompt_handler(with_new_node)


def with_new_node(request: dict[str, Any]) -> dict[str, Any]:
    """A request to run a prompt, with the old node replaced; before ComfyUI does so, which fails without `_meta` or an input."""
    prompt = request.get("prompt")
    if isinstance(prompt, dict) and OLD_NODE not in importlib.import_module("nodes").NODE_CLASS_MAPPINGS:
        for node in prompt.values():
            if isinstance(node, dict) and node.get("class_type") == OLD_NODE and isinstance(node.get("inputs"), dict):
                node["class_type"] = NEW_NODE
                node["inputs"]["type"] = DEFAULT.name
    return request
