"""Words and phrases that must not come back: in docstrings, comments, messages, names of tests, pages and workflows."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MADE_BY_COMMANDS = {"demo-output", "runs", "evaluations", "build", "dist", "__pycache__"}
# Chinese, prompts and lists of words that students learn from, dated results, and this list.
EXEMPT = ("locales/zh", "miniature/prompts", "prompts/words", "world/words.py", "benchmarks/results", "tests/unit/test_plain_english.py")
READ = (".py", ".md", ".json", ".toml", ".html")
ROOMS = ["", *sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in MADE_BY_COMMANDS)]

# What to write instead, and the phrase.
INSTEAD = {
    "is not a (valid) ...; there is no ...": r"(?<!there )\b(is|are|was|were) no (?!(longer|one|more|less|better|worse|need)\b)[a-z]+",
    "is not one; does not exist; is missing": r"(?<!there )\b(is|are|was|were) (?-i:none)\b",
    "complete; valid": r"\b(is|are|was|were|be|not|no|stays?|kept|comes|opens) whole\b|\bwhole ones?\b",
    "either everything or nothing": r"\bby half\b",
    "ComfyUI": r"\bthe (older |oldest |newer |newest )?hosts?\b|\bhosts\b|\b(older|newer|later|every|each|an?) host\b|\bhost's\b",
    "student embeddings": r"\bspoken\b",
    "speaks of: mentions, writes": r"\bspeaks? (of|to|as)\b",
    "reviewer; other": r"\bstrangers?\b",
    "must; is to; will": r"\bshall\b",
    "exists; is available; can be reached": r"\bto be had\b",
    "fix": r"\bmend(s|ed|ing)?\b",
    "is; is in; is stored in; wrong": r"\b(lies?|lay|lain|lying)\b",
    "batch; process group": r"\bcompany\b",
    "starts with": r"\bbegins? so\b",
    "separately": r"\beach by (it|them)sel(f|ves)\b",
    "receives; notices": r"\b(hears?|heard)\b",
    "is reported; is shown; is given": r"\b(is|are|was|were|be) told\b",
    "considers alike; mistakes for": r"\btak(e|es|en) .{0,15}\bfor (alike|the same|a done)\b",
    "for as long as": r"\bso long (a|an|the)\b",
    "what was given; got ...": r"\bwhat came\b",
    "in between; trajectory": r"\bon (the|its) way\b",
    "damaged; not finite": r"\bspoilt\b",
    "so that not": r"\blest\b",
    "is enough": r"\bwill do\b",
    "benchmark": r"\b(the|our|this|that|each|every) bench\b|\bbench (scripts?|results?|numbers?|measures)\b",
    "path; like this; otherwise": r"\b(in|by|on|out|half|all|every|that|this|the|either|another|second|other|a|no) ways?\b",
    "images; draws; generates": r"\b(painter|paints|painted(?! this))\b",
    "again": r"\banew\b",
    "contains; comes with": r"\b(bring|brings|brought|bringing) along\b",
    "at run time; by the trainer": r"\bon the spot\b",
    "computes; computed": r"\breckon(s|ed|ing)?\b",
}
PHRASES = {advice: re.compile(phrase, re.IGNORECASE) for advice, phrase in INSTEAD.items()}


def files_of(room: str) -> Iterator[Path]:
    """The Python, Markdown, JSON, TOML and HTML files of a folder; those of the root itself for ""."""
    found = (ROOT / room).rglob("*") if room else ROOT.glob("*")
    for path in sorted(found):
        parts = path.relative_to(ROOT)
        exempt = parts.as_posix().startswith(EXEMPT) or MADE_BY_COMMANDS & {*parts.parts}
        if path.suffix in READ and path.is_file() and not exempt:
            yield path


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """What a person reads in a file, with line numbers: in Python strings, comments and the names of tests, else everything."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from ((node.lineno + offset, line) for offset, line in enumerate(node.value.splitlines()))
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def findings(room: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {found[0]!r}: write: {advice}"
        for path in files_of(room)
        for number, text in texts_of(path)
        for advice, phrase in PHRASES.items()
        if (found := phrase.search(text))
    ]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room or "root")
def test_a_room_is_written_in_plain_english(room: str) -> None:
    found = findings(room)
    assert not found, f"{len(found)} phrases to rewrite:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("X is no whole safetensors file", True),
        ("there is no file", False),
        ("it is no longer there", False),
        ("the value is None", False),
        ("The host lists it", True),
        ("localhost", False),
        ("nothing is loaded by half", True),
        ("a believable client in a belief", False),
        ("amend the recommendation", False),
        ("what the bench measures", True),
        ("`python dev.py bench` on a park bench", False),
        ("cannot be reached this way", True),
        ("always away", False),
        ("an oil painting", False),
        ("a student that paints", True),
        ("memory is reckoned", True),
    ],
)
def test_phrases_are_found_in_any_case_and_only_as_words(text: str, found: bool) -> None:
    assert any(phrase.search(text) for phrase in PHRASES.values()) == found


def test_everything_that_a_person_reads_in_python_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text(
        '"""one"""\n# two\nx = f"three {0} four"\n\ndef test_five_six() -> None:\n    """seven\n    eight"""\n', encoding="utf-8"
    )
    assert {text.strip(" #") for _, text in texts_of(path)} == {"one", "two", "three", "four", "test five six", "seven", "eight"}
