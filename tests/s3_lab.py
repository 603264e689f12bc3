"""A real S3 API on loopback, and a bad network in front of it.

The server is moto's, a process of its own. The proxy hands on every request unless a fault was asked for:
then it answers like a server in trouble, cuts or damages what passes, or kills somebody at that moment.
"""

import contextlib
import http.client
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = "lab"
WRITES = ("PUT", "POST", "DELETE")
ANSWERS = {
    "503": (503, "SlowDown"),
    "500": (500, "InternalError"),
    "429": (429, "TooManyRequestsException"),
    "403": (403, "AccessDenied"),
    "507": (507, "XMinioStorageFull"),
}
SIGNALS = {"kill-after": signal.SIGKILL, "interrupt": signal.SIGINT}
HANGS_S = 4.0


@dataclass(frozen=True)
class Request:
    """What passes the proxy."""

    method: str
    path: str
    """Bucket and key, with the query."""
    bytes: int


@dataclass
class Fault:
    """What happens to the requests for which `hits` is true, the first `times` of them."""

    kind: str
    hits: Callable[[Request], bool]
    times: int = 1
    victim: int = 0
    """Process that a fault of kind `kill` or `kill-after` ends."""
    done: int = 0


@dataclass
class Network:
    """The proxy: its port, what passed, and what shall go wrong."""

    port: int
    faults: list[Fault] = field(default_factory=list)
    log: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        """What AWS_ENDPOINT_URL is set to."""
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def fault(self, kind: str, hits: Callable[[Request], bool], **how: int) -> Iterator[Fault]:
        """A fault, for the time of the body."""
        fault = Fault(kind, hits, **how)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def due(self, request: Request) -> Fault | None:
        """Note a request, and say what is to happen to it."""
        with self.lock:
            self.log.append(request)
            for fault in self.faults:
                if fault.done < fault.times and fault.hits(request):
                    fault.done += 1
                    return fault
        return None


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until somebody listens there."""
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"the S3 server ended with code {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            return
        time.sleep(0.05)
    raise RuntimeError("the S3 server does not answer")


def free_port() -> int:
    """A port of loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(log: Path) -> Iterator[int]:
    """moto's S3 server with one empty bucket; its port."""
    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as out, subprocess.Popen(words, stdout=out, stderr=out) as process:
        try:
            wait_for(port, process)
            with urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT"), timeout=10
            ):
                yield port
        finally:
            process.kill()


@contextlib.contextmanager
def network(server_port: int) -> Iterator[Network]:
    """The proxy in front of a server."""
    with Proxy(("127.0.0.1", 0), Handler) as proxy:
        proxy.behind, proxy.net = server_port, Network(proxy.server_address[1])
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy.net
        finally:
            proxy.shutdown()
            thread.join()


class Proxy(ThreadingHTTPServer):
    """Listens on loopback."""

    daemon_threads = True
    net: Network
    behind: int
    """Port of the server."""


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_any(self) -> None:
        body = self.body()
        fault = self.server.net.due(Request(self.command, self.path.lstrip("/"), len(body)))
        kind = fault.kind if fault else ""
        if kind in ANSWERS:
            status, code = ANSWERS[kind]
            text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>planned</Message></Error>'
            self.answer(status, [("Content-Type", "application/xml")], text.encode())
            return
        if kind == "kill":
            os.kill(fault.victim, signal.SIGKILL)
        if kind == "hang":
            time.sleep(HANGS_S)
        if kind in ("kill", "hang", "reset"):
            self.reset()
            return
        status, headers, answer = self.forwarded(flipped(body) if kind == "flip-sent" else body)
        if kind in SIGNALS:
            os.kill(fault.victim, SIGNALS[kind])
        if kind in ("kill-after", "reset-after"):
            self.reset()
            return
        self.answer(status, headers, flipped(answer) if kind == "flip" else answer, cut=kind == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def forwarded(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        line = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=30)
        dropped = ("transfer-encoding", "content-length", "expect", "connection")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        line.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        response = line.getresponse()
        answer = response.read()
        line.close()
        return response.status, response.getheaders(), answer

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.reset(abortive=False)

    def reset(self, *, abortive: bool = True) -> None:
        self.close_connection = True
        if abortive:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


def flipped(data: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


def to(part: str, *methods: str) -> Callable[[Request], bool]:
    """Requests for keys that hold `part`, by these methods or all."""
    return lambda request: part in request.path and (not methods or request.method in methods)


def environment(net: Network) -> dict[str, str]:
    """What a process needs in its environment to use the lab as its object store."""
    return {
        "AWS_ENDPOINT_URL": net.url,
        "AWS_ACCESS_KEY_ID": "lab",
        "AWS_SECRET_ACCESS_KEY": "planted-secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
