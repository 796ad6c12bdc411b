"""The Qwen3 student: sizes read off tensors, names, refusals, its start from a published folder, and the trained module."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from distilled_t5.encoder.files import open_student, write_student
from distilled_t5.encoder.metadata import StudentMetadata
from distilled_t5.encoder.needed_tensors import check_large_tensors, student_header
from distilled_t5.families import FAMILIES
from distilled_t5.runtime.errors import StudentFileError, UndistilledError
from distilled_t5.students import KINDS, kind_of
from distilled_t5.students.qwen3 import QWEN3
from distilled_t5.students.qwen3.layout import END, PAD, Qwen3Layout, read_layout
from distilled_t5.students.qwen3.trained import DistilledQwen3, transformers_config
from distilled_t5.train.optimizer import make_optimizer
from distilled_t5.train.student_start import make_student
from torch import Tensor
from transformers import Qwen3ForCausalLM, Qwen3Model

SMALL = Qwen3Layout(16, 24, num_layers=2, num_heads=2, num_kv_heads=1, vocab_size=40, hidden_width=8, projected_width=12)
# With the token that pads.
FULL = dataclasses.replace(SMALL, vocab_size=QWEN3.tokens)
INDEX = "model.safetensors.index.json"
FAMILY = FAMILIES["z_image"]


def drawn(layout: Qwen3Layout = SMALL) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in layout.tensors().items()}


def as_published(name: str) -> str:
    """A distilled name as files of the language model have it."""
    return name.replace("encoder.", "model.", 1)


# --- files ---


@pytest.mark.parametrize("layout", [SMALL, dataclasses.replace(FULL, hidden_bias=True, output_bias=True, num_kv_heads=2)])
def test_every_size_is_read_off_the_tensors(layout: Qwen3Layout):
    assert read_layout(layout.tensors(), "file") == layout
    assert kind_of(list(layout.tensors())) is QWEN3


def test_published_sizes_have_the_number_of_weights_that_is_published():
    # Without their heads: huggingface.co/Qwen, "number of parameters".
    billions = {size: Qwen3Layout.named(size).parameters / 1e9 for size in ("0.6b", "1.7b", "4b", "8b")}
    assert billions == pytest.approx({"0.6b": 0.596, "1.7b": 1.721, "4b": 4.022, "8b": 7.568}, abs=1e-3)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        as_published,
        lambda name: name.removeprefix("encoder."),
        lambda name: f"module.{name}",
        lambda name: f"text_encoders.qwen3base.transformer.{name}",
        lambda name: f"qwen3base.transformer.{name}",
    ],
    ids=["distilled", "published", "bare", "DistributedDataParallel", "checkpoint", "CLIPSave"],
)
def test_a_file_is_read_under_every_name(rename: Callable[[str], str]):
    assert QWEN3.published_names(map(rename, SMALL.tensors())) == ({name: rename(name) for name in SMALL.tensors()}, None)


def test_the_head_of_a_language_model_is_left_out():
    assert QWEN3.published_names(["lm_head.weight", "model.norm.weight"])[0] == {"encoder.norm.weight": "model.norm.weight"}


def test_what_is_written_opens_as_a_student_of_the_family(tmp_path: Path):
    layout = dataclasses.replace(FULL, projected_width=FAMILY.text_width)
    path = write_student(tmp_path / "a.safetensors", drawn(layout), StudentMetadata("z_image", 1, pooled="zero"))
    student = open_student(path)
    assert student.layout == layout and student.metadata.family == "z_image"
    assert student.metadata.title == "Distilled Qwen3 of width 16, 2 layers for Z-Image"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shapes: shapes | {"encoder.norm.weight": (3,)}, "1 misshapen"),
        (lambda shapes: {name: shape for name, shape in shapes.items() if "1.mlp.up_proj" not in name}, "1 tensors missing"),
        (lambda shapes: shapes | {"encoder.layers.7.mlp.up_proj.weight": (24, 16)}, "1 unexpected"),
        (lambda shapes: shapes | {"encoder.layers.0.self_attn.q_proj.weight": (200, 16)}, "not a multiple of its 128 channels of a head"),
    ],
    ids=["misshapen", "missing", "beyond a gap", "head width"],
)
def test_a_file_that_is_not_complete_is_refused(change: Callable[[dict], dict], message: str):
    with pytest.raises(StudentFileError, match=f"{message}[\\s\\S]*What to do: download or export"):
        read_layout(change(SMALL.tensors()), "a.safetensors")


def plain(size: str) -> dict[str, tuple[int, ...]]:
    return {as_published(name): shape for name, shape in Qwen3Layout.named(size).tensors().items()}


def test_the_large_encoder_is_known_and_a_small_plain_one_refused():
    for size in ("4b", "8b"):
        with pytest.raises(
            UndistilledError,
            match=f"is a plain Qwen3-{size.upper()}.*\nWhat to do: load it with ComfyUI's own Load CLIP; Trim",
        ):
            student_header(plain(size), {}, "a.safetensors")
    check_large_tensors(plain("4b"), "a.safetensors", FAMILY)
    with pytest.raises(StudentFileError, match=r"FLUX.2 klein 9B; expected a Qwen3-4B.*\n.* set diffusion_model.family to flux2_"):
        check_large_tensors(plain("8b"), "a.safetensors", FAMILY)
    with pytest.raises(StudentFileError, match=r"is a Qwen3 of width 1024 without a projection") as caught:
        student_header(plain("0.6b"), {}, "a.safetensors")
    assert not isinstance(caught.value, UndistilledError)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model.visual.merger.linear_fc2.weight": (8, 8)}, "it is a Qwen3-VL.*\nWhat to do: .*image input stays with the large encoder"),
        ({"model.layers.0.pre_feedforward_layernorm.weight": (8,)}, "is a Gemma 3, not a distilled Qwen3"),
        ({"model.layers.0.mlp.up_proj.lora_A.weight": (8,)}, "is a LoRA, not a distilled Qwen3"),
    ],
    ids=["Qwen3-VL", "Gemma 3", "LoRA"],
)
def test_relatives_are_refused_by_name(more: dict, message: str):
    with pytest.raises(StudentFileError, match=message):
        student_header(plain("0.6b") | more, {}, "a.safetensors")


def test_a_student_of_another_kind_than_the_familys_is_refused():
    layout = KINDS["t5"].stand_in(4096)
    described = {"distilled_t5.format_version": "1", "distilled_t5.family": "z_image"}
    with pytest.raises(StudentFileError, match="expected a family that a T5 of width 64, 2 layers can serve"):
        student_header(layout.tensors(), described, "a.safetensors")


# --- tokens ---


def test_what_is_cut_keeps_the_end_of_the_template():
    assert QWEN3.fit([5, 6, 7, 8, END, 9], 4, [END, 9]) == [5, 6, END, 9]
    assert QWEN3.fit([5, 6, 7], 5, [END, 9]) == [5, 6, 7, PAD, PAD]
    assert QWEN3.fit([5, 6, 7, END, 9], 1, [END, 9]) == [9], "shorter than the template"
    assert KINDS["t5"].fit([5, 6, 7], 2) == [5, 1]


# --- the start ---


def saved(folder: Path, model_class: Any = Qwen3ForCausalLM, size: str = "4KB") -> Any:
    """A random Qwen3 that transformers saved into the folder; returns the model."""
    torch.manual_seed(1)
    model = model_class(transformers_config(SMALL)).eval()
    model.save_pretrained(folder, max_shard_size=size)
    return model


@pytest.mark.parametrize("size", ["4KB", "5GB"], ids=["shards", "one file"])
@pytest.mark.parametrize("model_class", [Qwen3ForCausalLM, Qwen3Model])
def test_a_student_starts_as_the_published_folder_to_the_bit(tmp_path: Path, model_class: Any, size: str):
    model = saved(tmp_path, model_class, size)
    model = getattr(model, "model", model)
    assert (tmp_path / INDEX).exists() == (size == "4KB")
    student = cast(DistilledQwen3, make_student(SMALL, str(tmp_path), 0.0, seed=0))
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in student.encoder.state_dict().items())
    fresh = cast(DistilledQwen3, make_student(SMALL, "random", 0.0, seed=0))
    assert torch.equal(student.tensors()["final_projection.0.weight"], fresh.tensors()["final_projection.0.weight"])
    one = next(tmp_path.glob("*.safetensors"))
    if size == "5GB":
        again = make_student(SMALL, str(one), 0.0, seed=0)
        assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in student.tensors().items())


def test_an_older_config_with_its_rotary_settings_at_the_top_is_read(tmp_path: Path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rotary = config.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": rotary["rope_theta"], "rope_scaling": None}))
    make_student(SMALL, str(tmp_path), 0.0, seed=0)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 5e6}))
    with pytest.raises(
        ValueError, match=r"rope_theta: expected 1000000.0, got 5000000.0(.|\n)*What to do: name the Qwen3 of the same size"
    ):
        make_student(SMALL, str(tmp_path), 0.0, seed=0)


def without_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "layout", "message"),
    [
        (without_a_tensor, SMALL, "does not fit the recipe's student"),
        (lambda folder: (folder / "config.json").unlink(), dataclasses.replace(SMALL, hidden_size=32), "is a Qwen3 of width 16"),
        (lambda _: None, dataclasses.replace(SMALL, num_layers=3), "num_hidden_layers: expected 3, got 2"),
    ],
    ids=["incomplete", "another width", "another depth"],
)
def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, spoil: Callable[[Path], None], layout: Qwen3Layout, message: str):
    saved(tmp_path, size="5GB")
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"{message}(.|\n)*What to do: "):
        make_student(layout, str(tmp_path), 0.0, seed=0)


# --- training ---


def test_a_prompt_is_encoded_alike_in_a_batch_of_any_length_and_by_transformers_own_masks():
    torch.manual_seed(0)
    student = DistilledQwen3(FULL).eval()
    ids_BL = torch.tensor([[5, 17, 39, END, PAD, PAD], [5, 6, 7, 8, 9, END]])
    with torch.no_grad():
        together = student(ids_BL)
        torch.testing.assert_close(together[:1, :4], student(ids_BL[:1, :4]), rtol=0, atol=1e-6)
        hidden = student.encoder(input_ids=ids_BL, attention_mask=(ids_BL != PAD).long(), use_cache=False).last_hidden_state
        torch.testing.assert_close(together, student.final_projection(hidden), rtol=0, atol=1e-6)


def test_a_frozen_trunk_keeps_its_weights_while_the_projection_learns():
    torch.manual_seed(0)
    student = DistilledQwen3(SMALL)
    student.freeze_trunk()
    before = {name: tensor.clone() for name, tensor in student.tensors().items()}
    for muon in (0.0, 1e-2):
        optimizer = make_optimizer(student, 1e-2, (0.9, 0.999), 0.01, muon)
        student(torch.tensor([[1, 2, 3]])).square().sum().backward()
        optimizer.step()
    changed = {name for name, tensor in student.tensors().items() if not torch.equal(tensor, before[name])}
    assert changed == {"final_projection.0.weight", "final_projection.3.weight"}
