"""The evaluation's command in processes of its own, on small random models: from nothing to its page, killed and gone on, in two ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import comfy.cli_args
import numpy as np
import pytest
import torch
from distilled_t5.encoder.teacher import Teacher
from distilled_t5.evaluate.context import open_evaluation
from distilled_t5.evaluate.encoders import EncoderFile, LoadedEncoder, check_encoders, find_encoders
from distilled_t5.evaluate.judge_images import read_image
from distilled_t5.evaluate.processes import Processes
from distilled_t5.evaluate.provenance import computed_with, fingerprint
from distilled_t5.evaluate.questions import read_questions
from distilled_t5.evaluate.run import earlier_students
from distilled_t5.evaluate.suite import load_suite
from distilled_t5.families import FAMILIES
from distilled_t5.miniature.files import VAE_FILE
from distilled_t5.runtime.model_folders import add_model_folders
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support.evaluation_world import command, finish, start, write_world
from distilled_t5.tests.support.small_encoders import encode, serve, stock_flux_clip
from distilled_t5.tests.support.trainer import BOUND_S, TWO_PROCESSES
from distilled_t5.world.pictures import SIDE
from distilled_t5.world.questions import questions

import nodes

ENCODERS = ["teacher", "student", "other"]
PICTURES = 16


class World(NamedTuple):
    """Models and suite of a run, and what its command left and printed."""

    base: Path
    out: Path
    said: str


@pytest.fixture(scope="module")
def whole(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run that nobody interrupts, with one student of the suite and one of the command line."""
    base = tmp_path_factory.mktemp("evaluation")
    write_world(base)
    said = finish(command(comfyui_path, base, base / "out", "--student", "other.safetensors"), base)
    return World(base, base / "out", said)


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def without_times(out: Path) -> str:
    """results.json without what a clock or the number of processes decides."""
    content = results(out)
    for name in ("date", "seconds", "processes"):
        del content["made"][name]
    cost = content["probes"].pop("cost")
    sizes = {name: cost[name] for name in ("weights", "resident bytes")}
    return json.dumps([content, sizes], indent=1)


def pictures(out: Path) -> dict[str, Path]:
    return {path.relative_to(out / "images").as_posix(): path for path in sorted(out.glob("images/*/*/*.png"))}


def test_the_command_leaves_pictures_results_table_and_page(whole):
    found = results(whole.out)
    assert list(found["encoders"]) == ENCODERS
    assert [one["role"] for one in found["encoders"].values()] == ["teacher", "student", "student"]
    assert len(pictures(whole.out)) == PICTURES * len(ENCODERS)
    assert {task: one["prompts"] for task, one in found["tasks"].items()} == {"objects": 10, "words": 6}
    for task, count in (("objects", 10), ("words", 6)):
        scores = found["tasks"][task]["scores"]["readback"]
        assert {name: (one["value"], one["n"], one["low"]) for name, one in scores.items()} == dict.fromkeys(ENCODERS, (0.0, count, 0.0))
        # Noise shows nothing: Wilson's upper bound of 0 of n is z2 / (n + z2).
        assert scores["teacher"]["high"] == pytest.approx(3.8415 / (count + 3.8415), abs=1e-4)
    assert len(found["made"]["commit"]) == 40 and found["made"]["machine"]["cores"] > 0
    assert "Done: " in whole.said and "left for all of it" in whole.said
    assert re.search(r"objects: correct, % +0\.0 +0\.0 +0\.0$", whole.said, re.MULTILINE), whole.said
    assert "<title>" in (whole.out / "page.html").read_text(encoding="utf-8")
    assert "velocity gap" in (whole.out / "evaluate.log").read_text(encoding="utf-8")


def test_probes_tell_the_encoders_apart_and_count_their_prompts(whole):
    probes = results(whole.out)["probes"]
    assert {name: one["n"] for name, one in probes["collapse"]["pooled distance"].items()} == dict.fromkeys(ENCODERS, 8)
    assert len({one["value"] for one in probes["collapse"]["effective rank"].values()}) == 3
    gaps = probes["velocity_gap"]
    assert list(gaps) == ["sigma 0.75-1.00", "sigma 0.50-0.75"]
    assert all(set(one) == {"student", "other"} and one["student"]["n"] == 6 and one["student"]["value"] > 0 for one in gaps.values())
    steps = probes["latent_distance"]
    assert list(steps) == ["after step 1", "after step 2", "after step 3"]
    values = [steps[name]["student"]["value"] for name in steps]
    assert 0 < values[0] < values[1] < values[2], "from the same noise the latents diverge step by step"
    cost = probes["cost"]
    assert cost["resident bytes"]["teacher"]["value"] > cost["resident bytes"]["student"]["value"]
    assert all(cost[name]["student"]["n"] == 2 for name in ("load s", "encode s", "prompt change s"))


@torch.no_grad()
def test_a_picture_is_the_one_that_stock_nodes_make_of_its_prompt_and_seed_alone(whole):
    add_model_folders(whole.base / "models")
    [model] = nodes.UNETLoader().load_unet("flux.safetensors", "default")
    [vae] = nodes.VAELoader().load_vae(VAE_FILE)
    clip = serve(whole.base / "models" / "text_encoders" / "student.safetensors", dtype=None).clip
    for index, (_, caption) in enumerate(questions("word", 2)):
        conditioning = [[text, {**extras, "guidance": 3.5}] for text, extras in encode(clip, caption)]
        empty = {"samples": torch.zeros(1, 16, SIDE, SIDE)}
        [latent] = nodes.KSampler().sample(model, 3 + index, 3, 1.0, "euler", "simple", conditioning, conditioning, empty)
        [expected] = nodes.VAEDecode().decode(vae, latent)
        stock = np.clip(255.0 * expected[0].numpy(), 0, 255).astype(np.uint8)
        ours = read_image(whole.out / "images" / "student" / "words" / f"{index:05d}.png")
        assert stock.std() > 20
        assert np.abs(stock.astype(int) - ours).max() <= 3


def wait_for_pictures(process: subprocess.Popen[str], folder: Path) -> None:
    """Come back when a folder has its first picture; fails if the process ends before."""
    deadline = time.monotonic() + BOUND_S
    while not list(folder.glob("*.png")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


def made_at(out: Path) -> dict[str, tuple[int, int]]:
    """What changes when a picture is written again."""
    return {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in pictures(out).items()}


@pytest.mark.full
def test_killed_then_stopped_then_finished_it_leaves_the_same_and_generates_nothing_twice(whole, comfyui_path, tmp_path):
    out = tmp_path / "out"
    arguments = command(comfyui_path, whole.base, out, "--student", "other.safetensors")
    process = start(arguments, tmp_path)
    wait_for_pictures(process, out / "images" / "teacher" / "objects")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    after_kill = made_at(out)
    assert 0 < len(after_kill) < PICTURES * len(ENCODERS)
    process = start(arguments, tmp_path)
    wait_for_pictures(process, out / "images" / "other" / "objects")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=BOUND_S)[0]
    assert process.returncode == 130, said
    assert "Stopped; the same command continues." in said
    assert not (out / "results.json").exists()
    after_stop = made_at(out)
    finish(arguments, tmp_path)
    assert without_times(out) == without_times(whole.out)
    ours, theirs = ({name: path.read_bytes() for name, path in pictures(one).items()} for one in (out, whole.out))
    assert ours == theirs
    finished = made_at(out)
    for earlier in (after_kill, after_stop):
        assert {name: finished[name] for name in earlier} == earlier


@pytest.mark.full
def test_two_processes_do_what_one_does(whole, comfyui_path, tmp_path):
    out = tmp_path / "out"
    arguments = command(comfyui_path, whole.base, out, "--student", "other.safetensors")
    finish([str(Path(arguments[0]) / "__main__.py"), *arguments[1:]], tmp_path, launcher=TWO_PROCESSES)
    assert results(out)["made"]["processes"] == 2
    assert without_times(out) == without_times(whole.out)
    ours, theirs = ({name: path.read_bytes() for name, path in pictures(one).items()} for one in (out, whole.out))
    assert ours == theirs


def test_a_finished_evaluation_takes_one_more_student_draws_an_exchanged_image_again_and_keeps_all_else(whole, comfyui_path, tmp_path):
    before = made_at(whole.out)
    exchanged, other = (whole.out / "images" / "student" / "words" / f"0000{index}.png" for index in (1, 2))
    generated = read_image(exchanged)
    exchanged.write_bytes(other.read_bytes())
    del before["student/words/00001.png"]
    fourth = tmp_path / "a.safetensors"
    fourth.write_bytes((whole.base / "models" / "text_encoders" / "other.safetensors").read_bytes())
    finish(command(comfyui_path, whole.base, whole.out, "--student", f"fourth={fourth}"), tmp_path)
    assert np.abs(read_image(exchanged).astype(int) - generated).max() <= 3
    assert "00001.png is not the image that was generated" in (whole.out / "evaluate.log").read_text(encoding="utf-8")
    found = results(whole.out)
    assert list(found["encoders"]) == [*ENCODERS, "fourth"]
    assert {name: made_at(whole.out)[name] for name in before} == before
    scores = found["probes"]["velocity_gap"]["sigma 0.50-0.75"]
    assert scores["fourth"] == scores["other"], "the same weights in another file"
    assert earlier_students(whole.out, ())[1:] == [
        f"other={whole.base / 'models' / 'text_encoders' / 'other.safetensors'}",
        f"fourth={fourth}",
    ]
    fourth.unlink()
    assert [one.partition("=")[0] for one in earlier_students(whole.out, ())] == ["student", "other"]
    assert [one.partition("=")[0] for one in earlier_students(whole.out, {"student"})] == ["other"]
    assert earlier_students(tmp_path, ()) == []


def test_a_folder_of_version_0_1_keeps_its_images_and_a_student_that_has_changed_is_left_out(tmp_path, caplog):
    files = {name: tmp_path / f"{name}.safetensors" for name in ("kept", "changed")}
    for name, file in files.items():
        file.touch()
        (tmp_path / "pictures" / name).mkdir(parents=True)
    students = ", ".join(f'"{name}={file}"' for name, file in files.items())
    (tmp_path / "suite.toml").write_text(f"students = [{students}]\n[page]\npictures = 40\n")
    later = (tmp_path / "suite.toml").stat().st_mtime + 5
    os.utime(files["changed"], (later, later))
    assert earlier_students(tmp_path, ()) == [f"kept={files['kept']}"]
    assert (tmp_path / "images" / "changed").is_dir() and not (tmp_path / "pictures").exists()
    assert "changed.safetensors has changed" in caplog.text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["--set", "diffusion_model.file=nowhere.safetensors"], "nowhere.safetensors was not found"),
        (["--student", "cut.safetensors"], "cut.safetensors"),
        (["--set", "sampling.steps=4"], "sampling: euler simple, 3 steps, guidance 3.5, 96 px -> euler simple, 4 steps"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_advice(whole, comfyui_path, tmp_path, settings, expected):
    encoders = whole.base / "models" / "text_encoders"
    (encoders / "cut.safetensors").write_bytes((encoders / "student.safetensors").read_bytes()[:-100])
    said = finish(command(comfyui_path, whole.base, whole.out, *settings), tmp_path, code=1)
    assert expected in said
    assert "What to do: " in said
    assert "Traceback" not in said


def suite_of(whole: World, *settings: str) -> Any:
    return load_suite(str(whole.base / "tiny.toml"), settings)


def test_flags_that_affect_results_are_recorded_and_others_are_not(monkeypatch):
    before = computed_with()
    assert (before["device"], before["flags of ComfyUI"]) == ("cpu", "cpu=True")
    monkeypatch.setattr(comfy.cli_args.args, "lowvram", True)
    assert computed_with() == before, "how weights are moved between devices does not count"
    monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_text_enc", True)
    assert computed_with()["flags of ComfyUI"] == "cpu=True fp8_e4m3fn_text_enc=True"


def test_encoders_are_found_once_each_under_names_of_their_own(whole, tmp_path):
    encoders = whole.base / "models" / "text_encoders"
    twin = tmp_path / "student.safetensors"
    twin.write_bytes((encoders / "other.safetensors").read_bytes())
    odd = tmp_path / "my best (v2).safetensors"
    odd.write_bytes(twin.read_bytes())
    suite = suite_of(whole, f"teacher.t5={encoders / 'teacher.safetensors'}", f'students=["{encoders / "student.safetensors"}"]')
    found = find_encoders(suite, [str(encoders / "student.safetensors"), str(twin), str(odd)])
    assert [one.name for one in found] == ["teacher", "student", "student-2", "my_best_v2_"]
    assert [one.companions for one in found] == [{}] * 4
    named = find_encoders(suite, [f"student={twin}", f"best={encoders / 'student.safetensors'}", str(odd)])
    assert [(one.name, one.path.stem) for one in named[1:]] == [
        ("best", "student"),
        ("student", "student"),
        ("my_best_v2_", "my best (v2)"),
    ]
    for wrong in ([f"a={twin}", f"A={odd}"], [f"..={twin}"]):
        with pytest.raises(ValueError, match=r"Expected a different name for every encoder, got (.|\n)*What to do: "):
            find_encoders(suite, wrong)
    assert fingerprint(twin) == fingerprint(odd) != fingerprint(encoders / "student.safetensors")


def test_a_text_is_what_clip_text_encode_gives_and_brackets_are_only_brackets(whole):
    path = whole.base / "models" / "text_encoders" / "student.safetensors"
    encoder = LoadedEncoder.load(EncoderFile("student", path), FAMILIES["flux"])
    [(expected, extras)] = encode(encoder.clip, "a red star")
    text = encoder.text("a red star")
    assert (text.text_1LD == expected).all() and (text.pooled_1P == extras["pooled_output"]).all()
    assert text.own_tokens == len(encoder.clip.tokenizer.t5xxl.tokenizer("a red star")["input_ids"]) < text.text_1LD.shape[1]
    weighted, escaped = encode(encoder.clip, "a (red:1.5) star")[0][0], encode(encoder.clip, "a \\(red:1.5\\) star")[0][0]
    assert (encoder.text("a (red:1.5) star").text_1LD == escaped).all() and not (escaped == weighted).all()


def test_a_stock_clip_of_t5xxl_gives_what_clip_text_encode_gives(stand_ins):
    clip_l = stand_ins / "models" / "text_encoders" / "clip_l.safetensors"
    encoder = LoadedEncoder(EncoderFile("t5xxl", clip_l, {"clip_l": clip_l}), Teacher(stock_flux_clip(clip_l)))
    [(expected, extras)] = encode(encoder.clip, "a red star")
    text = encoder.text("a red star")
    assert text.text_1LD.shape == (1, 256, 4096)
    assert (text.text_1LD == expected).all() and (text.pooled_1P == extras["pooled_output"]).all()
    assert text.pooled_1P.any()


def test_every_encoder_that_does_not_fit_is_named_before_anything_is_generated(whole, tmp_path):
    good = whole.base / "models" / "text_encoders" / "student.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "t5.gguf").write_bytes(b"GGUF")
    files = [EncoderFile(path.stem, path) for path in (good, tmp_path / "cut.safetensors", tmp_path / "t5.gguf")]
    with pytest.raises(ValueError, match=r"Not all encoders can be compared:\n(.|\n)*What to do: ") as caught:
        check_encoders(files, 4096, "flux", FAMILIES["flux"])
    told = str(caught.value)
    assert "student.safetensors gives text of width 64, but flux takes 4096." in told
    assert "cut.safetensors" in told and "t5.gguf is a GGUF file, which ComfyUI itself does not load" in told
    check_encoders(files[:1], 64, "flux", FAMILIES["flux"])
    with pytest.raises(ValueError, match=r"distilled for Flux\.1, but model is of the family Stable Diffusion 3"):
        check_encoders(files[:1], 64, "model", FAMILIES["sd3"])


def test_too_few_prompts_are_refused_before_any_file_is_opened(tmp_path):
    suite = load_suite("miniature", ["teacher.t5=nowhere.safetensors"], 1)
    single = suite.model_copy(update={"tasks": suite.tasks[:1]})
    with pytest.raises(ValueError, match=r"^collapse: expected at least 2 prompts, got 1\.\nWhat to do: raise --limit"):
        open_evaluation(single, [], tmp_path, Processes(Ranks(), lambda: False))


def test_the_miniatures_suite_asks_what_the_miniatures_own_measure_asks():
    suite = load_suite("miniature", [f"task.{number}.prompts.limit=3" for number in range(7)])
    for task, asked in read_questions({task.name: task.prompts for task in suite.tasks}, suite.seed).items():
        assert [(one.scene, one.prompt) for one in asked] == questions(task, 3)
        assert [one.seed for one in asked] == [0, 1, 2]
