"""One page that shows the images side by side. Everything is inside it; it makes no network request."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.pages import filled, page_template
from .measured import Measured
from .metrics import number_of
from .questions import Question
from .results import INTERVALS, Report, Scores, Table, answer, index, left_out, ranged, spaced, tables, written_share

TEMPLATE = Path(__file__).resolve().parent / "page.html"
JPEG_QUALITY = 85
# Images of at most this side are shown enlarged, without smoothing.
SMALL_PX = 128
# By task and student, what each image loses against the teacher's.
Lost = Mapping[str, Mapping[str, Sequence[float]]]
# An encoder's name and a question to the image's file.
FileOf = Callable[[str, Question], Path]


def page(report: Report, rows: Sequence[dict[str, Any]], maps: Mapping[str, str], notes: Mapping[str, Any]) -> str:
    """The page's HTML. `maps`: data URIs by name. `notes`: provenance, the origin of the numbers; chosen, which images are shown; small,
    whether without smoothing."""
    data = {
        "title": f"Distilled T5: {report.suite}",
        "encoders": report.encoders,
        **notes,
        "answers": [{"sentence": answer(report, student), "shares": _shares(shares)} for student, shares in report.shares.items()],
        "left_out": left_out(report),
        "tables": [_table(one) for one in tables(report)],
        "intervals": INTERVALS,
        "index": index(report),
        "maps": [{"name": name, "image": image} for name, image in maps.items()],
        "rows": list(rows),
    }
    return filled(page_template(TEMPLATE), data)


def _shares(shares: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """The lines of a student's chart: a task's share of the teacher in percent, and as it is written."""
    return [
        {
            "task": spaced(task),
            "value": 100 * share.value,
            "low": None if share.low is None else 100 * share.low,
            "high": None if share.high is None else 100 * share.high,
            "text": written_share(share),
        }
        for task, share in shares.items()
    ]


def _table(one: Table) -> dict[str, Any]:
    rows = [[name, *([cell.value, cell.spread] for cell in cells)] for name, cells in one.rows]
    return {"caption": one.caption, "heads": ["Encoder", *one.heads], "rows": rows}


def chosen_questions(questions: Mapping[str, list[Question]], lost: Lost, count: int) -> list[Question]:
    """At most `count` questions of each task: half of them those on which a student loses most, the others the first ones."""
    chosen: list[Question] = []
    for task, asked in questions.items():
        of_students = list(lost.get(task, {}).values())
        worst = [max(losses) for losses in zip(*of_students, strict=True)] or [0.0] * len(asked)
        by_loss = sorted(range(len(asked)), key=lambda index: -worst[index])[: count // 2]
        others = [index for index in range(len(asked)) if index not in by_loss][: count - len(by_loss)]
        chosen += [asked[index] for index in sorted([*by_loss, *others])]
    return chosen


def row(question: Question, scores: Scores, lost: Lost, encoders: Sequence[str], file_of: FileOf, side_px: int) -> dict[str, Any]:
    """One prompt with each encoder's image, its scores in words, what it loses against the teacher, and its points if the task has any."""
    losses, points = lost.get(question.task, {}), ranged(scores.get(question.task, {}))
    return {
        "task": question.task,
        "index": question.index,
        "prompt": question.prompt,
        "target": question.target,
        "seed": question.seed,
        "encoders": {
            encoder: {
                "image": _image(file_of(encoder, question), side_px),
                "scores": _scores_of(scores.get(question.task, {}), encoder, question.index),
                "loss": (loss := losses[encoder][question.index] if encoder in losses else 0.0),
                "points": round(-100 * loss) if points else 0,
            }
            for encoder in encoders
        },
    }


def _scores_of(numbers: Mapping[str, Mapping[str, Sequence[float]]], encoder: str, index: int) -> str:
    """An encoder's scores of one image in words."""
    return ", ".join(
        f"{number.label} {number.written(by_encoder[encoder][index])} {number.unit}".rstrip()
        for number, by_encoder in ((number_of(name), by_encoder) for name, by_encoder in numbers.items())
        if encoder in by_encoder
    )


def _image(path: Path, side_px: int) -> str:
    """An image as a data URI: PNG, or scaled down to `side_px` as JPEG if it is larger."""
    from PIL import Image

    content = io.BytesIO()
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if max(image.size) <= side_px:
        image.save(content, "PNG", optimize=True)
        return data_uri(content.getvalue(), "png")
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    image.save(content, "JPEG", quality=JPEG_QUALITY)
    return data_uri(content.getvalue(), "jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """The file of an image as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
