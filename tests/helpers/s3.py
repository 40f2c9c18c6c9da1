"""A real S3 API on loopback: moto's server in a process of its own, so that several processes can talk to it."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ANSWER_PATH = "/-/answer"
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class S3Server:
    """A running server. ``environment`` is what a process needs to reach it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        self._numbers = itertools.count()

    def bucket(self) -> str:
        """URL of a new, empty bucket."""
        name = f"bucket-{next(self._numbers)}"
        self._ask("PUT", f"/{name}")
        return f"s3://{name}"

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Store an object without any of the code under test."""
        self._ask("PUT", f"/{bucket.removeprefix('s3://')}/{key}", data)

    def fail_next(self, requests: int = 1, status: int = 503, code: str = "SlowDown", method: str = "") -> None:
        """Answer the next requests, or those of a method, with an error; by default as S3 does under load."""
        body = f"<Error><Code>{code}</Code><Message>{code} was asked for.</Message></Error>"
        self.answer_next(body, requests, status, method)

    def answer_next(self, body: str, requests: int = 1, status: int = 200, method: str = "") -> None:
        """Answer the next requests, or those of a method, with this, and do nothing else."""
        self._ask("PUT", f"{_ANSWER_PATH}?{requests}&{status}&{method}", body.encode())

    def _ask(self, method: str, path: str, data: bytes | None = None) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(self.endpoint + path, data=data, headers=headers, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            answer.read()


def upload(server: S3Server, folder: Path) -> str:
    """URL of a copy of a folder's files."""
    bucket = server.bucket()
    for path in sorted(folder.iterdir()):
        server.put(bucket, f"{folder.name}/{path.name}", path.read_bytes())
    return f"{bucket}/{folder.name}"


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server for the length of a ``with`` block, which ends with this process at the latest."""
    command = [sys.executable, str(Path(__file__).resolve())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            assert port, f"the S3 server left with {process.wait()}"
            yield S3Server(f"http://127.0.0.1:{port}")
        finally:
            process.kill()


class _Store:
    """S3 decides on one write to a key at a time, which moto's threads do not; so they take turns."""

    def __init__(self, moto: Application) -> None:
        self._moto = moto
        self._turn = threading.Lock()
        self._requests, self._status, self._method, self._body = 0, "", "", b""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._turn:
            if environ["PATH_INFO"] == _ANSWER_PATH:
                requests, self._status, self._method = environ["QUERY_STRING"].split("&")
                self._requests = int(requests)
                self._body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
                start_response("200 OK", [])
                return []
            if self._requests and self._method in ("", environ["REQUEST_METHOD"]):
                self._requests -= 1
                start_response(f"{self._status} As Told", [("Content-Type", "application/xml")])
                return [] if environ["REQUEST_METHOD"] == "HEAD" else [self._body]
            return list(self._moto(environ, start_response))


def _serve() -> None:
    from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = _Store(create_backend_app("s3"))
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=MotoRequestHandler)
    print(server.port, flush=True)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    server.serve_forever()


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
