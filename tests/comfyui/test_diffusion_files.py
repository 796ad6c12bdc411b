"""Opening diffusion models: guidance is given exactly to models that take it, and a failing driver is not blamed on the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import comfy.sd
import pytest
import torch
from distilled_t5.diffusion.files import check_guidance, open_diffusion_model, use_one_thread_if_small
from distilled_t5.diffusion.frozen import FrozenModel
from distilled_t5.families import FAMILIES
from distilled_t5.miniature.files import FLUX_FILE, place
from distilled_t5.runtime.failure import explained
from distilled_t5.runtime.model_folders import SHIPPED
from distilled_t5.tests.support.small_models import SMALL_MODELS
from safetensors import SafetensorError
from safetensors.torch import save_file

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
