"""Damaged files in a real ComfyUI: through the loader in this process, and through a server that has to stay up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled_t5.devtools.comfyui.server import ComfyServer, PromptFailed
from distilled_t5.encoder.files import write_student
from distilled_t5.encoder.metadata import StudentMetadata
from distilled_t5.encoder.served import ServingOptions, load_encoder, student_tensors
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.damage import FUZZING, damaged
from distilled_t5.tests.support.tiny_students import (
    FULL_VOCABULARY,
    digest_of_bytes,
    published_file,
    sparse_file,
    tensor_digest,
    tiny_tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

STUDENT = tiny_tensors(FULL_VOCABULARY)
MAKES = ["authors.safetensors", "ours.safetensors"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One good file of each make."""
    folder = tmp_path_factory.mktemp("originals")
    write_student(folder / "ours.safetensors", STUDENT, StudentMetadata(token_length=77))
    published_file(folder / "authors.safetensors", STUDENT)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def served(path: Path) -> dict[str, torch.Tensor]:
    """What the loader puts into the graph, read back from there."""
    clip = load_encoder(str(path), {}, ServingOptions(dtype=torch.bfloat16)).clip
    return {name: tensor.detach().cpu() for name, tensor in student_tensors(clip).items()}


def served_or_message(path: Path) -> dict[str, torch.Tensor] | str:
    try:
        return served(path)
    except StudentFileError as error:
        return str(error)


@pytest.mark.parametrize("make", MAKES)
def test_good_file_is_served_bit_by_bit(originals, tmp_path, make):
    (tmp_path / make).write_bytes(originals[make])
    assert tensor_digest(served(tmp_path / make)) == tensor_digest(STUDENT)


@pytest.mark.parametrize("make", MAKES)
@settings(FUZZING, max_examples=30)
@given(data=st.data())
def test_damaged_file_is_refused_or_served_as_its_bytes_say(originals, tmp_path, make, data):
    file = data.draw(damaged(originals[make]))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(file)
    tensors = served_or_message(path)
    if isinstance(tensors, str):
        assert path.name in tensors.splitlines()[0]
        assert tensors.splitlines()[-1].startswith("What to do: ")
    elif make == "authors.safetensors" and file.count(b'"BF16"') == len(STUDENT):
        assert tensor_digest(tensors) == digest_of_bytes(file)
    elif make == "ours.safetensors":
        assert tensor_digest(tensors) == tensor_digest(STUDENT)


def t5xxl(path: Path) -> Path:
    shapes = StudentLayout.named("xxl", output_width=None).tensors()
    return sparse_file(path, {name.removeprefix("encoder."): shape for name, shape in shapes.items()}, "F16")


def not_finite(path: Path) -> Path:
    return published_file(path, {name: torch.full_like(tensor, torch.nan) for name, tensor in STUDENT.items()})


def cut_off(path: Path) -> Path:
    path.write_bytes(published_file(path, STUDENT).read_bytes()[:-500])
    return path


def incomplete(path: Path) -> Path:
    return published_file(path, {name: tensor for name, tensor in STUDENT.items() if "wo.weight" not in name})


def carries_code(path: Path) -> Path:
    path = path.with_suffix(".pth")
    torch.save(torch.nn.Linear(1, 1), path)
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "T5-XXL": (t5xxl, "load it with ComfyUI's own loader"),
    "NaN": (not_finite, "hold NaN or infinity"),
    "cut off": (cut_off, "not a complete safetensors file"),
    "incomplete": (incomplete, "  encoder.encoder.block.1.layer.1.DenseReluDense.wo.weight\n"),
    "code": (carries_code, "is a file of torch.save; expected .safetensors"),
}


def load_and_save(name: str, filename: str) -> dict[str, Any]:
    loader = {"class_type": "DistilledT5Loader", "inputs": {"clip_name1": "none", "clip_name2": name, "type": "flux"}}
    saver = {"class_type": "DistilledT5Save", "inputs": {"clip": ["1", 0], "filename": filename, "dtype": "as loaded"}}
    return {"1": loader, "2": saver}


@pytest.mark.parametrize(("make", "part"), BAD.values(), ids=BAD)
def test_message_reaches_the_user_and_the_server_stays_up(server: ComfyServer, make, part):
    folder = server.base / "models" / "text_encoders"
    bad = make(folder / "bad.safetensors")
    good = published_file(folder / "good_after_bad.safetensors", STUDENT)
    before = {path.name for path in folder.iterdir()}
    try:
        with pytest.raises(PromptFailed) as caught:
            server.run(load_and_save(bad.name, "never"))
        assert caught.value.node_id == "1"
        assert bad.name in caught.value.message.splitlines()[0]
        assert part in caught.value.message
        assert "\nWhat to do: " in caught.value.message
        assert {path.name for path in folder.iterdir()} == before
        server.run(load_and_save(good.name, "saved_after_bad"))
        assert (folder / "saved_after_bad.safetensors").is_file()
        assert server.get_json("/system_stats")["system"]["comfyui_version"]
    finally:
        for name in (bad.name, good.name, "saved_after_bad.safetensors"):
            (folder / name).unlink(missing_ok=True)
