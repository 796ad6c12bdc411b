"""The command: `python <pack>/train RECIPE [--set part.key=value ...] [--run DIR] [--resume] [--comfyui DIR] [-- COMFYUI FLAGS]`.

`python <pack>/train watch | export | card | upload RUN`, `train cache RECIPE` and `train trim FILE` are in `commands`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import traceback
from pathlib import Path


def register_pack() -> None:
    """Import the pack's root as package `distilled_t5`, whatever the name of its folder and the working folder.

    The root must not be on sys.path, where its `nodes` would hide ComfyUI's; neither must the folder of a command, which Python puts there.
    """
    # Not resolved: a pack that is linked into custom_nodes belongs to that ComfyUI.
    root = Path(os.path.abspath(__file__)).parents[1]
    ours = {place.resolve() for place in (root, *(root / command for command in ("train", "miniature", "evaluate")))}
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in ours]
    spec = importlib.util.spec_from_file_location("distilled_t5", root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None and spec.loader is not None
    sys.modules["distilled_t5"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["distilled_t5"])


# The other commands. A recipe file of such a name is given as ./NAME.
COMMANDS = {
    "watch": "show a run's page in a browser",
    "export": "write a checkpoint as an encoder file",
    "card": "write a run's model card",
    "upload": "send a run's student to Hugging Face",
    "cache": "encode the prompts of a recipe with its teacher",
    "trim": "save a text encoder without the layers that its diffusion model does not read",
}


def command_line() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    from distilled_t5.runtime.command import add_comfyui_option, add_recipe

    parser = argparse.ArgumentParser(
        prog="train",
        description="Distil a text encoder. Flags after -- are ComfyUI's (--reserve-vram, --cpu ...).",
        epilog="Other commands, each with --help: " + "; ".join(f"train {name}: {what}" for name, what in COMMANDS.items()) + ".",
    )
    add_recipe(parser, nargs="?")
    parser.add_argument("--run", metavar="DIR", help="folder of the run (default: runs/NAME-OF-RECIPE)")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run's last checkpoint; the steps of its stages and `preview` may differ"
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="measure three steps of each stage and report what the run will take, without training; without RECIPE: of the overnight "
        "recipe for this GPU",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="count memory and operations without weights, GPU or training; without RECIPE, or with all: a table of the shipped recipes",
    )
    parser.add_argument("--memory", metavar="SIZE", help="with --rehearse: whether the run fits a GPU sold with this memory, such as 12gb")
    parser.add_argument("--gpu", metavar="NAME", help='with --rehearse: fit and hours on this GPU, such as "RTX 4090"')
    parser.add_argument(
        "--share", type=float, default=0.4, help="with --rehearse: share of the GPU's published peak that is reached (default: %(default)s)"
    )
    parser.add_argument("--price", type=float, help="with --rehearse: price of one GPU for an hour")
    add_comfyui_option(parser)
    parser.set_defaults(processes=1)
    return parser


def main(argv: list[str]) -> int:
    """Run the command: 0 when it is done, 130 after a stop by signal, 1 after a failure."""
    from distilled_t5.runtime.command import exit_status, split_flags

    ours, flags = split_flags(argv)
    if ours and ours[0] in COMMANDS:
        from distilled_t5.train import commands

        given = commands.command_line().parse_args(ours)
        return exit_status(lambda: commands.run_command(given, flags), "trainer", lambda: commands.memory_advice(given))
    parser = command_line()
    options = parser.parse_args(ours)
    if options.recipe is None and not (options.rehearse or options.estimate):
        parser.error(
            "RECIPE is missing: name one, such as smoke or flux-overnight-24gb; --rehearse alone lists them all, with what each takes"
        )
    if not options.rehearse and (options.memory or options.gpu or options.price):
        parser.error("--memory, --gpu and --price are options of --rehearse")
    if options.rehearse and options.recipe in (None, "all") and (options.memory or options.gpu or options.price is not None or options.set):
        parser.error("--memory, --gpu, --price and --set do not change the table of all recipes: name one RECIPE to rehearse with them")
    if options.rehearse:
        return exit_status(lambda: rehearse(options, flags), "trainer")
    return exit_status(lambda: run(options, flags), "trainer", lambda: memory_advice(options))


def memory_advice(options: argparse.Namespace) -> str:
    """What needs less memory than the run that these options ask for, or than its teacher if the error in progress is of its texts."""
    from distilled_t5.train.models import less_memory, less_memory_for_texts
    from distilled_t5.train.recipe import load_recipe
    from distilled_t5.train.run_directory import RunDirectory
    from distilled_t5.train.teacher_cache import CachedTexts

    recipe = load_recipe(options.recipe, options.set)
    if any(frame.f_code is CachedTexts.make.__code__ for frame, _ in traceback.walk_tb(sys.exc_info()[2])):
        return less_memory_for_texts(recipe)
    saved = not options.estimate and RunDirectory(options.run or Path("runs", recipe.name)).has_checkpoints
    again = "continue with --resume" if saved else "run the same command again"
    first = "start a new run from the last student.safetensors (student.start) and " if saved else ""
    return (
        f"{again} (on a GPU with -- --reserve-vram 2, which keeps 2 GB more of it free).\n"
        f"If that is not enough, {first}{less_memory(recipe, options.processes)}"
    )


def recipe_for_this_gpu() -> str:
    """The shipped recipe for the memory of this process's GPU. Raises UserError without one."""
    import comfy.model_management
    from distilled_t5.families import FAMILIES
    from distilled_t5.runtime.errors import UserError
    from distilled_t5.train.memory import shipped_for, stated_gb

    device = comfy.model_management.get_torch_device()
    total = 0 if device.type == "cpu" else comfy.model_management.get_total_memory(device)
    if name := shipped_for(total, FAMILIES["flux"]):
        return name
    smallest = f"{device} has {total / 1e9:.1f} GB; the smallest overnight recipe is made for {min(stated_gb(FAMILIES['flux']))} GB"
    raise UserError(
        f"{smallest if total else 'No GPU was found'}: --estimate without RECIPE measures the overnight recipe for this machine's GPU.",
        "name a recipe, such as smoke; --rehearse alone lists them all, with what each takes.",
    )


def rehearse(options: argparse.Namespace, flags: list[str]) -> int:
    """Print what a recipe takes, counted on fake tensors; the exit status."""
    from distilled_t5.runtime.comfyui import find_comfyui, start_comfyui
    from distilled_t5.train.recipe import load_recipe

    recipe = None if options.recipe in (None, "all") else load_recipe(options.recipe, options.set)
    # As on NVIDIA's GPUs, where ComfyUI chooses it itself.
    chosen = [] if any(flag.startswith("--use-") and flag.endswith("attention") for flag in flags) else ["--use-pytorch-cross-attention"]
    start_comfyui(find_comfyui(options.comfyui), [*flags, *chosen])
    from distilled_t5.train.rehearsal_report import Question, report, table

    question = Question.of(options.memory, options.gpu, options.share, options.price)
    for line in table(question.share, flags) if recipe is None else [report(recipe, question, flags)]:
        print(line, flush=True)
    return 0


def run(options: argparse.Namespace, flags: list[str]) -> int:
    """Train or estimate a recipe under ComfyUI started with these flags; the exit status."""
    from distilled_t5.runtime.comfyui import check_output_folder, find_comfyui, start_comfyui
    from distilled_t5.train.preflight import preflight
    from distilled_t5.train.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set) if options.recipe else None
    device_type = start_comfyui(find_comfyui(options.comfyui), flags, before_torch=lambda: preflight(recipe) if recipe else None)
    from distilled_t5.runtime.ranks import Ranks

    with Ranks.open(device_type) as ranks:
        options.processes = ranks.world
        # Only now: ComfyUI selects the current GPU when it is imported, which must be that of the process.
        from distilled_t5.train.estimate import estimate
        from distilled_t5.train.run import train
        from distilled_t5.train.run_directory import RunDirectory

        if recipe is None:
            options.recipe = recipe_for_this_gpu()
            preflight(recipe := load_recipe(options.recipe, options.set))
        if options.estimate:
            report = estimate(recipe, ranks)
            if ranks.is_main:
                print(report)
            return 0
        if ranks.is_main:
            check_output_folder()
        paths = train(recipe, Path(options.run or Path("runs", recipe.name)), options.resume, ranks)
    if paths is not None:
        done, listed = "\n".join(f"Done: {path}" for path in paths), "it" if len(paths) == 1 else "them"
        print(f"{done}\nDistilled Text Encoder Loader lists {listed} after a refresh (key R).")
    elif ranks.is_main:
        saved = RunDirectory(options.run or Path("runs", recipe.name)).has_checkpoints
        print("Stopped; continue with --resume." if saved else "Stopped before the first step; run the same command again.")
        return 130
    return 0


if __name__ == "__main__":
    register_pack()
    sys.exit(main(sys.argv[1:]))
