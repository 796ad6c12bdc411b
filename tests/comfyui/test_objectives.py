"""Every objective: gradients, what is read of the diffusion model, runs that resume to the bit, refusals, and what a rehearsal counts."""

# B batch, L text tokens, D text width

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comfy.sd
import comfy.utils
import pytest
import torch
from distilled_t5.config.files import ConfigError
from distilled_t5.diffusion.frozen import FrozenModel
from distilled_t5.encoder.rows import Rows
from distilled_t5.encoder.teacher_text import TeacherText
from distilled_t5.families import FAMILIES
from distilled_t5.families.family import Family
from distilled_t5.runtime.random_weights import drawn
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.small_flux import FLUX, diffusion_model_file, teacher_file
from distilled_t5.train import stand_ins
from distilled_t5.train.batches import Schedule
from distilled_t5.train.models import load_frozen_model
from distilled_t5.train.objectives import OBJECTIVES, Objective
from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.train.rehearsal import Target, rehearse
from distilled_t5.train.run import train
from distilled_t5.train.state import read_checkpoint
from distilled_t5.train.trajectory import Position, draw, gaps_at, start
from distilled_t5.train.unloaded import projection_alone
from distilled_t5.train.workshop import open_workshop
from safetensors.torch import save_file
from torch import Tensor

CPU, FP8 = torch.device("cpu"), torch.float8_e4m3fn
BATCH, TOKENS, OWN = 3, 9, (9, 5, 9)


# Their texts of 512 rows take long on a CPU.
LARGE = {"flux2_klein_4b", "flux2_klein_9b"}
FAMILY_CASES = [pytest.param(family, id=name, marks=[pytest.mark.full] if name in LARGE else []) for name, family in FAMILIES.items()]


@pytest.fixture(scope="module", params=FAMILY_CASES)
def model(request: pytest.FixtureRequest) -> FrozenModel:
    model = stand_ins.diffusion_model(request.param, "fp32")
    model.load()
    return model


def texts(width: int) -> tuple[Tensor, Tensor]:
    """A teacher's text and a student's [B, L, D]."""
    generator = torch.Generator().manual_seed(5)
    teacher_BLD = torch.randn(BATCH, TOKENS, width, generator=generator)
    return teacher_BLD, teacher_BLD + 0.3 * torch.randn(teacher_BLD.shape, generator=generator)


def position(model: FrozenModel, text_BLD: Tensor) -> Position:
    """The second of four steps of a batch; of prompts of several lengths where the family does not pad; guided where it can be."""
    family = model.family
    guidance, cfg = ([3.5], []) if model.takes_guidance else ([], [4.0])
    drawn_ = draw(3, 0, BATCH, family.latent_shape(max(64, family.least_side_px)), guidance, [TOKENS], cfg)
    pooled_BP, rows = torch.ones(BATCH, sum(family.companions.values())), None
    if not family.padded or family.rows_before is not None:
        before = torch.randn(2 if family.rows_before else 0, family.text_width, generator=torch.Generator().manual_seed(8))
        rows = Rows((TOKENS,) * BATCH if family.padded else OWN, (before,) * BATCH)
    empty = TeacherText(torch.zeros(1, 1), text_BLD[:1, :1] / 2, pooled_BP[:1], None if rows is None else Rows((1,), rows.before[:1]))
    text = TeacherText(torch.zeros(BATCH, TOKENS), text_BLD, pooled_BP, rows, empty if cfg else None)
    return replace(start(model, 4, drawn_, text), step=1)


def objectives_of(model: FrozenModel) -> list[Objective]:
    """Every objective inside the diffusion model that it has, after every number of its blocks, and the one before them."""
    blocks, family = len(model.blocks), model.family
    with_text = blocks - family.last_blocks_without_text if "text" in next(iter(family.block_lists.values())) else 0
    after = {"early": range(1, blocks + 1), "text_stream": range(1, with_text + 1), "keys_values": [0], "projected": [0]}
    return [replace(OBJECTIVES[name], blocks=count, variance_D=torch.ones(1)) for name, counts in after.items() for count in counts]


@pytest.mark.every_version
def test_gradients_are_the_numeric_derivative_and_the_same_with_checkpointed_blocks(model: FrozenModel) -> None:
    teacher_BLD, student_BLD = texts(model.family.text_width)
    place = position(model, teacher_BLD)
    for objective in objectives_of(model):
        found = []
        for checkpoint_blocks in (False, True):
            leaf = student_BLD.clone().requires_grad_(True)
            with model.differentiable(checkpoint_blocks):
                [loss_B], velocity = gaps_at(place, model, [lambda _ids, leaf=leaf: leaf], objective)
                loss_B.sum().backward()
            found.append((loss_B.detach(), leaf.grad))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1]), objective
        gradient = found[1][1]
        step = 0.02 * float(student_BLD.norm()) / model.family.text_width**0.5

        @torch.no_grad()
        def loss(shift: Tensor, objective: Objective = objective) -> float:
            [loss_B], _ = gaps_at(place, model, [lambda _ids: student_BLD + shift], objective)
            return float(loss_B.double().sum())

        steepest = step * gradient / gradient.norm()
        assert float(gradient.norm()) == pytest.approx((loss(steepest) - loss(-steepest)) / (2 * step), rel=1e-2), objective
        if not model.family.padded:
            assert not gradient[1, OWN[1] :].any(), "padding, to which this family does not attend, has no gradient"
        assert (velocity is not None) == (objective.at == "streams")
        if velocity is not None:
            with torch.no_grad():
                assert torch.equal(velocity, place.guided(model, place.velocity(model, teacher_BLD))), "the trajectory is the teacher's"
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.model.modules())


def test_a_student_like_its_teacher_has_no_gap_at_any_noise_level(model: FrozenModel) -> None:
    teacher_BLD, _ = texts(model.family.text_width)
    place = position(model, teacher_BLD)
    for objective in objectives_of(model):
        for step in (0, 3):
            [gaps_B], velocity = gaps_at(replace(place, step=step), model, [lambda _ids: teacher_BLD], objective)
            assert float(gaps_B.abs().max()) < 1e-9, objective
            assert (velocity is not None) == (objective.at == "streams" and step == 0), "after the last step, nothing needs it"


def test_after_the_last_block_the_image_alone_is_compared(model: FrozenModel) -> None:
    teacher_BLD, _ = texts(model.family.text_width)
    place = position(model, teacher_BLD)._of([0])
    for blocks, (_, streams) in enumerate(model.streams, start=1):
        seen, _ = place.seen(model, teacher_BLD[:1], replace(OBJECTIVES["early"], blocks=blocks), to_the_end=False)
        assert len(seen) == (len("+".join(streams).split("+")) if blocks < len(model.blocks) else 1)


def test_the_rows_with_which_a_model_pads_the_text_are_part_of_its_stream() -> None:
    for name, padded in (("z_image", 32), ("flux2_klein_4b", 512)):
        model = stand_ins.diffusion_model(FAMILIES[name], "fp32")
        model.load()
        teacher_BLD, _ = texts(model.family.text_width)
        place = position(model, teacher_BLD)._of([0])
        for blocks in range(1, len(model.blocks)):
            seen, _ = place.seen(model, teacher_BLD[:1], replace(OBJECTIVES["text_stream"], blocks=blocks), to_the_end=False)
            assert [stream.shape[1] for stream in seen] == [padded], (name, blocks)


@pytest.mark.every_version
def test_the_projected_text_is_what_reaches_the_first_block(model: FrozenModel) -> None:
    teacher_BLD, _ = texts(model.family.text_width)
    place, seen = position(model, teacher_BLD)._of([0]), []
    inner = model.model.diffusion_model
    # A clone: blocks add to it in place.
    handle = inner.get_submodule(model.family.text_projection[-1]).register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))
    model.velocity(place.x, place._sigma_B, teacher_BLD[:1], place.extras, place.guidance_B)
    handle.remove()
    # FLUX.2 has zeros before the text, to 512 rows.
    projected = seen[0].reshape(1, -1, seen[0].shape[-1])[:, -TOKENS:]
    assert torch.equal(model.text_projection(teacher_BLD[:1]).reshape(projected.shape), projected)


def published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def checkpoint(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.diffusion_model.{name}": tensor for name, tensor in published(tensors).items()}


def plain_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(FP8 if tensor.ndim == 2 else torch.bfloat16) for name, tensor in tensors.items()}


def scaled_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    scale = tensors["txt_in.weight"].abs().max() / torch.finfo(FP8).max
    projection = {"txt_in.weight": (tensors["txt_in.weight"] / scale).to(FP8), "txt_in.scale_weight": scale}
    return published(tensors) | projection | {"scaled_fp8": torch.zeros(0, dtype=FP8)}


def scaled_checkpoint(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.diffusion_model.{name}": tensor for name, tensor in scaled_fp8(tensors).items()}


def comfy_quant(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    said = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    renamed = {name.replace("scale_weight", "weight_scale"): tensor for name, tensor in scaled_fp8(tensors).items() if name != "scaled_fp8"}
    return renamed | {"txt_in.comfy_quant": said}


def diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    sizes = {"depth": FLUX.double, "depth_single_blocks": FLUX.single, "hidden_size": FLUX.width}
    tensors, written = tensors | {name.replace(".scale", ".weight"): tensor for name, tensor in tensors.items()}, {}
    for name, target in comfy.utils.flux_to_diffusers(sizes).items():
        inner, part = (target, None) if isinstance(target, str) else target[:2]
        if inner in tensors:
            # Clones, as ComfyUI knows some tensors by several names.
            written[name] = (tensors[inner] if part is None else tensors[inner].narrow(*part)).clone()
    return written


FORMS = (published, checkpoint, plain_fp8, scaled_fp8, scaled_checkpoint, comfy_quant, diffusers)


@pytest.mark.every_version
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_text_projection_is_read_alone_from_every_form_of_file(form: Callable[..., dict[str, Tensor]], tmp_path: Path) -> None:
    path, family = tmp_path / "flux.safetensors", FAMILIES["flux"]
    save_file(form(drawn(FLUX.tensors(), seed=2)), path)
    alone = projection_alone(path, family, CPU)
    whole = FrozenModel(comfy.sd.load_diffusion_model(str(path)), family)
    text_BLD = texts(FLUX.text_width)[0]
    found, expected = (each.text_projection(text_BLD) for each in (alone, whole))
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert float(found.std()) > 0.5, "scales are applied"
    assert all(weight.is_meta for weight in alone.model.diffusion_model.parameters())
    assert (alone.text_width, alone.takes_guidance) == (whole.text_width, whole.takes_guidance)
    assert torch.equal(alone.training_sigmas(4, 8, 8), whole.training_sigmas(4, 8, 8))


@pytest.mark.parametrize("lacking", ["txt_in.weight", "txt_in.bias", "img_in.weight"])
def test_a_file_that_lacks_a_tensor_is_refused_also_where_the_projection_alone_is_read(lacking: str, tmp_path: Path) -> None:
    tensors = drawn(FLUX.tensors(), seed=2)
    del tensors[lacking]
    save_file(tensors, tmp_path / "flux.safetensors")
    expected = "is not a diffusion model that ComfyUI knows" if lacking == "img_in.weight" else f"The diffusion model lacks {lacking}."
    with pytest.raises(ValueError, match=expected) as refused:
        projection_alone(tmp_path / "flux.safetensors", FAMILIES["flux"], CPU)
    assert "What to do: name" in str(refused.value)


STEPS = 2
PLAN = [
    *(("scaled", 0), ("whitened", 0), ("whitened_cosine", 0), ("projected", 0)),
    *(("keys_values", 0), ("text_stream", 1), ("early", 1), ("early", 2)),
]


def run_of(plan: list[tuple[str, int]], *settings: str) -> Recipe:
    """A quick run with a stage for each objective."""
    quick = ["sampling.steps=2", "checkpoints.every_steps=5", "checkpoints.keep_last=99", "validation.prompts=2"]
    often = [f"{part}.every_steps=99" for part in ("validation", "preview")]
    recipe = load_recipe("smoke", [*quick, *often, "student.dropout=0.1", "optimizer.warmup_steps=0", *settings])
    given = recipe.stages[1].model_copy(update={"steps": STEPS, "batch": 2, "accumulate": 1})
    changes = ({"name": f"stage-{number}", "objective": name, "blocks": count} for number, (name, count) in enumerate(plan))
    return recipe.model_copy(update={"stages": tuple(given.model_copy(update=change) for change in changes)})


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_through_every_objective_resumes_to_the_bit(tmp_path: Path) -> None:
    recipe = run_of(PLAN)
    assert train(recipe, tmp_path / "run", False, Ranks()) is not None
    losses = [row["loss"] for row in rows_of(tmp_path / "run") if "loss" in row]
    assert len(losses) == STEPS * len(PLAN) and all(0 < loss < 10 for loss in losses)
    last = f"step-{STEPS * len(PLAN):06d}"
    # In the middle of a trajectory, and of a stage whose variance is computed again.
    resumed = shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    for folder in (resumed / "checkpoints").iterdir():
        if folder.name > "step-000005":
            shutil.rmtree(folder)
    assert train(recipe, resumed, True, Ranks()) is not None
    ours, theirs = (read_checkpoint(each / "checkpoints" / last) for each in (resumed, tmp_path / "run"))
    for part in ("student", "optimizer", "position", "rng"):
        assert same(getattr(ours, part), getattr(theirs, part)), part


def test_a_run_that_only_imitates_never_loads_the_diffusion_model(tmp_path: Path) -> None:
    files = [f"diffusion_model.file={diffusion_model_file(tmp_path)}", f"teacher.t5={teacher_file(tmp_path)}"]
    recipe = run_of([("whitened", 0), ("projected", 0)], *files)
    workshop = open_workshop(recipe, Ranks())
    assert all(weight.is_meta for weight in workshop.model.model.diffusion_model.parameters())
    assert workshop.rehearsal is not None and workshop.rehearsal.model == 0
    assert train(recipe, tmp_path / "run", False, Ranks()) is not None
    [held_out] = [row for row in rows_of(tmp_path / "run") if "held_out_loss" in row]
    assert list(held_out["held_out_by_band"]) == ["all"] and held_out["held_out_loss"] > 0
    assert "The last stage's objective on prompts never trained on" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_the_text_projection_is_the_files_whether_or_not_the_model_is_loaded_in_fp8(tmp_path: Path) -> None:
    files = [f"diffusion_model.file={diffusion_model_file(tmp_path)}", "diffusion_model.dtype=fp8_e4m3fn"]
    plans = [("projected", 0)], [("projected", 0), ("velocity", 0)]
    alone, beside = (load_frozen_model(run_of(plan, *files)).text_projection.state_dict() for plan in plans)
    assert same(alone, beside)


@pytest.mark.parametrize("family", ["flux", "pixart_alpha"])
def test_the_text_projection_is_made_before_random_numbers_are_drawn(family: str) -> None:
    guided = [f"diffusion_model.family={family}", "stage.0.resolution_px=272", "stage.1.resolution_px=272"]
    guided += ["sampling.guidance=[]"] if family != "flux" else []
    workshop = open_workshop(run_of([("projected", 0), ("velocity", 0)], *guided), Ranks())
    before = torch.get_rng_state()
    workshop.objective(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_variance_is_that_of_the_first_prompts_of_all_processes() -> None:
    recipe = load_recipe("smoke", ["stage.0.accumulate=2", "validation.prompts=2"])
    alone, *parts = (Schedule(recipe, rank, world).sample(0) for rank, world in ((0, 1), (0, 2), (1, 2)))
    assert len(alone) > 1
    for part in parts:
        assert [batch.prompts for batch in part] == [batch.prompts for batch in alone]


@pytest.mark.parametrize(
    ("family", "objective", "blocks", "expected"),
    [
        ("flux", "early", 3, "Stage stage-0: expected at most 2 for blocks, got 3: stand-in has 2 blocks."),
        ("flux", "text_stream", 2, "expected at most 1 for blocks, got 2: stand-in has 2 blocks, and a text stream after 1 of them."),
        ("sd3", "text_stream", 2, "expected at most 1 for blocks, got 2: stand-in has 2 blocks, and a text stream after 1 of them."),
    ],
)
def test_more_blocks_than_the_model_has_are_refused(family: str, objective: str, blocks: int, expected: str) -> None:
    recipe = run_of([(objective, blocks)], f"diffusion_model.family={family}", *(["sampling.guidance=[]"] if family == "sd3" else []))
    for refusing in (lambda: open_workshop(recipe, Ranks()), lambda: rehearse(recipe, Target(CPU))):
        with pytest.raises(ConfigError) as refused:
            refusing()
        assert expected in str(refused.value) and "What to do: set blocks to" in str(refused.value)


def counted(family: Family, *plan: tuple[str, int]) -> list[float]:
    settings = [f"diffusion_model.family={family.name}", "sampling.token_lengths=[16]"]
    found = rehearse(run_of(list(plan), *settings), Target(CPU), with_time=True)
    return [sum(stage.flops.values()) for stage in found.stages]


def test_a_rehearsal_counts_what_each_objective_saves() -> None:
    in_blocks = [("velocity", 0), ("early", 2), ("early", 1), ("text_stream", 1), ("keys_values", 0)]
    found = counted(FAMILIES["flux"], *in_blocks, ("projected", 0), ("embedding", 0))
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)
