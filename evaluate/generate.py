"""Painting what is missing: encoder by encoder, in batches that every run makes alike."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.ranks import Ranks
from .encoders import EncoderFile, LoadedEncoder, Text, of_one_length, together
from .painter import Painter
from .questions import Question
from .store import PictureFolder, batches, share_of_rank

if TYPE_CHECKING:
    from tqdm import tqdm

# Prompts that an encoder encodes in a row before the diffusion model paints them; held in RAM, 4.2 MB each at 256 tokens of Flux.
CHUNK_PROMPTS = 128
# As ComfyUI's Save Image writes them.
PNG_LEVEL = 4


@dataclass(frozen=True)
class Batch:
    """A batch that is still to be painted, and where its pictures go."""

    folder: PictureFolder
    questions: list[Question]


def questions_sha256(questions: Sequence[Question]) -> str:
    """What tells the prompts and seeds of a task apart from others."""
    asked = [[question.prompt, question.seed] for question in questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def left_to_paint(folders: Mapping[str, PictureFolder], questions: Mapping[str, list[Question]], size: int, ranks: Ranks) -> list[Batch]:
    """This process's share of the batches that are not there, of all tasks. Rank 0 looks, so that all see the same."""
    found = {task: batches(len(asked), folders[task].there(), size) for task, asked in questions.items()} if ranks.is_main else {}
    found = ranks.share(found)
    left = [(task, batch) for task, indices in found.items() for batch in indices]
    mine = share_of_rank(left, ranks.rank, ranks.world)
    return [Batch(folders[task], [questions[task][index] for index in batch]) for task, batch in mine]


def paint_all(painter: Painter, load: Callable[[], LoadedEncoder], left: Sequence[Batch], bar: tqdm, stop: Callable[[], bool]) -> bool:
    """Paint the batches; whether all are painted, or `stop` asked to leave. The encoder is loaded if there is anything to paint."""
    if not left or stop():
        return not left
    encoder = load()
    for chunk in _chunks(left):
        texts = [[encoder.text(question.prompt) for question in batch.questions] for batch in chunk]
        for batch, texts_of_batch in zip(chunk, texts, strict=True):
            if stop():
                return False
            batch.folder.add(_painted(painter, batch.questions, texts_of_batch))
            bar.update(len(batch.questions))
    return True


def _chunks(left: Sequence[Batch]) -> Iterator[list[Batch]]:
    chunk: list[Batch] = []
    for batch in left:
        if chunk and sum(len(one.questions) for one in (*chunk, batch)) > CHUNK_PROMPTS:
            yield chunk
            chunk = []
        chunk.append(batch)
    yield chunk


def _painted(painter: Painter, questions: Sequence[Question], texts: Sequence[Text]) -> dict[int, bytes]:
    """The PNG files of a batch by index."""
    painted: dict[int, bytes] = {}
    for places in of_one_length(texts):
        group = [questions[place] for place in places]
        pictures = painter.paint_batch(*together([texts[place] for place in places]), [question.seed for question in group])
        painted |= {question.index: png(picture, question) for question, picture in zip(group, pictures, strict=True)}
    return painted


def png(picture: np.ndarray, question: Question) -> bytes:
    """A picture [H, W, 3] from 0 to 1 as ComfyUI's Save Image writes it; prompt and seed stand in its text."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("prompt", question.prompt)
    told.add_text("seed", str(question.seed))
    content = io.BytesIO()
    values = np.clip(255.0 * picture, 0, 255).astype(np.uint8)
    Image.fromarray(values).save(content, "PNG", pnginfo=told, compress_level=PNG_LEVEL)
    return content.getvalue()


def made_of(encoder: EncoderFile, painter_is: Mapping[str, str], questions: Sequence[Question]) -> dict[str, str]:
    """All that decides an encoder's pictures for a task."""
    return {**encoder.made_of(), **painter_is, "prompts and seeds": questions_sha256(questions)}
