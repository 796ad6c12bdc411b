"""Measures each encoder by itself and against the teacher, once; an encoder is loaded only if something is missing."""

# N prompts, D text width

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
from .embeddings import pooled
from .encoders import EncoderFile, Text
from .measured import Measured
from .metrics import PROBES, EmbeddingPart, Probe
from .questions import Question, in_turn
from .results import Numbers, to_json
from .scores import Unfinished, kept_or_made

log = logging.getLogger(__name__)


@dataclass
class Measurements:
    """Numbers by probe, name and encoder, and the pooled embeddings [N, D] of each encoder (where the suite asks for them)."""

    numbers: Numbers = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)


def measure_all(work: Evaluation) -> Measurements:
    """All probes that the suite asks for, of every encoder. Raises Stopped if a signal asked for it."""
    found, parts = Measurements(), {name: work.suite.table_of(probe) for name, probe in PROBES.items()}
    compared = max((part.prompts for name, part in parts.items() if part and PROBES[name].against_teacher), default=0)
    teacher_texts = functools.cache(lambda: Probed(work, work.teacher, compared).texts())
    for encoder in work.encoders:
        probed = Probed(work, encoder, compared, teacher_texts)
        for name, part in parts.items():
            if part is not None and not (PROBES[name].against_teacher and encoder is work.teacher):
                with work.processes.piece(f"{encoder.name}: {name.replace('_', ' ')}", PROBES[name].images * part.prompts):
                    numbers = probed.measured(PROBES[name], part)
                for number, measured in numbers.items():
                    found.numbers.setdefault(name, {}).setdefault(number, {})[encoder.name] = measured
                if PROBES[name].keeps_vectors:
                    found.vectors[encoder.name] = probed.vectors(PROBES[name], part)
    return found


class Probed:
    """An encoder that is measured, loaded by the first probe that needs it; `compared` prompts are compared with the teacher."""

    def __init__(self, work: Evaluation, encoder: EncoderFile, compared: int, teacher_texts: Callable[[], list[Text]] = list) -> None:
        self.work, self.encoder, self.teacher_texts, self._compared = work, encoder, teacher_texts, compared
        self._load = functools.cache(functools.partial(work.load, encoder))
        self.texts = functools.cache(self._texts)

    def asked(self, part: Any) -> list[Question]:
        """The prompts of a probe."""
        return in_turn(self.work.questions, part.prompts)

    def _texts(self) -> list[Text]:
        """The texts of the compared prompts, in RAM of every process. Raises Stopped after a signal to one of them."""
        texts = []
        for question in in_turn(self.work.questions, self._compared):
            self.work.processes.check_stop()
            texts.append(self._load().text(question.prompt))
        return texts

    def vectors(self, probe: Probe, part: EmbeddingPart) -> np.ndarray:
        """The mean embedding of each prompt's own tokens, [N, D], float32."""

        def vector(question: Question) -> np.ndarray:
            text = self._load().text(question.prompt)
            return pooled(text.own_1LD.numpy())[0]

        def made(_unfinished: Unfinished) -> dict[str, Any]:
            vectors = np.stack(self.work.processes.map(vector, self.asked(part), probe.images * part.prompts))
            return {"shape": list(vectors.shape), "float32": base64.b64encode(vectors.tobytes()).decode()}

        kept = self._kept("embeddings", part, {}, made)
        return np.frombuffer(base64.b64decode(kept["float32"]), np.float32).reshape(kept["shape"])

    def measured(self, probe: Probe, part: Any) -> dict[str, Measured]:
        """The numbers of a probe by name, once measured."""

        def made(unfinished: Unfinished) -> dict[str, Any]:
            return to_json(getattr(probes, probe.name)(self, part, unfinished))

        found = self._kept(probe.name, part, {"machine": provenance.machine()} if probe.by_machine else {}, made)
        return {name: Measured(**one).within(0.0, np.inf) for name, one in found.items()}

    def _kept(self, name: str, part: Any, also: Mapping[str, Any], make: Callable[[Unfinished], dict[str, Any]]) -> dict[str, Any]:
        work = self.work
        decided_by = {**also, "part": part.model_dump(), "teacher": work.teacher.made_of(), **work.made_of(self.encoder, self.asked(part))}

        def made(unfinished: Unfinished) -> dict[str, Any]:
            work.processes.check_stop()
            log.info("%s: %s", self.encoder.name, name.replace("_", " "))
            return make(unfinished)

        return kept_or_made(work.kept, work.processes.ranks, f"{self.encoder.name}/{name}", decided_by, made)
