"""A process that opens encoder files under a limit of memory, one after the other, and says how each of them ended."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
START = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import conftest; from distilled_t5.tests.support.load_worker import work; work()"
# What opening a small file may take beyond the file's own size: Python's and torch's small change, and 8 MB for a thread.
SLACK_BYTES = 48 << 20
TIMEOUT_S = 30.0


class LoadWorker:
    """A context manager; `verdict(path)` tells how opening and loading a file ends."""

    def __enter__(self) -> LoadWorker:
        self._start()
        return self

    def _start(self) -> None:
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        # A file, because a pipe that nobody reads would stop the process once it is full.
        self._complaints = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in _stop)
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            encoding="utf-8",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put("")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._complaints):
            if stream is not None:
                stream.close()

    def verdict(self, path: Path) -> dict[str, Any]:
        """`refused` with the message, `loaded` with a digest and the metadata, or `broke` with what happened instead."""
        answer = self._ask(path)
        if answer["verdict"] == "broke":
            self._stop()
            self._start()
        return answer

    def _ask(self, path: Path) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(str(path)), file=self._process.stdin, flush=True)
        try:
            reply = self._replies.get(timeout=TIMEOUT_S)
        except queue.Empty:
            return {"verdict": "broke", "error": f"no answer within {TIMEOUT_S:.0f} s"}
        if not reply:
            status = self._process.wait()
            self._complaints.seek(0)
            return {"verdict": "broke", "error": f"the process ended with {status}: {self._complaints.read()[-2000:]}"}
        return json.loads(reply)


def work() -> None:
    """Answer each path on the standard input with one line of JSON."""
    _warm_up()
    for line in sys.stdin:
        path = Path(json.loads(line))
        with _memory_limited(path.stat().st_size):
            answer = _answer(path)
        print(json.dumps(answer), flush=True)


def _warm_up() -> None:
    """Import and start everything that opening files needs, so that only the files count against the limit."""
    import torch

    from .tiny_students import published_file

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        assert _answer(published_file(Path(folder, "warm.safetensors")))["verdict"] == "loaded"


def _answer(path: Path) -> dict[str, Any]:
    from ...encoder.files import open_student
    from ...runtime.errors import StudentFileError
    from .tiny_students import tensor_digest

    try:
        student = open_student(path)
        tensors = student.load()
        return {"verdict": "loaded", "digest": tensor_digest(tensors), "metadata": _told(student.metadata)}
    except StudentFileError as error:
        if "memory" in f"{error.__cause__!r}".lower():
            return {"verdict": "broke", "error": f"asked for more memory than the file has: {error.__cause__!r}"}
        return {"verdict": "refused", "message": str(error)}
    except BaseException:  # noqa: BLE001 (whatever it is, it is the finding)
        return {"verdict": "broke", "error": traceback.format_exc()}


def _told(metadata: Any) -> list[Any]:
    return [metadata.family, metadata.token_length, metadata.pooled, metadata.projection, metadata.text_width]


@contextlib.contextmanager
def _memory_limited(file_size: int) -> Any:
    """Let this process grow by the file's size and a little more, where the system can limit that (Linux)."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # A file is mapped into memory twice at most: once to look at its header, once to read it.
    limit = pages * resource.getpagesize() + 2 * file_size + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
