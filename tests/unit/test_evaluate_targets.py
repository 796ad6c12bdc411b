"""Prompts with target texts from a user's own file: the metric ocr scores them; bad ones are refused before an image is generated."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from distilled_t5.evaluate.metrics import METRICS
from distilled_t5.evaluate.questions import Prompts, Question, read_questions
from distilled_t5.prompts.corpora import PromptError

# As in the authors' CommonText_Test.json.
ROWS = [{"prompt": "A baker holds a sign, 'Fresh Bread'", "text": "Fresh Bread"}, {"prompt": "A wall that says no", "text": "no"}]


def asked(path: Path, kind: str, column: str = "prompt", target: str = "text") -> list[Question]:
    prompts = Prompts(kind=kind, path=str(path), column=column, target=target, limit=10)  # pyright: ignore[reportArgumentType]
    assert METRICS["ocr"].fits(prompts)
    return read_questions({"words": prompts}, 3)["words"]


def written(folder: Path, kind: str) -> Path:
    path = folder / f"prompts.{'jsonl' if kind == 'json lines' else kind.split()[0]}"
    rows = [[row["prompt"], row["text"]] for row in ROWS]
    if kind == "parquet":
        pyarrow.parquet.write_table(
            pyarrow.table({"id": [1, 2], "prompt": [row[0] for row in rows], "text": [row[1] for row in rows]}), path
        )
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "json lines":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    else:
        mark = ";" if kind == "csv with semicolons" else ","
        path.write_text("\n".join(mark.join(f'"{cell}"' for cell in cells) for cells in [["prompt", "text"], *rows]))
    return path


@pytest.mark.parametrize("kind", ["json", "json lines", "csv", "csv with semicolons", "parquet"])
def test_prompts_and_texts_come_from_two_columns_of_any_file_with_columns(tmp_path, kind):
    found = asked(written(tmp_path, kind), kind.split()[0])
    assert [(one.prompt, one.target, one.seed) for one in found] == [(row["prompt"], row["text"], 3 + k) for k, row in enumerate(ROWS)]


def test_without_a_target_the_file_has_prompts_alone_and_the_metric_ocr_does_not_apply(tmp_path):
    prompts = Prompts(kind="json", path=str(written(tmp_path, "json")), column="prompt", limit=1)
    assert not METRICS["ocr"].fits(prompts)
    [question] = read_questions({"words": prompts}, 0)["words"]
    assert question.target is None


@pytest.mark.parametrize("text", ["", "  ", "?!", None])
def test_a_target_without_a_letter_or_digit_is_refused_before_an_image_is_generated(tmp_path, text):
    (tmp_path / "a.json").write_text(json.dumps([*ROWS, {"prompt": "a sign", "text": text}]))
    with pytest.raises(PromptError, match=r'1 of 3 prompts have no letter or digit in "text"(.|\n)*The first: a sign\nWhat to do: '):
        asked(tmp_path / "a.json", "json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a sign", "texts": "no"}, r'item 1: there is no column "text"\.\nIts columns: prompt, texts\n.*write target = "texts"'),
        ({"prompt": "a sign", "text": 7}, r"item 1: expected text, got int 7"),
        ({"prompt": "a sign", "text": "\ud800"}, r"item 1: not valid UTF-8 text"),
    ],
)
def test_a_target_that_is_missing_or_not_text_is_refused_by_its_place(tmp_path, row, message):
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(PromptError, match=message):
        asked(tmp_path / "a.json", "json")
