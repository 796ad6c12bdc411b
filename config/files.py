"""Recipes and suites: found, read, changed by `--set`, checked against their model with every problem listed at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from inspect import isclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..runtime.errors import UserError, printable
from .toml import toml_parser, toml_value

Model = TypeVar("Model", bound=BaseModel)
# TOML's names for what pydantic calls by Python's.
EXPECTED = {"model_type": "expected a table", "tuple_type": "expected a list"}
# The beginning of tags that tell the tables of one key apart; pydantic puts a tag into the place of an error.
ONE_OF = "<"
SHIPPED = Path(__file__).resolve().parent.parent / "recipes"
QUOTES = "in TOML, put a Windows path between single quotes or write it with forward slashes"


class ConfigError(UserError):
    """A recipe or suite that cannot be used; `problems` begin with their keys."""

    def __init__(self, problem: str, remedy: str, problems: Sequence[str] = ()) -> None:
        super().__init__(problem, remedy, "\n".join(f"  {one}" for one in problems))
        self.problems = list(problems)


def shipped_names(folder: Path = SHIPPED) -> list[str]:
    """The names of the shipped recipes or suites, recipes for one night first."""
    return sorted((path.stem for path in folder.glob("*.toml")), key=lambda name: ("-overnight-" not in name, name))


def load_config(name_or_path: str, overrides: Sequence[str], model: type[Model], noun: str = "recipe", folder: Path = SHIPPED) -> Model:
    """The recipe or suite in a file, or the shipped one of that name in `folder`, with `part.key=value` settings applied.

    `noun` is what error messages call it. Raises ConfigError that lists every problem: an unknown key with the nearest known one, a
    wrong value with what was expected.
    """
    path = _find(name_or_path, noun, folder)
    data, problems = _read(path), []
    for setting in overrides:
        try:
            set_value(data, setting)
        except ValueError as error:  # noqa: PERF203 (every problem is reported)
            problems.append(f"--set {printable(setting)}: {error}")
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        problems += [_problem(details, model, noun) for details in error.errors(include_url=False)]
    else:
        if not problems:
            return config
    changed = "".join(f" --set {printable(setting)}" for setting in overrides)
    raise ConfigError(
        f"{path}{changed}: {len(problems)} {'problem' if len(problems) == 1 else 'problems'}.",
        f"correct these keys; the shipped {noun}s explain every key.",
        problems,
    )


def _find(name_or_path: str, noun: str, folder: Path) -> Path:
    """The file: a path, or the name of a shipped one (`smoke`, `smoke.toml`, `recipes/smoke.toml`) from any working folder."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    shipped = shipped_names(folder)
    name = path.name.removesuffix(".toml")
    if name in shipped and str(path.parent) in (".", folder.name):
        return folder / f"{name}.toml"
    near = difflib.get_close_matches(name, shipped, n=1)
    found = "is a folder" if path.is_dir() else "does not exist"
    raise ConfigError(
        f"{printable(name_or_path)} is neither a {noun} file (it {found}) nor the name of a shipped {noun}.",
        f"did you mean {near[0]}?" if near else "give the path of a .toml file, or one of these names.",
        [f"shipped: {', '.join(shipped)}"],
    )


def _read(path: Path) -> dict[str, Any]:
    toml = toml_parser()
    try:
        return toml.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.", "save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        found = "arrays or tables are nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{path} is not valid TOML: {found}.", f"correct that place; {QUOTES}.") from error


def options(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key that a config can have, by dotted name without list positions (`stage.corpora.path`); a table comes before its keys."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        found[key] = field
        for part in _parts(field.annotation):
            found |= options(part, f"{key}.")
    return found


def _parts(annotation: Any) -> list[type[BaseModel]]:
    """The models in `Model`, `Model | Other | None` or `tuple[Model, ...]`."""
    if isclass(annotation) and not get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [part for argument in get_args(annotation) for part in _parts(argument)]


def _problem(details: Mapping[str, Any], model: type[BaseModel], noun: str) -> str:
    """One of pydantic's errors in TOML's terms, beginning with the dotted key as `--set` takes it."""
    known = options(model)
    location = [part for part in details["loc"] if not str(part).startswith(ONE_OF)]
    key = printable(".".join(map(str, location)))
    name = ".".join(part for part in location if isinstance(part, str))
    kind, message, value = details["type"], details["msg"], details["input"]
    meaning = f" ({known[name].description})" if name in known else ""
    if kind == "extra_forbidden":
        return f"{key} is not a key of a {noun}; the nearest is {_nearest(name, known)}"
    if kind == "missing":
        return f"{key} is missing{meaning}"
    # The check of a complete table says itself which values it means.
    got = "" if kind == "value_error" and isinstance(value, Mapping) else f", got {printable(toml_value(value), 80)}{meaning}"
    message = message.removeprefix("Value error, ").replace("Input should be", "expected").replace("String should have", "expected")
    return f"{key or f'the {noun}'}: {EXPECTED.get(kind, message)}{got}"


def _nearest(name: str, known: Mapping[str, FieldInfo]) -> str:
    """The known key that a misspelt or misplaced one most likely means."""
    owner, dot, key = name.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == owner]
    homes = [other for other in known if other.rpartition(".")[2] == key]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.85)
    if homes and not near:
        return homes[0]
    return owner + dot + (near or difflib.get_close_matches(key, siblings, n=1, cutoff=0))[0]


def set_value(data: dict[str, Any], setting: str) -> None:
    """Apply `part.key=value` to parsed TOML, in place. Raises ValueError that says what is wrong with the setting."""
    key, equals, value = setting.partition("=")
    path = key.strip().split(".")
    if not equals or "" in path:
        raise ValueError("expected part.key=value")
    place: Any = data
    for depth, name in enumerate(path):
        owner, is_last = ".".join(path[:depth]), depth == len(path) - 1
        index: Any = name
        if isinstance(place, list):
            if not (name.isdecimal() and int(name) < len(place)):
                raise ValueError(f"{owner} has {len(place)} entries: expected a number from 0 to {len(place) - 1}, got {printable(name)}")
            index = int(name)
        elif not isinstance(place, dict):
            raise ValueError(f"{owner} is a value, not a table")
        elif not is_last:
            place.setdefault(name, {})
        if is_last:
            place[index] = _setting_value(value.strip())
        else:
            place = place[index]


def _setting_value(text: str) -> Any:
    """The TOML value of a setting; other text stands for itself, so that a shell needs no quotes within quotes."""
    toml = toml_parser()
    try:
        parsed = toml.loads(f"value = {text}")
    except (ValueError, RecursionError) as error:
        if text[:1] in ("'", '"'):
            raise ValueError(f"not valid TOML: {error}; {QUOTES}, or leave the quotes out") from error
        return text
    return parsed["value"] if list(parsed) == ["value"] else text
