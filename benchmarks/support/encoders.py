"""Text encoders as files of real sizes: written, loaded as the nodes do it, and measured."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import psutil
import torch

from ...devtools.models import random_models
from ...encoder.files import write_student
from ...students.t5.layout import Shape, StudentLayout
from . import measuring
from .random_files import draw_any, draw_t5, fill, lay_out

PROMPTS = (
    "a photograph of a red fox that sleeps on a green bench in front of a yellow house, early morning, long shadows, film grain",
    "an oil painting of three sailing ships in a storm, waves as high as houses, a lighthouse far away, dramatic light from the left",
    "the word HELLO written with white chalk on a black board, above it a row of five paper stars, a wooden frame, soft light",
    "an isometric drawing of a small workshop with a blue table, two chairs, a lamp, a shelf full of books and a cat on the floor",
)
# ComfyUI detects a T5-XXL by this tensor, also with other sizes.
DETECTED_BY: dict[str, Shape] = {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (8, 4096)}
XXL = StudentLayout.named("xxl", output_width=None)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A text encoder and the format of its file: a distilled T5, or a stock T5 (a layout without projection), which T5-XXL is.

    with_checksum: the file has our metadata, whose checksum is verified when it is loaded.
    """

    layout: StudentLayout
    dtype: torch.dtype = torch.bfloat16
    with_checksum: bool = False

    @property
    def stock(self) -> bool:
        return self.layout.hidden_width is None

    @property
    def shapes(self) -> dict[str, Shape]:
        """The tensors of its file: a student's by their published names, T5-XXL's by those that the stock loader reads."""
        shapes = self.layout.tensors()
        return DETECTED_BY | {name.removeprefix("encoder."): shape for name, shape in shapes.items()} if self.stock else shapes

    def write(self, path: Path) -> Path:
        """Write the file with T5's initialisation; returns the path."""
        draw = draw_t5(self.layout)
        if self.with_checksum:
            return write_student(path, {name: draw(name, shape).to(self.dtype) for name, shape in self.shapes.items()})
        return fill(lay_out(path, self.shapes, self.dtype), draw)

    def load(self, path: Path, clip_l: Path) -> Any:
        """The CLIP, as the loader nodes make it."""
        if not self.stock:
            from ...encoder.served import ServingOptions, load_encoder

            return load_encoder(str(path), {"clip_l": str(clip_l)}, ServingOptions()).clip
        import comfy.sd

        sizes = {name: getattr(self.layout, name) for name in ("d_model", "d_ff", "d_kv", "num_layers", "num_heads")}
        options = {} if self.layout == XXL else {"t5xxl_model_config": sizes}
        return comfy.sd.load_clip([str(clip_l), str(path)], clip_type=comfy.sd.CLIPType.FLUX, model_options=options)


CLIP_L_SHAPES = random_models.clip_l_shapes() | {"text_projection.weight": (768, 768)}


def write_clip_l(path: Path) -> Path:
    """Write a CLIP-L of full size; returns the path."""
    return fill(lay_out(path, CLIP_L_SHAPES, torch.float16), draw_any())


def encode(clip: Any, prompt: str) -> Any:
    """What a text encode node does."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt), add_dict={"guidance": 3.5})


@torch.inference_mode()
def measure_encoder(encoder: Encoder, path: Path, clip_l: Path) -> dict[str, Any]:
    """Load and encode: times in seconds, memory in GB. That of the process is meant for a fresh one."""
    import comfy.sd  # noqa: F401 (its import is not part of the loading time)

    before = measuring.memory_gb()["rss"]
    measuring.restart_peak()
    load, clip = measuring.timed(lambda: encoder.load(path, clip_l))
    loaded = measuring.memory_gb()["private"]
    first, conditioning = measuring.timed(lambda: encode(clip, PROMPTS[0]))
    again = [measuring.timed(lambda: encode(clip, PROMPTS[0]))[0] for _ in range(2)]
    change = [measuring.timed(lambda prompt=prompt: encode(clip, prompt))[0] for prompt in PROMPTS[1:3]]
    model = clip.cond_stage_model
    parts = {"t5": model.t5base if hasattr(model, "t5base") else model.t5xxl, "clip_l": model.clip_l}
    memory = measuring.memory_gb()
    return {
        "load_s": load.wall_s,
        "load_cpu_s": load.cpu_s,
        "first_encode_s": first.wall_s,
        "next_encode_s": statistics.median(timing.wall_s for timing in again),
        "new_prompt_s": statistics.median(timing.wall_s for timing in change),
        "best_encode_s": min(timing.wall_s for timing in again + change),
        "best_encode_cpu_s": min(timing.cpu_s for timing in again + change),
        **{f"{name}_weights_gb": sum(weight.nbytes for weight in part.parameters()) / 1e9 for name, part in parts.items()},
        "rss_before_load_gb": before,
        "private_after_load_gb": loaded,
        "private_at_end_gb": memory["private"],
        "rss_peak_gb": memory["peak"],
        "device_peak_gb": measuring.peak_gb(),
        "tokens": conditioning[0][0].shape[1],
        "runs_on": str(clip.patcher.load_device),
        "load_average": psutil.getloadavg()[0],
    }
