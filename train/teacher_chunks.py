"""The teacher's texts for several trajectories in a row: teacher and diffusion model change places once per chunk, not per trajectory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..encoder.teacher import Teacher, TeacherText
    from .batches import Schedule


def chunk_of(trajectory: int, prompts: int, chunk_prompts: int, trajectories: int) -> range:
    """The trajectories that are encoded together with this one, of the `trajectories` of its stage with `prompts` prompts each.

    As many as `chunk_prompts` prompts allow, at least one. It depends on nothing else: a resumed run has the same borders.
    """
    size = max(1, chunk_prompts // prompts)
    first = trajectory - trajectory % size
    return range(first, min(first + size, trajectories))


class TeacherChunks:
    """What the teacher says along a run, encoded chunk by chunk and held in RAM until its trajectory takes it.

    At most `chunk_prompts` prompts, or one trajectory's if those are more: prompts x tokens x text width x 4 bytes. The host's text
    encoders compute in float32, so that two bytes would lose bits.
    """

    def __init__(self, teacher: Teacher, schedule: Schedule, chunk_prompts: int) -> None:
        self.teacher, self.schedule, self.chunk_prompts = teacher, schedule, chunk_prompts
        self._held: dict[tuple[int, int], list[TeacherText]] = {}

    def take(self, stage: int, trajectory: int) -> list[TeacherText]:
        """The texts of this process's batches on a trajectory, each batch encoded by itself.

        If they are not there, the rest of the chunk is encoded: all of it, or what is left of it where a run is resumed.
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
            self._held[stage, number] = self.teacher.texts((batch.prompts, batch.drawn.token_length) for batch in batches)
