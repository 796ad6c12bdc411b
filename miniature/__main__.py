"""The command: `python <pack>/miniature {vae,teacher,flux,lora,sd3,all,prompts} [options]`."""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

PROMPTS = 6_000


def command_line() -> argparse.ArgumentParser:
    """The options of the command."""
    from distilled_t5.runtime.command import add_comfyui_option

    parser = argparse.ArgumentParser(prog="miniature", description="Make the miniature: a T5, a Flux, an SD3 and a VAE of a small world.")
    what = ("vae", "teacher", "flux", "lora", "sd3", "all", "prompts")
    parser.add_argument("what", choices=what, help="the file to make; all: every model; prompts: captions for the trainer")
    parser.add_argument("--out", type=Path, default=Path("miniature-out"), metavar="DIR", help="folder of files and runs (%(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the plan of each model)")
    parser.add_argument("--batch", type=int, help="samples per step")
    parser.add_argument("--seed", type=int, help="seed of all random numbers")
    parser.add_argument("--learning-rate", type=float, help="peak learning rate of AdamW")
    parser.add_argument("--muon-learning-rate", type=float, help="peak learning rate of Muon, which trains the matrices of the blocks")
    parser.add_argument("--bf16", action="store_true", default=None, help="compute in bfloat16, which is faster on some processors")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint, bit for bit")
    parser.add_argument("--count", type=int, default=PROMPTS, help="prompts: captions of each corpus (%(default)s)")
    add_comfyui_option(parser)
    return parser


def make(options: argparse.Namespace) -> list[Path | None]:
    """Make the files that `options` name; None stands for a training that was stopped."""
    from distilled_t5.runtime.comfyui import find_comfyui, start_comfyui

    comfyui = find_comfyui(options.comfyui)
    start_comfyui(comfyui, [])
    from distilled_t5.miniature import make as makers
    from distilled_t5.runtime.stop import StopRequest
    from distilled_t5.world.captions import write_prompts

    if options.what == "prompts":
        return [*write_prompts(options.out / "prompts", options.count, options.seed or 0)]
    names = ("steps", "batch", "seed", "learning_rate", "muon_learning_rate", "bf16")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(options, name)) is not None}
    made: list[Path | None] = [makers.make_vae(options.out)] if options.what in ("vae", "all") else []
    with StopRequest() as stop:
        for name, (plan, maker) in makers.TRAINED.items():
            # `all --resume` starts a model that has no checkpoint yet.
            resume = options.resume and (options.what == name or (options.out / f"{name}-run" / "checkpoints").is_dir())
            if options.what in (name, "all") and None not in made:
                made.append(maker(options.out, comfyui, replace(plan, **given), resume, lambda: stop.requested))
    return made


def main(argv: list[str]) -> int:
    """Run the command: 0 when it is done, 130 after a stop by signal, 1 after a failure."""
    from distilled_t5.runtime.command import exit_status

    options = command_line().parse_args(argv)
    return exit_status(lambda: run(options), "miniature")


def run(options: argparse.Namespace) -> int:
    """Make what is asked for and print where it is; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made = make(options)
    for path in made:
        print("Stopped. Continue with --resume." if path is None else f"Done: {path}")
    return 130 if None in made else 0


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).absolute().parents[1] / "train" / "__main__.py"))["register_pack"]()
    sys.exit(main(sys.argv[1:]))
