"""A stand-in for Hugging Face on this machine: the part of its API that an upload uses, and what was sent to it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Keeps the files of one repository by name.

    refuse: it answers every request with this status. exists, private: what the repository is before the upload.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.made: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.refuse = 0
        self.exists = self.private = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def do_POST(self) -> None:
        content = self._content()
        self.hub.asked.append(self.path)
        if self.hub.refuse:
            self._answer({"error": "not allowed"}, self.hub.refuse)
        elif self.path == "/api/validate-yaml":
            assert json.loads(content)["content"].startswith("---\n")
            self._answer({"errors": [], "warnings": []})
        elif self.path.startswith("/api/repos/create"):
            if self.hub.exists:
                self._answer({"error": "You already created this model repo", "url": f"{self.hub.address}/someone/student"}, 409)
                return
            self.hub.made = json.loads(content)
            self.hub.private = self.hub.made["visibility"] == "private"
            self._answer({"url": f"{self.hub.address}/someone/student", "name": "someone/student"})
        elif "/preupload/" in self.path:
            named = [file["path"] for file in json.loads(content)["files"]]
            modes = {name: "lfs" if name.endswith((".safetensors", ".jpg")) else "regular" for name in named}
            self._answer({"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            address = f"{self.hub.address}/large/"
            objects = [one | {"actions": {"upload": {"href": address + one["oid"]}}} for one in json.loads(content)["objects"]]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in content.splitlines()])
        else:
            self._answer({}, 404)

    def do_PUT(self) -> None:
        self.hub.large[self.path.rpartition("/")[2]] = self._content()
        self._answer({})

    def do_GET(self) -> None:
        self.hub.asked.append(self.path)
        if self.path.startswith("/api/models/"):
            self._answer({"id": "someone/student", "private": self.hub.private})
        else:
            self._answer({}, 404)

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                sent = self.hub.large[value["oid"]]
                assert hashlib.sha256(sent).hexdigest() == value["oid"]
                self.hub.files[value["path"]] = sent
        self._answer({"commitUrl": f"{self.hub.address}/someone/student/commit/abc", "commitOid": "abc", "success": True})

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, values: Any, status: int = 200) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: Any) -> None:
        pass


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A stand-in that answers until the context ends."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
