"""Workflows with the authors' loader node open with ours, through ComfyUI's node replacement."""

from __future__ import annotations

from comfy_api.latest import ComfyAPI, io

from ..families import DEFAULT


async def register_replacements() -> None:
    """Tell ComfyUI that Distilled T5 Loader replaces DualCLIPLoaderT5Base (DistillT5ComfyUI)."""
    await ComfyAPI().node_replacement.register(
        io.NodeReplace(
            new_node_id="DistilledT5Loader",
            old_node_id="DualCLIPLoaderT5Base",
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
