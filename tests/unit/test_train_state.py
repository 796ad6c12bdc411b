"""Checkpoints: loading gives what was saved, bit for bit, and a complete checkpoint exists after any failure."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distilled_t5.encoder.files import open_student, write_student
from distilled_t5.runtime.disk import UNFINISHED
from distilled_t5.runtime.randomness import random_states, restore_random_states
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.states import some_state, write_plain
from distilled_t5.tests.support.tiny_students import tiny_tensors
from distilled_t5.train.state import (
    CheckpointNotSaved,
    Checkpoints,
    NoCheckpoint,
    align,
    read_checkpoint,
    resumed_step,
    write_checkpoint,
)
from torch import Tensor
from torch.nn import Dropout, Linear, Module, Sequential
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

posix = pytest.mark.skipif(os.name != "posix", reason="kill -9, fork and file size limits are POSIX")


def test_a_checkpoint_of_an_older_version_with_values_that_nothing_reads_now_is_loaded(tmp_path):
    older = SimpleNamespace(**vars(some_state(4)), stage=1, prompt_index=28)
    write_checkpoint(tmp_path, older, write_plain)
    assert '"prompt_index": 28' in (tmp_path / "state.json").read_text(encoding="utf-8")
    expected = some_state(4)
    loaded = read_checkpoint(tmp_path)
    assert same(vars(loaded) | {"rng": 0}, vars(expected) | {"rng": 0})


def checkpoints(folder: Path, keep_last: int = 3) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", write_plain, keep_last)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def make_learner() -> tuple[Module, Optimizer, LambdaLR, torch.Generator]:
    torch.manual_seed(3)
    model = Sequential(Linear(6, 8), Dropout(0.5), Linear(8, 2, bias=False))
    optimizer = AdamW([{"params": model[0].parameters(), "lr": 1e-2 / 3}, {"params": model[2].parameters()}], lr=1e-3, weight_decay=0.1)
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (step + 1.7)), torch.Generator().manual_seed(5)


def train(learner: tuple[Module, Optimizer, LambdaLR, torch.Generator], steps: int) -> None:
    model, optimizer, schedule, generator = learner
    for _ in range(steps):
        optimizer.zero_grad()
        scale = random.random() + float(np.random.standard_normal())  # noqa: NPY002 (the global generator is what is tested)
        (model(torch.randn(4, 6, generator=generator)).square().mean() * scale).backward()
        optimizer.step()
        schedule.step()


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_been_interrupted(tmp_path):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    learner = make_learner()
    train(learner, 3)
    model, optimizer, schedule, generator = learner
    state = some_state(3)
    state.student, state.optimizer, state.schedule = model.state_dict(), optimizer.state_dict(), schedule.state_dict()
    state.rng = {"0": random_states({"noise": generator})}
    checkpoints(tmp_path).save(state)
    train(learner, 4)
    expected = (model.state_dict(), optimizer.state_dict(), schedule.state_dict(), generator.get_state(), torch.get_rng_state())

    loaded, notes = checkpoints(tmp_path).load_latest()
    assert notes == []
    model, optimizer, schedule, generator = other = make_learner()
    model.load_state_dict(loaded.student)
    optimizer.load_state_dict(loaded.optimizer)
    schedule.load_state_dict(loaded.schedule)
    assert restore_random_states(loaded.rng["0"], {"noise": generator}) == []
    train(other, 4)
    found = (model.state_dict(), optimizer.state_dict(), schedule.state_dict(), generator.get_state(), torch.get_rng_state())
    assert [same(*pair) for pair in zip(found, expected, strict=True)] == [True] * 5


def test_every_field_comes_back_bit_for_bit(tmp_path):
    state = some_state(12, best=0.1 + 0.2)
    checkpoints(tmp_path).save(state)
    loaded, _ = checkpoints(tmp_path).load_latest()
    assert same(vars(loaded), vars(state))


def test_tensors_that_share_memory_are_stored_each_for_itself(tmp_path):
    shared = torch.arange(4.0)
    state = some_state(1)
    state.optimizer = {"state": {0: shared, 1: shared, 2: shared[1:]}}
    checkpoints(tmp_path).save(state)
    assert same(checkpoints(tmp_path).load_latest()[0].optimizer, state.optimizer)


def test_student_of_a_checkpoint_is_a_file_that_the_node_opens(tmp_path):
    tensors = tiny_tensors(dtype=torch.float32)
    state = some_state(100)
    state.student = tensors
    folder = Checkpoints(tmp_path, write_student, keep_last=1).save(state)
    assert folder.name == "step-000100"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "state.json", "state.safetensors", "student.safetensors"]
    assert same(dict(sorted(open_student(folder / "student.safetensors").load().items())), dict(sorted(tensors.items())))
    assert same(dict(sorted(read_checkpoint(folder).student.items())), dict(sorted(tensors.items())))


def test_where_the_held_out_loss_is_measured_differently_earlier_checkpoints_are_not_the_best(tmp_path):
    store = checkpoints(tmp_path, keep_last=9)
    for step, best in [(1, 0.3), (2, 0.2), (3, None), (4, 0.7), (5, 0.6), (6, 0.6)]:
        store.save(some_state(step, best))
    best = store.best()
    assert best is not None and best.name == "step-000005"


def test_last_ones_and_the_best_are_kept(tmp_path):
    store = checkpoints(tmp_path, keep_last=2)
    for step, best in [(1, None), (2, 0.9), (3, 0.5), (4, 0.5), (5, 0.5), (6, 0.5)]:
        store.save(some_state(step, best))
    assert names(tmp_path) == ["step-000003", "step-000005", "step-000006"]
    best = store.best()
    assert best is not None and best.name == "step-000003"
    store.save(some_state(7, 0.4))
    store.save(some_state(8, 0.4))
    store.save(some_state(1_000_000, 0.4))
    assert names(tmp_path) == ["step-000007", "step-000008", "step-1000000"]
    assert store.load_latest()[0].step == 1_000_000


def test_a_damaged_checkpoint_does_not_count_among_the_last_ones(tmp_path):
    store = checkpoints(tmp_path, keep_last=2)
    store.save(some_state(1))
    store.save(some_state(2))
    (tmp_path / "checkpoints" / "step-000002" / "state.json").unlink()
    store.save(some_state(3))
    assert store.load_latest()[0].step == 3
    assert "step-000001" in names(tmp_path)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "harm",
    [
        cut_off,
        flip,
        Path.unlink,
        *([replace_by_a_pipe] if os.name == "posix" else []),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[1]"),
    ],
)
@pytest.mark.parametrize("name", ["student.safetensors", "state.safetensors", "state.json", "manifest.json"])
def test_damaged_newest_is_set_aside_and_the_one_before_is_used(tmp_path, harm, name):
    store = checkpoints(tmp_path)
    for step in (100, 200):
        store.save(some_state(step))
    harm(tmp_path / "checkpoints" / "step-000200" / name)
    state, notes = store.load_latest()
    assert same(vars(state), vars(some_state(100)) | {"rng": state.rng})
    assert len(notes) == 2
    assert name in notes[0] and "step-000200.broken" in notes[0]
    assert "step-000100" in notes[1]
    assert names(tmp_path) == ["step-000100", "step-000200.broken"]
    store.save(some_state(200))
    assert store.load_latest()[0].step == 200


def test_an_empty_folder_is_not_a_checkpoint_and_each_broken_one_gets_its_own_name(tmp_path):
    store = checkpoints(tmp_path)
    store.save(some_state(1))
    for _ in range(2):
        (tmp_path / "checkpoints" / "step-000002").mkdir()
        assert store.load_latest()[0].step == 1
    assert names(tmp_path) == ["step-000001", "step-000002.broken", "step-000002.broken2"]


def test_without_a_complete_checkpoint_the_error_says_what_was_found(tmp_path):
    store = checkpoints(tmp_path)
    with pytest.raises(NoCheckpoint, match=r"None has been saved yet.*\nWhat to do"):
        store.load_latest()
    cut_off(store.save(some_state(5)) / "state.safetensors")
    with pytest.raises(NoCheckpoint, match=r"step-000005 is damaged \(state.safetensors: expected [\d,]+ bytes, got"):
        store.load_latest()


def test_a_checkpoint_of_a_later_version_is_refused_and_left_alone(tmp_path, monkeypatch):
    store = checkpoints(tmp_path)
    with monkeypatch.context() as later:
        later.setattr("distilled_t5.train.state.FORMAT", 2)
        store.save(some_state(5))
    with pytest.raises(ValueError, match=r"format 2.*format 1"):
        store.load_latest()
    assert names(tmp_path) == ["step-000005"]


def test_the_same_step_saved_again_replaces_the_checkpoint(tmp_path):
    store = checkpoints(tmp_path)
    store.save(some_state(5, best=0.5))
    store.save(some_state(5, best=0.4))
    assert names(tmp_path) == ["step-000005"]
    assert store.load_latest()[0].best == 0.4


def test_a_kill_between_taking_away_the_old_and_putting_the_new_leaves_the_old(tmp_path):
    store = checkpoints(tmp_path)
    store.save(some_state(5))
    path = tmp_path / "checkpoints" / "step-000005"
    shutil.copytree(path, path.with_name(f".step-000005{UNFINISHED}"))
    path.rename(path.with_name("step-000005.replaced"))
    assert store.load_latest()[0].step == 5
    assert names(tmp_path) == ["step-000005"]


def test_a_writer_that_fails_leaves_nothing_and_the_last_checkpoint_untouched(tmp_path):
    store = checkpoints(tmp_path)
    store.save(some_state(1))

    def refuse(path: Path, tensors: Mapping[str, Tensor]) -> None:
        path.write_bytes(b"half of it")
        raise ValueError("weights are not finite")

    store.write_student = refuse
    with pytest.raises(ValueError, match="weights are not finite"):
        store.save(some_state(2))
    assert names(tmp_path) == ["step-000001"]
    assert store.load_latest()[0].step == 1


def test_a_run_of_several_students_goes_on_from_the_newest_step_that_all_have_intact(tmp_path):
    stores = [checkpoints(tmp_path / name, keep_last=9) for name in "ab"]
    for store, steps in zip(stores, ((3, 6), (3, 9)), strict=True):
        for step in steps:
            store.save(some_state(step))
    assert resumed_step([store.folder for store in stores]) == 3
    assert [note.split(" was renamed to ")[1].split(":")[0] for note in align(stores)] == ["step-000006.ahead", "step-000009.ahead"]
    assert [names(tmp_path / name) for name in "ab"] == [["step-000003", "step-000006.ahead"], ["step-000003", "step-000009.ahead"]]
    cut_off(stores[1].folder / "step-000003" / "state.safetensors")
    assert resumed_step([store.folder for store in stores]) == 0


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got 0"):
        checkpoints(tmp_path, keep_last=0)


def test_an_unwritable_folder_is_a_clear_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointNotSaved, match=r"step 3 could not be saved.*\nWhat to do"):
        checkpoints(tmp_path).save(some_state(3))
