"""The command: `python <pack>/train RECIPE [--set part.key=value ...] [--run DIR] [--resume] [--comfyui DIR] [-- COMFYUI FLAGS]`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any


def register_pack() -> None:
    """Import the pack's root as package `distilled_t5`, whatever its folder is called and wherever the command was started.

    The root must not lie on sys.path, where its `nodes` would hide ComfyUI's; neither must the folder of the command, which Python puts
    there (this one, or that of another command that begins here too).
    """
    root = Path(__file__).resolve().parent.parent
    ours = (root, *(root / command for command in ("train", "miniature", "evaluate")))
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in ours]
    spec = importlib.util.spec_from_file_location("distilled_t5", root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None and spec.loader is not None
    sys.modules["distilled_t5"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["distilled_t5"])


def command_line() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog="train", description="Distil a text encoder. What follows -- goes to ComfyUI (--reserve-vram, --cpu ...)."
    )
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one, such as smoke")
    parser.add_argument(
        "--set", action="append", default=[], metavar="part.key=value", help="change one value of the recipe; may be given often"
    )
    parser.add_argument("--run", metavar="DIR", help="folder of the run (default: runs/NAME-OF-RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument(
        "--estimate", action="store_true", help="measure three steps of each stage, say what the run will take, train nothing"
    )
    parser.add_argument("--comfyui", metavar="DIR", help="folder of ComfyUI (default: the one whose custom_nodes this pack lies in)")
    return parser


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and those for ComfyUI behind `--`."""
    return (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])


def main(argv: list[str]) -> int:
    """Run the command: 0 when it is done, 130 after a stop by signal, 1 after a failure.

    An expected failure is a sentence with advice on the terminal; a fault of ours keeps its traceback.
    """
    ours, flags = split_flags(argv)
    options = command_line().parse_args(ours)
    recipe: Any = None
    try:
        from distilled_t5.train.recipe import load_recipe

        recipe = load_recipe(options.recipe, options.set)
        return run(recipe, options, flags)
    except KeyboardInterrupt:
        print("\nStopped before training began.", file=sys.stderr)
        return 130
    except Exception as error:
        from distilled_t5.runtime.failure import BUG, explained

        sentence = explained(error, recipe)
        print(f"\n{sentence or BUG}", file=sys.stderr, flush=True)
        if sentence is None:
            raise
        return 1


def run(recipe: Any, options: argparse.Namespace, flags: list[str]) -> int:
    """Train or estimate a recipe under ComfyUI started with these flags; the exit status."""
    from distilled_t5.runtime.comfyui import check_output_folder, find_comfyui, start_comfyui

    start_comfyui(find_comfyui(options.comfyui), flags)
    import torch
    from distilled_t5.runtime.ranks import Ranks
    from distilled_t5.train.smoke_models import STAND_IN

    if recipe.diffusion_model.file == STAND_IN:
        # Models this small gain nothing from threads, and lose minutes to those that wait for a busy core (14 s against 143 s seen).
        torch.set_num_threads(1)
    with Ranks.open("cuda" if torch.cuda.is_available() and "--cpu" not in flags else "cpu") as ranks:
        # Only now: ComfyUI looks at the current GPU when it is imported, and each process shall look at its own.
        from distilled_t5.train.estimate import estimate
        from distilled_t5.train.run import train

        if options.estimate:
            said = estimate(recipe, ranks)
            if ranks.is_main:
                print(said)
            return 0
        if ranks.is_main:
            check_output_folder()
        path = train(recipe, Path(options.run or Path("runs", recipe.name)), options.resume, ranks)
    if path is not None:
        print(f"Done: {path}\nDistilled T5 Loader lists it after a refresh (key R).")
    elif ranks.is_main:
        print("Stopped; go on with --resume.")
        return 130
    return 0


if __name__ == "__main__":
    register_pack()
    sys.exit(main(sys.argv[1:]))
