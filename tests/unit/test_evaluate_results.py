"""Numbers, their intervals and their tables, against values computed by hand."""

from __future__ import annotations

import ast
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from distilled_t5.evaluate.measured import Measured, exact
from distilled_t5.evaluate.metrics import NUMBERS, PROBES, number_of
from distilled_t5.evaluate.provenance import commit_of
from distilled_t5.evaluate.results import (
    ALL,
    Report,
    answer,
    index,
    left_out,
    losses,
    markdown,
    measured_scores,
    picture_losses,
    shares,
    summary,
    tables,
    to_json,
)

# Two tasks, a teacher and a student; `lpips` is a distance from the teacher, which has none.
SCORES = {
    "things": {"readback": {"t": [1.0, 1.0, 0.0, 1.0], "s": [0.0, 1.0, 0.0, 1.0]}},
    "text": {
        "ocr_character": {"t": [1.0, 0.5], "s": [0.25, 0.75]},
        "ocr_word": {"t": [1.0, 0.0], "s": [0.0, 0.0]},
        "lpips": {"s": [0.3, 0.1]},
    },
}


def test_numbers_become_json_at_any_depth():
    assert to_json({"a": {"b": exact(2)}, "c": "d"}) == {"a": {"b": {"value": 2, "n": 1, "low": 2, "high": 2}}, "c": "d"}


def test_losses_are_differences_on_the_same_prompts():
    found = losses(SCORES, "t")
    assert found["things"]["readback"]["s"].value == pytest.approx(0.25)
    assert found["text"]["ocr_character"]["s"].value == pytest.approx((0.75 - 0.25) / 2)
    assert "lpips" not in found["text"], "a distance from the teacher has no teacher to be compared with"
    assert "t" not in found["things"]["readback"]


def test_the_loss_of_a_picture_is_the_mean_over_its_numbers():
    found = picture_losses(SCORES, "t", ["s"])
    assert found["things"] == {"s": [1.0, 0.0, 0.0, 0.0]}
    # characters 0.75, words 1; and -0.25, 0. A distance without an upper end is not a share of its range.
    assert found["text"]["s"] == pytest.approx([(0.75 + 1.0) / 2, (-0.25 + 0.0) / 2])
    assert picture_losses(SCORES, "t", []) == {}


def test_a_distance_without_an_upper_end_is_a_loss_only_where_there_is_no_other_number():
    lpips = {"s": [0.9, 0.1]}
    scores = {"coco": {"clip_score": {"t": [30.0, 30.0], "s": [29.0, 27.0]}, "lpips": lpips}, "distances": {"lpips": lpips}}
    found = picture_losses(scores, "t", ["s"])
    assert found["coco"]["s"] == pytest.approx([0.01, 0.03])
    assert found["distances"]["s"] == [0.9, 0.1], "images are sorted by it"


def test_fewer_is_better_where_a_number_is_a_distance():
    scores = {"coco": {"lpips": {"t": [0.1], "s": [0.4]}}}
    assert losses(scores, "t")["coco"]["lpips"]["s"].value == pytest.approx(0.3)


def report() -> Report:
    probes = {
        "latent_distance": {f"after step {step}": {"s": Measured(step / 10, 5, step / 20, step / 5)} for step in range(1, 21)},
        "cost": {"resident bytes": {"t": exact(9_524_621_312), "s": exact(259_000_000)}},
    }
    return Report("tiny", ["t", "s"], measured_scores(SCORES), losses(SCORES, "t"), probes, shares(SCORES, "t", ["s"]))


def test_the_first_table_is_plain_and_the_others_say_interval_and_count():
    text = markdown(report())
    lines = text.splitlines()
    assert lines[0] == "# tiny"
    assert lines[2] == "s keeps 55 % of the teacher (no interval, n = 6): least in text (40 %), most in things (67 %)."
    assert lines[4] == "| Encoder | things: correct, % | text: characters, % | text: words, % | text: LPIPS |"
    assert lines[6:8] == ["| t | 75.0 | 75.0 | 50.0 |  |", "| s | 50.0 | 50.0 | 0.0 | 0.200 |"]
    assert "| t | 75.0 (30.1 to 95.4, n = 4) |" in text
    assert "| s | 259.0 |" in text and "memory, MB" in text
    assert "Distance of the latents" in text


def test_of_many_steps_six_are_shown_the_first_and_the_last_among_them():
    table = next(one for one in tables(report()) if one.caption.startswith("Distance of the latents"))
    assert table.heads == [f"after step {step}" for step in (1, 5, 9, 12, 16, 20)]
    assert [name for name, _ in table.rows] == ["s"]
    assert table.rows[0][1][-1].value == "2" and table.rows[0][1][-1].spread == "1 to 4, n = 5"


def test_no_loss_and_no_interval_leaves_its_range():
    few = {"things": {"readback": {"t": [1.0, 1.0, 1.0, 1.0], "s": [0.0, 0.0, 0.0, 1.0]}}}
    lost = losses(few, "t")["things"]["readback"]["s"]
    assert lost.high == 1.0 and lost.value == 0.75
    ocr = measured_scores({"text": {"ocr_character": {"t": [1.0, 0.9, 0.2]}}})["text"]["ocr_character"]["t"]
    assert (ocr.low, ocr.high) == (0.0, 1.0)


def test_losses_are_written_in_points_and_identical_results_as_such():
    same = {"things": {"readback": {"t": [1.0] * 12, "s": [1.0] * 12, "r": [0.0] * 12}}}
    found = Report("tiny", ["t", "s", "r"], measured_scores(same), losses(same, "t"), {}, shares(same, "t", ["s", "r"]))
    table = tables(found)[1]
    assert table.heads == ["things: correct, percentage points"]
    assert [(cell.value, cell.spread) for _, [cell] in table.rows] == [("0.0", "identical on all 12"), ("100.0", "the same on all 12")]
    assert answer(found, "s") == "s keeps 100 % of the teacher (identical on all 12)."


def test_equal_tasks_are_named_if_there_are_two_and_counted_if_there_are_more():
    def said(**kept: float) -> str:
        return answer(
            replace(report(), shares={"s": {ALL: Measured(0.9, 40, 0.8, 1.0), **{name: Measured(one, 10) for name, one in kept.items()}}}),
            "s",
        )

    assert (
        said(word=1.0, two_words=0.5, count=0.999)
        == "s keeps 90 % of the teacher (80 to 100): least in two words (50 %), most in word and count (100 %)."
    )
    assert said(a=1.0, b=1.0, c=1.0, d=0.2).endswith(": least in d (20 %), most in 3 tasks (100 %).")


def test_identical_is_said_only_of_identical_scores():
    one_less = [1.0] * 19 + [0.0]
    equal = {"word": {"readback": {"t": one_less, "s": one_less[::-1]}}, "count": {"readback": {"t": [1.0], "s": [1.0]}}}
    found = Report("tiny", ["t", "s"], measured_scores(equal), losses(equal, "t"), {}, shares(equal, "t", ["s"]))
    assert answer(found, "s") == "s keeps 100 % of the teacher (no interval, n = 21)."


def test_a_velocity_gap_of_zero_has_no_interval_of_a_share():
    gaps = {"lpips": {"s": [0.0] * 10}}
    assert measured_scores({"coco": gaps})["coco"]["lpips"]["s"] == Measured(0.0, 10)


def test_a_share_leaves_out_distances_and_tasks_at_which_the_teacher_fails():
    scores = {
        "words": {"ocr_word": {"t": [1.0] * 20, "s": [1.0, 0.5] * 10}, "lpips": {"s": [0.5] * 20}},
        "coco": {"clip_score": {"t": [30.0] * 20, "s": [27.0] * 20}},
        "new_word": {"readback": {"t": [0.0] * 19 + [1.0], "s": [1.0] * 20}},
        "distances": {"lpips": {"s": [0.5] * 20}},
    }
    found = shares(scores, "t", ["s"])["s"]
    assert {task: round(one.value, 3) for task, one in found.items()} == {ALL: 0.75, "words": 0.75}, "CLIP scores are left out"
    assert found["words"].low is not None and 0.6 < found["words"].low < 0.75
    assert shares({"distances": scores["distances"]}, "t", ["s"]) == {}
    report = Report("tiny", ["t", "s"], measured_scores(scores), {}, {}, {"s": found})
    assert left_out(report) == (
        "Left out because the teacher itself scores below 10 %: new word. Left out because no score counts successes: coco, distances."
    )
    assert left_out(replace(report, shares={})) == "", "nothing is shown that a task could be left out of"


def test_the_summary_is_aligned_with_a_line_for_each_number():
    said, _, *lines = summary(report()).splitlines()
    assert said == answer(report(), "s")
    assert [line.split() for line in lines if line.startswith(("text: LPIPS", "memory", "share"))] == [
        ["text:", "LPIPS", "0.200"],
        ["memory,", "MB", "9524.6", "259.0"],
        ["share", "of", "the", "teacher,", "%", "55"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_the_index_says_what_each_number_means_once():
    labels = [label for label, _ in index(report())]
    assert labels == ["share of the teacher", "lost", "characters", "words", "correct", "LPIPS", "memory", "after step"]
    assert all(number.meaning.endswith(".") for number in NUMBERS.values())


def test_every_probe_has_its_function():
    tree = ast.parse((Path(__file__).resolve().parents[2] / "evaluate" / "probes.py").read_text(encoding="utf-8"))
    assert set(PROBES) <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_numbers_record_says_how_it_is_written_and_what_is_better():
    compbench, fid = number_of("CompBench color (BLIP-VQA, phrases by rule)"), number_of("FID (other Inception)")
    assert (compbench.label, compbench.unit, compbench.written(0.7911)) == ("CompBench color (BLIP-VQA, phrases by rule)", "%", "79.1")
    assert (fid.label, fid.unit, fid.written(22.361)) == ("FID (other Inception)", "", "22.36")
    assert (compbench.loss(0.75, 0.5), fid.loss(20.0, 25.0)) == (0.25, 5.0)


def test_a_cell_cannot_break_the_table():
    odd = Report("tiny", ["a|b"], {"t": {"readback": {"a|b": Measured(1.0, 1)}}}, {}, {}, {})
    assert "| a\\|b | 100.0 |" in markdown(odd)


def test_the_commit_is_the_last_of_gits_log_of_head_and_none_where_there_is_none(tmp_path):
    older, commit = "0" * 40, "0123456789abcdef0123456789abcdef01234567"
    git = tmp_path / "repository" / ".git"
    of_worktree = git / "worktrees" / "worktree"
    for folder in (git, of_worktree):
        (folder / "logs").mkdir(parents=True)
    assert commit_of(git.parent) is None, "a branch without a commit"
    (git / "logs" / "HEAD").write_text(
        f"{older} {commit[::-1]} A <a@b> 1 +0000\tcommit (initial): x\n{commit[::-1]} {commit} A <a@b> 2 +0000\tcommit: y\n"
    )
    assert commit_of(git.parent) == commit
    (of_worktree / "logs" / "HEAD").write_text(f"{older} {commit[::-1]} A <a@b> 1 +0000\n")
    worktree = tmp_path / "worktree"
    worktree.mkdir()
    (worktree / ".git").write_text(f"gitdir: {of_worktree}\n")
    assert commit_of(worktree) == commit[::-1]
    assert commit_of(tmp_path) is None


def test_the_commit_is_that_of_git_itself():
    root = Path(__file__).resolve().parent.parent.parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    assert commit_of(root) == head
