"""What a user can pick or type by mistake: the nodes say what was expected, what was found and what to do, and load or write nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from distilled_t5.devtools.models.random_models import clip_l_shapes
from distilled_t5.nodes import DistilledT5Loader, DistilledT5Save, DistilledT5TextEncode
from distilled_t5.nodes.model_files import clip_l_names, new_file, path_of, remove_abandoned_files, text_encoder_names
from distilled_t5.runtime.disk import UNFINISHED
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.students.t5.layout import SHARED
from distilled_t5.tests.support.bad_students import FILES, STUDENT
from distilled_t5.tests.support.prepared import run_prepared
from distilled_t5.tests.support.small_encoders import embedding, serve
from distilled_t5.tests.support.tiny_students import FULL_VOCABULARY, published_file, sparse_file, tiny_tensors
from safetensors.torch import load_file

NAME = "bad.safetensors"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only text encoder folder that ComfyUI knows; it holds one good student."""
    folder = tmp_path / "text_encoders"
    folder.mkdir()
    published_file(folder / "good.safetensors", STUDENT)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(folder)], folder_paths.supported_pt_extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return folder


def load(clip_name2: str, clip_name1: str = "none", **settings: Any) -> Any:
    return DistilledT5Loader.execute(clip_name1, clip_name2, "flux", **settings).args[0]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The good student, loaded from a folder of its own."""
    folder = tmp_path_factory.mktemp("loaded")
    published_file(folder / "good.safetensors", STUDENT)
    return serve(folder / "good.safetensors").clip


def refusal(act: Callable[[], object], kind: type[Exception] = StudentFileError) -> str:
    """The message of an error that a person can act on; nothing may have been loaded."""
    loaded = list(comfy.model_management.current_loaded_models)
    with pytest.raises(kind) as caught:
        act()
    assert comfy.model_management.current_loaded_models == loaded
    message = str(caught.value)
    assert message.splitlines()[-1].startswith("What to do: ")
    assert not message.startswith("What to do: ")
    return message


@pytest.mark.parametrize(("make", "parts"), FILES.values(), ids=FILES)
def test_loader_refuses_the_file_and_says_what_to_do(models, make, parts):
    make(models / NAME)
    message = refusal(lambda: load(NAME))
    assert NAME in message.splitlines()[0]
    for part in parts:
        assert part in message


def test_folder_full_of_bad_files_still_makes_a_list_with_the_students_first(models):
    for number, (make, _) in enumerate(FILES.values()):
        make(models / f"a{number:02}.safetensors")
    (models / "folder.safetensors").mkdir()
    (models / "dangling.safetensors").symlink_to(models / "nothing")
    names = text_encoder_names()
    # These two look right until their numbers are read, which a list does not do.
    plausible = {f"a{list(FILES).index(kind):02}.safetensors" for kind in ("NaN", "other data than its hash says")}
    assert set(names[:3]) == {"good.safetensors", *plausible}
    assert len(names) == len(FILES) + 2
    assert set(clip_l_names()) == {*names, "none"}


def test_torch_file_of_the_authors_is_refused_with_the_command_that_converts_it(models, comfyui_path):
    torch.save(STUDENT, models / "authors.pth")
    message = refusal(lambda: load("authors.pth"))
    assert message.startswith("authors.pth is a file of torch.save")
    command = message.splitlines()[-1].partition(": python -c ")[2]
    status, said = run_prepared(["-c", command.strip('"')], comfyui_path, 100)
    assert status == 0, said
    assert load("authors.safetensors").cond_stage_model.layout == FULL_VOCABULARY


def overflowing(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers writes a T5 in fp16: one kind of matrix in fp32, here with a number that fp16 cannot hold."""
    kept = {name: tensor.float() for name, tensor in tensors.items() if "wo.weight" in name}
    next(iter(kept.values()))[0, 0] = 1e5
    return {name: tensor.half() for name, tensor in tensors.items()} | kept


def test_a_few_fp32_tensors_in_an_fp16_file_are_not_cut_to_infinity(models):
    published_file(models / "mixed.safetensors", overflowing(STUDENT))
    message = refusal(lambda: load("mixed.safetensors", dtype="fp16"))
    assert "1 tensors hold numbers that are too large for fp16" in message
    served = load("mixed.safetensors", dtype="fp32")
    (name,) = DistilledT5Save.execute(served, "copy", "as loaded").args
    assert all(torch.equal(copy, STUDENT_IN_FP32[key]) for key, copy in load_file(models / name).items())


STUDENT_IN_FP32 = {name: tensor.float() for name, tensor in overflowing(STUDENT).items()}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_name_that_is_not_valid_unicode_is_refused_and_the_list_still_works(models):
    odd = Path(os.fsdecode(os.fsencode(models) + b"/odd\xff.safetensors"))
    published_file(models / "renamed.safetensors", STUDENT).rename(odd)
    assert odd.name in text_encoder_names()
    assert refusal(lambda: load(odd.name)).encode()
    assert refusal(lambda: load("good.safetensors", device="\ud800"), ValueError).encode()


def test_weights_in_use_stay_when_the_file_of_an_encoder_is_overwritten_in_place(models):
    clip = load("good.safetensors", dtype="fp32")
    before = embedding(clip)
    (models / "good.safetensors").write_bytes(b"")
    assert torch.equal(embedding(clip), before)


def test_the_start_of_the_server_removes_unfinished_files_that_no_living_process_writes(models):
    (models / "mine").mkdir()
    left = models / "mine" / f".t5.safetensors.{2**22 + 1}{UNFINISHED}"
    left.touch()
    remove_abandoned_files()
    assert not left.exists()


def test_file_that_vanished_after_the_list_was_made(models):
    assert "good.safetensors" in text_encoder_names()
    (models / "good.safetensors").unlink()
    message = refusal(lambda: load("good.safetensors"))
    assert "good.safetensors is not in the text encoder folders" in message
    assert str(models) in message
    assert "refresh" in message


@pytest.mark.parametrize("name", ["../secret.safetensors", "../../secret.safetensors", "a/../../secret.safetensors", "/secret.safetensors"])
def test_loader_never_leaves_the_folders(models, name):
    published_file(models.parent / "secret.safetensors", STUDENT)
    assert "is not in the text encoder folders" in refusal(lambda: path_of(name))
    assert "is not in the text encoder folders" in refusal(lambda: load(name))


def test_folder_with_the_name_of_a_file(models):
    (models / "folder.safetensors").mkdir()
    assert "folder.safetensors" in refusal(lambda: load("folder.safetensors"))


def test_clip_l_picked_twice(models):
    sparse_file(models / "clip_l.safetensors", clip_l_shapes(), "F16")
    assert "pick it as the CLIP-L file (clip_name1)" in refusal(lambda: load("clip_l.safetensors", clip_name1="clip_l.safetensors"))


@pytest.mark.parametrize("device", ["cuda:99", "tpu", ""])
def test_device_that_is_not_there(models, device):
    message = refusal(lambda: load("good.safetensors", device=device), ValueError)
    assert "default, cpu" in message


@pytest.mark.parametrize("node", ["loader", "save"])
def test_dtype_that_comes_by_a_link_and_is_unknown_is_refused_with_those_that_are_known(models, node):
    clip = load("good.safetensors")
    before = sorted(models.rglob("*"))
    act = (lambda: load("good.safetensors", dtype="int4")) if node == "loader" else (lambda: DistilledT5Save.execute(clip, "mine", "int4"))
    message = refusal(act, ValueError)
    assert message.startswith("There is no dtype 'int4'")
    assert f"{'auto' if node == 'loader' else 'as loaded'}, fp32, bf16, fp16, fp8_e4m3fn" in message.splitlines()[-1]
    assert sorted(models.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../up",
        "a/../../up",
        "/absolute",
        "//host/share",
        "C:/windows",
        "C:windows",
        "back\\slash",
        "..\\up",
        "a//b",
        "a/",
        "/",
        "what?",
        "star*",
        "<tag>",
        "pipe|",
        'quote"',
        "new\nline",
        "null\x00",
        "tab\t",
        "dot.",
        "a./b",
        ".safetensors",
        "x" * 201,
        "\u6587" * 100,
        "\ud800lone",
        "CON",
        "nul",
        "aux.safetensors",
        "Com1",
        "LPT9.x",
        "prn/mine",
        "mine/con",
        "a/" * 2500 + "x",
        "con .txt",
        "COM\u00b9",
        "lpt\u00b3.x",
        "ConIn$",
        "conout$.x",
        "mine/CONIN$",
        ".SafeTensors",
    ],
    ids=lambda name: ascii(name)[1:20],
)
def test_names_that_cannot_be_saved_are_refused_before_anything_is_written(models, clip, name):
    before = sorted(models.parent.rglob("*"))
    message = refusal(lambda: DistilledT5Save.execute(clip, name, "as loaded"), ValueError)
    assert "cannot be the name" in message
    assert "mine/t5_base" in message
    assert sorted(models.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mine", "mine.safetensors"),
        (" mine ", "mine.safetensors"),
        ("mine.safetensors", "mine.safetensors"),
        ("mine.SAFETENSORS", "mine.safetensors"),
        ("sub/folder/mine", "sub/folder/mine.safetensors"),
        ("v1.2", "v1.2.safetensors"),
        ("\u5c0f T5 \u00e9", "\u5c0f T5 \u00e9.safetensors"),
        ("console", "console.safetensors"),
        ("com10", "com10.safetensors"),
        ("com\u2074", "com\u2074.safetensors"),
        ("conin", "conin.safetensors"),
        ("good", "good_00002.safetensors"),
        ("x" * 200, "x" * 200 + ".safetensors"),
    ],
)
def test_names_that_can_be_saved(models, clip, name, file):
    assert new_file(name) == models.resolve() / file
    DistilledT5Save.execute(clip, name, "as loaded")
    assert (models / file).is_file()


def test_link_in_the_folder_that_leads_out_of_it_is_not_followed(models, tmp_path):
    (tmp_path / "outside").mkdir()
    (models / "link").symlink_to(tmp_path / "outside")
    clip = load("good.safetensors")
    message = refusal(lambda: DistilledT5Save.execute(clip, "link/mine", "as loaded"), ValueError)
    assert "leads out of" in message
    assert not list((tmp_path / "outside").iterdir())


def test_folder_that_cannot_be_created_is_reported_with_advice(models):
    (models / "link").symlink_to(models / "nothing")
    clip = load("good.safetensors")
    message = refusal(lambda: DistilledT5Save.execute(clip, "link/mine", "as loaded"), OSError)
    assert "mine.safetensors could not be written to" in message
    assert not (models / "nothing").exists()


@pytest.mark.parametrize("ending", ["refused", "cancelled"])
def test_folders_made_for_a_file_that_is_not_written_go_again(models, ending, monkeypatch):
    clip = load("good.safetensors")
    (models / "kept").mkdir()
    before = sorted(models.rglob("*"))

    def press_cancel_when_the_folder_is_there(*_arguments: object, **_more: object) -> None:
        if (models / "kept" / "new").exists():
            comfy.model_management.interrupt_current_processing()

    if ending == "refused":
        with torch.no_grad():
            clip.cond_stage_model.t5base.transformer.shared.weight.fill_(torch.nan)
    else:
        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", press_cancel_when_the_folder_is_there)
        monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", -1.0, raising=False)
        monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_PERCENT", -1.0, raising=False)
    expected = StudentFileError if ending == "refused" else comfy.model_management.InterruptProcessingException
    with pytest.raises(expected):
        DistilledT5Save.execute(clip, "kept/new/deep/mine", "as loaded")
    assert sorted(models.rglob("*")) == before


def test_file_where_the_folder_should_be(models):
    clip = load("good.safetensors")
    message = refusal(lambda: DistilledT5Save.execute(clip, "good.safetensors/mine", "as loaded"), ValueError)
    assert "good.safetensors is a file" in message


def test_weights_that_broke_in_the_graph_are_not_saved(models):
    clip = load("good.safetensors")
    with torch.no_grad():
        clip.cond_stage_model.t5base.transformer.shared.weight.fill_(torch.nan)
    for dtype in ("bf16", "fp16", "as loaded"):
        message = refusal(lambda dtype=dtype: DistilledT5Save.execute(clip, "mine", dtype))
        assert "hold NaN or infinity" in message
        assert message.splitlines()[-1].startswith("What to do: remove the LoRA or merge that broke them")
    assert sorted(path.name for path in models.iterdir()) == ["good.safetensors"]


@pytest.mark.parametrize(
    ("largest", "dtype", "remedy"),
    [(7e4, "fp16", "bf16 or fp32"), (500.0, "fp8_e4m3fn", "bf16 or fp32"), (3.4e38, "bf16", "fp32")],
)
def test_number_format_that_cannot_hold_the_weights_is_refused_with_one_that_can(models, largest, dtype, remedy):
    big = tiny_tensors(FULL_VOCABULARY, torch.float32)
    big[SHARED][5, 3] = largest
    published_file(models / "big.safetensors", big)
    clip = load("big.safetensors", dtype="fp32")
    message = refusal(lambda: DistilledT5Save.execute(clip, "mine", dtype))
    assert f"1 tensors hold numbers that are too large for {dtype}" in message
    assert f"  {SHARED}\n" in message
    assert message.splitlines()[-1] == f"What to do: set dtype to {remedy}."
    assert not (models / "mine.safetensors").exists()
    DistilledT5Save.execute(clip, "mine", remedy.split()[0])
    assert (models / "mine.safetensors").is_file()


class OtherClip:
    """A CLIP of something else."""

    cond_stage_model = torch.nn.Identity()

    def tokenize(self, text: str) -> dict[str, list]:
        return {"g": [[(49406, 1.0)]]}


def test_a_clip_without_a_distilled_t5_is_refused(models):
    message = refusal(lambda: DistilledT5Save.execute(OtherClip(), "mine", "as loaded"), ValueError)
    assert "is not a distilled encoder" in message
    assert "Distilled Text Encoder Loader" in message
    assert "no T5" in refusal(lambda: DistilledT5TextEncode.execute(OtherClip(), "a prompt", 3.5), ValueError)


@pytest.mark.parametrize("node", [DistilledT5TextEncode, DistilledT5Save])
def test_no_clip_at_all(models, node):
    arguments = ("a prompt", 3.5) if node is DistilledT5TextEncode else ("mine", "as loaded")
    assert "CLIP" in refusal(lambda: node.execute(None, *arguments), ValueError)
