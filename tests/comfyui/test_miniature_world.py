"""The shipped miniature end to end: pictures that code reads back, through shipped workflows and stock nodes, with teacher and student."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.devtools.comfyui.workflow import set_inputs, to_api_prompt
from distilled_t5.devtools.demo_sheet import pixels
from distilled_t5.miniature.files import LORA_FILE
from distilled_t5.miniature.lora import repainted
from distilled_t5.runtime.model_folders import SHIPPED
from distilled_t5.tests.support.workflows import MINIATURE
from distilled_t5.world.captions import caption
from distilled_t5.world.pictures import CELL_PX, TASKS, Scene, render
from distilled_t5.world.questions import questions
from distilled_t5.world.reader import verdict
from distilled_t5.world.scenes import random_of
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ENCODERS = ("miniature_teacher.safetensors", "miniature_student_quarter.safetensors")
LISTS = (("UNETLoader", "unet_name"), ("VAELoader", "vae_name"), ("DistilledT5Loader", "clip_name2"), ("LoraLoader", "lora_name"))
# Steps of imitation, a minute of one thread, and how much of the held-out loss after the first twenty may be left then.
STEPS, LEFT_OF_LOSS = 300, 0.7
Question = tuple[Scene, str]


@pytest.fixture(scope="module")
def prompt(server: ComfyServer) -> dict[str, Any]:
    """The miniature's example workflow as an API prompt."""
    workflow = json.loads((ROOT / "example_workflows" / f"{MINIATURE}.json").read_text(encoding="utf-8"))
    return to_api_prompt(workflow, server.object_info())


@pytest.fixture(params=[pytest.param(ENCODERS[0], id="teacher", marks=pytest.mark.full), pytest.param(ENCODERS[1], id="student")])
def encoder(request: pytest.FixtureRequest, prompt: dict[str, Any]) -> str:
    set_inputs(prompt, "DistilledT5Loader", clip_name2=request.param)
    return request.param


def asked(count: int, tasks: Sequence[str] = TASKS) -> list[Question]:
    return [question for task in tasks for question in questions(task, count)]


def drawn(server: ComfyServer, prompt: dict[str, Any], asked_for: Sequence[Question]) -> list[Image.Image]:
    pictures = []
    for seed, (_, text) in enumerate(asked_for):
        set_inputs(prompt, "DistilledT5TextEncode", text=text)
        set_inputs(prompt, "KSampler", seed=seed)
        [picture] = server.images(server.run(prompt))
        pictures.append(picture)
    return pictures


def right(asked_for: Sequence[Question], pictures: Sequence[Image.Image], shown: Callable[[Scene], Scene] = lambda scene: scene) -> int:
    return sum(verdict(shown(scene), pixels(picture)) for (scene, _), picture in zip(asked_for, pictures, strict=True))


FOUND = json.loads((ROOT / "miniature" / "results.json").read_text(encoding="utf-8"))


def least(encoder: str, tasks: Sequence[str], count: int, share: float = 1.0) -> int:
    """How many of `count` pictures of each task must be right: `share` of what results.json says, less two standard deviations."""
    by_name = {one["name"]: one["tasks"] for one in FOUND["encoders"]}
    shares = [share * by_name[Path(encoder).stem][task]["value"] for task in tasks]
    spread = math.sqrt(sum(count * one * (1 - one) for one in shares))
    floor = math.floor(count * sum(shares) - 2 * spread)
    assert floor > 0, "the lower bound must be positive to test anything"
    return floor


def test_the_shipped_files_are_listed_after_the_users_own(server: ComfyServer) -> None:
    info = server.object_info()
    files = {path.name for path in SHIPPED.rglob("*.safetensors")}
    assert len(files) >= 5
    listed: set[str] = set()
    for node, name in LISTS:
        spec = info[node]["input"]["required"][name]
        listed |= set(spec[0] if isinstance(spec[0], list) else spec[1]["options"])
    assert files <= listed


def test_pictures_of_held_out_combinations_read_back_right(server: ComfyServer, prompt: dict[str, Any], encoder: str) -> None:
    asked_for = asked(3)
    assert right(asked_for, drawn(server, prompt, asked_for)) >= least(encoder, TASKS, 3)


@pytest.mark.full
def test_four_steps_are_enough_for_most(server: ComfyServer, prompt: dict[str, Any], encoder: str) -> None:
    asked_for = asked(6)
    set_inputs(prompt, "KSampler", steps=4)
    try:
        assert right(asked_for, drawn(server, prompt, asked_for)) >= least(encoder, TASKS, 6, share=0.7)
    finally:
        set_inputs(prompt, "KSampler", steps=20)


def with_lora(prompt: dict[str, Any]) -> dict[str, Any]:
    """The workflow with a LoraLoader between the models and all that uses them."""
    prompt = json.loads(json.dumps(prompt))
    by_type = {node["class_type"]: node_id for node_id, node in prompt.items()}
    unet, clip = by_type["UNETLoader"], by_type["DistilledT5Loader"]
    for node in prompt.values():
        node["inputs"] |= {name: ["lora", 0] for name, value in node["inputs"].items() if value == [unet, 0]}
        node["inputs"] |= {name: ["lora", 1] for name, value in node["inputs"].items() if value == [clip, 0]}
    inputs = {"model": [unet, 0], "clip": [clip, 0], "lora_name": LORA_FILE, "strength_model": 1.0, "strength_clip": 1.0}
    return prompt | {"lora": {"class_type": "LoraLoader", "inputs": inputs, "_meta": {"title": "Palette"}}}


@pytest.mark.full
def test_a_lora_draws_in_its_own_palette_and_in_no_other(server: ComfyServer, prompt: dict[str, Any], encoder: str) -> None:
    asked_for = asked(6)
    pictures = drawn(server, with_lora(prompt), asked_for)
    assert right(asked_for, pictures, repainted) >= least(encoder, TASKS, 6, share=0.7)
    assert right(asked_for, pictures) == 0


def from_picture(prompt: dict[str, Any], name: str, denoise: float) -> dict[str, Any]:
    """The workflow that starts from a picture in the input folder instead of nothing."""
    prompt = json.loads(json.dumps(prompt))
    by_type = {node["class_type"]: node_id for node_id, node in prompt.items()}
    [vae] = [node_id for node_id, node in prompt.items() if node["class_type"] == "VAELoader"]
    set_inputs(prompt, "KSampler", latent_image=["encoded", 0], denoise=denoise)
    del prompt[by_type["EmptySD3LatentImage"]]
    nodes = {
        "source": {"class_type": "LoadImage", "inputs": {"image": name}},
        "encoded": {"class_type": "VAEEncode", "inputs": {"pixels": ["source", 0], "vae": [vae, 0]}},
    }
    return prompt | {node_id: node | {"_meta": {"title": node_id}} for node_id, node in nodes.items()}


def test_a_picture_is_changed_to_what_the_prompt_says(server: ComfyServer, prompt: dict[str, Any], encoder: str) -> None:
    """Image to image at four fifths of the noise: the thing of the picture gets the colour that the caption gives it."""
    changed_right = 0
    for number, (scene, _) in enumerate(questions("single_object", 4)):
        path = server.base / "input" / f"miniature-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((render(scene, CELL_PX) * 255).round().astype(np.uint8)).save(path)
        changed, new = from_picture(prompt, path.name, denoise=0.8), repainted(scene)
        set_inputs(changed, "DistilledT5TextEncode", text=caption(new, random_of("image to image", number)))
        [picture] = server.images(server.run(changed))
        assert not verdict(scene, pixels(picture))
        changed_right += verdict(new, pixels(picture))
    assert changed_right >= 3, "of 4"


@pytest.mark.full
def test_minutes_of_training_bring_a_student_nearer_to_its_teacher(comfyui_path: Path, tmp_path: Path) -> None:
    """The product's own command on the shipped recipe, from random values, cut to a minute or two of one thread."""
    settings = [f"stage.0.steps={STEPS}", "stage.1.steps=2", "validation.every_steps=20", "validation.prompts=16", "preview.vae="]
    sets = [part for setting in settings for part in ("--set", setting)]
    command = [
        sys.executable,
        str(ROOT / "train"),
        "miniature-tenth",
        "--run",
        str(tmp_path / "run"),
        "--comfyui",
        str(comfyui_path),
        *sets,
    ]
    done = subprocess.run(
        [*command, "--", "--base-directory", str(tmp_path), "--cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row and row["step"] <= STEPS]
    assert losses[-1] < LEFT_OF_LOSS * losses[0], losses
