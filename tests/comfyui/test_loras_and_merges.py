"""LoRAs, hooks, textual inversions and merges reach CLIP-L and the student, and only what is theirs."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy_extras.nodes_hooks import CreateHookKeyframe, SetClipHooks, SetHookKeyframes
from comfy_extras.nodes_model_merging import CLIPAdd, CLIPMergeSimple, CLIPSave, CLIPSubtract
from distilled_t5.encoder.files import open_student
from distilled_t5.encoder.lora_log import FoldLoraLines
from distilled_t5.encoder.metadata import CHANGED_KEY, StudentMetadata
from distilled_t5.encoder.prompt_length import describe_length, own_tokens
from distilled_t5.encoder.served import student_tensors
from distilled_t5.evaluate.attention import word_positions
from distilled_t5.families.flux_tensors import FluxLayout
from distilled_t5.nodes import DistilledT5CrossAttentionMap, DistilledT5EncoderMap, DistilledT5Save, DistilledT5TextEncode
from distilled_t5.runtime.random_weights import drawn
from distilled_t5.students.t5 import T5
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.small_encoders import (
    PROMPT,
    TINY,
    embedding,
    encode,
    pooled,
    random_tensors,
    serve,
    stock_flux_clip,
    student_file,
)
from distilled_t5.tests.support.small_models import SMALL_MODELS
from safetensors.torch import load_file, save_file

# T5-Base's width, which is CLIP-L's too.
WIDE = StudentLayout(d_model=768, d_ff=64, num_layers=1, num_heads=2, hidden_width=64, projected_width=4096)


@pytest.fixture(scope="module")
def text_encoders(stand_ins: Path) -> Path:
    return stand_ins / "models" / "text_encoders"


@pytest.fixture(scope="module")
def lora(stand_ins: Path) -> dict[str, torch.Tensor]:
    files = sorted((stand_ins / "models" / "loras").glob("*.safetensors"))
    return comfy.utils.load_torch_file(str(files[0]), safe_load=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("students")


@pytest.fixture(scope="module")
def clip(folder: Path, text_encoders: Path) -> Any:
    return serve(student_file(folder), text_encoders / "clip_l.safetensors").clip


def t5xxl_keys(lora: dict[str, torch.Tensor]) -> list[str]:
    return [key for key in lora if "encoder_block" in key]


def test_a_lora_reaches_clip_l_and_not_the_student_with_one_clear_line(clip, lora, caplog):
    assert len(t5xxl_keys(lora)) >= 200
    before_text, before_pooled = embedding(clip), pooled(clip)
    with caplog.at_level(logging.WARNING):
        _, with_lora = comfy.sd.load_lora_for_models(None, clip, lora, 1.0, 1.0)
    assert not torch.equal(pooled(with_lora), before_pooled)
    assert torch.equal(embedding(with_lora), before_text)
    about_t5 = [line for line in caplog.messages if "T5-XXL" in line or "encoder_block" in line]
    assert about_t5 == [FoldLoraLines(T5, "T5-XXL").notice]


def test_keys_of_a_lora_that_are_not_t5xxl_are_still_reported(clip, caplog):
    stray = {"lora_unet_no_such_layer.lora_up.weight": torch.zeros(2, 1), "lora_te1_no_such_layer.lora_up.weight": torch.zeros(2, 1)}
    with caplog.at_level(logging.WARNING):
        comfy.sd.load_lora_for_models(None, clip, stray, 1.0, 1.0)
    assert sorted(caplog.messages) == sorted(f"lora key not loaded: {key}" for key in stray)


def test_a_second_lora_gets_a_line_of_its_own(clip, lora, caplog):
    with caplog.at_level(logging.WARNING):
        comfy.sd.load_lora_for_models(None, clip, lora, 1.0, 1.0)
        comfy.sd.load_lora_for_models(None, clip, lora, 1.0, 0.5)
    assert len([line for line in caplog.messages if "T5-XXL" in line]) == 2


def test_a_second_lora_with_other_keys_gets_a_line_of_its_own_within_milliseconds(clip, caplog):
    keys = ["lora_te2_shared.alpha", "te2.shared.alpha", "t5.shared.alpha", "lycoris_te2_shared.alpha"]
    with caplog.at_level(logging.WARNING):
        for key in [*keys, "base_model.model.text_encoder_2.shared.alpha"]:
            comfy.sd.load_lora_for_models(None, clip, {key: torch.tensor(1.0), f"{key}.x": torch.tensor(1.0)}, 1.0, 1.0)
    assert caplog.messages == [FoldLoraLines(T5, "T5-XXL").notice] * 5


def test_taking_the_lora_off_again_gives_the_first_embedding_bit_for_bit(clip, lora):
    before = pooled(clip)
    _, with_lora = comfy.sd.load_lora_for_models(None, clip, lora, 1.0, 1.0)
    changed = pooled(with_lora)
    assert torch.equal(pooled(clip), before)
    assert torch.equal(pooled(with_lora), changed)


def test_hooks_with_a_clip_schedule_change_clip_l_over_the_steps(clip, lora):
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=0.0, strength_clip=1.0)
    keyframes = CreateHookKeyframe().create_hook_keyframe(strength_mult=0.0, start_percent=0.0)[0]
    keyframes = CreateHookKeyframe().create_hook_keyframe(strength_mult=1.0, start_percent=0.5, prev_hook_kf=keyframes)[0]
    hooks = SetHookKeyframes().set_hook_keyframes(hooks, keyframes)[0]
    scheduled = SetClipHooks().apply_hooks(clip, schedule_clip=True, apply_to_conds=True, hooks=hooks)[0]
    parts = encode(scheduled)
    assert [(extras["clip_start_percent"], extras["clip_end_percent"]) for _, extras in parts] == [(0.0, 0.5), (0.5, 1.0)]
    assert torch.equal(parts[0][1]["pooled_output"], pooled(clip))
    assert not torch.equal(parts[1][1]["pooled_output"], parts[0][1]["pooled_output"])
    assert torch.equal(parts[0][0], parts[1][0])


def test_a_textual_inversion_for_clip_l_stays_out_of_a_student_of_the_same_width(folder, text_encoders, tmp_path):
    save_file({"clip_l": torch.randn(2, 768)}, tmp_path / "style.safetensors")
    path = student_file(folder, WIDE, "wide.safetensors")
    clip = serve(path, text_encoders / "clip_l.safetensors", embedding_folders=(str(tmp_path),)).clip
    with_inversion, without = "a cat in embedding:style oil", "a cat in oil"
    assert not torch.equal(pooled(clip, with_inversion), pooled(clip, without))
    assert torch.equal(embedding(clip, with_inversion), embedding(clip, without))


@pytest.mark.parametrize("kind", ["student", "stock"])
def test_map_and_count_see_the_tokens_that_the_encoder_sees(kind, folder, text_encoders, tmp_path):
    save_file({"clip_l": torch.randn(2, 768)}, tmp_path / "style.safetensors")
    save_file({"t5xxl": torch.randn(3, 4096)}, tmp_path / "t5_style.safetensors")
    if kind == "student":
        clip = serve(student_file(folder, WIDE, "wide.safetensors"), embedding_folders=(str(tmp_path),)).clip
    else:
        clip = stock_flux_clip(text_encoders / "clip_l.safetensors")
        clip.tokenizer.t5xxl.embedding_directory = [str(tmp_path)]
    without, with_inversion, with_t5s = (f"a cat in {part}oil" for part in ("", "embedding:style ", "embedding:t5_style "))
    seen = 3 if kind == "stock" else 0
    for prompt, shift in ((with_inversion, 0), (with_t5s, seen)):
        assert word_positions(clip, prompt, "oil") == [place + shift for place in word_positions(clip, without, "oil")]
        count = int(describe_length(clip, clip.tokenize(without)).split()[0])
        assert describe_length(clip, clip.tokenize(prompt)).split()[0] == str(count + shift)
        own = own_tokens(clip, clip.tokenize(prompt))
        assert own == sorted(own, reverse=True), "padding is at the end, where the encoder has it"


def test_merging_two_students_averages_their_weights(clip, folder, text_encoders):
    other = serve(student_file(folder, name="other.safetensors", seed=1), text_encoders / "clip_l.safetensors").clip
    merged = CLIPMergeSimple().merge(clip, other, 0.25)[0]
    first, second = random_tensors(TINY, 0), random_tensors(TINY, 1)
    weights = student_tensors(merged)
    for name in TINY.tensors():
        torch.testing.assert_close(weights[name], 0.75 * second[name] + 0.25 * first[name], atol=1e-5, rtol=1e-5)


def test_a_merge_is_saved_completely_when_comfyui_has_not_patched_the_weights_in_place(clip, folder, text_encoders, monkeypatch):
    """With dynamic VRAM, or memory for a part only, weights stay as they are and are patched on their way out."""
    other = serve(student_file(folder, name="other.safetensors", seed=1), text_encoders / "clip_l.safetensors").clip
    merged = CLIPMergeSimple().merge(clip, other, 0.25)[0]
    merged.patcher.detach()
    if hasattr(merged, "state_dict_for_saving"):  # ComfyUI before 0.24 always patches in place
        monkeypatch.setattr(merged, "load_model", lambda *_: merged.patcher)
    weights = student_tensors(merged)
    first, second = random_tensors(TINY, 0), random_tensors(TINY, 1)
    for name in TINY.tensors():
        assert type(weights[name]) is torch.Tensor
        torch.testing.assert_close(weights[name], 0.75 * second[name] + 0.25 * first[name], atol=1e-5, rtol=1e-5)


OF_A_RUN = {
    "distilled_t5.teacher": "t5xxl.safetensors",
    "distilled_t5.diffusion_model": "flux1-dev.safetensors",
    "distilled_t5.recipe_sha256": "12" * 32,
    "distilled_t5.steps": "70000",
    "modelspec.author": "somebody",
    "modelspec.license": "FLUX.1-dev Non-Commercial",
}


@pytest.fixture
def trained(folder: Path, text_encoders: Path) -> Any:
    """The CLIP of a file whose metadata tells of the run that made it."""
    path = student_file(folder, name="trained.safetensors", title="My run", token_length=77, facts=OF_A_RUN)
    return serve(path, text_encoders / "clip_l.safetensors").clip


def saved_metadata(clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudentMetadata:
    """What the file says that Distilled T5 Save makes of a CLIP."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], folder_paths.supported_pt_extensions))
    return open_student(tmp_path / DistilledT5Save.execute(clip, "saved", "bf16").args[0]).metadata


def test_a_student_saved_in_another_format_or_with_a_lora_for_clip_l_is_still_that_of_its_run(trained, lora, tmp_path, monkeypatch):
    _, with_lora = comfy.sd.load_lora_for_models(None, trained, lora, 1.0, 1.0)
    for clip in (trained, with_lora):
        metadata = saved_metadata(clip, tmp_path, monkeypatch)
        assert (metadata.title, metadata.facts) == ("My run", OF_A_RUN)


def lora_for_students() -> dict[str, torch.Tensor]:
    name = "text_encoders.t5base.transformer.final_projection.0"
    return {f"{name}.lora_up.weight": torch.ones(TINY.hidden_width or 0, 2), f"{name}.lora_down.weight": torch.ones(2, TINY.d_model)}


@pytest.mark.parametrize("change", ["merge", "lora"])
def test_a_student_whose_weights_were_changed_does_not_claim_to_be_that_of_the_run(trained, clip, change, tmp_path, monkeypatch):
    if change == "merge":
        changed = CLIPMergeSimple().merge(trained, clip, 0.5)[0]
    else:
        _, changed = comfy.sd.load_lora_for_models(None, trained, lora_for_students(), 1.0, 1.0)
    metadata = saved_metadata(changed, tmp_path, monkeypatch)
    assert metadata.title != "My run"
    kept = {"distilled_t5.diffusion_model": "flux1-dev.safetensors"}
    told = "merged or patched after training; licence of the first file: FLUX.1-dev Non-Commercial"
    assert metadata.facts == {**kept, CHANGED_KEY: told}
    # What serving needs stays, and the CLIP it came from is still that of the run.
    assert metadata.token_length == 77
    assert saved_metadata(trained, tmp_path, monkeypatch).facts == OF_A_RUN


def test_subtracting_and_adding_again_gives_the_first_student(clip, folder, text_encoders):
    other = serve(student_file(folder, name="other.safetensors", seed=1), text_encoders / "clip_l.safetensors").clip
    difference = CLIPSubtract().merge(clip, other, 1.0)[0]
    back = CLIPAdd().merge(difference, other)[0]
    torch.testing.assert_close(embedding(back), embedding(clip), atol=1e-3, rtol=1e-3)


def test_what_CLIPSave_writes_loads_again_with_the_same_numbers(clip, text_encoders, tmp_path, monkeypatch):
    saver = CLIPSave()
    monkeypatch.setattr(saver, "output_dir", str(tmp_path))
    saver.save(clip, "saved")
    written = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert written == ["saved_clip_l_00001_.safetensors", "saved_t5base_00001_.safetensors"]
    student = open_student(tmp_path / written[1])
    assert student.layout == TINY
    again = serve(tmp_path / written[1], tmp_path / written[0]).clip
    assert torch.equal(embedding(again, PROMPT), embedding(clip, PROMPT))
    assert torch.equal(pooled(again, PROMPT), pooled(clip, PROMPT))
    original = random_tensors(TINY)
    assert all(torch.equal(tensor, original[name]) for name, tensor in student.load().items())
    assert "shared.weight" in load_file(tmp_path / written[1])


@pytest.fixture(scope="module")
def checkpoint(clip: Any, folder: Path) -> Path:
    """What CheckpointSave writes of a Flux and a CLIP with a student."""
    save_file(drawn(FluxLayout(width=256, double=1, single=1).tensors(), seed=2), folder / "flux.safetensors")
    model = comfy.sd.load_diffusion_model(str(folder / "flux.safetensors"))
    comfy.sd.save_checkpoint(str(folder / "all_in_one.safetensors"), model, clip)
    return folder / "all_in_one.safetensors"


def test_the_encoder_inside_a_checkpoint_that_CheckpointSave_wrote_loads_again(clip, checkpoint, text_encoders):
    assert any(name.startswith("model.diffusion_model.") for name in load_file(checkpoint))
    again = serve(checkpoint, text_encoders / "clip_l.safetensors").clip
    assert torch.equal(embedding(again, PROMPT), embedding(clip, PROMPT))
    assert torch.equal(pooled(again, PROMPT), pooled(clip, PROMPT))


@pytest.mark.parametrize("part", ["text embedding", "pooled vector"])
def test_text_encode_refuses_embeddings_that_are_not_finite(clip, part, monkeypatch):
    def broken(tokens: Any) -> Any:
        text, pooled_1P = encode(tokens)
        (text if part == "text embedding" else pooled_1P)[..., 0] = float("nan")
        return text, pooled_1P

    encode = clip.cond_stage_model.encode_token_weights
    monkeypatch.setattr(clip.cond_stage_model, "encode_token_weights", broken)
    nodes_and_inputs = [
        (DistilledT5TextEncode, (clip, PROMPT, 3.5)),
        (DistilledT5CrossAttentionMap, (SMALL_MODELS["flux"].patcher(), clip, PROMPT, "cube", 3.5)),
        (DistilledT5EncoderMap, (clip, "\n".join("abcde"), 0)),
    ]
    for node, inputs in nodes_and_inputs:
        with pytest.raises(
            ValueError, match=rf"The {part} of this prompt holds NaN or infinity[\s\S]*What to do: .*Distilled Text Encoder Loader"
        ):
            node.execute(*inputs)


def test_the_filter_of_log_lines_does_not_keep_a_student_alive(folder):
    text_model = weakref.ref(serve(student_file(folder)).clip.cond_stage_model)
    assert sum(isinstance(each, FoldLoraLines) for each in logging.getLogger().filters) == 1
    gc.collect()
    assert text_model() is None
