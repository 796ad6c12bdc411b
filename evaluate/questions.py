"""What is asked of an encoder: the prompts of a suite's tasks with their seeds, and what their pictures are to show."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..prompts.common_text import common_text
from ..prompts.corpora import PromptError, compbench_files, located, read_file
from .compbench import RELATIONS_2D, RELATIONS_3D, numeracy_score, relation_in

if TYPE_CHECKING:
    from ..world.pictures import Scene
    from .suite import Prompts, Suite, Task

RELATIONS = {"spatial": RELATIONS_2D, "3d_spatial": RELATIONS_3D}


@dataclass(frozen=True)
class Question:
    """One picture to paint.

    index: its place in its task. target: the text that it is to show. photograph: the picture that the prompt was written to. scene: what
    the miniature's reader is to find.
    """

    task: str
    index: int
    prompt: str
    seed: int
    target: str | None = None
    photograph: Path | None = None
    scene: Scene | None = None


def read_questions(suite: Suite) -> dict[str, list[Question]]:
    """The questions of every task, by its name. Raises PromptError for prompts that are not there or cannot be read."""
    return {task.name: [*_of_task(task, suite.seed)] for task in suite.tasks}


def in_turn(questions: dict[str, list[Question]], count: int) -> list[Question]:
    """`count` questions (fewer if there are not so many), one of each task in turn."""
    rounds = itertools.zip_longest(*questions.values())
    return [*itertools.islice((one for group in rounds for one in group if one is not None), count)]


def _of_task(task: Task, seed: int) -> Iterator[Question]:
    for index, asked in enumerate(_prompts(task.prompts)):
        yield Question(task.name, index, seed=seed + index, **asked)


def _prompts(source: Prompts) -> Sequence[dict[str, Any]]:
    """The first `limit` prompts of a source, each with what else is known of it."""
    if source.kind == "common_text":
        # No training prompt is in this split, whatever seed either was drawn with.
        return [{"prompt": one.text, "target": one.target} for one in common_text("validation", source.limit, 0)]
    if source.kind == "compbench":
        return [{"prompt": prompt} for prompt in _compbench(source)]
    if source.kind == "coco":
        return _coco(source)
    if source.kind == "miniature":
        return _miniature(source)
    return [{"prompt": one.text} for one in read_file(source.path, source.kind, limit=source.limit)]


def _compbench(source: Prompts) -> list[str]:
    """The prompts of a category, once it is seen that its metric understands each of them. Raises ValueError before anything is painted."""
    file = compbench_files(source.path, "validation")[source.category]
    prompts = [one.text for one in read_file(str(file), "lines", limit=source.limit)]
    for prompt in prompts:
        if source.category in RELATIONS:
            relation_in(prompt, RELATIONS[source.category])
        elif source.category == "numeracy":
            numeracy_score(prompt, [])
    return prompts


def _miniature(source: Prompts) -> list[dict[str, Any]]:
    from ..world.questions import questions

    asked = questions(source.category, source.limit)
    return [{"prompt": caption, "scene": scene, "target": " ".join(scene.words).upper() or None} for scene, caption in asked]


def _coco(source: Prompts) -> list[dict[str, Any]]:
    """The first caption of each photograph, photographs in the order of their numbers."""
    path = located(source.path, "json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        captions: dict[int, str] = {}
        for annotation in sorted(content["annotations"], key=lambda one: one["id"]):
            captions.setdefault(int(annotation["image_id"]), str(annotation["caption"]).strip())
    except (ValueError, LookupError, TypeError) as error:
        remedy = "name an annotation file such as captions_val2014.json."
        raise PromptError(f"{path} holds no COCO captions.", remedy, f"Looked for images and annotations: {error!r}") from error
    chosen = [number for number in sorted(captions) if number in names and captions[number]][: source.limit]
    if not chosen:
        raise PromptError(f"{path} holds no caption of a photograph.", "name an annotation file such as captions_val2014.json.")
    folder = located(source.pictures, "photographs") if source.pictures else None
    asked = [{"prompt": captions[number], "photograph": folder / names[number] if folder else None} for number in chosen]
    missing = [str(one["photograph"]) for one in asked if one["photograph"] and not one["photograph"].is_file()]
    if missing:
        remedy = "name the folder of the photographs that the captions are of, in pictures."
        raise PromptError(f"{len(missing)} of {len(asked)} photographs are not in {folder}.", remedy, f"The first: {missing[0]}")
    return asked
