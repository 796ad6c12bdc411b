"""On the practice accelerator: encoders in ComfyUI. `test_practice_accelerator.py` runs these in a process of their own.

Checks with `budget` run with plenty of memory, and with so little that ComfyUI leaves the weights in RAM.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from comfy_extras.nodes_model_merging import CLIPMergeSimple
from distilled_t5.encoder.files import open_student
from distilled_t5.nodes import DistilledT5Loader, DistilledT5Save
from distilled_t5.tests.support import practice_accelerator as practice
from distilled_t5.tests.support.small_encoders import TINY, embedding, encode, pooled, random_tensors, serve, student_file
from torch import Tensor

CPU, OTHER_PROMPT = torch.device("cpu"), "three green pears on a table"
# ComfyUI keeps at least 0.8 GB free for inference.
LITTLE_BYTES = 1_000_000_000
# On an accelerator ComfyUI computes in the half formats where it computes in fp32 on a CPU, and adds LoRAs and merges in fp16.
HALF = {"atol": 2e-2, "rtol": 2e-2}
MERGED = {"atol": 5e-3, "rtol": 5e-3}


@pytest.fixture(params=[None, LITTLE_BYTES], ids=["much memory", "little memory"])
def budget(request: pytest.FixtureRequest) -> Iterator[int | None]:
    comfy.model_management.unload_all_models()
    practice.set_budget(request.param)
    yield request.param
    practice.set_budget(None)


@pytest.fixture(scope="module")
def clip_l(stand_ins: Path) -> Path:
    return stand_ins / "models" / "text_encoders" / "clip_l.safetensors"


@pytest.fixture(scope="module")
def lora(stand_ins: Path) -> dict[str, Tensor]:
    return comfy.utils.load_torch_file(str(min((stand_ins / "models" / "loras").glob("*.safetensors"))), safe_load=True)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student_file(tmp_path_factory.mktemp("students"), token_length=24)


@pytest.fixture(scope="module")
def clips(student: Path, clip_l: Path) -> tuple[Any, Any]:
    """The same encoder on the accelerator and on the CPU."""
    return serve(student, clip_l).clip, serve(student, clip_l, device=CPU).clip


def held_on_device(clip: Any) -> bool:
    """Whether all of its weights are on the accelerator, after it has encoded."""
    return clip.patcher.loaded_size() == clip.patcher.model_size()


def test_the_embedding_is_that_of_the_cpu_to_the_bit(clips, budget):
    ours, theirs = clips
    assert (ours.patcher.load_device.type, theirs.patcher.load_device.type) == ("npu", "cpu")
    assert torch.equal(embedding(ours), embedding(theirs))
    torch.testing.assert_close(pooled(ours), pooled(theirs), **HALF)  # CLIP-L is held in fp16
    assert held_on_device(ours) == (budget is None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_bf16_and_fp8_weights_give_the_embedding_of_the_cpu(student, dtype):
    ours, theirs = serve(student, dtype=dtype).clip, serve(student, dtype=dtype, device=CPU).clip
    found, expected = embedding(ours), embedding(theirs)
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.usefixtures("budget")
def test_a_prompt_change_and_a_change_back_give_the_first_embedding_to_the_bit(clips):
    first, second, again = (embedding(clips[0], text) for text in ("a red cube", OTHER_PROMPT, "a red cube"))
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("name", ["default", "cpu", "npu:0"])
def test_the_loader_runs_the_encoder_on_the_device_that_is_chosen(name, student, clip_l, tmp_path, monkeypatch):
    folders = [str(student.parent), str(clip_l.parent)]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", (folders, folder_paths.supported_pt_extensions))
    options = next(each for each in DistilledT5Loader.GET_SCHEMA().inputs if each.id == "device").options
    assert options == ["default", "cpu", "npu:0"]
    clip, info = DistilledT5Loader.execute(clip_l.name, student.name, "flux", device=name, dtype="fp32").args
    expected = "cpu" if name == "cpu" else "npu:0"
    assert str(clip.patcher.load_device) == expected and expected in info
    assert torch.equal(embedding(clip), embedding(serve(student, clip_l, device=CPU).clip))


@pytest.mark.usefixtures("budget")
def test_a_lora_changes_what_it_changes_on_the_cpu_and_goes_again(clips, lora):
    before = pooled(clips[0])
    ours, theirs = (comfy.sd.load_lora_for_models(None, clip, lora, 1.0, 1.0)[1] for clip in clips)
    assert not torch.equal(pooled(ours), before)
    torch.testing.assert_close(pooled(ours), pooled(theirs), **HALF)
    assert torch.equal(embedding(ours), embedding(clips[0]))
    assert torch.equal(pooled(clips[0]), before)


@pytest.mark.usefixtures("budget")
def test_a_hook_gives_each_part_of_the_sampling_its_own_encoding(clips, lora):
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=0.0, strength_clip=1.0)
    hooked = [SetClipHooks().apply_hooks(clip, schedule_clip=True, apply_to_conds=True, hooks=hooks.clone())[0] for clip in clips]
    [ours], [theirs] = (encode(clip) for clip in hooked)
    torch.testing.assert_close(ours[1]["pooled_output"], theirs[1]["pooled_output"], **HALF)
    assert not torch.equal(ours[1]["pooled_output"], pooled(clips[0]))
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.usefixtures("budget")
def test_a_merge_is_saved_with_the_mean_of_the_weights(student, tmp_path, monkeypatch):
    other = serve(student_file(student.parent, name="other.safetensors", seed=1, token_length=24)).clip
    merged = CLIPMergeSimple().merge(serve(student).clip, other, 0.25)[0]
    embedding(merged)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], folder_paths.supported_pt_extensions))
    saved = open_student(tmp_path / DistilledT5Save.execute(merged, "merged", "as loaded").args[0]).load()
    first, second = random_tensors(TINY, 0), random_tensors(TINY, 1)
    for name in TINY.tensors():
        torch.testing.assert_close(saved[name], 0.75 * second[name] + 0.25 * first[name], **MERGED)


@pytest.mark.usefixtures("budget")
def test_what_is_saved_is_what_was_loaded(clips, student, tmp_path, monkeypatch):
    embedding(clips[0])
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], folder_paths.supported_pt_extensions))
    saved = open_student(tmp_path / DistilledT5Save.execute(clips[0], "saved", "as loaded").args[0]).load()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in open_student(student).load().items())
