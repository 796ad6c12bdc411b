"""Encoder Report."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..evaluate.cost import different_names, encoder_name, image_table, measure, text_table
from .progress import progress_bar
from .show import image_of, shown

PROMPT = "A watchmaker at her bench, a brass lamp, rain on the window, a sign above the door that says OPEN."


class DistilledT5EncoderReport(io.ComfyNode):
    """Measures text encoders side by side."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        others = (
            io.Clip.Input(
                f"clip_{number}",
                display_name=f"encoder {number}",
                optional=True,
                tooltip="Another encoder, for a line of its own in the table.",
            )
            for number in (2, 3, 4)
        )
        return io.Schema(
            node_id="DistilledT5EncoderReport",
            display_name="Distilled T5 Encoder Report",
            category="Distilled T5",
            description=(
                "Measures what text encoders cost on this machine: parameters, bytes, and the time to load, to encode and to change the "
                "prompt, side by side in a table. Other models stay where they are."
            ),
            search_aliases=["text encoder benchmark", "T5 speed", "T5 memory", "compare encoders", "encode time"],
            is_output_node=True,
            inputs=[
                io.Clip.Input(
                    "clip_1",
                    display_name="encoder 1",
                    tooltip="A text encoder: of a Distilled Text Encoder Loader, of DualCLIPLoader or of any other loader.",
                ),
                *others,
                io.String.Input(
                    "prompt", multiline=True, default=PROMPT, tooltip="What is encoded. Length matters only beyond the padding."
                ),
                io.Int.Input(
                    "repeats",
                    default=3,
                    min=1,
                    max=100,
                    tooltip="How often each time is taken; the median counts. Each repetition loads twice and encodes twice.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="The table as an image."),
                io.String.Output(display_name="table", tooltip="The table as text (Markdown), with what was measured and where."),
            ],
        )

    @classmethod
    def execute(cls, clip_1: Any, prompt: str, repeats: int, clip_2: Any = None, clip_3: Any = None, clip_4: Any = None) -> io.NodeOutput:
        clips = [clip for clip in (clip_1, clip_2, clip_3, clip_4) if clip is not None]
        if not clips:
            raise ValueError(
                "There is no CLIP.\nWhat to do: connect a Distilled Text Encoder Loader; a checkpoint without text encoders gives none."
            )
        names, show = different_names([encoder_name(clip) for clip in clips]), progress_bar()

        def part(number: int) -> Any:
            return lambda done, total: show(number * total + done, len(clips) * total)

        costs = [measure(clip, name, prompt, repeats, part(number)) for number, (clip, name) in enumerate(zip(clips, names, strict=True))]
        image, table = image_of(image_table(costs)), text_table(costs)
        return io.NodeOutput(image, table, ui=shown(image, table, cls))
