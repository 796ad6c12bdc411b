"""What must hold for every registered family: tests know a family through its record alone, as the product does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.text_encoders.sd3_clip import sd3_clip
from distilled_t5.diffusion.denoise import denoise
from distilled_t5.diffusion.files import check_guidance
from distilled_t5.diffusion.frozen import FrozenModel
from distilled_t5.encoder.served import describe
from distilled_t5.encoder.teacher import load_teacher
from distilled_t5.evaluate.cost import encoder_name
from distilled_t5.evaluate.encoders import EncoderFile, LoadedEncoder
from distilled_t5.evaluate.suite import load_suite
from distilled_t5.families import DEFAULT, FAMILIES
from distilled_t5.families.family import Family
from distilled_t5.nodes.loaded_files import text_encoder_files
from distilled_t5.students import KINDS
from distilled_t5.tests.support.denoising import sampled_by_comfyui
from distilled_t5.tests.support.other_family import T5_ALONE
from distilled_t5.tests.support.small_encoders import PROMPT, random_tensors, serve, stock_clip, student_file, tiny
from distilled_t5.tests.support.small_models import SmallModel
from distilled_t5.train.recipe import load_recipe
from torch import Tensor

STEPS, BATCH, TOKENS, SIGMA = 4, 2, 12, 0.7
# FLUX.2 klein 9B differs from klein 4B in widths alone.
FULL = {"flux2_klein_9b"}
every_family = pytest.mark.parametrize(
    "family", [pytest.param(family, id=name, marks=[pytest.mark.full] if name in FULL else []) for name, family in FAMILIES.items()]
)


def side_px(family: Family) -> int:
    return max(64, family.least_side_px)


def small(family: Family) -> SmallModel:
    latent = family.latent_shape(side_px(family))
    return SmallModel(*family.small, latent, 0, 0.7)


def frozen(family: Family) -> FrozenModel:
    model = FrozenModel(small(family).patcher(), family)
    model.load()
    return model


def conditioning(family: Family, model: FrozenModel) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Noise [B, C, ...], text [B, L, D] and the other parts of a conditioning entry."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(BATCH, *family.latent_shape(side_px(family)), generator=generator)
    text_BLD = torch.randn(BATCH, TOKENS, model.text_width, generator=generator)
    extras = {"pooled_output": torch.randn(BATCH, sum(family.companions.values()), generator=generator) if family.companions else None}
    return noise, text_BLD, extras


def test_names_are_unique_and_the_default_is_registered():
    assert all(family.name == name for name, family in FAMILIES.items())
    assert DEFAULT in FAMILIES.values()
    assert len({family.display_name for family in FAMILIES.values()}) == len(FAMILIES)


@every_family
def test_comfyui_knows_the_clip_type_and_every_kind_of_student(family: Family):
    assert hasattr(comfy.sd.CLIPType, family.clip_type)
    assert set(family.students) <= set(KINDS) and family.teacher[0] in KINDS


@every_family
def test_a_served_student_is_comfyuis_own_text_model_with_the_trained_embeddings(family: Family, tmp_path: Path):
    layout = tiny(family)
    file = student_file(tmp_path, layout, family=family.name, token_length=family.token_length, pooled="zero")
    clip = serve(file, family=family.name).clip
    assert ("CLIP" in describe(clip, file.name, {})) == bool(family.companions)
    tokenizer, factory = family.text_classes()
    stock: Any = factory
    assert type(clip.tokenizer) is tokenizer
    model, part = clip.cond_stage_model, getattr(clip.cond_stage_model, family.part)
    assert isinstance(model, stock.__bases__), "ComfyUI makes a class at each call, all of one base"
    assert part is getattr(model, family.kind.module)
    tokens = clip.tokenize(PROMPT)
    assert tokens[family.part] == tokenizer().tokenize_with_weights(PROMPT)[family.part]
    [(text_BLD, extras)] = clip.encode_from_tokens_scheduled(tokens)
    reference = family.kind.trained(layout, 0.0, not family.masked)
    reference.load_tensors(random_tensors(layout))
    token_ids_BL = torch.tensor([[token for token, _ in tokens[family.part][0]]])
    with torch.no_grad():
        expected_BLD = reference.eval()(token_ids_BL)

    torch.testing.assert_close(text_BLD[:, -token_ids_BL.shape[1] :], expected_BLD, rtol=0, atol=1e-5)
    if family.companions:
        assert extras["pooled_output"].shape == (1, sum(family.companions.values())) and not extras["pooled_output"].any()


@every_family
def test_comfyuis_own_clip_and_a_served_student_read_the_same_tokens(family: Family, tmp_path: Path):
    file = student_file(tmp_path, tiny(family), family=family.name, token_length=family.token_length, pooled="zero")
    served, stock = serve(file, family=family.name).clip, stock_clip(family)
    for prompt in ("", PROMPT, "a (red:1.2) cube, " * 60):
        assert stock.tokenize(prompt) == served.tokenize(prompt)
    factory: Any = family.text_classes()[1]
    assert isinstance(stock.cond_stage_model, factory.__bases__), "another text model: it may mask or pad differently"


@every_family
def test_a_small_model_of_the_family_is_accepted_and_one_of_another_kind_is_refused(family: Family):
    model = frozen(family)
    assert family.refuse(model.model) is None
    assert model.text_width > 0 and model.blocks
    other = SmallModel("LTXV" if family.small[0] != "LTXV" else "Flux", _other_config(family), (), 0, 0.7).patcher()
    assert family.refuse(other.model)


def _other_config(family: Family) -> dict[str, Any]:
    if family.small[0] == "LTXV":
        return dict(FAMILIES["flux"].small[1])
    blocks = {"num_layers": 1, "attention_head_dim": 4, "cross_attention_dim": 128, "num_attention_heads": 32}
    return {"image_model": "ltxv", "caption_channels": 64, "in_channels": 128, **blocks}


@pytest.fixture(scope="module")
def every_model() -> dict[str, Any]:
    """A small model of each family."""
    return {name: small(family).patcher().model for name, family in FAMILIES.items()}


@every_family
def test_a_model_of_another_registered_family_is_refused_by_its_name(family: Family, every_model: dict[str, Any]):
    for name, model in every_model.items():
        reason = family.refuse(model)
        assert (reason is None) == (name == family.name), (name, reason)
        assert reason is None or family.display_name.partition(".")[0] in reason


@every_family
def test_the_denoising_loop_equals_comfyuis_sampler_bit_for_bit(family: Family):
    model = frozen(family)
    noise, text_BLD, extras = conditioning(family, model)
    expected = sampled_by_comfyui(model.patcher, noise, STEPS, text_BLD, extras)
    assert torch.equal(denoise(model, noise, model.sigmas(STEPS), text_BLD, extras), expected)


@every_family
@pytest.mark.parametrize("checkpoint_blocks", [False, True], ids=["plain", "checkpointed"])
def test_the_gradient_with_respect_to_the_text_equals_the_numeric_one(family: Family, checkpoint_blocks: bool):
    model = frozen(family)
    noise, text_BLD, extras = conditioning(family, model)
    sigma_B = torch.full((BATCH,), SIGMA)
    leaf = text_BLD.clone().requires_grad_(True)
    with model.differentiable(checkpoint_blocks):
        model.velocity(noise, sigma_B, leaf, extras).square().sum().backward()
    assert leaf.grad is not None
    steepest = leaf.grad / leaf.grad.norm()
    length = 0.01 * float(text_BLD.norm()) / TOKENS**0.5

    @torch.no_grad()
    def loss(shift: float) -> float:
        return float(model.velocity(noise, sigma_B, text_BLD + shift * steepest, extras).double().square().sum())

    # Richardson's extrapolation: FLUX.2, most of whose text is padding here, is far from linear over the length.
    slope, half = ((loss(step) - loss(-step)) / (2 * step) for step in (length, length / 2))
    assert float(leaf.grad.norm()) == pytest.approx((4 * half - slope) / 3, rel=1e-2)


@every_family
def test_training_noise_levels_fall_from_the_models_highest_to_zero(family: Family):
    model = frozen(family)
    sigmas_T = model.training_sigmas(STEPS, *family.latent_shape(side_px(family))[-2:])
    assert len(sigmas_T) == STEPS + 1 and sigmas_T[-1] == 0
    assert sigmas_T.diff().lt(0).all()


@every_family
def test_guidance_is_asked_for_exactly_where_the_model_takes_it(family: Family):
    model = frozen(family)
    fitting, other = ([family.default_guidance], []) if model.takes_guidance else ([], [family.default_guidance])
    check_guidance("model", model, fitting)
    with pytest.raises(ValueError, match="What to do"):
        check_guidance("model", model, other)


@pytest.fixture
def t5_alone(monkeypatch: pytest.MonkeyPatch) -> Family:
    """Registered while a test runs."""
    monkeypatch.setitem(FAMILIES, T5_ALONE.name, T5_ALONE)
    return T5_ALONE


@pytest.fixture
def t5_alone_file(t5_alone: Family, tmp_path: Path) -> Path:
    return student_file(tmp_path, tiny(t5_alone), family=t5_alone.name, token_length=16, pooled="zero")


def test_a_family_without_companions_teaches(t5_alone: Family, t5_alone_file: Path):
    teacher = load_teacher(t5_alone_file, {}, t5_alone)
    text = teacher.encode([PROMPT, "a cat"], 16)
    assert text.token_ids_BL.shape == (2, 16) and text.text_BLD.shape == (2, 16, t5_alone.text_width)
    assert text.pooled_BP.shape == (2, 0)


def test_a_family_without_companions_is_evaluated(t5_alone: Family, t5_alone_file: Path):
    encoder = LoadedEncoder.load(EncoderFile("student", t5_alone_file), t5_alone)
    text = encoder.text(PROMPT)
    assert text.text_1LD.shape[-1] == t5_alone.text_width and text.pooled_1P.shape == (1, 0)
    assert encoder_name(encoder.clip) == tiny(t5_alone).size_name


def test_clip_l_is_refused_by_a_family_without_companions(t5_alone: Family, t5_alone_file: Path, stand_ins: Path):
    clip_l = stand_ins / "models" / "text_encoders" / "clip_l.safetensors"
    with pytest.raises(ValueError, match=r"T5 alone has no CLIP-L(.|\n)*What to do: choose none"):
        serve(t5_alone_file, clip_l, family=t5_alone.name)


@pytest.mark.parametrize(
    ("load", "name", "key"),
    [(load_recipe, "smoke", "stage.0.resolution_px"), (load_suite, "miniature", "sampling.resolution_px")],
    ids=["recipe", "suite"],
)
def test_images_smaller_than_the_family_allows_are_refused(t5_alone: Family, load: Any, name: str, key: str):
    with pytest.raises(ValueError, match="expected at least 320 pixels for T5 alone, got 304"):
        load(name, [f"diffusion_model.family={t5_alone.name}", f"{key}=304"])


def test_a_clip_of_stable_diffusion_3_without_its_t5_cannot_teach():
    clip = SimpleNamespace(cond_stage_model=sd3_clip(clip_l=False, clip_g=False, t5=False)())
    with pytest.raises(ValueError, match=r"expected one of Stable Diffusion 3 with T5-XXL.(.|\n)*What to do: connect"):
        text_encoder_files(clip, FAMILIES["sd3"])
