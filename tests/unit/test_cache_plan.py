"""Which texts a run takes from its teacher: exactly those of its batches, whatever the number of processes."""

from __future__ import annotations

import pytest
from distilled_t5.prompts.negatives import NEGATIVES
from distilled_t5.train.batches import Schedule, preview_batches
from distilled_t5.train.cache_plan import expected, key_of, of_an_estimate, text_bytes, wanted
from distilled_t5.train.recipe import Recipe, load_recipe

SETTINGS = ["stage.0.steps=10", "stage.1.steps=23", "sampling.steps=4", "sampling.token_lengths=[16, 24, 32]", "validation.prompts=5"]
GUIDED = ["diffusion_model.family=sd3", "sampling.guidance=[]", "sampling.cfg=[4.5, 7.0]", "sampling.negatives=0.3"]


def recipe(*more: str) -> Recipe:
    return load_recipe("smoke", [*SETTINGS, *more])


@pytest.mark.parametrize("more", [[], ["preview.vae=vae.safetensors"], GUIDED, ["sampling.token_lengths=[16]"]], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_texts_are_those_that_the_processes_take(more, ranks):
    one = recipe(*more)
    schedules = [Schedule(one, rank, ranks) for rank in range(ranks)]
    batches = [batch for schedule in schedules for batch in schedule.held_out_batches()]
    batches += preview_batches(one) if one.preview.vae else []
    for stage in range(2):
        for trajectory in range(schedules[0].trajectories(stage)):
            batches += [batch for schedule in schedules for batch in schedule.batches(stage, trajectory)]
    taken = {(prompt, batch.drawn.token_length) for batch in batches for prompt in batch.prompts}
    if one.sampling.cfg:
        taken |= {("", batch.drawn.token_length) for batch in batches}
    found = wanted(schedules[-1])
    assert set(found.values()) == taken and len({length for _, length in taken}) in (1, 3)
    assert all(key == key_of(*text) for key, text in found.items())


@pytest.mark.parametrize("more", [[], ["sampling.token_lengths=[16]"], ["stage.1.steps=900"], ["stage.1.trajectory_steps=1"]], ids=str)
def test_the_number_that_a_rehearsal_expects_is_about_that_of_the_run(more):
    one = recipe(*more)
    plan, found = expected(one, 4096), wanted(Schedule(one))
    assert plan.known and plan.texts == pytest.approx(len(found), rel=0.1)
    assert plan.size == pytest.approx(sum(text_bytes(one, length, 4096) for _, length in found.values()), rel=0.1)
    assert str(plan).startswith(f"about {plan.texts:,.0f} texts, ")


@pytest.mark.parametrize(("objective", "sampled"), [("embedding", False), ("whitened", True)])
def test_an_estimate_takes_the_prompts_of_the_variance_of_those_stages_alone_that_measure_it(objective, sampled):
    schedule = Schedule(recipe(f"stage.0.objective={objective}", "sampling.token_lengths=[16]"))
    first = {prompt for stage in range(2) for batch in schedule.first(stage) for prompt in batch.prompts}
    found = {prompt for prompt, _ in of_an_estimate(schedule).values()}
    assert first <= found and (len(found) > len(first)) == sampled


def test_without_the_prompts_the_number_is_at_most_that_of_the_draws():
    one = load_recipe("schnell-24gb", ["teacher.cache=cache", "preview.vae=''"])
    [stages] = [one.stages]
    drawn = sum(-(-stage.steps // one.sampling.steps) * stage.batch * stage.accumulate for stage in stages)
    plan = expected(one, 4096)
    assert not plan.known and plan.texts == drawn + one.validation.prompts and str(plan).startswith("at most ")


def test_without_the_prompts_the_number_is_at_most_that_of_their_corpora_where_these_are_limited():
    one = load_recipe("flux-overnight-12gb", ["sampling.token_lengths=[77, 256]", "preview.vae=''"])
    sizes = [4200, 20_000, 146, 64, 1 + len(NEGATIVES)]
    assert str(expected(one, 4096)).startswith(f"at most {2 * sum(sizes):,} texts, ")


def test_a_text_takes_two_bytes_or_one_for_each_channel_of_each_token():
    flux = ["teacher.cache=cache", "sampling.token_lengths=[256]"]
    bf16, fp8 = (text_bytes(recipe(*flux, f"teacher.cache_format={name}"), 256, 4096) for name in ("bf16", "fp8"))
    assert bf16 == 256 * (4096 * 2 + 4) + 768 * 4
    assert fp8 == 256 * (4096 + 4 + 4) + 768 * 4


def test_a_recipe_without_a_cache_has_the_digest_that_it_had_before():
    plain = recipe()
    assert "cache" not in plain.to_toml()
    assert recipe("teacher.cache_format=fp8").sha256 == plain.sha256 != recipe("teacher.cache=cache").sha256
    kept = load_recipe("smoke", ["teacher.cache=/home/me/cache", "teacher.cache_format=fp8"]).without_folders()
    assert (kept.teacher.cache, kept.teacher.cache_format) == ("cache", "fp8")
