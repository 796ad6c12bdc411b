"""The pack in a real server, installed as a user would: it loads without a warning and serves nodes, pages and workflows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.devtools.comfyui.server import ComfyServer, PromptFailed, end_process_group
from distilled_t5.devtools.models.random_models import link_into
from distilled_t5.tests.support.workflows import BLUEPRINT_NAME, EXAMPLE_NAMES, PACK_NODES, example

OUR_NODES = sorted(PACK_NODES)
OLD_NODE = "DualCLIPLoaderT5Base"


@pytest.fixture(scope="module")
def host(server: ComfyServer, stand_ins: Path) -> Iterator[ComfyServer]:
    link_into(stand_ins, server.base)
    yield server
    server.free()


def start_of(host: ComfyServer) -> str:
    """What a server prints until it is ready."""
    return host.log().split("To see the GUI go to")[0]


def pack_lines(host: ComfyServer) -> list[str]:
    """The lines of a server's start that name the pack's folder or the pack."""
    names = (str(host.base / "custom_nodes" / host.pack.name), "distilled_t5", "DistilledT5", "Distilled T5")
    return [line for line in start_of(host).splitlines() if any(name in line for name in names)]


def node_info(host: ComfyServer, name: str) -> dict[str, Any]:
    return host.get_json(f"/object_info/{name}")[name]


def visible_inputs(info: dict[str, Any]) -> dict[str, Any]:
    """The inputs that a user sees: not the hidden ones of output nodes."""
    return info["input"].get("required", {}) | info["input"].get("optional", {})


def load_only(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A prompt that loads an encoder, encodes with a stock node and shows something, so that ComfyUI runs it."""
    return {
        "1": {"class_type": class_type, "inputs": inputs},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 0], "text": "a red fox"}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }


def test_the_pack_loads_without_a_warning(host: ComfyServer) -> None:
    log = host.log()
    assert "Error while calling comfy_entrypoint" not in log
    imported = [line for line in pack_lines(host) if "seconds" in line]
    assert len(imported) == 1
    assert "IMPORT FAILED" not in imported[0]
    folder = str(host.base / "custom_nodes" / host.pack.name)
    blamed = [line for line in start_of(host).splitlines() if folder in line and "seconds" not in line]
    assert blamed == [], "ComfyUI reported the pack while it started"


def start_lines(host: ComfyServer) -> set[str]:
    """What a server prints until it is ready, without numbers, its folder and the lines that every pack causes."""
    lines = start_of(host).replace(str(host.base), "BASE").splitlines()
    plain = {re.sub(r"\d+(\.\d+)?", "N", line.removeprefix("[INFO]").strip()) for line in lines}
    return plain - {"Import times for custom nodes:", f"N seconds: BASE/custom_nodes/{re.sub('[0-9]+', 'N', host.pack.name)}"}


def test_at_its_start_comfyui_prints_nothing_that_it_does_not_print_without_the_pack(host: ComfyServer, tmp_path: Path) -> None:
    with ComfyServer(host.comfyui, tmp_path, host.pack, flags=("--whitelist-custom-nodes", "nothing")) as without:
        assert not set(OUR_NODES) & set(without.object_info())
        expected = start_lines(without)
    assert len(expected) > 5
    assert start_lines(host) - expected == set()


@pytest.mark.parametrize("name", OUR_NODES)
def test_a_node_explains_itself(name: str, host: ComfyServer) -> None:
    info = node_info(host, name)
    assert info["display_name"].startswith("Distilled T5") or info["display_name"].endswith(("Text Encoder", "Text Encoder Loader"))
    assert info["category"] == "Distilled T5"
    assert len(info["description"]) > 40
    assert len(info["search_aliases"]) >= 3
    assert len(info["output_tooltips"]) == len(info["output"])
    assert all(info["output_tooltips"])
    # ComfyUI shows that category separately from the nodes of packs.
    assert not info.get("essentials_category")
    for input_name, spec in visible_inputs(info).items():
        assert spec[1].get("tooltip"), f"{name}.{input_name} has no tooltip"


def test_distilled_files_come_first_in_the_list(host: ComfyServer) -> None:
    required = node_info(host, "DistilledT5Loader")["input"]["required"]
    names = required["clip_name2"][1]["options"]
    assert names.index("distilled_t5_base.safetensors") < min(names.index("clip_l.safetensors"), names.index("t5xxl_fp16.safetensors"))
    assert required["clip_name1"][1]["options"][0] == "clip_l.safetensors"


def test_the_authors_node_has_a_replacement(host: ComfyServer) -> None:
    [replacement] = host.get_json("/node_replacements")[OLD_NODE]
    assert replacement["new_node_id"] == "DistilledT5Loader"
    mapped = {mapping["new_id"] for mapping in replacement["input_mapping"]}
    assert mapped >= set(node_info(host, "DistilledT5Loader")["input"]["required"])


def test_a_prompt_with_the_authors_node_runs(host: ComfyServer) -> None:
    names = {"clip_name1": "distilled_t5_base.safetensors", "clip_name2": "clip_l.safetensors"}
    prompt = load_only(OLD_NODE, **names, type="flux")
    prompt["1"]["_meta"] = {"title": "Dual CLIP"}  # which browsers always send, and which ComfyUI 0.16's replacement needs
    assert host.run(prompt)["status"]["status_str"] == "success"


@pytest.mark.parametrize("order", [1, -1], ids=["CLIP-L first", "T5 first"])
def test_a_prompt_of_the_api_with_the_authors_node_and_without_meta_runs(order: int, host: ComfyServer) -> None:
    first, second = ["clip_l.safetensors", "distilled_t5_base.safetensors"][::order]
    prompt = load_only(OLD_NODE, clip_name1=first, clip_name2=second, type="any")
    assert host.run(prompt)["status"]["status_str"] == "success"


def test_a_prompt_with_the_authors_node_and_without_one_of_its_inputs_is_refused_by_name(host: ComfyServer) -> None:
    with pytest.raises(PromptFailed, match="clip_name2"):
        host.run(load_only(OLD_NODE, clip_name1="clip_l.safetensors"))


def test_an_error_of_the_loader_is_reported_with_what_to_do(host: ComfyServer) -> None:
    names = {"clip_name1": "clip_l.safetensors", "clip_name2": "clip_l.safetensors"}
    with pytest.raises(PromptFailed, match=r"clip_l.safetensors(?s:.*)What to do: ") as failure:
        host.run(load_only("DistilledT5Loader", **names, type="flux"))
    assert failure.value.node_id == "1"


def test_a_missing_file_is_refused_with_the_list_of_known_files(host: ComfyServer) -> None:
    with pytest.raises(PromptFailed, match="distilled_t5_base") as failure:
        host.run(load_only("DistilledT5Loader", clip_name1="none", clip_name2="no_such.safetensors", type="flux"))
    assert failure.value.node_id == "1"


def test_only_prompts_words_and_names_of_new_files_are_free_text(host: ComfyServer) -> None:
    kinds = {(name, each): spec[0] for name in OUR_NODES for each, spec in visible_inputs(node_info(host, name)).items()}
    assert {place for place, kind in kinds.items() if kind == "STRING"} == {
        ("DistilledT5TextEncode", "text"),
        ("DistilledT5Save", "filename"),
        ("DistilledT5Trim", "filename"),
        ("DistilledT5OCRAccuracy", "expected"),
        ("DistilledT5EncoderMap", "prompts"),
        ("DistilledT5CrossAttentionMap", "prompt"),
        ("DistilledT5CrossAttentionMap", "word"),
        ("DistilledT5EncoderReport", "prompt"),
        ("DistilledT5Distil", "prompts"),
        ("DistilledT5Distil", "name"),
    }
    assert {kinds["DistilledT5Loader", f"clip_name{number}"] for number in (1, 2, 3)} == {"COMBO"}


@pytest.mark.parametrize("field", ["clip_name1", "clip_name2"])
def test_a_path_instead_of_a_listed_file_is_refused(field: str, host: ComfyServer, stand_ins: Path) -> None:
    file = stand_ins / "models" / "text_encoders" / "distilled_t5_base.safetensors"
    assert file.exists()
    names = {"clip_name1": "none", "clip_name2": "distilled_t5_base.safetensors"}
    for path in (str(file), f"../text_encoders/{file.name}"):
        with pytest.raises(PromptFailed, match="Value not in list"):
            host.run(load_only("DistilledT5Loader", **(names | {field: path}), type="flux"))


@pytest.mark.parametrize("name", OUR_NODES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_pages_are_served(name: str, language: str, host: ComfyServer) -> None:
    page = host.get(f"/extensions/{urllib.parse.quote(host.pack.name)}/docs/{name}/{language}.md").decode()
    assert len(page) > 200


def test_translations_are_served(host: ComfyServer) -> None:
    chinese = host.get_json("/i18n")["zh"]["nodeDefs"]
    for name in OUR_NODES:
        info = node_info(host, name)
        assert chinese[name]["display_name"] != info["display_name"]
        assert set(chinese[name]["inputs"]) == set(visible_inputs(info))


def test_templates_are_listed_and_served(host: ComfyServer) -> None:
    assert set(host.get_json("/workflow_templates")[host.pack.name]) >= set(EXAMPLE_NAMES)
    for name in EXAMPLE_NAMES:
        served = host.get_json(f"/api/workflow_templates/{urllib.parse.quote(host.pack.name)}/{name}.json")
        assert served == example(name)


def test_the_blueprint_is_listed_and_served(host: ComfyServer) -> None:
    [found] = [key for key, entry in host.get_json("/global_subgraphs").items() if entry["name"] == BLUEPRINT_NAME]
    data = json.loads(host.get_json(f"/global_subgraphs/{found}")["data"])
    assert data["definitions"]["subgraphs"][0]["name"] == BLUEPRINT_NAME


def test_an_unknown_page_is_an_error(host: ComfyServer) -> None:
    with pytest.raises(urllib.error.HTTPError):
        host.get("/extensions/no-such-pack/docs/x.md")


def test_a_server_that_cannot_start_reports_the_reason(comfyui_path: Path, pack_root: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with code.*unrecognized arguments: --no-such-flag"):
        ComfyServer(comfyui_path, tmp_path, pack_root, flags=("--no-such-flag",)).__enter__()


def test_a_port_in_use_is_refused(host: ComfyServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"port {host.port} is in use"):
        ComfyServer(host.comfyui, tmp_path, host.pack, port=host.port).__enter__()


def test_stopping_ends_the_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    end_process_group(process)
    assert process.poll() is not None


def test_these_tests_do_not_use_the_model_folders_of_comfyui_itself(comfyui_path: Path) -> None:
    import folder_paths

    folders = [folder for kind in ("text_encoders", "vae", "diffusion_models") for folder in folder_paths.get_folder_paths(kind)]
    assert folders
    assert not [folder for folder in folders if Path(folder).is_relative_to(comfyui_path)]


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("DistilledT5TextEncode", {"text": "\ud800", "guidance": 3.5}),
        ("DistilledT5Save", {"filename": "mine\udcff", "dtype": "as loaded"}),
        ("DistilledT5EncoderMap", {"prompts": "a fox\n\ud800", "seed": 0}),
    ],
)
def test_an_ordinary_prompt_runs_after_a_text_that_is_not_valid_unicode(host: ComfyServer, node: str, inputs: dict[str, Any]) -> None:
    ordinary = load_only("DistilledT5Loader", clip_name1="none", clip_name2="distilled_t5_base.safetensors", type="flux")
    clip = {"clip_1" if node == "DistilledT5EncoderMap" else "clip": ["1", 0]}
    broken = {**ordinary, "4": {"class_type": node, "inputs": {**clip, **inputs}}}
    shown = {"5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}}}
    with pytest.raises(PromptFailed, match="What to do: "):
        host.run(broken | shown, timeout_s=120)
    host.run({**ordinary, "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 0], "text": f"after {node}"}}}, timeout_s=120)
