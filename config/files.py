"""A recipe's file: found, read, changed by `--set`, and held against its models with every problem listed at once."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import isclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..runtime.errors import printable
from .toml import KeyPath, dotted, key_lines, read_toml, toml_value

Model = TypeVar("Model", bound=BaseModel)
# Where a key stands: the line to sort by, and the place in words.
Places = dict[KeyPath, tuple[int, str]]
# Where pydantic speaks of Python and not of TOML.
EXPECTED = {"model_type": "expected a table", "tuple_type": "expected a list"}
SHIPPED = Path(__file__).resolve().parent.parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be used: every problem with its place, and what to do."""

    def __init__(self, problem: str, remedy: str, details: Sequence[str] = ()) -> None:
        super().__init__("\n".join([problem, *(f"  {detail}" for detail in details), f"What to do: {remedy}"]))
        self.details = list(details)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: the key, and what is wrong with its value."""

    path: KeyPath
    text: str


def find_recipe(name_or_path: str, folder: Path = SHIPPED, noun: str = "recipe") -> Path:
    """The file of a recipe: a path, or the name of a shipped one (`smoke`, `smoke.toml`, `recipes/smoke.toml`) from any folder.

    `folder` and `noun` are for files that are written like recipes and called otherwise.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    shipped = sorted(file.stem for file in folder.glob("*.toml"))
    name = path.name.removesuffix(".toml")
    if name in shipped and str(path.parent) in (".", folder.name):
        return folder / f"{name}.toml"
    near = difflib.get_close_matches(name, shipped, n=1)
    found = "is a folder" if path.is_dir() else "is not there"
    raise RecipeError(
        f"{name_or_path} is neither a {noun} file (it {found}) nor the name of a shipped {noun}.",
        f"did you mean {near[0]}?" if near else "give the path of a .toml file, or one of these names.",
        [f"shipped: {', '.join(shipped)}"],
    )


def read_recipe(path: Path, overrides: Sequence[str], model: type[Model], noun: str = "recipe") -> Model:
    """The recipe in a file, with `part.key=value` settings applied. Raises RecipeError that lists every problem with its place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = read_toml(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}.", "save it as UTF-8.") from error
    except ValueError as error:
        raise RecipeError(f"{path} is no TOML: {error}", "mend that place; texts stand in double quotes.") from error
    places: Places = {key: (line, f"line {line}") for key, line in key_lines(text).items()}
    problems: list[Problem] = []
    for setting in overrides:
        key, wrong = set_value(data, setting, noun)
        place = (0, f"--set {printable(setting)}")
        places = {other: line for other, line in places.items() if other[: len(key)] != key} | {key: place}
        for length in range(1, len(key)):
            places.setdefault(key[:length], place)
        problems += [Problem(key, wrong)] if wrong else []
    try:
        recipe = model.model_validate(data)
    except ValidationError as error:
        problems += [_problem(details, model, noun) for details in error.errors(include_url=False)]
    else:
        if not problems:
            return recipe
    raise RecipeError(
        f"{path}: {len(problems)} {'problem' if len(problems) == 1 else 'problems'}.",
        f"mend the places named; the shipped {noun}s show every key with its meaning.",
        [text for _, text in sorted(_placed(problem, places) for problem in problems)],
    )


def _placed(problem: Problem, places: Places) -> tuple[int, str]:
    """The problem with the line of its key, or of the table that should hold the key; what has no place at all comes last."""
    for length in range(len(problem.path), 0, -1):
        if problem.path[:length] in places:
            line, place = places[problem.path[:length]]
            return line, f"{place}: {problem.text}"
    return sys.maxsize, problem.text


def options(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key that a recipe can have, by dotted name without list positions (`stage.corpora.path`); a table comes before its keys."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        found[key] = field
        part = _part(field.annotation)
        found |= options(part, f"{key}.") if part else {}
    return found


def _part(annotation: Any) -> type[BaseModel] | None:
    """The model within `Model`, `Model | None` or `tuple[Model, ...]`."""
    if isclass(annotation) and not get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((part for part in map(_part, get_args(annotation)) if part), None)


def _problem(details: Mapping[str, Any], model: type[BaseModel], noun: str) -> Problem:
    """What pydantic found, in the words of a recipe."""
    path: KeyPath = tuple(details["loc"])
    known = options(model)
    kind, message, name = details["type"], details["msg"], ".".join(key for key in path if isinstance(key, str))
    meaning = f" ({known[name].description})" if name in known else ""
    if kind == "extra_forbidden":
        return Problem(path, f"{dotted(path)} is no key of a {noun}; the nearest is {_nearest(name, known)}")
    if kind == "missing":
        return Problem(path, f"{dotted(path)} is missing{meaning}")
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        # A check of one value does not say what the value is; a check of a whole table does.
        found = "" if isinstance(details["input"], Mapping) else f", found {_shown(details['input'])}{meaning}"
        return Problem(path, f"{dotted(path) or f'the {noun}'}: {text}{found}")
    expected = EXPECTED.get(kind) or message.replace("Input should be", "expected")
    return Problem(path, f"{dotted(path)}: {expected}, found {_shown(details['input'])}{meaning}")


def _nearest(name: str, known: Mapping[str, FieldInfo]) -> str:
    """The known key that a misspelt or misplaced one most likely means."""
    owner, dot, key = name.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == owner]
    homes = [other for other in known if other.rpartition(".")[2] == key]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.85)
    if homes and not near:
        return homes[0]
    return owner + dot + (near or difflib.get_close_matches(key, siblings, n=1, cutoff=0))[0]


def _shown(value: Any, most: int = 80) -> str:
    """A value as a recipe would write it, cut to `most` characters."""
    text = toml_value(value)
    return text if len(text) <= most else text[:most] + "..."


def set_value(data: dict[str, Any], setting: str, noun: str = "recipe") -> tuple[KeyPath, str]:
    """Apply `part.key=value` to parsed TOML, in place: its path, and what is wrong with it ("" if nothing is).

    The value is TOML; what is no TOML is text, so that a shell needs no quotes within quotes.
    """
    key, equals, value = setting.partition("=")
    path: KeyPath = tuple(int(name) if name.isdecimal() else name for name in key.strip().split("."))
    if not equals or "" in path:
        return path, "expected part.key=value"
    place: Any = data
    for depth, name in enumerate(path):
        wrong = _misplaced(place, path[: depth + 1], noun)
        if wrong:
            return path, wrong
        if depth == len(path) - 1:
            place[name] = _setting_value(value.strip())
        else:
            place = place.setdefault(name, {}) if isinstance(place, dict) else place[name]
    return path, ""


def _misplaced(place: Any, path: KeyPath, noun: str) -> str:
    name, owner = path[-1], dotted(path[:-1])
    if isinstance(place, list):
        if isinstance(name, int) and name < len(place):
            return ""
        return f"{owner} has {len(place)} entries: expected a number from 0 to {len(place) - 1}, found {name}"
    if not isinstance(place, dict):
        return f"{owner} is a value, not a table: nothing can be set in it"
    return "" if isinstance(name, str) else f"{owner or f'a {noun}'} is a table, not a list: it has no entry {name}"


def _setting_value(text: str) -> Any:
    try:
        parsed = read_toml(f"value = {text}")
    except ValueError:
        return text
    return parsed["value"] if list(parsed) == ["value"] else text
