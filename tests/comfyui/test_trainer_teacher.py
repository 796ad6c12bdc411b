"""The trainer's use of its teacher: each prompt once, in chunks, and the very text that ComfyUI's own nodes give."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from distilled_t5.diffusion.frozen import usable_bytes
from distilled_t5.encoder.teacher import Teacher, load_teacher
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.small_encoders import encode, stock_flux_clip, student_file
from distilled_t5.tests.support.trainer import teacher_of
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.report import Reporter
from distilled_t5.train.run import train
from distilled_t5.train.state import TrainerState, read_checkpoint
from distilled_t5.train.teacher_chunks import TeacherChunks
from distilled_t5.train.validation import HeldOut, lower
from distilled_t5.train.workshop import open_workshop

# Trajectories of 2 steps and 4 prompts: one of stage 0, and five of stage 1, of which the last is cut short.
STEPS = 11
SETTINGS = [
    "stage.0.steps=2",
    "stage.1.steps=9",
    "sampling.steps=2",
    "teacher.chunk_prompts=8",
    "validation.prompts=3",
    "validation.every_steps=4",
    "checkpoints.every_steps=50",
    "student.dropout=0.1",
]
CHUNKS = 1 + 3
LENGTH = 256
PLAIN = {
    "short": "a cat on a sign",
    "empty": "",
    "spaces": "  two  spaces, and one at the end ",
    "lines": "a line\nand another\ttab",
    "backslash": "C:\\path \\ and more",
    "not English": "ein schoenes Haus, na\u00efve caf\u00e9 \u4f60\u597d",
    "longer than CLIP": "a red cube left of a blue ball beside a green cone under a grey cloud, " * 6,
    "longer than T5": "word " * 400,
}


def recipe(*more: str) -> Any:
    return load_recipe("smoke", [*SETTINGS, *more])


def last_state(run: Path) -> TrainerState:
    return read_checkpoint(run / "checkpoints" / f"step-{STEPS:06d}")


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["step"], line.get("loss", line.get("held_out_loss"))) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(recipe(), run, False, Ranks()) is not None
    return run


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, ...], int]]:
    """What the teacher is given while a test runs: prompts that are encoded together, and their token length."""
    calls: list[tuple[tuple[str, ...], int]] = []
    encode_batch = Teacher.encode

    def watched_encode(self: Teacher, prompts: tuple[str, ...], length: int, **settings: Any) -> Any:
        calls.append((tuple(prompts), length))
        return encode_batch(self, prompts, length, **settings)

    monkeypatch.setattr(Teacher, "encode", watched_encode)
    return calls


def test_teacher_and_diffusion_model_change_places_once_per_chunk(tmp_path, monkeypatch, encoded):
    turns, room, load = [], [], comfy.model_management.load_models_gpu

    def watched_load(models: Any, *more: Any, **named: Any) -> Any:
        kind = "diffusion" if hasattr(models[0].model, "diffusion_model") else "teacher"
        turns.extend([kind] if turns[-1:] != [kind] else [])
        room.extend([named["memory_required"]] if kind == "diffusion" else [])
        return load(models, *more, **named)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watched_load)
    workshop = open_workshop(recipe(), Ranks())
    turns.clear()
    encoded.clear()
    train(recipe(), tmp_path / "run", False, Ranks())
    assert workshop.rehearsal is not None
    usable = usable_bytes(workshop.model.device)
    asked = {workshop.rehearsal.room(has_moments, usable) for has_moments in (False, True)}
    assert set(room) == asked, "ComfyUI must leave room for training, with AdamW's moments from the first step on"
    # One prompt gives the teacher's width before training; held-out prompts are encoded once for three validations.
    assert turns == ["teacher", "diffusion"] * (CHUNKS + 2), "and once for the trial of the second stage"
    trained = [batch for stage, count in ((0, 1), (1, 5)) for number in range(count) for batch in workshop.schedule.batches(stage, number)]
    batches = [(batch.prompts, batch.drawn.token_length) for batch in [*trained, *workshop.schedule.held_out_batches()]]
    assert sum(len(prompts) for prompts, _ in batches) == 6 * 4 + 3
    trial = [(batch.prompts, batch.drawn.token_length) for batch in workshop.schedule.batches(1, 0)]
    rehearsed = (("a", "a"), 32)  # a batch of the greatest length, without numbers; once for equal recipes
    assert sorted(each for each in encoded if each != rehearsed) == sorted([(("a",), 2), *trial, *batches])


def test_after_a_resume_every_batch_is_encoded_with_the_same_composition(encoded):
    """On a GPU the last bits depend on batch composition, which a small model on a CPU does not show."""
    workshop = open_workshop(recipe(), Ranks())
    calls = []
    for first in (0, 1):
        encoded.clear()
        chunks = TeacherChunks(workshop.teacher, workshop.schedule, 8)
        texts = [chunks.take(1, number) for number in range(first, 5)]
        calls.append(list(encoded))
    assert calls[1] == calls[0][2:]
    assert len({length for _, length in calls[0]}) == 2
    for text, batch in zip(texts[-1], workshop.schedule.batches(1, 4), strict=True):
        assert torch.equal(text.token_ids_BL, torch.tensor(teacher_of(workshop).token_ids(batch.prompts, batch.drawn.token_length)))


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(3, id="first trajectory of a chunk", marks=pytest.mark.full),
        pytest.param(5, id="second trajectory of a chunk"),
        pytest.param(6, id="between chunks"),
        pytest.param(7, id="first of the next", marks=pytest.mark.full),
    ],
)
def test_a_run_stopped_within_a_chunk_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, step):
    run, report = tmp_path / "run", Reporter.step

    def stop_at(self: Reporter, number: int, *more: Any, **named: Any) -> None:
        report(self, number, *more, **named)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "step", stop_at)
        assert train(recipe(), run, False, Ranks()) is None
    assert (run / "checkpoints" / f"step-{step:06d}").is_dir()
    assert train(recipe(), run, True, Ranks()) is not None
    ours, theirs = last_state(run), last_state(whole)
    for part in ("student", "optimizer", "rng", "position", "best"):
        assert same(getattr(ours, part), getattr(theirs, part)), part
    assert losses(run) == losses(whole)


def test_the_size_of_chunks_changes_no_number(whole, tmp_path):
    run = tmp_path / "run"
    assert train(recipe("teacher.chunk_prompts=1"), run, False, Ranks()) is not None
    assert same(last_state(run).student, last_state(whole).student)
    assert losses(run) == losses(whole)


def test_held_out_prompts_are_encoded_once_and_the_loss_equals_that_of_encoding_them_again():
    workshop = open_workshop(recipe(), Ranks())
    held_out = HeldOut(workshop)
    first, again = held_out.losses(), held_out.losses()
    assert first == again == HeldOut(workshop).losses()
    assert first[1] == 3


@pytest.fixture(scope="module", params=["T5-XXL", "distilled"])
def teacher(request: pytest.FixtureRequest, stand_ins: Path, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    clip_l = stand_ins / "models" / "text_encoders" / "clip_l.safetensors"
    if request.param == "T5-XXL":
        return Teacher(stock_flux_clip(clip_l))
    return load_teacher(student_file(tmp_path_factory.mktemp("teacher")), {"clip_l": clip_l})


@pytest.mark.parametrize("prompt", PLAIN.values(), ids=PLAIN)
def test_the_teachers_embedding_equals_that_of_the_stock_node(teacher, prompt):
    ours = teacher.encode([prompt], LENGTH)
    [[text_BLD, options]] = encode(teacher.clip, prompt)
    if text_BLD.shape[1] == LENGTH:
        torch.testing.assert_close(ours.text_BLD, text_BLD, atol=1e-6, rtol=0)
    else:
        [ids] = teacher.clip.tokenize(prompt)["t5xxl"]
        assert ours.token_ids_BL[0].tolist() == [*(token for token, _ in ids[: LENGTH - 1]), 1]
    torch.testing.assert_close(ours.pooled_BP, options["pooled_output"], atol=1e-6, rtol=0)


def test_a_prompts_parentheses_are_only_parentheses(teacher):
    prompt = "a (very:1.3) ((old)) cat \\(really\\)"
    ours = teacher.encode([prompt], LENGTH)
    [[text_BLD, options]] = encode(teacher.clip, prompt.replace("(", "\\(").replace(")", "\\)"))
    torch.testing.assert_close(ours.text_BLD, text_BLD, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.pooled_BP, options["pooled_output"], atol=1e-6, rtol=0)
    pieces = teacher.clip.tokenizer.t5xxl.tokenizer(prompt)["input_ids"]
    assert ours.token_ids_BL[0, : len(pieces)].tolist() == pieces


def test_prompts_encoded_together_are_those_encoded_alone(teacher):
    prompts = [PLAIN["short"], PLAIN["longer than CLIP"], PLAIN["empty"]]
    together = teacher.encode(prompts, LENGTH)
    alone = [teacher.encode([prompt], LENGTH) for prompt in prompts]
    assert together.pooled_BP.std() > 0.1
    for part in ("text_BLD", "pooled_BP"):
        torch.testing.assert_close(getattr(together, part), torch.cat([getattr(text, part) for text in alone]), atol=1e-4, rtol=1e-4)


def test_a_run_with_clip_l_trains_on_its_pooled_vectors(stand_ins, tmp_path):
    clip_l = stand_ins / "models" / "text_encoders" / "clip_l.safetensors"
    workshop = open_workshop(recipe(f"teacher.clip_l={clip_l}"), Ranks())
    batches = workshop.schedule.batches(1, 0)
    [position, _] = workshop.starts(batches, workshop.chunks.take(1, 0), 2)
    expected = torch.cat([encode(teacher_of(workshop).clip, prompt)[0][1]["pooled_output"] for prompt in batches[0].prompts])
    torch.testing.assert_close(position.extras["pooled_output"], expected, atol=1e-6, rtol=0)
    [by_band], _ = HeldOut(workshop).losses()
    [without], _ = HeldOut(open_workshop(recipe(), Ranks())).losses()
    assert by_band.keys() == without.keys() and by_band != without


def test_a_non_finite_held_out_loss_does_not_stay_the_best():
    assert [lower(None, 2.0), lower(2.0, 1.0), lower(1.0, 2.0), lower(1.0, math.nan)] == [2.0, 1.0, 1.0, 1.0]
    assert [lower(math.nan, 2.0), lower(math.inf, 3.0)] == [2.0, 3.0]
