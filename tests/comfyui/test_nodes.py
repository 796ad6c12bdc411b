"""The three nodes, executed as the graph executes them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfy.cli_args import args
from comfy_extras.nodes_flux import CLIPTextEncodeFlux
from distilled_t5.encoder.files import open_student
from distilled_t5.families import FAMILIES
from distilled_t5.nodes import DistilledT5Extension, DistilledT5Loader, DistilledT5Save, DistilledT5TextEncode
from distilled_t5.runtime.weights import FLOAT_NAMES
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.small_encoders import PROMPT, TINY, embedding, pooled, random_tensors, student_file
from safetensors.torch import load_file, save_file

CLIP_L = "clip_l.safetensors"
SNAPSHOT = Path(__file__).parent / "schemas.json"
FILE_LISTS = ("clip_name1", "clip_name2", "clip_name3", "file", "preset", "preview_vae")


@pytest.fixture
def models(tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text encoder folder with CLIP-L, a tiny student and a file of another kind; the only one that ComfyUI knows."""
    (tmp_path / "clip_l.safetensors").symlink_to(stand_ins / "models" / "text_encoders" / "clip_l.safetensors")
    student_file(tmp_path, name="zz_student.safetensors", token_length=128)
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "a_vae.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], folder_paths.supported_pt_extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def load(clip_name1: str = "clip_l.safetensors", clip_name2: str = "zz_student.safetensors", **settings: Any) -> tuple[Any, str]:
    return DistilledT5Loader.execute(clip_name1, clip_name2, "flux", **settings).args


def test_loader_gives_a_clip_and_says_what_it_loaded(models):
    clip, info = load()
    assert embedding(clip).shape == (1, 128, 4096)
    for part in (
        "zz_student.safetensors",
        "0.7 M parameters" if TINY.parameters < 1e6 else f"{TINY.parameters / 1e6:.1f} M",
        "fp16",
        "cpu",
        "128 tokens",
        "clip_l",
    ):
        assert part in info


@pytest.mark.parametrize("family", ["pixart_alpha", "pixart_sigma", "chroma"])
def test_clip_l_is_not_used_and_reported_where_the_family_takes_t5_alone(models, family):
    student_file(models, name="alone.safetensors", family=family, token_length=1, pooled="zero")
    (_, expected), (clip, info) = (DistilledT5Loader.execute(first, "alone.safetensors", family).args for first in ("none", CLIP_L))
    assert info == f"{expected}\nnot used: {CLIP_L}, because {FAMILIES[family].display_name} takes T5 alone"
    assert not hasattr(clip.cond_stage_model, "clip_l")
    swapped, _ = DistilledT5Loader.execute("alone.safetensors", CLIP_L, family).args
    assert torch.equal(embedding(swapped), embedding(clip))


def test_loader_takes_its_two_files_in_either_order_as_DualCLIPLoader_does(models):
    usual, _ = load()
    swapped, _ = load("zz_student.safetensors", "clip_l.safetensors")
    assert torch.equal(embedding(swapped), embedding(usual))
    assert torch.equal(pooled(swapped), pooled(usual))


def test_loader_without_clip_l_gives_zeros(models):
    clip, info = load("none")
    assert pooled(clip).count_nonzero() == 0
    assert "no CLIP-L" in info


@pytest.mark.parametrize("length", [1, 77, 300])
def test_token_length_sets_the_padding_and_says_that_it_is_not_the_trained_one(models, length):
    clip, info = load(token_length=length)
    assert embedding(clip, "").shape[1] == length
    assert f"trained at 128 tokens, used at {length}" in info


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp8_e4m3fn", torch.float8_e4m3fn)],
)
def test_dtype_is_that_of_the_students_weights(models, dtype, torch_dtype):
    clip, info = load(dtype=dtype)
    assert {weight.dtype for weight in clip.cond_stage_model.t5base.transformer.parameters()} == {torch_dtype}
    assert dtype in info
    exact, _ = load(dtype="fp32")
    cosine = torch.cosine_similarity(embedding(clip), embedding(exact), dim=-1)
    assert cosine.min() > (0.9 if dtype == "fp8_e4m3fn" else 0.999)


@pytest.mark.parametrize(
    "flag, expected",
    [("fp8_e4m3fn_text_enc", torch.float8_e4m3fn), ("bf16_text_enc", torch.bfloat16), ("fp32_text_enc", torch.float32)],
)
def test_comfyuis_text_encoder_flags_set_the_dtype(models, monkeypatch, flag, expected):
    monkeypatch.setattr(args, flag, True)
    clip, info = load()
    assert torch.isfinite(embedding(clip)).all()
    assert {weight.dtype for weight in clip.cond_stage_model.t5base.transformer.parameters()} == {expected}
    assert FLOAT_NAMES[expected] in info


@pytest.mark.parametrize("dtype, largest", [("fp16", 70000.0), ("fp8_e4m3fn", 500.0), ("auto", 70000.0)])
def test_numbers_too_large_for_the_chosen_dtype_are_refused(models, dtype, largest):
    tensors = random_tensors(TINY)
    tensors["final_projection.3.weight"][0, 0] = largest
    save_file(tensors, models / "large.safetensors")
    with pytest.raises(ValueError, match=r"too large for[\s\S]*final_projection.3.weight[\s\S]*What to do: set dtype"):
        load("none", "large.safetensors", dtype=dtype)
    clip, _ = load("none", "large.safetensors", dtype="fp32")
    assert torch.isfinite(embedding(clip)).all()


def test_cpu_device_keeps_the_encoder_there(models):
    clip, _ = load(device="cpu")
    assert (clip.patcher.load_device.type, clip.patcher.offload_device.type) == ("cpu", "cpu")


def test_a_device_that_is_not_there_is_refused_by_name(models):
    with pytest.raises(ValueError, match=r"no device 'cuda:7'[\s\S]*What to do: choose one of default, cpu"):
        load(device="cuda:7")


def test_file_lists_show_students_first_and_clip_l_first(models):
    inputs = {each.id: each for each in DistilledT5Loader.define_schema().inputs}
    assert inputs["clip_name2"].options == ["zz_student.safetensors", "a_vae.safetensors", "clip_l.safetensors"]
    assert inputs["clip_name1"].options == ["clip_l.safetensors", "none", "a_vae.safetensors", "zz_student.safetensors"]


def test_fingerprint_changes_with_the_file_only(models):
    def fingerprint() -> str:
        return DistilledT5Loader.fingerprint_inputs(clip_name1="none", clip_name2="zz_student.safetensors", type="flux", dtype="auto")

    before = fingerprint()
    assert fingerprint() == before
    linked = DistilledT5Loader.fingerprint_inputs(clip_name1=None, clip_name2=None, type="flux")
    assert linked == DistilledT5Loader.fingerprint_inputs(clip_name1=None, clip_name2=None, type="flux")
    (models / "zz_student.safetensors").unlink()
    student_file(models, name="zz_student.safetensors", seed=3, token_length=128)
    assert fingerprint() != before


def test_text_encode_equals_CLIPTextEncodeFlux_and_counts_tokens(models):
    clip, _ = load()
    conditioning, count = DistilledT5TextEncode.execute(clip, PROMPT, 2.5).args
    expected = CLIPTextEncodeFlux.execute(clip, PROMPT, PROMPT, 2.5).args[0]
    assert torch.equal(conditioning[0][0], expected[0][0])
    assert conditioning[0][1].keys() == expected[0][1].keys()
    assert conditioning[0][1]["guidance"] == 2.5
    pieces = clip.tokenizer.t5xxl.tokenizer(PROMPT)["input_ids"]
    assert count == f"{len(pieces)} of 128 T5 tokens"


def test_text_encode_says_how_far_a_prompt_exceeds_the_trained_length(models):
    clip, _ = load()
    _, count = DistilledT5TextEncode.execute(clip, "word " * 199, 3.5).args
    assert count.startswith("200 T5 tokens, 72 more than the 128")


def test_text_encode_without_a_clip_says_what_to_connect():
    with pytest.raises(ValueError, match="What to do: connect a Distilled Text Encoder Loader"):
        DistilledT5TextEncode.execute(None, "", 3.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_published_file_saved_again_has_the_same_bytes(models, dtype):
    layout = StudentLayout(d_model=64, d_ff=128, num_layers=2, num_heads=4, hidden_width=4096, projected_width=4096)
    original = random_tensors(layout, dtype=dtype)
    save_file(original, models / "published.safetensors")
    clip, _ = load("none", "published.safetensors", dtype={torch.float32: "fp32"}.get(dtype, "auto"))
    (name,) = DistilledT5Save.execute(clip, "copy", "as loaded").args
    copy = load_file(models / name)
    assert copy.keys() == original.keys()
    assert all(torch.equal(copy[key].view(torch.uint8), original[key].view(torch.uint8)) for key in original)


def test_save_keeps_metadata_converts_and_never_overwrites(models):
    clip, _ = load()
    names = [DistilledT5Save.execute(clip, "mine/base", "bf16").args[0] for _ in range(2)]
    assert names == ["mine/base.safetensors", "mine/base_00002.safetensors"]
    saved = open_student(models / "mine" / "base.safetensors")
    assert (saved.metadata.token_length, saved.dtype) == (128, torch.bfloat16)
    again, _ = load(clip_name2=names[0])
    assert embedding(again).shape[1] == 128
    assert not list(models.rglob("*.part"))


def test_save_refuses_a_clip_that_is_not_a_student(models):
    with pytest.raises(ValueError, match="not a distilled encoder"):
        DistilledT5Save.execute(object(), "x", "as loaded")


def test_schemas_are_the_ones_that_shared_workflows_rely_on(models):
    """Widgets are stored by position: a changed order breaks every workflow that people have shared."""
    nodes = asyncio.run(DistilledT5Extension().get_node_list())
    schemas = {node.define_schema().node_id: _frozen(node.define_schema()) for node in nodes}
    assert schemas == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def _frozen(schema: Any) -> dict[str, Any]:
    """All that is set in a schema but texts, files and the accelerators of this machine."""
    inputs = [_set(each) | {"type": each.io_type} for each in schema.inputs]
    for each in inputs:
        each.pop("display_name", None)
        if each["id"] in FILE_LISTS:
            del each["options"]
        if (schema.node_id, each["id"]) == ("DistilledT5Distil", "prompts"):
            del each["default"]  # prompts/starter.txt
        if each["id"] == "device":
            each["options"] = [name for name in each["options"] if ":" not in name]
    outputs = [_set(each) | {"type": each.io_type} for each in schema.outputs]
    return {"category": schema.category, "flags": [name for name, value in vars(schema).items() if value is True]} | {
        "inputs": inputs,
        "outputs": outputs,
    }


def _set(slot: Any) -> dict[str, Any]:
    """The attributes of an input or output that are set, except its tooltip; which ones exist depends on the version of ComfyUI."""
    return {
        name: value for name, value in vars(slot).items() if value is not None and value is not False and value != {} and name != "tooltip"
    }


def test_every_node_is_in_the_extension():
    nodes = asyncio.run(DistilledT5Extension().get_node_list())
    assert {node.define_schema().node_id for node in nodes} == set(json.loads(SNAPSHOT.read_text(encoding="utf-8")))
