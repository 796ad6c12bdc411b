"""To everything downstream the encoder is an ordinary Flux CLIP: the same as stock, node by node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from comfy_extras.nodes_cond import T5TokenizerOptions
from comfy_extras.nodes_flux import CLIPTextEncodeFlux, FluxGuidance
from distilled_t5.students.t5.trained import DistilledT5
from distilled_t5.tests.support.small_encoders import (
    PROMPT,
    TINY,
    alike,
    embedding,
    encode,
    pooled,
    random_tensors,
    serve,
    stock_flux_clip,
    student_file,
)

from nodes import CLIPSetLastLayer, ConditioningAverage, ConditioningCombine, ConditioningZeroOut


@pytest.fixture(scope="module")
def clip_l(stand_ins: Path) -> Path:
    return stand_ins / "models" / "text_encoders" / "clip_l.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student_file(tmp_path_factory.mktemp("students"))


@pytest.fixture(scope="module")
def clip(tiny: Path, clip_l: Path) -> Any:
    return serve(tiny, clip_l).clip


@pytest.fixture(scope="module")
def stock(clip_l: Path) -> Any:
    return stock_flux_clip(clip_l)


@pytest.fixture(scope="module")
def reference() -> DistilledT5:
    student = DistilledT5(TINY)
    student.load_tensors(random_tensors(TINY))
    return student.eval()


def test_CLIPTextEncode_gives_the_form_of_stock_t5xxl(clip, stock):
    ours, theirs = encode(clip), encode(stock)
    alike(ours, theirs)
    [(text, extras)] = ours
    assert (text.shape, text.dtype, extras.keys()) == ((1, 256, 4096), torch.float32, {"pooled_output"})
    assert extras["pooled_output"].shape == (1, 768)
    assert not torch.equal(text, theirs[0][0]), "another encoder gives other numbers"


def test_CLIPTextEncodeFlux_gives_the_form_of_stock_t5xxl(clip, stock):
    ours, theirs = (CLIPTextEncodeFlux.execute(c, "a cat", PROMPT, 3.5).args[0] for c in (clip, stock))
    alike(ours, theirs)
    assert ours[0][1]["guidance"] == 3.5


def test_pooled_vector_is_the_very_one_of_stock(clip, stock):
    assert torch.equal(pooled(clip), pooled(stock))


def test_without_clip_l_the_pooled_vector_is_zeros_of_the_same_form(tiny, stock):
    without = serve(tiny).clip
    alike(encode(without), encode(stock))
    assert pooled(without).count_nonzero() == 0


def test_both_token_keys_are_there_with_and_without_clip_l(tiny, clip):
    for each in (clip, serve(tiny).clip):
        assert set(each.tokenize(PROMPT)) == {"l", "t5xxl"}


def test_served_embedding_equals_the_trained_student(clip, reference):
    token_ids = torch.tensor([[token for token, _ in clip.tokenize(PROMPT)["t5xxl"][0]]])
    with torch.no_grad():
        expected = reference(token_ids)
    assert (embedding(clip) - expected).abs().max() <= 1e-4
    assert expected.std() > 0.1


def test_set_last_layer_projects_the_layer_below(clip, reference):
    lower = CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    token_ids = torch.tensor([[token for token, _ in clip.tokenize(PROMPT)["t5xxl"][0]]])
    with torch.no_grad():
        states = reference.encoder(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), output_hidden_states=True).hidden_states
        expected = reference.final_projection(reference.encoder.encoder.final_layer_norm(states[TINY.num_layers - 1]))
    assert (embedding(lower) - expected).abs().max() <= 1e-4
    assert (embedding(lower) - embedding(clip)).abs().max() > 1e-2


def test_weighted_words_are_pushed_away_from_the_empty_prompt_as_in_stock(clip):
    plain, weighted = embedding(clip, "a cat and a dog"), embedding(clip, "a (cat:1.3) and a dog")
    pairs = clip.tokenize("a (cat:1.3) and a dog")["t5xxl"][0]
    empty = clip.cond_stage_model.t5base.encode([[1] + [0] * (len(pairs) - 1)])[0]
    weights = torch.tensor([weight for _, weight in pairs])[None, :, None]
    assert weights.unique().tolist() == pytest.approx([1.0, 1.3])
    torch.testing.assert_close(weighted, torch.where(weights == 1.0, plain, (plain - empty) * weights + empty), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("option", "value", "length"), [("min_length", 512, 512), ("min_length", 77, 77), ("min_padding", 300, 320)])
def test_T5TokenizerOptions_sets_the_length(clip, stock, option, value, length):
    settings = {"min_padding": 0, "min_length": 0, option: value}
    ours, theirs = (embedding(T5TokenizerOptions.execute(c, **settings).args[0]) for c in (clip, stock))
    assert ours.shape == theirs.shape == (1, length, 4096)


def test_conditioning_nodes_take_it_as_they_take_stock(clip, stock):
    def chain(c: Any) -> list:
        first, second = encode(c, "a cat"), encode(c, "a dog")
        average = ConditioningAverage().addWeighted(first, second, 0.25)[0]
        torch.testing.assert_close(average[0][0], 0.25 * first[0][0] + 0.75 * second[0][0])
        zero = ConditioningZeroOut().zero_out(average)[0]
        assert zero[0][0].count_nonzero() == 0
        return FluxGuidance.execute(ConditioningCombine().combine(average, zero)[0], 2.5).args[0]

    ours = chain(clip)
    assert [extras["guidance"] for _, extras in ours] == [2.5, 2.5]
    alike(ours, chain(stock))


@pytest.mark.parametrize(
    "text", ["", "cat", "word " * 254, "word " * 598, "\U0001f431 caf\u00e9 \u732b \U0001f680" * 20], ids=["0", "1", "256", "600", "emoji"]
)
def test_prompts_of_any_length_give_finite_embeddings_of_the_length_of_stock(clip, stock, text):
    ours = embedding(clip, text)
    assert torch.isfinite(ours).all()
    assert ours.shape == embedding(stock, text).shape


def test_a_hundred_thousand_characters_are_refused_with_the_token_count(clip):
    with pytest.raises(ValueError, match=r"has \d+,\d+ T5 tokens.*at most 4,096[\s\S]*What to do: shorten"):
        encode(clip, "lorem ipsum " * 8334)
    assert torch.isfinite(embedding(clip)).all()


def test_clones_with_different_settings_do_not_touch_each_other(clip):
    before = embedding(clip)
    lower = CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    longer = T5TokenizerOptions.execute(clip, min_padding=0, min_length=300).args[0]
    both = CLIPSetLastLayer().set_last_layer(longer, -3)[0]
    results = {name: embedding(each) for name, each in {"lower": lower, "longer": longer, "both": both}.items()}
    assert results["longer"].shape[1] == results["both"].shape[1] == 300
    assert torch.equal(embedding(clip), before)
    assert torch.equal(embedding(lower), results["lower"])
    assert not torch.equal(results["lower"], before)


def test_the_second_prompt_loads_nothing(clip, caplog):
    encode(clip, "first")
    places = [weight.data_ptr() for weight in clip.cond_stage_model.parameters()]
    with caplog.at_level("INFO"):
        encode(clip, "second")
    assert [weight.data_ptr() for weight in clip.cond_stage_model.parameters()] == places
    assert not [line for line in caplog.messages if "load" in line.lower()]


def test_comfyui_manages_the_memory(clip):
    assert type(clip.patcher) is comfy.model_patcher.CoreModelPatcher
    assert clip.patcher.model is clip.cond_stage_model
    loaded = [model.model for model in comfy.model_management.current_loaded_models]
    encode(clip)
    assert clip.patcher in loaded or any(model.model is clip.patcher for model in comfy.model_management.current_loaded_models)


def test_comfyui_can_make_a_second_copy(clip):
    make, arguments = clip.patcher.cached_patcher_init
    copy = make(*arguments, disable_dynamic=True)
    assert copy is not clip.patcher
    ours = clip.patcher.model_state_dict() if hasattr(clip.patcher, "model_state_dict") else clip.cond_stage_model.state_dict()
    theirs = copy.model_state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("has_clip_l", [True, False])
def test_other_packs_reach_its_encoders_by_the_names_of_stock(tiny, clip, stock, has_clip_l):
    ours = clip if has_clip_l else serve(tiny).clip
    tokens = ours.tokenize(PROMPT)
    # Nodes that weigh tokens themselves find each encoder by the key of its tokens, or by the name of its tokenizer.
    for key, name in {"l": "clip_l", "t5xxl": "t5xxl"}.items():
        assert hasattr(ours.tokenizer, name)
        (ours_BLD, ours_pooled), (stock_BLD, stock_pooled) = (
            getattr(each.cond_stage_model, name).encode_token_weights(tokens[key]) for each in (ours, stock)
        )
        assert (ours_BLD.shape, ours_BLD.dtype, ours_BLD.device) == (stock_BLD.shape, stock_BLD.dtype, stock_BLD.device)
        assert (ours_pooled is None) == (stock_pooled is None)
    assert torch.equal(ours.cond_stage_model.t5xxl.encode_token_weights(tokens["t5xxl"])[0], embedding(ours))
    for name in ("clip_l", "t5xxl"):
        getattr(ours.cond_stage_model, name).set_clip_options({"layer": -2})
        getattr(ours.cond_stage_model, name).reset_clip_options()


def test_a_hook_on_an_encoder_by_its_name_changes_the_encoding_and_goes_again(clip):
    before = embedding(clip)
    hooked = clip.clone()
    encode_token_weights = hooked.cond_stage_model.t5xxl.encode_token_weights

    def doubled(pairs: Any) -> Any:
        text_BLD, *rest = encode_token_weights(pairs)
        return (2 * text_BLD, *rest)

    hooked.patcher.add_object_patch("t5xxl.encode_token_weights", doubled)
    assert torch.equal(embedding(hooked), 2 * before)
    assert torch.equal(embedding(clip), before)


def test_the_student_is_registered_once_and_not_under_the_name_of_t5xxl(clip):
    names = {name.partition(".")[0] for name in clip.cond_stage_model.state_dict()}
    assert names == {"clip_l", "t5base"}
    assert clip.cond_stage_model.t5xxl is clip.cond_stage_model.t5base
