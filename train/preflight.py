"""What a run needs and does not find, in one list, before torch is imported or a model loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..encoder.needed_tensors import check_companion, check_teacher_tensors
from ..families import FAMILIES
from ..prompts.common_text import common_words
from ..prompts.corpora import Corpus, located
from ..prompts.mix import read_corpus
from ..runtime.comfyui import NO_FILE, model_file
from ..runtime.errors import StudentFileError, UserError
from ..runtime.header import read_entries, read_strings
from ..runtime.optional import pip_install
from ..students import KINDS, kind_of
from ..students.foreign import ADDED_TO_A_MODEL, foreign_kind
from ..students.foreign import KINDS as FOREIGN
from ..students.kind import StudentKind
from .recipe import RANDOM, STAND_IN, Recipe

# What the trainer imports, by the package that has it; ComfyUI needs all of them too.
PACKAGES = {
    "torch": "torch",
    "safetensors": "safetensors",
    "transformers": "transformers",
    "psutil": "psutil",
    "tqdm": "tqdm",
    "PIL": "pillow",
}
# Where the model files of the shipped recipes can be downloaded.
SOURCES = {name: source for known in (*KINDS.values(), *FAMILIES.values()) for name, source in known.sources.items()}
SAFETENSORS = (".safetensors", ".sft")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# Later lists of a family may have the names of a language model's layers.
DIFFUSION_SIGNS = ("transformer_blocks.0.", *(f"{next(iter(family.block_lists))}.0." for family in FAMILIES.values()))


@dataclass(frozen=True)
class Model:
    """A model of a recipe: its key and value, its folder of ComfyUI's models, what it must be, and parts of names that such a file has."""

    key: str
    name: str
    folder: str
    kind: str
    signs: tuple[str, ...]


def preflight(recipe: Recipe, written_later: Path | None = None, models: str = "") -> None:
    """Raise UserError that lists everything that the recipe needs and that is missing or of the wrong kind, and how to get it.

    `written_later`: prompts that need not exist yet. `models`: how the keys of the models begin that are needed.
    """
    of_models = [problem for each in zip(recipe.each, recipe.student_keys, strict=True) for problem in _models(*each, models)]
    problems = list(dict.fromkeys([*_packages(recipe), *_corpora(recipe, written_later), *of_models]))
    if problems:
        listed = "\n".join(f"{number}. {problem}" for number, problem in enumerate(problems, start=1))
        raise UserError(
            f"Recipe {recipe.name} cannot run yet; missing or wrong: {len(problems)}.", "do what each point says, then run again.", listed
        )


def models_of(recipe: Recipe) -> list[Model]:
    """The model files that a recipe with one student names."""
    teacher, text_encoders = recipe.teacher, "text_encoders"
    encoder, start = recipe.family.kind, recipe.student_kind
    models = [
        Model("diffusion_model.file", recipe.diffusion_model.file, "diffusion_models", "a diffusion model", DIFFUSION_SIGNS),
        Model("teacher.t5", teacher.t5, text_encoders, _encoder(encoder), encoder.signs),
        Model("teacher.clip_l", teacher.clip_l, text_encoders, "a CLIP text encoder", _signs("a CLIP text encoder")),
        Model("teacher.clip_g", teacher.clip_g, text_encoders, "a CLIP text encoder", _signs("a CLIP text encoder")),
        Model("student.start", recipe.student.start, text_encoders, _encoder(start), start.signs),
        Model("preview.vae", recipe.preview.vae, "vae", "a VAE", _signs("a VAE")),
    ]
    named = {"teacher.clip_l": NO_FILE, "teacher.clip_g": NO_FILE, "student.start": RANDOM, "preview.vae": ""}
    return [model for model in models if model.name != named.get(model.key, STAND_IN)]


def _signs(kind: str) -> tuple[str, ...]:
    return next(known.signs for known in FOREIGN if known.name == kind)


def _encoder(kind: StudentKind) -> str:
    return f"a {kind.display_name} text encoder"


def _packages(recipe: Recipe) -> Iterator[str]:
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        yield f"Packages of ComfyUI are missing: {', '.join(missing)}. Run with ComfyUI's Python, or {pip_install(' '.join(missing))}"
    if recipe.report.wandb and importlib.util.find_spec("wandb") is None:
        yield f"report.wandb = true needs the package wandb: {pip_install('wandb')}"
    kinds = {corpus.kind for stage in recipe.stages for corpus in stage.corpora}
    if "parquet" in kinds and importlib.util.find_spec("pyarrow") is None:
        yield f"Reading Parquet files needs the package pyarrow: {pip_install('pyarrow')}"
    if "common_text" in kinds:
        yield from _problem(common_words)


def _corpora(recipe: Recipe, written_later: Path | None) -> Iterator[str]:
    for stage in recipe.stages:
        for corpus in stage.corpora:
            if corpus.kind != "common_text" and corpus.path != str(written_later):
                yield from _problem(lambda corpus=corpus: _read(corpus))


def _read(corpus: Corpus) -> None:
    located(corpus.path, corpus.kind)
    if corpus.kind != "parquet" or importlib.util.find_spec("pyarrow") is not None:
        read_corpus(corpus)


def _problem(check: Callable[[], object]) -> Iterator[str]:
    """The message of a check that raises ValueError."""
    try:
        check()
    except ValueError as error:
        yield _indented(str(error))


def _models(recipe: Recipe, student: str, needed: str) -> Iterator[str]:
    for model in (model for model in models_of(recipe) if model.key.startswith(needed)):
        key = model.key.replace("student.", f"{student}.")
        try:
            path = model_file(model.name, model.folder)
        except ValueError as error:
            yield _indented(f"{key}: {error}{_source(model)}")
            continue
        try:
            _check_kind(path, model)
            _check_complete(path, model, recipe)
        except StudentFileError as error:
            yield _indented(f"{key}: {error}{_source(model)}")
        except ValueError as error:  # nothing is wrong with this file
            yield _indented(f"{key}: {error}")


def _source(model: Model) -> str:
    source = SOURCES.get(Path(model.name).name)
    return f"\nDownload: {source}" if source else ""


def _indented(message: str) -> str:
    return message.replace("\n", "\n   ")


def _check_kind(path: Path, model: Model) -> None:
    """Raise StudentFileError for a file that is cut off, or that is some other well-known kind of model, judged by its tensor names."""
    if model.key == "student.start" and path.is_dir():
        if not any((path / name).is_file() for name in WEIGHTS):
            raise StudentFileError(f"{path.name} holds neither {' nor '.join(WEIGHTS)}.", "download the folder again, with every file.")
        return
    if path.suffix.lower() not in SAFETENSORS:
        if model.folder == "vae":  # ComfyUI reads other formats of it
            return
        raise StudentFileError(
            f"{path.name} has the ending {path.suffix!r}; expected .safetensors.", f"name a file of models/{model.folder}."
        )
    names = read_entries(path)
    found = _kind(names)
    suits = any(sign in name for sign in model.signs for name in names)
    if found is not None and (found in ADDED_TO_A_MODEL or not suits):
        raise StudentFileError(f"{path.name} is {found}; expected {model.kind}.", f"name {model.kind} of models/{model.folder}.")


def _check_complete(path: Path, model: Model, recipe: Recipe) -> None:
    """Raise ValueError for a teacher or CLIP-L that lacks tensors, or a teacher that is not one or lacks its companion."""
    if not model.key.startswith("teacher."):
        return
    shapes = {name: entry.shape for name, entry in read_entries(path).items()}
    part = model.key.removeprefix("teacher.")
    if part in recipe.family.companions:
        check_companion(shapes, path.name, part)
    else:
        check_teacher_tensors(shapes, read_strings(path), path.name, recipe.teacher.companions, recipe.family)


def _kind(names: Iterable[str]) -> str | None:
    names = list(names)
    kind = kind_of(names)
    foreign = foreign_kind(names, kind)
    if foreign is not None:
        return foreign.name
    return _encoder(kind) if any(name.endswith(kind.signs) for name in names) else None
