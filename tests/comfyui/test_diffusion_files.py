"""Opening diffusion models: guidance is given exactly to models that take it, and a failing driver is not blamed on the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams
from distilled_t5.diffusion.files import check_family, check_guidance, open_diffusion_model, use_one_thread_if_small
from distilled_t5.diffusion.frozen import FrozenModel
from distilled_t5.families import FAMILIES
from distilled_t5.families.family import Family
from distilled_t5.miniature.files import FLUX_FILE, place
from distilled_t5.runtime.failure import explained
from distilled_t5.runtime.model_folders import SHIPPED
from distilled_t5.tests.support.small_models import SMALL_MODELS, SmallModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

FLUX = FAMILIES["flux"]


def test_guidance_is_given_exactly_to_models_that_take_it() -> None:
    dev = SMALL_MODELS["flux"]
    schnell = replace(dev, config={**dev.config, "guidance_embed": False})
    guided, unguided = (FrozenModel(small.patcher(), FLUX) for small in (dev, schnell))
    check_guidance("dev", guided, [2.0, 3.5])
    check_guidance("schnell", unguided, [])
    with pytest.raises(ValueError, match=r"schnell takes no guidance, but sampling.guidance is 2, 3.5.\nWhat to do: "):
        check_guidance("schnell", unguided, [2.0, 3.5])
    with pytest.raises(ValueError, match=r"dev needs guidance, but sampling.guidance is empty.\nWhat to do: set it to 3.5"):
        check_guidance("dev", guided, [])


@pytest.fixture(scope="module")
def every_model() -> dict[str, Any]:
    """A small model of each family."""
    return {name: model_of(*family.small) for name, family in FAMILIES.items()}


def model_of(kind: str, config: Mapping[str, Any]) -> Any:
    return SmallModel(kind, config, (), 0, 0.7).patcher().model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_another_family_is_refused_with_its_name_and_the_setting_that_fits(name: str, every_model: dict[str, Any]) -> None:
    family = FAMILIES[name]
    check_family("own", every_model[name], family)
    for other in [other for other in FAMILIES.values() if other is not family]:
        message = (
            f"file.safetensors is a {other.display_name}, not a {family.display_name}.\n"
            f'What to do: name a {family.display_name} file in diffusion_model.file, or set diffusion_model.family = "{other.name}".'
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            check_family("file.safetensors", every_model[other.name], family)


@pytest.mark.parametrize(("file", "own"), [("pixart_sigma_1024_ms", "pixart_sigma"), ("pixart_alpha_1024_ms", "pixart_alpha")])
def test_a_pixart_in_the_names_of_diffusers_is_loaded_for_its_own_family_alone(stand_ins: Path, file: str, own: str) -> None:
    path = stand_ins / "models" / "diffusion_models" / f"{file}.safetensors"
    assert open_diffusion_model(path, "auto", FAMILIES[own]).text_width == 4096
    [other] = {"pixart_sigma", "pixart_alpha"} - {own}
    with pytest.raises(ValueError, match=f'{file}.safetensors is a {FAMILIES[own].display_name}, not .*(.|\n)*family = "{own}"'):
        open_diffusion_model(path, "auto", FAMILIES[other])


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("checkpoints/sd3.5_medium", "sd3"),
        ("diffusion_models/pixart_sigma_1024_ms", "pixart_sigma"),
        pytest.param("diffusion_models/Chroma1-HD", "chroma", marks=pytest.mark.full),
    ],
)
def test_a_checkpoint_or_a_diffusion_model_held_in_fp8_has_a_gradient_to_the_text(stand_ins: Path, file: str, name: str) -> None:
    family = FAMILIES[name]
    model = open_diffusion_model(stand_ins / "models" / f"{file}.safetensors", "fp8_e4m3fn", family)
    assert torch.float8_e4m3fn in {weight.dtype for weight in model.model.parameters()}
    model.load()
    text_BLD = torch.randn(1, 4, family.text_width, requires_grad=True)
    pooled_1P = torch.randn(1, sum(family.companions.values()))
    latent = torch.randn(1, *family.latent_shape(max(64, family.least_side_px)))
    with model.differentiable(True):
        model.velocity(latent, torch.full((1,), 0.7), text_BLD, {"pooled_output": pooled_1P}).square().sum().backward()
    assert text_BLD.grad is not None and text_BLD.grad.isfinite().all()
    # Chroma's stand-in is made of zeros for the most part.
    assert text_BLD.grad.any() or name == "chroma"


def test_a_pixart_that_lacks_a_tensor_is_refused(stand_ins: Path, tmp_path: Path) -> None:
    tensors = load_file(stand_ins / "models" / "diffusion_models" / "pixart_sigma_1024_ms.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != "proj_out.bias"}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"is not a complete diffusion model. ComfyUI reports: unet missing.*final_layer.linear.bias"):
        open_diffusion_model(tmp_path / "part.safetensors", "auto", FAMILIES["pixart_sigma"])


SD3, CHROMA = FAMILIES["sd3"], FAMILIES["chroma"]
# fmt: off
RADIANCE = {
    **CHROMA.small[1], "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 8,
    "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 2, "nerf_tile_size": 32, "nerf_final_head_type": "linear",
    "nerf_embedder_dtype": torch.float32, "use_x0": False,
    **dict.fromkeys({"use_sequential_txt_ids"} & set(ChromaRadianceParams.__dataclass_fields__), False),
}
# fmt: on


@pytest.mark.parametrize(
    ("family", "kind", "config", "message"),
    [
        (CHROMA, "ChromaRadiance", RADIANCE, "is a Chroma Radiance, which draws pixels; expected a Chroma that draws latents (Chroma1-HD"),
        (SD3, "SD3", {**SD3.small[1], "in_channels": 33}, "takes 33 channels, expected the 16 of a latent: it also takes an image."),
        (SD3, "SD3", {**SD3.small[1], "adm_in_channels": 768}, "takes pooled text of width 768, expected 2048"),
    ],
    ids=["Chroma Radiance", "SD3 for inpainting", "SD3 of another pooled width"],
)
def test_a_variant_that_cannot_be_followed_is_refused_by_name(family: Family, kind: str, config: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"file.safetensors {message}")) as caught:
        check_family("file.safetensors", model_of(kind, config), family)
    assert f"What to do: name a complete {family.display_name} file" in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.gguf", b"GGUF" + bytes(100), "is a GGUF file, which ComfyUI itself does not load."),
        ("control.safetensors", save({"controlnet_blocks.0.weight": torch.zeros(2)}), "is a ControlNet, not a diffusion model."),
        ("lora.safetensors", save({"transformer.blocks.0.lora_A.weight": torch.zeros(2)}), "is a LoRA, not a diffusion model."),
    ],
    ids=["GGUF", "ControlNet", "LoRA"],
)
def test_what_is_not_a_diffusion_model_is_refused_for_every_family(
    family: Family, name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{name} {message}\nWhat to do: name a complete {family.display_name} file")):
        open_diffusion_model(tmp_path / name, "auto", family)


def test_an_error_of_the_driver_is_not_blamed_on_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_arguments: object, **_named: object) -> None:
        raise RuntimeError("CUDA error: the launch timed out and was terminated")

    monkeypatch.setattr(comfy.sd, "load_diffusion_model", failing)
    with pytest.raises(ValueError, match=r"could not be loaded: CUDA error.*\nWhat to do: check the GPU and its driver.") as caught:
        open_diffusion_model(place(SHIPPED, FLUX_FILE), "auto", FLUX)
    assert "not a diffusion model" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to mmap 23 bytes from file <flux>: Cannot allocate memory (12)"),
        SafetensorError("Cannot allocate memory (os error 12)"),
    ],
    ids=repr,
)
def test_too_little_memory_is_not_blamed_on_the_file(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(*_arguments: object, **_named: object) -> None:
        raise error

    monkeypatch.setattr(comfy.sd, "load_diffusion_model", failing)
    with pytest.raises(type(error)) as caught:
        open_diffusion_model(place(SHIPPED, FLUX_FILE), "auto", FLUX)
    assert (explained(caught.value) or "").startswith("Out of memory: ")


def test_a_file_in_a_folder_called_cuda_is_not_blamed_on_the_driver(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    save_file({"weight": torch.zeros(2)}, tmp_path / "cuda" / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is not a diffusion model that ComfyUI knows"):
        open_diffusion_model(tmp_path / "cuda" / "other.safetensors", "auto", FLUX)


@pytest.mark.parametrize(("weights", "threads"), [(20_000_000, 2), (19_999_999, 1)])
def test_a_model_as_small_as_the_miniature_runs_on_one_thread(weights: int, threads: int) -> None:
    model = FrozenModel(SMALL_MODELS["flux"].patcher(), FLUX)
    own = sum(weight.numel() for weight in model.model.parameters())
    model.model.register_parameter("ballast", torch.nn.Parameter(torch.empty(weights - own, device="meta"), requires_grad=False))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        use_one_thread_if_small(model)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
