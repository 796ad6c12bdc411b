"""The shipped workflow files, read without ComfyUI: format 0.4, consistent links, origin of every node and every model file."""

from __future__ import annotations

import itertools
import re
import uuid
from typing import Any

import pytest
from distilled_t5 import __version__
from distilled_t5.devtools.comfyui.workflow import NOTE_TYPES
from distilled_t5.families import FAMILIES
from distilled_t5.tests.support.workflows import (
    AGAINST_T5XXL,
    CONTROLNET,
    EXAMPLE_NAMES,
    EXAMPLES,
    FLUX_DEV,
    FORM,
    LORA,
    PACK_NODES,
    ROOT,
    SCHNELL,
    TWELVE_GB,
    blueprint,
    blueprint_inside,
    example,
)
from distilled_t5.train.recipe import load_recipe
from PIL import Image

TITLE_PX = 30
# The page fits the nodes, with this margin, into this share of the canvas, which fills the window.
FIT_MARGIN_PX, FIT_SHARE = 10, 0.75
SMALLEST_ZOOM = 0.65
SHOW_THEIR_IMAGE = {"DistilledT5AttentionMapImage", "DistilledT5OCRAccuracy", "DistilledT5EncoderMap", "DistilledT5EncoderReport"}
SHOW_IMAGES = {"SaveImage", "PreviewImage"}
OLDEST_COMFYUI = "0.16.3"
LOADERS = {"UNETLoader", "VAELoader", "DualCLIPLoader", "LoraLoader", "ControlNetLoader", "DistilledT5Loader", "CheckpointLoaderSimple"}
LOADERS |= {"DistilledT5Trim"}
FOLDERS = {"checkpoints", "text_encoders", "diffusion_models", "vae", "loras", "controlnet"}
SHIPPED = {path.name for path in (ROOT / "miniature" / "models").rglob("*.safetensors")}
# Students that nobody has published, by the recipe that trains each.
TRAINED = {f"{load_recipe(path.stem).output.name}.safetensors": path.stem for path in (ROOT / "recipes").glob("*.toml")}
NO_ADDRESS = {*SHIPPED, *TRAINED}
# A line of a note's list of files: [name](address) into models/folder (remark).
FILE_LINE = re.compile(r"^- \[([^\]]+)\]\((https://[^)]+)\) into models/(\w+) \(", re.MULTILINE)

each_example = pytest.mark.parametrize("name", EXAMPLE_NAMES)


def real_nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in workflow["nodes"] if node["type"] not in NOTE_TYPES]


def note_of(name: str) -> str:
    [note] = [node["widgets_values"][0] for node in example(name)["nodes"] if node["type"] == "MarkdownNote"]
    return note


def named_models(name: str) -> dict[str, tuple[str, str]]:
    """Address and folder of each model file that the loaders of an example name, by file name."""
    models = [model for node in example(name)["nodes"] for model in node["properties"].get("models", [])]
    return {model["name"]: (model["url"], model["directory"]) for model in models}


def assert_links_are_consistent(nodes: list[dict[str, Any]], links: list[list[Any]], borders: tuple[int, ...] = ()) -> None:
    """Every link is known at both of its ends, and no end names a link that does not exist; `borders` are the ends of a subgraph."""
    by_id = {node["id"]: node for node in nodes}
    ids = [link[0] for link in links]
    into = [slot["link"] for node in nodes for slot in node["inputs"] if slot["link"] is not None]
    out_of = [link for node in nodes for slot in node["outputs"] for link in slot["links"]]
    assert len(set(ids)) == len(ids)
    assert sorted(into) == sorted(link[0] for link in links if link[3] not in borders)
    assert sorted(out_of) == sorted(link[0] for link in links if link[1] not in borders)
    for link_id, origin, origin_slot, target, target_slot, type_name in links:
        if target not in borders:
            assert by_id[target]["inputs"][target_slot]["link"] == link_id
        if origin not in borders:
            assert link_id in by_id[origin]["outputs"][origin_slot]["links"]
            assert type_name in (by_id[origin]["outputs"][origin_slot]["type"], "*")


def test_each_node_of_the_pack_is_in_an_example() -> None:
    assert {node["type"] for name in EXAMPLE_NAMES for node in example(name)["nodes"]} >= PACK_NODES


def test_the_examples_for_flux_exist() -> None:
    assert {FLUX_DEV, TWELVE_GB, SCHNELL, FORM, LORA, CONTROLNET, AGAINST_T5XXL} <= set(EXAMPLE_NAMES)


@each_example
def test_links_are_consistent(name: str) -> None:
    workflow = example(name)
    assert_links_are_consistent(workflow["nodes"], workflow["links"])
    assert workflow["last_node_id"] >= max(node["id"] for node in workflow["nodes"])
    assert workflow["last_link_id"] >= max(link[0] for link in workflow["links"])


@each_example
def test_every_socket_that_must_be_connected_is_connected(name: str) -> None:
    for node in real_nodes(example(name)):
        for slot in node["inputs"]:
            assert slot["link"] is not None or "widget" in slot or slot.get("shape") == 7, f"{node['type']}.{slot['name']} is not connected"


@each_example
def test_an_example_has_a_version_a_uuid_a_note_and_a_square_picture(name: str) -> None:
    workflow = example(name)
    assert workflow["version"] == 0.4
    assert str(uuid.UUID(workflow["id"])) == workflow["id"]
    assert note_of(name).startswith("## ")
    with Image.open(EXAMPLES / f"{name}.jpg") as picture:
        assert picture.width == picture.height


def test_names_are_numbered_in_the_order_of_the_template_browser_and_can_be_in_a_link() -> None:
    numbers = [int(name[:2]) for name in EXAMPLE_NAMES]
    assert sorted(set(numbers)) == numbers
    assert [name for name in EXAMPLE_NAMES if not re.fullmatch(r"[0-9]{2}-[A-Z][A-Za-z0-9-]+", name)] == []


@each_example
@pytest.mark.parametrize("window_px", [(1600, 1000), (1440, 900)])
def test_an_example_opens_at_a_zoom_at_which_text_can_be_read(name: str, window_px: tuple[int, int]) -> None:
    rects = [node_rect(node) for node in example(name)["nodes"]]
    zooms = []
    for axis in (0, 1):
        first, last = min(rect[axis] for rect in rects), max(rect[axis] + rect[axis + 2] for rect in rects)
        zooms.append(FIT_SHARE * window_px[axis] / (last - first + 2 * FIT_MARGIN_PX))
    assert min(zooms) >= SMALLEST_ZOOM


@each_example
def test_no_image_is_shown_twice(name: str) -> None:
    workflow = example(name)
    types = {node["id"]: node["type"] for node in workflow["nodes"]}
    shown = [(origin, slot) for _, origin, slot, target, _, _ in workflow["links"] if types[target] in SHOW_IMAGES]
    assert len(set(shown)) == len(shown)
    assert not {types[origin] for origin, _ in shown} & SHOW_THEIR_IMAGE


def test_ids_differ() -> None:
    assert len({example(name)["id"] for name in EXAMPLE_NAMES} | {blueprint()["id"]}) == len(EXAMPLE_NAMES) + 1


@each_example
def test_every_node_says_which_pack_it_comes_from(name: str) -> None:
    for node in example(name)["nodes"]:
        origin = ("distilled-t5", __version__) if node["type"] in PACK_NODES else ("comfy-core", OLDEST_COMFYUI)
        assert (node["properties"]["cnr_id"], node["properties"]["ver"]) == origin


@each_example
def test_loaders_name_every_model_file_that_they_load(name: str) -> None:
    for node in real_nodes(example(name)):
        if node["type"] in LOADERS:
            loaded = [
                value for value in node["widgets_values"] if str(value).endswith(".safetensors") and value not in {*SHIPPED, *TRAINED}
            ]
            assert [model["name"] for model in node["properties"].get("models", [])] == loaded


@each_example
def test_the_note_says_which_recipe_trains_a_student_and_what_was_not_tried(name: str) -> None:
    loaded = {value for node in real_nodes(example(name)) for value in node["widgets_values"] if value in TRAINED and value not in SHIPPED}
    for student in loaded:
        assert f"- {student} into models/text_encoders: **you train it**" in note_of(name)
        assert f"train {TRAINED[student]}`" in note_of(name)
        assert "**not tried with the real weights**" in note_of(name)


def test_each_family_has_an_example() -> None:
    loaders = [node for name in EXAMPLE_NAMES for node in example(name)["nodes"] if node["type"] == "DistilledT5Loader"]
    # No recipe of full size trains a student for families of Qwen3 yet.
    assert {node["widgets_values"][2] for node in loaders} == {name for name, family in FAMILIES.items() if family.kind.name == "t5"}


@each_example
def test_model_files_have_an_address_that_comfyui_offers_for_download_and_a_folder(name: str) -> None:
    for url, folder in named_models(name).values():
        assert re.fullmatch(r"https://huggingface\.co/[^/]+/[^/]+/resolve/main/\S+\.safetensors", url)
        assert folder in FOLDERS


@each_example
def test_the_note_lists_every_model_file_with_the_address_and_folder_that_the_loaders_name(name: str) -> None:
    assert {file: (url, folder) for file, url, folder in FILE_LINE.findall(note_of(name))} == named_models(name)


def test_all_examples_agree_where_a_model_file_comes_from() -> None:
    places: dict[str, set[tuple[str, str]]] = {}
    for name in EXAMPLE_NAMES:
        for file, place in named_models(name).items():
            places.setdefault(file, set()).add(place)
    assert len(places) > 5
    assert not {file: found for file, found in places.items() if len(found) > 1}


@pytest.mark.parametrize("name", [name for name in EXAMPLE_NAMES if any(file.startswith("flux1-dev") for file in named_models(name))])
def test_the_note_of_an_example_with_flux_dev_says_that_its_licence_is_non_commercial(name: str) -> None:
    assert "non-commercial" in note_of(name)


@each_example
def test_no_two_nodes_overlap_and_each_is_in_one_group_or_is_the_note(name: str) -> None:
    workflow = example(name)
    rects = {node["id"]: node_rect(node) for node in workflow["nodes"]}
    assert not [pair for pair in itertools.combinations(rects, 2) if overlap(rects[pair[0]], rects[pair[1]])]
    groups = [tuple(group["bounding"]) for group in workflow["groups"]]
    assert not [pair for pair in itertools.combinations(groups, 2) if overlap(*pair)]
    for node in workflow["nodes"]:
        around = [group for group in groups if inside(rects[node["id"]], group)]
        assert len(around) == (0 if node["type"] == "MarkdownNote" else 1), f"{node['type']} is in {len(around)} groups"


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
    workflow = example(FORM)
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    assert workflow["extra"]["linearMode"] is True
    for node_id, widget in workflow["extra"]["linearData"]["inputs"]:
        assert widget in [slot["name"] for slot in nodes[node_id]["inputs"] if "widget" in slot]
    assert [nodes[node_id]["type"] for node_id in workflow["extra"]["linearData"]["outputs"]] == ["SaveImage"]


def test_the_blueprint_is_one_subgraph_with_consistent_links_and_slots() -> None:
    workflow, [inner] = blueprint(), blueprint()["definitions"]["subgraphs"]
    [outer] = workflow["nodes"]
    assert (workflow["version"], outer["type"], outer["title"]) == (0.4, inner["id"], inner["name"])
    assert str(uuid.UUID(workflow["id"])) == workflow["id"]
    assert (outer["properties"]["cnr_id"], outer["properties"]["ver"]) == ("distilled-t5", __version__)
    assert_links_are_consistent(**blueprint_inside(), borders=(inner["inputNode"]["id"], inner["outputNode"]["id"]))
    links = {link["id"]: link for link in inner["links"]}
    for side, end in (("inputs", "origin_slot"), ("outputs", "target_slot")):
        assert [(slot["name"], slot["type"]) for slot in outer[side]] == [(slot["name"], slot["type"]) for slot in inner[side]]
        assert all(links[link][end] == number for number, slot in enumerate(inner[side]) for link in slot["linkIds"])


def test_the_blueprint_shows_widgets_that_exist_inside_and_names_its_model_files() -> None:
    [outer], [inner] = blueprint()["nodes"], blueprint()["definitions"]["subgraphs"]
    nodes = {str(node["id"]): node for node in inner["nodes"]}
    for node_id, widget in outer["properties"]["proxyWidgets"]:
        assert widget in [slot["name"] for slot in nodes[node_id]["inputs"] if "widget" in slot]
    models = {
        model["name"]: (model["url"], model["directory"]) for node in inner["nodes"] for model in node["properties"].get("models", [])
    }
    assert models == {name: named_models(FLUX_DEV)[name] for name in ("clip_l.safetensors", "distilled_t5_base.safetensors")}
