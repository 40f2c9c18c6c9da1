"""Checkpoints on Google Cloud Storage: its driver asks, and a local server answers as the JSON API does."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.unit.vitscale.checkpoint.small_state import RANK_0, file_of, restored, save
from vitscale.checkpoint import objects
from vitscale.checkpoint.format import step_name
from vitscale.checkpoint.objects import ObjectFolder
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.store import CheckpointStore
from vitscale.data.storage import transfer
from vitscale.distributed import Ranks

gcsfs = pytest.importorskip("gcsfs")
PREFIX = "runs/one"
MANIFEST = "manifest.json"
PART = 1 << 20
STEP_10, STEP_20 = map(step_name, (10, 20))


class Google(ThreadingHTTPServer):
    """A bucket with the part of the JSON API that the driver uses: https://cloud.google.com/storage/docs/json_api"""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.sessions: dict[str, tuple[str, bytearray]] = {}
        self.chunks: list[str] = []
        self.refusals = 0
        """Requests that are answered with 503 first."""
        self.url = f"http://127.0.0.1:{self.server_port}"

    def keys(self) -> set[str]:
        return {key.removeprefix(f"{PREFIX}/") for key in self.objects}

    def resource(self, key: str) -> dict[str, Any]:
        return {"name": key, "bucket": "bucket", "size": str(len(self.objects[key])), "generation": "1"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Google

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        parts = self._begin()
        if parts is None:
            return
        key, google = self._key(parts.path), self.server
        if key is None:
            prefix = parse_qs(parts.query).get("prefix", [""])[0]
            items = [google.resource(name) for name in sorted(google.objects) if name.startswith(prefix)]
            self._answer(200, {"kind": "storage#objects", "items": items})
        elif key not in google.objects:
            self._answer(404, {"error": {"code": 404, "message": "No such object."}})
        elif parts.path.startswith("/download"):
            self._send(google.objects[key])
        else:
            self._answer(200, google.resource(key))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self._begin()
        if parts is None:
            return
        google = self.server
        kind = parse_qs(parts.query).get("uploadType", [""])[0]
        if kind == "resumable":
            number = str(len(google.sessions))
            google.sessions[number] = (parse_qs(parts.query)["name"][0], bytearray())
            self._answer(200, {}, Location=f"{google.url}/session/{number}")
        elif kind == "multipart":
            found = re.fullmatch(rb"--==0==.*?\n\n(.*?)\n--==0==.*?\n\n(.*)\n--==0==--", body, re.DOTALL)
            assert found is not None
            self._store(json.loads(found[1])["name"], found[2])
        else:
            key, data = google.sessions[parts.path.rpartition("/")[2]]
            google.chunks.append(self.headers["Content-Range"])
            if self.headers["Content-Range"].endswith("/*"):
                assert len(body) % (1 << 18) == 0
                data += body
                self._answer(308, {}, Range=f"bytes=0-{len(data) - 1}")
            else:
                self._store(key, bytes(data + body))

    def do_DELETE(self) -> None:
        parts = self._begin()
        if parts is None:
            return
        if parts.path.startswith("/session/"):
            del self.server.sessions[parts.path.rpartition("/")[2]]
            self._answer(499, {})
        elif self.server.objects.pop(self._key(parts.path) or "", None) is None:
            self._answer(404, {"error": {"code": 404, "message": "No such object."}})
        else:
            self._answer(204, {})

    def _begin(self) -> Any:
        """The parts of the URL, if this request is not refused."""
        if not self.server.refusals:
            return urlsplit(self.path)
        self.server.refusals -= 1
        self._answer(503, {"error": {"code": 503, "message": "Busy."}})
        return None

    def _key(self, path: str) -> str | None:
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/bucket/o/(.+)", path)
        return unquote(found[1]) if found else None

    def _store(self, key: str, data: bytes) -> None:
        self.server.objects[key] = data
        self._answer(200, self.server.resource(key))

    def _send(self, data: bytes) -> None:
        start, end = 0, len(data)
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(end, int(found[2] or end) + 1)
        if start >= end:
            self._answer(416, {}, Content_Range=f"bytes */{len(data)}")
            return
        self.send_response(206)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start:end])

    def _answer(self, status: int, content: dict[str, Any], **headers: str) -> None:
        body = b"" if status == 204 else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[Google]:
    from fsspec.config import conf

    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    gcsfs.GCSFileSystem.clear_instance_cache()
    server = Google()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setitem(conf, "gs", {"token": "anon"})
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(google: Google) -> ObjectFolder:
    from gcsfs.extended_gcsfs import BucketType

    opened = ObjectFolder(f"gs://bucket/{PREFIX}")
    # The driver would ask for it over gRPC, which the server here does not speak.
    opened._driver._storage_layout_cache["bucket"] = BucketType.NON_HIERARCHICAL
    return opened


def test_commit_retention_damage_and_left_overs(google: Google, folder: ObjectFolder, ranks: Ranks) -> None:
    store = CheckpointStore(folder, ranks, Retention(last=2))
    assert restored(store) is None
    google.refusals = 1
    save(store, ranks, 5, 10, 20)
    both = {f"{name}/{file}" for name in (STEP_10, STEP_20) for file in (MANIFEST, RANK_0)}
    assert google.keys() == {*both, "latest"}
    assert google.objects[f"{PREFIX}/{STEP_20}/{RANK_0}"] == file_of(20)
    assert restored(store) == 20
    google.objects[f"{PREFIX}/{STEP_20}/{RANK_0}"] = file_of(10)
    google.objects[f"{PREFIX}/step-000000030/{RANK_0}"] = b"x"
    assert restored(store) == 10
    aside = f"{STEP_20}/damaged-{MANIFEST}"
    assert google.keys() == {*both, "latest", aside} - {f"{STEP_20}/{MANIFEST}"}
    assert google.objects[f"{PREFIX}/latest"] == f"{STEP_10}\n".encode()
    save(store, ranks, 20)
    assert google.keys() == {*both, "latest"}


def test_files_go_up_in_chunks(google: Google, folder: ObjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", PART)
    data = random.Random(1).randbytes(2 * PART + 12_345)
    folder.write(STEP_10, RANK_0, [memoryview(data)[:700_000], memoryview(data)[700_000:]])
    assert google.objects[f"{PREFIX}/{STEP_10}/{RANK_0}"] == data
    assert [chunk.partition("/")[0] for chunk in google.chunks] == [
        f"bytes 0-{PART - 1}",
        f"bytes {PART}-{2 * PART - 1}",
        f"bytes {2 * PART}-{len(data) - 1}",
    ]
    assert folder.read(STEP_10, RANK_0, PART - 5, 10) == data[PART - 5 : PART + 5]
    assert folder.file_size(STEP_10, RANK_0) == len(data)


def test_a_broken_upload_is_cancelled(google: Google, folder: ObjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", PART)

    def blocks() -> Iterator[memoryview]:
        yield memoryview(bytes(PART))
        assert len(google.sessions) == 1
        raise MemoryError("planted")

    with pytest.raises(MemoryError, match="planted"):
        folder.write(STEP_10, RANK_0, blocks())
    assert google.sessions == {}
    assert google.objects == {}
