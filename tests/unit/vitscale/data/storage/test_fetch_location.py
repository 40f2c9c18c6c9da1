"""Where a shard set can lie, and what is shown of its URL."""

from __future__ import annotations

import importlib
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import bad_http
from tests.helpers.bad_http import BadServer, bad_server
from vitscale.config.schema import StorageConfig
from vitscale.data.storage import fetch, transfer
from vitscale.data.storage.drivers import without_secrets
from vitscale.data.storage.fetch import RemoteFiles, open_files
from vitscale.data.storage.files import LocalFiles
from vitscale.data.storage.transfer import host_counters
from vitscale.errors import DataError

DATA = bytes(range(256))
STORAGE = StorageConfig(request_timeout_s=0.5, total_timeout_s=1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with bad_server() as running:
        running.files["a.tar"] = DATA
        yield running


def test_folders_are_read_in_place(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"local")
    for location in (str(tmp_path), f"file://{tmp_path}"):
        files = open_files(location, STORAGE)
        assert isinstance(files, LocalFiles)
        assert files.read("a.tar", 1, 3) == b"oca"


def test_nothing_is_asked_when_a_set_is_opened() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/set"
    assert isinstance(open_files(url, STORAGE), RemoteFiles)


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ("ftp://host/set", r"ftp://host/set: no shard set can be read there; give a folder, file:///FOLDER, https://"),
        ("s3:/bucket/set", "no shard set can be read there"),
        ("C:\\data\\set", "no shard set can be read there"),
        ("hf://datasets/a", "no shard set can be read there"),
        ("file://host/set", "no shard set can be read there"),
        ("memory://set", "no shard set can be read there"),
        ("simplecache::s3://bucket/set", "no shard set can be read there"),
        ("http:///set", "write http://HOST/PATH"),
        ("https://host:port/set", "write http://HOST/PATH"),
        ("https://host/a#b", "without a fragment"),
        ("s3://", "names no bucket"),
        ("s3://bucket/a*", "take a prefix without them"),
        ("pipe:cat /data/{name}", "set data.storage.allow_pipe=true if the command is yours"),
    ],
)
def test_other_places_are_refused(location: str, text: str) -> None:
    with pytest.raises(DataError, match=text):
        open_files(location, STORAGE)


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/set", "s3fs"), ("gs://bucket/set", "gcsfs")])
def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, url: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    # Where fsspec keeps the drivers that it has imported.
    imported = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(imported, url.partition(":")[0], raising=False)
    with pytest.raises(DataError, match=f"{url}: the package {package} is missing; run: pip install {package}"):
        open_files(url, STORAGE)


SECRET_URLS: list[Callable[[BadServer], str]] = [
    lambda server: server.url.replace("http://", "http://user:hush%2Fhush@"),
    lambda server: f"{server.url}?signature=hush%2B=&expires=1",
]


@pytest.mark.parametrize("secret", SECRET_URLS, ids=["password", "signature"])
def test_secrets_are_sent_and_never_shown(
    server: BadServer,
    secret: Callable[[BadServer], str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch, "TELL_AFTER_S", 0)
    files = open_files(secret(server), STORAGE)
    assert files.read("a.tar", 0, 10) == DATA[:10]
    sent = server.requests[-1]
    assert "hush%2B=&expires=1" in sent.path or sent.headers["authorization"] == "Basic dXNlcjpodXNoL2h1c2g="
    assert files.location == server.url
    told = []
    for answers in ([404], [403, 200], [403, 403], [301]):
        server.script = [bad_http.status(code) if code != 200 else bad_http.ranged for code in answers]
        with pytest.raises((OSError, DataError)) as raised:
            files.read("b.tar", 0, 10)
        told.append(raised.value)
    server.stop()
    with pytest.raises(DataError) as silence:
        files.read("a.tar", 0, 10)
    error: BaseException | None
    for error in (*told, silence.value):
        while error is not None:
            assert "hush" not in f"{error} {error!r}"
            error = error.__cause__ or error.__context__
    assert "hush" not in caplog.text
    assert "a.tar: not read for" in caplog.text
    assert "hush" not in "".join(host_counters())


def test_secrets_are_not_shown_of_a_location_that_is_refused() -> None:
    for location in (
        "https://user:hush@host:port/set",
        "ftp://user:hush@host/set?hush",
        "pipe:curl http://a:hush@b/{name}",
    ):
        with pytest.raises(DataError) as raised:
            open_files(location, STORAGE)
        assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@word@host:1/a/b?sig=1&x#y", "https://host:1/a/b"),
        ("at 's3://bucket/a?versionId=1', or http://h/?q", "at 's3://bucket/a', or http://h/"),
        ('url="http://me@h/a?b"', 'url="http://h/a"'),
        ("mail me@host? no: a//b", "mail me@host? no: a//b"),
        ("/data/a@b?c", "/data/a@b?c"),
    ],
)
def test_urls_are_shown_without_passwords_and_queries(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
