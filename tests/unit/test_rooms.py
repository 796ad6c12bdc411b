"""Rooms import only the rooms below them, and no two modules import each other in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GROUND = {"runtime", "config", "prompts", "students", "families", "encoder", "diffusion", "world"}
# Room -> the rooms that it may import.
BELOW = {
    "runtime": set(),
    "world": set(),
    "config": {"runtime"},
    "prompts": {"runtime", "config"},
    "students": {"runtime", "config"},
    "families": {"runtime", "students"},
    "encoder": {"runtime", "students", "families"},
    "diffusion": {"runtime", "students", "families"},
    "train": GROUND - {"world"},
    "evaluate": GROUND | {"train"},
    "miniature": GROUND | {"train"},
    "nodes": {"runtime", "prompts", "students", "families", "encoder", "train", "evaluate"},
}
# Of the trainer, the evaluation uses the method and not the runner. The miniature trains a teacher and a Flux, which the `train` command
# does not: it uses the optimizer and the checkpoints.
USED = {"evaluate": {"train.trajectory", "train.objectives"}, "miniature": {"train.optimizer", "train.state"}}


def modules() -> dict[str, Path]:
    """Every module of the rooms by its dotted name below the pack."""
    found = {}
    for room in BELOW:
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, only_when_imported: bool = False) -> Iterator[str]:
    """The modules of the pack that a module imports; those in functions and under TYPE_CHECKING too, unless `only_when_imported`."""
    path = MODULES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    nodes = tree.body if only_when_imported else ast.walk(tree)
    for node in nodes:
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        elif node.module and node.module.startswith("distilled_t5"):
            base = node.module.split(".")[1:]
        else:
            continue
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            yield whole if whole in MODULES else ".".join(base)


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_rooms_below_it(room):
    upward = [
        f"{name} imports {found}"
        for name in MODULES
        if name.partition(".")[0] == room
        for found in imports(name)
        if found.partition(".")[0] not in {room, "", "__version__"} | BELOW[room]
    ]
    assert not upward


@pytest.mark.parametrize("room", USED)
def test_the_evaluation_and_the_miniature_never_use_the_trainers_runner(room):
    used = {found for name in MODULES if name.startswith(f"{room}.") for found in imports(name) if found.startswith("train")}
    # A command shares the bootstrap in train/__main__.py by its path, not by an import.
    assert used <= USED[room]


def test_no_module_imports_itself_through_others():
    graph = {name: {found for found in imports(name, only_when_imported=True) if found in MODULES} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for found in graph[name]:
                visit(found, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_devtools_import_no_benchmarks_and_neither_imports_tests():
    for folder, others in {"devtools": ("benchmarks", "tests"), "benchmarks": ("tests",)}.items():
        for path in (ROOT / folder).rglob("*.py"):
            imported = re.findall(r"^\s*from (?:\.+|distilled_t5\.)(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert not {*imported} & {*others}, path


def test_every_room_is_packed_and_described():
    packages = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")} - {"devtools", "tests", "benchmarks"}
    assert packages == set(BELOW)
