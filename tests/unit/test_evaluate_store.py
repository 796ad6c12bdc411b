"""Pictures on the disk: a batch is there as a whole or not at all, whatever ends the process, and none is painted twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from distilled_t5.evaluate.store import COMPLETE, MADE_OF, PictureFolder, batches, share_of_rank
from distilled_t5.runtime.disk import UNFINISHED

OURS = {"encoder": "a", "prompts and seeds": "p"}


def folder_of(path: Path) -> PictureFolder:
    folder = PictureFolder(path)
    folder.claim(OURS)
    return folder


def content(folder: PictureFolder) -> dict[int, bytes]:
    return {index: folder.file(index).read_bytes() for index in sorted(folder.there())}


def test_a_batch_that_was_added_lies_there_picture_by_picture_and_nothing_else_does(tmp_path):
    folder = folder_of(tmp_path / "pictures")
    folder.add({0: b"zero", 2: b"two"})
    folder.add({100_000: b"many"})
    assert content(folder) == {0: b"zero", 2: b"two", 100_000: b"many"}
    assert sorted(path.name for path in folder.path.iterdir()) == ["00000.png", "00002.png", "100000.png", MADE_OF]


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("fatal_call", range(1, 6))
def test_a_kill_at_any_rename_loses_a_batch_whole_or_not_at_all(tmp_path, monkeypatch, fatal_call):
    """Three pictures: the first rename publishes the batch, the three replacements hand them on."""
    folder, calls = folder_of(tmp_path / "pictures"), 0

    def counting(method):
        def call(path, target):
            nonlocal calls
            calls += 1
            if calls == fatal_call:
                raise Killed
            return method(path, target)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, counting(getattr(Path, name)))
        if fatal_call <= 4:
            with pytest.raises(Killed):
                folder.add({4: b"4", 5: b"5", 6: b"6"})
        else:
            folder.add({4: b"4", 5: b"5", 6: b"6"})
    again = folder_of(folder.path)
    assert content(again) == ({} if fatal_call == 1 else {4: b"4", 5: b"5", 6: b"6"})
    assert not [path for path in folder.path.iterdir() if path.name.endswith((UNFINISHED, COMPLETE))]


def test_a_kill_while_a_batch_is_written_leaves_nothing_of_it(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "pictures")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _handle: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            folder.add({0: b"0", 1: b"1"})
    assert folder.there() == set()
    again = folder_of(folder.path)
    again.add({0: b"new", 1: b"1"})
    assert content(again) == {0: b"new", 1: b"1"}


def test_pictures_that_were_made_of_something_else_are_refused_by_name(tmp_path):
    folder = folder_of(tmp_path / "pictures")
    folder.add({0: b"zero"})
    with pytest.raises(ValueError, match=r"encoder: a -> b\nWhat to do: name another folder with --out, or delete that one\.$"):
        PictureFolder(folder.path).claim({**OURS, "encoder": "b"})
    with pytest.raises(ValueError, match="vae: None -> v"):
        PictureFolder(folder.path).claim({**OURS, "vae": "v"})
    assert content(folder) == {0: b"zero"}


def test_batches_do_not_depend_on_what_is_there_already():
    assert batches(7, set(), 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert batches(7, {0, 1, 2}, 3) == [[3, 4, 5], [6]]
    assert batches(7, {3}, 3) == [[0, 1, 2], [4, 5], [6]]
    assert batches(7, set(range(7)), 3) == []


def test_processes_share_batches_out_without_rest_and_without_doubles():
    left = batches(10, {1}, 2)
    shares = [share_of_rank(left, rank, 3) for rank in range(3)]
    assert sorted(index for share in shares for batch in share for index in batch) == [0, *range(2, 10)]
    assert [len(share) for share in shares] == [2, 2, 1]
