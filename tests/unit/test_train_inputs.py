"""The inputs of a run by content: what changes a digest, and how a difference is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilled_t5.tests.support.tiny_students import published_file, tiny_tensors
from distilled_t5.train.batches import Schedule
from distilled_t5.train.inputs import SAMPLED_BYTES, refuse_other_inputs, weights_digest
from distilled_t5.train.recipe import load_recipe


def test_metadata_and_order_do_not_change_the_digest_of_a_model(tmp_path):
    tensors = tiny_tensors()
    first = weights_digest(published_file(tmp_path / "a.safetensors", tensors))
    other = published_file(tmp_path / "b.safetensors", dict(reversed(tensors.items())), metadata={"title": "another"})
    assert weights_digest(other) == first


@pytest.mark.parametrize("name", sorted(tiny_tensors()))
def test_one_changed_tensor_changes_the_digest_of_a_model(tmp_path, name):
    tensors = tiny_tensors()
    before = weights_digest(published_file(tmp_path / "a.safetensors", tensors))
    after = weights_digest(published_file(tmp_path / "b.safetensors", tensors | {name: tensors[name] * 1.5}))
    assert before != after


def test_a_large_tensor_is_read_in_its_middle(tmp_path):
    weight = torch.zeros(SAMPLED_BYTES, dtype=torch.float32)
    before = weights_digest(published_file(tmp_path / "a.safetensors", {"weight": weight}))
    weight[SAMPLED_BYTES // 2] = 1
    assert weights_digest(published_file(tmp_path / "b.safetensors", {"weight": weight})) != before


def digests(path: Path, text: str) -> dict[str, str]:
    path.write_text(text, encoding="utf-8")
    corpora = f'[{{ kind = "lines", path = "{path}" }}]'
    return Schedule(load_recipe("smoke", [f"stage.1.corpora={corpora}", "validation.prompts=2"])).digests


def test_an_added_or_swapped_prompt_changes_the_digest_of_its_stage_alone(tmp_path):
    lines = [f"prompt number {number}" for number in range(9)]
    before = digests(tmp_path / "a.txt", "\n".join(lines))
    for other in ([*lines, "one more"], [lines[1], lines[0], *lines[2:]], ["changed", *lines[1:]]):
        after = digests(tmp_path / "a.txt", "\n".join(other))
        assert after["prompts of stage follow-the-steps"] != before["prompts of stage follow-the-steps"]
        assert after["prompts of stage embedding-first"] == before["prompts of stage embedding-first"]
    assert digests(tmp_path / "b.txt", "\n".join(lines)) == before, "the name of the file does not matter"


def test_a_difference_is_refused_by_name_and_equal_or_unknown_inputs_are_not():
    recorded = {"teacher.t5": "5 bytes", "held-out prompts": "2 prompts"}
    refuse_other_inputs({}, recorded)
    refuse_other_inputs(recorded, recorded | {"new": "x"})
    with pytest.raises(ValueError, match=r"\n  teacher.t5: expected 5 bytes, got 6 bytes\nWhat to do: put the earlier files"):
        refuse_other_inputs(recorded, recorded | {"teacher.t5": "6 bytes"})
