"""The prompts of a suite's tasks with their seeds, and what their images must show."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..config.parts import Count, OptionalPath, Part
from ..prompts.common_text import common_text
from ..prompts.corpora import COMPBENCH_CATEGORIES, MIX_DESCRIPTION, MixName, PromptError, compbench_files, located, read_file
from ..runtime.errors import printable
from ..world.pictures import Scene
from ..world.questions import questions as miniature_questions
from ..world.scenes import NEW_IN_TASK
from .compbench import RELATIONS_2D, RELATIONS_3D, numeracy_score, relation_in
from .ocr import normalised

RELATIONS = {"spatial": RELATIONS_2D, "3d_spatial": RELATIONS_3D}
# Kinds of prompts that come from a file or folder; the others are made here.
WITH_COLUMNS = ("json", "csv", "parquet")
FROM_FILES = ("lines", "compbench", "coco", *WITH_COLUMNS)
CATEGORIES: dict[str, tuple[str, ...]] = {"compbench": COMPBENCH_CATEGORIES, "miniature": tuple(NEW_IN_TASK)}


class Prompts(Part):
    """Where a task's prompts come from."""

    kind: Literal["common_text", "lines", "json", "csv", "parquet", "compbench", "coco", "miniature"] = Field(
        description="common_text: generated, held out of training; compbench: the validation files of a T2I-CompBench folder; coco: "
        "an annotation file of COCO captions; miniature: held-out scenes of the miniature; lines: a text file, a prompt per line; json: a "
        "list, or an object per line; csv; parquet"
    )
    path: OptionalPath = Field(default="", description="file, or folder of compbench; relative to the working folder or to the pack's")
    column: str = Field(default="", description="column of csv and parquet, or key of json's objects, that holds the prompt")
    target: str = Field(default="", description="the same for the text that the image must show, which the metric ocr compares with")
    category: str = Field(default="", description="category of compbench, or task of the miniature")
    photographs: OptionalPath = Field(default="", description="coco: folder of the photographs that FID compares with")
    limit: Count = Field(description="prompts used, from the first; fewer if there are not so many")
    mix: MixName | None = Field(default=None, description=MIX_DESCRIPTION)

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Prompts:
        if (self.kind in FROM_FILES) != bool(self.path):
            raise ValueError(
                f"prompts of kind {self.kind} {'need a path' if self.kind in FROM_FILES else 'are generated: expected no path'}"
            )
        if (self.column or self.target) and self.kind not in WITH_COLUMNS:
            raise ValueError(f"prompts of kind {self.kind} have no columns: expected no column and no target")
        if not self.column and (self.target or self.kind in ("csv", "parquet")):
            raise ValueError(f"prompts of kind {self.kind}{' with a target' * bool(self.target)} need the column that holds the prompt")
        if self.photographs and self.kind != "coco":
            raise ValueError(f"prompts of kind {self.kind}: expected no photographs, which coco has")
        if self.mix and self.kind != "common_text":
            raise ValueError(f"prompts of kind {self.kind}: expected no mix, which common_text has")
        known = CATEGORIES.get(self.kind, ())
        if self.category not in (known or ("",)):
            expected = f"expected a category, one of {', '.join(known)}" if known else "expected no category"
            raise ValueError(f"prompts of kind {self.kind}: {expected}, got {self.category or 'none'}")
        return self


@dataclass(frozen=True)
class Question:
    """One image to generate.

    index: its place in its task. target: the text that it must show. photograph: the one that the prompt describes. scene: what the
    miniature's reader must find.
    """

    task: str
    index: int
    prompt: str
    seed: int
    target: str | None = None
    photograph: Path | None = None
    scene: Scene | None = None


def read_questions(tasks: Mapping[str, Prompts], seed: int) -> dict[str, list[Question]]:
    """The questions of every task by its name, question k with seed + k. Raises PromptError for prompts that cannot be read."""
    return {
        task: [Question(task, index, seed=seed + index, **asked) for index, asked in enumerate(_read(prompts))]
        for task, prompts in tasks.items()
    }


def in_turn(questions: Mapping[str, list[Question]], count: int) -> list[Question]:
    """`count` questions (fewer if there are not so many), one of each task in turn."""
    rounds = itertools.zip_longest(*questions.values())
    return [*itertools.islice((one for group in rounds for one in group if one is not None), count)]


def questions_sha256(questions: Sequence[Question]) -> str:
    """A digest of prompts and seeds."""
    asked = [[question.prompt, question.seed] for question in questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _read(source: Prompts) -> Sequence[dict[str, Any]]:
    """The first `limit` prompts of a source, each with what else is known of it."""
    if source.kind == "common_text":
        # No training prompt is in this split, whatever seed either was drawn with.
        return [{"prompt": one.text, "target": one.target} for one in common_text("validation", source.limit, 0, source.mix or "varied")]
    if source.kind == "miniature":
        asked = miniature_questions(source.category, source.limit)
        return [{"prompt": caption, "scene": scene, "target": " ".join(scene.words).upper() or None} for scene, caption in asked]
    if source.kind == "coco":
        return _coco(source)
    if source.kind in WITH_COLUMNS:
        return _with_targets(source)
    file = compbench_files(source.path, "validation")[source.category] if source.kind == "compbench" else source.path
    prompts = [one.text for one in read_file(str(file), "lines", limit=source.limit)]
    for prompt in prompts:
        _check_understood(source.category, prompt)
    return [{"prompt": prompt} for prompt in prompts]


def _with_targets(source: Prompts) -> list[dict[str, Any]]:
    """The prompts of a file with columns, and the text that each image must show if the suite names its column."""
    found = read_file(source.path, source.kind, source.column, source.limit, source.target)
    without = [one for one in found if one.target is not None and not normalised(one.target)]
    if without:
        problem = f'{source.path}: {len(without)} of {len(found)} prompts have no letter or digit in "{source.target}".'
        remedy = "set target to the column with the text that each image must show, and correct or remove such prompts."
        raise PromptError(problem, remedy, f"The first: {printable(without[0].text, 60)}")
    return [{"prompt": one.text, "target": one.target} for one in found]


def _check_understood(category: str, prompt: str) -> None:
    """Raise ValueError, before any image is generated, for a prompt that CompBench's score of this category cannot read."""
    if category in RELATIONS:
        relation_in(prompt, RELATIONS[category])
    elif category == "numeracy":
        numeracy_score(prompt, [])


def _coco(source: Prompts) -> list[dict[str, Any]]:
    """The first caption of each photograph, photographs in the order of their numbers."""
    path = located(source.path, "json")
    remedy = "name an annotation file such as captions_val2014.json."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        captions: dict[int, str] = {}
        for annotation in sorted(content["annotations"], key=lambda one: one["id"]):
            captions.setdefault(int(annotation["image_id"]), str(annotation["caption"]).strip())
    except (ValueError, LookupError, TypeError) as error:
        raise PromptError(f"{path} is not a file of COCO captions.", remedy, f"Expected images and annotations: {error!r}") from error
    chosen = [number for number in sorted(captions) if number in names and captions[number]][: source.limit]
    if not chosen:
        raise PromptError(f"{path} has no caption of a photograph.", remedy)
    folder = located(source.photographs, "photographs") if source.photographs else None
    missing = [str(folder / names[number]) for number in chosen if folder and not (folder / names[number]).is_file()]
    if missing:
        advice = "set photographs to the folder of the photographs that the captions describe."
        raise PromptError(f"{len(missing)} of {len(chosen)} photographs are not in {folder}.", advice, f"The first: {missing[0]}")
    return [{"prompt": captions[number], "photograph": folder / names[number] if folder else None} for number in chosen]
