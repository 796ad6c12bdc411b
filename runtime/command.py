"""What the commands share: arguments for ComfyUI after `--`, exit status, a terminal that may be closed.

Imports the standard library alone: this must also run in a Python that lacks the packages.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .failure import ADVICE, ISSUES, explained


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of the command, and those for ComfyUI after `--`."""
    return (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])


def add_comfyui_option(parser: argparse.ArgumentParser) -> None:
    """Add --comfyui, which `find_comfyui` takes."""
    default = "the one in whose custom_nodes this pack is, else the one that dev.py set up"
    parser.add_argument("--comfyui", metavar="DIR", help=f"folder of ComfyUI (default: {default})")


def add_recipe(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """Add the recipe and --set, of the trainer's commands."""
    parser.add_argument("recipe", metavar="RECIPE", nargs=nargs, help="a recipe file, or the name of a shipped one, such as smoke")
    parser.add_argument(
        "--set", action="append", default=[], metavar="part.key=value", help="change one value of the recipe; may be repeated"
    )


def exit_status(run: Callable[[], int], command: str, memory_advice: Callable[[], str] | None = None) -> int:
    """The exit status of `run`: its own, 130 after Ctrl-C, 1 after an expected failure, which is printed. A bug keeps its traceback."""
    with contextlib.redirect_stdout(Terminal(sys.stdout)), contextlib.redirect_stderr(Terminal(sys.stderr)):
        try:
            return run()
        except KeyboardInterrupt:
            sys.stderr.write("\nStopped before anything began.\n")
            return 130
        except Exception as error:
            bug = (
                f"This is a bug of the {command}, not a mistake of yours. Checkpoints and finished files are complete.\n"
                f"{ADVICE}report it at {ISSUES} with the command and the lines below."
            )
            sentence = explained(error, memory_advice)
            sys.stderr.write(f"\n{sentence or bug}\n")
            if sentence is None:
                raise
            return 1
        finally:
            sys.stdout.flush()


class Terminal:
    """An output stream that never ends the command: after the terminal or the reader of a pipe is gone, output is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._dropped_if_closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropped_if_closed():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropped_if_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
