"""The shipped SD3 of the miniature: stock nodes and the loader make images of it that code reads back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from distilled_t5.devtools.miniature_results import RESULTS, TEACHER
from distilled_t5.encoder.files import open_student
from distilled_t5.families import FAMILIES
from distilled_t5.miniature.files import SD3_FILE, VAE_FILE
from distilled_t5.nodes.loader import DistilledT5Loader
from distilled_t5.runtime.model_folders import SHIPPED, add_model_folders
from distilled_t5.tests.support.small_encoders import encode
from distilled_t5.world.captions import TOKEN_LENGTH
from distilled_t5.world.pictures import SIDE, TASKS
from distilled_t5.world.questions import questions
from distilled_t5.world.reader import verdict

import nodes

FOUND = {one["name"]: one["tasks"] for one in json.loads(RESULTS.read_text(encoding="utf-8"))["sd3"]["encoders"]}
OF_EACH = 2


@pytest.fixture(scope="module")
def sd3() -> Any:
    add_model_folders()
    [model] = nodes.UNETLoader().load_unet(SD3_FILE, "default")
    return model


@torch.no_grad()
def images(model: Any, encoder: str, captions: list[str], cfg: float = 1.0) -> list[Any]:
    """An image [H, W, 3] of each caption by stock nodes, with the encoder from the loader."""
    clip = DistilledT5Loader.execute("none", f"{encoder}.safetensors", "sd3").result[0]
    [vae] = nodes.VAELoader().load_vae(VAE_FILE)
    made = []
    for seed, caption in enumerate(captions):
        empty = {"samples": torch.zeros(1, 16, SIDE, SIDE)}
        [latent] = nodes.KSampler().sample(model, seed, 20, cfg, "euler", "simple", encode(clip, caption), encode(clip, ""), empty)
        made.append(nodes.VAEDecode().decode(vae, latent)[0][0].numpy())
    return made


def test_the_stock_loader_finds_an_sd3_of_the_teachers_width(sd3):
    config, family = sd3.model.model_config.unet_config, FAMILIES["sd3"]
    assert isinstance(sd3.model.diffusion_model, MMDiT)
    assert (config["depth"], config["qk_norm"], config["adm_in_channels"]) == (3, "rms", sum(family.companions.values()))
    assert family.refuse(sd3.model) is None
    assert family.text_width_of(sd3.model) == open_student(SHIPPED / "text_encoders" / f"{TEACHER}.safetensors").layout.output_width


@pytest.mark.parametrize("encoder", [name for name in FOUND if (SHIPPED / "text_encoders" / f"{name}.safetensors").is_file()])
def test_images_of_held_out_combinations_read_back_right(sd3, encoder):
    """As many as results.json lets expect, less two standard deviations."""
    asked = [question for task in TASKS for question in questions(task, OF_EACH)]
    made = images(sd3, encoder, [caption for _, caption in asked])
    shares = [FOUND[encoder][task]["value"] for task in TASKS]
    least = math.floor(OF_EACH * sum(shares) - 2 * math.sqrt(sum(OF_EACH * share * (1 - share) for share in shares)))
    assert sum(verdict(scene, image) for (scene, _), image in zip(asked, made, strict=True)) >= max(least, 1)


def test_cfg_with_an_empty_negative_prompt_gives_other_images_that_are_right_too(sd3):
    asked = [question for task in ("single_object", "position") for question in questions(task, 2)]
    captions = [caption for _, caption in asked]
    guided, plain = (images(sd3, TEACHER, captions, cfg) for cfg in (2.0, 1.0))
    assert sum(verdict(scene, image) for (scene, _), image in zip(asked, guided, strict=True)) >= 3
    assert all((one != other).any() for one, other in zip(guided, plain, strict=True))


def test_the_loader_says_what_it_serves_and_refuses_other_families(tmp_path: Path):
    add_model_folders()
    clip, info = DistilledT5Loader.execute("none", f"{TEACHER}.safetensors", "sd3").result
    assert "Stable Diffusion 3" in info
    assert encode(clip, "a red star")[0][0].shape == (1, TOKEN_LENGTH, 128)
    assert (clip.cond_stage_model.metadata.family, clip.cond_stage_model.metadata.also_serves) == ("sd3", ("flux",))
    with pytest.raises(ValueError, match=r"was distilled for Flux\.1 and Stable Diffusion 3; the type is chroma"):
        DistilledT5Loader.execute("none", f"{TEACHER}.safetensors", "chroma")
