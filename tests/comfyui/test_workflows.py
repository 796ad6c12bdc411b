"""Every shipped workflow: its file is well made, and it runs in a real ComfyUI on stand-in models."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distilled_t5.devtools.blueprint import LINK_FIELDS
from distilled_t5.devtools.build_workflows import files
from distilled_t5.devtools.canvas import TITLE_PX
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.devtools.comfyui.workflow import NOTE_TYPES, input_names, set_inputs, to_api_prompt
from distilled_t5.devtools.models.random_models import link_into
from distilled_t5.devtools.notes import FILES
from distilled_t5.devtools.workflow_parts import MINIATURE_STUDENT, MINIATURE_TEACHER
from distilled_t5.miniature.files import FLUX_FILE, VAE_FILE
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
PATHS = sorted((ROOT / "example_workflows").glob("*.json"))
NAMES = [path.stem for path in PATHS]
BLUEPRINT = ROOT / "subgraphs" / "Flux text with Distilled T5.json"
SIDE_PX = 128
OUR_NODES = set(json.loads((Path(__file__).parent / "schemas.json").read_text(encoding="utf-8")))
LOADERS = {"UNETLoader", "VAELoader", "DualCLIPLoader", "LoraLoader", "ControlNetLoader", "DistilledT5Loader"}
# Files that come with the pack: nobody has to be told where they are to be had.
SHIPPED = {MINIATURE_TEACHER, MINIATURE_STUDENT, FLUX_FILE, VAE_FILE}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


ON_THE_MINIATURE = [path.stem for path in PATHS if any(name in path.read_text(encoding="utf-8") for name in SHIPPED)]


def example(name: str) -> dict[str, Any]:
    return read(ROOT / "example_workflows" / f"{name}.json")


def real_nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in workflow["nodes"] if node["type"] not in NOTE_TYPES]


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
        set_inputs(prompt, "EmptySD3LatentImage", width=SIDE_PX, height=SIDE_PX)
    return prompt


def saved_pictures(host: ComfyServer, prompt: dict[str, Any], entry: dict[str, Any]) -> list[Image.Image]:
    by_node = host.images_by_node(entry)
    return [image for node_id, images in by_node.items() if prompt[node_id]["class_type"] == "SaveImage" for image in images]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def texts(entry: dict[str, Any], prompt: dict[str, Any]) -> dict[str, str]:
    """What each Preview as Text shows, by its title."""
    return {prompt[node_id]["_meta"]["title"]: "".join(output["text"]) for node_id, output in entry["outputs"].items() if "text" in output}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"save-a-copy", "t5xxl-vs-distilled"} - set(ON_THE_MINIATURE)))
def test_runs_and_gives_one_picture_of_the_asked_size(name: str, host: ComfyServer, object_info: dict[str, Any]) -> None:
    prompt = small_prompt(name, object_info)
    pictures = saved_pictures(host, prompt, host.run(prompt))
    assert [picture.size for picture in pictures] == [(SIDE_PX, SIDE_PX)]
    assert pixels(pictures[0]).std() > 10, "a picture of one colour comes from values that are not finite"


def test_t5xxl_and_the_distilled_t5_give_two_different_pictures(host: ComfyServer, object_info: dict[str, Any]) -> None:
    prompt = small_prompt("t5xxl-vs-distilled", object_info)
    pictures = saved_pictures(host, prompt, host.run(prompt, timeout_s=600))
    host.free()  # the big encoder
    assert [picture.size for picture in pictures] == [(SIDE_PX, SIDE_PX)] * 2
    assert all(pixels(picture).std() > 10 for picture in pictures)
    assert np.abs(pixels(pictures[0]) - pixels(pictures[1])).mean() > 1


def test_another_prompt_gives_another_picture_and_the_same_prompt_the_same(host: ComfyServer, object_info: dict[str, Any]) -> None:
    made = []
    for text in ("a red fox", "two blue cubes on a table", "a red fox"):
        prompt = small_prompt("flux-dev", object_info)
        set_inputs(prompt, "CLIPTextEncode", text=text)
        made.append(pixels(saved_pictures(host, prompt, host.run(prompt))[0]))
    assert np.abs(made[0] - made[1]).mean() > 1
    assert np.array_equal(made[0], made[2])


@pytest.mark.parametrize("name", ["flux-dev-lora", "flux-dev-controlnet"])
def test_lora_and_controlnet_reach_the_picture(name: str, host: ComfyServer, object_info: dict[str, Any]) -> None:
    with_it, without = small_prompt(name, object_info), small_prompt(name, object_info)
    if name == "flux-dev-lora":
        set_inputs(without, "LoraLoader", strength_model=0.0, strength_clip=0.0)
    else:
        set_inputs(without, "ControlNetApplyAdvanced", strength=0.0)
    first, second = (pixels(saved_pictures(host, prompt, host.run(prompt))[0]) for prompt in (with_it, without))
    assert np.abs(first - second).mean() > 1


def test_save_a_copy_writes_a_file_that_the_loader_then_lists(host: ComfyServer, object_info: dict[str, Any]) -> None:
    prompt = small_prompt("save-a-copy", object_info)
    set_inputs(prompt, "DistilledT5Save", filename="copy_of_a_workflow_test")
    set_inputs(prompt, "DistilledT5Loader", token_length=256)  # new to the host, which reports a cached result under its old id
    shown = texts(host.run(prompt), prompt)
    assert "T5-Base" in shown["What was loaded"]
    assert "256" in shown["Does my prompt fit?"]
    assert shown["The new file"] == "copy_of_a_workflow_test.safetensors"
    choices = host.get_json("/object_info/DistilledT5Loader")["DistilledT5Loader"]["input"]["required"]["clip_name2"][1]["options"]
    (host.base / "models" / "text_encoders" / "copy_of_a_workflow_test.safetensors").unlink()
    assert "copy_of_a_workflow_test.safetensors" in choices


def test_the_blueprint_runs(host: ComfyServer, object_info: dict[str, Any]) -> None:
    inner = read(BLUEPRINT)["definitions"]["subgraphs"][0]
    links = [[link[field] for field in LINK_FIELDS] for link in inner["links"]]
    prompt = to_api_prompt({"nodes": inner["nodes"], "links": links}, object_info)
    set_inputs(prompt, "DistilledT5TextEncode", text="a prompt of no other test")
    [encode] = [node_id for node_id, node in prompt.items() if node["class_type"] == "DistilledT5TextEncode"]
    prompt["shown"] = {"class_type": "PreviewAny", "inputs": {"source": [encode, 1]}, "_meta": {"title": "token count"}}
    assert "256" in texts(host.run(prompt), prompt)["token count"]


@pytest.mark.parametrize("name", NAMES)
def test_names_its_inputs_and_outputs_as_the_host_does(name: str, object_info: dict[str, Any]) -> None:
    for node in real_nodes(example(name)):
        info = object_info[node["type"]]
        saved = {slot["name"] for slot in node["inputs"]} - {"upload"}
        assert saved == set(input_names(info))
        shows_only = node["type"] in ("PreviewAny", "PreviewImage", "SaveImage")  # these got an output in later hosts
        assert [slot["type"] for slot in node["outputs"]] == ([] if shows_only else info["output"])


def test_files_are_what_the_builder_writes() -> None:
    for path, text in files(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"run python -m distilled_t5.devtools.build_workflows: {path.name} differs"


def test_each_node_of_the_pack_is_in_a_workflow() -> None:
    used = {node["type"] for path in PATHS for node in read(path)["nodes"]}
    assert used >= OUR_NODES


def test_the_issue_s_five_workflows_are_there() -> None:
    assert {"flux-dev", "flux-schnell", "flux-dev-lora", "flux-dev-controlnet", "t5xxl-vs-distilled"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_links_are_consistent(name: str) -> None:
    workflow = example(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    claimed = {slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None}
    claimed_out = [link for node in nodes.values() for slot in node["outputs"] for link in slot["links"]]
    ids = [link[0] for link in workflow["links"]]
    assert claimed == set(ids) == set(claimed_out)
    assert len(set(ids)) == len(ids) == len(claimed_out)
    for link_id, origin, origin_slot, target, target_slot, type_name in workflow["links"]:
        assert link_id in nodes[origin]["outputs"][origin_slot]["links"]
        assert nodes[target]["inputs"][target_slot]["link"] == link_id
        assert type_name in (nodes[origin]["outputs"][origin_slot]["type"], "*")
    assert workflow["last_node_id"] >= max(nodes)
    assert workflow["last_link_id"] >= max(ids)


@pytest.mark.parametrize("name", NAMES)
def test_every_socket_that_must_be_wired_is_wired(name: str) -> None:
    for node in real_nodes(example(name)):
        for slot in node["inputs"]:
            assert slot["link"] is not None or "widget" in slot or slot.get("shape") == 7, f"{node['type']}.{slot['name']} dangles"


@pytest.mark.parametrize("name", NAMES)
def test_has_a_version_a_uuid_and_a_note(name: str) -> None:
    workflow = example(name)
    assert workflow["version"] == 0.4
    assert str(uuid.UUID(workflow["id"])) == workflow["id"]
    assert [node["type"] for node in workflow["nodes"]].count("MarkdownNote") == 1


def test_ids_differ() -> None:
    assert len({read(path)["id"] for path in PATHS}) == len(PATHS)


@pytest.mark.parametrize("name", NAMES)
def test_every_node_says_which_pack_it_comes_from(name: str) -> None:
    for node in example(name)["nodes"]:
        pack = "distilled-t5" if node["type"] in OUR_NODES else "comfy-core"
        assert node["properties"]["cnr_id"] == pack
        assert node["properties"]["ver"] == ("0.1.0" if pack == "distilled-t5" else "0.16.3")


@pytest.mark.parametrize("name", NAMES)
def test_loaders_name_every_model_file_that_they_load(name: str) -> None:
    for node in real_nodes(example(name)):
        if node["type"] not in LOADERS:
            continue
        loaded = [value for value in node["widgets_values"] if str(value).endswith(".safetensors") and value not in SHIPPED]
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == loaded
        assert all(model["url"].startswith("https://huggingface.co/") and model["url"].endswith(".safetensors") for model in models)
        assert all(model["directory"] == FILES[model["name"]].folder for model in models)


@pytest.mark.parametrize("name", NAMES)
def test_the_note_names_every_model_file(name: str) -> None:
    workflow = example(name)
    [note] = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    loaded = {model["name"] for node in workflow["nodes"] for model in node["properties"].get("models", [])}
    assert all(f"[{file}]" in note for file in loaded)


@pytest.mark.parametrize("name", NAMES)
def test_no_two_nodes_overlap_and_each_lies_in_one_group_or_is_the_note(name: str) -> None:
    workflow = example(name)
    rects = {node["id"]: node_rect(node) for node in workflow["nodes"]}
    assert not [pair for pair in itertools.combinations(rects, 2) if overlap(rects[pair[0]], rects[pair[1]])]
    groups = [tuple(group["bounding"]) for group in workflow["groups"]]
    assert not [pair for pair in itertools.combinations(groups, 2) if overlap(*pair)]
    for node in workflow["nodes"]:
        around = [group for group in groups if inside(rects[node["id"]], group)]
        assert len(around) == (0 if node["type"] == "MarkdownNote" else 1), f"{node['type']} lies in {len(around)} groups"


Rect = tuple[float, ...]  # left, top, width, height


def node_rect(node: dict[str, Any]) -> Rect:
    left, top = node["pos"]
    width, height = node["size"]
    return (left, top - TITLE_PX, width, height + TITLE_PX)


def overlap(one: Rect, other: Rect) -> bool:
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))


def inside(one: Rect, other: Rect) -> bool:
    return all(one[axis] >= other[axis] and one[axis] + one[axis + 2] <= other[axis] + other[axis + 2] for axis in (0, 1))


def test_the_app_shows_inputs_that_exist_and_the_picture() -> None:
    workflow = example("flux-dev-app")
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    assert workflow["extra"]["linearMode"] is True
    for node_id, widget in workflow["extra"]["linearData"]["inputs"]:
        assert widget in [slot["name"] for slot in nodes[node_id]["inputs"] if "widget" in slot]
    assert [nodes[node_id]["type"] for node_id in workflow["extra"]["linearData"]["outputs"]] == ["SaveImage"]


def test_an_unknown_node_type_is_named(object_info: dict[str, Any]) -> None:
    workflow = example("flux-dev")
    workflow["nodes"][1]["type"] = "NoSuchLoader"
    with pytest.raises(ValueError, match="NoSuchLoader"):
        to_api_prompt(workflow, object_info)


def test_setting_an_input_that_does_not_exist_names_those_that_do(object_info: dict[str, Any]) -> None:
    prompt = to_api_prompt(example("flux-dev"), object_info)
    with pytest.raises(ValueError, match="steps"):
        set_inputs(prompt, "KSampler", step=2)
    with pytest.raises(ValueError, match="KSampler"):
        set_inputs(prompt, "SamplerCustom", steps=2)
