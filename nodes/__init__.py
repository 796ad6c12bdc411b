"""The nodes: each a schema, and an `execute` that calls a function which knows no graph."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..runtime.model_folders import add_model_folders
from .attention_map import DistilledT5AttentionMapImage, DistilledT5CrossAttentionMap
from .common_text import DistilledT5CommonTextPrompt
from .distil import DistilledT5Distil
from .encoder_map import DistilledT5EncoderMap
from .encoder_report import DistilledT5EncoderReport
from .loader import DistilledT5Loader
from .model_files import remove_abandoned_files
from .ocr_accuracy import DistilledT5OCRAccuracy
from .replacements import register_replacements
from .save import DistilledT5Save
from .text_encode import DistilledT5TextEncode
from .trim import DistilledT5Trim

ENCODER_NODES: list[type[io.ComfyNode]] = [DistilledT5Loader, DistilledT5TextEncode, DistilledT5Save, DistilledT5Distil, DistilledT5Trim]
EVALUATION_NODES: list[type[io.ComfyNode]] = [
    DistilledT5OCRAccuracy,
    DistilledT5EncoderMap,
    DistilledT5CrossAttentionMap,
    DistilledT5AttentionMapImage,
    DistilledT5EncoderReport,
    DistilledT5CommonTextPrompt,
]


class DistilledT5Extension(ComfyExtension):
    """This pack's nodes, the replacement of the authors' node, and the models of the miniature."""

    async def on_load(self) -> None:
        add_model_folders()
        remove_abandoned_files()
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*ENCODER_NODES, *EVALUATION_NODES]
