"""Trim Text Encoder."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..encoder.trim import trim
from ..families import TRIMMABLE
from ..runtime.errors import escaped
from .model_files import FOLDER, choice_of, fingerprint, folder_for, listed_name, new_file, path_of
from .progress import progress_bar


class DistilledT5Trim(io.ComfyNode):
    """Saves a large text encoder without the layers that its diffusion model does not read."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistilledT5Trim",
            display_name="Trim Text Encoder",
            category="Distilled T5",
            description=(
                "Saves a Qwen3-4B or 8B without the layers that Z-Image or FLUX.2 klein does not read, to models/text_encoders: for klein, "
                "27 of 36 layers stay (8.0 GB become 6.2). The images stay the same, bit for bit. Nothing is distilled or trained."
            ),
            search_aliases=[
                "Distilled T5",
                "prune text encoder",
                "smaller Qwen3",
                "FLUX.2 klein text encoder",
                "Z-Image text encoder",
                "reduce VRAM",
            ],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="The complete text encoder, from models/text_encoders: bf16, fp8 or another format of safetensors.",
                ),
                io.Combo.Input(
                    "type",
                    options=list(TRIMMABLE),
                    default="flux2_klein_4b",
                    tooltip="The diffusion model that the new file is for. It decides which layers stay.",
                ),
                io.String.Input(
                    "filename",
                    default="qwen3_trimmed",
                    tooltip="Name of the new file, without folder and ending; mine/qwen puts it into a subfolder.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="file", tooltip="The name of the new file, as the loader's list shows it after a refresh (key R)."
                )
            ],
        )

    @classmethod
    def execute(cls, file: str, type: str, filename: str) -> io.NodeOutput:
        source, family, path = Path(path_of(file)), choice_of(type, TRIMMABLE, "type"), new_file(filename)
        with folder_for(path):
            path = trim(source, family, path, progress_bar())
        listed, before, after = listed_name(path), source.stat().st_size / 1e9, path.stat().st_size / 1e9
        report = f"Saved {listed} ({after:.2f} GB, of {before:.2f} GB) in {escaped(str(path.parent))}"
        return io.NodeOutput(listed, ui=ui.PreviewText(report))

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **_settings: object) -> str:
        return fingerprint(file)
