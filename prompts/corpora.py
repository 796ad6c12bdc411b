"""Prompts from files: text lines, JSON, CSV, Parquet and a T2I-CompBench folder."""

from __future__ import annotations

import codecs
import csv
import difflib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import Field, model_validator

from ..config.parts import Count, OptionalPath, Part
from ..runtime.errors import UserError, printable
from ..runtime.optional import needed

PACK = Path(__file__).resolve().parent.parent
COMPBENCH_CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy")
COMPBENCH_PARTS = {"train": "train", "validation": "val"}
KINDS_OF_FOLDERS = ("compbench", "photographs")
EXTENSIONS = {".txt": "lines", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
NOT_TEXT = re.compile("[\x00\ud800-\udfff]")  # bytes that are not UTF-8 are read as lone surrogates (errors="surrogateescape")
# Where the corpora of the shipped recipes and suites can be had, by the name of the file or else by kind; {} is where they are expected.
SOURCES = {
    "compbench": 'get it with git clone https://github.com/Karine-Huang/T2I-CompBench "{}"',
    "laion-aesthetics-6.5.parquet": "download the Parquet file of https://huggingface.co/datasets/ChristophSchuhmann/"
    "improved_aesthetics_6.5plus and save it as {}",
    "captions_val2014.json": "unpack annotations_trainval2014.zip of https://cocodataset.org/#download so that it is {}",
    "photographs": "unpack val2014.zip of https://cocodataset.org/#download so that its folder is {}",
}
ADDRESS = re.compile(r"https?://\S+$")


# Which kinds of text CommonText asks for, and how often.
MixName = Literal["varied", "paper"]
MIX_DESCRIPTION = "common_text: paper: 96% one word, else a short sentence; varied (if left out): also two to four words, capitals, numbers"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the text encoders read, and the text that the image should show, if there is one (CommonText)."""

    text: str
    target: str | None = None


class PromptError(UserError):
    """Prompts that cannot be used."""


class Corpus(Part):
    """A source of prompts in a recipe."""

    kind: Literal["common_text", "lines", "json", "csv", "parquet", "compbench"] = Field(
        description="common_text: generated; lines: a text file, one prompt per line; json: a list; compbench: a T2I-CompBench folder"
    )
    path: OptionalPath = Field(default="", description="file, or folder of compbench; relative to the working folder or to the pack's")
    column: str = Field(default="", description="column of csv and parquet, or key of json's objects, that holds the prompt")
    repeat: Count = Field(default=1, description="times that each of its prompts occurs in one epoch of the mix")
    limit: int = Field(default=0, ge=0, description="prompts used, from the first; 0 for all (common_text generates 50,000)")
    mix: MixName | None = Field(default=None, description=MIX_DESCRIPTION)

    @model_validator(mode="after")
    def _path_and_column_fit_the_kind(self) -> Corpus:
        if (self.kind == "common_text") == bool(self.path):
            raise ValueError("common_text is generated: expected no path" if self.path else f"a corpus of kind {self.kind} needs a path")
        if self.kind in ("csv", "parquet") and not self.column:
            raise ValueError(f"a corpus of kind {self.kind} needs the column that holds the prompt")
        if self.kind not in ("csv", "parquet", "json") and self.column:
            raise ValueError(f"a corpus of kind {self.kind} has no columns: expected no column")
        if self.mix and self.kind != "common_text":
            raise ValueError(f"a corpus of kind {self.kind} is not generated: expected no mix")
        return self


def located(path: str, kind: str) -> Path:
    """The file or folder of a corpus: the path itself, else the same path in the pack's folder (for shipped prompts)."""
    places = list(dict.fromkeys([Path(path).expanduser().absolute(), PACK / path]))
    found = next((place for place in places if os.path.exists(place)), None)  # Path.exists raises where access is denied
    if found is None:
        source = SOURCES.get(Path(path).name) or SOURCES.get(kind) or "put it at {}"
        near = [str(place.with_name(name)) for place in places for name in _similar_names(place)]
        remedy = f"did you mean {' or '.join(near)}?" if near else f"{source.format(places[0])}, or correct the path in the recipe."
        looked = "Searched: " + " and ".join(printable(str(place)) for place in places)
        raise PromptError(f'"{printable(path)}" was not found.', remedy, looked)
    expected = "a folder" if kind in KINDS_OF_FOLDERS else "a file"
    got = "a folder" if found.is_dir() else "a file" if found.is_file() else "neither a file nor a folder"
    if got != expected:
        raise PromptError(f'{found} is {got}, but kind "{kind}" reads {expected}.', f"name {expected}, or correct the kind of the corpus.")
    return found


def _similar_names(path: Path) -> list[str]:
    try:
        return difflib.get_close_matches(path.name, os.listdir(path.parent), n=2)
    except OSError:  # the folder does not exist or access is denied
        return []


def _open(path: Path, newline: str | None = None) -> TextIO:
    """A text file in UTF-8, or in UTF-16 with a byte order mark (as Excel exports Unicode text)."""
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in UTF_16 else "utf-8-sig"
    return path.open(encoding=encoding, errors="surrogateescape", newline=newline)


def _lines(path: Path, _columns: Sequence[str]) -> Iterator[object]:
    with _open(path) as file:
        yield from file


def _json(path: Path, _columns: Sequence[str]) -> Iterator[object]:
    """The items of a JSON list, or of JSON lines."""
    with _open(path) as file:
        text = file.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from (json.loads(line) for line in text.split("\n") if line.strip())
    else:
        yield from content if isinstance(content, list) else [content]


def _csv(path: Path, columns: Sequence[str]) -> Iterator[object]:
    """Rows by the names in the first line, between commas, semicolons or tabs: whichever separates the columns from the others."""
    with _open(path, newline="") as file:
        first = file.readline()
        headers = {delimiter: next(csv.reader([first], delimiter=delimiter), []) for delimiter in ",;\t"}
        delimiter = max(headers, key=lambda delimiter: (len({*columns} & {*headers[delimiter]}), len(headers[delimiter])))
        for row in csv.DictReader(file, headers[delimiter], delimiter=delimiter, strict=True):
            if None in row or None in row.values():
                raise ValueError(f"expected {len(headers[delimiter])} cells as in the first line; is a {delimiter!r} not between quotes?")
            yield row


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[object]:
    parquet = needed("pyarrow.parquet", "pyarrow", f"Reading the Parquet file {path}")

    def rows() -> Iterator[object]:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=list(columns) if {*columns} <= {*file.schema_arrow.names} else None):
                yield from batch.to_pylist()

    return rows()


# kind of a corpus: its reader, and what messages call an item of it
FILE_READERS: dict[str, tuple[Callable[[Path, Sequence[str]], Iterator[object]], str]] = {
    "lines": (_lines, "line"),
    "json": (_json, "item"),
    "csv": (_csv, "row"),
    "parquet": (_parquet, "row"),
}


def _text(item: Any, column: str, where: str, key: str = "column") -> str:
    """The text in a string, or in a column of an object, without surrounding white space. `key`: what names that column, for messages."""
    if isinstance(item, dict):
        if column not in item:
            near = difflib.get_close_matches(column, item, n=1, cutoff=0.5)
            problem = f'{where}: there is no column "{printable(column)}".' if column else f"{where}: no column is named."
            remedy = f'write {key} = "{near[0]}".' if near else f"write {key} = one of these."
            raise PromptError(problem, remedy, f"Its columns: {', '.join(map(printable, item)) or 'none'}")
        item = item[column]
    elif column:
        problem = f'{where}: expected an object with the key "{printable(column)}", got {printable(json.dumps(item), 60)}.'
        raise PromptError(problem, f"leave {key} out if all items are strings, or correct the item.")
    if item is None:
        return ""
    if not isinstance(item, str):
        problem = f"{where}: expected text, got {type(item).__name__} {printable(str(item), 60)}."
        raise PromptError(problem, "name the column or the file that holds the prompts.")
    if NOT_TEXT.search(item):
        raise PromptError(f"{where}: not valid UTF-8 text: {printable(item, 60)}", "save the file as UTF-8, or name another one.")
    return item.strip()


def _check(path: Path, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts. Raises PromptError if there are none, or if all are addresses or numbers, as in a wrong column."""
    remedy = "name the file, and for a file with columns the column, that holds the prompts."
    if not prompts:
        raise PromptError(f"{path} contains no prompts.", remedy)
    got = f"The first: {printable(prompts[0].text, 60)}"
    if all(ADDRESS.match(prompt.text) for prompt in prompts):
        raise PromptError(f"{path}: expected prompts, got only addresses.", remedy, got)
    if not any(character.isalpha() for prompt in prompts for character in prompt.text):
        raise PromptError(f"{path}: expected prompts, got text without a single letter.", remedy, got)
    return prompts


def read_file(path: str, kind: str, column: str = "", limit: int = 0, target: str = "") -> list[Prompt]:
    """The prompts of one file in order, without blank ones; the first `limit` of them, or all if it is 0.

    `target` names the column with the text that each prompt's image must show. Raises PromptError for a file that is missing, unreadable,
    empty, of another kind or not text; for a missing column; for a value that is not text.
    """
    file = located(path, kind)
    named = EXTENSIONS.get(file.suffix.lower(), kind)
    if named != kind:  # read as lines, a CSV file would train on its commas
        raise PromptError(f'{file} has the extension {file.suffix}, but kind = "{kind}".', f'write kind = "{named}", or rename the file.')
    reader, unit = FILE_READERS[kind]
    items, number, prompts = reader(file, [name for name in (column, target) if name]), 0, []
    try:
        for number, item in enumerate(items, start=1):
            where = f"{file}, {unit} {number}"
            if text := _text(item, column, where):
                prompts.append(Prompt(text, _text(item, target, where, "target") if target else None))
            if len(prompts) == limit > 0:
                break
    except PromptError:
        raise
    except (ValueError, OSError, RecursionError, NotImplementedError, csv.Error) as error:
        problem = f"{file} cannot be read as {kind} from {unit} {number + 1} on: {printable(str(error))}."
        raise PromptError(problem, "correct or replace the file, check its permissions, or correct the kind of the corpus.") from error
    return _check(file, prompts)


def read_compbench(path: str, split: Literal["train", "validation"] = "train", limit: int = 0) -> list[Prompt]:
    """The prompts of a T2I-CompBench folder, one of each category in turn: `<category>_train.txt`, or `<category>_val.txt` for validation.

    Raises PromptError.
    """
    categories = [read_file(str(file), "lines") for file in compbench_files(path, split).values()]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*categories))
    return list(itertools.islice(filter(None, in_turn), limit or None))


def compbench_files(path: str, split: Literal["train", "validation"] = "train") -> dict[str, Path]:
    """The file of each category in a T2I-CompBench folder.

    The folder is the one with these files, or a checkout of the repository, which has them in examples/dataset. Raises PromptError.
    """
    root = located(path, "compbench")
    folder = next((place for place in (root, root / "examples" / "dataset") if any(place.glob("*_train.txt"))), root)
    files = {category: folder / f"{category}_{COMPBENCH_PARTS[split]}.txt" for category in COMPBENCH_CATEGORIES}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        there = sorted(printable(entry.name) for entry in folder.glob("*.txt"))
        found = f"Missing: {', '.join(missing)}. Its text files: {', '.join(there[:40]) or 'none'}."
        remedy = "name examples/dataset of the repository Karine-Huang/T2I-CompBench, in a version that has 3d_spatial and numeracy."
        raise PromptError(f"{folder} is not a T2I-CompBench folder.", remedy, found)
    return files
