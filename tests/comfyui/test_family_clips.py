"""For every family besides Flux, whose tests are in test_ordinary_clip.py and test_loras_and_merges.py: the CLIP is an ordinary one."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.hooks
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.sd1_clip import gen_empty_tokens
from comfy_extras.nodes_cond import T5TokenizerOptions
from comfy_extras.nodes_hooks import CreateHookKeyframe, SetClipHooks, SetHookKeyframes
from comfy_extras.nodes_model_merging import CLIPMergeSimple, CLIPSave
from distilled_t5.encoder.files import open_student
from distilled_t5.encoder.lora_log import FoldLoraLines
from distilled_t5.encoder.served import student_tensors
from distilled_t5.families import FAMILIES
from distilled_t5.nodes import DistilledT5Save
from distilled_t5.nodes.loaded_files import text_encoder_files
from distilled_t5.tests.support.small_encoders import (
    PROMPT,
    alike,
    embedding,
    encode,
    pooled,
    random_tensors,
    serve,
    stock_clip,
    student_file,
    tiny,
)

from nodes import CLIPSetLastLayer

# Names in LoRAs for the encoders that students replace.
LORA_KEYS = {
    "t5": ["lora_te3_encoder_block_{}_layer_0_SelfAttention_q"],
    "qwen3": ["lora_te_layers_{}_self_attn_q_proj", "text_encoders.qwen3_4b.transformer.model.layers.{}.mlp.up_proj"],
}
# Family, and whether CLIP-L is given. Marked `full`: those that have another one's tokenizer and text model, or fewer files.
CASES = [
    pytest.param(("sd3", True), id="sd3 with CLIP-L"),
    pytest.param(("sd3", False), id="sd3", marks=pytest.mark.full),
    pytest.param(("pixart_alpha", False), id="pixart_alpha"),
    pytest.param(("pixart_sigma", False), id="pixart_sigma", marks=pytest.mark.full),
    pytest.param(("chroma", False), id="chroma"),
    pytest.param(("z_image", False), id="z_image"),
    pytest.param(("flux2_klein_4b", False), id="flux2_klein_4b", marks=pytest.mark.full),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("students")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, folder: Path, stand_ins: Path) -> SimpleNamespace:
    """A family, a student of it and its CLIP, another one's CLIP, and ComfyUI's own CLIP of the family."""
    name, with_clip_l = request.param
    family, clip_l = FAMILIES[name], stand_ins / "models" / "text_encoders" / "clip_l.safetensors" if with_clip_l else None
    facts = {"family": name, "token_length": family.token_length, "pooled": "clip_l" if with_clip_l else "zero"}
    layout = tiny(family)
    files = [student_file(folder, layout, f"{name}-{with_clip_l}-{seed}.safetensors", seed, **facts) for seed in (0, 1)]
    clip, other = (serve(file, clip_l, family=name).clip for file in files)
    stock = stock_clip(family, *(["clip_l"] if with_clip_l else []))
    return SimpleNamespace(family=family, layout=layout, clip_l=clip_l, clip=clip, other=other, stock=stock)


def rows_of_student(case: SimpleNamespace, text: str, changed: Any = None) -> torch.Tensor:
    """The last rows of the text, which are the student's, in the CLIP or a changed copy of it."""
    return embedding(changed or case.clip, text)[:, -len(case.clip.tokenize(text)[case.family.part][0]) :]


@pytest.mark.parametrize("text", ["", PROMPT, "a (red:1.3) cube", "word " * 300], ids=["empty", "usual", "weighted", "long"])
def test_the_conditioning_has_the_form_of_stock(case: SimpleNamespace, text: str):
    assert case.clip.tokenize(text) == case.stock.tokenize(text)
    alike(encode(case.clip, text), encode(case.stock, text))
    assert torch.isfinite(embedding(case.clip, text)).all()


def test_nodes_that_set_padding_and_layer_change_it_as_they_change_stock(case: SimpleNamespace):
    for settings in ({"min_padding": 0, "min_length": 100}, {"min_padding": 60, "min_length": 0}):  # of T5 alone
        ours, theirs = (T5TokenizerOptions.execute(clip, **settings).args[0] for clip in (case.clip, case.stock))
        assert embedding(ours).shape == embedding(theirs).shape
    # A layer below the one that ComfyUI's text model of the family takes.
    stock = getattr(case.stock.cond_stage_model, case.family.part)
    usual = stock.layer_idx
    if isinstance(stock.layer, list):  # three layers, whatever is set
        assert torch.equal(embedding(CLIPSetLastLayer().set_last_layer(case.clip, -2)[0]), embedding(case.clip))
        return
    if usual is not None:
        assert torch.equal(embedding(CLIPSetLastLayer().set_last_layer(case.clip, usual)[0]), embedding(case.clip))
    lower = CLIPSetLastLayer().set_last_layer(case.clip, (usual or -1) - 1)[0]
    assert embedding(lower).shape == embedding(case.clip).shape and not torch.equal(embedding(lower), embedding(case.clip))


def test_weighted_words_are_pushed_away_from_the_empty_prompt_as_in_stock(case: SimpleNamespace):
    text = "a (cat:1.3) and a dog"
    pairs = case.clip.tokenize(text)[case.family.part][0]
    if case.family.kind.name == "qwen3":
        # ComfyUI gives language models the syntax of weights as text.
        assert {weight for _, weight in case.stock.tokenize(text)[case.family.part][0]} == {1.0}
        assert not torch.equal(embedding(case.clip, text), embedding(case.clip, "a (cat:0.3) and a dog"))
        return
    # PixArt's and Chroma's text model has an empty prompt of its own.
    stock = getattr(case.stock.cond_stage_model, case.family.part)
    nothing = getattr(stock, "gen_empty_tokens", gen_empty_tokens)(stock.special_tokens, len(pairs))
    empty = case.clip.cond_stage_model.t5base.encode([nothing])[0]
    weights = torch.tensor([weight for _, weight in pairs])[None, :, None]
    plain = rows_of_student(case, "a cat and a dog")
    assert weights.unique().tolist() == pytest.approx([1.0, 1.3])
    expected = torch.where(weights == 1.0, plain, (plain - empty) * weights + empty)
    torch.testing.assert_close(rows_of_student(case, text), expected, atol=1e-4, rtol=1e-4)


def test_a_lora_reaches_clip_l_if_there_is_one_and_not_the_student_with_one_clear_line(
    case: SimpleNamespace, caplog: pytest.LogCaptureFixture
):
    layer, kind = "lora_te1_text_model_encoder_layers_0_mlp_fc1", case.family.kind
    lora = {f"{layer}.lora_up.weight": torch.ones(3072, 1), f"{layer}.lora_down.weight": torch.ones(1, 768)}
    for block, name in ((block, name) for name in LORA_KEYS[kind.name] for block in range(24)):
        lora |= {f"{name.format(block)}.lora_up.weight": torch.ones(4096, 1), f"{name.format(block)}.lora_down.weight": torch.ones(1, 2560)}
    with caplog.at_level(logging.WARNING):
        _, with_lora = comfy.sd.load_lora_for_models(None, case.clip, lora, 1.0, 1.0)
    notices = [line for line in caplog.messages if "fc1" not in line]
    assert notices == [FoldLoraLines(kind, case.family.teacher_layout.size_name).notice]
    assert torch.equal(rows_of_student(case, PROMPT, with_lora), rows_of_student(case, PROMPT))
    if case.clip_l is not None:
        assert not torch.equal(pooled(with_lora), pooled(case.clip))


def test_a_hook_changes_the_student_from_the_step_that_it_is_scheduled_for(case: SimpleNamespace):
    name = f"text_encoders.{case.family.kind.module}.transformer.final_projection.0"
    rows, columns = case.layout.tensors()["final_projection.0.weight"]
    lora = {f"{name}.lora_up.weight": torch.ones(rows, 2), f"{name}.lora_down.weight": torch.ones(2, columns)}
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=0.0, strength_clip=1.0)
    keyframes = CreateHookKeyframe().create_hook_keyframe(strength_mult=0.0, start_percent=0.0)[0]
    keyframes = CreateHookKeyframe().create_hook_keyframe(strength_mult=1.0, start_percent=0.5, prev_hook_kf=keyframes)[0]
    hooks = SetHookKeyframes().set_hook_keyframes(hooks, keyframes)[0]
    [(first, _), (second, extras)] = encode(SetClipHooks().apply_hooks(case.clip, True, True, hooks)[0])
    assert torch.equal(first, embedding(case.clip)) and not torch.equal(second, first)
    assert (extras["clip_start_percent"], extras["clip_end_percent"]) == (0.5, 1.0)


def test_merging_two_students_averages_their_weights(case: SimpleNamespace):
    weights = student_tensors(CLIPMergeSimple().merge(case.clip, case.other, 0.25)[0])
    first, second = random_tensors(case.layout, 0), random_tensors(case.layout, 1)
    for name in case.layout.tensors():
        torch.testing.assert_close(weights[name], 0.75 * second[name] + 0.25 * first[name], atol=1e-5, rtol=1e-5)


def test_what_both_save_nodes_write_loads_again_with_the_same_numbers(
    case: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saver = CLIPSave()
    monkeypatch.setattr(saver, "output_dir", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], folder_paths.supported_pt_extensions))
    ours = tmp_path / DistilledT5Save.execute(case.clip, "ours", "fp32").args[0]
    assert open_student(ours).metadata.family == case.family.name
    assert torch.equal(embedding(serve(ours, case.clip_l, family=case.family.name).clip), embedding(case.clip))
    saver.save(case.clip, "saved")
    written = {path.name.split("_00001_")[0] for path in tmp_path.glob("saved*.safetensors")}
    # CLIPSave knows T5-Base among its names, and no Qwen3.
    student = "saved_t5base" if case.family.kind.module == "t5base" else "saved"
    assert written == ({student, "saved_clip_l"} if case.clip_l else {student})
    if student == "saved":  # without metadata, a Qwen3 is that of the family whose text is as wide
        reloaded = serve(tmp_path / "saved_00001_.safetensors", family=case.family.name).clip
        assert torch.equal(embedding(reloaded), embedding(case.clip))
    original = random_tensors(case.layout)
    assert all(
        torch.equal(tensor, original[name]) for name, tensor in open_student(tmp_path / f"{student}_00001_.safetensors").load().items()
    )


def test_a_student_serves_another_family_if_its_file_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = student_file(folder, name="two.safetensors", family="pixart_sigma", token_length=1, pooled="zero", also_serves=("chroma",))
    as_sigma, as_chroma = (serve(file, family=name).clip for name in ("pixart_sigma", "chroma"))
    assert torch.equal(embedding(as_chroma), embedding(as_sigma))
    make, arguments = as_chroma.patcher.cached_patcher_init
    assert make(*arguments).model.metadata.families == ("chroma", "pixart_sigma")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], folder_paths.supported_pt_extensions))
    saved = open_student(tmp_path / DistilledT5Save.execute(as_chroma, "saved", "fp32").args[0]).metadata
    assert (saved.family, saved.also_serves) == ("chroma", ("pixart_sigma",))
    with pytest.raises(ValueError, match=r"distilled for PixArt-Sigma and Chroma; the type is pixart_alpha\.\nWhat to do: set type to"):
        serve(file, family="pixart_alpha")


def test_distil_text_encoder_finds_the_companions_of_the_connected_clip(folder: Path, stand_ins: Path):
    file = student_file(folder, name="teacher.safetensors", family="sd3", token_length=77, pooled="clip_l")
    clip_l = stand_ins / "models" / "text_encoders" / "clip_l.safetensors"
    for given, companions in ((clip_l, {"clip_l": str(clip_l)}), (None, {})):
        clip = serve(file, given, family="sd3", dtype=None).clip
        assert text_encoder_files(clip, FAMILIES["sd3"]) == (str(file), companions)
