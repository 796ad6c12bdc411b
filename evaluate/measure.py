"""What is measured of each encoder by itself and beside the teacher, each once; an encoder is loaded only if something is missing."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from . import probes, provenance
from .encoders import EncoderFile, LoadedEncoder, Text
from .generate import questions_sha256
from .intervals import Measured
from .questions import Question, in_turn
from .scores import Part, kept_or_made

if TYPE_CHECKING:
    from .run import Evaluation

Found = TypeVar("Found")
log = logging.getLogger(__name__)


@dataclass
class Measurements:
    """Numbers by probe, name and encoder, and the pooled embeddings [N, D] of each encoder (where the suite asks for them)."""

    numbers: dict[str, dict[str, dict[str, Measured]]] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, probe: str, encoder: str, found: Mapping[str, Measured]) -> None:
        """Put an encoder's numbers of a probe among the others."""
        for name, measured in found.items():
            self.numbers.setdefault(probe, {}).setdefault(name, {})[encoder] = measured


def measure_all(work: Evaluation) -> Measurements:
    """Collapse, velocity gap, way of the latents and cost, as far as the suite asks for them. Raises Stopped if a signal asked for it."""
    found = Measurements()
    paired = [part.prompts for part in (work.suite.velocity_gap, work.suite.latent_distance) if part is not None]
    asked = in_turn(work.questions, max(paired, default=0))
    teacher_texts = _once(lambda: probes.texts_of(work.load(work.teacher), asked, work.team))
    for encoder in work.encoders:
        bench = Bench(work, encoder, found, _once(functools.partial(work.load, encoder)))
        probes_of_encoder: list[Callable[[], None]] = [bench.cost, bench.collapse]
        if encoder is not work.teacher:
            probes_of_encoder.append(functools.partial(bench.beside_teacher, asked, teacher_texts))
        for probe in probes_of_encoder:
            work.team.leave_if_asked()
            probe()
    return found


def _once(make: Callable[[], Found]) -> Callable[[], Found]:
    """A function that makes something at the first call and gives the same at every later one."""
    return functools.cache(make)


@dataclass
class Bench:
    """One encoder, loaded at the first probe that needs it."""

    work: Evaluation
    encoder: EncoderFile
    found: Measurements
    load: Callable[[], LoadedEncoder]

    def cost(self) -> None:
        """Memory and time, on the first process while the others wait."""
        part = self.work.suite.cost
        if part is None:
            return
        prompts = [question.prompt for question in in_turn(self.work.questions, part.repeats + 1)]

        def on_first(_part: Part) -> probes.Numbers:
            # Without the check that the encoder fits, which encodes a prompt.
            fresh = functools.partial(LoadedEncoder.load, self.encoder)
            return probes.cost(fresh, self.work.painter, prompts, part.repeats) if self.work.ranks.is_main else {}

        asked = {"repeats": part.repeats, "prompts": prompts, "machine": provenance.machine()}
        self._measure("cost", {**asked, **self.encoder.made_of(), **self.work.painter_is}, on_first)

    def collapse(self) -> None:
        """Pooled embeddings, how far apart they are and how many directions they fill."""
        part = self.work.suite.embedding
        if part is None:
            return
        asked = in_turn(self.work.questions, part.prompts)
        decided_by = {"prompts": questions_sha256(asked), **self.encoder.made_of(), **provenance.computed_with()}
        vectors = self._vectors(asked, decided_by)
        self.found.vectors[self.encoder.name] = vectors
        self._measure("collapse", decided_by, lambda _part: probes.collapse(vectors))

    def _vectors(self, asked: list[Question], decided_by: Mapping[str, Any]) -> np.ndarray:
        """The pooled embeddings; they lie in a file of their own once they are made."""
        name, kept, ranks = f"{self.encoder.name}/embeddings", self.work.kept, self.work.ranks
        vectors = kept.get_array(name, decided_by)
        if not ranks.any_of(vectors is None):
            assert vectors is not None, "no process lacks them"
            return vectors
        vectors = probes.pooled_vectors(self.load(), asked, self.work.team)
        if ranks.is_main:
            kept.put_array(name, decided_by, vectors)
        return vectors

    def beside_teacher(self, asked: list[Question], teacher_texts: Callable[[], list[Text]]) -> None:
        """The velocity gap and the way of the latents."""
        suite, painter, team = self.work.suite, self.work.painter, self.work.team
        batch = suite.sampling.batch
        texts = _once(lambda: probes.texts_of(self.load(), asked, team))

        def pairs(prompts: int) -> list[probes.Pair]:
            return [*probes.pairs(asked[:prompts], teacher_texts()[:prompts], texts()[:prompts], batch)]

        if suite.velocity_gap is not None:
            part = suite.velocity_gap
            self._measure(
                "velocity_gap",
                self._decided_by(asked, part.model_dump()),
                lambda done: probes.velocity_gap(painter, pairs(part.prompts), part.sigma_bands, team, done.cut_by(batch=batch)),
            )
        if suite.latent_distance is not None:
            distance = suite.latent_distance
            self._measure(
                "latent_distance",
                self._decided_by(asked, distance.model_dump()),
                lambda done: probes.latent_distance(painter, pairs(distance.prompts), team, done.cut_by(batch=batch)),
            )

    def _decided_by(self, asked: list[Question], part: Mapping[str, Any]) -> dict[str, Any]:
        work = self.work
        teacher = work.teacher.made_of()
        return {"part": part, "prompts": questions_sha256(asked), "teacher": teacher, **self.encoder.made_of(), **work.painter_is}

    def _measure(self, probe: str, decided_by: Mapping[str, Any], make: Callable[[Part], probes.Numbers]) -> None:
        def made(part: Part) -> dict[str, Any]:
            self.work.team.leave_if_asked()
            log.info("%s: %s", self.encoder.name, probe.replace("_", " "))
            return {name: measured.to_json() for name, measured in make(part).items()}

        found = kept_or_made(self.work.kept, self.work.ranks, f"{self.encoder.name}/{probe}", decided_by, made)
        self.found.add(probe, self.encoder.name, {name: Measured.from_json(one) for name, one in found.items()})
