"""Damaged files: each is refused with a message for a person, or gives exactly the tensors that its bytes say, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from distilled_t5.encoder.files import open_student, write_student
from distilled_t5.encoder.metadata import HASH_KEY, HEADER_HASH_KEY, StudentMetadata
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.tests.support.damage import FUZZING, damaged
from distilled_t5.tests.support.tiny_students import TINY, digest_of_bytes, published_file, taken_apart, tensor_digest, tiny_tensors
from hypothesis import given
from hypothesis import strategies as st

MAKES = ["authors.safetensors", "ours.safetensors"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One good file of each make."""
    folder = tmp_path_factory.mktemp("originals")
    write_student(folder / "ours.safetensors", tiny_tensors(), StudentMetadata(token_length=77, facts={"distilled_t5.teacher": "t5xxl"}))
    published_file(folder / "authors.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_plain_refusal(message: str, path: Path) -> bool:
    first, *_, last = message.splitlines()
    return path.name in first and last.startswith("What to do: ") and len(message) < 20_000 and bool(message.encode())


@pytest.mark.parametrize("make", MAKES)
@FUZZING
@given(data=st.data())
def test_damaged_file_is_refused_or_gives_what_its_bytes_say(worker, originals, tmp_path, make, data):
    file = data.draw(damaged(originals[make]))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(file)
    answer = worker.verdict(path)
    assert answer["verdict"] != "broke", answer["error"]
    if answer["verdict"] == "refused":
        assert is_plain_refusal(answer["message"], path)
        return
    assert answer["digest"] == digest_of_bytes(file)
    metadata = taken_apart(file)[0].get("__metadata__") or {}
    if HASH_KEY in metadata and HEADER_HASH_KEY in metadata:
        assert answer["digest"] == tensor_digest(tiny_tensors()), "a hash did not see that the tensors were changed"
        assert answer["metadata"] == ["flux", 77, "clip_l", "mlp", None], "a hash did not see that the metadata was changed"


@pytest.mark.parametrize("make", MAKES)
@FUZZING
@given(data=st.data())
def test_file_of_another_length_is_refused(originals, tmp_path, make, data):
    file = originals[make]
    more = data.draw(st.binary(min_size=1, max_size=500))
    place = data.draw(st.integers(0, len(file)))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data.draw(st.sampled_from([file[:place] if place < len(file) else file[:-1], file + more])))
    with pytest.raises(StudentFileError) as caught:
        open_student(path)
    assert is_plain_refusal(str(caught.value), path)


@FUZZING
@given(data=st.data())
def test_changed_tensor_bytes_of_a_file_with_a_hash_are_refused(originals, tmp_path, data):
    file = bytearray(originals["ours.safetensors"])
    place = data.draw(st.integers(8 + int.from_bytes(file[:8], "little"), len(file) - 1))
    file[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(file)
    with pytest.raises(StudentFileError, match=r"damaged\.safetensors was changed or damaged"):
        open_student(path).load()


def test_undamaged_files_are_loaded(worker, originals, tmp_path):
    assert TINY.num_heads * TINY.d_kv != TINY.d_model
    for name, file in originals.items():
        (tmp_path / name).write_bytes(file)
        assert worker.verdict(tmp_path / name)["digest"] == tensor_digest(tiny_tensors())
