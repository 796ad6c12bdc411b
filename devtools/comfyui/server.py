"""A real ComfyUI in a separate process, with this pack installed as a user would install it, driven through its HTTP API."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

MODEL_FOLDERS = ("controlnet", "diffusion_models", "embeddings", "loras", "text_encoders", "vae")
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.1
LOG_TAIL_LINES = 60
# A file, because ComfyUI 0.16 opens another in-memory database in each thread and then misses the tables.
DATABASE = "user/server.db"
# With this, glibc takes every tensor of a megabyte or more from the system, zeroed, and reuses none: the T5-XXL stand-in relies on weights
# that ComfyUI allocates and never fills.
FRESH_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class PromptFailed(RuntimeError):
    """A prompt that ComfyUI refused or that stopped with an error; `node_id` is "" if ComfyUI names no node."""

    def __init__(self, node_id: str, message: str) -> None:
        super().__init__(f"node {node_id}: {message}" if node_id else message)
        self.node_id = node_id
        self.message = message


class ComfyServer:
    """A headless ComfyUI that sees only `base` and the pack; a context manager.

    `comfyui` is the folder of ComfyUI's main.py; `base` gets models, custom_nodes, input, output, temp and user; `flags` are further
    command-line flags of ComfyUI; `port` 0 chooses a free one. RuntimeError with the end of the log if the server does not start.
    """

    def __init__(self, comfyui: Path, base: Path, pack: Path, flags: tuple[str, ...] = (), port: int = 0) -> None:
        self.comfyui, self.base, self.pack, self.flags = comfyui.resolve(), base.resolve(), pack.resolve(), flags
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = self.base / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ComfyServer":
        require_free_port(self.port)
        prepare_base(self.base, self.pack)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                server_command(self.base, self.pack, self.port, self.flags),
                cwd=self.comfyui,
                env=server_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            self._raise_if_ended("while it started")
            with contextlib.suppress(OSError):
                self.get_json("/system_stats")
                return
            time.sleep(POLL_S)
        raise RuntimeError(f"ComfyUI did not answer within {START_TIMEOUT_S:.0f} s. The end of its log:\n{self._log_tail()}")

    def _raise_if_ended(self, when: str) -> None:
        if self._process is None:
            raise RuntimeError("the ComfyUI server is not running: use it inside its `with` block")
        if self._process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with code {self._process.returncode} {when}. The end of its log:\n{self._log_tail()}")

    def stop(self) -> None:
        """End the server and all processes that it started; does nothing if it has ended."""
        if self._process is None:
            return
        end_process_group(self._process)
        self._process = None

    def wait_for_end(self) -> None:
        """Wait until the server ends without being stopped; then RuntimeError with the end of its log."""
        assert self._process is not None, "only inside the `with` block"
        self._process.wait()
        self._raise_if_ended("while it served")

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        self._raise_if_ended("before its id was asked for")
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """What the server has printed so far, without colours."""
        return TERMINAL_COLOUR.sub("", self.log_path.read_text(encoding="utf-8", errors="replace"))

    def _log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-LOG_TAIL_LINES:])

    def get(self, path: str) -> bytes:
        """Body of GET `path`; urllib.error.HTTPError on a status that is not 2xx."""
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return reply.read()

    def get_json(self, path: str) -> Any:
        """Decoded JSON of GET `path`."""
        return json.loads(self.get(path))

    def post_json(self, path: str, body: dict[str, Any]) -> Any:
        """Decoded JSON reply (None when empty) of POST `path`."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            text = reply.read()
        return json.loads(text) if text.strip() else None

    def object_info(self) -> dict[str, Any]:
        """Inputs, outputs and texts of every node type of the server."""
        return self.get_json("/object_info")

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue an API prompt and return its id; PromptFailed with ComfyUI's validation messages if it is refused."""
        try:
            return str(self.post_json("/prompt", {"prompt": prompt})["prompt_id"])
        except urllib.error.HTTPError as error:
            raise refusal(error.read().decode(errors="replace")) from None

    def wait(self, prompt_id: str, timeout_s: float = 300.0) -> dict[str, Any]:
        """The history entry of a prompt when it has finished; PromptFailed if it failed, TimeoutError if it still runs."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self._raise_if_ended("while a prompt ran")
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                raise_if_failed(entry)
                return entry
            time.sleep(POLL_S)
        raise TimeoutError(f"the prompt did not finish within {timeout_s:.0f} s. The end of the server's log:\n{self._log_tail()}")

    def run(self, prompt: dict[str, Any], timeout_s: float = 300.0) -> dict[str, Any]:
        """Queue an API prompt and wait for its history entry."""
        return self.wait(self.queue(prompt), timeout_s)

    def images_by_node(self, entry: dict[str, Any]) -> dict[str, list[Image.Image]]:
        """The pictures of a history entry by the id of the node that wrote them."""
        outputs = {node_id: output["images"] for node_id, output in entry["outputs"].items() if "images" in output}
        return {node_id: [self._view(image) for image in images] for node_id, images in outputs.items()}

    def images(self, entry: dict[str, Any]) -> list[Image.Image]:
        """The pictures of a history entry, in the order of the node ids."""
        by_node = self.images_by_node(entry)
        return [image for node_id in sorted(by_node, key=node_order) for image in by_node[node_id]]

    def _view(self, image: dict[str, str]) -> Image.Image:
        return Image.open(io.BytesIO(self.get("/view?" + urllib.parse.urlencode(image))))

    def free(self) -> None:
        """Ask ComfyUI to unload all models and drop all cached results; it does so as soon as it is idle."""
        self.post_json("/free", {"unload_models": True, "free_memory": True})


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def require_free_port(port: int) -> None:
    """ValueError if a process on this machine already listens on the port."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ValueError(f"port {port} is in use: stop the process that listens there, or choose another with --port")


def prepare_base(base: Path, pack: Path) -> None:
    """Make the folders that ComfyUI expects, link the pack into custom_nodes and turn off the first-run dialog."""
    for name in ("custom_nodes", "input", "output", "temp", "user/default", *(f"models/{kind}" for kind in MODEL_FOLDERS)):
        (base / name).mkdir(parents=True, exist_ok=True)
    link_folder(base / "custom_nodes" / pack.name, pack)
    (base / DATABASE).unlink(missing_ok=True)  # it may be of another version of ComfyUI
    settings_path = base / "user" / "default" / "comfy.settings.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8")) if settings_path.exists() else {}
    settings_path.write_text(json.dumps({**settings, "Comfy.TutorialCompleted": True}, indent=4), encoding="utf-8")


def link_folder(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target`; on Windows a junction, which needs no privilege."""
    if link.exists() and link.resolve() == target.resolve():
        return
    if link.is_symlink():
        link.unlink()
    if sys.platform == "win32":
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=True, capture_output=True)
    else:
        link.symlink_to(target, target_is_directory=True)


def server_command(base: Path, pack: Path, port: int, flags: tuple[str, ...]) -> list[str]:
    """The command line of a ComfyUI without browser, API nodes and other packs; on the CPU if there is no GPU."""
    command = [sys.executable, "main.py", "--port", str(port), "--disable-auto-launch", "--base-directory", str(base)]
    command += ["--database-url", f"sqlite:///{(base / DATABASE).as_posix()}", "--disable-api-nodes", "--disable-all-custom-nodes"]
    command += ["--whitelist-custom-nodes", pack.name]
    from ...runtime.accelerator import accelerator_type  # which imports torch

    return command + ([] if accelerator_type() else ["--cpu"]) + list(flags)


def server_environment() -> dict[str, str]:
    """This process's environment without our module path, so that the server sees the pack only as a custom node."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"} | FRESH_MEMORY


def end_process_group(process: "subprocess.Popen[bytes]") -> None:
    """Terminate a process and its children, and kill them if they do not end."""
    send_to_group(process, force=False)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    finally:
        # Also if a second Ctrl-C interrupts the wait.
        send_to_group(process, force=True)
    process.wait()


def send_to_group(process: "subprocess.Popen[bytes]", force: bool) -> None:
    """Terminate, or kill with `force`, a process started with `start_new_session` and its children."""
    if sys.platform == "win32":
        if process.poll() is None:
            process.kill() if force else process.terminate()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)


def refusal(body: str) -> PromptFailed:
    """The error for a prompt that /prompt answered with 400: every message of every node, the first node's id."""
    try:
        answer = json.loads(body)
    except json.JSONDecodeError:
        return PromptFailed("", body)
    lines, nodes = [answer.get("error", {}).get("message", body)], answer.get("node_errors") or {}
    for node_id, node in nodes.items():
        lines += [f"{node['class_type']} ({node_id}): {error['message']}: {error['details']}" for error in node["errors"]]
    return PromptFailed(next(iter(nodes), ""), "\n".join(lines))


def raise_if_failed(entry: dict[str, Any]) -> None:
    """PromptFailed if a history entry records an error or an interruption."""
    status = entry.get("status") or {}
    for kind, detail in status.get("messages", []):
        if kind == "execution_error":
            raise PromptFailed(str(detail["node_id"]), detail["exception_message"])
        if kind == "execution_interrupted":
            raise PromptFailed(str(detail.get("node_id", "")), "the prompt was interrupted")
    if status.get("status_str") == "error":
        raise PromptFailed("", f"the prompt failed without a message: {status}")


def node_order(node_id: str) -> list[tuple[int, int, str]]:
    """Sort key of node ids: "9" before "10", and "12:3" inside a subgraph after "12"."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in node_id.split(":")]
