"""Writing encoder files whole or not at all, and reading them back bit by bit."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distilled_t5.encoder.files import open_student, write_student
from distilled_t5.encoder.metadata import HASH_KEY, StudentMetadata
from distilled_t5.runtime import disk
from distilled_t5.runtime.disk import ABANDONED_S, UNFINISHED, remove_abandoned
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.runtime.lock import lock
from distilled_t5.runtime.weights import check_finite, data_sha256, read_header
from distilled_t5.students.t5.layout import SHARED
from distilled_t5.tests.support.tiny_students import TINY, published_file, taken_apart, tensor_digest, tiny_tensors

TESTS = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with the pack registered."""
    start = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import conftest\n"
    command = [sys.executable, "-c", start + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read_bit_by_bit(dtype, tmp_path):
    path = write_student(tmp_path / "student.safetensors", tiny_tensors(dtype=dtype))
    student = open_student(path)
    assert student.dtype == dtype
    assert student.layout == TINY
    assert tensor_digest(student.load()) == tensor_digest(tiny_tensors(dtype=dtype))


@pytest.mark.parametrize(
    ("few", "many", "widest"),
    [
        (torch.float32, torch.float8_e4m3fn, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float8_e5m2, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_tensors_of_different_dtypes_keep_them_and_the_file_has_one_that_holds_all(few, many, widest, tmp_path):
    mixed = tiny_tensors(dtype=many) | {name: tensor.to(few) for name, tensor in tiny_tensors().items() if "norm" in name}
    student = open_student(write_student(tmp_path / "student.safetensors", mixed))
    assert student.dtype == widest
    assert tensor_digest(student.load()) == tensor_digest(mixed)


@pytest.mark.parametrize("make", ["authors.safetensors", "ours.safetensors"])
def test_any_file_read_and_written_again_has_the_same_tensors(make, tmp_path):
    path = tmp_path / make
    if make == "authors.safetensors":
        published_file(path)
    else:
        write_student(path, tiny_tensors())
    first = open_student(path)
    again = open_student(write_student(tmp_path / "again.safetensors", first.load(), first.metadata))
    assert tensor_digest(again.load()) == tensor_digest(tiny_tensors())
    assert again.layout == first.layout
    assert again.metadata.token_length == first.metadata.token_length


def test_the_data_of_two_writings_is_the_same(tmp_path):
    once, twice = (write_student(tmp_path / f"{name}.safetensors", tiny_tensors()) for name in ("once", "twice"))
    assert taken_apart(once.read_bytes())[1] == taken_apart(twice.read_bytes())[1]
    assert data_sha256(once) == data_sha256(twice) == hashlib.sha256(taken_apart(once.read_bytes())[1]).hexdigest()


def test_tensors_that_are_views_or_need_gradients_are_written_as_they_look(tmp_path):
    tensors = tiny_tensors(dtype=torch.float32)
    odd = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else torch.stack([tensor, tensor], 1)[:, 0]
        for name, tensor in tensors.items()
    }
    odd[SHARED].requires_grad_()
    student = open_student(write_student(tmp_path / "student.safetensors", odd))
    assert tensor_digest(student.load()) == tensor_digest(tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_neither_written_nor_read(dtype, value, tmp_path):
    if dtype == torch.float8_e4m3fn:
        value = float("nan")  # it has no infinity
    tensors = tiny_tensors(dtype=dtype)
    broken = [SHARED, "encoder.encoder.final_layer_norm.weight"]
    for name in broken:
        tensors[name] = tensors[name].float().index_fill(0, torch.tensor([3]), value).to(dtype)
    path = published_file(tmp_path / "student.safetensors", tensors)
    for act in (lambda: open_student(path).load(), lambda: write_student(tmp_path / "new.safetensors", tensors)):
        with pytest.raises(StudentFileError, match=r"(?s)2 tensors hold NaN or infinity.*What to do: ") as caught:
            act()
        assert all(f"  {name}\n" in str(caught.value) for name in broken)
    assert not (tmp_path / "new.safetensors").exists()


def test_the_largest_finite_numbers_are_fine(tmp_path):
    for dtype in DTYPES:
        extreme = {name: torch.full_like(t, torch.finfo(dtype).max) for name, t in tiny_tensors(dtype=dtype).items()}
        check_finite(extreme, "file")


def test_progress_is_reported_and_the_callback_can_stop_loading(tmp_path):
    student = open_student(published_file(tmp_path / "student.safetensors"))
    seen: list[tuple[int, int]] = []
    student.load(lambda done, total: seen.append((done, total)))
    total = len(TINY.tensors())
    assert seen == [(0, total)] * total + [(number, total) for number in range(1, total + 1)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        student.load(stop)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(SHARED),
        lambda tensors: tensors.update(extra=torch.zeros(3)),
        lambda tensors: tensors.update({SHARED: tensors[SHARED].to(torch.int32)}),
    ],
    ids=["missing", "extra", "integers"],
)
def test_what_could_not_be_read_is_not_written(change, tmp_path):
    target = write_student(tmp_path / "student.safetensors", tiny_tensors())
    before = target.read_bytes()
    tensors = tiny_tensors(seed=1)
    change(tensors)
    with pytest.raises(StudentFileError, match="What to do: "):
        write_student(target, tensors)
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["student.safetensors"]


@pytest.mark.parametrize("folder", ["missing", "file.txt"])
def test_folder_that_cannot_hold_the_file_is_reported(folder, tmp_path):
    (tmp_path / "file.txt").write_text("no folder")
    with pytest.raises(OSError, match=r"(?s)student.safetensors could not be written.*What to do: "):
        write_student(tmp_path / folder / "student.safetensors", tiny_tensors())


# Each way of dying is tried in a fork of one process, because starting torch takes longer than all of them.
HARM = """
import os, resource, signal, torch
from pathlib import Path
from distilled_t5.tests.support.tiny_students import tiny_tensors
from distilled_t5.encoder.files import write_student

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def die_half_way(done, total):
    if way == "half" and done > total // 2:
        die()

# A fork of a process with threads of torch's would wait for them for ever.
torch.set_num_threads(1)
new = tiny_tensors(seed=1)
for way in sys.argv[2:]:
    if child := os.fork():
        print(way, os.waitpid(child, 0)[1], flush=True)
        continue
    if way == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    elif way != "half":
        setattr(os, way, die)
    try:
        write_student(Path(sys.argv[1], way, "student.safetensors"), new, progress=die_half_way)
    except OSError as error:
        Path(sys.argv[1], way + ".txt").write_text(str(error))
        os._exit(7)
    os._exit(0)
"""
WAYS_TO_DIE = {"half": "while the data is written", "fsync": "before it is on the disk", "replace": "before it has its name"}


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders in which a process came to harm while it replaced student.safetensors, and `full.txt`: what it said of a full disk."""
    folder = tmp_path_factory.mktemp("harmed")
    ways = ["full", *WAYS_TO_DIE]
    for way in ways:
        (folder / way).mkdir()
        write_student(folder / way / "student.safetensors", tiny_tensors())
    done = run_python(HARM, folder, *ways)
    assert done.stdout.splitlines() == [f"full {7 << 8}", *(f"{way} {signal.SIGKILL}" for way in WAYS_TO_DIE)], done.stderr
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit how much a process writes")
def test_disk_that_is_full_leaves_the_old_file_and_nothing_else(harmed):
    message = (harmed / "full.txt").read_text()
    assert "student.safetensors could not be written" in message
    assert "File too large" in message
    assert "What to do: " in message
    assert tensor_digest(open_student(harmed / "full" / "student.safetensors").load()) == tensor_digest(tiny_tensors())
    assert os.listdir(harmed / "full") == ["student.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("way", WAYS_TO_DIE, ids=WAYS_TO_DIE.values())
def test_process_killed_while_it_writes_leaves_the_old_file_and_the_next_one_cleans_up(way, harmed):
    folder = harmed / way
    assert tensor_digest(open_student(folder / "student.safetensors").load()) == tensor_digest(tiny_tensors())
    (left,) = set(os.listdir(folder)) - {"student.safetensors"}
    assert left.startswith(".")
    assert not left.endswith((".safetensors", ".sft", ".pth", ".pt", ".bin", ".ckpt")), "a file list would show it"

    write_student(folder / "other.safetensors", tiny_tensors())
    assert set(os.listdir(folder)) == {"student.safetensors", "other.safetensors"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_unfinished_file_of_a_living_process_stays_until_it_has_not_changed_for_an_hour(tmp_path):
    import fcntl

    gone = 2**22 + 1  # more than Linux and macOS give
    mine, in_a_container, dead = (tmp_path / f".x.safetensors.{process}{UNFINISHED}" for process in (os.getpid(), gone, gone + 1))
    dead.touch()
    mine.touch()
    with in_a_container.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_student(tmp_path / "student.safetensors", tiny_tensors())
        assert set(os.listdir(tmp_path)) == {"student.safetensors", mine.name, in_a_container.name}
    long_ago = time.time() - ABANDONED_S - 60
    os.utime(mine, (long_ago, long_ago))
    write_student(tmp_path / "student.safetensors", tiny_tensors())
    assert os.listdir(tmp_path) == ["student.safetensors"]


def test_a_file_that_is_being_written_is_not_taken_for_abandoned(tmp_path):
    def watched(_done: int, _total: int) -> None:
        remove_abandoned(tmp_path)

    assert open_student(write_student(tmp_path / "student.safetensors", tiny_tensors(), progress=watched)).load()


def test_run_folder_that_is_claimed_has_no_unfinished_files_left(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / f".map.png{UNFINISHED}").touch()
    (tmp_path / f".step-000100{UNFINISHED}").mkdir()
    (tmp_path / f".step-000100{UNFINISHED}" / "state.safetensors").touch()
    lock(tmp_path).close()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "plots"]


def test_files_of_others_are_never_cleaned_up(tmp_path):
    for name in (".model.safetensors.123.part", ".x.part", "student.safetensors.part", ".git"):
        (tmp_path / name).write_text("mine")
        os.utime(tmp_path / name, (0, 0))
    write_student(tmp_path / "student.safetensors", tiny_tensors())
    assert len(os.listdir(tmp_path)) == 5


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_student(tmp_path / "student.safetensors", tiny_tensors())
    assert os.listdir(tmp_path) == []


def test_new_file_takes_the_place_of_the_old_one(tmp_path):
    target = write_student(tmp_path / "student.safetensors", tiny_tensors())
    before = open_student(target)
    loaded = before.load()
    write_student(target, tiny_tensors(seed=1), StudentMetadata(token_length=9))
    assert tensor_digest(loaded) == tensor_digest(tiny_tensors()), "what was loaded before must not change with the file"
    assert tensor_digest(open_student(target).load()) == tensor_digest(tiny_tensors(seed=1))


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_file_that_appears_while_another_is_written_is_not_overwritten(tmp_path, monkeypatch, links):
    target = tmp_path / "student.safetensors"

    def refused(*_names: object) -> None:
        raise PermissionError

    def another_comes(done: int, total: int) -> None:
        if done == total:
            target.write_text("somebody's")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    written = write_student(target, tiny_tensors(), progress=another_comes, overwrite=False)
    assert target.read_text() == "somebody's"
    assert written.name == "student_00002.safetensors"
    assert tensor_digest(open_student(written).load()) == tensor_digest(tiny_tensors())
    assert sorted(os.listdir(tmp_path)) == ["student.safetensors", "student_00002.safetensors"]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_two_that_write_under_one_name_at_the_same_time_both_keep_their_file(tmp_path, monkeypatch, links):
    target, unused_path, taken = tmp_path / "student.safetensors", disk.unused_path, []

    def refused(*_names: object) -> None:
        raise PermissionError

    def taken_at_once(path: Path) -> Path:
        free = unused_path(path)
        if not taken:
            taken.append(free)
            free.write_text("the other's")
        return free

    target.write_text("older")
    monkeypatch.setattr(disk, "unused_path", taken_at_once)
    if not links:
        monkeypatch.setattr(os, "link", refused)
    written = write_student(target, tiny_tensors(), overwrite=False)
    assert (target.read_text(), taken[0].read_text()) == ("older", "the other's")
    assert written.name == "student_00003.safetensors"
    assert tensor_digest(open_student(written).load()) == tensor_digest(tiny_tensors())


def test_hash_stands_in_the_header_and_is_that_of_the_data(tmp_path):
    path = write_student(tmp_path / "student.safetensors", tiny_tensors())
    _, dtypes, header = read_header(path)
    assert set(dtypes.values()) == {"BF16"}
    assert header is not None
    assert header[HASH_KEY] == "0x" + data_sha256(path)


def test_names_in_any_script_can_be_written_and_read(tmp_path):
    path = write_student(tmp_path / "\u5c0f T5 \u00e9\u00df.safetensors", tiny_tensors())
    assert tensor_digest(open_student(str(path)).load()) == tensor_digest(tiny_tensors())


def test_link_to_a_file_is_as_good_as_the_file(tmp_path):
    published_file(tmp_path / "real.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    assert tensor_digest(open_student(tmp_path / "link.safetensors").load()) == tensor_digest(tiny_tensors())
