"""Classifier-free guidance along the teacher's trajectory, prompts of their own length, and rows that the student does not make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.sample
import comfy.sd
import pytest
import torch
from distilled_t5.diffusion.denoise import denoise, guided
from distilled_t5.diffusion.frozen import FrozenModel
from distilled_t5.encoder.rows import Rows
from distilled_t5.encoder.teacher import Teacher, literal
from distilled_t5.evaluate.encoders import Text
from distilled_t5.evaluate.generate import ImageGenerator
from distilled_t5.evaluate.suite import SuiteSamplingPart
from distilled_t5.families.sd3 import SD3
from distilled_t5.tests.support.other_family import T5_ALONE
from distilled_t5.tests.support.small_models import SmallModel, randomize
from distilled_t5.train.objectives import OBJECTIVES
from distilled_t5.train.trajectory import Position, advance, draw, gaps_at
from torch import Tensor

STEPS, BATCH, TOKENS, SIDE_PX = 4, 3, 12, 64
VELOCITY, EMBEDDING = OBJECTIVES["velocity"], OBJECTIVES["embedding"]


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    small = FrozenModel(SmallModel(*SD3.small, SD3.latent_shape(SIDE_PX), 0, 0.7).patcher(), SD3)
    small.load()
    return small


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entry(batch: int, seed: int, tokens: int = TOKENS) -> tuple[Tensor, dict[str, Any]]:
    return randn(batch, tokens, SD3.text_width, seed=seed), {"pooled_output": randn(batch, sum(SD3.companions.values()), seed=seed + 1)}


def position(model: FrozenModel, **changes: Any) -> Position:
    text_BLD, extras = entry(BATCH, 1)
    noise, sigmas_T = randn(BATCH, *SD3.latent_shape(SIDE_PX), seed=3), model.sigmas(STEPS)
    ids_BL = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    return replace(Position(1, model.noisy(noise, sigmas_T), sigmas_T, text_BLD, extras, None, ids_BL), **changes)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_images_with_cfg_and_a_negative_prompt_are_the_stock_samplers(model: FrozenModel, cfg: float):
    noise, positive, negative = randn(1, *SD3.latent_shape(SIDE_PX), seed=0), entry(1, 1), entry(1, 5)
    positives, negatives = ([[text, dict(extras)]] for text, extras in (positive, negative))
    expected = comfy.sample.sample(
        model.patcher, noise, STEPS, cfg, "euler", "simple", positives, negatives, torch.zeros_like(noise), disable_pbar=True, seed=0
    )
    found = denoise(model, noise, model.sigmas(STEPS), *positive, cfg=cfg, negative=negative)
    if cfg == 1:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_guidance_on_both_sides_multiplies_the_loss_by_its_square(model: FrozenModel):
    """So the trainer uses the conditional loss, and guidance only decides where the teacher goes."""
    here, weight = position(model), 7.0
    student_text = entry(BATCH, 9)[0]
    with torch.no_grad():
        [loss_B], _ = gaps_at(here, model, [lambda _ids: student_text], VELOCITY)
        unconditional = here.velocity(model, entry(BATCH, 21)[0])
        both = [guided(here.velocity(model, text), unconditional, weight) for text in (student_text, here.text_BLD)]
    torch.testing.assert_close((both[0] - both[1]).square().mean(dim=(1, 2, 3)), weight**2 * loss_B, rtol=1e-3, atol=0)


def test_the_teacher_walks_guided_and_the_loss_stays_the_conditional_one(model: FrozenModel):
    empty, cfg_B = entry(1, 11), torch.tensor([1.0, 4.5, 7.0])
    plain, walked = position(model), position(model, cfg_B=cfg_B, unconditional=empty)
    student_text = entry(BATCH, 9)[0]
    with torch.no_grad():
        ([loss_B], velocity), ([same_B], followed) = (
            gaps_at(here, model, [lambda _ids: student_text], VELOCITY) for here in (plain, walked)
        )
        assert velocity is not None and followed is not None
        unconditional = replace(plain, extras={"pooled_output": empty[1]["pooled_output"].expand(BATCH, -1)}).velocity(
            model, empty[0].expand(BATCH, -1, -1)
        )
    assert torch.equal(loss_B, same_B)
    torch.testing.assert_close(followed, unconditional + cfg_B.view(-1, 1, 1, 1) * (velocity - unconditional))
    assert torch.allclose(followed[0], velocity[0], atol=1e-5) and not torch.allclose(followed[2], velocity[2], atol=1e-3)
    assert not torch.equal(advance(plain, velocity).x, advance(walked, followed).x)


def test_drawing_cfg_leaves_everything_else_as_it_was():
    plain, more = (draw(7, 3, 8, (4, 8, 8), (2.0, 5.0), (77, 128), cfg) for cfg in ((), (4.5, 7.0)))
    assert plain.cfg_B is None and more.cfg_B is not None and set(more.cfg_B.tolist()) == {4.5, 7.0}
    assert torch.equal(plain.noise, more.noise) and plain.token_length == more.token_length
    assert plain.guidance_B is not None and more.guidance_B is not None and torch.equal(plain.guidance_B, more.guidance_B)


OWN = (12, 5, 12)


@pytest.mark.parametrize("before", [0, 7], ids=["text alone", "after rows of companions"])
def test_prompts_of_different_length_give_what_each_gives_alone(model: FrozenModel, before: int):
    rows = Rows(OWN, tuple(randn(before, SD3.text_width, seed=30 + place) for place in range(BATCH)))
    here, student_text = position(model, rows=rows), entry(BATCH, 9)[0].requires_grad_(True)
    [loss_B], velocity = gaps_at(here, model, [lambda _ids: student_text], VELOCITY)
    loss_B.sum().backward()
    assert velocity is not None and student_text.grad is not None
    for place, own in enumerate(OWN):
        extras = {"pooled_output": here.extras["pooled_output"][place : place + 1]}
        alone = replace(here, x=here.x[place : place + 1], extras=extras, rows=None)
        texts = [torch.cat([rows.before[place], text[place, :own]])[None] for text in (here.text_BLD, student_text.detach())]
        with torch.no_grad():
            teacher, student = (alone.velocity(model, text) for text in texts)
        torch.testing.assert_close(velocity[place : place + 1], teacher, rtol=0, atol=1e-5)
        torch.testing.assert_close(loss_B[place].detach(), (student - teacher).square().mean(), rtol=1e-4, atol=1e-9)
        assert not student_text.grad[place, own:].any() and student_text.grad[place, :own].any()


def test_the_gap_of_embeddings_is_that_of_each_prompts_own_rows(model: FrozenModel):
    here, student_text = position(model, rows=Rows(OWN, (torch.zeros(0, SD3.text_width),) * BATCH)), entry(BATCH, 9)[0]
    [loss_B], velocity = gaps_at(here, model, [lambda _ids: student_text], EMBEDDING)
    assert velocity is None
    expected = [(student_text[place, :own] - here.text_BLD[place, :own]).square().mean() for place, own in enumerate(OWN)]
    torch.testing.assert_close(loss_B, torch.stack(expected))


SMALL_T5 = {"num_layers": 1, "d_ff": 8, "num_heads": 1, "d_kv": 8, "vocab_size": 32128}
SMALL_CLIP = {"num_hidden_layers": 3, "intermediate_size": 8, "num_attention_heads": 4}


def sd3_clip(companions: tuple[str, ...]) -> Any:
    """ComfyUI's own CLIP of SD3 with small random encoders of full width."""
    from types import SimpleNamespace

    from comfy.text_encoders.sd3_clip import SD3Tokenizer, sd3_clip

    target = SimpleNamespace(
        params={}, tokenizer=SD3Tokenizer, clip=sd3_clip(clip_l="clip_l" in companions, clip_g="clip_g" in companions, t5=True)
    )
    small = {"t5xxl_model_config": SMALL_T5, "clip_l_model_config": SMALL_CLIP, "clip_g_model_config": SMALL_CLIP}
    clip = comfy.sd.CLIP(target, parameters=1, state_dict=[], model_options=small)
    randomize(clip.cond_stage_model)
    return clip


@pytest.mark.parametrize("companions", [("clip_l", "clip_g"), ("clip_l",), ("clip_g",), ()], ids=["both", "clip_l", "clip_g", "neither"])
def test_the_teachers_text_is_comfyuis_with_every_set_of_companions(companions: tuple[str, ...]):
    clip, long = sd3_clip(companions), "a (red) cube, " * 12
    teacher = Teacher(clip, SD3)
    for prompt in ("a cat", long):
        tokens = clip.tokenize(literal(prompt))
        [(expected, extras)] = clip.encode_from_tokens_scheduled(tokens)
        text = teacher.encode([prompt, "a dog"], len(tokens["t5xxl"][0]))
        assert text.rows is not None
        torch.testing.assert_close(text.rows.text(text.text_BLD, [0]), expected.float(), rtol=0, atol=1e-5)
        torch.testing.assert_close(text.pooled_BP[0], extras["pooled_output"][0].float(), rtol=0, atol=1e-5)
    text = teacher.encode(["a cat"], 77, with_empty=True)
    assert text.empty is not None
    [(expected, _)] = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    torch.testing.assert_close(text.empty.whole, expected.float(), rtol=0, atol=1e-5)


def test_a_teacher_that_does_not_pad_encodes_every_prompt_as_comfyui_does(tmp_path):
    from distilled_t5.tests.support.small_encoders import TINY, serve, student_file

    family = replace(T5_ALONE, padded=False, masked=True)
    clip = serve(student_file(tmp_path, TINY, token_length=1)).clip
    prompts = ["a cat", "", "a red cube left of a blue ball", "a dog"]
    teacher = Teacher(clip, replace(family, tokenizer_part=""))
    text = teacher.encode(prompts, 6)
    assert text.rows is not None and text.rows.own == (4, 1, 6, 4)
    assert text.rows.groups == [[0, 3], [1], [2]]
    for place, prompt in enumerate(prompts):
        alone = teacher.encode([prompt], 6)
        own = text.rows.own[place]
        assert alone.text_BLD.shape[1] == own
        torch.testing.assert_close(text.text_BLD[place, :own], alone.text_BLD[0], rtol=0, atol=1e-5)
        assert not text.text_BLD[place, own:].any()


def test_the_evaluations_images_with_a_negative_prompt_are_the_stock_samplers(model: FrozenModel):
    sampling = SuiteSamplingPart(resolution_px=SIDE_PX, steps=STEPS, batch=2, cfg=5.0, negative="blurry")
    assert sampling.negative_prompt == "blurry" and "CFG 5 with negative prompt 'blurry'" in str(sampling)
    assert SuiteSamplingPart(resolution_px=SIDE_PX, steps=STEPS, batch=2, negative="blurry").negative_prompt is None
    positive, negative = entry(2, 1), entry(1, 5, tokens=7)
    beside = Text(negative[0], negative[1]["pooled_output"], 7)
    texts = [Text(positive[0][[place]], positive[1]["pooled_output"][[place]], TOKENS, 0, beside) for place in range(2)]
    generator = ImageGenerator(model, None, sampling)
    found = generator.latents(texts, [3, 4])
    for place, seed in enumerate((3, 4)):
        one = ([[text[[place]], {"pooled_output": extras["pooled_output"][[place]]}]] for text, extras in [positive])
        noise = generator.noise([seed])
        expected = comfy.sample.sample(
            model.patcher,
            noise,
            STEPS,
            5.0,
            "euler",
            "simple",
            next(one),
            [[negative[0], dict(negative[1])]],
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )
        torch.testing.assert_close(found[[place]], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
