"""The page: everything in it, nothing outside it, nothing in a prompt can break it; and the prompts that it shows."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.evaluate.measured import Measured, exact
from distilled_t5.evaluate.page import chosen_questions, data_uri, page, row
from distilled_t5.evaluate.plots import write_plots
from distilled_t5.evaluate.questions import Question, in_turn, read_questions
from distilled_t5.evaluate.results import Report
from distilled_t5.evaluate.suite import load_suite
from distilled_t5.prompts.corpora import PromptError
from PIL import Image

EVIL = 'a sign that says "</script><script>alert(1)</script>" & <!-- \u2028'
NOTES = {"provenance": "Measured somewhere.", "chosen": "All 2 prompts.", "small": True}
REPORT = Report(
    "tiny",
    ["t", "s"],
    {"things": {"readback": {"t": Measured(1.0, 2, 0.3, 1.0), "s": Measured(0.5, 2, 0.1, 0.9)}}},
    {"things": {"readback": {"s": Measured(0.5, 2, 0.1, 0.9)}}},
    {"cost": {"resident bytes": {"t": exact(9), "s": exact(3)}}},
    {"s": {"all tasks": Measured(0.5, 20, 0.2, 0.8), "things": Measured(0.5, 20, 0.2, 0.8)}},
)
SCORES = {"things": {"readback": {"t": [1.0, 1.0], "s": [0.0, 1.0]}}}
LOST = {"things": {"s": [1.0, 0.0]}}


def picture_file(folder: Path, side_px: int = 8, colour: tuple[int, int, int] = (255, 128, 0)) -> Path:
    path = folder / f"{side_px}-{colour[0]}.png"
    Image.new("RGB", (side_px, side_px), colour).save(path)
    return path


def decoded(uri: str) -> tuple[str, Image.Image]:
    match = re.fullmatch(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)", uri)
    assert match
    return match[1], Image.open(io.BytesIO(base64.b64decode(match[2])))


def data_of(html: str) -> dict[str, Any]:
    """What the page's script reads, as a browser cuts it out: up to the first end tag."""
    return json.loads(html.split('<script type="application/json" id="data">', 1)[1].split("</script", 1)[0])


@pytest.fixture
def html(tmp_path: Path) -> str:
    asked = [Question("things", 0, EVIL, 5, target="FOX"), Question("things", 1, "a red star", 6)]
    rows = [row(question, SCORES, LOST, ["t", "s"], lambda _name, _question: picture_file(tmp_path), 96) for question in asked]
    return page(REPORT, rows, {"t and s": data_uri(b"a map", "png")}, NOTES)


def test_prompts_scores_losses_and_pictures_stand_in_the_page(html):
    data = data_of(html)
    first, second = data["rows"]
    assert (first["prompt"], first["target"], first["seed"], first["task"]) == (EVIL, "FOX", 5, "things")
    assert (first["encoders"]["s"]["scores"], first["encoders"]["s"]["loss"], first["encoders"]["t"]["loss"]) == ("correct 0.0 %", 1.0, 0.0)
    assert second["encoders"]["s"]["scores"] == "correct 100.0 %"
    kind, picture = decoded(first["encoders"]["t"]["image"])
    assert (kind, picture.size, picture.convert("RGB").getpixel((0, 0))) == ("png", (8, 8), (255, 128, 0))
    assert [table["caption"].split(":")[0] for table in data["tables"]][-1] == "Memory and time"
    assert data["tables"][0]["rows"][1] == ["s", ["50.0", "10.0 to 90.0, n = 2"]]
    assert data["maps"][0]["name"] == "t and s"


def test_points_are_rounded_and_of_numbers_with_an_upper_end_only(tmp_path):
    def points(task: str, loss: float) -> int:
        scores = {"things": SCORES["things"], "far": {"lpips": {"s": [0.3]}}}
        shown = row(Question(task, 0, "a star", 1), scores, {task: {"s": [loss]}}, ["t", "s"], lambda *_: picture_file(tmp_path), 96)
        return shown["encoders"]["s"]["points"]

    assert [points("things", loss) for loss in (1.0, 0.004, -0.26)] == [-100, 0, 26]
    assert points("far", 0.3) == 0, "the distance has no range to be a share of"


def test_nothing_in_a_prompt_ends_the_script_or_becomes_markup(html):
    assert "alert(1)</script>" not in html
    assert html.count("</script") == 3 and html.count("<script") == 3


def test_the_page_asks_no_server_for_anything(html):
    written = re.sub("base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link (?!rel=.icon. href=.data:)|src=\"(?!data:)|fetch\(|XMLHttpRequest", written)
    assert "default-src 'none'" in html


def test_large_pictures_are_scaled_down_and_small_ones_kept_to_the_pixel(tmp_path):
    def shown(side_px: int) -> tuple[str, Image.Image]:
        one = row(Question("things", 0, "a star", 1), {}, {}, ["t"], lambda *_: picture_file(tmp_path, side_px), 64)
        return decoded(one["encoders"]["t"]["image"])

    kind, picture = shown(200)
    assert (kind, picture.size) == ("jpeg", (64, 64))
    kind, picture = shown(64)
    assert (kind, picture.size, picture.convert("RGB").getpixel((3, 3))) == ("png", (64, 64), (255, 128, 0))


def test_the_page_begins_with_the_answer_and_its_chart(html):
    [answer] = data_of(html)["answers"]
    assert answer["sentence"] == "s keeps 50 % of the teacher (20 to 80)."
    assert answer["shares"][1] == {"task": "things", "value": 50.0, "low": 20.0, "high": 80.0, "text": "50 % (20 to 80)"}
    assert data_of(html)["left_out"] == ""


def test_charts_are_png_and_svg_and_without_matplotlib_there_is_no_empty_folder(tmp_path, monkeypatch, caplog):
    write_plots(tmp_path / "plots", REPORT, {})
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"share_of_teacher.png", "share_of_teacher.svg"}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_plots(tmp_path / "none", REPORT, {})
    assert not (tmp_path / "none").exists()
    assert "The chart in plots/ needs the package matplotlib.\nWhat to do: run " in caplog.text


def questions(task: str, count: int) -> list[Question]:
    return [Question(task, index, f"{task} {index}", index) for index in range(count)]


def test_half_of_what_is_shown_are_the_worst_losses_and_all_stand_in_the_order_asked():
    asked = {"a": questions("a", 6), "b": questions("b", 2)}
    lost = {"a": {"s": [0.0, 0.1, 0.0, 0.9, 0.0, 0.2], "r": [0.0, 0.0, 0.0, 0.0, 0.5, 0.0]}}
    chosen = chosen_questions(asked, lost, 4)
    # Worst 3 (0.9) and 4 (0.5); then the first ones, 0 and 1.
    assert [(one.task, one.index) for one in chosen] == [("a", 0), ("a", 1), ("a", 3), ("a", 4), ("b", 0), ("b", 1)]
    assert [one.index for one in chosen_questions({"a": questions("a", 3)}, {}, 2)] == [0, 1]
    assert len(chosen_questions(asked, lost, 100)) == 8


def test_prompts_are_taken_of_all_tasks_in_turn():
    asked = {"a": questions("a", 3), "b": questions("b", 1)}
    assert [one.prompt for one in in_turn(asked, 3)] == ["a 0", "b 0", "a 1"]
    assert len(in_turn(asked, 9)) == 4


PAPER_TASKS = 8


def coco(folder: Path, **changes: Any) -> Path:
    content = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 3, "file_name": "3.jpg"}],
        "annotations": [
            {"id": 2, "image_id": 7, "caption": "later of seven "},
            {"id": 1, "image_id": 7, "caption": " first of seven"},
            {"id": 5, "image_id": 3, "caption": "of three"},
        ],
    } | changes
    path = folder / "captions.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def coco_questions(captions: Path, pictures: Path) -> list[Question]:
    suite = load_suite("paper", [f"task.7.prompts.path={captions}", f"task.7.prompts.photographs={pictures}", "seed=40"])
    assert len(suite.tasks) == PAPER_TASKS
    return read_questions({"coco": suite.tasks[7].prompts}, suite.seed)["coco"]


def test_coco_gives_the_first_caption_of_each_photograph_in_order_of_their_numbers(tmp_path):
    for name in ("3.jpg", "7.jpg"):
        (tmp_path / name).touch()
    asked = coco_questions(coco(tmp_path), tmp_path)
    assert [(one.prompt, one.seed, one.photograph) for one in asked] == [
        ("of three", 40, tmp_path / "3.jpg"),
        ("first of seven", 41, tmp_path / "7.jpg"),
    ]


def test_captions_without_their_photographs_or_of_another_kind_are_refused(tmp_path):
    (tmp_path / "3.jpg").touch()
    with pytest.raises(PromptError, match="1 of 2 photographs are not in") as caught:
        coco_questions(coco(tmp_path), tmp_path)
    assert "The first: " in str(caught.value) and "7.jpg" in str(caught.value)
    with pytest.raises(PromptError, match="is not a file of COCO captions"):
        coco_questions(coco(tmp_path, annotations=[{"text": "x"}]), tmp_path)
    with pytest.raises(PromptError, match="has no caption of a photograph"):
        coco_questions(coco(tmp_path, annotations=[]), tmp_path)


def test_compbench_prompts_are_one_categorys_and_must_be_understood(tmp_path):
    for category in ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy"):
        (tmp_path / f"{category}_val.txt").write_text("a red bench and a blue bowl\n", encoding="utf-8")
        (tmp_path / f"{category}_train.txt").touch()
    (tmp_path / "spatial_val.txt").write_text("a cat on the left of a dog\na bird next to a car\n", encoding="utf-8")
    suite = load_suite("paper", [f"task.{number}.prompts.path={tmp_path}" for number in range(1, 7)])

    def of(number: int) -> list[Question]:
        return read_questions({"task": suite.tasks[number].prompts}, suite.seed)["task"]

    assert [one.prompt for one in of(4)] == ["a cat on the left of a dog", "a bird next to a car"]
    assert [one.prompt for one in of(1)] == ["a red bench and a blue bowl"]
    with pytest.raises(ValueError, match="What to do: leave the prompt out of this category"):
        of(5)
