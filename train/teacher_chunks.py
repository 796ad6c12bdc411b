"""The teacher's texts for several trajectories at a time: teacher and diffusion model are swapped once per chunk, not per trajectory."""

from __future__ import annotations

from collections.abc import Sequence

from ..encoder.teacher_text import TeacherText, TextSource
from .batches import Batch, Schedule


def chunk_of(trajectory: int, prompts: int, chunk_prompts: int, trajectories: int) -> range:
    """The trajectories that are encoded together with this one, of a stage's `trajectories` with `prompts` prompts each.

    As many as `chunk_prompts` prompts allow, at least one. Nothing else decides: a resumed run has the same chunks.
    """
    size = max(1, chunk_prompts // prompts)
    first = trajectory - trajectory % size
    return range(first, min(first + size, trajectories))


def texts_of(teacher: TextSource, batches: Sequence[Batch]) -> list[TeacherText]:
    """The teacher's texts of some batches, each encoded separately, with the empty prompt where their trajectories are guided."""
    return [teacher.encode(batch.prompts, batch.drawn.token_length, with_empty=batch.drawn.cfg_B is not None) for batch in batches]


class TeacherChunks:
    """The teacher's texts along a run, encoded chunk by chunk and held in RAM until their trajectory takes them.

    At most `chunk_prompts` prompts, or one trajectory's if those are more: prompts x tokens x text width x 4 bytes. ComfyUI's text
    encoders compute in float32, so two bytes would lose precision.
    """

    def __init__(self, teacher: TextSource, schedule: Schedule, chunk_prompts: int) -> None:
        self.teacher, self.schedule, self.chunk_prompts = teacher, schedule, chunk_prompts
        self._held: dict[tuple[int, int], list[TeacherText]] = {}

    def take(self, stage: int, trajectory: int) -> list[TeacherText]:
        """The texts of this process's batches on a trajectory, each batch encoded separately.

        If they are not held, the rest of the chunk is encoded: all of it, or what is left of it in a resumed run.
        """
        if (stage, trajectory) not in self._held:
            self._encode(stage, trajectory)
        return self._held.pop((stage, trajectory))

    def _encode(self, stage: int, trajectory: int) -> None:
        self._held.clear()
        prompts, trajectories = self.schedule.prompts_per_trajectory(stage), self.schedule.trajectories(stage)
        chunk = chunk_of(trajectory, prompts, self.chunk_prompts, trajectories)
        for number in range(trajectory, chunk.stop):
            batches = self.schedule.batches(stage, number)
            self._held[stage, number] = texts_of(self.teacher, batches)
