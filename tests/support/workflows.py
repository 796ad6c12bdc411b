"""The shipped workflow files, as the tests of all tiers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "example_workflows"
EXAMPLE_NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
FLUX_DEV, TWELVE_GB, SCHNELL, FORM = "01-Flux-dev-start-here", "02-Flux-dev-on-12-GB", "03-Flux-schnell-4-steps", "04-Flux-dev-as-a-form"
LORA, CONTROLNET, AGAINST_T5XXL = "05-Flux-dev-with-a-LoRA", "06-Flux-dev-with-a-ControlNet", "07-T5-XXL-against-distilled-T5"
MINIATURE, TEACHER_AND_STUDENT = "08-Miniature-draw-on-a-CPU", "09-Miniature-teacher-and-student"
ATTENTION_MAP, WRITTEN_TEXT = "11-Where-Flux-looks-at-a-word", "12-Check-written-text"
ENCODER_MAP, ENCODER_REPORT, SAVE_A_COPY = "13-Compare-two-encoders", "14-What-encoders-cost", "15-Save-a-copy"
SD35, PIXART_ALPHA, CHROMA = "16-Stable-Diffusion-3-5-medium", "18-PixArt-alpha", "19-Chroma"
TRIM = "20-Trim-a-text-encoder"
BLUEPRINT_NAME = "Flux text with Distilled T5"
# Fields of a link, as a subgraph stores them by name and a workflow stores them by position.
LINK_FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
MINIATURE_STUDENT = "miniature_student_quarter.safetensors"
# The node types of the pack, as the frozen schemas list them.
PACK_NODES = frozenset(json.loads((ROOT / "tests" / "comfyui" / "schemas.json").read_text(encoding="utf-8")))


def example(name: str) -> dict[str, Any]:
    """An example workflow."""
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


def blueprint() -> dict[str, Any]:
    """The blueprint: a workflow of one node, which is a subgraph."""
    return json.loads((ROOT / "subgraphs" / f"{BLUEPRINT_NAME}.json").read_text(encoding="utf-8"))


def blueprint_inside() -> dict[str, Any]:
    """The nodes inside the blueprint, and its links by position as a workflow stores them."""
    [inner] = blueprint()["definitions"]["subgraphs"]
    return {"nodes": inner["nodes"], "links": [[link[field] for field in LINK_FIELDS] for link in inner["links"]]}
