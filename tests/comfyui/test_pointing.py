"""The attention map of a word has its maximum on the thing: the pointing game (arXiv:1608.00507) on the trained miniature.

By chance a maximum is on the thing in a quarter of the cases, since a thing covers 3 x 3 of 6 x 6 image tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.sample
import comfy.sd
import pytest
import torch
from distilled_t5.diffusion.vae import load_vae
from distilled_t5.evaluate.attention import points_inside, positions_of, word_positions
from distilled_t5.evaluate.attention_recorder import AttentionRecorder, map_of, recording_model
from distilled_t5.miniature.files import FLUX_FILE, TEACHER_FILE, VAE_FILE, place
from distilled_t5.runtime.model_folders import SHIPPED
from distilled_t5.tests.support.small_encoders import serve
from distilled_t5.world.captions import SHAPE_NAMES
from distilled_t5.world.pictures import PLACES, SHAPE_SIDE, SIDE, Scene, Thing
from distilled_t5.world.questions import questions
from distilled_t5.world.reader import verdict
from torch import Tensor

pytestmark = pytest.mark.one_host

TASKS = ("single_object", "colour_shape_binding", "position")
STEPS, GUIDANCE = 20, 3.5
TOKEN_CELLS = 2  # on each side of an image token
COUNT, LEAST_RIGHT, LEAST_HITS = 100, 90, 80


def cases(count: int) -> Iterator[tuple[Scene, str, Thing, str]]:
    """Held-out scenes with caption, one of their things, and the word for it in the caption; tasks and things alternate."""
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


def drawn(flux: Any, vae: Any, clip: Any, caption: str, word: str, seed: int) -> tuple[Any, Tensor]:
    """An image [H, W, 3] and the map [H, W] of a word's attention, mean of all steps, as the nodes compute them."""
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(caption), add_dict={"guidance": GUIDANCE})
    recorder = AttentionRecorder(word, word_positions(clip, caption, word), [embedding for embedding, _ in conditioning])
    model, empty = recording_model(flux, recorder), torch.zeros(1, 16, SIDE, SIDE)
    noise = comfy.sample.prepare_noise(empty, seed)
    ends = (conditioning, conditioning)
    with torch.no_grad():
        latent = comfy.sample.sample(model, noise, STEPS, 1.0, "euler", "simple", *ends, empty, disable_pbar=True, seed=seed)
        image = vae.decode(latent)[0].float().cpu().numpy()
    return image, map_of(recorder.run_of(latent))[0]


def test_a_thing_covers_three_by_three_of_six_by_six_tokens_at_its_place():
    top_left, bottom_right = (tokens_of(Thing("red", "heart", where)) for where in ("top left", "bottom right"))
    assert top_left.shape == (6, 6)
    assert top_left[:3, :3].all()
    assert bottom_right[3:, 3:].all()
    assert top_left.sum() == bottom_right.sum() == 9


def test_each_case_asks_for_a_thing_of_its_scene_by_a_word_of_its_caption():
    asked = list(cases(COUNT))
    assert len(asked) == COUNT
    assert len({caption for _, caption, _, _ in asked}) > 90
    for scene, caption, thing, word in asked:
        assert thing in scene.things
        assert positions_of([caption], word) == [0], "as a complete word"
    assert len({thing.place for _, _, thing, _ in asked}) == 9


@pytest.mark.slow
def test_four_of_five_maps_point_at_the_thing():
    flux = comfy.sd.load_diffusion_model(str(place(SHIPPED, FLUX_FILE)))
    vae, clip = load_vae(place(SHIPPED, VAE_FILE)), serve(place(SHIPPED, TEACHER_FILE)).clip
    hits = right = 0
    for seed, (scene, caption, thing, word) in enumerate(cases(COUNT)):
        image, map_HW = drawn(flux, vae, clip, caption, word, seed)
        hits, right = hits + points_inside(map_HW, tokens_of(thing)), right + verdict(scene, image)
    assert right >= LEAST_RIGHT, "the Flux draws what it is asked for"
    assert hits >= LEAST_HITS, f"{hits} of {COUNT}"
