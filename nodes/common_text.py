"""CommonText Prompt."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..prompts.common_text import COUNTS, Split, common_text

MAX_SEED = 0xFFFFFFFFFFFFFFFF


class DistilledT5CommonTextPrompt(io.ComfyNode):
    """A prompt that asks for a written text, and the text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistilledT5CommonTextPrompt",
            display_name="Distilled T5 CommonText Prompt",
            category="Distilled T5",
            description=(
                "A prompt that asks for a written text, such as 'A baker holds a sign that says ...', and that text by itself, to be read "
                "back by Distilled T5 OCR Accuracy. Made by the trainer's own generator."
            ),
            search_aliases=["CommonText", "text rendering prompt", "random prompt", "OCR prompt", "sign that says"],
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Each seed is another prompt; the same seed is always the same one.",
                ),
                io.Combo.Input(
                    "split",
                    options=["validation", "unseen_words", "train"],
                    default="validation",
                    tooltip="validation: prompts that training never shows. unseen_words: words too. train: those of training.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="The prompt, for a text encode node."),
                io.String.Output(display_name="text", tooltip="The text that the image should show: OCR Accuracy's expected text."),
            ],
        )

    @classmethod
    def execute(cls, seed: int, split: Split) -> io.NodeOutput:
        if split not in COUNTS:
            raise ValueError(f"There is no split {str(split)[:80]!r}.\nWhat to do: set split to one of {', '.join(COUNTS)}.")
        [prompt] = common_text(split, 1, seed)
        return io.NodeOutput(prompt.text, prompt.target, ui=ui.PreviewText(prompt.text))
