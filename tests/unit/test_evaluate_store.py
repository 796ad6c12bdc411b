"""Images on the disk: a batch is complete or not there, whatever ends the process, and no image is generated twice."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from distilled_t5.evaluate.store import COMPLETE, MADE_OF, ImageFolder, missing_batches
from distilled_t5.runtime.disk import UNFINISHED
from PIL import Image

SUMS = "sha256sums.txt"
OURS = {"encoder": "a", "prompts and seeds": "p"}


def image(number: int) -> bytes:
    """A PNG file like no other number's."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, 3)).save(content, "PNG")
    return content.getvalue()


def folder_of(path: Path) -> ImageFolder:
    folder = ImageFolder(path)
    folder.claim(OURS)
    return folder


def content(folder: ImageFolder) -> dict[int, bytes]:
    return {index: folder.file(index).read_bytes() for index in sorted(folder.present())}


def test_an_added_batch_is_stored_as_one_file_per_image_and_nothing_else(tmp_path):
    folder = folder_of(tmp_path / "images")
    folder.add({0: image(0), 2: image(2)})
    folder.add({100_000: image(100000)})
    assert content(folder) == {0: image(0), 2: image(2), 100_000: image(100000)}
    assert sorted(path.name for path in folder.path.iterdir()) == ["00000.png", "00002.png", "100000.png", MADE_OF, SUMS]


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("fatal_call", range(1, 6))
def test_a_kill_at_any_rename_keeps_either_the_complete_batch_or_none_of_it(tmp_path, monkeypatch, fatal_call):
    """Three images: the first rename publishes the batch, the three replacements move the images to their places."""
    folder, calls = folder_of(tmp_path / "images"), 0

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
                folder.add({4: image(4), 5: image(5), 6: image(6)})
        else:
            folder.add({4: image(4), 5: image(5), 6: image(6)})
    again = folder_of(folder.path)
    assert content(again) == ({} if fatal_call == 1 else {4: image(4), 5: image(5), 6: image(6)})
    assert not [path for path in folder.path.iterdir() if path.name.endswith((UNFINISHED, COMPLETE))]


def test_a_kill_while_a_batch_is_written_leaves_nothing_of_it(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "images")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _handle: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            folder.add({0: image(0), 1: image(1)})
    assert folder.present() == set()
    again = folder_of(folder.path)
    again.add({0: image(7), 1: image(1)})
    assert content(again) == {0: image(7), 1: image(1)}


def test_images_that_were_made_of_something_else_are_refused_by_name(tmp_path):
    folder = folder_of(tmp_path / "images")
    folder.add({0: image(0)})
    with pytest.raises(ValueError, match=r"encoder: a -> b\nWhat to do: name another folder with --out, or delete that one\.$"):
        ImageFolder(folder.path).claim({**OURS, "encoder": "b"})
    with pytest.raises(ValueError, match="vae: None -> v"):
        ImageFolder(folder.path).claim({**OURS, "vae": "v"})
    assert content(folder) == {0: image(0)}


def test_batches_do_not_depend_on_what_is_there_already():
    assert missing_batches(7, set(), 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert missing_batches(7, {0, 1, 2}, 3) == [[3, 4, 5], [6]]
    assert missing_batches(7, {3}, 3) == [[0, 1, 2], [4, 5], [6]]
    assert missing_batches(7, set(range(7)), 3) == []


@pytest.mark.parametrize("damage", [lambda png: b"", lambda png: png[:-20], lambda png: png[:50] + b"?" + png[51:], lambda _png: image(0)])
def test_a_damaged_or_exchanged_image_is_missing_and_generated_again(tmp_path, damage, caplog):
    folder = folder_of(tmp_path / "images")
    folder.add({0: image(0), 1: image(1)})
    assert folder.present() == {0, 1} and not caplog.text
    folder.file(1).write_bytes(damage(image(1)))
    assert folder.present() == {0}
    assert f"{folder.file(1)} is not the image that was generated: it is generated again" in caplog.text
    assert missing_batches(2, folder.present(), 2) == [[1]]
    folder.add({1: image(1)})
    assert content(folder) == {0: image(0), 1: image(1)}


def test_the_last_hash_of_an_image_counts_and_a_damaged_line_counts_as_none(tmp_path):
    folder = folder_of(tmp_path / "images")
    folder.add({0: image(0), 1: image(1)})
    folder.add({0: image(2)})
    assert content(folder) == {0: image(2), 1: image(1)}
    with (folder.path / SUMS).open("ab") as sums:
        sums.write(b"12345678  00001.png\n\xff\n  \n7")
    assert folder.present() == {0}


def test_complete_images_without_hashes_are_kept_and_get_them(tmp_path, caplog):
    folder = folder_of(tmp_path / "images")
    assert folder.present() == set() and not caplog.text
    folder.add({number: image(number) for number in range(4)})
    (folder.path / SUMS).unlink()
    folder.file(2).write_bytes(image(2)[:-20])
    folder.file(3).write_bytes(image(3)[:50] + b"?" + image(3)[51:])
    assert folder.present() == {0, 1}
    assert caplog.text.count("has no sha256sums.txt: the 2 complete images are kept") == 1
    caplog.clear()
    folder.add({2: image(2), 3: image(3)})
    assert content(folder) == {number: image(number) for number in range(4)} and not caplog.text


def test_images_without_a_record_of_what_they_were_made_of_are_refused(tmp_path):
    folder = folder_of(tmp_path / "images")
    folder.add({0: image(0)})
    (folder.path / MADE_OF).unlink()
    with pytest.raises(ValueError, match=r"holds images, but not made_of\.json(.|\n)*What to do: name another folder"):
        ImageFolder(folder.path).claim(OURS)


def test_what_a_record_says_is_printed_escaped(tmp_path):
    folder = folder_of(tmp_path / "images")
    (folder.path / MADE_OF).write_text('{"encoder": "\\ud800\\u001b[2J"}')
    with pytest.raises(ValueError, match="were made of something else") as caught:
        folder.claim(OURS)
    assert all(line.isprintable() for line in str(caught.value).splitlines())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_not_a_plain_file_counts_as_missing(tmp_path):
    folder = folder_of(tmp_path / "images")
    os.mkfifo(folder.file(0))
    folder.file(1).mkdir()
    assert folder.present() == set()


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", "[" * 200_000, '"\xff'])
def test_a_damaged_record_is_refused_by_its_name(tmp_path, text):
    folder = folder_of(tmp_path / "images")
    (folder.path / MADE_OF).write_text(text)
    with pytest.raises(ValueError, match=r"made_of\.json is not valid JSON(.|\n)*What to do: name another folder"):
        folder.claim(OURS)
