"""`train watch RUN`: a run's page and samples over HTTP on this machine alone; the page refreshes itself while the run trains."""

from __future__ import annotations

import errno
import functools
import os
import socketserver
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from ..runtime.disk import read_file
from ..runtime.errors import UserError
from .page import SAMPLE, RunPage
from .recipe import load_recipe
from .run_directory import RunDirectory

LOOPBACK, PORT = "127.0.0.1", 8189
NAMES = (LOOPBACK, "localhost")


class Server(socketserver.ThreadingTCPServer):
    """Listens on the loopback interface only."""

    daemon_threads = True
    # On Windows the option would let two servers share a port.
    allow_reuse_address = os.name == "posix"


class Handler(BaseHTTPRequestHandler):
    """Answers GET for the page and for files of samples/ by their names; everything else does not exist."""

    def __init__(self, run: RunDirectory, *arguments: Any) -> None:
        self.run = run
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Send the page, a sample, or the reason why not."""
        host = self.headers.get("Host", "").partition(":")[0]
        if host not in NAMES:  # another site's name that points here must not read the run
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        found = self._found(self.path.partition("?")[0])
        try:
            content = None if found is None else read_file(found)
        except OSError:
            content = None
        if content is None or found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8" if found == self.run.page else "image/jpeg")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def _found(self, address: str) -> Path | None:
        if address in ("/", "/page.html"):
            return self.run.page
        folder, _, name = address.rpartition("/")
        return self.run.samples / name if folder == "/samples" and SAMPLE.fullmatch(name) else None

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name in http.server)
        """Print nothing for each request."""


def open_server(folder: str, port: int = PORT) -> Server:
    """A server of the run in this folder; port 0 is any free one. Raises UserError if it is not a run, or if the port is in use."""
    run = RunDirectory(folder).existing()
    if not run.page.is_file():
        recipe = load_recipe(str(run.recipe))
        page = RunPage(run, recipe)
        page.state = "stopped"
        page.write(page.curves.newest.get("step", 0), None)
    try:
        return Server((LOOPBACK, port), functools.partial(Handler, run))
    except (OSError, OverflowError) as error:
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise UserError(
            f"Port {port} {'is in use' if in_use else f'cannot be used: {error}'}.",
            "give another one with --port, or let the system choose with --port 0.",
        ) from error
