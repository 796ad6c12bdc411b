"""What a process of a run works with: prompts, models, student, optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import comfy.model_management
from torch import Tensor
from torch.nn import Identity

from ..diffusion.frozen import FrozenModel, usable_bytes
from ..encoder.teacher_text import TeacherText, TextSource
from ..runtime.ranks import Ranks
from ..students.trained import TrainedStudent
from .batches import Batch, Place, Schedule
from .cache_plan import wanted
from .distill import Learner, new_learner
from .inputs import inputs_of, refuse_other_inputs
from .memory import Rehearsal, usable_of
from .models import check_width, load_frozen_model, load_teacher_of, make_student_of, preview_vae, rehearse_before_loading
from .objectives import OBJECTIVES, Objective
from .recipe import Recipe
from .teacher_cache import open_cache
from .teacher_chunks import TeacherChunks, texts_of
from .trajectory import Position, start
from .variance import variance_of

log = logging.getLogger(__name__)


@dataclass
class RunState:
    """What changes along a run besides the learners: each student's lowest held-out loss so far, and the positions on the trajectory."""

    best: list[float | None]
    positions: list[Position] = field(default_factory=list)


@dataclass
class Workshop:
    """Everything that a process of a run works with.

    recipe: that which trains the student alone. others: the same for the run's other students, with the same models, prompts and teacher.
    """

    recipe: Recipe
    ranks: Ranks
    schedule: Schedule
    model: FrozenModel
    teacher: TextSource
    chunks: TeacherChunks
    rehearsal: Rehearsal | None
    student: TrainedStudent
    learner: Learner
    inputs: dict[str, str]
    others: Sequence[Workshop] = ()
    _variances: dict[int, Tensor] = field(default_factory=dict)

    @property
    def all(self) -> list[Workshop]:
        """This one and the others: one for each student."""
        return [self, *self.others]

    @property
    def learners(self) -> list[Learner]:
        """Those of all students."""
        return [one.learner for one in self.all]

    def objective(self, number: int) -> Objective:
        """The objective of a stage; if its loss takes the teacher's variance, all processes must call it."""
        stage = self.recipe.stages[number]
        objective = replace(OBJECTIVES[stage.objective], blocks=stage.blocks)
        if objective.scaled and number not in self._variances:
            shared = self.ranks.share(self._variance(number, objective) if self.ranks.is_main else None)
            assert shared is not None
            self._variances[number] = shared
            self.load_model()  # the teacher took its place
        return replace(objective, variance_D=self._variances[number].to(self.model.device)) if objective.scaled else objective

    def _variance(self, number: int, objective: Objective) -> Tensor:
        log.info("Computing the variance of the teacher's text for stage %s.", self.recipe.stages[number].name)
        texts = (text for batch in self.schedule.sample(number) for text in texts_of(self.teacher, [batch]))
        return variance_of(texts, self.model.text_projection if objective.at == "projection" else Identity(), self.model.device)

    def embed(self, token_ids_BL: Tensor) -> Tensor:
        """The student's embeddings [B, L, D] on this process alone: DistributedDataParallel's forward may wait for the others."""
        return replace(self.learner, student=self.student).embed(token_ids_BL)

    def load_model(self) -> None:
        """Bring the diffusion model to its device, if the run needs it, and leave as much memory free there as an optimizer step takes."""
        room, has_moments = 0, all(learner.optimizer.state for learner in self.learners)
        if self.rehearsal:
            device_bytes = usable_bytes(self.model.device)
            kept_free = device_bytes - usable_of(device_bytes, self.rehearsal.on_gpu)
            room = self.rehearsal.room(has_moments, device_bytes) + kept_free
        if self.recipe.needs_diffusion_model:
            self.model.load(room)
        else:
            comfy.model_management.free_memory(room, self.model.device)

    def starts(self, batches: Sequence[Batch], texts: Sequence[TeacherText], steps: int) -> list[Position]:
        """The starts of some batches' trajectories of so many steps, with the diffusion model brought back to its device."""
        self.load_model()
        return [start(self.model, steps, batch.drawn, text) for batch, text in zip(batches, texts, strict=True)]

    def starts_at(self, place: Place) -> list[Position]:
        """The starts of this process's batches on the trajectory of a place."""
        texts = self.chunks.take(place.stage, place.trajectory)
        steps = self.recipe.trajectory_steps(self.recipe.stages[place.stage])
        return self.starts(self.schedule.batches(place.stage, place.trajectory), texts, steps)


def open_workshop(
    recipe: Recipe,
    ranks: Ranks,
    recorded: Sequence[Mapping[str, str]] = (),
    stopping: Callable[[], bool] = lambda: False,
    texts: Callable[[Schedule], dict[str, tuple[str, int]]] = wanted,
) -> Workshop:
    """Read prompts, load models, make the students; with a cache, first encode the texts that it lacks.

    `recorded`: each student's inputs in the run that is resumed; `texts`: those that a cache holds.
    Raises ValueError for whatever is missing or does not fit together, and for too little memory and other inputs before anything is
    loaded; Stopped where the cache is not complete once `stopping`.
    """
    schedule = Schedule(recipe, ranks.rank, ranks.world)
    # A missing VAE is reported now and not at the first preview.
    preview_vae(recipe)
    inputs = [inputs_of(one, schedule) for one in recipe.each]
    for one, before in zip(inputs, recorded, strict=False):
        refuse_other_inputs(before, one)
    rehearsal = rehearse_before_loading(recipe, ranks)
    # Before the large models, so that a start of another size is refused within seconds.
    students = [make_student_of(one) for one in recipe.each]
    cache = None
    if recipe.teacher.cache:
        width = rehearsal.text_width if rehearsal else None
        cache = open_cache(recipe, texts(schedule), ranks, stopping, width, resumed=any(recorded))
    model = load_frozen_model(recipe)
    if cache is not None:
        check_width(recipe, cache.text_width, model.text_width)
    teacher = cache or load_teacher_of(recipe, model.text_width)
    students = [student.to(model.device) for student in students]
    chunks = TeacherChunks(teacher, schedule, recipe.teacher.at_a_time)
    pairs = zip(students, recipe.student_names, strict=True)
    learners = [new_learner(recipe, ranks, student, model, name) for student, name in pairs]
    variances: dict[int, Tensor] = {}
    first, *others = [
        Workshop(one, ranks, schedule, model, teacher, chunks, rehearsal, student, learner, known, _variances=variances)
        for one, student, learner, known in zip(recipe.each, students, learners, inputs, strict=True)
    ]
    first.others = others
    return first
