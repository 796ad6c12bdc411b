"""Prompts out of files: text lines, JSON, CSV, Parquet and a T2I-CompBench folder, read strictly."""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from ..runtime.errors import printable
from ..runtime.optional import pip_install

PACK = Path(__file__).resolve().parent.parent
COMPBENCH_CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy")
COMPBENCH_PARTS = {"train": "train", "validation": "val"}
KINDS_OF_FOLDERS = ("compbench", "photographs")
KIND_OF_SUFFIX = {".txt": "lines", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
NOT_TEXT = re.compile("[\x00\ud800-\udfff]")  # bytes that are not UTF-8 are read as lone surrogates (errors="surrogateescape")
ADDRESS = re.compile(r"https?://\S+$")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the text encoders read, and the text that the picture should show, where there is one (CommonText)."""

    text: str
    target: str | None = None


class PromptError(ValueError):
    """Prompts that cannot be trained on: what is wrong, what was found, what to do about it."""

    def __init__(self, problem: str, remedy: str, found: str = "") -> None:
        super().__init__("\n".join(line for line in (problem, found, f"What to do: {remedy}") if line))
        self.problem = problem
        self.remedy = remedy


def located(path: str, kind: str) -> Path:
    """The file or folder that a corpus names: as it is written, else below the pack's own folder (where shipped lists lie)."""
    written = Path(path).expanduser()
    places = [written] if written.is_absolute() else [Path.cwd() / written, PACK / written]
    found = next((place for place in places if os.path.exists(place)), None)  # Path.exists raises where a folder is closed to us
    if found is None:
        near = [name for place in places for name in _names_near(place)]
        remedy = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "correct the path in the recipe."
        looked = "Looked for " + " and ".join(map(str, places))
        raise PromptError(f'There is no "{printable(path)}" to read prompts from.', remedy, looked)
    expected = "a folder" if kind in KINDS_OF_FOLDERS else "a file"
    came = "a folder" if found.is_dir() else "a file" if found.is_file() else "neither a file nor a folder"
    if came != expected:
        raise PromptError(f'{found} is {came}, and kind "{kind}" reads {expected}.', f"name {expected}, or correct the kind of the corpus.")
    return found


def _names_near(place: Path) -> list[str]:
    """What lies beside a path that is not there and is spelt much like it."""
    try:
        beside = os.listdir(place.parent)
    except OSError:  # no such folder, or closed to us: no name to offer
        return []
    return [str(place.with_name(name)) for name in difflib.get_close_matches(place.name, beside, n=2)]


def _check_suffix(path: Path, kind: str) -> None:
    """A CSV file read as lines would train on its commas without a word, so a name that says otherwise is refused."""
    fits = KIND_OF_SUFFIX.get(path.suffix.lower(), kind)
    if fits != kind:
        problem = f'{path} is named {path.suffix}, and the recipe says kind = "{kind}".'
        raise PromptError(problem, f'write kind = "{fits}", or rename the file.')


def _no_such_column(path: Path, column: str, columns: list[str]) -> NoReturn:
    """The error for a column that is missing or was not named, with the columns that there are."""
    found = "Its columns: " + ", ".join(printable(name) for name in columns) if columns else "It has no columns."
    near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
    remedy = f'write column = "{near[0]}".' if near else "write column = one of these in the recipe."
    named = f'{path} has no column "{printable(column)}".'
    raise PromptError(named if column else f"{path} has columns, and the recipe does not say which one to read.", remedy, found)


def _lines(path: Path, _column: str) -> Iterator[tuple[int, object]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        yield from enumerate(file, start=1)


def _json(path: Path, column: str) -> Iterator[tuple[int, object]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            a_list = "a list of strings, or of objects of which the recipe names the column"
            json_lines = "Extra data" in str(error)
            remedy = f"put what stands on its lines into {a_list}." if json_lines else f"mend the file: it must hold {a_list}."
            raise PromptError(f"{path} is not JSON.", remedy, f"The JSON reader says: {error}") from error
    if not isinstance(content, list):
        remedy = "make it a list of strings, or of objects of which the recipe names the column."
        raise PromptError(f"{path} holds no list but {_described(content)}.", remedy)
    for number, item in enumerate(content, start=1):
        yield number, _of_object(path, item, number, column)


def _of_object(path: Path, item: object, number: int, column: str) -> object:
    """The prompt in one item of a JSON list: the item itself, or the named entry of an object."""
    if isinstance(item, dict):
        if column not in item:
            _no_such_column(Path(f"{path} (item {number})"), column, list(item))
        return item[column]
    if column:
        remedy = "leave column out if all items are strings, else mend the item."
        raise PromptError(f'{path}, item {number}, is no object with a "{printable(column)}" but {_described(item)}.', remedy)
    return item


def _csv(path: Path, column: str) -> Iterator[tuple[int, object]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
            if header and column not in header:
                _no_such_column(path, column, header)
            for row in filter(None, rows):
                if len(row) != len(header):
                    problem = f"{path}, line {rows.line_num}, has {len(row)} columns, its first line has {len(header)}."
                    raise PromptError(problem, "put prompts with commas in them between double quotes.")
                yield rows.line_num, row[header.index(column)]
        except csv.Error as error:
            remedy = "mend the quotes in that line: a file with commas, its columns named in the first line, is expected."
            raise PromptError(f"{path}, line {rows.line_num}, is not CSV.", remedy, f"The CSV reader says: {error}") from error


def _parquet(path: Path, column: str) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise PromptError(f"Reading the Parquet file {path} needs the package pyarrow.", pip_install("pyarrow")) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                _no_such_column(path, column, names)
            batches = file.iter_batches(columns=[column])
            yield from enumerate(itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches), start=1)
    except (pyarrow.ArrowException, OSError) as error:  # a damaged file is the one or the other
        remedy = "fetch the file again, or correct the kind of the corpus."
        raise PromptError(f"{path} is not a whole Parquet file.", remedy, f"pyarrow says: {printable(str(error))}") from error


# kind of a corpus: what its values are counted in, and what reads them
READERS: dict[str, tuple[str, Callable[[Path, str], Iterator[tuple[int, object]]]]] = {
    "lines": ("line", _lines),
    "json": ("item", _json),
    "csv": ("line", _csv),
    "parquet": ("row", _parquet),
}


def _described(value: object) -> str:
    """A value of the wrong type, in words: what it is and how it begins."""
    kinds = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "a string"}
    return f"{kinds.get(type(value), type(value).__name__)} ({printable(str(value), 60)})"


def _text(value: object, where: str) -> str:
    """One prompt without the white space around it; nothing for an empty value, an error for what is not text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PromptError(f"{where}, holds no text but {_described(value)}.", "name the column or the file that holds the prompts.")
    if NOT_TEXT.search(value):
        begin = f"It begins: {printable(value, 60)}"
        raise PromptError(f"{where}, is not text in UTF-8.", "save the file as UTF-8 text, or name another one.", begin)
    return value.strip()


def _gathered(path: Path, unit: str, values: Iterable[tuple[int, object]], limit: int) -> list[Prompt]:
    """The first `limit` prompts that are not blank, checked to be something that a person wrote."""
    texts = (_text(value, f"{path}, {unit} {number}") for number, value in values)
    prompts = [Prompt(text) for text in itertools.islice(filter(None, texts), limit or None)]
    remedy = "name the file, and where it has columns the column, that holds the prompts."
    if not prompts:
        raise PromptError(f"{path} holds no prompts: there is no {unit} that is not empty.", remedy)
    begin = f"It begins: {printable(prompts[0].text, 60)}"
    if all(ADDRESS.match(prompt.text) for prompt in prompts):
        raise PromptError(f"What was read of {path} are addresses, no prompts.", remedy, begin)
    if not any(character.isalpha() for prompt in prompts for character in prompt.text):
        raise PromptError(f"What was read of {path} are no prompts: there is not one letter in them.", remedy, begin)
    return prompts


def read_file(path: str, kind: str, column: str = "", limit: int = 0) -> list[Prompt]:
    """The prompts of one file, in its order, without blank ones; `limit` of them, or all if it is 0.

    Raises PromptError: a file that is missing, unreadable, empty, of another kind or not UTF-8; a missing column; a value that is not text.
    """
    unit, reader = READERS[kind]
    file = located(path, kind)
    _check_suffix(file, kind)
    try:
        return _gathered(file, unit, reader(file, column), limit)
    except OSError as error:
        raise PromptError(f"{file} cannot be read: {error.strerror or error}.", "check the file and your rights to read it.") from error


def read_compbench(path: str, split: Literal["train", "validation"] = "train", limit: int = 0) -> list[Prompt]:
    """The prompts of a T2I-CompBench folder, one of each category in turn: `<category>_train.txt`, or `<category>_val.txt` for validation.

    Raises PromptError.
    """
    categories = [read_file(str(file), "lines") for file in compbench_files(path, split).values()]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*categories))
    return list(itertools.islice(filter(None, in_turn), limit or None))


def compbench_files(path: str, split: Literal["train", "validation"] = "train") -> dict[str, Path]:
    """The file of each category in a T2I-CompBench folder.

    The folder is the one with these files or a checkout of the repository, which keeps them in examples/dataset. Raises PromptError.
    """
    root = located(path, "compbench")
    folder = next((place for place in (root, root / "examples" / "dataset") if any(place.glob("*_train.txt"))), root)
    files = {category: folder / f"{category}_{COMPBENCH_PARTS[split]}.txt" for category in COMPBENCH_CATEGORIES}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        there = sorted(printable(entry.name) for entry in folder.glob("*.txt"))
        found = f"Missing: {', '.join(missing)}. Its text files: {', '.join(there[:40]) or 'none'}."
        remedy = "name examples/dataset of the repository Karine-Huang/T2I-CompBench, in a version that has 3d_spatial and numeracy."
        raise PromptError(f"{folder} is no T2I-CompBench folder.", remedy, found)
    return files
