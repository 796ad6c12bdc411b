"""The two commands that a newcomer runs, as dev.py starts them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distilled_t5.devtools.server import free_port
from PIL import Image

PACK_AS_MODULE = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); import conftest; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
)


def command(module: str, comfyui: Path, *arguments: str) -> list[str]:
    tests = str(Path(__file__).resolve().parent.parent)
    return [sys.executable, "-c", PACK_AS_MODULE, tests, f"distilled_t5.devtools.{module}", "--comfyui", str(comfyui), *arguments]


def test_demo_leaves_pictures_and_timings(comfyui_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo-output"
    done = subprocess.run(command("demo", comfyui_path, "--out", str(out)), capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Loaded by Distilled T5 Loader:" in done.stdout
    assert "stand-ins" in done.stdout, "it says that the pictures are noise"
    timings = json.loads((out / "timings.json").read_text(encoding="utf-8"))
    assert len(timings["runs"]) == 2
    for run in timings["runs"]:
        with Image.open(out / run["file"]) as picture:
            assert list(picture.size) == run["size_px"]
            assert len(picture.getcolors(1 << 24) or []) > 1000, "a picture of one colour is no picture"
        assert run["seconds"] > 0
    assert "T5-Base from distilled_t5_base.safetensors" in timings["runs"][0]["loaded"]
    first, second = (Image.open(out / run["file"]).tobytes() for run in timings["runs"])
    assert first != second, "another prompt gives another picture"


@contextmanager
def serving(comfyui: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command("serve", comfyui, "--port", str(port)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_serve_prints_its_address_answers_there_and_ends_when_asked(comfyui_path: Path) -> None:
    port = free_port()
    with serving(comfyui_path, port) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        ready = next((line for line in lines if line.startswith("Ready:")), "it ended before it was ready")
        assert ready.split() == ["Ready:", f"http://127.0.0.1:{port}"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/object_info/DistilledT5Loader", timeout=60) as reply:
            assert "distilled_t5_base.safetensors" in reply.read().decode()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert "Stopped." in process.stdout.read()
    assert not _answers(port), "the server ended with it"


def _answers(port: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/system_stats", timeout=5).close()
        except OSError:
            return False
        time.sleep(0.2)
    return True


def test_serve_says_it_when_the_port_is_taken(comfyui_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = subprocess.run(command("serve", comfyui_path, "--port", port), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert f"port {port} is in use" in done.stderr
    assert "--port" in done.stderr
