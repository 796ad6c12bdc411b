"""An evaluation from its suite to its page: generate the images that are missing, judge them, measure the encoders, write."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from ..config.toml import toml_parser
from ..runtime.disk import check_regular, replace_file
from ..runtime.lock import lock
from ..runtime.logs import logging_to
from ..runtime.ranks import Ranks
from ..runtime.stop import StopRequest
from .context import Evaluation, open_evaluation
from .generate import generate_all, missing_images
from .judge_images import judge_all
from .judges import check_judges
from .metrics import METRICS, PROBES
from .probe_encoders import measure_all
from .processes import Processes, Stopped, progress_bar
from .report import write_all
from .suite import Suite

log = logging.getLogger(__name__)
NOTICE = "\nStopping after the current batch: the same command continues. A second signal ends it at once.\n"


def evaluate(suite: Suite, students: Sequence[str], out: Path, ranks: Ranks) -> Path | None:
    """Run a suite to its end; returns the page's file, or None when a signal asked to stop (the same call continues).

    Raises ValueError or OSError with a sentence for the person who started it.
    """
    out = out.expanduser().absolute()
    started_s = time.monotonic()
    with contextlib.ExitStack() as opened:
        if ranks.is_main:
            opened.enter_context(_own_folder(out))
        stop = opened.enter_context(StopRequest(NOTICE))
        bar = opened.enter_context(progress_bar(ranks))
        work = start(suite, students, out, Processes(ranks, lambda: stop.requested, bar))
        bar.total = images_of(work)
        try:
            _generate(work)
            verdicts, measured = judge_all(work), measure_all(work)
        except Stopped:
            return None
        bar.close()
        return write_all(work, verdicts, measured, time.monotonic() - started_s) if ranks.is_main else out


@contextlib.contextmanager
def _own_folder(out: Path) -> Iterator[None]:
    """The folder, locked against other processes, with a log."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_regular(out / "evaluate.log")
        held = lock(out, "--out")
    except OSError as error:
        raise OSError(
            f"{out} cannot be written to: {error}.\nWhat to do: allow writing to the folder, or name another one with --out."
        ) from error
    with held, logging_to(out / "evaluate.log"):
        yield


def start(suite: Suite, students: Sequence[str], out: Path, processes: Processes) -> Evaluation:
    """Open an evaluation and claim its folder, once everything that it needs has been checked. Raises ValueError."""
    if processes.ranks.is_main:
        check_judges(suite)
    named = {student.partition("=")[0] for student in (*suite.students, *students)}
    earlier = processes.ranks.share(earlier_students(out, named) if processes.ranks.is_main else [])
    work = open_evaluation(suite, [*earlier, *students], out, processes)
    if processes.ranks.is_main:
        suite = suite.model_copy(update={"students": tuple(f"{student.name}={student.path}" for student in work.students)})
        for encoder in work.encoders:
            for task, asked in work.questions.items():
                work.images(encoder, task).claim(work.made_of(encoder, asked))
        replace_file(out / "suite.toml", suite.to_toml().encode())
    processes.ranks.barrier()
    return work


def earlier_students(out: Path, named: Collection[str]) -> list[str]:
    """The students of the last evaluation in this folder, as NAME=FILE, unless their names are given now.

    Those whose files or images are gone, or whose files have changed since, are left out.
    """
    record, former = out / "suite.toml", out / "pictures"
    if former.is_dir() and not (out / "images").exists():
        former.rename(out / "images")  # its name in version 0.1
    recorded = toml_parser().loads(record.read_text(encoding="utf-8")).get("students", []) if record.is_file() else []
    found = []
    for name, _, file in (student.partition("=") for student in recorded):
        if name in named or not (out / "images" / name).is_dir() or not Path(file).is_file():
            continue
        if Path(file).stat().st_mtime > record.stat().st_mtime:
            log.warning("%s is left out: %s has changed since it was evaluated here.", name, file)
            continue
        found.append(f"{name}={file}")
    return found


def _generate(work: Evaluation) -> None:
    """Generate what is missing, encoder by encoder. Raises Stopped if a signal asked for it."""
    for encoder in work.encoders:
        folders = {task: work.images(encoder, task) for task in work.questions}
        missing = missing_images(folders, work.questions, work.suite.sampling.batch, work.processes)
        with work.processes.piece(f"{encoder.name}: images", sum(map(len, work.questions.values()))):
            done = generate_all(work.generator, partial(work.load, encoder), missing, work.processes)
        if work.processes.ranks.any_of(not done):
            raise Stopped


def images_of(work: Evaluation) -> float:
    """The images that take this process as long as all the work."""
    of_metrics = [(METRICS[name], len(work.questions[task.name])) for task in work.suite.tasks for name in task.metrics]
    of_probes = [(probe, part.prompts) for probe in PROBES.values() if (part := work.suite.table_of(probe)) is not None]
    images = float(len(work.encoders) * sum(map(len, work.questions.values())))
    for record, prompts in (*of_metrics, *of_probes):
        images += record.images * prompts * len(work.students if record.against_teacher else work.encoders)
    return images / work.processes.ranks.world
