"""Does Flux look at a word where it draws the thing? `python -m distilled_t5.devtools.pointing [FOLDER OF THE MINIATURE'S FILES] [COUNT]`.

The pointing game (arXiv:1608.00507) on the miniature, whose scenes say where each thing stands: a hit is a map whose greatest value lies on
the thing. By chance that happens in a quarter of the cases, as a thing covers 3 x 3 of 6 x 6 image tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..evaluate.attention import points_inside, positions_of, word_positions
from ..evaluate.attention_recorder import AttentionRecorder, map_of, recording_model
from ..miniature.files import TEACHER_FILE, place
from ..runtime.model_folders import SHIPPED
from ..world.captions import SHAPE_NAMES
from ..world.pictures import PLACES, SHAPE_SIDE, SIDE, Scene, Thing
from ..world.questions import questions
from .comfyui.in_process import start_comfyui

TASKS = ("single_object", "colour_shape_binding", "position")
STEPS, GUIDANCE = 20, 3.5
TOKEN_CELLS = 2  # on each side of an image token


@dataclass(frozen=True)
class Pointing:
    """Hits among all pictures, and among those that show what they should."""

    hits: int
    n: int
    hits_in_right: int
    n_right: int

    @property
    def accuracy(self) -> float:
        return self.hits / self.n


def cases(count: int) -> Iterator[tuple[Scene, str, Thing, str]]:
    """Held-out scenes with caption, one of their things, and the word that the caption has for it; tasks and things take turns."""
    asked = {task: questions(task, -(-count // len(TASKS))) for task in TASKS}
    for number in range(count):
        scene, caption = asked[TASKS[number % len(TASKS)]][number // len(TASKS)]
        thing = scene.things[number % len(scene.things)]
        yield scene, caption, thing, next(name for name in SHAPE_NAMES[thing.shape] if positions_of([caption], name))


def tokens_of(thing: Thing) -> Tensor:
    """The image tokens [H, W] that a thing covers, as a mask."""
    cells_HW = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    left, top = PLACES[thing.place]
    cells_HW[top : top + SHAPE_SIDE, left : left + SHAPE_SIDE] = True
    side = SIDE // TOKEN_CELLS
    return cells_HW.reshape(side, TOKEN_CELLS, side, TOKEN_CELLS).any(dim=3).any(dim=1)


def pointing(folder: Path, encoder: Path, count: int = 100) -> Pointing:
    """Play the pointing game with the Flux and the VAE of a folder and an encoder's file. ComfyUI must be importable."""
    from ..encoder.served import ServingOptions, load_encoder
    from ..miniature.paint import Painter
    from ..world.reader import verdict

    painter, clip = Painter(folder), load_encoder(str(encoder), None, ServingOptions(dtype=torch.float32)).clip
    hits = right = hits_in_right = 0
    for seed, (scene, caption, thing, word) in enumerate(cases(count)):
        picture, map_HW = painted(painter, clip, caption, word, seed)
        hit, is_right = points_inside(map_HW, tokens_of(thing)), verdict(scene, picture)
        hits, right, hits_in_right = hits + hit, right + is_right, hits_in_right + (hit and is_right)
    return Pointing(hits, count, hits_in_right, right)


def painted(painter: Any, clip: Any, caption: str, word: str, seed: int) -> tuple[Any, Tensor]:
    """A picture [H, W, 3] and the map [H, W] of a word's attention in it, mean of all steps: what the nodes make of the same inputs."""
    import comfy.sample

    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(caption), add_dict={"guidance": GUIDANCE})
    recorder = AttentionRecorder(word, word_positions(clip, caption, word), [embedding for embedding, _ in conditioning])
    model, empty = recording_model(painter.model, recorder), torch.zeros(1, 16, SIDE, SIDE)
    noise = comfy.sample.prepare_noise(empty, seed)
    ends = (conditioning, conditioning)
    with torch.no_grad():
        latent = comfy.sample.sample(model, noise, STEPS, 1.0, "euler", "simple", *ends, empty, disable_pbar=True, seed=seed)
        picture = painter.vae.decode(latent)[0].float().cpu().numpy()
    return picture, map_of(recorder.run_of(latent))[0]


def main() -> None:
    """Play it with the teacher, and print the result."""
    start_comfyui()
    folder, count = Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED, int(sys.argv[2]) if len(sys.argv) > 2 else 100
    found = pointing(folder, place(folder, TEACHER_FILE), count)
    print(f"{found.hits} of {found.n} maps point at the thing; {found.hits_in_right} of {found.n_right} where the picture is right")


if __name__ == "__main__":
    main()
