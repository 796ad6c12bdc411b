"""Cross-Attention Map: it changes no bit of a picture, and what it shows is the attention that a full softmax gives."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sd
import pytest
import safetensors.torch
import torch
from comfy_extras.nodes_custom_sampler import BasicGuider, BasicScheduler, KSamplerSelect, RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_model_advanced import ModelSamplingFlux
from distilled_t5.evaluate import attention
from distilled_t5.evaluate.attention import attention_on, overlaid, positions_of, t5_pieces, word_positions
from distilled_t5.evaluate.attention_recorder import KEPT_RUNS, OVERRIDE, map_of, step_of
from distilled_t5.families.flux_tensors import FluxLayout
from distilled_t5.nodes.attention_map import DistilledT5AttentionMapImage, DistilledT5CrossAttentionMap
from distilled_t5.runtime.random_weights import drawn
from distilled_t5.tests.support.small_encoders import serve, stock_flux_clip, student_file
from torch import Tensor

import nodes

PROMPT = "a red fox, left of a fire-red tree, and a Fox."
STEPS = 3
FLUX = FluxLayout(width=256, double=1, single=2)  # two heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    path = folder / "flux.safetensors"
    safetensors.torch.save_file(drawn(FLUX.tensors(), seed=2), path)
    return comfy.sd.load_diffusion_model(str(path))


@pytest.fixture(scope="module")
def clip(folder: Path) -> Any:
    return serve(student_file(folder, token_length=24)).clip


def mapped(model: Any, clip: Any, word: str = "fox", prompt: str = PROMPT) -> tuple[Any, Any, Any]:
    return DistilledT5CrossAttentionMap.execute(model, clip, prompt, word, 3.5).args


def empty(pictures: int = 1, height: int = 6, width: int = 8) -> dict[str, Tensor]:
    return {"samples": torch.zeros(pictures, 16, height, width)}


def encoded(clip: Any, text: str = PROMPT) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text), add_dict={"guidance": 3.5})


def sample(model: Any, positive: Any, negative: Any, seed: int = 0, cfg: float = 1.0, latent: Any = None, sampler: str = "euler") -> Any:
    return nodes.KSampler().sample(model, seed, STEPS, cfg, sampler, "simple", positive, negative, latent or empty())[0]


def shown(attention_: Any, latent: Any, step: int = 0, image: Tensor | None = None, **opacity: float) -> tuple[Tensor, Tensor, str]:
    return DistilledT5AttentionMapImage.execute(attention_, latent, step, image, **opacity).args


@pytest.mark.parametrize(
    ("pictures", "cfg", "sampler"), [(1, 1.0, "euler"), (2, 1.0, "euler"), (2, 3.0, "euler"), (1, 3.0, "heun"), (1, 1.0, "dpmpp_2m")]
)
def test_the_sampled_latent_is_the_same_to_the_bit(model, clip, pictures, cfg, sampler):
    positive, negative = encoded(clip), encoded(clip, "")
    plain = sample(model, positive, negative, 5, cfg, empty(pictures), sampler)
    recording, conditioning, attention_ = mapped(model, clip)
    watched = sample(recording, conditioning, negative, 5, cfg, empty(pictures), sampler)
    assert torch.equal(watched["samples"], plain["samples"])
    assert map_of(attention_.run_of(watched["samples"])).shape == (pictures, 3, 4)
    assert plain["samples"].std() > 0.1, "a Flux that does nothing proves nothing"


def explicit_softmax(found: list[Tensor], text_tokens: int, positions: list[int]) -> Any:
    """An attention override that keeps, for each call, the whole matrix's image rows and word columns, mean over heads."""

    def attend(original: Any, *args: Any, **kwargs: Any) -> Tensor:
        query, key = args[:2]
        weights = (query.double() @ key.double().transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
        found.append(weights[:, :, text_tokens:, positions].sum(dim=-1).mean(dim=1))
        return original(*args, **kwargs)

    return attend


@pytest.mark.parametrize("step", [0, 2])
def test_the_map_is_what_a_full_softmax_gives_mean_over_heads_and_blocks(model, clip, step):
    recording, conditioning, attention_ = mapped(model, clip)
    found: list[Tensor] = []
    text_tokens = conditioning[0][0].shape[1]
    override = explicit_softmax(found, text_tokens, word_positions(clip, PROMPT, "fox"))
    recording.model_options["transformer_options"][OVERRIDE] = override
    latent = sample(recording, conditioning, conditioning, latent=empty(2))
    assert len(found) == STEPS * (FLUX.double + FLUX.single), "an override of another node is called as before"
    per_step = torch.stack(found).reshape(STEPS, -1, 2, 3, 4).mean(dim=1)
    expected = per_step.mean(dim=0) if step == 0 else per_step[step - 1]
    torch.testing.assert_close(map_of(attention_.run_of(latent["samples"]), step).double(), expected, atol=1e-6, rtol=1e-4)
    assert expected.std() > 1e-4


def test_only_the_positive_prompt_is_looked_at_though_the_negative_is_the_same(model, clip):
    recording, conditioning, attention_ = mapped(model, clip)
    alone = sample(recording, conditioning, conditioning, cfg=1.0)
    both = sample(recording, conditioning, conditioning, cfg=3.0)
    torch.testing.assert_close(map_of(attention_.run_of(both["samples"]), 1), map_of(attention_.run_of(alone["samples"]), 1))


def test_each_picture_of_a_batch_has_its_own_map(model, clip):
    recording, conditioning, attention_ = mapped(model, clip)
    noise = torch.randn(2, 16, 6, 8, generator=torch.Generator().manual_seed(3))
    batch = sample(recording, conditioning, encoded(clip, ""), cfg=3.0, latent={"samples": noise})
    maps = map_of(attention_.run_of(batch["samples"]), 1)
    assert not torch.allclose(maps[0], maps[1], rtol=1e-3)


def test_the_word_of_the_teachers_clip_is_found_and_recorded_too(model, stand_ins):
    stock = stock_flux_clip(stand_ins / "models" / "text_encoders" / "clip_l.safetensors")
    positive = encoded(stock)
    plain = sample(model, positive, positive)
    recording, conditioning, attention_ = mapped(model, stock)
    watched = sample(recording, conditioning, conditioning)
    assert torch.equal(watched["samples"], plain["samples"])
    image, mask, info = shown(attention_, watched)
    assert image.shape == (1, 48, 64, 3)
    # The map is interpolated, so the extremes fall between pixels.
    assert 0 <= mask.min() < 0.05
    assert 0.95 < mask.max() <= 1
    assert info.startswith("attention to 'fox' (2 T5 tokens), mean of 3 steps, 1 images: ")


def test_a_model_that_is_changed_behind_the_node_still_records_and_other_words_are_recorded_along(model, clip):
    first, conditioning, fox = mapped(model, clip)
    second, _, tree = mapped(first, clip, "tree")
    changed, plain = (ModelSamplingFlux().patch(each, 1.15, 0.5, 64, 64)[0] for each in (second, model))
    latent = sample(changed, conditioning, conditioning)
    assert torch.equal(latent["samples"], sample(plain, conditioning, conditioning)["samples"])
    fox_map, tree_map = (map_of(one.run_of(latent["samples"])) for one in (fox, tree))
    assert not torch.allclose(fox_map, tree_map, rtol=1e-3)


def test_the_advanced_sampler_is_recorded_too(model, clip):
    recording, conditioning, attention_ = mapped(model, clip)
    guider = BasicGuider.execute(recording, conditioning).args[0]
    sigmas = BasicScheduler.execute(recording, "simple", STEPS, 1.0).args[0]
    tools = (RandomNoise.execute(5).args[0], guider, KSamplerSelect.execute("euler").args[0], sigmas)
    latent = SamplerCustomAdvanced.execute(*tools, empty()).args[0]
    assert map_of(attention_.run_of(latent["samples"])).shape == (1, 3, 4)


def test_a_latent_gets_the_map_of_the_sampling_that_it_came_from(model, clip):
    recording, conditioning, attention_ = mapped(model, clip)
    latents = [sample(recording, conditioning, conditioning, seed) for seed in (1, 2)]
    maps = [shown(attention_, latent)[1] for latent in latents]
    assert not torch.allclose(maps[0], maps[1], atol=1e-3)
    for seed, latent, earlier in zip((1, 2), latents, maps, strict=True):
        again, conditioning, other = mapped(model, clip)
        repeated = sample(again, conditioning, conditioning, seed)
        assert torch.equal(repeated["samples"], latent["samples"])
        assert torch.equal(shown(other, repeated)[1], earlier)


def test_a_latent_that_was_not_sampled_here_or_long_ago_is_refused(model, clip):
    recording, conditioning, attention_ = mapped(model, clip)
    with pytest.raises(ValueError, match=r"does not come from a sampler[\s\S]*What to do: connect the LATENT"):
        shown(attention_, empty())
    first = sample(recording, conditioning, conditioning, 0)
    shown(attention_, first)
    for seed in range(1, KEPT_RUNS + 1):
        sample(recording, conditioning, conditioning, seed)
    with pytest.raises(ValueError, match="too many samplings ago"):
        shown(attention_, first)


def test_an_interrupted_sampling_leaves_no_map(model, clip):
    recording, conditioning, attention_ = mapped(model, clip)

    def stop(*_: Any) -> None:
        raise InterruptedError

    noise = torch.randn(1, 16, 6, 8)
    with pytest.raises(InterruptedError):
        comfy.sample.sample(recording, noise, 2, 1.0, "euler", "simple", conditioning, conditioning, empty()["samples"], callback=stop)
    assert not attention_._runs
    assert attention_._now is None


def test_what_is_kept_is_small_and_whole_matrices_never_are(model, clip):
    recording, conditioning, attention_ = mapped(model, clip)
    latent = sample(recording, conditioning, conditioning, latent=empty(2, 16, 16))
    run = attention_.run_of(latent["samples"])
    assert sum(total.numel() for total, _ in run.sums.values()) == STEPS * 2 * 8 * 8


def test_a_sampler_that_never_sees_the_prompt_leaves_an_error_that_says_so(model, clip):
    recording, _, attention_ = mapped(model, clip)
    other = encoded(clip, "a blue cube")
    with pytest.raises(ValueError, match=r"did not get the prompt[\s\S]*What to do: connect the CONDITIONING"):
        shown(attention_, sample(recording, other, other))


def test_a_prompt_for_a_part_of_the_picture_is_refused_with_a_reason_and_the_picture_is_made(model, clip):
    recording, conditioning, attention_ = mapped(model, clip)
    [area] = nodes.ConditioningSetArea().append(conditioning, 32, 32, 0, 0, 1.0)
    for positive in (area, conditioning + area):
        with pytest.raises(ValueError, match="in areas or tiles"):
            shown(attention_, sample(recording, positive, encoded(clip, "")))


@pytest.mark.parametrize(("step", "message"), [(4, "There is no step 4; the sampling had 3"), (-1, "There is no step -1")])
def test_a_step_that_was_not_sampled_is_refused(model, clip, step, message):
    recording, conditioning, attention_ = mapped(model, clip)
    with pytest.raises(ValueError, match=rf"{message}[\s\S]*What to do: set step to 1 to 3"):
        shown(attention_, sample(recording, conditioning, conditioning), step)


def test_a_step_at_which_another_prompt_was_in_use_is_refused(model, clip):
    recording, conditioning, attention_ = mapped(model, clip)
    late = [[text, {**extras, "start_percent": 0.5, "end_percent": 1.0}] for text, extras in conditioning]
    early = [[text, {**extras, "start_percent": 0.0, "end_percent": 0.5}] for text, extras in encoded(clip, "a blue cube")]
    latent = sample(recording, early + late, conditioning)
    with pytest.raises(ValueError, match=r"not in use at step 1[\s\S]*What to do: choose one of"):
        shown(attention_, latent, 1)
    assert shown(attention_, latent, 3)[0].shape == (1, 48, 64, 3)


def test_the_map_is_blended_over_the_image_with_the_given_opacity(model, clip):
    recording, conditioning, attention_ = mapped(model, clip)
    latent, picture = sample(recording, conditioning, conditioning), torch.rand(1, 30, 40, 3)
    alone, mask, _ = shown(attention_, latent)
    none, half, all_of_it = (shown(attention_, latent, 0, picture, opacity=opacity)[0] for opacity in (0.0, 0.5, 1.0))
    assert alone.shape == (1, 48, 64, 3)
    assert mask.shape == (1, 48, 64)
    assert torch.equal(none, picture)
    torch.testing.assert_close(half, (picture + all_of_it) / 2)
    with pytest.raises(ValueError, match="got 2 images and 1 latents"):
        shown(attention_, latent, 0, torch.rand(2, 30, 40, 3))


def test_a_model_of_another_family_is_refused_with_those_that_work(clip):
    other = SimpleNamespace(get_model_object=lambda _name: torch.nn.Linear(1, 1))
    known = "Flux.1, Stable Diffusion 3, PixArt-alpha, PixArt-Sigma, Chroma"
    with pytest.raises(ValueError, match=rf"work for {known}; this MODEL is a Linear[\s\S]*What to do: connect the MODEL of one"):
        mapped(other, clip)
    with pytest.raises(ValueError, match=r"There is no CLIP[\s\S]*What to do: connect"):
        mapped(other, None)


@pytest.mark.parametrize(
    ("prompt", "word", "found"),
    [
        (PROMPT, "fox", ["fox", "\u2581Fox"]),
        (PROMPT, "FOX", ["fox", "\u2581Fox"]),
        (PROMPT, "red fox", ["\u2581red", "fox"]),
        (PROMPT, "  red   fox ", ["\u2581red", "fox"]),
        (PROMPT, "red", ["\u2581red", "red"]),
        ("a (red:1.3) fox", "red", ["\u2581red"]),
        ("a ((red) fox:0.7)", "fox", ["fox"]),
        ("a sign that says 'CAFE'", "CAFE", ["CA", "FE"]),
        ("an armadillo's shell", "armadillo", None),
        ("x\n\nfox\tand", "fox", ["fox"]),
    ],
)
def test_the_tokens_of_a_word_are_found_wherever_it_stands(clip, prompt, word, found):
    positions = word_positions(clip, prompt, word)
    names = clip.tokenizer.t5xxl.inv_vocab
    ids = [token for token, _ in clip.tokenize(prompt)["t5xxl"][0]]
    pieces = [names[ids[place]] for place in positions]
    if found is None:
        assert len(pieces) > 1
        assert "".join(pieces).strip("\u2581").lower() == word
    else:
        assert pieces == found


@pytest.mark.parametrize("word", ["cat", "ox", "fo", "pad", "s", "unk", "", "  ", ",fox", "red tree", "(", "\u72d0"])
def test_a_word_that_is_not_in_the_prompt_is_refused_with_what_t5_reads(clip, word):
    with pytest.raises(ValueError, match=r"is not in the prompt\.\nT5 reads the prompt as: 'a category,[\s\S]*What to do: give a word"):
        word_positions(clip, "a category, foxes and fired-up ox-eyes \u72d0"[:18] + " boxes", word)


def test_a_clip_without_t5_is_refused():
    other = SimpleNamespace(tokenize=lambda _text: {"g": [], "l": []}, cond_stage_model=None)
    with pytest.raises(ValueError, match=r"This CLIP has no T5 or Qwen3 \(its tokens are for g, l\)"):
        t5_pieces(other, "x")


def test_pieces_that_only_touch_a_word_are_not_its():
    assert positions_of([" a", " fox", "es", " fox", " ", ",", " fire", "fox"], "fox") == [3]
    assert positions_of([" f", "ox", "", "-", "fox"], "fox") == [0, 1, 4]
    assert positions_of(["fox"], "") == []


@pytest.mark.parametrize("kind", ["none", "floats", "booleans", "for each row"])
def test_attention_in_parts_is_attention_in_one_piece_with_any_mask(monkeypatch, kind):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, length, 8, generator=generator) for length in (7, 9))
    masks = {"floats": torch.randn(1, 1, 7, 9, generator=generator), "booleans": torch.rand(2, 1, 7, 9, generator=generator) > 0.3}
    mask = masks.get(kind, torch.randn(1, 1, 1, 9, generator=generator) if kind == "for each row" else None)
    scores = query @ key.transpose(-1, -2) / math.sqrt(8)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    expected = scores.softmax(dim=-1)[..., [1, 4]].sum(dim=-1).mean(dim=1)
    torch.testing.assert_close(attention_on(query, key, [1, 4], mask), expected)
    monkeypatch.setattr(attention, "MOST_WEIGHTS", 2 * 3 * 9 * 2)
    torch.testing.assert_close(attention_on(query, key, [1, 4], mask), expected)


def test_a_noise_level_belongs_to_the_step_that_starts_at_it_or_above():
    sigmas = [1.0, 0.7, 0.3, 0.0]
    assert [step_of(sigma, sigmas) for sigma in (1.0, 0.9, 0.7, 0.7000001, 0.5, 0.3, 0.1)] == [0, 0, 1, 1, 1, 2, 2]


def test_heat_goes_from_dark_to_light_and_a_map_that_is_the_same_everywhere_is_dark():
    brightness = overlaid(torch.linspace(0, 1, 50).reshape(1, 1, 50), None, 1.0).mean(dim=-1).flatten()
    assert (brightness.diff() > 0).all()
    assert attention.stretched(torch.full((1, 2, 2), 0.25)).count_nonzero() == 0
