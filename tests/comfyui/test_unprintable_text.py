"""Text that cannot be printed, in any text input of any node or in a path: no message, traceback or shown text carries it.

ComfyUI's prompt worker ends for good when it logs a lone surrogate, and every later prompt waits for ever.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import pytest
import torch
from comfy_api.latest import io
from distilled_t5.encoder.teacher import load_teacher
from distilled_t5.nodes import ENCODER_NODES, EVALUATION_NODES
from distilled_t5.nodes.common_text import DistilledT5CommonTextPrompt
from distilled_t5.nodes.distil import DistilledT5Distil
from distilled_t5.nodes.save import DistilledT5Save
from distilled_t5.nodes.text_encode import DistilledT5TextEncode
from distilled_t5.tests.support.small_encoders import serve, student_file

NODES = [*ENCODER_NODES, *EVALUATION_NODES]
TEXTS = ("\ud800", "odd\udcff.safetensors", "a fox\udfff")
FILE = "tiny.safetensors"
MINIATURE = Path(__file__).resolve().parents[2] / "miniature" / "models" / "diffusion_models" / "miniature_flux.safetensors"
# Values of the other inputs, by their names.
GOOD = {"clip_name1": "none", "clip_name2": FILE, "type": "flux", "dtype": "auto", "text": "a fox", "prompt": "a fox", "word": "fox"}
GOOD |= {
    "guidance": 3.5,
    "filename": "mine",
    "seed": 0,
    "expected": "open",
    "reader": "tesseract",
    "repeats": 1,
    "model": None,
    "file": FILE,
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only text encoder folder that ComfyUI knows, with one student."""
    return only_folder(tmp_path / "text_encoders", monkeypatch)


def only_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir()
    student_file(folder, token_length=24)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(folder)], folder_paths.supported_pt_extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return folder


def told(act: Callable[[], Any]) -> str:
    """Everything that ComfyUI prints or shows after a node has run or failed."""
    try:
        output = act()
    except Exception as error:  # noqa: BLE001 (ComfyUI prints any exception)
        return "".join(traceback.format_exception(error))
    return "\n".join([str(output.ui and output.ui.as_dict() if hasattr(output.ui, "as_dict") else output.ui), *map(str, output.args or ())])


def text_inputs(node: type[io.ComfyNode]) -> list[str]:
    return [each.id for each in node.define_schema().inputs if isinstance(each, (io.String.Input, io.Combo.Input))]


def test_every_node_that_takes_text_is_tried():
    without = {node.__name__ for node in NODES if not text_inputs(node)}
    assert without == {"DistilledT5AttentionMapImage"}


@pytest.mark.parametrize("node", [node for node in NODES if text_inputs(node)], ids=lambda node: node.__name__)
def test_no_text_input_brings_unprintable_text_into_a_message(models, node):
    clip = serve(models / FILE).clip
    good = {**GOOD, "clip": clip, "clip_1": clip, "image": torch.zeros(1, 8, 8, 3), "split": "train", "prompts": "a"}
    if node is DistilledT5Distil:
        good |= {
            "teacher": clip,
            "model": comfy.sd.load_diffusion_model(str(MINIATURE)),
            "preset": "schnell-16gb",
            "name": "mine",
            "steps": 1,
        }
    if node is DistilledT5Save:
        good["dtype"] = "as loaded"
    ids = [each.id for each in node.define_schema().inputs]
    for name in text_inputs(node):
        for text in TEXTS:
            values = {key: good[key] for key in ids if key in good} | {name: "\n".join([*"abcde", text]) if name == "prompts" else text}
            message = told(lambda values=values: node.execute(**values))
            assert message.encode(), (name, text)
            assert "Traceback" not in message or message.strip().splitlines()[-1].startswith("What to do: "), (name, text)
    assert DistilledT5TextEncode.execute(clip, "a fox", 3.5).args, "an ordinary prompt runs afterwards"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_models_folder_that_is_not_valid_unicode_is_printed_escaped(tmp_path, monkeypatch):
    clip = serve(student_file(tmp_path)).clip
    folder = only_folder(Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff")), monkeypatch)
    (folder / "link").symlink_to(tmp_path)
    for name in ("mine", "link/mine", f"{FILE}/mine", "a\x00", "."):
        assert told(lambda name=name: DistilledT5Save.execute(clip, name, "as loaded")).encode()
    assert (folder / "mine.safetensors").is_file()
    with pytest.raises(ValueError, match="its path is not valid Unicode") as caught:
        load_teacher(folder / FILE, {})
    assert "".join(traceback.format_exception(caught.value)).encode()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_full_or_forbidden_disk_in_such_a_folder_is_reported_escaped(tmp_path, monkeypatch):
    clip = serve(student_file(tmp_path)).clip
    only_folder(Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff")), monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda _handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    message = told(lambda: DistilledT5Save.execute(clip, "mine", "as loaded"))
    assert "could not be written to" in message
    assert message.encode()


def test_a_split_that_is_not_one_is_quoted():
    assert "no split" in told(lambda: DistilledT5CommonTextPrompt.execute(0, "\ud800"))  # pyright: ignore[reportArgumentType]
