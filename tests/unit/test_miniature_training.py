"""The teacher's texts and task, and training that goes on bit for bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distilled_t5.encoder.files import open_student
from distilled_t5.miniature.autoencoder import latents, vae_tensors
from distilled_t5.miniature.corpus import draw_text
from distilled_t5.miniature.corruption import FIRST_SENTINEL, corrupt, noise_spans
from distilled_t5.miniature.teacher import IGNORED, NEIGHBOURS, Pretraining, save_teacher
from distilled_t5.miniature.training import Plan, Trainee, train
from distilled_t5.students.t5 import T5
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.spans import restore
from distilled_t5.world.captions import draw_prompt, write_prompts
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.slow

TINY = StudentLayout(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, vocab_size=50)
PACK = Path(__file__).resolve().parents[2]
PLAN = Plan(steps=6, batch=4, warmup_steps=2, save_every=2, log_every=1)


def test_the_corruption_of_a_text_by_hand():
    tokens = [10, 11, 12, 13, 14, 15]
    inputs, targets = corrupt(tokens, [(1, 3), (5, 6)])
    assert inputs == [10, FIRST_SENTINEL, 13, 14, FIRST_SENTINEL - 1, T5.end]
    assert targets == [FIRST_SENTINEL, 11, 12, FIRST_SENTINEL - 1, 15, T5.end]
    assert restore(inputs, targets) == tokens


@pytest.mark.parametrize("length", [2, 3, 7, 20, 43, 500])
def test_spans_hide_fifteen_percent_in_stretches_of_three_and_the_text_can_be_restored(length):
    random = np.random.RandomState(0)
    for _ in range(50):
        spans = noise_spans(length, random)
        hidden = sum(end - first for first, end in spans)
        assert hidden == max(1, round(0.15 * length))
        assert len(spans) == max(1, round(hidden / 3))
        assert all(end < first for (_, end), (first, _) in itertools.pairwise(spans))
        tokens = [int(token) for token in random.randint(100, 30_000, length)]
        assert restore(*corrupt(tokens, spans)) == tokens


@pytest.mark.parametrize("length", [2, 5, 20, 43])
def test_every_place_of_a_text_is_hidden_at_some_time(length):
    random = np.random.RandomState(0)
    hidden = {place for _ in range(500) for first, end in noise_spans(length, random) for place in range(first, end)}
    assert hidden == set(range(length))


def test_texts_are_a_function_of_seed_and_index_and_a_third_of_them_are_captions():
    texts = [draw_text(0, index) for index in range(600)]
    assert texts == [draw_text(0, index) for index in range(600)]
    assert draw_text(1, 0) != texts[0]
    captions = {draw_prompt(0, index, "train")[1] for index in range(600)}
    assert 0.25 < sum(text in captions for text in texts) / len(texts) < 0.42


def test_what_texts_say_of_a_person_is_always_the_same():
    told = {text for index in range(2000) for text in draw_text(0, index).split(". ")}
    homes = {text.removesuffix(".") for text in told if text.startswith("Anna is ")}
    assert len(homes) == 1


def test_the_loss_is_that_of_transformers_own_t5_and_that_of_the_tokens_beside_each():
    model = Pretraining(TINY, seed=0)
    inputs, targets = torch.randint(2, 50, (3, 9)), torch.arange(TINY.vocab_size).repeat(3, 1)
    inputs[0, 6:], targets[1, 5:] = T5.pad, IGNORED
    expected = model.t5(input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=targets).loss
    encoded = model.t5.get_encoder()(input_ids=inputs, attention_mask=torch.ones_like(inputs)).last_hidden_state
    pairs = [
        (head(encoded[row, place]), int(inputs[row, place + offset]))
        for head, offset in zip(model.neighbours, NEIGHBOURS, strict=True)
        for row, place in itertools.product(range(3), range(9))
        if 0 <= place + offset < 9 and inputs[row, place] != T5.pad and inputs[row, place + offset] != T5.pad
    ]
    known = sorted({token for _, token in pairs})
    logits = torch.stack([hidden for hidden, _ in pairs]) @ model.t5.shared.weight[known].T * TINY.d_model**-0.5
    beside = cross_entropy(logits, torch.tensor([known.index(token) for _, token in pairs]))
    torch.testing.assert_close(model.loss(inputs, targets), expected + beside)


def loss_at(model: Pretraining) -> Callable[[int], torch.Tensor]:
    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        inputs, targets = (torch.randint(2, 50, (4, length), generator=generator) for length in (8, 4))
        return model.loss(inputs, targets)

    return loss


def run(folder: Path, resume: bool = False, stop_after: int | None = None, plan: Plan = PLAN) -> Trainee | None:
    model = Pretraining(TINY, seed=0)
    steps = iter(range(1, 1000))
    return train(model, loss_at(model), plan, {}, folder, resume, lambda: next(steps) == stop_after)


def test_a_run_that_was_stopped_and_resumed_ends_bit_for_bit_where_one_in_a_piece_does(tmp_path):
    whole = run(tmp_path / "whole")
    assert run(tmp_path / "parts", stop_after=3) is None
    resumed = run(tmp_path / "parts", resume=True)
    assert whole is not None
    assert resumed is not None
    for name, weight in whole.averaged().items():
        assert torch.equal(weight, resumed.averaged()[name]), name
    for (name, weight), other in zip(whole.module.state_dict().items(), resumed.module.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
    losses = [[json.loads(line)["loss"] for line in (tmp_path / part / "metrics.jsonl").open()] for part in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_bfloat16_computes_otherwise_and_keeps_the_weights_in_float32(tmp_path):
    usual, coarse = run(tmp_path / "usual"), run(tmp_path / "coarse", plan=replace(PLAN, bf16=True))
    assert usual is not None
    assert coarse is not None
    assert {weight.dtype for weight in coarse.averaged().values()} == {torch.float32}
    assert any(not torch.equal(weight, coarse.averaged()[name]) for name, weight in usual.averaged().items())


def test_a_damaged_last_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop_after=5)
    broken = tmp_path / "parts" / "checkpoints" / "step-000005" / "state.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    resumed = run(tmp_path / "parts", resume=True)
    assert whole is not None
    assert resumed is not None
    assert all(torch.equal(weight, resumed.averaged()[name]) for name, weight in whole.averaged().items())
    assert [path.name for path in broken.parent.parent.glob("*.broken")] == ["step-000005.broken"]


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    run(tmp_path, stop_after=3)
    with pytest.raises(ValueError, match="made with other options"):
        run(tmp_path, resume=True, plan=replace(PLAN, batch=PLAN.batch + 1))


def test_a_run_that_was_lengthened_in_time_is_the_one_that_was_planned_longer(tmp_path):
    longer = replace(PLAN, steps=2 * PLAN.steps)
    planned = run(tmp_path / "planned", plan=longer)
    run(tmp_path / "lengthened", stop_after=PLAN.steps - PLAN.decay_steps)
    lengthened = run(tmp_path / "lengthened", plan=longer, resume=True)
    assert planned is not None
    assert lengthened is not None
    assert all(torch.equal(weight, lengthened.averaged()[name]) for name, weight in planned.averaged().items())


@pytest.mark.parametrize(("stop_after", "steps"), [(PLAN.steps - PLAN.decay_steps + 1, 2 * PLAN.steps), (3, 3)], ids=["longer", "shorter"])
def test_another_length_is_refused_once_the_rate_falls(tmp_path, stop_after, steps):
    run(tmp_path, stop_after=stop_after)
    with pytest.raises(ValueError, match=f"resume with --steps {PLAN.steps}"):
        run(tmp_path, plan=replace(PLAN, steps=steps), resume=True)


def test_a_folder_with_a_run_is_not_started_over(tmp_path):
    run(tmp_path, stop_after=3)
    with pytest.raises(ValueError, match="--resume"):
        run(tmp_path)


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_all_else():
    model = Pretraining(TINY, seed=0)
    trainee = Trainee(model, PLAN)
    names = {id(weight): name for name, weight in model.named_parameters()}
    muon, adamw = trainee.optimizer.param_groups
    groups = {kind: {names[id(weight)] for weight in group["params"]} for kind, group in (("muon", muon), ("adamw", adamw))}
    assert groups["muon"] | groups["adamw"] == set(names.values())
    assert all("block" in name and "layer_norm" not in name and "relative" not in name for name in groups["muon"])
    assert "t5.shared.weight" in groups["adamw"]


def test_the_rate_rises_stays_and_falls_over_the_last_part_to_nothing():
    plan = Plan(steps=100, warmup_steps=10)
    assert [plan.rate(step) for step in (0, 9, 70, 85, 97)] == [0.1, 1.0, 1.0, 0.5, 0.1]
    assert (plan.level_at(70), plan.level_at(71)) == (True, False)


def test_the_average_is_of_the_last_steps():
    model = Pretraining(TINY, seed=0)
    trainee = Trainee(model, Plan(steps=50, warmup_steps=1, average_steps=2))
    for _ in range(8):
        trainee.advance(loss_at(model))
    before = {name: value.clone() for name, value in trainee.average.items()}
    trainee.advance(loss_at(model))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(trainee.average[name], (before[name] + weight.detach()) / 2)


def test_the_teachers_file_is_a_complete_encoder_whose_metadata_says_that_it_has_no_projection(tmp_path):
    weights = Pretraining(TINY, seed=0).state_dict()
    file = open_student(save_teacher(tmp_path / "t.safetensors", weights, TINY, {}, torch.float32))
    assert file.layout == TINY
    assert (file.metadata.projection, file.metadata.text_width, file.metadata.pooled) == ("none", 16, "zero")
    assert torch.equal(file.load()["encoder.shared.weight"], weights["t5.shared.weight"])


def test_the_vae_scale_is_one_and_latents_of_images_are_between_minus_one_and_one():
    assert float(vae_tensors()["vae_scale"]) == 1.0
    latent = latents(torch.rand(2, 4, 4, 3))
    assert latent.shape == (2, 16, 4, 4)
    assert latent.abs().max() <= 1
    assert not latent[:, 3:].any()


@pytest.mark.parametrize("count", [1000, pytest.param(6000, marks=pytest.mark.full)])
def test_the_shipped_corpora_are_what_the_code_writes(tmp_path, count):
    for path in write_prompts(tmp_path / "new", count):
        shipped = (PACK / "miniature" / "prompts" / path.name).read_bytes().splitlines(keepends=True)
        assert path.read_bytes() == b"".join(shipped[:count])
        assert len(shipped) == 6000


def test_each_corpus_holds_captions_of_its_own_tasks(tmp_path):
    objects, semantics, text = (path.read_text(encoding="utf-8").splitlines() for path in write_prompts(tmp_path, 30))
    assert objects == [draw_prompt(0, index, "train", "single_object")[1] for index in range(30)]
    assert text[1::2] == [draw_prompt(0, index, "train", "two_words")[1] for index in range(1, 30, 2)]
    assert len(semantics) == 30
