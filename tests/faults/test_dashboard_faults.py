"""A dashboard that answers wrong, or not at all, in the middle of a conversation: one line, exit code 3."""

import json
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs import cli

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "smoke.toml"


class Dashboard(BaseHTTPRequestHandler):
    """Says its version like any other; what comes then is the server's `fault`."""

    def do_GET(self) -> None:
        import ray

        fault = self.server.fault
        if self.path == "/api/version":
            version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": "s"}
            self.answer(200, json.dumps(version))
        elif self.path == "/api/jobs/" and fault != "upload":
            self.spoil(fault)
        elif self.path == "/api/jobs/":
            self.answer(200, "[]")
        else:  # is the upload there already?
            self.answer(404, "no")

    def do_PUT(self) -> None:
        self.spoil("reset")

    def spoil(self, fault: str) -> None:
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        answers = {"500": (500, "out of order"), "401": (401, "token?"), "words": (200, "<html>")}
        self.answer(*answers[fault])

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Silent."""


class Server(ThreadingHTTPServer):
    fault = ""

    def handle_error(self, *_: object) -> None:
        """A connection that was cut is what is asked for."""


@pytest.fixture
def dashboard() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Dashboard)
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


LIST, SUBMIT = ["job", "list"], ["submit", "--json"]
CASES = [
    (words, fault, "cannot be listed") for words in (LIST, SUBMIT) for fault in ("500", "reset", "words")
]


@pytest.mark.parametrize(
    ("words", "fault", "expected"),
    [*CASES, (LIST, "401", "token"), (SUBMIT, "401", "token"), (SUBMIT, "upload", "may not have started")],
)
def test_a_dashboard_that_breaks_off_is_one_line_and_exit_code_3(
    words: list[str], fault: str, expected: str, dashboard: Server, capsys, monkeypatch
):
    dashboard.fault = fault
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 64)
    address = ["--address", f"http://127.0.0.1:{dashboard.server_port}"]
    what = [words[0], *address, *words[1:], "run", str(SMOKE)] if words == SUBMIT else [*words, *address]
    assert cli.main(what) == 3
    said = capsys.readouterr().err  # Ray tells of its upload, to a stream of an earlier test
    (line,) = [line for line in said.splitlines() if line.startswith("krony ")]
    assert str(dashboard.server_port) in line
    assert expected in line
