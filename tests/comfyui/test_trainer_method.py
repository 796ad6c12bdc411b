"""The method, held against its definition: Algorithm 1 and Eq. 5 of arXiv:2503.19897, on a real Flux of ComfyUI."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import pytest
import torch
from distilled_t5.diffusion.frozen import FrozenModel
from distilled_t5.encoder.teacher import Teacher, load_teacher
from distilled_t5.encoder.teacher_text import TeacherText
from distilled_t5.families import FAMILIES
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.small_encoders import TINY, student_file
from distilled_t5.train.distill import Learner, NotFinite, linear_schedule, loss_scaler, train_step
from distilled_t5.train.objectives import OBJECTIVES, Objective, velocity_gap
from distilled_t5.train.optimizer import make_optimizer
from distilled_t5.train.student_start import make_student
from distilled_t5.train.trajectory import Position, advance, draw, gaps_at, gaps_by_band
from torch import Tensor

LENGTH, SIDE_PX, STEPS = 12, 64, 4
SHAPE = FAMILIES["flux"].latent_shape(SIDE_PX)
ANIMALS = ["cat", "dog", "fox", "owl", "cow", "pig", "hen", "bee", "ant", "bat", "elk", "emu", "gnu", "yak", "koi", "cod"]
PROMPTS = [f"a {animal} on a sign" for animal in ANIMALS]
BATCHED = ("x", "text_BLD", "guidance_B", "token_ids_BL")
OTHER = StudentLayout(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, hidden_width=64, projected_width=4096)


@pytest.fixture(scope="module")
def patcher(stand_ins: Path) -> Any:
    path = stand_ins / "models" / "diffusion_models" / "flux1-dev.safetensors"
    return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})


@pytest.fixture(scope="module")
def flow(patcher: Any) -> Iterator[FrozenModel]:
    flow = FrozenModel(patcher, FAMILIES["flux"])
    flow.load()
    with flow.differentiable(checkpoint_blocks=False):
        yield flow


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student_file(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(teacher_file: Path) -> Teacher:
    return load_teacher(teacher_file, {})


@pytest.fixture(scope="module")
def text(teacher: Teacher) -> TeacherText:
    return teacher.encode(PROMPTS, LENGTH)


def position(flow: FrozenModel, text: TeacherText, index: int = 0, batch: int = 16) -> Position:
    drawn = draw(0, index, batch, flow.family.latent_shape(SIDE_PX), (2.0, 3.5, 5.0), (LENGTH,))
    sigmas_T, extras = flow.training_sigmas(STEPS, *drawn.noise.shape[-2:]), {"pooled_output": text.pooled_BP[:batch]}
    return Position(0, drawn.noise, sigmas_T, text.text_BLD[:batch], extras, drawn.guidance_B, text.token_ids_BL[:batch])


def learner(student: torch.nn.Module, rate: float = 1e-3, steps: int = 100, max_norm: float = 1.0, optimizer: Any = None) -> Learner:
    chosen = make_optimizer(student, rate, (0.9, 0.999), 0.0) if optimizer is None else optimizer
    schedule = linear_schedule(rate, 1, steps)
    return Learner(student, chosen, schedule, max_norm, None, torch.device("cpu"), lambda mean: mean, contextlib.nullcontext)


def test_gradient_to_the_text_equals_the_numeric_derivative_with_and_without_checkpointing(patcher):
    """A checkpoint that recomputes on overwritten tensors is off by one or two percent, without any error."""
    flow = FrozenModel(patcher, FAMILIES["flux"])
    flow.load()
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in [(2, 16, 8, 8), (2, 20, 4096)])
    pooled, readout = torch.randn(2, 768, generator=generator), torch.randn(x.shape, generator=generator)
    sigma, guidance = torch.tensor([0.7, 0.3]), torch.tensor([2.0, 4.0])

    def measured(text_BLD: Tensor) -> Tensor:
        return (flow.velocity(x, sigma, text_BLD, {"pooled_output": pooled}, guidance) * readout).sum()

    gradients = []
    for checkpoint_blocks in (False, True):
        with flow.differentiable(checkpoint_blocks):
            gradients += torch.autograd.grad(measured(leaf := text.clone().requires_grad_(True)), leaf)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
    steepest = gradients[1] / gradients[1].norm()
    with torch.no_grad():
        numeric = float(measured(text + steepest) - measured(text - steepest)) / 2
    assert float(gradients[1].norm()) == pytest.approx(numeric, rel=2e-3)


def test_the_diffusion_model_is_left_as_it_was(patcher):
    model = patcher.model.diffusion_model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with FrozenModel(patcher, FAMILIES["flux"]).differentiable(checkpoint_blocks=True):
        assert "forward" in vars(model.double_blocks[0])
    assert not any("forward" in vars(block) for block in [*model.double_blocks, *model.single_blocks])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_student_equal_to_the_teacher_has_no_loss_and_no_gradient(flow, text, teacher_file):
    student = make_student(TINY, str(teacher_file), dropout=0.1, seed=1)
    student.train(False)
    # Both halves in one arithmetic: the teacher's text is computed by the student itself.
    with torch.no_grad():
        same = TeacherText(text.token_ids_BL, student(text.token_ids_BL), text.pooled_BP)
    torch.testing.assert_close(same.text_BLD, text.text_BLD, atol=1e-2, rtol=1e-2)
    [loss_B], _ = gaps_at(position(flow, same), flow, [student], OBJECTIVES["velocity"])
    loss_B.sum().backward()
    # ComfyUI's attention rounds differently with gradients on: 1e-7 of a velocity of about 1, squared.
    assert loss_B.max() < 1e-12
    assert torch.stack([weight.grad.norm() for weight in student.parameters() if weight.grad is not None]).norm() < 1e-5


def test_the_trajectory_ignores_the_student(flow, text):
    ends = []
    for seed in (1, 2):
        student, place = make_student(OTHER, "random", 0.0, seed), position(flow, text, batch=4)
        while not place.done:
            _, velocity = gaps_at(place, flow, [student], OBJECTIVES["velocity"])
            place = advance(place, velocity)
        ends.append(place.x)
    assert torch.equal(ends[0], ends[1])


def test_the_teachers_trajectory_ends_in_the_latent_of_comfyuis_sampler(patcher, flow, text):
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    place = position(flow, text, batch=1)
    start = place.x
    conditioning = [[place.text_BLD, {**place.extras, "guidance": float(place.guidance_B)}]]
    shifted = ModelSamplingFlux().patch(patcher, max_shift=1.15, base_shift=0.5, width=SIDE_PX, height=SIDE_PX)[0]
    with torch.inference_mode():
        expected = comfy.sample.sample(
            shifted, start, STEPS, 1.0, "euler", "simple", conditioning, conditioning, torch.zeros_like(start), disable_pbar=True, seed=0
        )
    while not place.done:
        _, velocity = gaps_at(place, flow, [lambda _ids, place=place: place.text_BLD], OBJECTIVES["velocity"])
        place = advance(place, velocity)
    ours = patcher.model.process_latent_out(place.x)
    torch.testing.assert_close(ours, expected.clone(), atol=1e-4, rtol=1e-4)


def test_only_the_student_changes(patcher, flow, text, teacher):
    frozen = [*patcher.model.parameters(), *teacher.clip.cond_stage_model.parameters()]
    before = [weight.clone() for weight in frozen]
    student = make_student(OTHER, "random", 0.0, 1)
    started = {name: tensor.clone() for name, tensor in student.tensors().items()}
    train_step([position(flow, text, batch=4)], flow, [learner(student)], OBJECTIVES["velocity"])
    assert all(torch.equal(now, then) for now, then in zip(frozen, before, strict=True))
    assert all(weight.grad is None for weight in frozen)
    changed = {name for name, tensor in student.tensors().items() if not torch.equal(tensor, started[name])}
    assert changed == set(started)


def test_the_students_gradients_are_the_ones_that_are_clipped(flow, text):
    student = make_student(OTHER, "random", 0.0, 1)
    before = [weight.detach().clone() for weight in student.parameters()]
    descent = torch.optim.SGD(student.parameters())
    [report], _ = train_step(
        [position(flow, text, batch=4)], flow, [learner(student, rate=1.0, max_norm=1e-3, optimizer=descent)], OBJECTIVES["velocity"]
    )
    moved = torch.stack([(now - then).norm() for now, then in zip(student.parameters(), before, strict=True)]).norm()
    assert report.gradient_norm > 1e-2
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_the_two_objectives_differ_as_they_should(flow, text):
    student, place = make_student(OTHER, "random", 0.0, 1), position(flow, text, batch=4)
    [naive_B], velocity = gaps_at(place, flow, [student], OBJECTIVES["embedding"])
    assert velocity is None
    expected = (student(place.token_ids_BL) - place.text_BLD).square().mean(dim=(1, 2))
    torch.testing.assert_close(naive_B, expected)
    [followed_B], velocity = gaps_at(place, flow, [student], OBJECTIVES["velocity"])
    assert velocity is not None
    assert not torch.allclose(followed_B, naive_B, rtol=0.1)
    moved, stayed = advance(place, velocity), advance(place, None)
    assert torch.equal(stayed.x, place.x) and not torch.equal(moved.x, place.x)


def test_micro_batches_give_the_same_step_as_the_full_batch(flow, text):
    whole = position(flow, text, batch=8)
    halves = [
        replace(
            whole, extras={"pooled_output": whole.extras["pooled_output"][half]}, **{name: getattr(whole, name)[half] for name in BATCHED}
        )
        for half in (slice(0, 4), slice(4, 8))
    ]
    results = []
    for places in ([whole], halves):
        student = make_student(OTHER, "random", 0.0, 1)
        [report], _ = train_step(places, flow, [learner(student)], OBJECTIVES["velocity"])
        results.append((report, student.tensors()))
    assert results[0][0].loss == pytest.approx(results[1][0].loss, rel=1e-5)
    assert results[0][0].gradient_norm == pytest.approx(results[1][0].gradient_norm, rel=1e-4)


@pytest.mark.full
def test_overfitting_sixteen_prompts_lowers_the_loss_on_unseen_noise_twentyfold(flow, text):
    student = make_student(TINY, "random", 0.0, 1)
    trained = learner(student, rate=3e-3, steps=160)

    def unseen() -> float:
        student.train(False)
        losses = [float(loss_B.mean()) for _, [loss_B] in gaps_by_band(position(flow, text, index=10_000), flow, [trained.embed], 4)]
        student.train(True)
        return sum(losses) / len(losses)

    before = unseen()
    for index in range(160 // STEPS):
        places = [position(flow, text, index)]
        while not places[0].done:
            _, places = train_step(places, flow, [trained], OBJECTIVES["velocity"])
    assert trained.step == 160
    assert unseen() <= before / 20


def test_a_loss_that_is_not_finite_drops_the_step_and_ten_in_a_row_stop_the_run(flow, text):
    student = make_student(OTHER, "random", 0.0, 1)
    trained = learner(student)
    before = {name: tensor.clone() for name, tensor in student.tensors().items()}
    broken = position(flow, TeacherText(text.token_ids_BL, text.text_BLD * float("nan"), text.pooled_BP), batch=2)
    reports = [train_step([broken], flow, [trained], OBJECTIVES["embedding"])[0][0] for _ in range(9)]
    assert all(report.dropped for report in reports)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.tensors().items())
    trained.check_not_lost()
    _, moved = train_step([broken], flow, [trained], OBJECTIVES["embedding"])
    assert [place.step for place in moved] == [1]
    with pytest.raises(NotFinite, match="What to do"):
        trained.check_not_lost()
    assert trained.skipped == 10


class NotFiniteFlow:
    """A diffusion model with a weight that is not finite."""

    def velocity(self, x: Tensor, sigma_B: Tensor, text_BLD: Tensor, extras: Mapping[str, Any], guidance_B: Tensor | None = None) -> Tensor:
        return x * float("nan") + text_BLD.sum()


# Finite losses whose gradient is 0 times infinity.
STEEP = Objective(lambda gap: (velocity_gap(gap) * 0).sqrt())
NAN_LOSS = Objective(lambda gap: velocity_gap(gap) * float("nan"))


@pytest.mark.parametrize(
    ("broken", "part", "advice"),
    [
        ("text_BLD", "the teacher's text embedding or pooled vector", "check or replace the files that [teacher] names"),
        ("pooled_BP", "the teacher's text embedding or pooled vector", "check or replace the files that [teacher] names"),
        ("model", "the diffusion model's velocity for the teacher's text", "check or replace diffusion_model.file"),
        ("student", "the student's text embedding", "optimizer.learning_rate or optimizer.autocast"),
        (
            NAN_LOSS,
            "the loss, though the texts of teacher and student are finite",
            "optimizer.learning_rate or diffusion_model",
        ),
        (STEEP, "the gradient, though the loss is finite", "optimizer.learning_rate or diffusion_model.dtype"),
    ],
)
def test_a_run_that_dropped_steps_end_says_which_part_was_not_finite_and_what_to_do_about_it(flow, text, broken, part, advice):
    student = make_student(OTHER, "random", 0.0, 1)
    trained = replace(learner(student), skipped_in_a_row=9)
    if broken in ("text_BLD", "pooled_BP"):
        text = replace(text, **{broken: getattr(text, broken) * float("nan")})
    if broken == "student":
        next(student.parameters()).data.fill_(float("nan"))
    before = torch.get_rng_state()
    model = NotFiniteFlow() if broken == "model" else flow
    objective = broken if isinstance(broken, Objective) else OBJECTIVES["velocity"]
    train_step([position(flow, text, batch=2)], model, [trained], objective)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(NotFinite, match=r"^10 steps in a row were not finite") as caught:
        trained.check_not_lost()
    assert f"the first part that was not finite is {part}.\nWhat to do: " in str(caught.value)
    assert advice in str(caught.value)


def test_a_part_that_was_not_finite_on_another_rank_is_named(flow, text):
    student = make_student(OTHER, "random", 0.0, 1)
    # The loss and the parts of this rank, and of one whose diffusion model gave NaN.
    trained = replace(learner(student), mean_over_ranks=lambda mean: (mean + torch.tensor([0.0, 1, 0, 1])) / 2 if mean.ndim else mean / 0)
    train_step([position(flow, text, batch=2)], flow, [trained], OBJECTIVES["velocity"])
    assert trained.not_finite == "the diffusion model's velocity for the teacher's text"


def test_a_velocity_that_is_not_finite_does_not_affect_the_rest_of_its_trajectory(flow, text):
    place = position(flow, text, batch=2)
    _, velocity = gaps_at(place, flow, [lambda _ids: place.text_BLD], OBJECTIVES["velocity"])
    assert velocity is not None
    broken = velocity.clone()
    broken[1, 0, 0, 0] = float("nan")
    moved, waited = advance(place, velocity), advance(place, broken)
    assert torch.equal(waited.x, place.x) and waited.step == moved.step == 1
    assert not torch.equal(moved.x, place.x)


@pytest.fixture
def fp16_flow(stand_ins: Path) -> Iterator[FrozenModel]:
    """A Flux that computes in fp16, as on cards without bf16; on a CPU ComfyUI would cast its weights to fp32."""
    path = stand_ins / "models" / "diffusion_models" / "flux1-dev.safetensors"
    flow = FrozenModel(comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float16}), FAMILIES["flux"])
    flow.model.manual_cast_dtype = None
    flow.load()
    with flow.differentiable(checkpoint_blocks=True):
        yield flow


# What the mean over a picture of 1024 px and 32 prompts makes of a gap, on a small picture.
FAINT = Objective(lambda gap: velocity_gap(gap) / 2**14)


def test_gradients_that_fp16_would_lose_come_through_scaled_and_are_unscaled_before_clipping(flow, fp16_flow, text):
    norms = {}
    for name, model, scaler in (
        ("fp32", flow, loss_scaler(flow)),
        ("fp16", fp16_flow, loss_scaler(fp16_flow)),
        ("lost", fp16_flow, loss_scaler(flow)),
    ):
        student = make_student(OTHER, "random", 0.0, 1)
        trained = replace(learner(student, max_norm=1e9, optimizer=torch.optim.SGD(student.parameters())), scaler=scaler)
        [report], _ = train_step([position(flow, text, batch=4)], model, [trained], FAINT)
        norms[name] = report.gradient_norm
        assert not report.dropped
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.02)
    assert norms["lost"] < norms["fp32"] / 2, "this test shows nothing if fp16 keeps these gradients by itself"


def test_a_scale_that_is_too_high_drops_its_step_and_is_lowered(fp16_flow, text):
    student = make_student(OTHER, "random", 0.0, 1)
    trained = replace(learner(student), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127))
    before = {name: tensor.clone() for name, tensor in student.tensors().items()}
    [report], _ = train_step([position(fp16_flow, text, batch=2)], fp16_flow, [trained], OBJECTIVES["velocity"])
    assert report.dropped and trained.skipped == 1
    assert trained.scaler.get_scale() == 2.0**126
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.tensors().items())


def test_prompts_are_literal_and_cut_with_the_end_token_last(teacher):
    ids = torch.tensor(teacher.token_ids(["a (cat:1.3)", "word " * 50], LENGTH))
    assert ids.shape == (2, LENGTH)
    assert ids[1, -1] == 1 and (ids[1] != 0).all()
    pieces = teacher.clip.tokenizer.t5xxl.tokenizer("a (cat:1.3)")["input_ids"]
    assert ids[0, : len(pieces)].tolist() == pieces
