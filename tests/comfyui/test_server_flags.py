"""ComfyUI's own memory and dtype flags, each in a separate server, because flags take effect at its start."""

from __future__ import annotations

from pathlib import Path

import pytest
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.devtools.models.random_models import link_into

LOADER = {"clip_name1": "clip_l.safetensors", "clip_name2": "distilled_t5_base.safetensors", "type": "flux"}


@pytest.mark.parametrize(
    "flags, dtype",
    [
        (("--fp8_e4m3fn-text-enc", "--force-fp32"), "fp8_e4m3fn"),
        # Weights are never kept in a wider format than the file's.
        pytest.param(("--fp32-text-enc", "--disable-dynamic-vram"), "bf16", marks=pytest.mark.full),
    ],
)
def test_loads_and_encodes_under_comfyuis_flags(comfyui_path, pack_root, stand_ins, tmp_path, flags, dtype):
    known = (comfyui_path / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    asked = tuple(flag for flag in flags if f'"{flag}"' in known)
    assert asked == flags
    link_into(stand_ins, tmp_path)
    with ComfyServer(comfyui_path, Path(tmp_path), pack_root, asked) as server:
        prompt = {
            "1": {"class_type": "DistilledT5Loader", "inputs": LOADER, "_meta": {"title": "Loader"}},
            "2": {
                "class_type": "DistilledT5TextEncode",
                "inputs": {"clip": ["1", 0], "text": "a cat", "guidance": 3.5},
                "_meta": {"title": "Encode"},
            },
            "3": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}, "_meta": {"title": "Info"}},
            "4": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}, "_meta": {"title": "Embedding"}},
        }
        outputs = server.run(prompt)["outputs"]
    assert f"as {dtype}" in "".join(outputs["3"]["text"])
    shown = "".join(outputs["4"]["text"])
    assert "tensor(" in shown and "nan" not in shown
