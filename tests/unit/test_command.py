"""What the commands share: exit status, and output that never ends them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from distilled_t5.runtime.command import exit_status, split_flags
from distilled_t5.train.__main__ import main
from safetensors import SafetensorError

BOOTSTRAP = f"import runpy; runpy.run_path({str(Path(__file__).resolve().parent.parent / 'conftest.py')!r})\n"
# Waits for a line on standard input, prints with every function, and says by its exit status that it reached the end.
PRINTING = """
import os, sys
from distilled_t5.runtime.command import exit_status
from tqdm import tqdm

def run():
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in tqdm(range(50), mininterval=0, desc="\\u65e5\\u672c"):
        print("\\u65e5\\u672c", flush=True)
        tqdm.write("above the bar", file=sys.stderr)
    print("not flushed")
    return 7

sys.exit(exit_status(run, "test"))
"""


def fails(error: BaseException) -> int:
    def run() -> int:
        raise error

    return exit_status(run, "trainer", lambda: "lower batch.")


def test_arguments_after_two_dashes_are_comfyuis():
    assert split_flags(["smoke", "--resume", "--", "--cpu", "--", "x"]) == (["smoke", "--resume"], ["--cpu", "--", "x"])
    assert split_flags(["smoke"]) == (["smoke"], [])


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "Stopped before anything began."),
        (ValueError("x is wrong.\nWhat to do: y."), 1, "x is wrong.\nWhat to do: y."),
        (
            MemoryError(),
            1,
            "Out of memory: MemoryError\nCheckpoints are complete",
        ),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            1,
            "Error while serializing: I/O error: No space left on device (os error 28)\nWhat to do: check that",
        ),
        (PermissionError(13, "Permission denied", "a"), 1, "[Errno 13] Permission denied: 'a'\nWhat to do: check that"),
        (FileNotFoundError(2, "No such file", "a"), 1, "[Errno 2] No such file: 'a'\nWhat to do: check that the file or folder exists"),
    ],
)
def test_an_expected_failure_is_a_sentence_and_an_exit_status(capsys, error, status, message):
    assert fails(error) == status
    assert capsys.readouterr().err.startswith(f"\n{message}")


@pytest.mark.parametrize("recipe", [[], ["all"]], ids=["none", "all"])
@pytest.mark.parametrize("unused", [["--memory", "12gb"], ["--gpu", "H100"], ["--price", "0"], ["--set", "seed=1"]], ids=lambda one: one[0])
def test_what_the_table_of_all_recipes_does_not_use_is_refused(recipe, unused, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*recipe, "--rehearse", *unused])
    assert "name one RECIPE to rehearse with them" in capsys.readouterr().err


def test_a_missing_temporary_folder_is_an_error_that_names_tmpdir(tmp_path, capsys, monkeypatch):
    def run() -> int:
        with tempfile.TemporaryDirectory():
            return 0

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    assert exit_status(run, "trainer") == 1
    shown = capsys.readouterr().err
    assert "No usable temporary directory found" in shown
    assert shown.endswith("TMPDIR names the folder for temporary files.\n")


def test_a_bug_keeps_its_traceback_after_a_sentence(capsys):
    with pytest.raises(KeyError):
        fails(KeyError("weight"))
    assert capsys.readouterr().err.startswith("\nThis is a bug of the trainer, not a mistake of yours.")


def started(stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BOOTSTRAP + PRINTING], stdin=subprocess.PIPE, stdout=stdout, stderr=stderr)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_output_that_the_encoding_lacks_is_escaped(encoding, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    process = started(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.communicate(b"\n")[0]
    assert process.returncode == 7
    assert said.count("\u65e5\u672c".encode() if encoding == "utf-8" else rb"\u65e5\u672c") >= 50


@pytest.mark.skipif(os.name != "posix", reason="pipes of Windows end otherwise")
@pytest.mark.parametrize("both", [False, True], ids=["standard output", "both outputs"])
def test_a_reader_that_leaves_does_not_end_the_command(both):
    process = started(stdout=subprocess.PIPE, stderr=subprocess.STDOUT if both else subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    said = process.stderr.read() if process.stderr else b""
    assert process.wait(timeout=60) == 7
    assert b"BrokenPipe" not in said


@pytest.mark.skipif(os.name != "posix", reason="pseudo terminals are POSIX")
def test_a_terminal_that_is_closed_does_not_end_the_command():
    ours, theirs = pty.openpty()
    process = started(stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert b"ready" in os.read(ours, 100)
    os.close(ours)
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 7
