"""The command: `python <pack>/miniature {vae,teacher,flux,lora,all,prompts,measure,probe} [FILE ...] [options]`."""

from __future__ import annotations

import argparse
import functools
import logging
import runpy
import sys
from pathlib import Path
from typing import Any

WHAT = "which file to make; `all`: all four; `measure`: how often their pictures are right; `probe`: what the teacher's embeddings tell"
PROMPTS, QUESTIONS = 6_000, 200
OUT = Path("miniature-out")


def command_line() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(prog="miniature", description="Make the miniature: a T5 teacher, a Flux and a VAE of a small world.")
    parser.add_argument("what", choices=("vae", "teacher", "flux", "lora", "all", "prompts", "measure", "probe"), help=WHAT)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="measure, probe: encoders besides the teacher")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder of the files and runs (default: {OUT}; of measure and probe: what is shipped)"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (default: as planned for each model)")
    parser.add_argument("--batch", type=int, help="samples per step")
    parser.add_argument("--seed", type=int, help="decides everything that is drawn")
    parser.add_argument("--learning-rate", type=float, help="peak rate of AdamW")
    parser.add_argument("--muon-learning-rate", type=float, help="peak rate of Muon, which moves the matrices of the blocks")
    parser.add_argument("--bf16", action="store_true", default=None, help="compute in bfloat16: faster where the processor knows it")
    parser.add_argument("--compile", action="store_true", help="fuse teacher and Flux with torch.compile: faster, needs a C++ compiler")
    parser.add_argument("--start", type=Path, metavar="FILE", help="flux: begin with the weights of this file instead of random ones")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, bit for bit")
    parser.add_argument(
        "--count", type=int, help=f"prompts to write for each corpus ({PROMPTS:,}), or to measure of each task ({QUESTIONS})"
    )
    parser.add_argument("--comfyui", metavar="DIR", help="folder of ComfyUI (default: the one whose custom_nodes this pack lies in)")
    return parser


def make(options: argparse.Namespace) -> list[Path | None]:
    """Make what is asked for; None stands for what was stopped."""
    from distilled_t5.runtime.comfyui import find_comfyui, start_comfyui
    from distilled_t5.runtime.model_folders import SHIPPED

    options.out = options.out or (SHIPPED if options.what in ("measure", "probe") else OUT)
    comfyui = find_comfyui(options.comfyui)
    start_comfyui(comfyui, [])
    from distilled_t5.miniature import make as workshop
    from distilled_t5.runtime.stop import StopRequest
    from distilled_t5.world.captions import write_prompts

    given: dict[str, Any] = {
        name: getattr(options, name) for name in ("steps", "batch", "seed", "learning_rate", "muon_learning_rate", "bf16")
    }
    if options.what == "prompts":
        return [*write_prompts(options.out / "prompts", options.count or PROMPTS, options.seed or 0)]
    if options.what == "measure":
        measure(options.out, options.files, options.count or QUESTIONS)
        return []
    if options.what == "probe":
        probe(options.out, options.files)
        return []
    made: list[Path | None] = []
    with StopRequest() as stop:
        if options.what in ("vae", "all"):
            made.append(workshop.make_vae(options.out))
        for name, plan, maker in (
            ("teacher", workshop.TEACHER_PLAN, functools.partial(workshop.make_teacher, fuse=options.compile)),
            ("flux", workshop.FLUX_PLAN, functools.partial(workshop.make_flux, fuse=options.compile, start=options.start)),
            ("lora", workshop.LORA_PLAN, workshop.make_lora),
        ):
            # `all --resume` goes on where it was: in a model that has no checkpoint yet it begins.
            resume = options.resume and (options.what == name or (options.out / f"{name}-run" / "checkpoints").is_dir())
            if options.what in (name, "all") and None not in made:
                made.append(maker(options.out, comfyui, workshop.changed(plan, **given), resume=resume, stop=lambda: stop.requested))
    return made


def measure(folder: Path, files: list[Path], count: int) -> None:
    """Print the accuracies of the teacher in `folder` and of other encoders."""
    from distilled_t5.miniature.files import TEACHER_FILE, place
    from distilled_t5.miniature.measure import measure_files, share_of, table

    teacher = place(folder, TEACHER_FILE)
    rows = measure_files(folder, [teacher, *files], count)
    print(table(rows))
    for path in files:
        print(f"{path} keeps {100 * share_of(rows[str(path)], rows[str(teacher)]):.1f} % of the teacher's mean accuracy.")


def probe(folder: Path, files: list[Path]) -> None:
    """Print what the embeddings of the teacher in `folder` and of other encoders tell of a caption."""
    from distilled_t5.miniature.files import TEACHER_FILE, place
    from distilled_t5.miniature.paint import served
    from distilled_t5.miniature.probe import probe as probed

    for path in (place(folder, TEACHER_FILE), *files):
        print(f"{path.name}: {probed(served(path))}")


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
        print("Stopped; go on with --resume." if path is None else f"Done: {path}")
    return 130 if None in made else 0


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).absolute().parents[1] / "train" / "__main__.py"))["register_pack"]()
    sys.exit(main(sys.argv[1:]))
