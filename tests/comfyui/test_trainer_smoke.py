"""What a newcomer does first: the smoke recipe as it is shipped, beside a running ComfyUI, which then makes a picture with its file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.devtools.comfyui.workflow import set_inputs, to_api_prompt
from distilled_t5.devtools.models.random_models import link_into
from distilled_t5.encoder.files import open_student
from distilled_t5.students.t5.trained import DistilledT5
from distilled_t5.tests.support.small_encoders import serve
from distilled_t5.tests.support.trainer import command, finish, metrics
from distilled_t5.tests.support.workflows import FLUX_DEV
from distilled_t5.train.state import read_checkpoint

NAME = "distilled_t5_smoke.safetensors"
SIDE_PX = 64
PROMPT = "a red fox reads a newspaper"


@pytest.fixture(scope="module")
def host(server: ComfyServer, stand_ins: Path) -> Iterator[ComfyServer]:
    """A ComfyUI that was started, and asked for its files, before anything was trained."""
    link_into(stand_ins, server.base)
    assert NAME not in encoders(server)
    yield server
    (server.base / "models" / "text_encoders" / NAME).unlink(missing_ok=True)
    server.free()


@pytest.fixture(scope="module")
def run(host: ComfyServer, comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train smoke` without any setting, with the running ComfyUI's model folders; the folder of the run."""
    folder = tmp_path_factory.mktemp("smoke")
    said = finish(command(comfyui_path, host.base, folder / "run", settings=()), folder)
    assert f"Done: {host.base / 'models' / 'text_encoders' / NAME}" in said
    return folder / "run"


def encoders(host: ComfyServer) -> list[str]:
    """The files that Distilled Text Encoder Loader lists now."""
    return host.get_json("/object_info/DistilledT5Loader")["DistilledT5Loader"]["input"]["required"]["clip_name2"][1]["options"]


@pytest.fixture
def prompt(host: ComfyServer, run: Path) -> dict[str, Any]:
    """The shipped workflow for Flux dev with the file that was trained, small enough for a CPU, and what its encoder gives as text."""
    workflow = json.loads((host.pack / "example_workflows" / f"{FLUX_DEV}.json").read_text(encoding="utf-8"))
    prompt = to_api_prompt(workflow, host.object_info())
    set_inputs(prompt, "DistilledT5Loader", clip_name1="none", clip_name2=NAME, dtype="fp32")
    set_inputs(prompt, "CLIPTextEncode", text=PROMPT)
    set_inputs(prompt, "KSampler", steps=2)
    set_inputs(prompt, "EmptySD3LatentImage", width=SIDE_PX, height=SIDE_PX)
    [encode] = [node_id for node_id, node in prompt.items() if node["class_type"] == "CLIPTextEncode"]
    prompt["shown"] = {"class_type": "PreviewAny", "inputs": {"source": [encode, 0]}, "_meta": {"title": "conditioning"}}
    return prompt


def pixels(host: ComfyServer, entry: dict[str, Any]) -> np.ndarray:
    [picture] = host.images(entry)
    assert picture.size == (SIDE_PX, SIDE_PX)
    return np.asarray(picture.convert("RGB"), dtype=np.float32)


def printed_numbers(text: str) -> list[float]:
    """The numbers of the first tensor that a text shows."""
    return [float(number) for number in re.findall(r"-?\d+\.\d*(?:e[-+]\d+)?", text.partition(")")[0])]


def test_the_shipped_recipe_runs_to_its_end_and_the_held_out_loss_falls(run):
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 61))
    assert lines[-1]["step"] == 60 and lines[-2]["skipped_steps"] == 0
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert len(held_out) == 3 and held_out[0] > held_out[1] > held_out[2]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000040", "step-000060"]


def test_a_running_comfyui_lists_the_file_and_encodes_and_samples_with_it(host, run, prompt):
    assert encoders(host)[0].startswith("distilled_t5") and NAME in encoders(host)
    entry = host.run(prompt)
    assert "T5 of width 64" in json.dumps(entry["outputs"])
    ours = pixels(host, entry)
    assert ours.std() > 10, "a picture of one colour comes from values that are not finite"
    set_inputs(prompt, "DistilledT5Loader", clip_name2="distilled_t5_base.safetensors")
    assert np.abs(pixels(host, host.run(prompt)) - ours).mean() > 1


def test_a_running_comfyui_computes_the_embedding_that_the_trainer_computes(host, run, prompt):
    entry = host.run(
        {name: node for name, node in prompt.items() if node["class_type"] in ("DistilledT5Loader", "CLIPTextEncode", "PreviewAny")}
    )
    shown = "".join(entry["outputs"]["shown"]["text"])
    path = host.base / "models" / "text_encoders" / NAME
    student = DistilledT5(open_student(path).layout)
    student.load_tensors(read_checkpoint(run / "checkpoints" / "step-000060").student)
    token_ids = torch.tensor([[token for token, _ in serve(path).clip.tokenize(PROMPT)["t5xxl"][0]]])
    assert token_ids.shape == (1, 32)
    with torch.no_grad():
        expected = student.train(False)(token_ids)
    numbers = printed_numbers(shown)
    # torch prints as many of the first and last tokens and channels as ComfyUI's print options allow, with at least four decimals.
    edge = math.isqrt(len(numbers)) // 2
    shown_at = torch.tensor([*range(edge), *range(-edge, 0)])
    assert edge >= 3
    assert numbers == pytest.approx(expected[0][shown_at][:, shown_at].flatten().tolist(), abs=2e-4)
