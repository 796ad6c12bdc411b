"""Contact sheets of a run: right pictures, no trace in the run itself, and trouble that never ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingFlux
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.small_encoders import pooled, student_file
from distilled_t5.tests.support.trainer import teacher_of
from distilled_t5.train.batches import preview_batches, usual_guidance
from distilled_t5.train.contact_sheet import GAP_PX, LINE_PX
from distilled_t5.train.preview import Previewer
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.report import Reporter
from distilled_t5.train.reports import Reports
from distilled_t5.train.run import train
from distilled_t5.train.run_directory import RunDirectory
from distilled_t5.train.state import TrainerState, read_checkpoint
from distilled_t5.train.validation import HeldOut
from distilled_t5.train.workshop import Workshop, open_workshop
from PIL import Image
from safetensors.torch import save

SIDE_PX = 64
SETTINGS = [
    "stage.0.steps=2",
    "stage.1.steps=4",
    "sampling.token_lengths=[16, 24]",
    "validation.prompts=2",
    "validation.every_steps=3",
    "checkpoints.every_steps=6",
    "preview.every_steps=3",
    'preview.prompts=["a red cube", "a blue ball (on a sign)"]',
    "student.dropout=0.1",
]


@pytest.fixture(scope="module")
def vae(stand_ins: Path) -> Path:
    return stand_ins / "models" / "vae" / "ae.safetensors"


@pytest.fixture(scope="module")
def workshop(vae: Path, stand_ins: Path) -> Workshop:
    clip_l = stand_ins / "models" / "text_encoders" / "clip_l.safetensors"
    return open_workshop(load_recipe("smoke", [*SETTINGS, f"preview.vae={vae}", f"teacher.clip_l={clip_l}"]), Ranks())


def trained(folder: Path, vae: object = "") -> TrainerState:
    """A run of six steps with previews after the third, in the middle of a trajectory, and the sixth; its end."""
    assert train(load_recipe("smoke", [*SETTINGS, f'preview.vae="{vae}"']), folder, False, Ranks()) is not None
    return read_checkpoint(folder / "checkpoints" / "step-000006")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TrainerState:
    return trained(tmp_path_factory.mktemp("plain") / "run")


def assert_same_end(state: TrainerState, expected: TrainerState) -> None:
    for part in ("student", "optimizer", "rng", "position", "best"):
        assert same(getattr(state, part), getattr(expected, part)), part


def columns(sheet: Image.Image) -> list[np.ndarray]:
    """The pictures of the first row: teacher, student, difference."""
    lefts = [GAP_PX + column * (sheet.width - GAP_PX) // 3 for column in range(3)]
    top = 2 * GAP_PX + 2 * LINE_PX
    return [np.asarray(sheet.crop((left, top, left + SIDE_PX, top + SIDE_PX))).astype(int) for left in lefts]


def test_previews_leave_contact_sheets_and_no_other_trace_in_the_run(plain, vae, tmp_path):
    assert_same_end(trained(tmp_path / "run", vae), plain)
    sheets = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in sheets] == ["step-000003-preview.jpg", "step-000006-preview.jpg"]
    with Image.open(sheets[-1]) as sheet:
        sheet.load()
    assert sheet.height == GAP_PX + LINE_PX + 2 * (LINE_PX + SIDE_PX + 2 * GAP_PX)
    assert sheet.width >= GAP_PX + 3 * (SIDE_PX + GAP_PX)
    teacher, student, difference = columns(sheet)
    assert teacher.std() > 5 and student.std() > 5
    # JPEG costs a few grey levels.
    assert np.abs(difference - np.abs(teacher - student)).mean() < 8


@pytest.mark.parametrize(
    "content", [b"\x10" * 1000, save({"weight": torch.zeros(4, 4)})], ids=["broken file", "no VAE, which decoding finds"]
)
def test_a_broken_vae_is_reported_and_changes_nothing(plain, tmp_path, content):
    (tmp_path / "broken.safetensors").write_bytes(content)
    assert_same_end(trained(tmp_path / "run", tmp_path / "broken.safetensors"), plain)
    said = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert "Step 3: the image preview could not be made; the run continues." in said
    assert "2 images could not be made" in said
    assert not list((tmp_path / "run" / "samples").iterdir())


def test_a_missing_vae_is_reported_before_any_model_is_loaded():
    loaded = list(comfy.model_management.current_loaded_models)
    with pytest.raises(ValueError, match=r"no_such\.safetensors was not found.*\n.*What to do"):
        open_workshop(load_recipe("smoke", [*SETTINGS, "preview.vae=no_such.safetensors"]), Ranks())
    assert comfy.model_management.current_loaded_models == loaded


def test_the_teachers_image_equals_that_of_comfyuis_sampler_and_vae(workshop, vae):
    recipe, patcher = workshop.recipe, workshop.model.patcher
    [batch, _] = preview_batches(recipe)
    text = workshop.teacher.encode(batch.prompts, batch.drawn.token_length)
    pooled_BP = pooled(teacher_of(workshop).clip, batch.prompts[0])
    assert pooled_BP.std() > 0.1
    conditioning = [[text.text_BLD, {"pooled_output": pooled_BP, "guidance": 3.5}]]
    noise = batch.drawn.noise
    shifted = ModelSamplingFlux().patch(patcher, max_shift=1.15, base_shift=0.5, width=SIDE_PX, height=SIDE_PX)[0]
    with torch.inference_mode():
        latent = comfy.sample.sample(
            shifted,
            noise,
            recipe.sampling.steps,
            1.0,
            "euler",
            "simple",
            conditioning,
            conditioning,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )
        pixels = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(vae))).decode(latent)[0]
    expected = (pixels.numpy() * 255).round().astype(int)
    teacher, student, difference = columns(Previewer(workshop).sheet())
    assert np.abs(teacher - expected).max() <= 1
    assert np.array_equal(difference, np.abs(teacher - student)) and difference.max() > 20


def test_the_difference_is_black_for_a_student_that_equals_the_teacher(vae, tmp_path):
    layout = StudentLayout(d_model=64, d_ff=128, num_layers=2, num_heads=2, d_kv=32, hidden_width=128, projected_width=4096)
    path = student_file(tmp_path, layout)
    settings = [f"teacher.t5={path}", f"student.start={path}", f"preview.vae={vae}"]
    teacher, _, difference = columns(Previewer(open_workshop(load_recipe("smoke", [*SETTINGS, *settings]), Ranks())).sheet())
    assert teacher.std() > 5
    assert difference.max() <= 1


def test_after_a_preview_the_diffusion_model_is_brought_back_and_the_vae_is_gone(workshop, tmp_path, monkeypatch):
    turns, load = [], comfy.model_management.load_models_gpu

    def watched_load(models: Any, *more: Any, **named: Any) -> Any:
        name = type(models[0].model).__name__
        turns.extend([name] if turns[-1:] != [name] else [])
        return load(models, *more, **named)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watched_load)
    with RunDirectory(tmp_path / "run").start("") as run, Reporter(run, load_recipe("smoke")) as reporter:
        previewer = Previewer(workshop)
        previewer.show(Reports(reporter, {}))
        previewer.show(Reports(reporter, {}))
        assert reporter.failed_images == 0
    # The teacher is needed once; both times all is sampled before anything is decoded.
    assert turns == ["FluxClipModel_", "Flux", "TAESD", "Flux", "TAESD", "Flux"]
    assert "TAESD" not in [type(loaded.real_model()).__name__ for loaded in comfy.model_management.current_loaded_models]


class Trouble(RuntimeError):
    """What a GPU without memory, say, raises inside the student."""


def fail(*_arguments: Any) -> None:
    raise Trouble


def test_trouble_inside_the_student_leaves_its_dropout_on(workshop, tmp_path):
    student = workshop.student
    previewer, held_out = Previewer(workshop), HeldOut(workshop)
    hook = student.final_projection.register_forward_hook(fail)
    try:
        with RunDirectory(tmp_path / "run").start("") as run, Reporter(run, load_recipe("smoke")) as reporter:
            previewer.show(Reports(reporter, {}))
            assert reporter.failed_images == 1
        assert all(module.training for module in student.modules())
        with pytest.raises(Trouble):
            held_out.losses()
        assert all(module.training for module in student.modules())
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("trained_at", "shown"), [((), ()), ((2.0, 3.5, 5.0), (3.5,)), ((1.0,), (1.0,)), ((5.0, 2.0, 4.0), (4.0,)), ((2.0, 3.0), (3.0,))]
)
def test_previews_are_at_the_usual_guidance(trained_at, shown):
    assert usual_guidance(trained_at, 3.5) == shown


@pytest.mark.parametrize(("lengths", "shown"), [("[77, 256, 512]", 256), ("[16, 24]", 24)])
def test_previews_are_at_the_length_that_the_student_is_served_at(lengths, shown):
    batches = preview_batches(load_recipe("smoke", [f"sampling.token_lengths={lengths}"]))
    assert {batch.drawn.token_length for batch in batches} == {shown}
