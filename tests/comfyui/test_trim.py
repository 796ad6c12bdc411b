"""A trimmed text encoder gives the conditioning of the complete one in ComfyUI's own loader, bit for bit, with less memory."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.text_encoders.llama
import folder_paths
import pytest
import torch
from distilled_t5.encoder.teacher import load_teacher
from distilled_t5.encoder.trim import trim
from distilled_t5.families import FAMILIES, TRIMMABLE
from distilled_t5.families.family import Family
from distilled_t5.nodes import DistilledT5Loader
from distilled_t5.nodes.save import DistilledT5Save
from distilled_t5.nodes.trim import DistilledT5Trim
from distilled_t5.students import KINDS
from distilled_t5.students.qwen3 import QWEN3
from distilled_t5.students.qwen3.layout import Qwen3Layout
from safetensors.torch import save_file
from torch import Tensor

# Of the published widths, by which ComfyUI knows the files; otherwise thin.
SIZES = {"4b": Qwen3Layout(2560, 8, 36, 1, 1, vocab_size=64), "8b": Qwen3Layout(4096, 8, 36, 1, 1, vocab_size=64)}
THIN = {"vocab_size": 64, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
FP8 = torch.float8_e4m3fn
TOKENS = [(token, 1.0) for token in (5, 17, 39, 8, 60, 2)]
CASES = [pytest.param(one, id=name, marks=[pytest.mark.full] * (name != "flux2_klein_4b")) for name, one in TRIMMABLE.items()]
every_trimmable = pytest.mark.parametrize("family", CASES)


@pytest.fixture(autouse=True)
def thin_qwen3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Qwen3-4B and 8B of their widths with thin layers, in ComfyUI and here; and one folder of text encoders."""
    for name in ("Qwen3_4BConfig", "Qwen3_8BConfig"):
        monkeypatch.setattr(comfy.text_encoders.llama, name, functools.partial(getattr(comfy.text_encoders.llama, name), **THIN))
    monkeypatch.setitem(KINDS, "qwen3", replace(QWEN3, named=lambda size, _width=None: SIZES[size]))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], {".safetensors"}))


def tensors_of(family: Family) -> dict[str, Tensor]:
    """Weights under the names of ComfyUI's files, such that the layers matter."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in SIZES[family.teacher[1]].tensors().items():
        drawn = torch.randn(shape, generator=generator)
        values = 1 + 0.1 * drawn if len(shape) == 1 else drawn * math.prod(shape[1:]) ** -0.5
        tensors[name.replace("encoder.", "model.", 1)] = values.bfloat16()
    return tensors


def scaled_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=FP8)}
    for name, tensor in tensors.items():
        found[name] = tensor
        if "_proj." in name:
            scale = tensor.float().abs().max() / torch.finfo(FP8).max
            found |= {name: (tensor.float() / scale).to(FP8), name.replace(".weight", ".scale_weight"): scale}
    return found


def complete(folder: Path, family: Family, quantised: bool = False) -> Path:
    path = folder / "qwen.safetensors"
    save_file(scaled_fp8(tensors_of(family)) if quantised else tensors_of(family), path, {"format": "pt"})
    return path


def stock(path: Path, family: Family) -> Any:
    return comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType[family.clip_type])


def encoded(clip: Any, family: Family) -> list[Any]:
    return clip.encode_from_tokens_scheduled({family.part: [TOKENS]})


def weights(clip: Any) -> int:
    return sum(weight.numel() for weight in clip.cond_stage_model.parameters())


def loaded(name: str, family: Family, **more: Any) -> Any:
    return DistilledT5Loader.execute("none", name, family.name, **more)


def check_same(ours: list[Any], theirs: list[Any]) -> None:
    [(our_text, our_extras)], [(their_text, their_extras)] = ours, theirs
    assert torch.equal(our_text, their_text) and our_text.isfinite().all() and float(our_text.std()) > 0.01
    assert our_extras.keys() == their_extras.keys()


@every_trimmable
@pytest.mark.parametrize("quantised", [pytest.param(False, id="bf16"), pytest.param(True, id="scaled fp8")])
def test_the_node_saves_a_file_that_gives_the_same_bits_with_fewer_layers(family: Family, quantised: bool, tmp_path: Path):
    source = complete(tmp_path, family, quantised)
    (name,) = DistilledT5Trim.execute(source.name, family.name, "small").args
    whole = stock(source, family)
    clip, info = loaded(name, family).args
    check_same(encoded(clip, family), encoded(whole, family))
    share = family.layers_read / 36
    assert weights(clip) == pytest.approx(share * weights(whole), rel=0.01)
    assert f"{family.layers_read} of 36 layers" in info and f"text width {family.text_width}" in info
    if not quantised:  # else the layers of ComfyUI's own loader, which makes all of them, have no weights
        check_same(encoded(stock(tmp_path / name, family), family), encoded(whole, family))


@every_trimmable
def test_which_layers_are_read_is_what_comfyuis_text_model_asks_for(family: Family, tmp_path: Path):
    part = getattr(stock(complete(tmp_path, family), family).cond_stage_model, family.part)
    asked = max(part.layer) if isinstance(part.layer, list) else part.num_layers + part.layer_idx + 1
    assert asked == family.layers_read and not part.layer_norm_hidden_state


def test_a_layer_from_the_end_is_that_of_the_complete_encoder(tmp_path: Path):
    family = FAMILIES["z_image"]
    source = complete(tmp_path, family)
    trim(source, family, tmp_path / "small.safetensors")
    ours, theirs = loaded("small.safetensors", family).args[0], stock(source, family)
    for layer in (-3, -2, -10, None):
        for clip in (ours, theirs):
            clip.layer_idx = layer
        check_same(encoded(ours, family), encoded(theirs, family))
    ours.layer_idx = -1
    with pytest.raises(ValueError, match=r"Layer -1 of the text encoder is not loaded: expected -2 or less\.\nWhat to do: remove CLIP Set"):
        encoded(ours, family)


@pytest.mark.full
def test_the_second_copy_that_dynamic_vram_makes_reads_the_same_layers(tmp_path: Path):
    family = FAMILIES["z_image"]
    trim(complete(tmp_path, family), family, tmp_path / "small.safetensors")
    clip = loaded("small.safetensors", family).args[0]
    expected = encoded(clip, family)
    make, arguments = clip.patcher.cached_patcher_init
    clip.patcher = make(*arguments, disable_dynamic=True)
    clip.cond_stage_model = clip.patcher.model
    check_same(encoded(clip, family), expected)


@every_trimmable
def test_a_teacher_is_loaded_without_the_layers_that_are_not_read_and_a_trimmed_one_teaches_alike(family: Family, tmp_path: Path):
    source = complete(tmp_path, family)
    small = trim(source, family, tmp_path / "small.safetensors")
    whole = stock(source, family)
    for path in (source, small):
        teacher = load_teacher(path, {}, family)
        assert weights(teacher.clip) < 0.99 * weights(whole)
        check_same(encoded(teacher.clip, family), encoded(whole, family))


def test_files_and_settings_that_do_not_fit_are_refused_with_what_to_do(tmp_path: Path):
    klein, z_image, large = (FAMILIES[name] for name in ("flux2_klein_4b", "z_image", "flux2_klein_9b"))
    trim(complete(tmp_path, klein), klein, tmp_path / "small.safetensors")
    for act, message in (
        (
            lambda: loaded("small.safetensors", z_image),
            "was trimmed for FLUX.2 klein 4B; the type is z_image.\nWhat to do: set type to flux2_klein_4b.",
        ),
        (lambda: loaded("small.safetensors", large), "the type is flux2_klein_9b.\nWhat to do: set type to flux2_klein_4b."),
        (lambda: loaded("small.safetensors", klein, dtype="fp8_e4m3fn"), "which keeps its number format.\nWhat to do: set dtype to auto"),
        (
            lambda: loaded("small.safetensors", FAMILIES["flux"]),
            "small.safetensors was trimmed for FLUX.2 klein 4B; the type is flux.\nWhat to do: set type to flux2_klein_4b.",
        ),
        (
            lambda: DistilledT5Save.execute(loaded("small.safetensors", klein).args[0], "x", "as loaded"),
            "This CLIP is a trimmed text encoder, not a distilled one: it is a file already.\nWhat to do: copy the file",
        ),
        (lambda: loaded("qwen.safetensors", klein), "is a plain Qwen3-4B"),
        (lambda: DistilledT5Trim.execute("qwen.safetensors", "flux", "x"), "There is no type 'flux'"),
    ):
        with pytest.raises(ValueError, match="What to do: ") as refused:
            act()
        assert message in str(refused.value)
