"""Google Cloud Storage: its driver signs, and a local server answers as the JSON API does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import bad_http
from tests.helpers.bad_http import BadServer, bad_server
from vitscale.config.schema import StorageConfig
from vitscale.data.storage import transfer
from vitscale.data.storage.fetch import open_files
from vitscale.data.storage.files import StorageSilentError

gcsfs = pytest.importorskip("gcsfs")
DATA = bytes(range(256)) * 10
STORAGE = StorageConfig(request_timeout_s=5, total_timeout_s=10)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    from fsspec.config import conf

    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    gcsfs.GCSFileSystem.clear_instance_cache()
    with bad_server() as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{running.host}")
        monkeypatch.setitem(conf, "gs", {"token": "anon"})
        running.files = {"sets/train/a b.tar": DATA, "sets/train/index.json": b"{}"}
        yield running


def test_ranges_whole_files_and_sizes(server: BadServer) -> None:
    server.script = [bad_http.status(503), bad_http.cut(100)]
    files = open_files("gs://bucket/sets/train/", STORAGE)
    assert files.read("a b.tar", 5, 2000) == DATA[5:2005]
    assert files.read_all("a b.tar") == DATA
    assert files.size("a b.tar") == len(DATA)
    assert files.size("none") is None
    assert server.requests[0].path == "/download/storage/v1/b/bucket/o/sets%2Ftrain%2Fa%20b.tar?alt=media"


def test_what_google_says_is_told(server: BadServer) -> None:
    server.rule = lambda number: bad_http.status(403, b'{"error": {"code": 403, "message": "No access for you."}}')
    with pytest.raises(StorageSilentError, match=r"the server answered 403 Forbidden: No access for you\."):
        open_files("gs://bucket/sets/train", STORAGE).read("a b.tar", 0, 5)
