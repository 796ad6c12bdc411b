"""Damaged files: each is refused with a message for a person, or gives exactly the tensors that its bytes say, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from distilled_t5.encoder.files import write_student
from distilled_t5.encoder.metadata import HASH_KEY, HEADER_HASH_KEY, StudentMetadata
from distilled_t5.tests.support.mutations import SAFETENSORS_MUTATIONS, ZIP_MUTATIONS, Mutation
from distilled_t5.tests.support.tiny_students import TINY, digest_of_bytes, published_file, taken_apart, tensor_digest, tiny_tensors

# Files per way of damaging them; twice that for safetensors, with and without hashes: 1,640 in all.
COUNTS = {
    "header bytes": 120,
    "header fields": 200,
    "metadata": 120,
    "tensor bytes": 80,
    "length prefix": 60,
    "cut off": 60,
    "lengthened": 30,
    "zip bytes": 200,
    "zip records": 100,
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One good file of each make."""
    folder = tmp_path_factory.mktemp("originals")
    torch.save(tiny_tensors(), folder / "authors.pth")
    write_student(folder / "ours.safetensors", tiny_tensors(), StudentMetadata(token_length=77, facts={"distilled_t5.teacher": "t5xxl"}))
    published_file(folder / "authors.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged(original: bytes, mutation: Mutation, kind: str) -> Iterator[bytes]:
    """Different files made from one, the same ones each time."""
    seen = {original}
    for seed in range(COUNTS[kind]):
        rng = Random(f"{kind} {seed}")
        made = mutation(original, rng)
        while made in seen:
            made = mutation(original, rng)
        seen.add(made)
        yield made


def ends_well(answer: dict[str, Any], path: Path) -> bool:
    """Whether the answer is a refusal, of which every word is checked; fails the test if the process broke or the message is poor."""
    assert answer["verdict"] != "broke", f"{path}: {answer['error']}"
    if answer["verdict"] == "loaded":
        return False
    first, *_, last = answer["message"].splitlines()
    assert path.name in first
    assert last.startswith("What to do: ")
    assert len(answer["message"]) < 20_000
    return True


@pytest.mark.parametrize("make", ["authors.safetensors", "ours.safetensors"])
@pytest.mark.parametrize("kind", SAFETENSORS_MUTATIONS)
def test_damaged_safetensors_is_refused_or_gives_what_its_bytes_say(worker, originals, tmp_path, make, kind):
    refused = 0
    path = tmp_path / "damaged.safetensors"
    for file in damaged(originals[make], SAFETENSORS_MUTATIONS[kind], kind):
        path.write_bytes(file)
        answer = worker.verdict(path)
        if ends_well(answer, path):
            refused += 1
            continue
        assert answer["digest"] == digest_of_bytes(file)
        metadata = taken_apart(file)[0].get("__metadata__") or {}
        if HASH_KEY in metadata and HEADER_HASH_KEY in metadata:
            assert answer["digest"] == tensor_digest(tiny_tensors()), "a hash did not see that the tensors were changed"
            assert answer["metadata"] == ["flux", 77, "clip_l", "mlp", None], "a hash did not see that the metadata was changed"
    if kind in ("cut off", "lengthened", "length prefix") or (kind, make) == ("tensor bytes", "ours.safetensors"):
        assert refused == COUNTS[kind]


def test_damaged_zip_bytes_are_refused_or_give_the_original_tensors(worker, originals, tmp_path):
    path = tmp_path / "damaged.pth"
    refused = 0
    for file in damaged(originals["authors.pth"], ZIP_MUTATIONS["zip bytes"], "zip bytes"):
        path.write_bytes(file)
        answer = worker.verdict(path)
        if ends_well(answer, path):
            refused += 1
        else:
            assert answer["digest"] == tensor_digest(tiny_tensors())
    assert refused > COUNTS["zip bytes"] // 2


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_zips_written_anew_with_other_records_never_break_the_process(worker, originals, tmp_path):
    path = tmp_path / "damaged.pth"
    answers = []
    for file in damaged(originals["authors.pth"], ZIP_MUTATIONS["zip records"], "zip records"):
        path.write_bytes(file)
        answers.append(worker.verdict(path))
        ends_well(answers[-1], path)
    assert sum(answer["verdict"] == "refused" for answer in answers) > COUNTS["zip records"] // 3


def test_undamaged_files_are_loaded(worker, originals, tmp_path):
    assert TINY.num_heads * TINY.d_kv != TINY.d_model
    for name, file in originals.items():
        (tmp_path / name).write_bytes(file)
        assert worker.verdict(tmp_path / name)["digest"] == tensor_digest(tiny_tensors())
