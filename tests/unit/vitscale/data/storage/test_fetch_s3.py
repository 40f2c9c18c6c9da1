"""Reading from a real S3 API, with the errors that such a storage gives."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.s3 import S3Server
from vitscale.config.schema import StorageConfig
from vitscale.data.storage import fetch, transfer
from vitscale.data.storage.fetch import open_files
from vitscale.data.storage.files import ShardFiles, StorageSilentError
from vitscale.data.storage.transfer import host_counters

DATA = random.Random(3).randbytes(300_000)
STORAGE = StorageConfig(request_timeout_s=5, total_timeout_s=10)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(transfer, "LONGEST_PAUSE_S", 0.1)


@pytest.fixture
def bucket(s3: S3Server) -> str:
    url = s3.bucket()
    s3.put(url, "sets/train/index.json", b"{}")
    s3.put(url, "sets/train/a.tar", DATA)
    s3.put(url, "sets/train/empty", b"")
    return url


@pytest.fixture
def files(bucket: str) -> ShardFiles:
    return open_files(f"{bucket}/sets/train/", STORAGE)


@pytest.fixture
def fresh_driver(s3: S3Server) -> Iterator[None]:
    """Within the test, s3fs reads the environment anew."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def test_ranges_whole_files_and_sizes(bucket: str, files: ShardFiles) -> None:
    assert files.location == f"{bucket}/sets/train"
    assert files.read("a.tar", 12_345, 99_999) == DATA[12_345:112_344]
    assert files.read("a.tar", 299_000, 5000) == DATA[299_000:]
    assert files.read("a.tar", 400_000, 10) == b""
    assert files.read_all("a.tar") == DATA
    assert files.read_all("empty") == files.read("empty", 0, 10) == b""
    assert [files.size(name) for name in ("a.tar", "empty", "none")] == [300_000, 0, None]


@pytest.mark.parametrize("protocol", ["s3", "s3a"])
def test_names_may_be_in_any_script(s3: S3Server, bucket: str, protocol: str) -> None:
    name = "Größe 雪 #1+%20&x=y.tar"
    s3.put(bucket, "odd/Gr%C3%B6%C3%9Fe%20%E9%9B%AA%20%231%2B%2520%26x%3Dy.tar", b"odd")
    url = bucket.replace("s3:", f"{protocol}:")
    assert open_files(f"{url}/odd", STORAGE).read_all(name) == b"odd"


def test_a_whole_bucket_is_a_set(s3: S3Server, bucket: str) -> None:
    s3.put(bucket, "a.tar", b"top")
    assert open_files(bucket, STORAGE).read_all("a.tar") == b"top"


def test_threads_share_it_and_most_requests_share_a_signature(
    files: ShardFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    signed: list[str] = []
    sign = s3fs.S3FileSystem.sign

    def counted(self: s3fs.S3FileSystem, path: str, *args: object, **kwargs: object) -> str:
        signed.append(path)
        return str(sign(self, path, *args, **kwargs))

    monkeypatch.setattr(s3fs.S3FileSystem, "sign", counted)
    files.read("a.tar", 0, 1)
    with ThreadPoolExecutor(32) as pool:
        came = list(pool.map(lambda i: files.read("a.tar", 1000 * i, 1000), range(300)))
    assert b"".join(came) == DATA
    assert len(signed) <= 2  # one more if the time for one ran out meanwhile


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (503, "ServiceUnavailable")])
def test_a_passing_failure_is_tried_again(s3: S3Server, bucket: str, files: ShardFiles, status: int, code: str) -> None:
    s3.fail_next(3, status, code)
    assert files.read("a.tar", 10, 100) == DATA[10:110]
    counted = host_counters()[bucket]
    assert (counted.requests, counted.retries, counted.errors) == (4, 3, {str(status): 3})


def test_a_failure_that_lasts_is_named(s3: S3Server, bucket: str) -> None:
    storage = StorageConfig(request_timeout_s=1, total_timeout_s=0.5)
    s3.fail_next(10_000)
    try:
        with pytest.raises(
            StorageSilentError, match=r"\(the server answered 503 .*: SlowDown: SlowDown was asked for\."
        ):
            open_files(f"{bucket}/sets/train", storage).read("a.tar", 0, 5)
    finally:
        s3.fail_next(0)


def test_an_object_that_is_not_there_is_missing_at_once(bucket: str, files: ShardFiles) -> None:
    with pytest.raises(FileNotFoundError, match=r"404 .*: NoSuchKey: ") as raised:
        files.read("none.tar", 0, 5)
    assert raised.value.filename == f"{bucket}/sets/train/none.tar"
    assert host_counters()[bucket].requests == 1


def test_a_bucket_that_is_not_there_is_named() -> None:
    files = open_files("s3://nowhere/set", STORAGE)
    with pytest.raises(OSError, match=r"no such bucket; create it or mend the URL: 's3://nowhere/set/index.json'") as e:
        files.read_all("index.json")
    assert not isinstance(e.value, FileNotFoundError)
    with pytest.raises(StorageSilentError, match=r"s3://nowhere/set: the storage refuses \(there is no such bucket"):
        files.read("a.tar", 0, 5)
    with pytest.raises(StorageSilentError):
        files.size("a.tar")


def test_rights_that_ran_out_stop_the_run(s3: S3Server, files: ShardFiles) -> None:
    files.read("a.tar", 0, 5)
    s3.fail_next(2, 400, "ExpiredToken")
    with pytest.raises(StorageSilentError, match=r"the storage refuses .*ExpiredToken"):
        files.read("b.tar", 0, 5)


def test_an_object_that_is_refused_is_at_fault_alone(s3: S3Server, files: ShardFiles) -> None:
    s3.fail_next(1, 403, "AccessDenied")
    with pytest.raises(PermissionError, match="AccessDenied"):
        files.read("a.tar", 0, 5)


@pytest.mark.usefixtures("fresh_driver")
def test_missing_credentials_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    with pytest.raises(PermissionError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
        open_files("s3://bucket/set", STORAGE).read_all("index.json")


@pytest.mark.usefixtures("fresh_driver")
def test_a_missing_file_of_credentials_is_not_taken_for_one_of_the_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {tmp_path}/missing\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PermissionError, match=f"no credentials: .*{tmp_path}/missing"):
        open_files("s3://bucket/set", STORAGE).read_all("index.json")


def test_a_signature_is_never_shown(s3: S3Server, files: ShardFiles) -> None:
    for status, code in ((403, "SignatureDoesNotMatch"), (404, "NoSuchKey"), (301, "PermanentRedirect")):
        s3.fail_next(2, status, code)
        with pytest.raises((OSError, StorageSilentError), match=code) as raised:
            files.read("a.tar", 0, 5)
        assert "X-Amz" not in f"{raised.value!r} {raised.value.__cause__!r}"


@pytest.mark.usefixtures("fresh_driver")
def test_a_server_that_is_down_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    storage = StorageConfig(request_timeout_s=1, total_timeout_s=0.5)
    with pytest.raises(StorageSilentError, match=r"s3://bucket/set: no file could be read for .*Connection refused"):
        open_files("s3://bucket/set", storage).read("a.tar", 0, 5)


@pytest.mark.usefixtures("fresh_driver")
def test_public_buckets_and_buckets_whose_readers_pay(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs
    from fsspec.config import conf

    s3fs.S3FileSystem().chmod(f"{bucket}/sets/train/a.tar", "public-read")
    for options in ({"anon": True}, {"requester_pays": True}):
        monkeypatch.setitem(conf, "s3", options)
        assert open_files(f"{bucket}/sets/train", STORAGE).read("a.tar", 7, 3) == DATA[7:10]


def test_signed_urls_are_used_for_a_while_only(files: ShardFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch.SIGN_AGAIN_S < 600 < fetch.SIGNED_S  # keys of a role are renewed ten minutes before they expire
    monkeypatch.setattr(fetch, "SIGN_AGAIN_S", 1e-9)
    assert files.read("a.tar", 0, 5) == files.read("a.tar", 0, 5) == DATA[:5]
