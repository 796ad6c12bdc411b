"""Distil Text Encoder: it trains what the command trains, is cancelled and continued, and leaves ComfyUI as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.ops
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.cli_args import PerformanceFeature, args
from comfy.model_patcher import PatcherInjection
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_cond import T5TokenizerOptions
from comfy_extras.nodes_hooks import SetClipHooks
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.devtools.comfyui.workflow import set_inputs, to_api_prompt
from distilled_t5.devtools.demo_sheet import pixels
from distilled_t5.diffusion.frozen import FrozenModel
from distilled_t5.encoder.files import open_student
from distilled_t5.families import FAMILIES
from distilled_t5.nodes.distil import DistilledT5Distil
from distilled_t5.nodes.loaded_files import diffusion_file
from distilled_t5.nodes.loader import DistilledT5Loader
from distilled_t5.runtime.model_folders import add_model_folders
from distilled_t5.tests.support.small_encoders import PROMPT, embedding
from distilled_t5.tests.support.trainer import command, finish, metrics
from distilled_t5.tests.support.watch import Watched
from distilled_t5.tests.support.workflows import example
from distilled_t5.train.in_graph import training
from distilled_t5.train.recipe import load_recipe
from distilled_t5.world.reader import read
from PIL import Image

import nodes

FLUX, TEACHER, VAE = "miniature_flux.safetensors", "miniature_teacher.safetensors", "miniature_vae.safetensors"
STEPS = 4
PROMPTS = "\n".join(f"a {colour} {thing}" for colour in ("red", "green", "blue", "pink") for thing in ("heart", "ring", "tree", "cross"))
INPUTS: dict[str, Any] = {"preset": "miniature-fortieth", "steps": STEPS, "prompts": PROMPTS, "seed": 7, "preview_vae": "none"}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The miniature's diffusion model and teacher, as the graph loads them: in inference mode."""
    add_model_folders()
    with torch.inference_mode():
        [model] = nodes.UNETLoader().load_unet(FLUX, "default")
        return model, DistilledT5Loader.execute("none", TEACHER, "flux").args[0]


def distil(model: Any, teacher: Any, name: str, **changed: Any) -> tuple[Any, str]:
    """Execute the node as ComfyUI does; its CLIP and its report."""
    inputs: dict[str, Any] = {**INPUTS, "name": name, **changed}
    with torch.inference_mode():
        return DistilledT5Distil.execute(model, teacher, **inputs).args


def run_folder(name: str) -> Path:
    return Path(folder_paths.get_output_directory(), "distilled_t5", name)


def checksum(name: str) -> str | None:
    """SHA-256 of an encoder's weights."""
    return open_student(folder_paths.get_full_path_or_raise("text_encoders", f"{name}.safetensors")).metadata.sha256


def drawn(model: Any, clip: Any) -> torch.Tensor:
    """A latent that a KSampler draws."""
    with torch.inference_mode():
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("a red heart"))
        empty = {"samples": torch.zeros(1, 16, 12, 12)}
        [latent] = nodes.common_ksampler(model, 3, 2, 1.0, "euler", "simple", conditioning, conditioning, empty)
        return latent["samples"].clone()


@pytest.fixture(scope="module")
def shown() -> list[tuple[int, int, Any]]:
    """What the node's bar has shown: step, steps, preview."""
    return []


@pytest.fixture(scope="module")
def trained(loaded: tuple[Any, Any], shown: list[tuple[int, int, Any]]) -> tuple[Any, str]:
    """The CLIP and the report of a run named `trained`, with images."""
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda step, steps, preview, node_id=None: shown.append((step, steps, preview)))
    try:
        return distil(*loaded, "trained", preview_vae=VAE)
    finally:
        comfy.utils.set_progress_bar_global_hook(before)


def test_the_command_trains_the_same_student_to_the_bit(trained, comfyui_path, tmp_path):
    """The recipe in the run's folder is complete: the command needs nothing else."""
    run = run_folder("trained")
    finish(command(comfyui_path, tmp_path, tmp_path / "run", settings=(), recipe=str(run / "recipe.toml")), tmp_path)
    measured = ("step", "loss", "held_out_loss", "gradient_norm")
    in_graph, by_command = ([{key: line.get(key) for key in measured} for line in metrics(each)] for each in (run, tmp_path / "run"))
    assert in_graph == by_command
    metadata = open_student(tmp_path / "models" / "text_encoders" / "trained.safetensors").metadata
    assert metadata.sha256 == checksum("trained")
    assert (metadata.facts["distilled_t5.diffusion_model"], metadata.facts["distilled_t5.teacher"]) == (FLUX, TEACHER)


def test_it_gives_the_encoder_that_it_has_written_and_says_where_the_run_is(trained):
    clip, report = trained
    with torch.inference_mode():
        from_file = DistilledT5Loader.execute("none", "trained.safetensors", "flux").args[0]
    assert torch.equal(embedding(clip, PROMPT), embedding(from_file, PROMPT))
    assert str(run_folder("trained")) in report and f"step {STEPS}" in report


def test_the_bar_shows_every_step_and_the_images_of_teacher_and_student(trained, shown):
    assert [step for step, _, preview in shown if preview][-1] == STEPS
    [kind, image, _] = next(preview for _, _, preview in shown if preview)
    assert kind == "JPEG" and isinstance(image, Image.Image) and image.width > image.height / 4
    assert {steps for _, steps, _ in shown} <= {STEPS, *range(1, 64)}


def test_comfyui_and_its_models_are_as_before(loaded, trained):
    model, teacher = loaded
    image, threads, random = drawn(model, teacher), torch.get_num_threads(), torch.get_rng_state()
    weights = {name: weight.data_ptr() for name, weight in model.model.named_parameters()}
    distil(model, teacher, "leaves_no_trace", steps=2)
    assert not comfy.model_management.in_training
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        comfy.model_management.throw_exception_if_processing_interrupted()
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), random)
    assert {name: weight.data_ptr() for name, weight in model.model.named_parameters()} == weights
    assert torch.equal(drawn(model, teacher), image)
    known = [model.model, teacher.patcher.model, trained[0].patcher.model]
    kept = [entry.model.model for entry in comfy.model_management.current_loaded_models]
    assert all(any(one is other for other in known) for one in kept), "the models of the training are freed"


def test_a_finished_run_gives_its_encoder_without_training(loaded, trained):
    before = (run_folder("trained") / "metrics.jsonl").stat().st_mtime_ns
    clip, _ = distil(*loaded, "trained", preview_vae=VAE)
    assert torch.equal(embedding(clip, PROMPT), embedding(trained[0], PROMPT))
    assert (run_folder("trained") / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 8}, "seed: 7 -> 8"),
        ({"steps": 3}, "set steps to 4 or more"),
        ({"preset": "miniature-tenth"}, "student.layout.d_model"),
        ({"prompts": "a red heart\na blue ring"}, "other prompts"),
        ({"prompts": ""}, "corpora"),
    ],
)
def test_other_inputs_need_another_name(loaded, trained, changed, said):
    with pytest.raises(ValueError, match="What to do:") as error:
        distil(*loaded, "trained", **{"preview_vae": VAE} | changed)
    assert said in str(error.value)
    assert "steps" in changed or ("was started with" in str(error.value) and "in ComfyUI: another name" in str(error.value))


@pytest.mark.full
def test_a_finished_run_is_lengthened_and_may_get_other_images(loaded):
    distil(*loaded, "longer", steps=2)
    _, report = distil(*loaded, "longer", steps=4, preview_vae=VAE)
    assert [line["step"] for line in metrics(run_folder("longer")) if "loss" in line] == [1, 2, 3, 4]
    assert "step 4" in report and {path.name[:11] for path in run_folder("longer").glob("samples/*.jpg")} == {"step-000003", "step-000004"}
    before = (run_folder("longer") / "metrics.jsonl").stat().st_mtime_ns
    distil(*loaded, "longer", steps=4, preview_vae="none")
    assert (run_folder("longer") / "metrics.jsonl").stat().st_mtime_ns == before
    # A finished run needs its metrics for the report only.
    (run_folder("longer") / "metrics.jsonl").write_text('{"step": 1, "held')
    assert "held-out" not in distil(*loaded, "longer", steps=4)[1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "../elsewhere"}, "cannot be the name of the encoder"),
        ({"prompts": "a red heart"}, "only one prompt"),
        ({"steps": 1}, "too few for the 2 stages"),
        ({"preset": "schnell-16gb"}, "which takes guidance; the preset has none"),
        ({"preset": "schnell-16gb"}, "miniature-fortieth or"),
        ({"preview_vae": "no_such_vae.safetensors"}, "no_such_vae.safetensors was not found"),
        ({"preset": "flux-dev-paper"}, "flan-t5-base was not found"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(loaded, changed, said):
    with pytest.raises(ValueError, match="What to do:") as error:
        distil(*loaded, **{"name": "refused"} | changed)
    assert said in str(error.value)
    assert not (run_folder("refused") / "recipe.toml").exists()


def test_a_model_with_a_lora_and_one_of_an_unknown_file_are_refused(loaded):
    model, teacher = loaded
    patched = model.clone()
    patched.add_patches({"diffusion_model.img_in.weight": (torch.zeros(1),)})
    with pytest.raises(ValueError, match="The model was changed by other nodes"):
        distil(patched, teacher, "refused")
    unknown = model.clone()
    unknown.cached_patcher_init = None
    with pytest.raises(ValueError, match="The file of the model is not known"):
        distil(unknown, teacher, "refused")
    with pytest.raises(ValueError, match="MODEL or teacher is not connected"):
        distil(model, None, "refused")


def changes_of_a_model(model: Any) -> Iterator[Any]:
    """Copies of a MODEL, each changed as some nodes do."""
    for change in (
        lambda one: one.set_model_unet_function_wrapper(lambda apply, arguments: apply(**arguments)),
        lambda one: one.set_model_sampler_cfg_function(lambda arguments: arguments["cond"]),
        lambda one: one.set_injections("some_node", [PatcherInjection(lambda _patcher: None, lambda _patcher: None)]),
        lambda one: one.add_wrapper(WrappersMP.DIFFUSION_MODEL, lambda executor, *arguments: executor(*arguments)),
    ):
        changed = model.clone()
        change(changed)
        yield changed


def changes_of_a_clip(clip: Any) -> Iterator[Any]:
    """Copies of a CLIP, each changed by a node of ComfyUI."""
    yield nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    yield T5TokenizerOptions.execute(clip, 1, 512).args[0]
    hooks = comfy.hooks.HookGroup()
    yield SetClipHooks().apply_hooks(clip, apply_to_conds=False, schedule_clip=True, hooks=hooks)[0]


def test_what_other_nodes_have_changed_is_refused(loaded):
    model, teacher = loaded
    for changed in changes_of_a_model(model):
        with pytest.raises(ValueError, match="The model was changed by other nodes"):
            distil(changed, teacher, "refused")
    for changed in changes_of_a_clip(teacher):
        with pytest.raises(ValueError, match="The teacher was changed by other nodes"):
            distil(model, changed, "refused")


@pytest.mark.parametrize("settings", [{"dtype": "bf16"}, {"token_length": 64}])
def test_a_teacher_whose_loader_has_settings_of_its_own_is_refused(loaded, settings):
    with torch.inference_mode():
        teacher = DistilledT5Loader.execute("none", TEACHER, "flux", **settings).args[0]
    with pytest.raises(ValueError, match=r"set dtype to auto and token_length to 0"):
        distil(loaded[0], teacher, "refused")


def test_the_default_weight_dtype_is_that_of_the_preset(loaded, trained):
    assert load_recipe(str(run_folder("trained") / "recipe.toml")).diffusion_model.dtype == "fp32"
    [fp8] = nodes.UNETLoader().load_unet(FLUX, "fp8_e4m3fn")
    assert (diffusion_file(loaded[0])[1], diffusion_file(fp8)[1]) == (None, "fp8_e4m3fn")


def test_a_users_own_prompts_are_not_overwritten(loaded):
    run_folder("own").mkdir(parents=True)
    (run_folder("own") / "prompts.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files but no run"):
        distil(*loaded, "own")
    assert (run_folder("own") / "prompts.txt").read_text() == "mine"
    run_folder("file").write_text("")
    with pytest.raises(ValueError, match=r"is a file, not a folder\.\nWhat to do: .*in ComfyUI: another name"):
        distil(*loaded, "file")


def test_a_run_that_fails_leaves_no_models_in_memory(loaded, trained, monkeypatch):
    def fail() -> bool:
        raise RuntimeError("in the middle of the run")

    monkeypatch.setattr(comfy.model_management, "processing_interrupted", fail)
    with pytest.raises(RuntimeError, match="in the middle of the run") as error:
        distil(*loaded, "fails")
    known = [loaded[0].model, loaded[1].patcher.model, trained[0].patcher.model]
    kept = [entry.model.model for entry in comfy.model_management.current_loaded_models]
    assert all(any(one is other for other in known) for one in kept), f"freed while {error} is known"


def test_cancel_does_not_end_a_step_in_the_middle():
    layer = comfy.ops.disable_weight_init.Linear(2, 2)
    layer.comfy_cast_weights = True
    comfy.model_management.interrupt_current_processing()
    with training():
        layer(torch.zeros(1, 2))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        layer(torch.zeros(1, 2))


def test_fast_products_without_a_gradient_are_refused(loaded, monkeypatch):
    monkeypatch.setattr(args, "fast", {PerformanceFeature.Fp8MatrixMultiplication})
    with pytest.raises(ValueError, match="has no gradient"):
        distil(*loaded, "refused")


def graph(name: str) -> dict[str, Any]:
    """The API prompt that trains and shows the report."""
    return {
        "model": {"class_type": "UNETLoader", "inputs": {"unet_name": FLUX, "weight_dtype": "default"}},
        "teacher": {"class_type": "DistilledT5Loader", "inputs": {"clip_name1": "none", "clip_name2": TEACHER, "type": "flux"}},
        "distil": {
            "class_type": "DistilledT5Distil",
            "inputs": {"model": ["model", 0], "teacher": ["teacher", 0], "name": name, **INPUTS},
        },
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["distil", 1]}},
    }


def test_cancel_saves_and_the_next_run_continues_to_the_same_student(trained, server: ComfyServer):
    cancelled = Watched(server, graph("cancelled"))
    kind, _ = cancelled.run(lambda node, _done: node == "distil")
    run = server.base / "output" / "distilled_t5" / "cancelled"
    reached = [line["step"] for line in metrics(run) if "loss" in line]
    assert kind == "execution_interrupted" and reached[-1] < STEPS
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [f"step-{reached[-1]:06d}"]
    continued = Watched(server, graph("cancelled"))
    assert continued.run()[0] == "execution_success"
    assert continued.progress["distil"][0] == (reached[-1] + 1, STEPS)
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, STEPS + 1))
    encoder = server.base / "models" / "text_encoders" / "cancelled.safetensors"
    assert open_student(encoder).metadata.sha256 == checksum("trained")
    encoder.unlink()
    assert "memory leak" not in server.log().lower()


@pytest.mark.full
def test_the_template_trains_a_student_and_draws_with_it(server: ComfyServer):
    prompt = to_api_prompt(example("10-Miniature-distil-an-encoder"), server.object_info())
    set_inputs(prompt, "DistilledT5Distil", steps=STEPS)
    set_inputs(prompt, "KSampler", steps=2)
    entry = server.run(prompt)
    images = {prompt[node]["class_type"]: images for node, images in server.images_by_node(entry).items()}
    assert [image.size for image in images["PreviewImage"]] == [((96 + 4 + 96) * 8, 96 * 8)]
    assert len(images["DistilledT5Distil"]) == 1


@pytest.mark.full
def test_the_student_that_the_template_trains_draws_its_prompt(server: ComfyServer):
    prompt = to_api_prompt(example("10-Miniature-distil-an-encoder"), server.object_info())
    set_inputs(prompt, "DistilledT5Distil", name="of_the_template")
    entry = server.run(prompt, timeout_s=1200)
    [both] = [images[0] for node, images in server.images_by_node(entry).items() if prompt[node]["class_type"] == "PreviewImage"]
    teacher, student = (read(pixels(both.crop((left, 0, left + 96 * 8, 96 * 8)))) for left in (0, 100 * 8))
    assert teacher is not None and student is not None
    assert sorted(thing.shape for thing in teacher.things) == ["heart", "ring", "tree"]
    assert student.things == teacher.things


def test_weights_are_not_copied_asynchronously_while_gradients_are_computed(loaded, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 2)
    with FrozenModel(loaded[0], FAMILIES["flux"]).differentiable(checkpoint_blocks=False):
        assert comfy.model_management.get_offload_stream(torch.device("cuda")) is None
    assert comfy.model_management.NUM_STREAMS == 2
