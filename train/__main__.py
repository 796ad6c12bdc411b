"""The command: `python <pack>/train RECIPE [--set part.key=value ...] [--run DIR] [--resume] [--comfyui DIR] [-- COMFYUI FLAGS]`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any


def register_pack() -> None:
    """Import the pack's root as package `distilled_t5`, whatever its folder is called and wherever the command was started.

    The root must not be on sys.path, where its `nodes` would hide ComfyUI's; neither must the folder of the command, which Python puts
    there (this one, or that of another command that shares this function).
    """
    root = Path(__file__).resolve().parent.parent
    folders = (root, *(root / command for command in ("train", "miniature", "evaluate")))
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in folders]
    spec = importlib.util.spec_from_file_location("distilled_t5", root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None and spec.loader is not None
    sys.modules["distilled_t5"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["distilled_t5"])


def command_line() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="train", description="Distil a text encoder. Arguments after -- are passed to ComfyUI (--reserve-vram, --cpu ...)."
    )
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one, such as smoke")
    parser.add_argument(
        "--set", action="append", default=[], metavar="part.key=value", help="change one value of the recipe; may be repeated"
    )
    parser.add_argument("--run", metavar="DIR", help="folder of the run (default: runs/NAME-OF-RECIPE)")
    parser.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint")
    parser.add_argument(
        "--estimate", action="store_true", help="measure three steps of each stage and report what the run will take, without training"
    )
    parser.add_argument("--comfyui", metavar="DIR", help="folder of ComfyUI (default: the one whose custom_nodes contains this pack)")
    return parser


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and those for ComfyUI after `--`."""
    return (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])


def main(argv: list[str]) -> int:
    """Run the command; its exit status is 0 on success, 130 after a stop by signal, 1 after a failure.

    An expected failure is printed as a message with advice; a bug also as a traceback.
    """
    arguments, flags = split_flags(argv)
    options = command_line().parse_args(arguments)
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

        message = explained(error, recipe)
        print(f"\n{message or BUG}", file=sys.stderr, flush=True)
        if message is None:
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
        # Models this small do not gain from threads, which wait for each other on a busy machine (143 s instead of 14 s measured).
        torch.set_num_threads(1)
    with Ranks.open("cuda" if torch.cuda.is_available() and "--cpu" not in flags else "cpu") as ranks:
        # Imported here: ComfyUI reads the current GPU on import, and each process has its own.
        from distilled_t5.train.estimate import estimate
        from distilled_t5.train.run import train

        if options.estimate:
            report = estimate(recipe, ranks)
            if ranks.is_main:
                print(report)
            return 0
        if ranks.is_main:
            check_output_folder()
        path = train(recipe, Path(options.run or Path("runs", recipe.name)), options.resume, ranks)
    if path is not None:
        print(f"Done: {path}\nDistilled T5 Loader lists it after a refresh (key R).")
    elif ranks.is_main:
        print("Stopped; continue with --resume.")
        return 130
    return 0


if __name__ == "__main__":
    register_pack()
    sys.exit(main(sys.argv[1:]))
