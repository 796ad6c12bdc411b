"""CLIP-L files in the layouts that the stock loader takes: the same pooled vector, and messages that agree with each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy_extras.nodes_flux import CLIPTextEncodeFlux
from distilled_t5.devtools.models.random_models import clip_l_shapes
from distilled_t5.encoder.companions import in_order, open_companion
from distilled_t5.encoder.files import open_student
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.tests.support.small_encoders import PROMPT, serve, stock_flux_clip, student_file
from distilled_t5.tests.support.tiny_students import published_file, sparse_file
from safetensors.torch import load_file, save_file
from torch import Tensor

OPENAI_NAMES = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers.": "transformer.resblocks.",
    ".self_attn.out_proj": ".attn.out_proj",
    ".mlp.fc1": ".mlp.c_fc",
    ".mlp.fc2": ".mlp.c_proj",
    ".layer_norm1": ".ln_1",
    ".layer_norm2": ".ln_2",
}


def openai_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert CLIP-L tensors to the layout of OpenAI and OpenCLIP: query, key and value in one tensor, the projection transposed."""
    made = {"text_projection": tensors["text_projection.weight"].T.contiguous(), "logit_scale": torch.tensor(4.6)}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
            tensor = torch.cat(parts)
        elif "k_proj" in name or "v_proj" in name or "text_projection" in name:
            continue
        for ours, theirs in OPENAI_NAMES.items():
            name = name.replace(ours, theirs)
        made[name] = tensor
    return made


def pooled(clip: Any, prompt: str = PROMPT) -> Tensor:
    """The pooled vector that the stock node for Flux gives."""
    (((_, extras),),) = CLIPTextEncodeFlux.execute(clip, prompt, prompt, 3.5).args
    assert extras.keys() == {"pooled_output", "guidance"}
    return extras["pooled_output"]


@pytest.fixture(scope="module")
def clip_l(stand_ins: Path) -> dict[str, Tensor]:
    """CLIP-L by transformers' names, with a projection that is not its own transpose."""
    tensors = load_file(stand_ins / "models" / "text_encoders" / "clip_l.safetensors")
    return tensors | {"text_projection.weight": torch.randn(768, 768, generator=torch.Generator().manual_seed(0)).half()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


def long_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    positions = torch.randn(248, 768, generator=torch.Generator().manual_seed(1)).half()
    return tensors | {"positional_embedding": positions}


def whole_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a part of the half that sees pictures, as in OpenAI's file."""
    return tensors | {"visual.transformer.resblocks.0.ln_1.weight": torch.ones(1024), "context_length": torch.tensor(77)}


MAKES = {"text half": lambda tensors: tensors, "long clip": long_clip, "with the vision half": whole_clip}


# The one with the vision half has the text half, too.
@pytest.mark.parametrize(
    "make", [pytest.param(make, id=name, marks=[pytest.mark.full] * (name == "text half")) for name, make in MAKES.items()]
)
def test_openai_layout_gives_the_pooled_vector_of_the_stock_loader(clip_l, folder, make):
    path = folder / "openai.safetensors"
    save_file(make(openai_layout(clip_l)), path)
    ours, stock = serve(student_file(folder), path).clip, stock_flux_clip(path)
    for prompt in (PROMPT, "a (red:1.4) cube " * 40):
        assert torch.equal(pooled(ours, prompt), pooled(stock, prompt))
    assert pooled(ours).count_nonzero() > 0
    assert torch.equal(ours.cond_stage_model.clip_l.transformer.text_projection.weight.half(), clip_l["text_projection.weight"])


def test_the_projection_of_old_clipsave_files_is_turned_as_the_stock_loader_turns_it(clip_l, folder):
    path, student = folder / "old_clipsave.safetensors", student_file(folder)
    old = {name: tensor for name, tensor in clip_l.items() if name != "text_projection.weight"}
    save_file(old | {"text_projection": clip_l["text_projection.weight"].t().contiguous()}, path)
    ours = serve(student, path).clip
    assert torch.equal(ours.cond_stage_model.clip_l.transformer.text_projection.weight.half(), clip_l["text_projection.weight"])
    assert torch.equal(pooled(ours), pooled(stock_flux_clip(path)))


def marked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With tensors that CLIP-L does not use: empty, not finite, integers."""
    unused = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn), "logit_bias": torch.tensor(torch.nan)}
    return tensors | unused | {"text_model.embeddings.position_ids": torch.arange(77)}


def test_tensors_that_clip_l_does_not_use_do_not_matter(clip_l, folder):
    student = student_file(folder)
    save_file(clip_l, folder / "plain.safetensors")
    save_file(marked(clip_l), folder / "marked.safetensors")
    assert torch.equal(*(pooled(serve(student, folder / f"{name}.safetensors").clip) for name in ("plain", "marked")))


def test_quantised_clip_l_is_refused_and_not_used_without_its_scales(clip_l, folder):
    layer = "text_model.encoder.layers.0.mlp.fc1"
    quantised = {f"{layer}.weight": clip_l[f"{layer}.weight"].to(torch.float8_e4m3fn), f"{layer}.scale_weight": torch.ones(1)}
    save_file(clip_l | quantised, folder / "scaled.safetensors")
    assert "is quantised (scaled fp8)" in refusal(folder / "scaled.safetensors")
    save_file(clip_l | {f"{layer}.weight": torch.ones(3072, 768, dtype=torch.int8)}, folder / "integers.safetensors")
    assert f"  {layer}.weight: I8\n" in refusal(folder / "integers.safetensors")


def test_openai_layout_may_be_named_second_too(clip_l, folder):
    path, student = folder / "openai.safetensors", student_file(folder)
    save_file(openai_layout(clip_l), path)
    assert in_order({"clip_l": str(student)}, str(path)) == ({"clip_l": str(path)}, str(student))


def refusal(path: Path) -> str:
    with pytest.raises(StudentFileError) as caught:
        open_companion("clip_l", path)
    return str(caught.value)


def test_what_an_openai_layout_lacks_is_listed_by_its_own_names(clip_l, folder):
    shapes = {name: tuple(tensor.shape) for name, tensor in openai_layout(clip_l).items()}
    path = folder / "bad.safetensors"
    sparse_file(path, {name: shape for name, shape in shapes.items() if "resblocks.11.mlp.c_fc" not in name}, "F16")
    assert "2 tensors of CLIP-L are missing" in refusal(path)
    assert "  transformer.resblocks.11.mlp.c_fc.bias\n" in refusal(path)
    scalar = {"transformer.resblocks.3.attn.in_proj_weight": (), "text_projection": (5,)}
    sparse_file(path, shapes | scalar, "F16")
    assert "2 tensors of CLIP-L have a wrong shape" in refusal(path)
    assert "in_proj_weight: expected [2304, 768], got []" in refusal(path)


def clip_l_without(path: Path, part: str) -> Path:
    return sparse_file(path, {name: shape for name, shape in clip_l_shapes().items() if part not in name}, "F16")


def clip_l_reshaped(path: Path) -> Path:
    name = "text_model.encoder.layers.3.self_attn.q_proj.weight"
    return sparse_file(path, clip_l_shapes() | {name: (768, 700), "text_model.final_layer_norm.bias": (12,)}, "F16")


def clip_l_with_a_nan(path: Path) -> Path:
    sparse_file(path, clip_l_shapes(), "F16")
    with path.open("r+b") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        file.write(b"\x00\x7e")
    return path


def clip_g(path: Path) -> Path:
    return sparse_file(path, {"text_model.encoder.layers.0.mlp.fc1.weight": (5120, 1280)}, "F16")


CLIP_L_FILES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "student": (published_file, ("is not a CLIP-L text encoder", "clip_l.safetensors as the CLIP-L file (clip_name1), or none")),
    "CLIP-G": (clip_g, ("is a CLIP, but not CLIP-L", "It holds 1 tensors")),
    "missing tensors": (
        lambda path: clip_l_without(path, "layers.11.mlp"),
        ("4 tensors of CLIP-L are missing", "  text_model.encoder.layers.11.mlp.fc2.bias\n"),
    ),
    "wrong shapes": (
        clip_l_reshaped,
        ("2 tensors of CLIP-L have a wrong shape", "q_proj.weight: expected [768, 768], got [768, 700]", "final_layer_norm.bias"),
    ),
    "NaN": (clip_l_with_a_nan, ("hold NaN or infinity", "  text_model.embeddings.token_embedding.weight\n")),
    "empty": (lambda path: path.write_bytes(b""), ("is empty (0 bytes)",)),
    "truncated": (lambda path: os.truncate(sparse_file(path, clip_l_shapes(), "F16"), 100_000), ("not a complete safetensors file",)),
}


@pytest.mark.parametrize(("make", "parts"), CLIP_L_FILES.values(), ids=CLIP_L_FILES)
def test_an_incomplete_or_invalid_clip_l_is_refused_and_nothing_is_loaded(folder, make, parts):
    make(folder / "bad.safetensors")
    loaded = list(comfy.model_management.current_loaded_models)
    with pytest.raises(StudentFileError) as caught:
        serve(student_file(folder), folder / "bad.safetensors")
    assert comfy.model_management.current_loaded_models == loaded
    message = str(caught.value)
    assert "bad.safetensors" in message.splitlines()[0]
    assert message.splitlines()[-1].startswith("What to do: ")
    for part in parts:
        assert part in message


PREFIXED = {f"cond_stage_model.transformer.{name}": shape for name, shape in clip_l_shapes().items()}
OTHER_CLIPS = {
    "behind a prefix": PREFIXED,
    "CLIP-G": {"text_model.encoder.layers.0.mlp.fc1.weight": (5120, 1280)},
    "OpenCLIP-G": {"transformer.resblocks.0.ln_1.weight": (1280,), "transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280)},
}


@pytest.mark.parametrize("shapes", OTHER_CLIPS.values(), ids=OTHER_CLIPS)
def test_a_clip_that_is_not_clip_l_is_refused_as_clip_l_and_as_a_student(folder, shapes):
    path = sparse_file(folder / "other.safetensors", shapes, "F16")
    assert "is a CLIP, but not CLIP-L" in refusal(path)
    with pytest.raises(StudentFileError) as caught:
        open_student(path)
    assert "is a CLIP text encoder, not a distilled T5" in str(caught.value)
    assert "if it is CLIP-L, pick it as the CLIP-L file (clip_name1)" in str(caught.value)
