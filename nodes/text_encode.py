"""Distilled T5 Text Encode."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..encoder.conditioning import encoded
from ..encoder.prompt_length import describe_length, tokenized


class DistilledT5TextEncode(io.ComfyNode):
    """Encodes a prompt and says whether it fits into the length that the student was trained at."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistilledT5TextEncode",
            display_name="Distilled T5 Text Encode",
            category="Distilled T5",
            description="Encodes a prompt with all encoders of the CLIP, adds guidance, and counts the T5 tokens.",
            search_aliases=["DistillT5 prompt", "Flux prompt", "CLIPTextEncodeFlux", "T5 token count", "prompt length"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of a Distilled Text Encoder Loader (an ordinary CLIP with T5-XXL works too)."),
                io.String.Input(
                    "text",
                    display_name="prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt. (word:1.3) weighs a word, {red|green} picks one at random.",
                ),
                io.Float.Input(
                    "guidance",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance for Flux-dev: 2 to 5. Models without a guidance input, such as Flux-schnell and SD3, ignore it.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="The conditioning, for a sampler or any conditioning node."),
                io.String.Output(
                    display_name="token_count", tooltip="How many T5 tokens the prompt has, against the length the student was trained at."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, text: str, guidance: float) -> io.NodeOutput:
        if clip is None:
            raise ValueError(
                "There is no CLIP.\nWhat to do: connect a Distilled Text Encoder Loader; a checkpoint without text encoders gives none."
            )
        tokens = tokenized(clip, text)
        count = describe_length(clip, tokens)
        return io.NodeOutput(encoded(clip, tokens, guidance=guidance), count, ui=ui.PreviewText(count))
