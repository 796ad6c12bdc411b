"""The messages that a page receives while a prompt runs: progress of every node, and the end."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import websocket

from ...devtools.comfyui.server import ComfyServer

TIMEOUT_S = 120.0
ENDS = ("execution_success", "execution_error", "execution_interrupted")


class Watched:
    """A prompt in the server's queue, and the messages about it."""

    def __init__(self, server: ComfyServer, prompt: dict[str, Any]) -> None:
        self.server, self.prompt = server, prompt
        self.progress: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def _messages(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Queue the prompt as a page does, and receive its messages."""
        client = uuid.uuid4().hex
        line = websocket.create_connection(f"{self.server.url.replace('http', 'ws')}/ws?clientId={client}", timeout=TIMEOUT_S)
        try:
            line.send(json.dumps({"type": "feature_flags", "data": {}}))
            self.server.post_json("/prompt", {"prompt": self.prompt, "client_id": client})
            yield (json.loads(text) for text in iter(line.recv, "") if isinstance(text, str))
        finally:
            line.close()

    def run(self, cancel_when: Callable[[str, int], bool] = lambda _node, _done: False) -> tuple[str, float]:
        """Run to the end; returns the kind of the last message, and the seconds from Cancel to it (0 without Cancel).

        Cancel is pressed at the first progress for which `cancel_when(node, done)` is true.
        """
        cancelled_at_s = 0.0
        with self._messages() as messages:
            for message in messages:
                kind, data = message["type"], message["data"]
                if kind == "progress":
                    self.progress.setdefault(data["node"], []).append((data["value"], data["max"]))
                    if not cancelled_at_s and cancel_when(data["node"], data["value"]):
                        cancelled_at_s = time.monotonic()
                        self.server.post_json("/interrupt", {})
                if kind in ENDS:
                    return kind, time.monotonic() - cancelled_at_s if cancelled_at_s else 0.0
        raise RuntimeError("the server closed the connection before the prompt ended")
