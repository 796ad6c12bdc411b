"""Every shipped workflow runs in a real ComfyUI on stand-in models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.devtools.comfyui.workflow import NOTE_TYPES, set_inputs, to_api_prompt
from distilled_t5.devtools.models.random_models import link_into
from distilled_t5.miniature.files import FLUX_FILE
from distilled_t5.runtime.header import read_entries
from distilled_t5.students.qwen3.layout import Qwen3Layout
from distilled_t5.tests.support.workflows import (
    AGAINST_T5XXL,
    CHROMA,
    CONTROLNET,
    EXAMPLE_NAMES,
    FLUX_DEV,
    LORA,
    MINIATURE_STUDENT,
    PIXART_ALPHA,
    SAVE_A_COPY,
    SD35,
    TRIM,
    TWELVE_GB,
    blueprint_inside,
    example,
)
from PIL import Image
from safetensors.torch import save_file

SIDE_PX = 128
# Chroma has 1 GB of weights; PixArt-Sigma stands for both PixArts.
SLOW = {CHROMA, PIXART_ALPHA}
# The miniature's own workflows run in test_evaluation_workflows.py and with `dev.py demo`.
ON_THE_MINIATURE = {name for name in EXAMPLE_NAMES if any(file in str(example(name)) for file in (FLUX_FILE, MINIATURE_STUDENT))}


@pytest.fixture(scope="module")
def host(server: ComfyServer, stand_ins: Path) -> Iterator[ComfyServer]:
    link_into(stand_ins, server.base)
    yield server
    server.free()


@pytest.fixture(scope="module")
def object_info(host: ComfyServer) -> dict[str, Any]:
    return host.object_info()


def small_prompt(name: str, object_info: dict[str, Any]) -> dict[str, Any]:
    """The API prompt of an example at a size and number of steps that a CPU does in a second."""
    prompt = to_api_prompt(example(name), object_info)
    classes = {node["class_type"] for node in prompt.values()}
    if "DistilledT5OCRAccuracy" in classes:
        set_inputs(prompt, "DistilledT5OCRAccuracy", reader="tesseract")
    if "KSampler" in classes:
        set_inputs(prompt, "KSampler", steps=2)
        set_inputs(prompt, *sorted(classes & {"EmptySD3LatentImage", "EmptyLatentImage"}), width=side_px(name), height=side_px(name))
    if name == SD35:
        set_inputs(prompt, "DistilledT5Loader", clip_name3="none")  # all zeros, and large
    return prompt


def side_px(name: str) -> int:
    """The side of the images of a test: as small as PixArt can be, which has no smaller ones, or smaller."""
    return 320 if "PixArt" in name else SIDE_PX


def saved_pictures(host: ComfyServer, prompt: dict[str, Any], entry: dict[str, Any]) -> list[Image.Image]:
    by_node = host.images_by_node(entry)
    return [image for node_id, images in by_node.items() if prompt[node_id]["class_type"] == "SaveImage" for image in images]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def texts(entry: dict[str, Any], prompt: dict[str, Any]) -> dict[str, str]:
    """What each Preview as Text shows, by its title."""
    return {prompt[node_id]["_meta"]["title"]: "".join(output["text"]) for node_id, output in entry["outputs"].items() if "text" in output}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.full if name in SLOW else ())
        for name in sorted(set(EXAMPLE_NAMES) - {SAVE_A_COPY, AGAINST_T5XXL, TRIM} - ON_THE_MINIATURE)
    ],
)
def test_runs_and_gives_one_image_of_the_requested_size(name: str, host: ComfyServer, object_info: dict[str, Any]) -> None:
    prompt = small_prompt(name, object_info)
    pictures = saved_pictures(host, prompt, host.run(prompt))
    assert [picture.size for picture in pictures] == [(side_px(name), side_px(name))]
    assert pixels(pictures[0]).std() > 10, "a picture of one colour comes from values that are not finite"


@pytest.mark.full
def test_t5xxl_and_the_distilled_t5_give_two_different_pictures(host: ComfyServer, object_info: dict[str, Any]) -> None:
    prompt = small_prompt(AGAINST_T5XXL, object_info)
    [both] = saved_pictures(host, prompt, host.run(prompt, timeout_s=600))
    host.free()  # the big encoder
    gap_px = both.width - 2 * SIDE_PX
    assert (gap_px, both.height) == (24, SIDE_PX)
    pictures = [both.crop((left, 0, left + SIDE_PX, SIDE_PX)) for left in (0, SIDE_PX + gap_px)]
    assert all(pixels(picture).std() > 10 for picture in pictures)
    assert np.abs(pixels(pictures[0]) - pixels(pictures[1])).mean() > 1


def test_another_prompt_gives_another_picture_and_the_same_prompt_the_same(host: ComfyServer, object_info: dict[str, Any]) -> None:
    made = []
    for text in ("a red fox", "two blue cubes on a table", "a red fox"):
        prompt = small_prompt(FLUX_DEV, object_info)
        set_inputs(prompt, "CLIPTextEncode", text=text)
        made.append(pixels(saved_pictures(host, prompt, host.run(prompt))[0]))
    assert np.abs(made[0] - made[1]).mean() > 1
    assert np.array_equal(made[0], made[2])


def test_a_flux_file_in_fp8_draws_the_image_of_the_same_flux_cast_to_fp8(host: ComfyServer, object_info: dict[str, Any]) -> None:
    from_fp8_file, cast = small_prompt(TWELVE_GB, object_info), small_prompt(FLUX_DEV, object_info)
    set_inputs(cast, "UNETLoader", weight_dtype="fp8_e4m3fn")
    first, second = (pixels(saved_pictures(host, prompt, host.run(prompt))[0]) for prompt in (from_fp8_file, cast))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("name", [LORA, CONTROLNET])
def test_lora_and_controlnet_reach_the_picture(name: str, host: ComfyServer, object_info: dict[str, Any]) -> None:
    with_it, without = small_prompt(name, object_info), small_prompt(name, object_info)
    if name == LORA:
        set_inputs(without, "LoraLoader", strength_model=0.0, strength_clip=0.0)
    else:
        set_inputs(without, "ControlNetApplyAdvanced", strength=0.0)
    first, second = (pixels(saved_pictures(host, prompt, host.run(prompt))[0]) for prompt in (with_it, without))
    assert np.abs(first - second).mean() > 1


def thin_qwen3() -> dict[str, torch.Tensor]:
    """A Qwen3-4B that says that it is quantised, so that its weights may have any shape; they are of one number each."""
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in Qwen3Layout.named("4b").tensors().items():
        published, thin = name.replace("encoder.", "model.", 1), len(shape) == 2
        tensors[published] = torch.zeros((1, 1) if thin and "_proj." in name else (1, *shape[1:]) if thin else shape, dtype=torch.uint8)
        if thin:
            tensors[published.replace(".weight", ".comfy_quant")] = torch.zeros(1, dtype=torch.uint8)
    return tensors


def test_trim_writes_a_file_of_the_layers_that_are_read(host: ComfyServer, object_info: dict[str, Any]) -> None:
    folder = host.base / "models" / "text_encoders"
    source, trimmed = folder / "qwen_3_4b.safetensors", folder / "qwen_3_4b_klein.safetensors"
    save_file(thin_qwen3(), source)
    prompt = small_prompt(TRIM, object_info)
    try:
        assert texts(host.run(prompt), prompt)["The new file"] == trimmed.name
        layers = {name.split(".")[2] for name in read_entries(trimmed) if name.startswith("model.layers.")}
        assert layers == set(map(str, range(27)))
    finally:
        source.unlink()
        trimmed.unlink(missing_ok=True)


def test_save_a_copy_writes_a_file_that_the_loader_then_lists(host: ComfyServer, object_info: dict[str, Any]) -> None:
    prompt = small_prompt(SAVE_A_COPY, object_info)
    set_inputs(prompt, "DistilledT5Save", filename="copy_of_a_workflow_test")
    set_inputs(prompt, "DistilledT5Loader", token_length=256)  # a new value: ComfyUI reports a cached result under its old id
    shown = texts(host.run(prompt), prompt)
    assert "T5-Base" in shown["What was loaded"]
    assert "256" in shown["Does my prompt fit?"]
    assert shown["The new file"] == "copy_of_a_workflow_test.safetensors"
    choices = host.get_json("/object_info/DistilledT5Loader")["DistilledT5Loader"]["input"]["required"]["clip_name2"][1]["options"]
    (host.base / "models" / "text_encoders" / "copy_of_a_workflow_test.safetensors").unlink()
    assert "copy_of_a_workflow_test.safetensors" in choices


def test_the_blueprint_runs(host: ComfyServer, object_info: dict[str, Any]) -> None:
    prompt = to_api_prompt(blueprint_inside(), object_info)
    set_inputs(prompt, "DistilledT5TextEncode", text="a prompt of no other test")
    [encode] = [node_id for node_id, node in prompt.items() if node["class_type"] == "DistilledT5TextEncode"]
    prompt["shown"] = {"class_type": "PreviewAny", "inputs": {"source": [encode, 1]}, "_meta": {"title": "token count"}}
    assert "256" in texts(host.run(prompt), prompt)["token count"]


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_names_its_inputs_and_outputs_as_comfyui_does(name: str, object_info: dict[str, Any]) -> None:
    for node in [node for node in example(name)["nodes"] if node["type"] not in NOTE_TYPES]:
        info = object_info[node["type"]]
        saved = {slot["name"] for slot in node["inputs"]} - {"upload"}
        assert saved == {input_name for group in ("required", "optional") for input_name in info["input"].get(group, {})}
        shows_only = node["type"] in ("PreviewAny", "PreviewImage", "SaveImage")  # newer versions give these an output
        assert [slot["type"] for slot in node["outputs"]] == ([] if shows_only else info["output"])


def test_an_unknown_node_type_is_named(object_info: dict[str, Any]) -> None:
    workflow = example(FLUX_DEV)
    workflow["nodes"][1]["type"] = "NoSuchLoader"
    with pytest.raises(ValueError, match="NoSuchLoader"):
        to_api_prompt(workflow, object_info)


def test_setting_an_input_that_does_not_exist_names_those_that_do(object_info: dict[str, Any]) -> None:
    prompt = to_api_prompt(example(FLUX_DEV), object_info)
    with pytest.raises(ValueError, match="steps"):
        set_inputs(prompt, "KSampler", step=2)
    with pytest.raises(ValueError, match="KSampler"):
        set_inputs(prompt, "SamplerCustom", steps=2)
