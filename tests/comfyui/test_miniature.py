"""The miniature in a real ComfyUI: the VAE by hand, T5's tokenizer, and the command from nothing to a picture through stock nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.sd
import pytest
import safetensors.torch
import torch
from distilled_t5.diffusion.frozen import FrozenModel
from distilled_t5.diffusion.gradients import blocks_of, differentiable
from distilled_t5.encoder.files import open_student
from distilled_t5.families import FAMILIES
from distilled_t5.miniature import flow
from distilled_t5.miniature.autoencoder import vae_tensors
from distilled_t5.miniature.corpus import draw_text
from distilled_t5.miniature.corruption import FIRST_SENTINEL, SENTINELS, corrupt, load_tokenizer, noise_spans
from distilled_t5.miniature.files import FLUX_FILE, FOLDERS, SD3_FILE, TEACHER_FILE, VAE_FILE, place
from distilled_t5.miniature.flux import FLUX, FluxSize, load_weights, make_flux
from distilled_t5.miniature.lora import load_flux, save_lora, trained_part, with_lora
from distilled_t5.miniature.make import TRAINED, make_vae
from distilled_t5.miniature.sd3 import SD3, SD3Size
from distilled_t5.miniature.teacher import IGNORED, FrozenTeacher, draw_batch, example
from distilled_t5.miniature.training import Plan, train
from distilled_t5.runtime.model_folders import add_model_folders
from distilled_t5.runtime.weights import data_sha256
from distilled_t5.tests.support.prepared import run_prepared
from distilled_t5.tests.support.small_encoders import encode, serve
from distilled_t5.tests.support.spans import restore
from distilled_t5.world.captions import TOKEN_LENGTH, draw_prompt, write_prompts
from distilled_t5.world.pictures import CELL_PX, SIDE, TASKS, render
from distilled_t5.world.reader import verdict
from distilled_t5.world.scenes import draw_scene, random_of
from safetensors.torch import load_file
from torch import Tensor

import nodes

PACK = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SIZE = FluxSize(128, 1, 1)
CAPTION = "a red star left of a blue moon"


@pytest.fixture(scope="module", params=[False, True], ids=["computed", "file"])
def vae(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The stock VAE of the tensors as they are, and as they are in the file."""
    return comfy.sd.VAE(sd=load_file(make_vae(tmp_path_factory.mktemp("vae"))) if request.param else vae_tensors())


@pytest.fixture(scope="module")
def tokenizer(comfyui_path: Path) -> Any:
    return load_tokenizer(comfyui_path)


def pixels(scene: Any) -> Tensor:
    return torch.from_numpy(render(scene, CELL_PX))[None]


@torch.no_grad()
def round_trip(vae: Any, picture_BHWC: Tensor) -> Tensor:
    return vae.decode(vae.encode(picture_BHWC)).float()


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_that_went_through_the_vae_is_read_for_what_it_was(vae, task):
    for index in range(4):
        scene = draw_scene(0, index, "train", task)
        assert verdict(scene, round_trip(vae, pixels(scene))[0].numpy())


def test_a_round_trip_through_the_vae_is_as_exact_as_its_docstring_says():
    vae = comfy.sd.VAE(sd=vae_tensors())
    picture = torch.cat([pixels(draw_scene(1, index, "train")) for index in range(6)])
    assert (round_trip(vae, picture) - picture).abs().max() < 1e-6
    stored = comfy.sd.VAE(sd={name: tensor.bfloat16() for name, tensor in vae_tensors().items()})
    assert (round_trip(stored, picture) - picture).abs().max() < 1e-3
    ramp = torch.linspace(0, 1, 12).repeat_interleave(8).expand(1, 96, 96)[..., None].expand(1, 96, 96, 3)
    assert 0.04 < (round_trip(vae, ramp.contiguous()) - ramp).abs().max() < 0.047


@pytest.mark.parametrize(("model", "latent_format"), [(FLUX, comfy.latent_formats.Flux), (SD3, comfy.latent_formats.SD3)])
def test_models_are_trained_on_what_the_vae_makes_of_pictures(model, latent_format):
    scene = draw_prompt(2, 0, "train")[0]
    encoded = latent_format().process_in(comfy.sd.VAE(sd=vae_tensors()).encode(pixels(scene)))
    torch.testing.assert_close(flow.draw_batch(model, 2, 0, 1).clean_BCHW, encoded, atol=1e-4, rtol=0)


def test_every_caption_fits_into_the_length_that_it_is_padded_to(tokenizer):
    captions = [draw_prompt(0, index, "train")[1] for index in range(5000)]
    assert max(len(ids) for ids in tokenizer(captions)["input_ids"]) <= TOKEN_LENGTH


def test_a_corrupted_text_and_what_was_hidden_of_it_make_the_text_again(tokenizer):
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == FIRST_SENTINEL
    assert tokenizer.convert_tokens_to_ids("<extra_id_99>") == FIRST_SENTINEL - SENTINELS + 1
    for index in range(200):
        text = draw_text(0, index)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        inputs, targets = corrupt(tokens, noise_spans(len(tokens), random_of("test", index)))
        assert "<extra_id_0>" in tokenizer.decode(inputs)
        assert tokenizer.decode(restore(inputs, targets)) == tokenizer.decode(tokens)


def test_a_batch_of_texts_is_a_function_of_seed_and_step_and_no_target_is_cut(tokenizer):
    inputs, targets = draw_batch(tokenizer, 0, 3, 64)
    again = draw_batch(tokenizer, 0, 3, 64)
    assert torch.equal(inputs, again[0])
    assert torch.equal(targets, again[1])
    assert (inputs.shape, targets.shape) == ((64, TOKEN_LENGTH), (64, TOKEN_LENGTH))
    assert ((targets == 1).sum(dim=1) == 1).all()
    assert (targets != IGNORED).any(dim=1).all()
    long = example("word " * 200, tokenizer, random_of("long"))
    assert (len(long[0]), long[1].count(1)) == (TOKEN_LENGTH, 1)


def run(comfyui: Path, out: Path, *arguments: str) -> str:
    """The command as a user gives it; its last lines if it ends well."""
    command = PACK / "miniature"
    options = ["--out", str(out), "--comfyui", str(comfyui), "--batch", "8"]
    status, said = run_prepared([str(command), *arguments, *options], out.parent, 400)
    assert status == 0, said
    return said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, comfyui_path: Path) -> Path:
    """What the command leaves behind after three steps of each model."""
    out = tmp_path_factory.mktemp("made")
    run(comfyui_path, out, "all", "--steps", "3")
    return out


def test_the_command_makes_files_whose_headers_say_what_made_them(made, comfyui_path):
    assert {path.name for kind in FOLDERS.values() for path in (made / kind).iterdir()} == {*FOLDERS}
    teacher = open_student(place(made, TEACHER_FILE))
    assert (teacher.metadata.projection, teacher.metadata.token_length) == ("none", TOKEN_LENGTH)
    assert len(teacher.metadata.facts["distilled_t5.miniature_plan_sha256"]) == 64
    losses = [json.loads(line) for line in (made / "flux-run" / "metrics.jsonl").open()]
    assert [line["step"] for line in losses] == [3]


@pytest.mark.full
def test_a_run_that_is_resumed_after_its_end_writes_the_same_files_again(made, comfyui_path):
    before = {name: place(made, name).read_bytes() for name in (TEACHER_FILE, FLUX_FILE, SD3_FILE)}
    output = run(comfyui_path, made, "all", "--steps", "3", "--resume")
    assert output.count("Done:") == 5
    for name, content in before.items():
        old, new = load_file(place(made, name)), load_file(_written(made.parent / name, content))
        assert all(torch.equal(old[key], new[key]) for key in old)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.full
def test_a_flux_without_a_teacher_is_an_error_that_says_what_to_do(tmp_path, comfyui_path):
    command = PACK / "miniature"
    arguments = [sys.executable, str(command), "flux", "--out", str(tmp_path), "--comfyui", str(comfyui_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "What to do: make it first, with `miniature teacher` and the same --out." in done.stderr


def test_the_teacher_that_the_flux_learns_from_is_the_one_that_the_loader_serves(made, tokenizer):
    frozen = FrozenTeacher(place(made, TEACHER_FILE), tokenizer, CPU)
    [(served_BLD, extras)] = encode(serve(place(made, TEACHER_FILE)).clip, CAPTION)
    torch.testing.assert_close(frozen([CAPTION]), served_BLD, atol=1e-3, rtol=1e-3)
    assert served_BLD.shape == (1, TOKEN_LENGTH, frozen.width)
    assert not extras["pooled_output"].any()


def test_the_products_trainer_makes_a_student_of_it_that_the_loader_serves(made, comfyui_path, tmp_path):
    prompts = write_prompts(tmp_path / "prompts", 64)[1]
    settings = [
        f"teacher.t5={place(made, TEACHER_FILE)}",
        f"diffusion_model.file={place(made, FLUX_FILE)}",
        f"sampling.token_lengths=[{TOKEN_LENGTH}]",
    ]
    for stage in range(2):
        corpora = f'[{{kind="lines", path="{prompts.as_posix()}"}}]'
        settings += [f"stage.{stage}.corpora={corpora}", f"stage.{stage}.resolution_px={SIDE * CELL_PX}", f"stage.{stage}.steps=4"]
    arguments = [part for setting in [*settings, "validation.prompts=2"] for part in ("--set", setting)]
    trainer = [str(PACK / "train"), "smoke", "--run", str(tmp_path / "run"), "--comfyui", str(comfyui_path), *arguments]
    status, said = run_prepared([*trainer, "--", "--base-directory", str(tmp_path), "--cpu"], tmp_path, 400)
    assert status == 0, said
    [student] = (tmp_path / "models" / "text_encoders").glob("*.safetensors")
    [(text_BLD, _)] = encode(serve(student).clip, CAPTION)
    assert text_BLD.shape == (1, TOKEN_LENGTH, open_student(place(made, TEACHER_FILE)).layout.d_model)


def test_stock_nodes_and_comfyuis_sampler_generate_an_image_from_the_three_files(made):
    add_model_folders(made)
    [model] = nodes.UNETLoader().load_unet(FLUX_FILE, "default")
    [vae] = nodes.VAELoader().load_vae(VAE_FILE)
    clip = serve(place(made, TEACHER_FILE)).clip
    conditioning = [[text, {**extras, "guidance": 3.5}] for text, extras in encode(clip, CAPTION)]
    empty = {"samples": torch.zeros(1, 16, SIDE, SIDE)}
    [latent] = nodes.KSampler().sample(model, 0, 4, 1.0, "euler", "simple", conditioning, conditioning, empty)
    [picture] = nodes.VAEDecode().decode(vae, latent)
    assert picture.shape == (1, 96, 96, 3)
    assert torch.isfinite(picture).all()
    assert model.model.diffusion_model.params.guidance_embed


@torch.no_grad()
def velocities(kind: flow.DiffusionModel, module: Any, patcher: Any) -> tuple[Tensor, Tensor]:
    """The velocity from the module itself, and from a loaded model through ComfyUI's apply_model, as the trainer computes it."""
    family, batch = FAMILIES[kind.family], flow.draw_batch(kind, 0, 0, 4)
    loaded = FrozenModel(patcher, family)
    loaded.load()
    text = torch.randn(4, TOKEN_LENGTH, 128, generator=torch.Generator().manual_seed(1))
    extras = {"pooled_output": torch.zeros(4, sum(family.companions.values()))}
    found = loaded.velocity(batch.noise_BCHW, batch.sigma_B, text, extras, batch.guidance_B)
    return kind.predict(module, batch.noise_BCHW, batch.sigma_B, text, batch.guidance_B), found


def test_the_lora_that_is_trained_is_the_one_that_the_stock_loader_applies(made, tmp_path):
    """With large random values, the trained Flux with parametrised weights and the Flux patched by ComfyUI give equal velocities."""
    flux = load_flux(place(made, FLUX_FILE), 128)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        flux.final_layer.linear.weight.normal_(0, 0.1, generator=generator)
    saved = FLUX.save(tmp_path / "flux.safetensors", dict(flux.state_dict()), {}, torch.float32)
    low_ranks = with_lora(flux)
    with torch.no_grad():
        for low_rank in low_ranks.values():
            low_rank.up.normal_(0, 0.1, generator=generator)
            for weight in (low_rank.up, low_rank.down):
                weight.copy_(weight.bfloat16())
    averaged = {name: weight.detach() for name, weight in trained_part(low_ranks).named_parameters()}
    lora = safetensors.torch.load_file(save_lora(tmp_path / "lora.safetensors", averaged, low_ranks, {}))
    patcher, _ = comfy.sd.load_lora_for_models(
        comfy.sd.load_diffusion_model(str(saved), model_options={"dtype": torch.float32}), None, lora, 1.0, 0.0
    )
    expected, found = velocities(FLUX, flux, patcher)
    without, _ = velocities(FLUX, load_flux(saved, 128), patcher)
    assert (expected - without).abs().mean() > 0.02
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("kind", [replace(FLUX, size=SIZE), replace(SD3, size=SD3Size(2))], ids=["flux", "sd3"])
def test_what_is_trained_and_what_is_loaded_give_the_same_velocity(kind, tmp_path):
    module = kind.make(kind.size, 128, 5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        module.final_layer.linear.weight.normal_(0, 0.1, generator=generator)
    path = kind.save(tmp_path / "model.safetensors", dict(module.state_dict()), {}, torch.float32)
    expected, found = velocities(kind, module, comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32}))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_a_diffusion_model_stopped_and_resumed_is_the_one_trained_without_a_stop(kind, made, comfyui_path, tmp_path):
    """Bit for bit, through the files that the command writes."""
    teacher = place(tmp_path, TEACHER_FILE)
    teacher.parent.mkdir()
    teacher.write_bytes(place(made, TEACHER_FILE).read_bytes())
    plan, make = replace(TRAINED[kind][0], steps=4, batch=2), TRAINED[kind][1]
    asked = iter((False, True))
    assert make(tmp_path, comfyui_path, plan, False, lambda: next(asked)) is None
    resumed = data_sha256(make(tmp_path, comfyui_path, plan, True, lambda: False))
    (tmp_path / f"{kind}-run").rename(tmp_path / "before")
    assert data_sha256(make(tmp_path, comfyui_path, plan, False, lambda: False)) == resumed


def test_a_flux_loads_the_weights_of_a_file_and_refuses_another_size(tmp_path):
    written, begun = make_flux(SIZE, 128, seed=5), make_flux(SIZE, 128, seed=6)
    path = FLUX.save(tmp_path / "flux.safetensors", dict(written.state_dict()), {}, torch.float32)
    load_weights(begun, path)
    assert all(torch.equal(weight, written.state_dict()[name]) for name, weight in begun.state_dict().items())
    with pytest.raises(ValueError, match="not a Flux of this size"):
        load_weights(make_flux(FluxSize(128, 2, 1), 128, seed=0), path)


@pytest.mark.parametrize("kind", [replace(FLUX, size=SIZE), replace(SD3, size=SD3Size(2))], ids=["flux", "sd3"])
def test_the_losss_gradient_is_its_numeric_derivative(kind):
    module = kind.make(kind.size, 128, 5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    text = torch.randn(4, TOKEN_LENGTH, 128, generator=generator)
    batch, blocks = flow.draw_batch(kind, 0, 0, 4), blocks_of(module, FAMILIES[kind.family].block_lists)
    watched = max(blocks[0].parameters(), key=torch.numel)

    def loss() -> Tensor:
        return flow.loss_of(partial(kind.predict, module), lambda _captions: text, batch, torch.device("cpu"))

    with differentiable(module, blocks, False):
        loss().backward()
    steepest = watched.grad / watched.grad.norm()
    with torch.no_grad():
        values = []
        for step in (0.02, -0.04):
            watched.add_(steepest * step)
            values.append(float(loss()))
    assert float(watched.grad.norm()) == pytest.approx((values[0] - values[1]) / 0.04, rel=2e-2)


def test_the_loss_of_the_true_velocity_is_zero_and_idle_channels_count_a_twentieth():
    batch = flow.draw_batch(FLUX, 0, 0, 4)
    velocity = batch.noise_BCHW - batch.clean_BCHW
    assert float(flow.flow_loss(velocity, batch)) == 0.0
    off = [velocity.clone() for _ in range(2)]
    off[0][:, 0] += 1
    off[1][:, 5] += 1
    colour, idle = (float(flow.flow_loss(part, batch)) for part in off)
    assert idle == pytest.approx(colour * flow.IDLE_CHANNEL_WEIGHT, rel=1e-4)


def test_a_share_of_the_samples_of_sd3_has_no_caption_and_the_others_have_those_of_flux():
    batches = {step: flow.draw_batch(SD3, 0, step, 48) for step in (0, 1, 2, flow.BATCHES)}
    assert batches[0].captions == batches[flow.BATCHES].captions
    assert not torch.equal(batches[0].noise_BCHW, batches[flow.BATCHES].noise_BCHW)
    assert 0 < sum(caption == "" for batch in batches.values() for caption in batch.captions) < 24
    full = flow.draw_batch(FLUX, 0, 0, 48).captions
    assert all(one in ("", other) for one, other in zip(batches[0].captions, full, strict=True))
    assert "" not in full


def test_a_step_draws_every_band_of_noise_and_any_guidance():
    batch = flow.draw_batch(FLUX, 0, 7, 64)
    assert torch.equal(batch.noise_BCHW, flow.draw_batch(FLUX, 0, 7, 64).noise_BCHW)
    assert (batch.sigma_B.diff() > 0).all()
    assert batch.sigma_B.min() < 0.1
    assert batch.sigma_B.max() > 0.97
    assert batch.guidance_B.min() < 1.5
    assert batch.guidance_B.max() > 5.0


@pytest.mark.full
def test_a_flux_that_was_trained_on_two_pictures_draws_them_for_their_captions(tmp_path):
    """Learning, saving, stock loading, sampling, decoding and reading agree with each other: less than a minute on one core."""
    few, generator = flow.draw_batch(FLUX, 0, 0, 2), torch.Generator().manual_seed(0)
    text_BLD = torch.randn(2, 8, 128, generator=generator)
    module = make_flux(FluxSize(128, 2, 2), 128, seed=0)

    def loss_at(step: int) -> Tensor:
        batch = replace(flow.draw_batch(FLUX, 1, step, 8), clean_BCHW=few.clean_BCHW.repeat(4, 1, 1, 1))
        return flow.loss_of(partial(FLUX.predict, module), lambda _captions: text_BLD.repeat(4, 1, 1), batch, torch.device("cpu"))

    with differentiable(module, blocks_of(module, FAMILIES["flux"].block_lists), False):
        trainee = train(module, loss_at, Plan(steps=360, warmup_steps=10, average_steps=20), {}, tmp_path / "run", resume=False)
    assert trainee is not None
    path = FLUX.save(tmp_path / "flux.safetensors", trainee.averaged(), {}, torch.bfloat16)
    model, vae = comfy.sd.load_diffusion_model(str(path)), comfy.sd.VAE(sd=vae_tensors())
    for index in range(2):
        conditioning = [[text_BLD[index : index + 1], {"pooled_output": torch.zeros(1, 768), "guidance": 3.5}]]
        empty = {"samples": torch.zeros(1, 16, SIDE, SIDE)}
        [latent] = nodes.KSampler().sample(model, index, 12, 1.0, "euler", "simple", conditioning, conditioning, empty)
        with torch.no_grad():
            picture = vae.decode(latent["samples"])[0].float().numpy()
        assert verdict(draw_scene(0, index, "train"), picture)


def test_a_width_that_no_head_fits_is_refused():
    with pytest.raises(ValueError, match="choose a multiple of 128"):
        make_flux(FluxSize(width=100), 128, seed=0)


def test_the_vaes_file_is_the_same_every_time(tmp_path):
    first, second = (make_vae(tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == second
