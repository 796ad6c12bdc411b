"""Every registered family trains a student along guided trajectories, and ComfyUI serves what was trained."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import comfy.sample
import pytest
import torch
from distilled_t5.encoder.files import open_student, write_student
from distilled_t5.families import FAMILIES
from distilled_t5.families.family import Family
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.small_encoders import serve
from distilled_t5.tests.support.trainer import command, finish, start, teacher_of, wait_for_step
from distilled_t5.train.banner import facts_of
from distilled_t5.train.batches import Place, preview_batches
from distilled_t5.train.distill import train_step
from distilled_t5.train.models import make_student_of, metadata_of
from distilled_t5.train.objectives import OBJECTIVES
from distilled_t5.train.optimizer import restart
from distilled_t5.train.preview import Previewer
from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.train.run import train
from distilled_t5.train.state import read_checkpoint
from distilled_t5.train.validation import HeldOut
from distilled_t5.train.workshop import Workshop, open_workshop

NEW = {name: family for name, family in FAMILIES.items() if name != "flux"}
# Their texts of 512 tokens take long on a CPU.
KLEIN = ("flux2_klein_4b", "flux2_klein_9b")
PROMPTS = ["a red cube left of a blue ball", "", "low quality"]
# The students of kinds that the smoke recipe is not about.
STUDENTS = {"qwen3": ["student.layout={hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1}"]}
FIRST, STEPS = Place(stage=1, trajectory=0, step=0), 6


def settings_of(family: Family, *more: str) -> list[str]:
    side = max(64, family.least_side_px)
    return [
        f"diffusion_model.family={family.name}",
        "sampling.guidance=[]",
        "sampling.cfg=[4.5, 7.0]",
        "sampling.negatives=0.3",
        f"sampling.token_lengths=[{max(16, family.token_length)}]",
        "teacher.chunk_prompts=4",
        "validation.prompts=2",
        "optimizer.warmup_steps=0",
        "optimizer.learning_rate=2e-4",
        *(f"stage.{stage}.resolution_px={side}" for stage in (0, 1)),
        *STUDENTS.get(family.students[0], []),
        *more,
    ]


def recipe_of(family: Family, *more: str) -> Recipe:
    return load_recipe("smoke", settings_of(family, *more))


@pytest.fixture(
    scope="module",
    params=[pytest.param(family, id=name, marks=[pytest.mark.full] if name in KLEIN else []) for name, family in NEW.items()],
)
def workshop(request: pytest.FixtureRequest) -> Workshop:
    return open_workshop(recipe_of(request.param), Ranks())


@pytest.mark.every_version
def test_both_objectives_lower_their_loss_and_the_served_student_gives_the_trained_embeddings(workshop: Workshop, tmp_path: Path):
    family, model = workshop.recipe.family, workshop.model
    with model.differentiable(True):
        for name in ("embedding", "velocity"):
            positions = moved = workshop.starts_at(FIRST)
            losses = []
            restart(workshop.learner.optimizer)
            for _ in range(STEPS):
                [report], moved = train_step(positions, model, workshop.learners, OBJECTIVES[name])
                losses.append(report.loss)
                assert not report.dropped
            assert losses[-1] < losses[0], (name, losses)
            if name == "velocity":
                assert all(not torch.equal(before.x, after.x) for before, after in zip(positions, moved, strict=True))
                assert all(position.unconditional is not None and position.cfg_B is not None for position in positions)

    path = write_student(tmp_path / "student.safetensors", workshop.student.tensors(), metadata_of(workshop.recipe, STEPS))
    clip = serve(path, family=family.name).clip
    workshop.student.train(False)
    for prompt in PROMPTS:
        tokens = clip.tokenize(prompt)
        [(served_BLD, _)] = clip.encode_from_tokens_scheduled(tokens)
        ids_BL = torch.tensor([[token for token, *_ in tokens[family.part][0]]])
        with torch.no_grad():
            torch.testing.assert_close(served_BLD, workshop.embed(ids_BL), rtol=0, atol=1e-5)


def test_a_klein_follows_short_texts_from_a_cache_whose_layers_are_side_by_side(tmp_path: Path):
    family = FAMILIES["flux2_klein_4b"]
    settings = ["sampling.token_lengths=[16]", f"teacher.cache={tmp_path / 'cache'}", "sampling.cfg=[]"]
    opened = open_workshop(recipe_of(family, *SHORT, *settings), Ranks())
    positions = opened.starts_at(FIRST)
    assert all(position.text_BLD.shape[1:] == (16, 7680) for position in positions)
    with opened.model.differentiable(True):
        [report], moved = train_step(positions, opened.model, opened.learners, OBJECTIVES["velocity"])
    assert not report.dropped and 0 < report.loss < float("inf")
    assert all(not torch.equal(before.x, after.x) for before, after in zip(positions, moved, strict=True))


def test_the_run_says_which_of_the_familys_companions_the_teacher_has(workshop: Workshop):
    without = {"clip_l": "without CLIP-L", "clip_g": "without CLIP-G"}
    said = ["stand-in", *(without[name] for name in workshop.recipe.family.companions)]
    assert facts_of([workshop], None)["Teacher"] == ", ".join(said)


def test_a_run_that_is_opened_again_starts_its_trajectories_with_the_same_bits(workshop: Workshop):
    again = open_workshop(workshop.recipe, Ranks())
    for one, other in zip(workshop.starts_at(FIRST), again.starts_at(FIRST), strict=True):
        assert (
            torch.equal(one.x, other.x) and torch.equal(one.text_BLD, other.text_BLD) and torch.equal(one.token_ids_BL, other.token_ids_BL)
        )
        assert one.unconditional is not None and other.unconditional is not None and one.cfg_B is not None and other.cfg_B is not None
        assert torch.equal(one.unconditional[0], other.unconditional[0]) and torch.equal(one.cfg_B, other.cfg_B)
        assert (one.rows is None) == (other.rows is None)
        if one.rows is not None and other.rows is not None:
            assert one.rows.own == other.rows.own


# Prompts of several lengths, classifier-free guidance, a discrete schedule of noise levels, dropout.
SHORT = [
    *("stage.0.steps=1", "stage.1.steps=4", "sampling.steps=3", "student.dropout=0.1", "checkpoints.every_steps=2"),
    *("checkpoints.keep_last=9", "validation.every_steps=9", "preview.every_steps=9"),
]


def one_per_kind(family: Family) -> Any:
    """PixArt-Sigma and Chroma differ from PixArt-alpha in nothing that a resumed run depends on."""
    return pytest.param(family, id=family.name, marks=[pytest.mark.full] if family.name in ("pixart_sigma", "chroma", *KLEIN) else [])


def cut(run: Path, folder: Path) -> Path:
    """A copy of a run that has only its oldest checkpoint, in the middle of a trajectory."""
    oldest, *others = sorted((shutil.copytree(run, folder) / "checkpoints").iterdir())
    assert oldest.name == "step-000002" and others
    for newer in others:
        shutil.rmtree(newer)
    return folder


def ends_alike(run: Path, other: Path, *more: str) -> None:
    """Two runs have the same student, optimizer and positions at the end, and `more` parts of their state, to the bit."""
    ours, theirs = (read_checkpoint(each / "checkpoints" / "step-000005") for each in (run, other))
    for part in ("student", "optimizer", "position", *more):
        assert same(getattr(ours, part), getattr(theirs, part)), part


@pytest.mark.parametrize("family", list(map(one_per_kind, NEW.values())))
def test_a_run_goes_on_to_the_bit_from_within_a_trajectory(family: Family, tmp_path: Path):
    recipe = recipe_of(family, *SHORT)
    assert train(recipe, tmp_path / "run", False, Ranks()) is not None
    resumed = cut(tmp_path / "run", tmp_path / "cut")
    assert train(recipe, resumed, True, Ranks()) is not None
    ends_alike(resumed, tmp_path / "run", "rng")


def test_a_frozen_trunk_is_saved_as_it_started_and_its_run_goes_on_to_the_bit(tmp_path: Path):
    recipe = load_recipe("smoke-z-image", [*SHORT, "teacher.chunk_prompts=4", "validation.prompts=2", "stage.1.steps=4"])
    [path] = train(recipe, tmp_path / "run", False, Ranks()) or []
    begun, ended = make_student_of(recipe).tensors(), open_student(path).load()
    changed = {name for name in begun if not torch.equal(begun[name], ended[name].float())}
    assert changed == {name for name in begun if name.startswith("final_projection.")}
    resumed = cut(tmp_path / "run", tmp_path / "cut")
    assert train(recipe, resumed, True, Ranks()) is not None
    ends_alike(resumed, tmp_path / "run", "rng")


@pytest.mark.full
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
@pytest.mark.parametrize("family", NEW.values(), ids=list(NEW))
def test_a_killed_run_goes_on_to_the_bit(family: Family, comfyui_path: Path, tmp_path: Path):
    settings = settings_of(family, *SHORT)
    whole, killed = (command(comfyui_path, tmp_path / "base", tmp_path / name, settings=settings) for name in ("whole", "killed"))
    finish(whole, tmp_path)
    process = start(killed, tmp_path)
    wait_for_step(process, tmp_path / "killed", 3)
    process.kill()
    process.wait()
    finish(command(comfyui_path, tmp_path / "base", tmp_path / "killed", "--resume", settings=settings), tmp_path)
    # Python's own generator, which the trainer does not use, starts elsewhere in each process.
    ends_alike(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.full
def test_a_run_with_clip_l_and_clip_g_goes_on_to_the_bit(stand_ins: Path, tmp_path: Path):
    folder = stand_ins / "models" / "text_encoders"
    companions = (f"teacher.{name}={folder / name}.safetensors" for name in ("clip_l", "clip_g"))
    recipe = recipe_of(FAMILIES["sd3"], *SHORT, *companions)
    paths = train(recipe, tmp_path / "run", False, Ranks())
    assert paths is not None and open_student(paths[0]).metadata.pooled == "clip_l+clip_g"
    resumed = cut(tmp_path / "run", tmp_path / "cut")
    assert train(recipe, resumed, True, Ranks()) is not None
    ends_alike(resumed, tmp_path / "run", "rng")


def test_the_held_out_loss_is_finite_and_the_teachers_preview_is_the_stock_samplers_image(workshop: Workshop):
    recipe, model = workshop.recipe, workshop.model
    [gaps], count = HeldOut(workshop).losses()
    assert count == recipe.validation.prompts and all(0 < gap < float("inf") for gap in gaps.values())

    teacher, student = Previewer(workshop)._latents()
    clip, [batch] = teacher_of(workshop).clip, preview_batches(recipe)
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in (batch.prompts[0], ""))
    noise, steps = batch.drawn.noise, recipe.sampling.steps
    assert batch.drawn.cfg_B is not None
    cfg = float(batch.drawn.cfg_B)
    expected = comfy.sample.sample(
        model.patcher, noise, steps, cfg, "euler", "simple", positive, negative, torch.zeros_like(noise), disable_pbar=True, seed=0
    )
    torch.testing.assert_close(teacher, expected.cpu(), rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert student.isfinite().all() and not torch.equal(student, teacher)


def test_prompts_are_encoded_alike_in_any_batch(workshop: Workshop):
    ids = teacher_of(workshop).token_ids(PROMPTS, 16)
    longest = max(map(len, ids))
    kind = workshop.recipe.family.kind
    workshop.student.train(False)
    with torch.no_grad():
        together = workshop.embed(torch.tensor([kind.fit(each, longest) for each in ids]))
        for place, each in enumerate(ids):
            torch.testing.assert_close(together[place, : len(each)], workshop.embed(torch.tensor([each]))[0], rtol=0, atol=1e-5)
