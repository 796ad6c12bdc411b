"""`train watch`: the run's page and samples over HTTP, on this machine alone, and nothing else."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator

import pytest
from distilled_t5.runtime.errors import UserError
from distilled_t5.tests.support.runs import made_up_run
from distilled_t5.train.watch import LOOPBACK, Server, open_server

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    run = made_up_run(tmp_path / "run")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    with open_server(str(run.path), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: Server, address: str, **headers: str) -> tuple[int, bytes, str]:
    """Status, content and type; the address is sent as it is."""
    connection = http.client.HTTPConnection(LOOPBACK, server.server_address[1])
    connection.putrequest("GET", address, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers["Content-Type"]


def test_the_page_and_its_samples_are_served_and_the_newest_page_is(server, tmp_path):
    status, content, kind = get(server, "/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert content == (tmp_path / "run" / "page.html").read_bytes()
    (tmp_path / "run" / "page.html").write_bytes(b"newer")
    assert get(server, "/page.html?again")[1] == b"newer"
    sample = tmp_path / "run" / "samples" / "step-000025-preview.jpg"
    assert get(server, "/samples/step-000025-preview.jpg") == (200, sample.read_bytes(), "image/jpeg")


@pytest.mark.parametrize(
    "address",
    [
        *("/recipe.toml", "/train.log", "/metrics.jsonl", "/checkpoints/", "/samples/", "/samples", "/../secret.jpg"),
        *("/samples/../recipe.toml", "/samples/../../secret.jpg", "/samples/%2e%2e/%2e%2e/secret.jpg", "/samples//etc/passwd"),
        *("/samples/step-000026-preview.jpg", "/samples/step-000025-preview.jpg/..", "/samples/step-000025-preview.jpg%00", "/etc/passwd"),
    ],
)
def test_nothing_else_of_the_disk_is_served(server, address):
    assert get(server, address)[0] == 404


def test_only_this_machine_can_reach_it_and_only_under_its_own_name(server):
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, "/", Host="evil.example:80")[0] == 403
    assert get(server, "/", Host=f"localhost:{server.server_address[1]}")[0] == 200
    for without_port in ("localhost", "127.0.0.1"):  # as a browser sends it for port 80
        assert get(server, "/", Host=without_port)[0] == 200


def test_a_port_in_use_is_a_clear_error(server, tmp_path):
    port = server.server_address[1]
    with pytest.raises(UserError, match=rf"Port {port} is in use.\nWhat to do: give another one with --port"):
        open_server(str(tmp_path / "run"), port)
    with pytest.raises(UserError, match="Port 70000 cannot be used"):
        open_server(str(tmp_path / "run"), 70_000)


def test_a_folder_without_a_run_is_refused_and_a_run_without_a_page_gets_one(tmp_path):
    with pytest.raises(UserError, match="There is no run in"):
        open_server(str(tmp_path), 0)
    run = made_up_run(tmp_path / "run", steps=30)
    run.page.unlink()
    open_server(str(run.path), 0).server_close()
    assert '"state": "stopped"' in run.page.read_text(encoding="utf-8")
