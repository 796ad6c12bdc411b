"""An evaluation from its suite to its page: paint what is missing, judge, measure the encoders, write."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..diffusion.files import check_guidance, open_diffusion_model
from ..diffusion.vae import load_vae
from ..families import FAMILIES
from ..runtime.comfyui import model_file
from ..runtime.disk import replace_file
from ..runtime.lock import lock
from ..runtime.logs import FILE_INTERVAL_S, TERMINAL_INTERVAL_S, logging_to
from ..runtime.ranks import Ranks
from ..runtime.stop import StopRequest
from . import provenance
from .encoders import EncoderFile, LoadedEncoder, find_encoders, fingerprint
from .generate import left_to_paint, made_of, paint_all
from .judge import check_judges
from .measure import measure_all
from .painter import Painter, Sampling
from .questions import Question, read_questions
from .report import write_all
from .scores import Kept
from .store import PictureFolder
from .suite import Suite
from .team import Stopped, Team
from .verdicts import judge_all

NOTICE = "\nStopping after the batch that is in work: the same command goes on. A second signal ends it at once.\n"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation works on: the suite, its folder, its processes, its prompts, its encoders (the teacher first), what paints; and
    the signal at which it stops."""

    suite: Suite
    out: Path
    ranks: Ranks
    questions: dict[str, list[Question]]
    encoders: list[EncoderFile]
    painter: Painter
    painter_is: dict[str, str]
    stop: StopRequest

    @property
    def teacher(self) -> EncoderFile:
        return self.encoders[0]

    @property
    def students(self) -> list[EncoderFile]:
        return self.encoders[1:]

    @property
    def kept(self) -> Kept:
        """Numbers that are measured once."""
        return Kept(self.out / "scores", provenance.sources_sha256())

    @property
    def team(self) -> Team:
        """Those among whom judging and probing are shared out."""
        return Team(self.ranks, self.bar, lambda: self.stop.requested)

    def pictures(self, encoder: EncoderFile, task: str) -> PictureFolder:
        """Where an encoder's pictures of a task lie."""
        return PictureFolder(self.out / "pictures" / encoder.name / task)

    def load(self, encoder: EncoderFile) -> LoadedEncoder:
        """The encoder in ComfyUI. Raises ValueError if it does not fit the diffusion model."""
        width = self.painter.model.model.diffusion_model.params.context_in_dim
        return LoadedEncoder.fitting(encoder, width, self.suite.diffusion_model.file)

    def bar(self, total: int, what: str, unit: str) -> tqdm:
        """A progress bar with the time that is left; on the first process alone, for its own share."""
        described = what if self.ranks.world == 1 else f"{what} (process 1 of {self.ranks.world})"
        interval_s = TERMINAL_INTERVAL_S if sys.stderr.isatty() else FILE_INTERVAL_S
        return tqdm(total=total, desc=described, unit=unit, mininterval=interval_s, dynamic_ncols=True, disable=not self.ranks.is_main)


def evaluate(suite: Suite, students: Sequence[str], out: Path, ranks: Ranks) -> Path | None:
    """Run a suite to its end; returns the page's file, or None when a signal asked to stop (the same call goes on).

    Raises ValueError or OSError with a sentence for the person who started it.
    """
    out = out.expanduser().absolute()
    started_s = time.monotonic()
    with contextlib.ExitStack() as open_things:
        if ranks.is_main:
            open_things.enter_context(_own_folder(out))
        stop = open_things.enter_context(StopRequest(NOTICE))
        work = open_evaluation(suite, students, out, ranks, stop)
        try:
            _paint(work)
            verdicts, measured = judge_all(work), measure_all(work)
        except Stopped:
            return None
        return write_all(work, verdicts, measured, time.monotonic() - started_s) if ranks.is_main else out


@contextlib.contextmanager
def _own_folder(out: Path) -> Iterator[None]:
    """The folder, locked against other processes, with a log."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = lock(out, "--out")
    except OSError as error:
        raise OSError(
            f"{out} cannot be written to: {error.strerror or error}.\nWhat to do: see that the folder may be written to, or name another "
            "one with --out."
        ) from error
    with held, logging_to(out / "evaluate.log"):
        yield


def open_evaluation(suite: Suite, students: Sequence[str], out: Path, ranks: Ranks, stop: StopRequest) -> Evaluation:
    """Read prompts, find encoders, load what paints. Raises ValueError for whatever is missing or does not fit together."""
    questions = read_questions(suite)
    encoders = find_encoders(suite, students)
    part = suite.diffusion_model
    flux, vae = model_file(part.file, "diffusion_models"), model_file(part.vae, "vae")
    sampling = Sampling(suite.sampling.steps, suite.sampling.guidance, suite.sampling.batch, suite.sampling.resolution_px)
    model = open_diffusion_model(flux, part.dtype, FAMILIES["flux"], exact_gradients=False)
    check_guidance(flux.name, model, [] if sampling.guidance is None else [sampling.guidance])
    painter_is = {
        "diffusion model": fingerprint(flux),
        "its weights held in": part.dtype,
        "vae": fingerprint(vae),
        "sampling": str(sampling),
        **provenance.computed_with(),
    }
    work = Evaluation(suite, out, ranks, questions, encoders, Painter(model.patcher, load_vae(vae), sampling), painter_is, stop)
    if ranks.is_main:
        check_judges(suite)
        for encoder in encoders:
            for task, asked in questions.items():
                work.pictures(encoder, task).claim(made_of(encoder, painter_is, asked))
        replace_file(out / "suite.toml", suite.to_toml().encode())
    ranks.barrier()
    return work


def _paint(work: Evaluation) -> None:
    """Paint what is missing, encoder by encoder. Raises Stopped if a signal asked for it."""
    for encoder in work.encoders:
        folders = {task: work.pictures(encoder, task) for task in work.questions}
        left = left_to_paint(folders, work.questions, work.suite.sampling.batch, work.ranks)
        with work.bar(sum(len(batch.questions) for batch in left), encoder.name, "picture") as bar:
            done = paint_all(work.painter, partial(work.load, encoder), left, bar, lambda: work.stop.requested)
        if work.ranks.any_of(not done):
            raise Stopped
