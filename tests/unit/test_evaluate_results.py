"""Numbers, their intervals and their tables, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from distilled_t5.evaluate.intervals import Measured, exact, jackknife, mean_of, mean_of_differences
from distilled_t5.evaluate.provenance import commit_of
from distilled_t5.evaluate.results import Report, losses, markdown, measured_scores, picture_losses, probe_table, score_cell, to_json

# Two tasks, a teacher and a student; `lpips` is a distance from the teacher, which has none.
SCORES = {
    "things": {"readback": {"t": [1.0, 1.0, 0.0, 1.0], "s": [0.0, 1.0, 0.0, 1.0]}},
    "text": {
        "ocr_character": {"t": [1.0, 0.5], "s": [0.25, 0.75]},
        "ocr_word": {"t": [1.0, 0.0], "s": [0.0, 0.0]},
        "lpips": {"s": [0.3, 0.1]},
    },
}


def test_a_share_has_wilsons_interval():
    measured = mean_of([1.0, 1.0, 0.0, 1.0])
    # z2 = 3.8415: middle (0.75 + 0.4802) / 1.9604, reach 1.96 / 1.9604 * sqrt(0.1875 / 4 + 3.8415 / 64)
    assert (measured.value, measured.n) == (0.75, 4)
    assert measured.low == pytest.approx(0.3006, abs=1e-3)
    assert measured.high == pytest.approx(0.9544, abs=1e-3)


def test_a_mean_has_an_interval_that_holds_it_and_a_single_value_has_none():
    values = [0.2, 0.4, 0.3, 0.6, 0.1, 0.5, 0.35, 0.45]
    measured = mean_of(values)
    assert measured.value == pytest.approx(0.3625) and measured.n == 8
    assert measured.low is not None and measured.high is not None
    # The deviation is 0.16202, over the root of 8; Student's t of 7 degrees of freedom is 2.365.
    assert measured.low == pytest.approx(0.3625 - 2.365 * 0.16202 / 8**0.5, abs=1e-4)
    assert measured.high == pytest.approx(0.3625 + 2.365 * 0.16202 / 8**0.5, abs=1e-4)
    many = mean_of([0.2, 0.4] * 50)
    assert many.low == pytest.approx(0.3 - 1.96 * 0.01, abs=0.004), "the bootstrap's"
    assert mean_of(values) == measured, "the same values give the same interval"
    assert mean_of([0.5]) == Measured(0.5, 1)
    assert exact(7) == Measured(7, 1, 7, 7)
    with pytest.raises(ValueError, match="What to do: "):
        mean_of([])


def test_differences_are_no_shares():
    none = mean_of_differences([0.0] * 200)
    # Wilson's bound of 0 of 200: 3.8415 / 203.8415.
    assert (none.value, none.low, none.high) == (0, pytest.approx(-0.01885, abs=1e-4), pytest.approx(0.01885, abs=1e-4))
    few = mean_of_differences([1.0] * 3 + [0.0] * 197)
    assert few.value == pytest.approx(0.015) and few.low == pytest.approx(0.0, abs=0.006)
    mixed = mean_of_differences([1.0] * 3 + [-1.0] + [0.0] * 196)
    assert mixed.low is not None and mixed.high is not None and mixed.low < 0 < mixed.high
    assert mean_of_differences([0.5, 0.7]).low == pytest.approx(0.6 - 12.706 * 0.1, abs=1e-3)


def test_the_jackknife_does_not_take_the_tasks_turn_for_chance():
    """8 tasks in turn, each of its own level: the mean's error is that of noise within tasks and between samples, not of 2 tasks a part."""
    random = np.random.default_rng(1)
    samples = np.tile(np.arange(8.0) * 10, 100)[:, None] + random.normal(size=(800, 1))
    measured = jackknife(samples, lambda part: float(part.mean()))
    assert measured.high is not None
    assert measured.high - measured.value == pytest.approx(1.96 * float(samples.std()) / 800**0.5, rel=0.5)


def test_the_jackknife_of_a_mean_is_the_means_own_standard_error():
    samples = np.array([[1.0], [2.0], [4.0], [7.0]])
    measured = jackknife(samples, lambda part: float(part.mean()), parts=4)
    # The deviation of 1, 2, 4, 7 is 2.6458, over the root of 4 samples.
    assert (measured.value, measured.n) == (3.5, 4)
    assert measured.high is not None and measured.high - 3.5 == pytest.approx(1.96 * 2.6458 / 2, abs=1e-3)
    assert jackknife(samples[:2], lambda part: float(part.mean())) == Measured(1.5, 2)


def test_measured_numbers_come_back_from_json():
    measured = mean_of([0.1, 0.2])
    assert Measured.from_json(measured.to_json()) == measured
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
    # characters 0.75, words 1, distance 0.3; and -0.25, 0, 0.1
    assert found["text"]["s"] == pytest.approx([(0.75 + 1.0 + 0.3) / 3, (-0.25 + 0.0 + 0.1) / 3])
    assert picture_losses(SCORES, "t", []) == {}


def test_a_clip_score_weighs_as_much_as_a_distance_from_0_to_1():
    scores = {"coco": {"clip_score": {"t": [30.0, 30.0], "s": [29.0, 27.0]}, "lpips": {"s": [0.9, 0.1]}}}
    assert picture_losses(scores, "t", ["s"])["coco"]["s"] == pytest.approx([(0.01 + 0.9) / 2, (0.03 + 0.1) / 2])


def test_fewer_is_better_where_a_number_is_a_distance():
    scores = {"coco": {"lpips": {"t": [0.1], "s": [0.4]}}}
    assert losses(scores, "t")["coco"]["lpips"]["s"].value == pytest.approx(0.3)


def report() -> Report:
    probes = {
        "latent_distance": {f"after step {step}": {"s": Measured(step / 10, 5, step / 20, step / 5)} for step in range(1, 21)},
        "cost": {"resident bytes": {"t": exact(9_524_621_312), "s": exact(259_000_000)}},
    }
    return Report("tiny", ["t", "s"], measured_scores(SCORES), losses(SCORES, "t"), probes)


def test_the_first_table_is_plain_and_the_others_say_interval_and_count():
    text = markdown(report())
    lines = text.splitlines()
    assert lines[0] == "# tiny"
    assert lines[2] == "| Encoder | things: right | text: characters | text: words | text: LPIPS |"
    assert lines[4:6] == ["| t | 75.0 | 75.0 | 50.0 |  |", "| s | 50.0 | 50.0 | 0.0 | 0.200 |"]
    assert "| t | 75.0 (30.1 to 95.4, n = 4) |" in text
    assert "| s | 259,000,000 |" in text
    assert "Distance of the latents" in text


def test_of_many_steps_six_are_shown_the_first_and_the_last_among_them():
    table = probe_table(report(), "latent_distance")
    assert table.heads == [f"after step {step}" for step in (1, 5, 9, 12, 16, 20)]
    assert [name for name, _ in table.rows] == ["s"]
    assert table.rows[0][1][-1].value == "2" and table.rows[0][1][-1].spread == "1 to 4, n = 5"


def test_a_number_that_nobody_listed_is_an_accuracy_in_percent():
    assert score_cell("CompBench color (BLIP-VQA, phrases by rule)", Measured(0.7911, 300, 0.75, 0.83)).value == "79.1"
    assert score_cell("FID", Measured(22.361, 5000, 22.0, 22.7)).value == "22.36"
    assert score_cell("clip_score", None).value == ""


def test_a_cell_cannot_break_the_table():
    odd = Report("tiny", ["a|b"], {"t": {"readback": {"a|b": Measured(1.0, 1)}}}, {}, {})
    assert "| a\\|b | 100.0 |" in markdown(odd)


def test_the_commit_is_read_off_gits_files_and_none_where_there_are_none(tmp_path):
    digest = "0123456789abcdef0123456789abcdef01234567"
    git = tmp_path / "repository" / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(git.parent) is None, "a branch without a commit"
    (git / "packed-refs").write_text(f"# pack-refs with: peeled\n{digest[::-1]} refs/heads/mainly\n{digest} refs/heads/main\n")
    assert commit_of(git.parent) == digest
    (git / "refs" / "heads" / "main").write_text(f"{digest[::-1]}\n")
    assert commit_of(git.parent) == digest[::-1]
    (git / "HEAD").write_text(f"{digest}\n")
    assert commit_of(git.parent) == digest, "a detached head"
    worktree = tmp_path / "worktree"
    of_worktree = git / "worktrees" / "worktree"
    of_worktree.mkdir(parents=True)
    worktree.mkdir()
    (worktree / ".git").write_text(f"gitdir: {of_worktree}\n")
    (of_worktree / "HEAD").write_text("ref: refs/heads/main\n")
    (of_worktree / "commondir").write_text("../..\n")
    assert commit_of(worktree) == digest[::-1]
    assert commit_of(tmp_path) is None
