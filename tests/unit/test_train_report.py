"""What a run tells about itself: every step once, trouble said, nothing left installed."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from distilled_t5.runtime.logs import logging_to
from distilled_t5.train.contact_sheet import GAP_PX, LINE_PX, PAPER, contact_sheet, image_difference
from distilled_t5.train.curves import Curves
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.report import Reporter, cut_metrics
from distilled_t5.train.run_directory import RunDirectory
from PIL import Image

log = logging.getLogger("distilled_t5.train.test")
# Ten steps.
TEN = load_recipe("smoke", ["stage.0.steps=4", "stage.1.steps=6"])


@pytest.fixture
def run(tmp_path):
    with RunDirectory(tmp_path / "run").start("") as run:
        yield run


def rows(run: RunDirectory) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in run.metrics.read_text().splitlines()]


def square(colour: str, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def test_a_step_is_one_line_of_metrics_that_is_there_at_once(run):
    with Reporter(run, TEN) as reporter:
        reporter.step(1, 0.5, 4, learning_rate=1e-4)
        [row] = rows(run)
        assert row.pop("samples_per_s") > 0
        assert row.pop("ram_mb") > 1 and row.pop("gpu_peak_mb", 2) > 1
        assert row == {"step": 1, "loss": 0.5, "learning_rate": 1e-4, "stage": 0}


def test_bar_shows_loss_speed_and_memory_and_counts_from_the_resumed_step(run, capsys):
    with Reporter(run, TEN, start_step=7) as reporter:
        reporter.begin({}, {})
        reporter.step(8, 0.12345, 4, stage=1)
        reporter.step(9, 0.5, 4, stage=1)
    shown = capsys.readouterr().err.split("\r")[-1]
    assert shown.startswith("stage 2/2 follow-the-steps: ")
    assert "9/10" in shown
    assert "loss=0.5" in shown
    assert "prompts/s=" in shown
    assert "_mb=" in shown


def test_numbers_that_are_not_finite_are_null(run):
    with Reporter(run, TEN) as reporter:
        reporter.step(1, math.nan, 4, gradient_norm=math.inf)
        reporter.held_out({"low": math.nan, "high": 1.0}, 3)
    train, held_out = rows(run)
    assert train["loss"] is None
    assert train["gradient_norm"] is None
    assert held_out["held_out_by_band"] == {"low": None, "high": 1.0}


def test_held_out_loss_is_reported_per_band_with_its_sample_count(run):
    with Reporter(run, TEN) as reporter:
        reporter.step(5, 0.5, 4)
        assert reporter.held_out({"0.0-0.5": 1.0, "0.5-1.0": 2.0}, 16) == 1.5
    expected = {"step": 5, "held_out_loss": 1.5, "held_out_samples": 16, "held_out_by_band": {"0.0-0.5": 1.0, "0.5-1.0": 2.0}}
    assert rows(run)[-1] == expected


def test_after_a_resume_no_step_stands_twice(run):
    with Reporter(run, TEN) as reporter:
        for step in range(1, 6):
            reporter.step(step, 0.5, 4)
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    with Reporter(run, TEN, start_step=3) as reporter:
        for step in range(4, 7):
            reporter.step(step, 0.25, 4)
    assert [(row["step"], row["loss"]) for row in rows(run)] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25), (5, 0.25), (6, 0.25)]
    assert "Removed 3 lines of metrics beyond step 3" in run.log.read_text()


TORN = [b"", b"{", b"[1]\n", b'{"step": 2}', b'{"step": "x', b"\xff\n", b'{"loss": 1}\n']
NO_STEP = [b'{"step": "2"}\n', b'{"step": [2]}\n', b'{"step": true}\n', b'{"step": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"]


@pytest.mark.parametrize("torn", [*TORN, *NO_STEP], ids=lambda torn: repr(torn[:14]))
def test_incomplete_lines_of_metrics_are_cut_off_and_complete_lines_are_kept(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert cut_metrics(path, 3) == bool(torn)
    assert path.read_bytes() == b'{"step": 1}\n'
    assert cut_metrics(tmp_path / "none", 3) == 0


@pytest.mark.parametrize(
    "damage", ['"loss": "x"', '"held_out_by_band": 1', '"held_out_by_band": {"a": []}', '"loss": NaN', '"loss": {"a": 1}']
)
def test_a_damaged_line_of_metrics_is_left_out_of_the_curves_and_removed(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 0.5}}\n{{"step": 2, {damage}}}\n')
    curves = Curves()
    curves.add_lines(path.read_bytes().splitlines(keepends=True))
    assert curves.loss[0].points() == [(1, 0.5)]
    assert cut_metrics(path, 3) == 1


def test_held_out_losses_of_another_measure_are_left_out_of_the_curves(tmp_path):
    rows = [(1, {"0.00-1.00": 0.2}, 0.2), (2, {"all": 0.7}, 0.7), (3, {"all": 0.6}, 0.6)]
    lines = ({"step": step, "held_out_loss": mean, "held_out_by_band": bands} for step, bands, mean in rows)
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    curves = Curves.of(tmp_path / "metrics.jsonl")
    assert curves.best == (3, 0.6) and list(curves.held_out) == ["all"]
    assert Curves.of(tmp_path / "none").best is None


def test_an_image_is_written_with_its_step(run):
    with Reporter(run, TEN, start_step=120) as reporter:
        path = reporter.image("contact-sheet", lambda: square("red"))
        assert path == run.samples / "step-000120-contact-sheet.jpg"
        with Image.open(path) as picture:
            assert picture.size == (8, 8)
    assert [path.name for path in run.samples.iterdir()] == ["step-000120-contact-sheet.jpg"]


def test_trouble_in_a_picture_is_logged_with_its_traceback_counted_and_ends_nothing(run, capsys):
    def broken() -> Image.Image:
        raise RuntimeError("the VAE is upside down")

    with Reporter(run, TEN) as reporter:
        assert reporter.image("first", broken) is None
        assert reporter.image("second", broken) is None
        assert reporter.failed_images == 2
        reporter.step(1, 0.5, 4)
    text = run.log.read_text()
    assert text.count("RuntimeError: the VAE is upside down") == 2
    assert text.count("in broken") == 2
    assert "2 images could not be made" in text
    assert "the image first could not be made" in capsys.readouterr().err
    assert list(run.samples.iterdir()) == []
    assert len(rows(run)) == 1


def test_ctrl_c_while_an_image_is_made_does_not_count_as_a_failed_image(run):
    def interrupted() -> Image.Image:
        raise KeyboardInterrupt

    with Reporter(run, TEN) as reporter, pytest.raises(KeyboardInterrupt):
        reporter.image("first", interrupted)
    assert reporter.failed_images == 0


def test_the_log_holds_our_lines_and_those_of_comfyui_and_its_handlers_are_removed_at_the_end(run, capsys):
    ours, root = logging.getLogger("distilled_t5"), logging.getLogger()
    before = list(ours.handlers), list(root.handlers), ours.level, ours.propagate
    with Reporter(run, TEN) as reporter:
        log.info("from the trainer, \u4f60\u597d")
        root.warning("from ComfyUI")
        reporter.saved(run.checkpoints / "step-000000")
    assert (list(ours.handlers), list(root.handlers), ours.level, ours.propagate) == before
    log.warning("after the end")
    text = run.log.read_text(encoding="utf-8")
    for line in ("from the trainer, \u4f60\u597d", "from ComfyUI", "saved step-000000"):
        assert text.count(line) == 1
    assert "after the end" not in text
    assert capsys.readouterr().err.count("from the trainer") == 1


def test_a_run_that_cannot_be_reported_leaves_no_handler(run):
    run.metrics.mkdir()
    before = list(logging.getLogger().handlers)
    with pytest.raises(OSError, match="directory"):
        Reporter(run, TEN)
    assert logging.getLogger().handlers == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device whose disk is always full")
def test_a_log_on_a_full_disk_is_one_notice_and_ends_nothing(capsys):
    with logging_to(Path("/dev/full")):
        for number in range(1000):
            log.info("line %d %s", number, "x" * 100)
    shown = capsys.readouterr().err
    assert shown.count("line ") == 1000
    assert shown.count("/dev/full cannot be written ([Errno 28] No space left on device); the run continues without it.") == 1
    assert "Traceback" not in shown


def test_a_held_out_loss_that_is_not_finite_is_a_warning_with_its_bands(run, capsys):
    with Reporter(run, TEN, start_step=5) as reporter:
        assert math.isnan(reporter.held_out({"0.0-0.5": 1.0, "0.5-1.0": math.nan}, 16))
    shown = capsys.readouterr().err
    assert "Step 5: the held-out loss on 16 prompts is not a finite number at the noise levels 0.5-1.0" in shown
    assert "What to do: " in shown
    assert "loss nan" not in shown


@pytest.mark.parametrize(("band", "where"), [("all", " number, so"), ("student wide", " number for student wide, so")])
def test_a_held_out_loss_without_noise_levels_that_is_not_finite_is_a_warning_without_them(run, capsys, band, where):
    with Reporter(run, TEN, start_step=5) as reporter:
        reporter.held_out({band: math.nan}, 16)
    assert f"is not a finite{where}" in capsys.readouterr().err


def test_other_ranks_write_and_print_nothing_and_make_no_pictures(capsys):
    with Reporter(None, TEN) as reporter:
        reporter.step(1, 0.5, 4)
        assert reporter.held_out({"all": 2.0}, 4) == 2.0
        assert reporter.image("first", pytest.fail) is None
    assert capsys.readouterr() == ("", "")


def test_curves_and_images_for_tensorboard_where_it_is_installed_and_else_a_line_that_says_how_to_get_it(run):
    with Reporter(run, TEN) as reporter:
        reporter.step(1, 0.5, 4, gradient_norm=math.nan)
        reporter.held_out({"0.0-1.0": 1.0}, 4)
        reporter.image("preview", lambda: square("red"))
    written = list(run.path.glob("tensorboard/events.out.tfevents.*"))
    installed = importlib.util.find_spec("tensorboard") is not None
    assert len(written) == installed
    assert ("pip install tensorboard" in run.log.read_text()) is not installed
    assert installed or "torch.utils.tensorboard.writer" not in sys.modules
    if installed:
        accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
        found = accumulator.EventAccumulator(str(written[0])).Reload()
        assert {"train/loss", "validation/held_out_loss", "validation/held_out_by_band/0.0-1.0"} <= set(found.Tags()["scalars"])
        assert [(image.step, image.width) for image in found.Images("preview")] == [(1, 8)]


def test_weights_and_biases_gets_numbers_and_images_without_a_network_as_one_run_after_a_resume(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    reported = load_recipe("smoke", ["stage.0.steps=4", "stage.1.steps=6", "report.wandb=true"])
    for step in (0, 1):
        with Reporter(run, reported, start_step=step) as reporter:
            reporter.step(step + 1, 0.5, 4, gradient_norm=math.nan)
            reporter.held_out({"0.0-1.0": 1.0}, 4)
            reporter.image("preview", lambda: square("red"))
    identity = (run.path / "wandb-id").read_text(encoding="utf-8")
    kept = [path for path in (run.path / "wandb").iterdir() if path.name.startswith("offline-run")]
    assert kept and all(path.name.endswith(identity) for path in kept)
    first = min(kept)
    assert len(list(first.glob("files/media/images/preview_1_*.png"))) == 1
    names = (b"train/loss", b"validation/held_out_by_band/0.0-1.0", b"media/images/preview")
    deadline = time.monotonic() + 120
    while not all(name in (first / f"run-{identity}.wandb").read_bytes() for name in names):
        assert time.monotonic() < deadline, "wandb's own process writes the file"
        time.sleep(0.1)
    assert "cannot be written to" not in run.log.read_text(encoding="utf-8")


def test_a_board_that_cannot_be_opened_is_left_out_with_what_helps(run, monkeypatch, tmp_path):
    broken = tmp_path / "packages" / "tensorboard"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('it does not suit numpy')")
    monkeypatch.syspath_prepend(str(broken.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard" or name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    # Weights & Biases keeps its files in a folder: here is a file.
    (run.path / "wandb").write_text("")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with Reporter(run, load_recipe("smoke", ["report.wandb=true"])) as reporter:
        reporter.step(1, 0.5, 4)
    said = run.log.read_text(encoding="utf-8")
    assert "TensorBoard cannot be opened (it does not suit numpy); the run continues without it. What to do: run " in said
    assert "Weights & Biases cannot be opened (" in said and "What to do: `wandb login`, or set WANDB_MODE=offline" in said
    assert len(rows(run)) == 1


class Broken:
    """A board whose disk is full from the first image on."""

    def __init__(self) -> None:
        self.numbers_seen = 0

    def numbers(self, *_arguments: object) -> None:
        self.numbers_seen += 1

    def image(self, *_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        pytest.fail("it was closed already")


def test_a_board_that_fails_is_left_out_and_the_image_is_kept(run, capsys):
    board = Broken()
    with Reporter(run, TEN, boards=[board]) as reporter:
        reporter.step(1, 0.5, 4)
        assert reporter.image("preview", lambda: square("red")) is not None
        reporter.step(2, 0.5, 4)
        assert reporter.failed_images == 0
    assert board.numbers_seen == 1
    assert "Broken cannot be written to ([Errno 28] No space left on device); the run continues without it." in capsys.readouterr().err


def test_an_error_of_a_board_does_not_count_as_a_failed_image(run):
    class Full(Broken):
        def image(self, *_arguments: object) -> None:
            raise RuntimeError("the board's own")

        def close(self) -> None:
            pass

    with pytest.raises(RuntimeError, match="the board's own"), Reporter(run, TEN, boards=[Full()]) as reporter:
        reporter.image("preview", lambda: square("red"))
    assert reporter.failed_images == 0
    assert len(list(run.samples.iterdir())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
def test_metrics_that_cannot_be_written_are_a_clear_error(run):
    run.metrics.symlink_to("/dev/full")
    with Reporter(run, TEN) as reporter, pytest.raises(OSError, match=r"cannot be written: No space left on device.\nWhat to do"):
        reporter.step(1, 0.5, 4)


def row_of_three(*images: Image.Image) -> dict[str, list[Image.Image]]:
    return {name: [image] for name, image in zip(("teacher", "student", "difference"), images, strict=True)}


def test_contact_sheet_shows_teacher_student_and_difference_in_a_row_per_prompt():
    teacher, student = [square("red", 64), square("blue", 64)], [square("red", 64), square("yellow", 64)]
    difference = [image_difference(*pair) for pair in zip(teacher, student, strict=True)]
    sheet = contact_sheet(
        {"teacher": teacher, "student": student, "difference": difference},
        ["a red square", "a caption that is much longer than the sheet is wide " * 9],
    )
    pixels = np.asarray(sheet)
    colours = {colour: int((pixels == colour).all(axis=-1).sum()) for colour in [(255, 0, 0), (0, 0, 255), (255, 255, 0)]}
    assert colours == {(255, 0, 0): 2 * 64 * 64, (0, 0, 255): 64 * 64, (255, 255, 0): 64 * 64}
    assert difference[0].getpixel((0, 0)) == (0, 0, 0)
    assert difference[1].getpixel((0, 0)) == (255, 255, 255)
    row = next(y for y in range(sheet.height) if sheet.getpixel((8, y)) == (255, 0, 0))
    column = (sheet.width - GAP_PX) // 3
    assert [sheet.getpixel((x, row + 5)) for x in (9, 9 + column, 9 + 2 * column)] == [(255, 0, 0), (255, 0, 0), (0, 0, 0)]
    assert any(sheet.getpixel((x, row - 10)) != PAPER for x in range(sheet.width)), "the caption stands above its row"


def test_contact_sheet_takes_any_text_and_pictures_of_several_sizes():
    sheet = contact_sheet(row_of_three(square("red", 16), square("red", 320), square("black", 16)), ["\u4f60\u597d caf\u00e9 " + "x" * 500])
    assert sheet.width == 4 * GAP_PX + 3 * 320
    assert contact_sheet(row_of_three(square("red"), square("red"), square("black")), [""]).height > 8


def test_contact_sheet_of_small_pictures_is_wide_enough_for_its_headings():
    headings = np.asarray(contact_sheet(row_of_three(square("red"), square("red"), square("black")), [""]))[: GAP_PX + LINE_PX]
    empty = (headings == PAPER).all(axis=(0, 2))
    assert empty[-GAP_PX:].all(), "the last one is not cut off"
    between = "".join("." if column else "#" for column in empty).split("." * GAP_PX)
    assert len([part for part in between if "#" in part]) == 3, "and none runs into the next"


@pytest.mark.parametrize(
    ("columns", "captions"),
    [({"teacher": []}, []), ({"teacher": [square("red")], "student": []}, ["a"]), ({"teacher": [square("red")]}, [])],
)
def test_contact_sheet_refuses_rows_that_do_not_match(columns, captions):
    with pytest.raises(ValueError, match=r"contact sheet|shorter|longer"):
        contact_sheet(columns, captions)
