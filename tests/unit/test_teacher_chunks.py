"""Which trajectories the teacher encodes together."""

from __future__ import annotations

import pytest
from distilled_t5.train.batches import Schedule
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.teacher_chunks import chunk_of


@pytest.mark.parametrize(
    ("trajectory", "prompts", "chunk_prompts", "chunk"),
    [
        (0, 4, 8, range(2)),
        (1, 4, 8, range(2)),
        (2, 4, 8, range(2, 4)),
        (6, 4, 8, range(6, 7)),
        (3, 4, 11, range(2, 4)),
        (3, 4, 4, range(3, 4)),
        (3, 4, 3, range(3, 4)),
        (3, 4, 1000, range(7)),
    ],
    ids=["first", "second", "next", "end of the stage", "part of a trajectory left over", "one", "fewer than one", "more than a stage"],
)
def test_a_chunk_has_as_many_trajectories_as_its_prompts_allow_and_at_least_one(trajectory, prompts, chunk_prompts, chunk):
    assert chunk_of(trajectory, prompts, chunk_prompts, trajectories=7) == chunk


def test_every_trajectory_of_a_chunk_has_the_same_borders():
    chunks = [chunk_of(trajectory, 3, 10, 100) for trajectory in range(100)]
    assert all(trajectory in chunk and chunk == chunks[chunk.start] for trajectory, chunk in enumerate(chunks))


def test_a_process_counts_its_own_prompts_and_the_trajectory_that_a_stage_cuts_short():
    settings = ["sampling.steps=4", "stage.0.steps=9", "stage.0.batch=3", "stage.0.accumulate=4", "stage.1.accumulate=4"]
    recipe = load_recipe("smoke", settings)
    assert [Schedule(recipe, 0, ranks).prompts_per_trajectory(0) for ranks in (1, 2, 4)] == [12, 6, 3]
    schedule = Schedule(recipe, 1, 2)
    assert sum(len(batch.prompts) for batch in schedule.batches(0, 0)) == 6
    assert schedule.trajectories(0) == 3
    assert schedule.place(8).trajectory == 2
