"""The names under which files hold the tensors of a distilled T5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distilled_t5.encoder.files import open_student
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.students.t5.layout import SHARED
from distilled_t5.students.t5.names import TOKEN_TABLE_TWIN, published_names
from distilled_t5.tests.support.tiny_students import TINY, published_file, tiny_tensors
from torch import Tensor

Dialect = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def prefixless(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}


def wrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"module." + name: tensor for name, tensor in tensors.items()}


def with_twin(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {TOKEN_TABLE_TWIN: tensors[SHARED].clone()}


DIALECTS: dict[str, Dialect] = {
    "published": dict,
    "published with its twin": with_twin,
    "prefixless": prefixless,
    "prefixless with its twin": lambda tensors: prefixless(with_twin(tensors)),
    "module.": wrapped,
    "module. with its twin": lambda tensors: wrapped(with_twin(tensors)),
    "module. prefixless": lambda tensors: wrapped(prefixless(tensors)),
    "CheckpointSave": lambda tensors: (
        {f"text_encoders.t5base.transformer.{name}": each for name, each in prefixless(tensors).items()}
        | {
            "text_encoders.t5base.logit_scale": torch.tensor(4.6055),
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(1),
            "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.full((1,), float("nan")),
            "vae.decoder.conv_in.weight": torch.zeros(1, dtype=torch.int64),
        }
    ),
    "a CLIP's state dict": lambda tensors: {f"t5base.transformer.{name}": each for name, each in prefixless(tensors).items()},
    "CLIPSave": lambda tensors: prefixless(tensors) | {"logit_scale": torch.tensor(4.6055)},
}


def same(loaded: dict[str, Tensor], tensors: dict[str, Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return loaded.keys() == tensors.keys() and all(
        loaded[name].dtype == tensor.dtype and torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_safetensors_in_every_dialect_give_the_same_tensors_under_published_names(dialect, tmp_path):
    student = open_student(published_file(tmp_path / "file.safetensors", dialect(tiny_tensors())))
    assert student.layout == TINY
    assert same(student.load(), tiny_tensors())


@pytest.mark.parametrize("rename", [dict, prefixless, wrapped])
def test_token_table_whose_twin_differs_is_refused(rename, tmp_path):
    tensors = with_twin(tiny_tensors())
    tensors[TOKEN_TABLE_TWIN][-1, -1] += 1
    path = published_file(tmp_path / "file.safetensors", rename(tensors))
    with pytest.raises(StudentFileError, match=r"file\.\w+ holds two token tables that differ(.|\n)*What to do: "):
        open_student(path).load()


@pytest.mark.parametrize(
    "twin", [torch.zeros(40, 9, dtype=torch.bfloat16), torch.zeros(40, 8, dtype=torch.float32)], ids=["shape", "dtype"]
)
def test_twin_of_another_shape_or_dtype_is_refused_before_loading(twin, tmp_path):
    path = published_file(tmp_path / "file.safetensors", tiny_tensors() | {TOKEN_TABLE_TWIN: twin})
    with pytest.raises(StudentFileError, match="two token tables") as caught:
        open_student(path)
    assert "What to do: " in str(caught.value)


def test_names_of_no_dialect_are_kept_to_be_reported():
    names, twin = published_names(["shared.weight", "spiece_model"])
    assert (names, twin) == ({SHARED: "shared.weight", "spiece_model": "spiece_model"}, None)


def test_wrapper_is_taken_off_only_if_every_name_has_it(tmp_path: Path):
    tensors = tiny_tensors()
    half = {("module." + name if index % 2 else name): tensor for index, (name, tensor) in enumerate(tensors.items())}
    with pytest.raises(StudentFileError, match=r"(?s)Missing:.*What to do: "):
        open_student(published_file(tmp_path / "file.safetensors", half))


def test_two_dialects_in_one_file_are_not_merged(tmp_path: Path):
    both = tiny_tensors() | {"shared.weight": tiny_tensors(seed=1)[SHARED]}
    with pytest.raises(StudentFileError, match="What to do: "):
        open_student(published_file(tmp_path / "file.safetensors", both))
