"""RUN/README.md: the model card of a run's student, as Hugging Face shows it. Needs neither torch nor ComfyUI."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..runtime.disk import read_file, replace_file
from ..runtime.errors import UserError
from ..runtime.optional import needed
from .checkpoint_files import step_of
from .curves import Curves, with_sign
from .export import chosen_checkpoint
from .licences import UNKNOWN, licence_of, origins
from .objectives import OBJECTIVES
from .page import samples_of
from .recipe import Recipe, load_recipe
from .run_directory import RunDirectory

CARD = "README.md"
PACK = "https://github.com/distilled-t5/distilled-t5"
PAPER = "https://arxiv.org/abs/2503.19897"
TAGS = ["text-encoder", "distillation", "comfyui", "diffusion-single-file"]
# The last line of a card: what it describes, and its own SHA-256 without this line.
MARK = "\n<!-- distilled_t5: step={step} recipe={recipe} text={text} -->\n"
MARKED = re.compile(r"\n<!-- distilled_t5: step=(\d+) recipe=(\w+) text=(\w+) -->\s*")
# Corpora that are data sets of Hugging Face, by the stem of their file.
DATASETS = {"laion-aesthetics-6.5": "ChristophSchuhmann/improved_aesthetics_6.5plus"}


def write_card(run: RunDirectory, evaluation: Path | None = None) -> Path:
    """Write the card of a run; returns its file.

    `evaluation` is the folder of an evaluation of this student. Raises UserError if it is not one, if there is no checkpoint yet, and for
    a card that was changed by hand.
    """
    path = run.path / CARD
    if path.exists() and not _is_unchanged(read_file(path).decode(errors="replace")):
        raise UserError(
            f"{path} was written or changed by hand and stays as it is.", "rename it, write the card again, then copy your changes."
        )
    recipe = load_recipe(str(run.recipe))
    step = step_of(chosen_checkpoint(run, None))
    numbers = "" if evaluation is None else _numbers_of(evaluation, recipe.output.name)
    text = card(run, recipe, step, numbers)
    mark = MARK.format(step=step, recipe=recipe.sha256, text=sha256(text.encode()).hexdigest())
    replace_file(path, (text + mark).encode())
    return path


def check_card(path: Path, recipe: Recipe, step: int) -> None:
    """Raise UserError if a card that was written by `write_card` is of another step or recipe. One of the user's own is not judged."""
    mark = MARKED.search(read_file(path).decode(errors="replace"))
    if mark and (int(mark[1]), mark[2]) != (step, recipe.sha256):
        which = f"step {int(mark[1]):,}" if int(mark[1]) != step else "another recipe"
        raise UserError(
            f"{path.name} is out of date: expected the card of step {step:,} and the present recipe, got that of {which}.",
            "run `train card` (with --evaluation for its numbers), then upload again.",
        )


def _is_unchanged(text: str) -> bool:
    mark = MARKED.search(text)
    return mark is not None and not text[mark.end() :] and sha256(text[: mark.start()].encode()).hexdigest() == mark[3]


def card(run: RunDirectory, recipe: Recipe, step: int, evaluation: str = "") -> str:
    """The card's text: front matter, then Markdown. `evaluation`: the tables of an evaluation."""
    family = recipe.family.display_name
    parts = [
        f"---\n{_front_matter(recipe)}\n---",
        f"# {recipe.output.name}",
        f"A distilled text encoder for {family}: it takes the place of {Path(recipe.teacher.t5).name}, and was trained by "
        f"{_how(recipe)} ({PAPER}).",
        "## Use",
        f"Put `{recipe.output.name}.safetensors` into ComfyUI's `models/text_encoders` and load it with *Distilled Text Encoder Loader* of "
        f"[Distilled T5]({PACK}){_pooled(recipe)}.",
        "## Training",
        _table(_facts(recipe, step)),
        "### Held-out loss",
        _held_out(run, recipe.needs_diffusion_model),
        *_image(run),
        "## Evaluation",
        evaluation or "Not evaluated yet.",
        "## Licence",
        _licence(recipe),
        "## Recipe",
        f"`recipe.toml`, SHA-256 of the run's own, in which paths may be complete, `{recipe.sha256}`:",
        _code(recipe.without_folders().to_toml().rstrip()),
    ]
    return "\n\n".join(parts) + "\n"


def _how(recipe: Recipe) -> str:
    objectives = [OBJECTIVES[stage.objective] for stage in recipe.stages]
    if any(objective.needs_velocity for objective in objectives):
        return "following the diffusion model's denoising steps"
    inside = any(objective.at != "embedding" for objective in objectives)
    return "imitating what the diffusion model makes of the teacher's embeddings" if inside else "imitating the teacher's embeddings"


def _front_matter(recipe: Recipe) -> str:
    models, data = origins(recipe), _stems(recipe)
    licence = licence_of(models)
    known = licence.name == "apache-2.0"
    return (
        needed("huggingface_hub", "huggingface_hub", "A model card")
        .ModelCardData(
            license=licence.name if known else "other",
            license_name=None if known else licence.name,
            license_link=licence.link or None,
            base_model=[model.repo for model in models if model.repo] or None,
            datasets=[DATASETS[stem] for stem in data if stem in DATASETS] or None,
            language="en",
            pipeline_tag="text-to-image",
            tags=[*TAGS, recipe.student_kind.name, recipe.family.name],
        )
        .to_yaml()
    )


def _stems(recipe: Recipe) -> list[str]:
    return list(dict.fromkeys(Path(corpus.path).stem for stage in recipe.stages for corpus in stage.corpora if corpus.path))


def _pooled(recipe: Recipe) -> str:
    return "".join(f", beside `{Path(file).name}`" for file in recipe.teacher.companions.values())


def _facts(recipe: Recipe, step: int) -> Iterator[tuple[str, str]]:
    total = sum(stage.steps for stage in recipe.stages)
    layout = recipe.student_layout(recipe.family.text_width)
    yield "Student", f"{layout.size_name}, from {Path(recipe.student.start).name}"
    yield "Teacher", Path(recipe.teacher.t5).name
    yield "Diffusion model", Path(recipe.diffusion_model.file).name
    yield "Steps", f"{step:,} of {total:,}"
    yield "Prompt lengths", ", ".join(map(str, recipe.sampling.token_lengths)) + " tokens"
    for number, stage in enumerate(recipe.stages, start=1):
        data = ", ".join(Path(corpus.path).name if corpus.path else corpus.kind for corpus in stage.corpora)
        yield (
            f"Stage {number}",
            f"{stage.name}: {stage.steps:,} steps of {stage.batch * stage.accumulate} prompts, {stage.what}; {data}",
        )


def _table(rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _held_out(run: RunDirectory, needs_model: bool) -> str:
    curves = Curves.of(run.metrics)
    if curves.best is None:
        return "Not measured."
    bands = "; ".join(
        f"{with_sign('sigma', band)}: {curve.points()[-1][1]:.4g}" for band, curve in curves.held_out.items() if curve.points()
    )
    step, best = curves.best
    what = "mean squared gap of the velocities" if needs_model else "last stage's objective"
    return f"The {what} on prompts never trained on. Lowest: {best:.4g} at step {step:,}. At the end: {bands}."


def _code(text: str) -> str:
    """A block of TOML, fenced by more backticks than the text has in a row."""
    fence = "`" * max([3, *(len(row) + 1 for row in re.findall("`+", text))])
    return f"{fence}toml\n{text}\n{fence}"


def _image(run: RunDirectory) -> list[str]:
    newest = samples_of(run.samples)[-1:]
    return [f"![Teacher, student and their difference at step {one['step']}](samples/{one['file']})" for one in newest]


def _licence(recipe: Recipe) -> str:
    models = origins(recipe)
    lines = [f"- {model.file}, {model.part}: {model.reason}." for model in models]
    licence = licence_of(models)
    result = "unknown: check the models marked so before you publish this file" if licence is UNKNOWN else licence.name
    how = "The strictest licence of the models that this student learned from, which are known by the names of their files"
    return "\n".join([f"**{result}**. {how}:" if lines else f"**{result}**. Made from random weights alone.", "", *lines]).rstrip()


def _numbers_of(folder: Path, name: str) -> str:
    """The tables of an evaluation without their title. Raises UserError if it does not show the student of this name."""
    try:
        results: Any = json.loads(read_file(folder / "results.json"))
        text = read_file(folder / "table.md").decode()
        files = [encoder["file"] for encoder in results["encoders"].values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{folder} does not hold an evaluation: {error}.", "give the folder that `evaluate` wrote (results.json, table.md)."
        ) from error
    # As the run, ComfyUI's folders and `train export` name it.
    if not any(re.fullmatch(rf"{re.escape(name)}(_\d{{5,}}|-step-\d{{6,}})*\.safetensors", file) for file in files):
        raise UserError(f"The evaluation in {folder} shows {', '.join(files)}, not {name}.", "give an evaluation of this student.")
    title, _, tables = text.partition("\n")
    return f"Suite {title.removeprefix('# ')}.\n{tables.rstrip()}".replace("\n## ", "\n### ")
