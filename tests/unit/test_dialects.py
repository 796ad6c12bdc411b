"""The names under which files hold the tensors of a distilled T5."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distilled_t5.encoder.dialects import TOKEN_TABLE_TWIN, published_names, split_twin
from distilled_t5.encoder.files import open_student
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.students.t5.layout import SHARED
from distilled_t5.tests.support.tiny_students import TINY, published_file, tiny_tensors
from torch import Tensor, nn

NAMES = tuple(TINY.tensors())
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


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".ckpt"])
def test_torch_files_in_every_dialect_give_the_same_tensors(dialect, ending, tmp_path):
    path = tmp_path / f"file{ending}"
    torch.save(OrderedDict(dialect(tiny_tensors())), path)
    student = open_student(path)
    assert student.layout == TINY
    assert same(student.load(), tiny_tensors())


def test_torch_file_may_tie_the_token_table_to_its_twin_and_hold_parameters(tmp_path):
    tensors = {name: nn.Parameter(tensor) for name, tensor in tiny_tensors(dtype=torch.float32).items()}
    tensors[TOKEN_TABLE_TWIN] = tensors[SHARED]
    torch.save(tensors, tmp_path / "file.pth")
    loaded = open_student(tmp_path / "file.pth").load()
    assert same(loaded, tiny_tensors(dtype=torch.float32))
    assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in loaded.values())


def test_torch_file_may_hold_the_state_dict_of_a_checkpoint(tmp_path):
    torch.save({"state_dict": tiny_tensors(), "epoch": 3}, tmp_path / "file.pth")
    assert same(open_student(tmp_path / "file.pth").load(), tiny_tensors())


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize("rename", [dict, prefixless, wrapped])
def test_token_table_whose_twin_differs_is_refused(rename, ending, tmp_path):
    tensors = with_twin(tiny_tensors())
    tensors[TOKEN_TABLE_TWIN][-1, -1] += 1
    path = tmp_path / f"file{ending}"
    save = published_file if ending == ".safetensors" else lambda target, content: torch.save(content, target)
    save(path, rename(tensors))
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
    assert published_names(["shared.weight", "spiece_model"]) == {SHARED: "shared.weight", "spiece_model": "spiece_model"}


def test_wrapper_is_taken_off_only_if_every_name_has_it(tmp_path: Path):
    tensors = tiny_tensors()
    half = {("module." + name if index % 2 else name): tensor for index, (name, tensor) in enumerate(tensors.items())}
    with pytest.raises(StudentFileError, match=r"(?s)Missing:.*What to do: "):
        open_student(published_file(tmp_path / "file.safetensors", half))


def test_two_dialects_in_one_file_are_not_merged(tmp_path: Path):
    both = tiny_tensors() | {"shared.weight": tiny_tensors(seed=1)[SHARED]}
    with pytest.raises(StudentFileError, match="What to do: "):
        open_student(published_file(tmp_path / "file.safetensors", both))


def test_split_twin_leaves_the_given_names_as_they_were():
    names = published_names([*NAMES, TOKEN_TABLE_TWIN])
    rest, twin = split_twin(names)
    assert twin == TOKEN_TABLE_TWIN
    assert set(rest) == set(NAMES)
    assert TOKEN_TABLE_TWIN in names
