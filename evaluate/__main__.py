"""The command: `python <pack>/evaluate SUITE [--student FILE ...] [--out DIR] [--set part.key=value ...] [-- COMFYUI FLAGS]`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def trainers_command() -> ModuleType:
    """The trainer's command: this one shares its bootstrap and how it splits flags."""
    start = Path(__file__).resolve().parent.parent / "train" / "__main__.py"
    spec = importlib.util.spec_from_file_location("distilled_t5_bootstrap", start)
    assert spec is not None and spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    return command


def command_line() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="evaluate",
        description="Compare text encoders by their images, in numbers and side by side. What follows -- goes to ComfyUI (--cpu ...). "
        "After an interruption the same command continues.",
    )
    parser.add_argument("suite", help="a suite file, or the name of a shipped one: miniature, quick, paper")
    parser.add_argument(
        "--student", action="append", default=[], metavar="FILE", help="an encoder to compare with the teacher; may be repeated"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of images and results (default: evaluations/NAME-OF-SUITE)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="part.key=value", help="change one value of the suite; may be repeated"
    )
    parser.add_argument("--comfyui", metavar="DIR", help="folder of ComfyUI (default: the one that has this pack in its custom_nodes)")
    return parser


def main(options: argparse.Namespace, flags: list[str]) -> int:
    """Run the command: 0 when it is done, 130 after a stop by signal, 1 after a failure.

    An expected failure prints a message with advice; a bug keeps its traceback.
    """
    try:
        return run(options, flags)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except Exception as error:
        from distilled_t5.runtime.failure import ADVICE, ISSUES, explained

        sentence = explained(error, None)
        fault = f"This is a bug of the evaluation, not of your input.\n{ADVICE}report it at {ISSUES} with the lines below."
        print(f"\n{sentence or fault}", file=sys.stderr, flush=True)
        if sentence is None:
            raise
        return 1


def run(options: argparse.Namespace, flags: list[str]) -> int:
    """Evaluate a suite under ComfyUI started with these flags; the exit status."""
    from distilled_t5.evaluate.suite import load_suite
    from distilled_t5.runtime.comfyui import find_comfyui, start_comfyui

    suite = load_suite(options.suite, options.set)
    start_comfyui(find_comfyui(options.comfyui), flags)
    import torch
    from distilled_t5.runtime.ranks import Ranks

    with Ranks.open("cuda" if torch.cuda.is_available() and "--cpu" not in flags else "cpu") as ranks:
        # Only now: ComfyUI reads the current GPU when it is imported, and each process must read its own.
        from distilled_t5.evaluate.run import evaluate

        path = evaluate(suite, options.student, Path(options.out or Path("evaluations", suite.name)), ranks)
    if ranks.is_main:
        if path is None:
            print("Stopped; the same command continues.")
        else:
            print((path.parent / "table.md").read_text(encoding="utf-8"))
            print(f"Done: {path}\nOpen it in a browser; results.json and table.md are beside it.")
    return 130 if path is None else 0


if __name__ == "__main__":
    command = trainers_command()
    command.register_pack()
    ours, for_comfyui = command.split_flags(sys.argv[1:])
    sys.exit(main(command_line().parse_args(ours), for_comfyui))
