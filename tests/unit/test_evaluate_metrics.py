"""Judges as a suite calls them in: the right one for each metric, every score under the name of its number; and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distilled_t5.evaluate import compbench, judges
from distilled_t5.evaluate.compbench_judges import BlipVqa, TransformersDepth, TransformersDetector
from distilled_t5.evaluate.judges import by_number, check_counts, check_judges, judged_by
from distilled_t5.evaluate.metrics import METRICS
from distilled_t5.evaluate.pictures import ClipScorer
from distilled_t5.evaluate.questions import Question, read_questions
from distilled_t5.evaluate.scores import Kept, kept_or_made
from distilled_t5.evaluate.suite import Suite, Task, load_suite
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support.tiny_judges import SIDE_PX, save_blip, save_clip, save_depth, save_detector
from distilled_t5.world.pictures import render
from PIL import Image, ImageDraw, ImageFont

CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy")


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """The paper's suite with small random networks in the place of its own."""
    folder = tmp_path_factory.mktemp("judges")
    return load_suite(
        "paper",
        [
            f"clip_score.weights={save_clip(folder / 'clip')}",
            f"compbench.vqa={save_blip(folder / 'blip')}",
            f"compbench.detector={save_detector(folder / 'tiny-yolos')}",
            f"compbench.depth={save_depth(folder / 'depth')}",
            "ocr.reader=tesseract",
        ],
    )


def make_judge(metric: str, task: Task, suite: Suite) -> Any:
    return judges.make_judge(METRICS[metric], task, suite, "cpu")


def task_of(suite: Suite, name: str) -> Task:
    return next(task for task in suite.tasks if task.name == name)


def photographs(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, size=(count, SIDE_PX, SIDE_PX, 3), dtype=np.uint8))


def asked(*prompts: str, target: str | None = None) -> list[Question]:
    return [Question("task", index, prompt, index, target=target) for index, prompt in enumerate(prompts)]


def test_readback_finds_what_a_scene_asks_for_and_nothing_else():
    suite = load_suite("miniature", [f"task.{number}.prompts.limit=4" for number in range(7)])
    for task in suite.tasks:
        questions = read_questions({task.name: task.prompts}, 0)[task.name]
        pictures = [(render(question.scene, 8) * 255).astype(np.uint8) for question in questions if question.scene]
        judge = make_judge("readback", task, suite)
        assert judge(questions, pictures, []) == [{"readback": 1.0}] * 4
        assert judge(questions, [255 - picture for picture in pictures], []) == [{"readback": 0.0}] * 4


def written(text: str) -> np.ndarray:
    picture = Image.new("RGB", (512, 160), "white")
    ImageDraw.Draw(picture).text((30, 40), text, fill="black", font=ImageFont.load_default(72))
    return np.asarray(picture)


def test_the_text_asked_for_is_read_by_the_suites_reader(paper):
    judge = make_judge("ocr", task_of(paper, "common_text"), paper)
    right, wrong = judge(asked("a sign", "a sign", target="OPEN DAY"), [written("OPEN DAY"), written("OPEN BAR")], [])
    assert right == {"ocr_character": 1.0, "ocr_word": 1.0, "ocr_sentence": 1.0}
    # "open bar" against "open day": 6 of 8 characters, one word of two.
    assert wrong == {"ocr_character": 0.75, "ocr_word": 0.5, "ocr_sentence": 0.0}


def test_clip_scores_are_the_scorers_own(paper):
    prompts, pictures = ["a cat", "a green bench", "x"], photographs(3)
    found = make_judge("clip_score", task_of(paper, "coco"), paper)(asked(*prompts), pictures, [])
    assert [one["clip_score"] for one in found] == pytest.approx(
        ClipScorer(Path(paper.table_of(METRICS["clip_score"]).weights)).scores(pictures, prompts)
    )


def expected(category: str, part: Any, prompt: str, picture: np.ndarray) -> float:
    """The benchmark's formula on what the network sees."""
    if category in ("color", "shape", "texture"):
        return BlipVqa(Path(part.vqa)).score(picture, compbench.noun_phrases(prompt))
    seen = TransformersDetector(Path(part.detector)).detect(picture)
    if category == "spatial":
        return compbench.spatial_score(prompt, seen, (SIDE_PX, SIDE_PX))
    if category == "numeracy":
        return compbench.numeracy_score(prompt, seen)
    return compbench.spatial_3d_score(prompt, seen, TransformersDepth(Path(part.depth)).nearness(picture))


@pytest.mark.parametrize("category", CATEGORIES)
def test_each_category_of_compbench_has_its_own_judge_and_says_who_it_is(paper, category):
    prompt = {"spatial": "a cat next to a dog", "3d_spatial": "a cat in front of a dog", "numeracy": "two cats and a dog"}.get(category)
    prompt, pictures = prompt or "a green bench and a red bowl", photographs(2)
    found = make_judge("compbench", task_of(paper, category), paper)(asked(prompt, prompt), pictures, [])
    name = compbench.metric_name(category, "tiny-yolos")
    assert found == [
        {name: pytest.approx(expected(category, paper.table_of(METRICS["compbench"]), prompt, picture))} for picture in pictures
    ]
    assert "not UniDet" in name or "BLIP-VQA" in name


def test_missing_weights_are_an_error_that_says_what_to_do(paper, tmp_path):
    suite = load_suite("paper", [f"clip_score.weights={tmp_path / 'none'}", f"lpips.weights={tmp_path / 'none.safetensors'}"])
    for metric in ("clip_score", "lpips"):
        with pytest.raises(ValueError, match="What to do: "):
            make_judge(metric, task_of(suite, "coco"), suite)


def test_what_decides_a_verdict_is_its_metric_and_the_part_of_the_suite(paper):
    readback = judged_by(METRICS["readback"], paper, asked("a", "b"))
    assert (readback["metric"], readback["part"], readback["weights"]) == ("readback", None, {})
    assert judged_by(METRICS["ocr"], paper, [])["part"] == {"reader": "tesseract", "weights": "", "languages": ("en",)}
    assert by_number([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}]) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert by_number([]) == {}


def test_another_target_photograph_or_network_decides_again(tmp_path):
    (tmp_path / "0.png").write_bytes(b"one")
    (tmp_path / "inception.safetensors").write_bytes(b"weights")
    here = load_suite("paper", [f"fid.weights={tmp_path / 'inception.safetensors'}"])
    fid_of = [Question("coco", 0, "a cat", 0, photograph=tmp_path / "0.png")]
    before = judged_by(METRICS["fid"], here, fid_of)
    assert judged_by(METRICS["fid"], here, fid_of) == before
    (tmp_path / "0.png").write_bytes(b"two")  # as long as the first
    assert judged_by(METRICS["fid"], here, fid_of) != before
    (tmp_path / "other.safetensors").write_bytes(b"weightS")
    there = load_suite("paper", [f"fid.weights={tmp_path / 'other.safetensors'}"])
    assert judged_by(METRICS["fid"], here, fid_of)["weights"] != judged_by(METRICS["fid"], there, fid_of)["weights"]
    assert judged_by(METRICS["ocr"], here, asked("a", target="X")) != judged_by(METRICS["ocr"], here, asked("a", target="Y"))


def test_numbers_of_other_code_are_not_found(tmp_path):
    Kept(tmp_path, "code 1").put("student/cost", {"a": 1}, 7)
    assert Kept(tmp_path, "code 1").get("student/cost", {"a": 1}) == 7
    assert Kept(tmp_path, "code 2").get("student/cost", {"a": 1}) is None


def test_all_missing_judges_are_reported_at_once(paper):
    with pytest.raises(ValueError, match="FID needs its weights") as caught:
        check_judges(paper.model_copy(update={"tasks": paper.tasks[-1:]}))
    assert "LPIPS needs its weights" in str(caught.value)
    check_judges(paper.model_copy(update={"tasks": paper.tasks[:-1]}))


def test_what_is_kept_is_made_once_and_again_when_something_else_decides_it(tmp_path):
    kept, made = Kept(tmp_path / "scores"), []

    def ask(decided_by: dict[str, Any]) -> Any:
        return kept_or_made(kept, Ranks(), "student/task.ocr", decided_by, lambda _part: made.append(1) or {"a": [0.1, 2 / 3]})

    assert ask({"languages": ("en",)}) == ask({"languages": ("en",)}) == {"a": [0.1, 2 / 3]}
    assert len(made) == 1
    ask({"languages": ("de",)})
    assert len(made) == 2
    assert kept.get("student/task.ocr", {"languages": ["de"]}) == {"a": [0.1, 2 / 3]}, "every float to the last bit"


@pytest.mark.parametrize("other", ["teacher/task.ocr", "student/other.ocr"])
def test_kept_numbers_under_the_name_of_others_are_measured_again(tmp_path, other):
    kept = Kept(tmp_path)
    kept.put("student/task.ocr", {"images": "student", "prompts": "task"}, {"ocr_word": [0.5]})
    encoder, _, task = other.removesuffix(".ocr").partition("/")
    decided_by = {"images": encoder, "prompts": task}
    kept.put(other, decided_by, {"ocr_word": [0.9]})
    (tmp_path / "student/task.ocr.json").replace(tmp_path / f"{other}.json")
    assert kept.get(other, decided_by) is None


DAMAGES = [
    lambda text: text[:-20],
    lambda text: text.replace("0.5", "0.9"),
    lambda _text: "[]",
    lambda _text: "",
    lambda _text: "[" * 200_000,
    lambda _text: '{"decided_by": 1}',
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_kept_numbers_that_were_damaged_or_edited_are_measured_again(tmp_path, damage, caplog):
    kept = Kept(tmp_path)
    kept.put("student/task.ocr", {"a": 1}, {"ocr_word": [0.5, 1.0]})
    path = tmp_path / "student" / "task.ocr.json"
    path.write_text(damage(path.read_text()))
    assert kept.get("student/task.ocr", {"a": 1}) is None
    assert f"{path} is damaged or was edited" in caplog.text


def test_every_metric_and_probe_with_too_few_prompts_is_named_before_anything_is_generated():
    def counted(**counts: int) -> dict[str, list[Question]]:
        return {task.name: [Question(task.name, 0, "a cat", 0)] * counts.get(task.name, 1) for task in load_suite("paper").tasks}

    with pytest.raises(ValueError, match=r"^fid of task coco: expected at least 2 prompts, got 1\.\nWhat to do: raise --limit"):
        check_counts(load_suite("paper"), counted())
    check_counts(load_suite("paper"), counted(coco=2))
    single = load_suite("miniature").model_copy(update={"tasks": load_suite("miniature").tasks[:1]})
    with pytest.raises(ValueError, match=r"^collapse: expected at least 2 prompts, got 1\."):
        check_counts(single, {single.tasks[0].name: [Question("single_object", 0, "a cat", 0)]})
