"""Small random models for a first run without any model file: the family's small diffusion model, and a teacher of its text width."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

from ..diffusion.files import DTYPES
from ..diffusion.frozen import FrozenModel
from ..encoder.files import write_student
from ..encoder.metadata import StudentMetadata
from ..families.family import Family
from ..runtime.random_weights import drawn


def teacher_file(folder: Path, family: Family) -> Path:
    """A small random encoder of the family's text width, in the distilled file format."""
    tensors = drawn(family.kind.stand_in(family.text_width).tensors(), seed=1)
    metadata = StudentMetadata(family.name, family.token_length, pooled="zero", title="stand-in teacher")
    return write_student(folder / "teacher.safetensors", tensors, metadata)


def diffusion_model(family: Family, dtype: str) -> FrozenModel:
    """The family's small diffusion model with random weights.

    ComfyUI builds it as its loader does, but from the configuration: its detection knows some families by sizes that are not small.
    """
    name, sizes = family.small
    config, device = getattr(comfy.supported_models, name)(dict(sizes)), comfy.model_management.get_torch_device()
    weights = DTYPES[dtype] or comfy.model_management.unet_dtype(
        supported_dtypes=config.supported_inference_dtypes, weight_dtype=torch.float32
    )
    config.set_inference_dtype(weights, comfy.model_management.unet_manual_cast(weights, device, config.supported_inference_dtypes))
    model = config.get_model({}, "")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.diffusion_model.state_dict().items()}
    # The model's own layers come first, so that the weights of the smoke recipe stay as they were.
    ordered = {name: shapes[name] for name in sorted(shapes, key=lambda name: name.count(".") > 1)}
    model.diffusion_model.load_state_dict(drawn(ordered, seed=2))
    return FrozenModel(comfy.model_patcher.CoreModelPatcher(model, device, comfy.model_management.unet_offload_device()), family)
