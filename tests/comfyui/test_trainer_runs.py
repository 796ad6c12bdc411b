"""Whole runs of the command, as a user starts it: ends in a file for the node, stops when asked, goes on exactly, explains itself."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from statistics import fmean

import folder_paths
import pytest
import torch
from distilled_t5.encoder.files import open_student
from distilled_t5.runtime.random_weights import drawn
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.students.t5.trained import DistilledT5, transformers_config
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.small_encoders import embedding, serve, student_file
from distilled_t5.tests.support.small_flux import FLUX
from distilled_t5.tests.support.trainer import QUICK, command, finish, metrics, start, wait_for_step
from distilled_t5.train.distill import NotFinite
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.run import train
from distilled_t5.train.state import read_checkpoint
from distilled_t5.train.workshop import open_workshop
from safetensors.torch import save_file
from transformers import T5EncoderModel

# Sixteen to train on and two to hold out.
ANIMALS = ["cat", "dog", "fox", "owl", "cow", "pig", "hen", "bee", "ant", "bat", "elk", "emu", "gnu", "yak", "koi", "cod", "asp", "jay"]
TOTAL_STEPS = 40
# Long enough to be stopped in the middle.
LONGER = [*QUICK, f"stage.1.steps={TOTAL_STEPS - 2}", "validation.every_steps=20", "checkpoints.every_steps=20"]


@pytest.fixture(scope="module")
def whole(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run without interruption: its folder, and ComfyUI's base folder."""
    folder = tmp_path_factory.mktemp("whole")
    finish(command(comfyui_path, folder / "base", folder / "run", settings=LONGER), folder)
    return folder / "run", folder / "base"


def test_a_run_directory_explains_itself(whole):
    run, _ = whole
    assert {"recipe.toml", "metrics.jsonl", "train.log", "checkpoints", "samples"} <= {path.name for path in run.iterdir()}
    losses = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, TOTAL_STEPS + 1))
    assert {"sigma", "gradient_norm", "learning_rate", "samples_per_s"} <= losses[0].keys()
    held_out = [line for line in metrics(run) if "held_out_loss" in line]
    assert [line["step"] for line in held_out] == [20, 40]
    assert held_out[0]["held_out_samples"] == 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000020", "step-000040"]


def test_the_file_loads_in_the_loader_and_gives_the_embedding_that_the_trainer_computes(whole):
    run, base = whole
    path = base / "models" / "text_encoders" / "distilled_t5_smoke.safetensors"
    file = open_student(path)
    assert file.metadata.facts["distilled_t5.steps"] == "40"
    assert (file.metadata.token_length, file.metadata.pooled) == (16, "zero")
    assert open_student(run / "checkpoints" / "step-000040" / "student.safetensors").layout == file.layout
    student = DistilledT5(file.layout)
    student.load_tensors(read_checkpoint(run / "checkpoints" / "step-000040").student)
    clip = serve(path).clip
    token_ids = torch.tensor([[token for token, _ in clip.tokenize("a cat on a sign")["t5xxl"][0]]])
    with torch.no_grad():
        expected = student.train(False)(token_ids)
    assert (embedding(clip, "a cat on a sign") - expected).abs().max() <= 1e-4


def test_stopping_and_going_on_gives_the_run_without_interruption_bit_for_bit(whole, comfyui_path, tmp_path):
    run, base = tmp_path / "run", tmp_path / "base"
    process = start(command(comfyui_path, base, run, settings=LONGER), tmp_path)
    wait_for_step(process, run, 3)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    assert said.endswith("Stopped; continue with --resume.\n")
    stopped_at = metrics(run)[-1]["step"]
    assert 3 <= stopped_at < TOTAL_STEPS
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{stopped_at:06d}"]
    assert not list(base.rglob("distilled_t5_smoke*"))
    finish(command(comfyui_path, base, run, "--resume", settings=LONGER), tmp_path)
    ours, theirs = (read_checkpoint(folder / "checkpoints" / "step-000040") for folder in (run, whole[0]))
    assert same(ours.student, theirs.student)
    assert same(ours.optimizer, theirs.optimizer)
    losses = [[(line["step"], line["loss"]) for line in metrics(folder) if "loss" in line] for folder in (run, whole[0])]
    assert losses[0] == losses[1]


@pytest.mark.full
def test_a_tiny_student_overfits_sixteen_prompts_through_the_command(comfyui_path, tmp_path):
    """Each step draws new noise, so a low training loss cannot come from memorised noise."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a {animal} on a sign\n" for animal in ANIMALS), encoding="utf-8")
    stages = ["resolution_px=32", "batch=4", "objective=velocity", f"corpora.0.path={prompts}"]
    settings = [
        *(f"stage.{number}.{setting}" for number in (0, 1) for setting in stages),
        "stage.0.steps=4",
        "stage.1.steps=96",
        f"teacher.t5={student_file(tmp_path)}",
        "student.layout={d_model=64, d_ff=128, num_layers=3, num_heads=3, d_kv=16, gated=true}",
        "optimizer.learning_rate=3e-3",
        "diffusion_model.checkpoint_blocks=false",
        "sampling.token_lengths=[12]",
        "validation.prompts=2",
        "validation.every_steps=20",
        "checkpoints.every_steps=100",
    ]
    finish(command(comfyui_path, tmp_path / "base", tmp_path / "run", settings=settings), tmp_path)
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    held_out = [line["held_out_loss"] for line in metrics(tmp_path / "run") if "held_out_loss" in line]
    # Whole trajectories of four steps, because the loss depends on the noise level. An eighth was seen.
    assert fmean(losses[-16:]) < fmean(losses[:4]) / 5
    # On prompts never trained on, from step 20 on: 1 / 1.6 was seen.
    assert held_out[-1] < held_out[0] / 1.3


def test_ten_losses_in_a_row_that_are_not_finite_end_a_run_with_all_saved_and_it_may_try_again(tmp_path):
    spoilt = drawn(FLUX.tensors(), seed=2)
    spoilt["final_layer.linear.bias"][0] = math.nan
    save_file(spoilt, tmp_path / "flux.safetensors")
    recipe = load_recipe("smoke", [*LONGER, f"diffusion_model.file={tmp_path / 'flux.safetensors'}"])
    # Two steps of the naive objective, which does without the diffusion model, then nothing but NaN.
    for resume, stopped_at in ((False, 12), (True, 22)):
        with pytest.raises(NotFinite, match="not finite is the diffusion model's velocity for the teacher's text"):
            train(recipe, tmp_path / "run", resume, Ranks())
        state = read_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{stopped_at:06d}")
        assert (state.step, state.skipped_steps) == (stopped_at, stopped_at - 2)
        assert all(tensor.isfinite().all() for tensor in state.student.values())
    losses = {line["step"]: line["loss"] for line in metrics(tmp_path / "run") if "loss" in line}
    assert [step for step, loss in losses.items() if loss is not None] == [1, 2]


def test_a_student_with_non_finite_weights_ends_the_run_with_advice_and_replaces_no_checkpoint(comfyui_path, tmp_path):
    settings = [*QUICK, "optimizer.warmup_steps=0", "optimizer.learning_rate=1e30", "checkpoints.every_steps=6"]
    said = finish(command(comfyui_path, tmp_path, tmp_path / "run", settings=settings), tmp_path, code=1)
    assert "the student's weights are no longer finite" in said
    assert "What to do: start a new run with a lower optimizer.learning_rate" in said
    assert "download" not in said
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_another_recipe_is_not_resumed_and_the_differences_are_listed(whole, comfyui_path, tmp_path):
    said = finish(command(comfyui_path, tmp_path, whole[0], "--resume", "--set", "optimizer.learning_rate=0.5"), tmp_path, code=1)
    assert "optimizer.learning_rate: 0.001 -> 0.5" in said
    assert "What to do" in said


def test_a_run_that_is_there_is_not_started_over(whole, comfyui_path, tmp_path):
    said = finish(command(comfyui_path, tmp_path, whole[0]), tmp_path, code=1)
    assert "continue with --resume" in said


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.learning_rat=1", "learning_rate"),
        ("diffusion_model.file=no_such.safetensors", "no_such.safetensors was not found"),
        ("sampling.guidance=[]", "needs guidance"),
        *(
            pytest.param(*row, marks=pytest.mark.full)
            for row in [
                ("stage.0.resolution_px=100", "multiple of 16"),
                ("teacher.t5=no_such.safetensors", "no_such.safetensors was not found"),
                ("student.start=no_such_folder", "no_such_folder was not found"),
                ("preview.vae=1", "preview.vae"),
            ]
        ),
    ],
)
def test_invalid_settings_are_reported_before_training(comfyui_path, tmp_path, setting, message):
    said = finish(command(comfyui_path, tmp_path, tmp_path / "run", "--set", setting), tmp_path, code=1)
    assert message in said
    assert "What to do" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints" / "step-000004").exists()


def test_a_student_starts_from_a_sharded_hugging_face_folder_in_text_encoders():
    recipe = load_recipe("smoke", ["student.start=flan-t5-tiny"])
    pretrained = T5EncoderModel(transformers_config(recipe.student_layout(4096)))
    pretrained.save_pretrained(Path(folder_paths.get_folder_paths("text_encoders")[0]) / "flan-t5-tiny", max_shard_size="5MB")
    student = open_workshop(recipe, Ranks()).student
    assert same(dict(student.encoder.state_dict()), dict(pretrained.state_dict()))


def test_estimate_says_what_a_run_will_take_and_trains_nothing(comfyui_path, tmp_path):
    said = finish(command(comfyui_path, tmp_path, tmp_path / "run", "--estimate"), tmp_path)
    for part in ("diffusion model, frozen", "student's gradients", "embedding-first", "follow-the-steps", "s/step", "Disk:"):
        assert part in said
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob("distilled_t5_smoke*"))
