"""Weights of judges in the format in which they are published (.pth), which ComfyUI reads: tensors and nothing else."""

from __future__ import annotations

import pickle
import re

import comfy.utils
import pytest
import torch
from distilled_t5.evaluate.judge_images import read_image
from distilled_t5.evaluate.local_weights import load_file
from distilled_t5.tests.support.tiny_judges import save_alexnet
from PIL import Image


def test_a_pth_file_is_read_as_its_safetensors_twin(tmp_path):
    published, twin = (load_file(save_alexnet(tmp_path / name), "LPIPS", "somewhere") for name in ("a.pth", "a.safetensors"))
    assert published.keys() == twin.keys()
    assert all(torch.equal(tensor, twin[name]) for name, tensor in published.items())


def test_a_file_with_code_and_a_file_without_names_are_refused(tmp_path):
    (tmp_path / "armed.pth").write_bytes(pickle.dumps({"weight": re.compile("code")}))
    with pytest.raises(ValueError, match=r"is not a valid file of weights: \w+\.\nWhat to do: download all of it") as caught:
        load_file(tmp_path / "armed.pth", "LPIPS", "somewhere")
    assert "weights_only" not in str(caught.value)
    torch.save({"weight": [torch.zeros(2)], "other": 1}, tmp_path / "list.pth")
    with pytest.raises(ValueError, match="is not a file of named tensors"):
        load_file(tmp_path / "list.pth", "LPIPS", "somewhere")


def test_too_little_memory_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    def failing(*_arguments: object, **_named: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    save_alexnet(tmp_path / "a.pth")
    monkeypatch.setattr(comfy.utils, "load_torch_file", failing)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_file(tmp_path / "a.pth", "LPIPS", "somewhere")


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "truncated"])
def test_a_damaged_photograph_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "0.jpg"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:900] if content is None else content)
    with pytest.raises(ValueError, match=r"0\.jpg is not a complete image: (.|\n)*What to do: download a photograph again"):
        read_image(path)
