"""Measures each encoder by itself and against the teacher, once; an encoder is loaded only if something is missing."""

from __future__ import annotations

import base64
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import probes, provenance
from .context import Evaluation
from .encoders import EncoderFile, LoadedEncoder, Text
from .measured import Measured
from .questions import Question, in_turn, questions_sha256
from .results import Numbers
from .scores import Unfinished, kept_or_made

log = logging.getLogger(__name__)


@dataclass
class Measurements:
    """Numbers by probe, name and encoder, and the pooled embeddings [N, D] of each encoder (where the suite asks for them)."""

    numbers: Numbers = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, probe: str, encoder: str, found: Mapping[str, Measured]) -> None:
        """Put an encoder's numbers of a probe among the others."""
        for name, measured in found.items():
            self.numbers.setdefault(probe, {}).setdefault(name, {})[encoder] = measured


def measure_all(work: Evaluation) -> Measurements:
    """Cost, collapse, velocity gap and latent distance, as far as the suite asks for them. Raises Stopped if a signal asked for it."""
    found = Measurements()
    paired = [part.prompts for part in (work.suite.velocity_gap, work.suite.latent_distance) if part is not None]
    asked = in_turn(work.questions, max(paired, default=0))
    teacher_texts = functools.cache(lambda: probes.texts_of(work.load(work.teacher), asked, work.processes))
    for encoder in work.encoders:
        encoder_probes = EncoderProbes(work, encoder, found, functools.cache(functools.partial(work.load, encoder)))
        encoder_probes.cost()
        encoder_probes.collapse()
        if encoder is not work.teacher:
            encoder_probes.against_teacher(asked, teacher_texts)
    return found


@dataclass
class EncoderProbes:
    """The probes of one encoder, loaded by the first that needs it."""

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
        fresh = functools.partial(self.work.load, self.encoder)

        def on_first(_unfinished: Unfinished) -> probes.Found:
            main = self.work.processes.ranks.is_main
            return probes.cost(fresh, self.work.generator, prompts, part.repeats) if main else {}

        asked = {"repeats": part.repeats, "prompts": prompts, "machine": provenance.machine()}
        self._measure("cost", {**asked, **self.encoder.made_of(), **self.work.generated_by}, on_first)

    def collapse(self) -> None:
        """Pooled embeddings, how far apart they are and how many directions they fill."""
        part = self.work.suite.embedding
        if part is None:
            return
        asked = in_turn(self.work.questions, part.prompts)
        decided_by = {"prompts": questions_sha256(asked), **self.encoder.made_of(), **provenance.computed_with()}

        def made(_unfinished: Unfinished) -> dict[str, Any]:
            vectors = probes.pooled_vectors(self.load(), asked, self.work.processes)
            return {"shape": list(vectors.shape), "float32": base64.b64encode(vectors.tobytes()).decode()}

        kept = self._kept("embeddings", decided_by, made)
        vectors = np.frombuffer(base64.b64decode(kept["float32"]), np.float32).reshape(kept["shape"])
        self.found.vectors[self.encoder.name] = vectors
        self._measure("collapse", decided_by, lambda _unfinished: probes.collapse(vectors))

    def against_teacher(self, asked: list[Question], teacher_texts: Callable[[], list[Text]]) -> None:
        """The velocity gap and the distance of the latents."""
        suite, generator, processes = self.work.suite, self.work.generator, self.work.processes
        gap, distance, batch = suite.velocity_gap, suite.latent_distance, suite.sampling.batch
        texts = functools.cache(lambda: probes.texts_of(self.load(), asked, processes))

        def pairs(prompts: int) -> list[probes.Pair]:
            return probes.pairs(asked[:prompts], teacher_texts()[:prompts], texts()[:prompts], batch)

        if gap is not None:
            self._measure(
                "velocity_gap",
                self._decided_by(asked, gap.model_dump()),
                lambda done: probes.velocity_gap(
                    generator, pairs(gap.prompts), gap.sigma_bands, processes, done.also_decided_by(batch=batch)
                ),
            )
        if distance is not None:
            self._measure(
                "latent_distance",
                self._decided_by(asked, distance.model_dump()),
                lambda done: probes.latent_distance(generator, pairs(distance.prompts), processes, done.also_decided_by(batch=batch)),
            )

    def _decided_by(self, asked: list[Question], part: Mapping[str, Any]) -> dict[str, Any]:
        work = self.work
        return {"part": part, "teacher": work.teacher.made_of(), **work.made_of(self.encoder, asked)}

    def _measure(self, probe: str, decided_by: Mapping[str, Any], make: Callable[[Unfinished], probes.Found]) -> None:
        def made(unfinished: Unfinished) -> dict[str, Any]:
            return {name: measured.to_json() for name, measured in make(unfinished).items()}

        found = self._kept(probe, decided_by, made)
        self.found.add(probe, self.encoder.name, {name: Measured(**one) for name, one in found.items()})

    def _kept(self, probe: str, decided_by: Mapping[str, Any], make: Callable[[Unfinished], dict[str, Any]]) -> dict[str, Any]:
        def made(unfinished: Unfinished) -> dict[str, Any]:
            self.work.processes.check_stop()
            log.info("%s: %s", self.encoder.name, probe.replace("_", " "))
            return make(unfinished)

        return kept_or_made(self.work.kept, self.work.processes.ranks, f"{self.encoder.name}/{probe}", decided_by, made)
