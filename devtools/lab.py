"""`python dev.py lab`: students of the miniature, trained by many sequences of objectives; their share of the teacher against arithmetic.

The arms are in benchmarks/lab.toml. Each run is the trainer's command and then the evaluation's; one seed of all arms comes before the
second. What is done is kept, so a stopped command continues where it was.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ..runtime.disk import replace_file, sha256
from ..runtime.lock import lock
from ..runtime.model_folders import SHIPPED
from ..train.recipe import load_recipe
from .comfyui.ending import run_to_its_end
from .commands import ROOT, run_all
from .docs.lab_tables import tables, write
from .lab_arms import FAMILIES, PRETRAINED, TEXTS, Counted, Lab
from .lab_results import RESULTS, results
from .lab_run import Run, evaluation
from .miniature import processes

RUNS = ROOT / ".dev" / "lab"
SEEDS, HOURS = 3, 10
# --quick: the first arms, with so many steps in each stage and so many images of each task.
QUICK_ARMS, QUICK_STEPS, QUICK_IMAGES = 2, 2, 2


@dataclass(frozen=True)
class Work:
    """Where the lab of one family keeps what its runs share, and ComfyUI; `shared`: the digest of what decides every run."""

    folder: Path
    comfyui: Path
    shared: str = ""

    @property
    def pretrained(self) -> Path:
        return self.folder / f"pretrained-{self.shared}.safetensors"

    @property
    def teacher(self) -> Path:
        """The evaluation of the teacher alone, whose images every other one takes."""
        return self.folder / f"teacher-{self.shared}"

    @property
    def suite(self) -> Path:
        return self.folder / "suite.toml"


def write_suite(name: str, path: Path, limit: int | None) -> None:
    """The miniature's suite with the six tasks and nothing that is measured beside images."""
    from ..evaluate.metrics import PROBES
    from ..evaluate.suite import load_suite
    from ..world.pictures import TASKS

    suite = load_suite(name, ["page.prompts=1"], limit)
    without = {probe.table_name: None for probe in PROBES.values() if probe.part}
    tasks = tuple(task for task in suite.tasks if task.name in TASKS)
    replace_file(path, suite.model_copy(update={**without, "tasks": tasks}).to_toml().encode())


def decisive(lab: Lab, work: Work) -> str:
    """A digest of what decides every run besides its recipe.

    That is the pack's sources, the versions of ComfyUI and torch, the suite, and the model files that recipe and suite name.
    """
    from ..evaluate.provenance import sources_sha256
    from ..runtime.comfyui import version_of
    from .lab_pretrain import sources

    texts = [load_recipe(lab.recipe).to_toml(), work.suite.read_text(encoding="utf-8")]
    models = [sha256(path) for path in sorted(SHIPPED.rglob("*.safetensors")) if any(path.name in text for text in texts)]
    parts = [sources_sha256(), sources(), version_of(work.comfyui), metadata.version("torch"), *texts, *models]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def runs_of(lab: Lab, work: Work, seeds: int) -> list[tuple[Run, tuple[str, ...]]]:
    """Every run in its order, with the values of `--set` that make it. A run of other sources or models has another folder."""
    found, files = [], {PRETRAINED: work.pretrained, TEXTS: work.folder / TEXTS}
    for seed in range(seeds):
        for arm in lab.arms:
            overrides = arm.overrides(lab.recipe, lab.settings, seed, files)
            shipped = SHIPPED / "text_encoders" / f"{lab.shipped}.safetensors" if lab.shipped and not found else None
            decides = (work.shared, lab.load(arm, seed, files).sha256, sha256(shipped) if shipped else "")
            digest = hashlib.sha256("".join(decides).encode()).hexdigest()[:8]
            run = Run(work.folder / "runs" / f"{arm.name}-seed-{seed}-{digest}", arm.name, seed, shipped)
            found.append((run, overrides))
    return found


def prepare(lab: Lab, work: Work, asked: Iterable[str], at_once: int) -> None:
    """What runs of the arms that are asked for share: the teacher's images, and the pretrained student."""
    due = []
    if not (work.teacher / "results.json").is_file():
        due.append(evaluation(work.suite, work.teacher, work.comfyui))
    started = [arm for arm in lab.arms if arm.name in asked and arm.pretrained]
    if started and not work.pretrained.is_file():
        due.append(["-m", "distilled_t5.devtools.lab_pretrain", lab.recipe, "--out", work.pretrained, "--comfyui", work.comfyui])
    run_all(due, at_once)


def due(lab: Lab, work: Work, runs: Iterable[tuple[Run, tuple[str, ...]]], until_s: float) -> Iterator[list[str | Path]]:
    """The commands of the runs that are not done, until the time is over."""
    for run, overrides in runs:
        if run.done:
            continue
        if time.monotonic() >= until_s:
            print("The time of --hours is over: the same command continues.")
            return
        print(f"{run.arm}, seed {run.seed}: {run.folder}", flush=True)
        yield run.prepare(lab.recipe, overrides, work.suite, work.teacher, work.comfyui)


def command_line() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's main.py")
    parser.add_argument("--hours", type=int, default=HOURS, help="start no run after so many hours (default: 10; 0: only the tables)")
    parser.add_argument("--family", choices=FAMILIES, default="flux", help="diffusion model of the miniature (default: flux)")
    names = [*dict.fromkeys(arm.name for family in FAMILIES for arm in Lab.read(family).arms)]
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=names, help="train only these arms: " + ", ".join(names))
    parser.add_argument("--quick", action="store_true", help="a trial in minutes: two arms, two steps; changes nothing in the pack")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: .dev/lab; with --quick, .dev/lab/quick)")
    parser.add_argument("--processes", type=int, help="runs at the same time (default: one per core)")
    return parser


def planned(options: argparse.Namespace, work: Work) -> Lab:
    """The arms with their arithmetic."""
    from ..runtime.comfyui import start_comfyui

    started = functools.cache(lambda: start_comfyui(options.comfyui, ["--cpu"]))
    lab = Lab.read(options.family)
    if options.quick:
        lab = replace(lab, arms=tuple(arm.shortened(QUICK_STEPS) for arm in lab.arms[:QUICK_ARMS]))
        lab = replace(lab, settings=(*lab.settings, "optimizer.warmup_steps=1"), shipped="")
    counted = Counted(work.folder / "flops.json", started)
    return lab.planned(counted.tflop, lambda: counted.pretraining_tflop(lab.recipe, work.comfyui))


def make(options: argparse.Namespace) -> None:
    """Train, evaluate, and write the results; with --quick, what the pack holds stays as it is."""
    begin_s, at_once = time.monotonic(), options.processes or processes()
    work = Work((options.runs or (RUNS / "quick" if options.quick else RUNS)).resolve() / options.family, options.comfyui.resolve())
    work.folder.mkdir(parents=True, exist_ok=True)
    with lock(work.folder, "--runs"):
        lab = planned(options, work)
        write_suite(lab.suite, work.suite, QUICK_IMAGES if options.quick else None)
        work = replace(work, shared=decisive(lab, work))
        runs = runs_of(lab, work, 1 if options.quick else SEEDS)
        try:
            if options.hours:
                asked = {*(options.only or [arm.name for arm in lab.arms])}
                prepare(lab, work, asked, at_once)
                run_all(due(lab, work, [one for one in runs if one[0].arm in asked], begin_s + 3600 * options.hours), at_once)
        finally:
            if not options.hours or any(run.done for run, _ in runs):
                publish(options, results(lab, [run for run, _ in runs], "python dev.py lab"), work)


def publish(options: argparse.Namespace, found: dict[str, Any], work: Work) -> None:
    """Write the results of a family, and without --quick those of the pack with tables and plots; print the tables.

    Where the pack's results have runs that are not among these, they stay, and these are written beside the runs.
    """
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() and not options.quick else {}
    lost = missing(kept.get(options.family, {}), found)
    aside = work.folder / "results.json"
    kept[options.family] = found
    replace_file(aside if options.quick or lost else RESULTS, (json.dumps(kept, indent=2) + "\n").encode())
    if not options.quick and not lost:
        write(kept)
    print("\n\n".join(tables(found).values()))
    if lost:
        print(f"The pack's results stay as they are, since these lack runs of {', '.join(lost)}. These are in {aside}.")


def missing(kept: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The arms of which the kept results have more finished runs than those found."""
    there = {arm["name"]: len(arm["seeds"]) for arm in found["arms"]}
    return [arm["name"] for arm in kept.get("arms", []) if len(arm["seeds"]) > there.get(arm["name"], 0)]


def main() -> None:
    """Read the command line and run."""
    options = command_line().parse_args()
    run_to_its_end(lambda: make(options), "Stopped. The same command continues.")


if __name__ == "__main__":
    main()
