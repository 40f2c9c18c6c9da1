"""A local HTTP server, and proxy, that misbehaves as it is told to."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Answer = Callable[["Handler", bytes | None], None]
"""What to do with a request for a file, which may not be there."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    name: str
    headers: dict[str, str]

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class BadServer:
    """Serves ``files`` from every folder, one after another as ``script`` says, then as ``rule`` says of the number."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, bytes] = {"index.json": b"{}"}
        self.script: list[Answer] = []
        self.rule: Callable[[int], Answer] = lambda number: ranged
        self.requests: list[Request] = []
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self._tls = tls
        self._port = 0
        self._server: _Server | None = None
        self.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.host}/sets/train"

    def asked_for(self, name: str) -> list[str | None]:
        """Ranges of the requests for a file."""
        return [request.range for request in self.requests if request.name == name]

    def start(self) -> None:
        """Listen, at the same port as before."""
        self.stopped.clear()
        self._server = _Server(self, self._port)
        self._port = self._server.server_port
        if self._tls is not None:
            # The handshake is left to the thread of the connection.
            self._server.socket = self._tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Break off everything and refuse connections."""
        if self._server is not None:
            self.stopped.set()
            self._server.shutdown()
            self._server.server_close()
            self.hang_up()
            self._server = None

    def hang_up(self) -> None:
        """Close all connections, also those that wait for a request."""
        assert self._server is not None
        for connection in list(self._server.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def bad_server(tls: ssl.SSLContext | None = None) -> Iterator[BadServer]:
    server = BadServer(tls)
    try:
        yield server
    finally:
        server.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, owner: BadServer, port: int) -> None:
        self.owner = owner
        self.connections: set[Any] = set()
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up here all the time."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        self.server.connections.add(self.request)
        super().setup()

    def finish(self) -> None:
        self.server.connections.discard(self.request)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        owner = self.server.owner
        name = unquote(urlsplit(self.path).path.rpartition("/")[2])
        with owner.lock:
            owner.requests.append(Request("GET", self.path, name, {k.lower(): v for k, v in self.headers.items()}))
            answer = owner.script.pop(0) if owner.script else owner.rule(len(owner.requests) - 1)
        answer(self, owner.files.get(name))

    def do_CONNECT(self) -> None:
        owner = self.server.owner
        owner.requests.append(Request("CONNECT", self.path, "", dict(self.headers)))
        if owner.script:
            owner.script.pop(0)(self, None)
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as there:
            self.send_response(200)
            self.end_headers()
            pump = threading.Thread(target=_pump, args=(there, self.connection), daemon=True)
            pump.start()
            _pump(self.connection, there)
            pump.join(timeout=10)
        self.close_connection = True

    def span(self, size: int) -> tuple[int, int]:
        """First byte and end of what is asked for."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found is None:
            return 0, size
        return int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)

    def start_range(self, data: bytes, **headers: str) -> bytes:
        """The head of a good answer; returns the body that belongs to it."""
        start, end = self.span(len(data))
        assert start < end, "whoever asks for more than there is gets no answer"
        self.send_response(206)
        all_headers = {
            "Content-Length": str(end - start),
            "Content-Range": f"bytes {start}-{end - 1}/{len(data)}",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        for name, value in all_headers.items():
            self.send_header(name, value)
        self.end_headers()
        return data[start:end]

    def break_off(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


# Answers


def ranged(handler: Handler, data: bytes | None) -> None:
    """As it should be."""
    if data is None:
        status(404)(handler, data)
    elif handler.span(len(data))[0] >= len(data):
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(data)}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
    else:
        handler.wfile.write(handler.start_range(data))


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    """Nothing but a status."""

    def answer(handler: Handler, data: bytes | None) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def cut(after: int) -> Answer:
    """The connection breaks in the middle of the body."""

    def answer(handler: Handler, data: bytes | None) -> None:
        assert data is not None
        handler.wfile.write(handler.start_range(data)[:after])
        handler.break_off()

    return answer


def short(num_bytes: int) -> Answer:
    """A range that is shorter than the wanted one, and says so."""

    def answer(handler: Handler, data: bytes | None) -> None:
        assert data is not None
        start, end = handler.span(len(data))
        end = min(end, start + num_bytes)
        handler.wfile.write(
            handler.start_range(
                data, Content_Length=str(end - start), Content_Range=f"bytes {start}-{end - 1}/{len(data)}"
            )[: end - start]
        )

    return answer


def whole(handler: Handler, data: bytes | None) -> None:
    """A server that knows no ranges."""
    (status(404) if data is None else status(200, data))(handler, data)


def whole_in_chunks(handler: Handler, data: bytes | None) -> None:
    """The same, without saying how long the file is."""
    assert data is not None
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for start in range(0, len(data), 1000):
        piece = data[start : start + 1000]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    handler.wfile.write(b"0\r\n\r\n")


def whole_until_the_end(handler: Handler, data: bytes | None) -> None:
    """The same, as HTTP/1.0 does it."""
    assert data is not None
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + data)
    handler.break_off()


def silent(handler: Handler, data: bytes | None) -> None:
    """No answer."""
    handler.server.owner.stopped.wait(30)
    handler.close_connection = True


def drip(head: bool = False) -> Answer:
    """A byte now and then, of the body or of the head."""

    def answer(handler: Handler, data: bytes | None) -> None:
        assert data is not None
        body = b"HTTP/1.1 206 Partial Content\r\n" * 100 if head else handler.start_range(data)
        for byte in body:
            handler.wfile.write(bytes([byte]))
            if handler.server.owner.stopped.wait(0.05):
                break

    return answer


def wrong_range(handler: Handler, data: bytes | None) -> None:
    """Other bytes than the wanted ones."""
    assert data is not None
    start, end = handler.span(len(data))
    handler.wfile.write(handler.start_range(data, Content_Range=f"bytes {start + 1}-{end}/{len(data) + 1}"))


def compressed(handler: Handler, data: bytes | None) -> None:
    """A body that is encoded though nobody asked for it."""
    assert data is not None
    handler.wfile.write(handler.start_range(data, Content_Encoding="gzip"))


def no_http(handler: Handler, data: bytes | None) -> None:
    """Another protocol."""
    handler.wfile.write(b"220 mail.example ESMTP\r\n")
    handler.break_off()


def slowly(seconds: float) -> Answer:
    """As it should be, but later."""

    def answer(handler: Handler, data: bytes | None) -> None:
        time.sleep(seconds)
        ranged(handler, data)

    return answer
