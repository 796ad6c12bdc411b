"""Text Encoder Map."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..evaluate.cost import different_names, encoder_name
from ..evaluate.encoder_map import joint_map, pooled_prompts, prompts_of
from .common_text import MAX_SEED
from .progress import progress_bar
from .show import image_of, shown

# Four subjects in six places: prompts that share either are close on a good map.
SUBJECTS = ("a red fox", "an old watchmaker", "a yellow bicycle", "two white horses")
PLACES = ("in the snow", "on a beach at noon", "in a city at night", "under a tree in autumn", "in the fog", "beside a lighthouse")
PROMPTS = "\n".join(f"{subject} {place}" for subject in SUBJECTS for place in PLACES)


class DistilledT5EncoderMap(io.ComfyNode):
    """Shows the prompts on a map for one or two encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistilledT5EncoderMap",
            display_name="Distilled T5 Text Encoder Map",
            category="Distilled T5",
            description=(
                "Draws prompts as points: the closer two points, the more alike their embeddings (t-SNE). Two encoders share one plot: a "
                "student that learnt well covers its teacher's points; one that collapsed is a single cluster."
            ),
            search_aliases=["t-SNE", "embedding map", "embedding plot", "compare encoders", "collapse"],
            is_output_node=True,
            inputs=[
                io.Clip.Input("clip_1", display_name="encoder 1", tooltip="A CLIP with a T5, for instance the teacher: T5-XXL."),
                io.Clip.Input("clip_2", display_name="encoder 2", optional=True, tooltip="Another one for the same plot: the student."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default=PROMPTS,
                    tooltip="The prompts, one on each line. At least 5; some hundred make a good map.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The map begins with points drawn by this seed; the same seed, the same map.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="The plot."),
                io.String.Output(
                    display_name="info", tooltip="Mean distance and effective rank of each encoder's embeddings: small if it has collapsed."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip_1: Any, prompts: str, seed: int, clip_2: Any = None) -> io.NodeOutput:
        clips = [clip for clip in (clip_1, clip_2) if clip is not None]
        if not clips:
            raise ValueError(
                "There is no CLIP.\nWhat to do: connect a Distilled Text Encoder Loader; a checkpoint without text encoders gives none."
            )
        lines, show = prompts_of(prompts), progress_bar()
        names, total = different_names([encoder_name(clip) for clip in clips]), len(clips) * len(lines)
        embeddings = {}
        for number, (name, clip) in enumerate(zip(names, clips, strict=True)):
            before = number * len(lines)
            embeddings[name] = pooled_prompts(clip, lines, lambda done, before=before: show(before + done, total))
        picture, info = joint_map(embeddings, seed)
        image = image_of(picture)
        return io.NodeOutput(image, info, ui=shown(image, info, cls))
