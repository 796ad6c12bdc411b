"""`train export`, `card` and `upload`: the files of a run for others, and what is sent to Hugging Face, only when it is confirmed."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
from distilled_t5.encoder.files import open_student
from distilled_t5.runtime.errors import UserError
from distilled_t5.tests.support.hub import running_hub
from distilled_t5.tests.support.runs import STAGES, made_up_run, save
from distilled_t5.train import export as export_module
from distilled_t5.train.card import card, write_card
from distilled_t5.train.checkpoint_files import STUDENT
from distilled_t5.train.export import chosen_checkpoint, export
from distilled_t5.train.licences import licence_of, origins
from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.train.run_directory import RunDirectory
from distilled_t5.train.upload import upload
from huggingface_hub import ModelCard

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAME = "distilled_t5_smoke"


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return made_up_run(tmp_path / "run", saved=(25, 50))


def command(*words: object, hub: str = "http://127.0.0.1:9") -> tuple[int, str]:
    """Exit status and output of the trainer's command with these arguments, where Hugging Face is at `hub`."""
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_made_up", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train"), *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        input="",
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


# --- export ---


def test_any_checkpoint_is_exported_while_the_run_goes_on_with_the_bytes_that_the_run_wrote(run, tmp_path):
    with RunDirectory(run.path).resume():  # as a run that goes on, which holds the lock
        newest = export(chosen_checkpoint(run, None), tmp_path / "new" / "newest.safetensors")
        earlier = export(chosen_checkpoint(run, 25), tmp_path / "earlier.safetensors")
    assert newest.read_bytes() == (run.checkpoints / "step-000050" / STUDENT).read_bytes()
    assert open_student(earlier).metadata.facts["distilled_t5.steps"] == "25"
    assert set(open_student(earlier).load()) == set(safetensors.torch.load_file(earlier))


def test_a_file_that_appears_meanwhile_is_not_overwritten(run, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"

    def another_comes(*arguments: Any) -> None:
        out.write_bytes(b"mine")
        shutil.copyfile(*arguments)

    monkeypatch.setattr(export_module, "shutil", SimpleNamespace(copyfile=another_comes))
    assert export(chosen_checkpoint(run, 25), out) == tmp_path / "out_00002.safetensors"
    assert out.read_bytes() == b"mine"


def test_a_step_without_a_checkpoint_an_existing_file_and_a_damaged_checkpoint_are_refused(run, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=r"no checkpoint of step 7; it has those of 25, 50 \(lowest held-out loss\)"):
        chosen_checkpoint(run, 7)
    student = run.checkpoints / "step-000050" / STUDENT
    content = bytearray(student.read_bytes())
    content[-1] ^= 1
    student.write_bytes(content)
    with pytest.raises(UserError, match=r"step-000050 is damaged: .*\nWhat to do: export another step"):
        export(chosen_checkpoint(run, 50), out)
    assert list(tmp_path.glob("*out*")) == [], "nothing is left behind"
    out.write_bytes(b"mine")
    with pytest.raises(UserError, match="exists"):
        export(chosen_checkpoint(run, 25), out)
    assert out.read_bytes() == b"mine"


def test_a_run_that_saved_nothing_yet_has_nothing_to_export(tmp_path):
    run = made_up_run(tmp_path / "run", steps=3)
    with pytest.raises(UserError, match=r"has no complete checkpoint yet.\nWhat to do: wait"):
        chosen_checkpoint(run, None)


# --- card ---


def recipe(*settings: str) -> Recipe:
    return load_recipe("schnell-12gb", settings)


@pytest.mark.parametrize(
    ("settings", "licence", "repos"),
    [
        ([], "apache-2.0", ["black-forest-labs/FLUX.1-schnell", "google/t5-v1_1-xxl", "google/flan-t5-base"]),
        (
            ["diffusion_model.file=flux1-dev-fp8.safetensors"],
            "flux-1-dev-non-commercial-license",
            ["black-forest-labs/FLUX.1-dev", "google/t5-v1_1-xxl", "google/flan-t5-base"],
        ),
        (["diffusion_model.file=my_merge.safetensors"], "unknown", ["", "google/t5-v1_1-xxl", "google/flan-t5-base"]),
        (["student.start=google-flan-t5-large", "student.size=large"], "apache-2.0", [..., ..., "google/flan-t5-large"]),
        (["student.start=flan-t5-base-mine"], "unknown", [..., ..., ""]),
        (["student.start=random"], "apache-2.0", [..., ...]),
        (["diffusion_model.file=FLUX.1-schnell-dev-merged-fp8-4step.safetensors"], "unknown", ["", ..., ...]),
        (["diffusion_model.file=flux1-dev-kontext_fp8_scaled.safetensors"], "unknown", ["", ..., ...]),
        (["diffusion_model.file=FLUX.1-Schnell_fp8_e4m3fn.safetensors"], "apache-2.0", ["black-forest-labs/FLUX.1-schnell", ..., ...]),
        (["teacher.t5=t5xxl_fp8_e4m3fn_scaled.safetensors"], "apache-2.0", [..., "google/t5-v1_1-xxl", ...]),
        (["teacher.t5=miniature_teacher.safetensors"], "apache-2.0", [..., "", ...]),
        (["teacher.t5=miniature_mine.safetensors"], "unknown", [..., "", ...]),
    ],
)
def test_the_licence_follows_from_the_models(settings, licence, repos):
    models = origins(recipe(*settings))
    assert licence_of(models).name == licence
    assert [model.repo for model, repo in zip(models, repos, strict=True) if repo is not ...] == [repo for repo in repos if repo is not ...]


@pytest.mark.parametrize(
    ("name", "licence", "repo"),
    [
        ("sd35-medium-24gb", "stabilityai-ai-community", "stabilityai/stable-diffusion-3.5-medium"),
        ("pixart-alpha-paper", "openrail++", "PixArt-alpha/PixArt-XL-2-1024-MS"),
        ("pixart-sigma-24gb", "openrail++", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
        ("chroma-24gb", "apache-2.0", "lodestones/Chroma1-HD"),
    ],
)
def test_the_licence_of_a_shipped_recipe_s_student_is_that_of_its_diffusion_model(name, licence, repo):
    models = origins(load_recipe(name))
    assert (licence_of(models).name, models[0].repo) == (licence, repo)


def test_the_miniature_s_files_are_known_by_their_names():
    shipped = [
        path.name for path in (ROOT / "miniature" / "models").glob("*/*.safetensors") if "text" in str(path) or "diffusion" in str(path)
    ]
    assert len(shipped) >= 4
    for name in shipped:
        assert licence_of(origins(recipe(f"teacher.t5={name}"))).name == "apache-2.0", name


def test_the_front_matter_is_what_hugging_face_reads(run):
    schnell = ModelCard(card(run, recipe(), 50)).data
    assert (schnell.license, schnell.license_name) == ("apache-2.0", None)
    assert schnell.base_model == ["black-forest-labs/FLUX.1-schnell", "google/t5-v1_1-xxl", "google/flan-t5-base"]
    assert {"text-encoder", "comfyui", "flux", "t5"} <= set(schnell.tags)
    z_image = ModelCard(card(run, load_recipe("z-image-overnight-24gb", ["teacher.t5=qwen_3_4b-z_image.safetensors"]), 50)).data
    assert z_image.base_model == ["Tongyi-MAI/Z-Image-Turbo", "Qwen/Qwen3-4B", "Qwen/Qwen3-0.6B"]
    assert {"qwen3", "z_image"} <= set(z_image.tags) and "t5" not in z_image.tags
    dev = ModelCard(card(run, load_recipe("flux-dev-paper"), 50)).data
    assert (dev.license, dev.license_name) == ("other", "flux-1-dev-non-commercial-license")
    assert dev.license_link.startswith("https://huggingface.co/black-forest-labs/FLUX.1-dev")
    assert dev.datasets == ["ChristophSchuhmann/improved_aesthetics_6.5plus"]


def test_the_card_says_how_the_student_was_made_and_what_is_not_known(run):
    text = write_card(run).read_text(encoding="utf-8")
    for part in (
        f"# {NAME}",
        "50 of 100",
        "Lowest: ",
        "](samples/step-000100-preview.jpg)",
        "Not evaluated yet",
        load_recipe("smoke", STAGES).sha256,
    ):
        assert part in text
    unknown = card(run, recipe("diffusion_model.file=my_merge.safetensors"), 50)
    assert "unknown: check it where you got my_merge.safetensors" in unknown
    assert "before you publish" in unknown


def evaluation(folder: Path, file: str) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"encoders": {"teacher": {"file": "t.safetensors"}, "student": {"file": file}}}))
    (folder / "table.md").write_text("# miniature\n\n| Encoder | word |\n| --- | --- |\n| student | 97.5 |\n\n## Memory and time\n")
    return folder


def test_the_numbers_of_an_evaluation_of_this_student_are_shown_and_those_of_another_one_refused(run, tmp_path):
    text = write_card(run, evaluation(tmp_path / "mine", f"{NAME}.safetensors")).read_text(encoding="utf-8")
    assert "Suite miniature.\n\n| Encoder | word |" in text
    assert "### Memory and time" in text
    with pytest.raises(UserError, match=f"shows t.safetensors, other.safetensors, not {NAME}"):
        write_card(run, evaluation(tmp_path / "others", "other.safetensors"))
    with pytest.raises(UserError, match="does not hold an evaluation"):
        write_card(run, tmp_path)


@pytest.mark.parametrize("file", [f"{NAME}.safetensors", f"{NAME}_00002.safetensors", f"{NAME}-step-000050.safetensors"])
def test_the_files_of_a_student_are_its_own_and_those_of_a_longer_name_are_not(run, tmp_path, file):
    assert "Suite miniature" in write_card(run, evaluation(tmp_path / "mine", file)).read_text(encoding="utf-8")
    for other in (f"{NAME}_2.safetensors", f"{NAME}-large.safetensors"):
        with pytest.raises(UserError, match=f"shows t.safetensors, {other}, not {NAME}"):
            write_card(run, evaluation(tmp_path / other, other))


def test_a_card_that_was_changed_by_hand_stays_and_one_that_was_not_is_written_again(run):
    path = write_card(run)
    assert write_card(run) == path
    path.write_text(path.read_text(encoding="utf-8").replace("## Use", "## How to use"), encoding="utf-8")
    changed = path.read_bytes()
    with pytest.raises(UserError, match=r"changed by hand and stays as it is.\nWhat to do: rename it"):
        write_card(run)
    assert path.read_bytes() == changed


def test_backticks_of_a_prompt_do_not_end_the_recipe_of_the_card(run):
    text = card(run, recipe('preview.prompts=["a sign that says ```` here"]'), 50)
    assert "`````toml\n" in text and text.endswith("\n`````\n")


# --- upload ---


def test_encoder_card_recipe_and_samples_are_sent(run):
    with running_hub() as hub:
        status, said = command("upload", run.path, "someone/student", "--private", "--yes", hub=hub.address)
        assert status == 0, said
        assert hub.made == {"name": "student", "organization": "someone", "visibility": "private"}
        samples = {f"samples/step-{step:06d}-preview.jpg" for step in (25, 50, 75, 100)}
        assert set(hub.files) == {"README.md", "recipe.toml", f"{NAME}.safetensors"} | samples
        assert hub.private
        assert hub.files[f"{NAME}.safetensors"] == (run.checkpoints / "step-000050" / STUDENT).read_bytes()
        assert hub.files["README.md"] == (run.path / "README.md").read_bytes()
    assert "private repository someone/student" in said
    assert f"{NAME}.safetensors" in said


def test_absolute_paths_are_sent_as_file_names_and_the_run_keeps_them(tmp_path):
    home = tmp_path / "home" / "somebody"
    paths = {"teacher.t5": "t5xxl_fp16.safetensors", "diffusion_model.file": "flux1-schnell.safetensors", "preview.vae": "ae.safetensors"}
    settings = [*STAGES, *(f"{key}={home / name}" for key, name in paths.items())]
    run = made_up_run(tmp_path / "run", steps=25, settings=settings, saved=(25,))
    with running_hub() as hub:
        status, said = command("upload", run.path, "someone/student", "--yes", hub=hub.address)
        assert status == 0, said
        sent = {name: content.decode() for name, content in hub.files.items() if name in ("README.md", "recipe.toml")}
    for text in sent.values():
        assert str(tmp_path) not in text
        assert 't5 = "t5xxl_fp16.safetensors"' in text
    assert str(home) in run.recipe.read_text(encoding="utf-8")


@pytest.mark.parametrize("private", [True, False])
def test_nothing_is_sent_to_a_repository_that_is_not_as_private_as_asked_for(run, private):
    with running_hub() as hub:
        hub.exists, hub.private = True, not private
        status, said = command("upload", run.path, "someone/student", "--yes", *(["--private"] if private else []), hub=hub.address)
        assert (status, hub.files, hub.large) == (1, {}, {})
    found, asked = ("public", "private") if private else ("private", "public")
    assert f"Nothing was sent: the repository someone/student is {found}; expected a {asked} one" in said


def test_a_card_of_an_earlier_step_is_not_sent_with_the_newest_student(run):
    write_card(run)
    save(run, load_recipe("smoke", STAGES), 75)
    with pytest.raises(UserError, match=r"out of date: expected the card of step 75 .* got that of step 50.\nWhat to do: run `train card`"):
        upload(run, "someone/student", False, True)
    (run.path / "README.md").write_text("# Mine", encoding="utf-8")
    with pytest.raises(UserError, match="Nothing was sent"):  # it would be
        upload(run, "someone/student", False, False)


def test_a_damaged_checkpoint_is_not_sent_and_says_what_helps(run):
    student = run.checkpoints / "step-000050" / STUDENT
    student.write_bytes(student.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"step-000050 is damaged: .*\nWhat to do: .*delete .*step-000050"):
        upload(run, "someone/student", False, True)


def test_nothing_is_sent_unasked_and_what_would_be_is_shown(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(UserError, match=r"Nothing was sent.\nWhat to do: add --yes to send these files."):
        upload(run, "someone/student", False, False)
    assert "samples/step-000025-preview.jpg" in capsys.readouterr().out

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert upload(run, "someone/student", False, False) == ""
    assert "Send them? [y/N] Nothing was sent." in capsys.readouterr().out


def test_a_refusal_a_missing_network_and_a_name_that_is_not_valid_are_clear_errors(run):
    with running_hub() as hub:
        hub.refuse = 403
        status, said = command("upload", run.path, "someone/student", "--yes", hub=hub.address)
        assert (status, "Traceback" in said) == (1, False)
        assert "could not be sent" in said and "What to do: log in" in said
    status, said = command("upload", run.path, "someone/student", "--yes")
    assert (status, "Traceback" in said) == (1, False)
    assert "could not be sent" in said
    with pytest.raises(UserError, match="a b/c is not a valid name of a repository"):
        upload(run, "a b/c", False, True)


# --- what it costs ---

WITHOUT_TORCH = """
import json, runpy, sys
for words in json.loads(sys.argv.pop()):
    sys.argv[1:] = words
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print(f"{words[0]}: status {end.code}, torch {'torch' in sys.modules}")
"""


def test_help_card_upload_and_export_to_a_file_do_not_import_torch(run, tmp_path):
    export_it = ["export", str(run.path), "--out", str(tmp_path / "x.safetensors")]
    asked = [["--help"], ["watch", "--help"], ["card", str(run.path)], export_it, ["upload", str(run.path), "a/b"]]
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_TORCH.replace("sys.argv[0]", repr(str(ROOT / "train" / "__main__.py"))), encoding="utf-8")
    done = subprocess.run([sys.executable, script, json.dumps(asked)], capture_output=True, text=True, input="", check=False)
    ends = [line for line in done.stdout.splitlines() if "status" in line]
    names = ["--help", "watch", "card", "export"]
    assert ends == [*(f"{name}: status 0, torch False" for name in names), "upload: status 1, torch False"], done.stderr


def test_a_recipe_may_have_the_name_of_a_command(tmp_path):
    (tmp_path / "watch").write_text("name = 5", encoding="utf-8")
    status, said = command(tmp_path / "watch")
    assert status == 1 and "name: expected a valid string, got 5" in said
