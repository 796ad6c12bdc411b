"""The command: `python <pack>/evaluate SUITE [--student [NAME=]FILE ...] [--limit N] [--out DIR] [--set KEY=VALUE ...] [-- FLAGS]`."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path


def command_line() -> argparse.ArgumentParser:
    """What the command takes."""
    from distilled_t5.runtime.command import add_comfyui_option

    parser = argparse.ArgumentParser(
        prog="evaluate",
        description="Compare text encoders by their images, in numbers and side by side. Flags after -- are ComfyUI's (--cpu ...). "
        "After an interruption, the same command continues. Students of earlier evaluations in the same folder are compared, too.",
    )
    shipped = sorted(path.stem for path in Path(__file__).parent.glob("suites/*.toml"))
    parser.add_argument("suite", help=f"a suite file, or the name of a shipped one: {', '.join(shipped)}")
    parser.add_argument(
        "--student",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="an encoder to compare with the teacher, and what to call it (default: as its file); may be repeated",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use at most N prompts of each task")
    parser.add_argument("--out", metavar="DIR", help="folder of images and results (default: evaluations/NAME-OF-SUITE)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="part.key=value", help="change one value of the suite; may be repeated"
    )
    add_comfyui_option(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run the command: 0 when it is done, 130 after a stop by signal, 1 after a failure."""
    from distilled_t5.runtime.command import exit_status, split_flags

    ours, flags = split_flags(argv)
    options = command_line().parse_args(ours)
    return exit_status(lambda: run(options, flags), "evaluation")


def run(options: argparse.Namespace, flags: list[str]) -> int:
    """Evaluate a suite under ComfyUI started with these flags; the exit status."""
    from distilled_t5.evaluate.suite import load_suite
    from distilled_t5.runtime.comfyui import find_comfyui, start_comfyui

    suite = load_suite(options.suite, options.set, options.limit)
    device_type = start_comfyui(find_comfyui(options.comfyui), flags)
    from distilled_t5.runtime.ranks import Ranks

    with Ranks.open(device_type) as ranks:
        # Only now: ComfyUI selects the current GPU when it is imported, which must be that of the process.
        from distilled_t5.evaluate.run import evaluate

        path = evaluate(suite, options.student, Path(options.out or Path("evaluations", suite.name)), ranks)
    if ranks.is_main:
        if path is None:
            print("Stopped; the same command continues.")
        else:
            print("\n" + (path.parent / "summary.txt").read_text(encoding="utf-8"))
            beside = [name for name in ("results.json", "table.md", "plots/") if (path.parent / name).exists()]
            print(f"Done: {path}\nOpen it in a browser. In the same folder: {', '.join(beside)}.")
    return 130 if path is None else 0


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).absolute().parents[1] / "train" / "__main__.py"))["register_pack"]()
    sys.exit(main(sys.argv[1:]))
