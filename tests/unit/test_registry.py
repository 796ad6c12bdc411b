"""The Comfy registry's rules, checked on the very archive that its own tool builds from this tree."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
NOT_SOURCES = (".git", ".venv", ".dev", "demo-output", "__pycache__", "node.zip", "build", "dist", "*.egg-info", "*.pyc", ".*_cache")
IN_ARCHIVE = {
    *("__init__.py", "pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE"),
    *("runtime", "config", "prompts", "students", "families", "encoder", "diffusion", "world", "nodes", "train", "evaluate", "miniature"),
    *("recipes", "example_workflows", "subgraphs", "web", "locales"),
}
# What the registry's scanner searches for, word for word: one hit flags the version.
TRIPWIRES = (
    *("os.environ", "os.getenv(", "subprocess.", "os.system(", "requests.", "urlopen(", "aiohttp.ClientSession"),
    *("socket.", ".connect(", ".bind(", "eval(", "exec(", "pickle", "torch.load("),
)
# The one process that the pack starts: the system's Tesseract, where a user chose it (CONTRIBUTING, Rules).
DECLARED = ("evaluate/readers.py", "subprocess.")
OPERATING_SYSTEMS = ("OS Independent", "Microsoft :: Windows", "POSIX :: Linux", "MacOS")
ENVIRONMENTS = ("GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "GPU :: Apple Metal", "NPU :: Huawei Ascend")
# Fields of the node API, and the first ComfyUI with them.
NEEDS_COMFYUI = {"advanced=": (0, 10, 0), "search_aliases=": (0, 11, 0), "NodeReplace(": (0, 14, 0), "has_intermediate_output=": (0, 19, 0)}


def tool(name: str) -> str:
    """One of the registry's checkers, which dev.py installs."""
    path = ROOT / ".dev" / "tools" / ("Scripts" if os.name == "nt" else "bin") / (f"{name}.exe" if os.name == "nt" else name)
    assert path.exists(), f"{path} is missing: run `python dev.py test`, which installs it."
    return str(path)


def run(folder: Path, *command: str) -> tuple[int, str]:
    """Exit status and output of a tool in `folder`, without telemetry, a terminal or the user's own settings."""
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder / ".config"), "USERPROFILE": str(folder)}
    environment = os.environ | home | {"DO_NOT_TRACK": "1", "PYTHONUTF8": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, in which tools may write."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("registry") / "distilled-t5", ignore=shutil.ignore_patterns(*NOT_SOURCES)))


@pytest.fixture(scope="module")
def archive(tree: Path) -> Path:
    """The unpacked archive that `comfy node pack` builds."""
    code, output = run(tree, tool("comfy"), "--skip-prompt", "node", "pack")
    assert code == 0, output
    folder = tree.parent / "archive"
    with zipfile.ZipFile(tree / "node.zip") as bundle:
        bundle.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    """pyproject.toml, parsed."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_registrys_validation_reports_nothing(tree: Path) -> None:
    code, output = run(tree, tool("comfy"), "--skip-prompt", "node", "validate")
    assert code == 0
    assert "All validation checks passed" in output
    assert "warning" not in output.lower()
    assert "error" not in output.lower()


@pytest.mark.slow
def test_a_wheel_can_be_built_and_holds_every_package_of_the_archive(tree: Path, archive: Path) -> None:
    program = "from setuptools import build_meta; print(build_meta.build_wheel('wheel'))"
    (tree / "wheel").mkdir()
    code, output = run(tree, sys.executable, "-c", program)
    assert code == 0, output
    with zipfile.ZipFile(next((tree / "wheel").glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    modules = {f"distilled_t5/{path.relative_to(archive).as_posix()}" for path in archive.rglob("*.py")}
    assert modules <= names


def test_name_is_the_repositorys_name_and_does_not_say_comfyui(pyproject: dict[str, Any]) -> None:
    name, urls = pyproject["project"]["name"], pyproject["project"]["urls"]
    assert urls["Repository"].rsplit("/", 1)[-1] == name
    assert "comfyui" not in name.lower()


def picture(address: str) -> Image.Image:
    """The file of this tree at an address on the main branch."""
    path = urlparse(address).path.split("/main/", 1)[1]
    return Image.open(ROOT / path)


def test_icon_is_a_square_of_at_most_400_pixels(pyproject: dict[str, Any]) -> None:
    with picture(pyproject["tool"]["comfy"]["Icon"]) as icon:
        assert icon.width == icon.height
        assert icon.width <= 400


def test_banner_is_21_to_9(pyproject: dict[str, Any]) -> None:
    with picture(pyproject["tool"]["comfy"]["Banner"]) as banner:
        assert banner.width * 9 == banner.height * 21


def test_publisher_and_display_name_are_given_and_the_web_folder_is_not_loaded_twice(pyproject: dict[str, Any]) -> None:
    comfy = pyproject["tool"]["comfy"]
    assert comfy["PublisherId"] == "distilled-t5"
    assert comfy["DisplayName"] == "Distilled T5"
    assert "web" not in comfy


def test_required_comfyui_is_well_formed_and_new_enough_for_every_field_used(pyproject: dict[str, Any]) -> None:
    required = pyproject["tool"]["comfy"]["requires-comfyui"]
    bound = re.fullmatch(r">=(\d+)\.(\d+)\.(\d+)", required)
    assert bound, required
    version = tuple(map(int, bound.groups()))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").rglob("*.py"))
    too_new = {field: since for field, since in NEEDS_COMFYUI.items() if field in sources and since > version}
    assert not too_new


def test_required_comfyui_is_the_oldest_version_that_dev_py_tests(pyproject: dict[str, Any]) -> None:
    versions = json.loads((ROOT / "devtools" / "set_up.json").read_text(encoding="utf-8"))["comfyui"]
    assert pyproject["tool"]["comfy"]["requires-comfyui"] == f">={next(iter(versions))}"


def test_the_registry_knows_all_classifiers(pyproject: dict[str, Any]) -> None:
    classifiers = pyproject["project"]["classifiers"]
    systems = [name.split(" :: ", 1)[1] for name in classifiers if name.startswith("Operating System")]
    environments = [name.split(" :: ", 1)[1] for name in classifiers if name.startswith("Environment")]
    assert systems
    assert set(systems) <= set(OPERATING_SYSTEMS)
    assert environments
    assert set(environments) <= set(ENVIRONMENTS)


def test_addresses_are_complete_and_point_to_the_repository(pyproject: dict[str, Any]) -> None:
    urls = pyproject["project"]["urls"]
    assert {"Homepage", "Repository", "Documentation", "Issues"} <= set(urls)
    assert all(address.startswith(urls["Repository"]) for address in urls.values())
    assert urls["Repository"].startswith("https://github.com/")


def test_licence_is_the_full_text_of_the_one_that_is_declared(pyproject: dict[str, Any]) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert pyproject["project"]["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_version_is_the_same_in_pyproject_package_and_changelog(pyproject: dict[str, Any]) -> None:
    package = re.search(r'^__version__ = "(.+)"$', (ROOT / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    changelog = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert package
    assert changelog
    assert package[1] == changelog[1] == pyproject["project"]["version"]


def test_there_is_no_dependency_that_could_conflict_with_comfyuis(pyproject: dict[str, Any]) -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert pyproject["project"]["dependencies"] == []
    assert [line for line in lines if line.strip() and not line.startswith("#")] == []


def test_installing_runs_no_code(archive: Path) -> None:
    assert not [name for name in ("install.py", "prestartup_script.py", "uninstall.py", "setup.py") if (archive / name).exists()]


def test_archive_holds_what_a_user_needs_and_nothing_else(archive: Path) -> None:
    names = {path.name for path in archive.iterdir()}
    assert names <= IN_ARCHIVE
    assert names >= {
        name for name in IN_ARCHIVE if (ROOT / name).exists() and any((ROOT / name).rglob("*") if (ROOT / name).is_dir() else "x")
    }
    assert not [path for path in archive.rglob("*") if path.name == "__pycache__" or path.suffix in (".pyc", ".js")]


def test_archive_holds_the_weights_of_the_miniature_and_no_others(archive: Path) -> None:
    weights = list(archive.rglob("*.safetensors"))
    assert {path.relative_to(archive).parts[:2] for path in weights} <= {("miniature", "models")}
    assert sum(path.stat().st_size for path in weights) <= 40e6


def test_archive_has_no_scanner_tripwire_but_the_declared_one(archive: Path) -> None:
    hits = [
        (path.relative_to(archive).as_posix(), word, number)
        for path in sorted(archive.rglob("*"))
        if path.is_file()
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        for word in TRIPWIRES
        if word.encode() in line
    ]
    assert [hit[:2] for hit in hits] == [DECLARED], hits
    hidden = re.compile(r"^\s*from (subprocess|socket|pickle|requests|urllib)\b|^\s*from os import .*(environ|getenv|system)", re.MULTILINE)
    assert not [path for path in archive.rglob("*.py") if hidden.search(path.read_text(encoding="utf-8"))], "words that the scanner misses"


def test_ruff_finds_no_exec_eval_or_semicolon_in_the_archive(archive: Path) -> None:
    code, output = run(archive, sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "S102,S307,E702", ".")
    assert code == 0, output


def test_comfy_test_lint_passes_on_the_archive(archive: Path) -> None:
    code, output = run(archive, tool("comfy-test"), "lint", "--strict", ".")
    assert code == 0, output
    assert "Warnings" not in output, output


def test_managers_scanner_can_read_every_node_id_without_running_the_pack(archive: Path) -> None:
    ids = {}
    for path in (archive / "nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and "define_schema" in ast.unparse(node):
                assert [ast.unparse(base) for base in node.bases] == ["io.ComfyNode"], node.name
                [given] = [word.value for word in ast.walk(node) if isinstance(word, ast.keyword) and word.arg == "node_id"]
                assert isinstance(given, ast.Constant), f"{node.name}: {ast.unparse(given)}"
                ids[node.name] = given.value
    frozen = json.loads((ROOT / "tests" / "comfyui" / "schemas.json").read_text(encoding="utf-8"))
    assert ids == {name: name for name in frozen}


def test_every_python_source_can_be_read_on_a_windows_console(tree: Path) -> None:
    sources = {path.relative_to(tree).as_posix(): path.read_text(encoding="utf-8") for path in tree.rglob("*.py")}
    assert len(sources) > 10
    beyond = {name: sorted({sign for sign in text if not sign.encode("cp1252", "ignore")}) for name, text in sources.items()}
    assert not {name: signs for name, signs in beyond.items() if signs}
