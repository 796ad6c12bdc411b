"""Distilled T5 Save."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..encoder.files import write_student
from ..encoder.served import metadata_in_use, student_tensors
from ..runtime.errors import escaped
from ..runtime.weights import CHOICES
from .model_files import choice_of, folder_for, listed_name, new_file
from .progress import progress_bar

DTYPES = {"as loaded": None, **CHOICES}


class DistilledT5Save(io.ComfyNode):
    """Writes the distilled encoder of a CLIP to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistilledT5Save",
            display_name="Distilled T5 Save",
            category="Distilled T5",
            description=(
                "Saves the distilled encoder of a CLIP, LoRAs and merges included, to models/text_encoders with its metadata. "
                "An existing file is never overwritten: the new one gets a number."
            ),
            search_aliases=["save DistillT5", "export T5", "CLIPSave", "save text encoder", "convert T5"],
            is_output_node=True,
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="The CLIP of a Distilled Text Encoder Loader, also after LoRA or merge nodes. CLIP-L is not saved."
                ),
                io.String.Input(
                    "filename",
                    default="my_distilled_t5",
                    tooltip="Name of the new file, without folder and ending; mine/base puts it into a subfolder.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="as loaded",
                    tooltip="Number format of the file. 'as loaded' keeps every bit; fp8 halves the file and costs precision.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="file", tooltip="The name of the new file, as the loader's list shows it after a refresh (key R)."
                )
            ],
        )

    @classmethod
    def execute(cls, clip: Any, filename: str, dtype: str) -> io.NodeOutput:
        metadata = metadata_in_use(clip)
        path, chosen, show = new_file(filename), choice_of(dtype, DTYPES), progress_bar()
        tensors = student_tensors(clip, chosen, show)
        with folder_for(path):
            path = write_student(path, tensors, metadata, show, overwrite=False)
        listed = listed_name(path)
        report = f"Saved {listed} ({path.stat().st_size / 1e6:.0f} MB) in {escaped(str(path.parent))}"
        return io.NodeOutput(listed, ui=ui.PreviewText(report))
