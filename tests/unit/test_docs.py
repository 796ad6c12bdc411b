"""README.md and docs/: every command is one that its program takes, every link and image exists, tables are those of the code."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import pytest
from distilled_t5.benchmarks.support import measuring
from distilled_t5.config.files import options
from distilled_t5.evaluate import __main__ as evaluate_command
from distilled_t5.evaluate.suite import Suite, load_suite
from distilled_t5.miniature import __main__ as miniature_command
from distilled_t5.runtime.command import split_flags
from distilled_t5.runtime.lock import lock
from distilled_t5.train import __main__ as train_command
from distilled_t5.train import commands as train_subcommands
from distilled_t5.train.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "evaluate/METRICS.md", "miniature/README.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
HELP = sorted((ROOT / "web" / "docs").rglob("*.md"))
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )?(?:python dev\.py|python custom_nodes|pip install|torchrun) [^`]+)`")
# What a pip command may install besides the extras: what the trainer and the nodes name in their errors.
OPTIONAL = {"tensorboard", "wandb"}


def commands(page: Path) -> Iterator[str]:
    """The lines of the blocks without a language, and the commands of this project in running text."""
    text = page.read_text(encoding="utf-8")
    lines = [line for language, block in FENCED.findall(text) if not language for line in block.splitlines()]
    for line in [*lines, *INLINE.findall(FENCED.sub("", text))]:
        yield from (part.strip() for part in line.split(" && ") if part.strip())


EVERY_COMMAND = [(name, command) for name, page in zip(NAMES, PAGES, strict=True) for command in commands(page)]


@functools.cache
def dev() -> ModuleType:
    """dev.py as a module."""
    spec = importlib.util.spec_from_file_location("dev_of_docs", ROOT / "dev.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["dev_of_docs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_dev(arguments: list[str], _folder: Path) -> None:
    dev().command_line().parse_args(arguments)


def check_benchmark(arguments: list[str], _folder: Path) -> None:
    measuring.command_line("").parse_args(arguments)


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> Any:
    ours, _flags = split_flags(arguments)
    return parser.parse_args(ours)


def check_train(arguments: list[str], _folder: Path) -> None:
    if arguments[0] in train_command.COMMANDS:
        train_subcommands.command_line().parse_args(arguments)
        return
    asked = parse(train_command.command_line(), arguments)
    if not (asked.rehearse and asked.recipe in (None, "all")):
        load_recipe(asked.recipe, asked.set)


def check_evaluate(arguments: list[str], _folder: Path) -> None:
    asked = parse(evaluate_command.command_line(), arguments)
    load_suite(asked.suite, asked.set)


def check_miniature(arguments: list[str], _folder: Path) -> None:
    miniature_command.command_line().parse_args(arguments)


def check_clone(arguments: list[str], _folder: Path) -> None:
    assert arguments[:2] == ["clone", PROJECT["urls"]["Repository"]]


def check_pip(arguments: list[str], _folder: Path) -> None:
    extras = {package for packages in PROJECT["optional-dependencies"].values() for package in packages} | OPTIONAL
    assert arguments[0] == "install"
    assert set(arguments[1:]) <= extras


def check_kill(arguments: list[str], folder: Path) -> None:
    """The process that the command on the page finds in the lock file of a run."""
    assert arguments[0] == "-TERM"
    [found] = [command for _, command in EVERY_COMMAND if command.startswith("kill")]
    with lock(folder):
        inner = found[found.index("$(") + 2 : found.rindex(")")].replace("RUN/", f"{folder}/")
        number = subprocess.run(["sh", "-c", inner], capture_output=True, text=True, check=True).stdout.strip()
    assert int(number) > 0


PROGRAMS: dict[str, Callable[[list[str], Path], None]] = {
    "dev.py": check_dev,
    "train": check_train,
    "evaluate": check_evaluate,
    "miniature": check_miniature,
    "git": check_clone,
    "pip": check_pip,
    "kill": check_kill,
    "encode.py": check_benchmark,
    "gpu.py": check_benchmark,
}
# Programs of the system that the pages use as their makers describe them.
OF_THE_SYSTEM = ("cd", "sha256sum", "certutil")


@pytest.mark.parametrize(("page", "command"), EVERY_COMMAND, ids=lambda value: value[:60])
def test_a_command_is_one_that_its_program_takes(page: str, command: str, tmp_path: Path) -> None:
    words = [word for word in shlex.split(command.replace("\\", "/")) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "torchrun":
        words = ["python", *words[words.index("--") + 1 :]]
    if words[0].endswith("python") and words[1] == "-c":
        compile(words[2], page, "exec")
        return
    program = Path(words[1] if words[0].endswith("python") else words[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    if name not in OF_THE_SYSTEM:
        PROGRAMS[name](words[2:] if words[0].endswith("python") else words[1:], tmp_path)


@pytest.mark.parametrize("page", [*PAGES, *HELP], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_and_image_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]
    for target in targets:
        address = urlparse(target)
        if address.scheme:
            assert address.scheme in ("http", "https"), target
            continue
        linked = (page.parent / address.path).resolve() if address.path else page
        assert linked.exists(), f"{page.name}: {target}"
        if address.fragment:
            assert address.fragment in anchors(linked), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_template_is_in_the_readme() -> None:
    linked = set(re.findall(r"8188/\?template=([\w-]+)&source=distilled-t5", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert linked == {path.stem for path in (ROOT / "example_workflows").glob("*.json")}


def test_every_page_of_docs_is_in_its_list() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_readme_has_at_most_120_lines_and_small_images() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    nodes = list((ROOT / "assets" / "nodes").glob("*.png"))
    assert all(path.stat().st_size < 40_000 for path in nodes)
    assert {path.stem for path in nodes} == {path.name for path in (ROOT / "web" / "docs").iterdir()}
    assert all(f"assets/nodes/{path.name}" in text for path in nodes)


@pytest.mark.parametrize(("page", "config"), [("recipes.md", Recipe), ("evaluation.md", Suite)])
def test_every_key_is_on_its_page_with_its_description(page: str, config: type[Recipe | Suite]) -> None:
    found = options(config)
    tables = {key.rpartition(".")[0] for key in found}
    rows = [f"| `{key}` | {field.description} |" for key, field in found.items() if key not in tables]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert "\n".join(rows) in text, "the table has to be:\n" + "\n".join(rows)


def test_every_shipped_recipe_and_suite_is_on_its_page() -> None:
    recipes, evaluation = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("recipes.md", "evaluation.md"))
    for path in (ROOT / "recipes").glob("*.toml"):
        family, _, size = path.stem.rpartition("-")
        assert f"`{path.stem}`" in recipes or (f"`{family}-" in recipes and f"`-{size}`" in recipes), path.stem
    assert all(f"`{path.stem}`" in evaluation for path in (ROOT / "evaluate" / "suites").glob("*.toml"))
