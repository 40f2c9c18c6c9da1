"""One contract for every place that a shard set can lie at: a folder, fsspec's memory, a real S3 API on loopback."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import pickle
import random
import resource
import signal
import socket
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.s3 import S3Server, s3_server
from vitscale.errors import DataError
from vitscale_shards import s3 as s3_settings
from vitscale_shards.place import LocalPlace, Place
from vitscale_shards.remote import RemotePlace, open_place

FORK = multiprocessing.get_context("fork")
# Every method that a place has, as a user of it would call it.
CALLS: dict[str, Callable[[Place], object]] = {
    "names": lambda place: place.names(),
    "folders": lambda place: place.folders(),
    "size": lambda place: place.size("a"),
    "modified": lambda place: place.modified("a"),
    "open": lambda place: place.open("a"),
    "read_text": lambda place: place.read_text("a"),
    "published": lambda place: publish(place, "a", b"data"),
    "publish_text": lambda place: place.publish_text("a", "text"),
    "create": lambda place: place.create("a", "text"),
    "remove": lambda place: place.remove("a"),
    "remove_folder": lambda place: place.remove_folder("a"),
}


def publish(place: Place, name: str, data: bytes) -> None:
    with place.published(name) as file:
        file.write(data)


def content(place: Place, name: str) -> bytes:
    with place.open(name) as file:
        return file.read()


def in_another_process(action: Callable[[], object]) -> int | None:
    """Exit code of a fork that does it."""
    process = FORK.Process(target=action)
    process.start()
    process.join(timeout=60)
    return process.exitcode


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def s3_place(s3: S3Server, scratch: Path) -> RemotePlace:
    return RemotePlace(f"{s3.bucket()}/sets/train", scratch=scratch)


@pytest.fixture(params=["local", "s3"])
def shared_place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Those that several processes can use at a time."""
    if request.param == "s3":
        return request.getfixturevalue("s3_place")
    return LocalPlace(tmp_path / "sets" / "train")


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, scratch: Path) -> Place:
    if request.param == "memory":
        return RemotePlace(f"memory://{tmp_path.name}/sets/train", scratch=scratch)
    if request.param == "s3":
        return request.getfixturevalue("s3_place")
    return LocalPlace(tmp_path / "sets" / "train")


@pytest.fixture
def fresh_driver(s3: S3Server) -> Iterator[None]:
    """Within the test, s3fs reads the environment anew."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


# What is written


def test_a_file_appears_when_its_block_ends(place: Place, scratch: Path) -> None:
    with place.published("a.tar") as file:
        file.write(b"whole")
        file.flush()
        assert place.size("a.tar") is None
        assert "a.tar" not in place.names()
    assert content(place, "a.tar") == b"whole"
    assert place.names() == ["a.tar"]
    assert list(scratch.iterdir()) == []


def test_a_file_whose_block_fails_never_was(place: Place, scratch: Path) -> None:
    def fail(name: str) -> None:
        with place.published(name) as file:
            file.write(b"half")
            raise ZeroDivisionError

    publish(place, "old", b"old")
    for name in ("new", "old"):
        with pytest.raises(ZeroDivisionError):
            fail(name)
    assert place.names() == ["old"]
    assert content(place, "old") == b"old"
    assert list(scratch.iterdir()) == []


def test_a_file_takes_the_place_of_another_at_the_end_of_its_block(place: Place) -> None:
    place.publish_text("a", "first, and longer")
    with place.published("a") as file:
        file.write(b"second")
        assert place.read_text("a") == "first, and longer"
    assert place.read_text("a") == "second"
    place.publish_text("a", "third")
    assert place.read_text("a") == "third"


def test_a_file_can_be_read_back_and_mended_while_it_is_written(place: Place) -> None:
    with place.published("a") as file:
        file.write(b"hello world")
        file.seek(6)
        assert file.read() == b"world"
        file.seek(0)
        file.write(b"J")
        file.seek(2)
    assert content(place, "a") == b"Jello world"


@pytest.mark.parametrize("num_bytes", [0, 1, s3_settings.PART_BYTES, 2 * s3_settings.PART_BYTES + 12345])
def test_files_of_no_and_of_several_parts_come_back_the_same(place: Place, num_bytes: int) -> None:
    data = random.Random(num_bytes).randbytes(num_bytes)
    publish(place, "a", data)
    assert place.size("a") == num_bytes
    assert content(place, "a") == data


def test_names_and_text_may_be_in_any_script(place: Place) -> None:
    name, text = "Größe 雪 #1+%20&x=y.json", "naïve — 雪\n"
    place.publish_text(name, text)
    assert place.read_text(name) == text
    assert place.names() == [name]
    assert place.size(name) == len(text.encode())
    place.remove(name)
    assert place.names() == []


def test_a_disk_without_room_leaves_nothing(shared_place: Place, scratch: Path) -> None:
    def write_too_much() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            publish(shared_place, "a", bytes(2 << 20))

    assert in_another_process(write_too_much) == 0
    assert shared_place.names() == []
    assert list(scratch.iterdir()) == []


# What is there


def test_names_and_folders_are_those_directly_in_it(place: Place) -> None:
    for name in ("b", "a", ".hidden", ".progress/b.json", ".progress/a.json", "sub/deep/x"):
        place.publish_text(name, name)
    assert place.names() == [".hidden", "a", "b"]
    assert place.folders() == [".progress", "sub"]
    assert place.names(".progress") == ["a.json", "b.json"]
    assert place.names("sub") == []
    assert place.child("sub").folders() == ["deep"]
    assert place.child("sub").child("deep").read_text("x") == "sub/deep/x"
    assert place.child("sub").url == f"{place.url}/sub"


def test_nothing_is_in_what_is_not_there(place: Place) -> None:
    assert place.names() == place.folders() == place.names("sub") == place.child("sub").folders() == []
    place.publish_text("subway", "")
    place.publish_text("sub-way/a", "")
    assert place.names("sub") == place.child("sub").names() == place.child("sub").folders() == []
    assert place.size("sub") is None
    assert place.modified("sub") is None


def test_size_and_time_of_a_file(place: Place) -> None:
    assert place.size("a") is None
    assert place.modified("a") is None
    place.publish_text("a", "four")
    assert place.size("a") == 4
    modified = place.modified("a")
    assert modified is not None
    assert abs(modified - time.time()) < 30


@pytest.mark.parametrize("number", [3, 40])
def test_sizes_of_many_files(place: Place, number: int) -> None:
    for i in range(number):
        place.publish_text(f"{i}.txt", "x" * i)
    place.publish_text("folder/0.txt", "below")
    wanted = {f"{i}.txt" for i in range(1, number + 5)}
    assert place.sizes(wanted) == {f"{i}.txt": i for i in range(1, number)}
    assert place.child("nothing").sizes(wanted) == {}


def test_what_is_missing_is_named(place: Place) -> None:
    place.publish_text("there", "")
    for call in (place.open, place.read_text):
        with pytest.raises(FileNotFoundError, match="No such file or directory") as raised:
            call("missing.tar")
        assert raised.value.filename is not None
        assert str(raised.value.filename) == f"{place.url}/missing.tar"


def test_reading_and_seeking_is_that_of_a_file(place: Place) -> None:
    draw = random.Random(1)
    data = draw.randbytes(9 << 20)  # more than what is read ahead
    publish(place, "a", data)
    oracle = io.BytesIO(data)
    with place.open("a") as file:
        for _ in range(200):
            whence = draw.choice([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])
            base = {os.SEEK_SET: 0, os.SEEK_CUR: oracle.tell(), os.SEEK_END: len(data)}[whence]
            offset = draw.randrange(len(data) + 10) - base
            num_bytes = draw.choice([1, 512, 100_000])
            assert file.seek(offset, whence) == oracle.seek(offset, whence)
            assert file.read(num_bytes) == oracle.read(num_bytes)
            assert file.tell() == oracle.tell()
        file.seek(-7, os.SEEK_END)
        assert file.read() == data[-7:]
        assert file.read(5) == b""
    assert file.closed


def test_tarfile_writes_to_it_and_reads_from_it(place: Place) -> None:
    with place.published("a.tar") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("1.jpg", "1.cls"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    with place.open("a.tar") as file, tarfile.open(fileobj=file) as tar:
        assert tar.getnames() == ["1.jpg", "1.cls"]
        assert tar.extractfile("1.cls").read() == b"1.cls"


# What is removed


def test_removing_a_file_leaves_its_neighbours(place: Place) -> None:
    place.remove("a")
    for name in ("a", "ab", "a.idx"):
        place.publish_text(name, "")
    place.remove("a")
    place.remove("a")
    assert place.names() == ["a.idx", "ab"]


def test_removing_a_folder_leaves_its_neighbours(place: Place) -> None:
    place.remove_folder("sub")
    for name in ("sub/a", "sub/deep/.b", "subway", "sub-way/c"):
        place.publish_text(name, "")
    place.remove_folder("sub")
    place.remove_folder("sub")
    assert place.names() == ["subway"]
    assert place.folders() == ["sub-way"]
    assert place.names("sub") == []


def test_a_folder_that_cannot_be_removed_is_an_error(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    place.publish_text("sub", "a file")
    with pytest.raises(OSError, match="sub"):
        place.remove_folder("sub")
    assert place.names() == ["sub"]


# Several at a time


def test_create_writes_unless_there_is_one(place: Place) -> None:
    assert place.create("claims/a", "mine")
    assert not place.create("claims/a", "yours")
    assert place.read_text("claims/a") == "mine"
    assert place.names("claims") == ["a"]
    place.remove("claims/a")
    assert place.create("claims/a", "yours")
    assert place.read_text("claims/a") == "yours"


def test_of_several_threads_one_alone_creates(shared_place: Place) -> None:
    start = threading.Barrier(8, timeout=30)

    def claim(number: int) -> list[bool]:
        won = []
        for round_ in range(3):
            start.wait()
            won.append(shared_place.create(f"claims/{round_}", f"{number}"))
        return won

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    for round_ in range(3):
        (winner,) = [number for number in range(8) if won[number][round_]]
        assert shared_place.read_text(f"claims/{round_}") == f"{winner}"
    assert len(shared_place.names("claims")) == 3


def test_of_several_processes_one_alone_creates(shared_place: Place) -> None:
    assert shared_place.names() == []  # The forks inherit a driver in use.
    start, won = FORK.Barrier(3, timeout=30), FORK.SimpleQueue()

    def claim(number: int) -> None:
        for round_ in range(3):
            start.wait()
            if shared_place.create(f"claims/{round_}", f"{number}"):
                won.put((round_, f"{number}"))

    processes = [FORK.Process(target=claim, args=(number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 3
    winners = []
    while not won.empty():
        winners.append(won.get())
    assert sorted(winners) == [(round_, shared_place.read_text(f"claims/{round_}")) for round_ in range(3)]


def test_what_another_process_does_is_seen_at_once(shared_place: Place) -> None:
    shared_place.publish_text("a", "")
    assert shared_place.names() == ["a"]
    assert shared_place.size("b") is None
    assert in_another_process(lambda: shared_place.publish_text("b", "new")) == 0
    assert shared_place.names() == ["a", "b"]
    assert shared_place.size("b") == 3
    assert in_another_process(lambda: shared_place.remove("a")) == 0
    assert shared_place.names() == ["b"]
    assert shared_place.size("a") is None


def test_a_place_can_be_handed_to_a_new_process(shared_place: Place) -> None:
    shared_place.publish_text("a", "")
    assert pickle.loads(pickle.dumps(shared_place)).url == shared_place.url
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(shared_place.publish_text, "b", "from there").result()
    assert shared_place.read_text("b") == "from there"


def test_nothing_stays_of_a_process_that_is_killed_while_it_writes(s3_place: RemotePlace, scratch: Path) -> None:
    def die() -> None:
        with s3_place.published("a") as file:
            file.write(bytes(1 << 20))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_another_process(die) == -signal.SIGKILL
    assert s3_place.names() == []
    assert list(scratch.iterdir()) == []


# Where object storage is its own


def test_an_object_that_marks_a_folder_is_no_file(s3: S3Server) -> None:
    bucket = s3.bucket()
    for key in ("sets/", "sets/train/", "sets/train/deep/", "sets/train/a"):
        s3.put(bucket, key, b"")
    place = RemotePlace(f"{bucket}/sets/train/")
    assert place.names() == ["a"]
    assert place.folders() == ["deep"]
    assert place.names("deep") == []


def test_a_whole_bucket_is_a_place(s3: S3Server) -> None:
    place = RemotePlace(s3.bucket())
    assert place.names() == []
    place.publish_text("train/a", "text")
    assert place.folders() == ["train"]
    assert place.child("train").names() == ["a"]


def test_reading_an_object_that_is_replaced_meanwhile_fails(s3_place: RemotePlace) -> None:
    publish(s3_place, "a", bytes(10 << 20))
    with s3_place.open("a") as file:
        file.read(1)
        publish(s3_place, "a", b"\1" * (10 << 20))
        file.seek(-10, os.SEEK_END)
        with pytest.raises(OSError, match=s3_place.url):
            file.read(1)


def test_a_passing_failure_is_not_noticed(s3: S3Server, s3_place: RemotePlace) -> None:
    for call in (lambda: publish(s3_place, "a", b"data"), lambda: s3_place.read_text("a"), s3_place.names):
        s3.fail_next(1)
        call()
    assert content(s3_place, "a") == b"data"


@pytest.mark.parametrize(("status", "code"), [(412, "PreconditionFailed"), (409, "ConditionalRequestConflict")])
def test_another_creates_it_at_this_moment(s3: S3Server, s3_place: RemotePlace, status: int, code: str) -> None:
    s3.fail_next(1, status, code)
    assert not s3_place.create("a", "mine")
    assert s3_place.names() == []


def test_a_store_that_cannot_decide_is_asked_first(s3: S3Server, s3_place: RemotePlace) -> None:
    for expected in (True, False):
        s3.fail_next(1, 501, "NotImplemented", method="PUT")
        assert s3_place.create("a", f"{expected}") == expected
    assert s3_place.read_text("a") == "True"


@pytest.mark.parametrize("name", ["names", "published", "publish_text", "create", "read_text", "remove"])
def test_what_is_not_allowed_is_named(s3: S3Server, s3_place: RemotePlace, name: str) -> None:
    s3.fail_next(2, 403, "AccessDenied")
    with pytest.raises(PermissionError, match=s3_place.url):
        CALLS[name](s3_place)
    s3.fail_next(0)


def test_an_object_that_comes_while_others_are_removed_goes_too(s3: S3Server, s3_place: RemotePlace) -> None:
    s3_place.publish_text("sub/a", "")
    s3.answer_next("<DeleteResult></DeleteResult>", 1, method="POST")  # as if it came back at once
    s3_place.remove_folder("sub")
    assert s3_place.names("sub") == []


def test_an_object_that_may_not_be_removed_is_named(s3: S3Server, s3_place: RemotePlace) -> None:
    for name in ("sub/a", "sub/b"):
        s3_place.publish_text(name, "")
    s3.answer_next("<DeleteResult><Error><Code>AccessDenied</Code></Error></DeleteResult>", 3, method="POST")
    with pytest.raises(PermissionError, match=r"2 objects could not be removed, such as .*/sub/a: 's3://.*/sub'"):
        s3_place.remove_folder("sub")


def test_an_object_with_the_name_of_a_folder_is_not_removed_with_it(s3_place: RemotePlace) -> None:
    s3_place.publish_text("sub", "")
    s3_place.remove_folder("sub")
    assert s3_place.names() == ["sub"]
    s3_place.publish_text("sub/a", "")
    s3_place.remove_folder("sub")
    assert s3_place.names() == ["sub"]
    assert s3_place.folders() == []


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_bucket_that_is_not_there_is_named(s3: S3Server, call: Callable[[Place], object]) -> None:
    with pytest.raises(OSError, match="no such bucket; create it or mend the URL: 's3://nowhere/sets") as raised:
        call(RemotePlace("s3://nowhere/sets"))
    assert not isinstance(raised.value, FileNotFoundError)


@pytest.mark.usefixtures("fresh_driver")
def test_a_server_that_is_down_is_an_error_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    start = time.monotonic()
    for name, call in CALLS.items():
        with pytest.raises(OSError, match="Could not connect to the endpoint URL") as raised:
            call(RemotePlace("s3://bucket/sets"))
        assert "s3://bucket/sets" in str(raised.value), name
        assert "\n" not in str(raised.value)
    assert time.monotonic() - start < 30


@pytest.mark.usefixtures("fresh_driver")
def test_a_server_that_dies_under_a_reader_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        place = RemotePlace(server.bucket())
        publish(place, "a", bytes(10 << 20))
        file = place.open("a")
        assert file.read(1) == b"\0"
    file.seek(-1, os.SEEK_END)
    with file, pytest.raises(OSError, match=f"{place.url}/a"):
        file.read()


@pytest.mark.usefixtures("fresh_driver")
def test_a_server_that_does_not_answer_an_upload_is_tried_again_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_settings, "UPLOAD_PATIENCE_S", 0.3)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(5)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(OSError, match="Read timeout on endpoint URL"):
            RemotePlace("s3://bucket/sets").publish_text("a", "text")
        assert time.monotonic() - start < 20
        for _ in range(2):
            silent.accept()[0].close()


@pytest.mark.usefixtures("fresh_driver")
def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PermissionError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
        RemotePlace("s3://bucket/sets").names()


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match="gs://bucket/sets: the package gcsfs is missing; run: pip install gcsfs"):
        RemotePlace("gs://bucket/sets").names()


# What a user says


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("out", "out"),
        ("/data/out", "/data/out"),
        ("a:b/out", "a:b/out"),
        ("./s3:/out", "s3:/out"),
        ("file:///data/out", "/data/out"),
        (Path("out"), "out"),
    ],
)
def test_a_path_is_a_folder(text: str | Path, folder: str) -> None:
    place = open_place(text)
    assert isinstance(place, LocalPlace)
    assert place.folder == Path(folder)


@pytest.mark.parametrize("url", ["s3://bucket/sets", "s3a://bucket", "gs://bucket/a/b", "gcs://bucket/sets"])
def test_a_url_is_a_prefix(url: str, tmp_path: Path) -> None:
    place = open_place(f"{url}/", scratch=tmp_path)
    assert isinstance(place, RemotePlace)
    assert (place.url, place.scratch) == (url, tmp_path)
    assert (place.child("a").url, place.child("a").scratch) == (f"{url}/a", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "http://host/sets",
        "hf://datasets/a/b",
        "file://host/sets",
        "pipe:aws s3 cp - s3://bucket/a",
        "C:\\data\\out",
        "C:/data/out",
        "simplecache::s3://bucket/sets",
        "S3://bucket/sets",
        Path("s3://bucket/sets"),
    ],
)
def test_anything_else_is_refused(text: str | Path) -> None:
    with pytest.raises(DataError, match="no shard set can lie there; give a folder, s3://BUCKET/PREFIX or gs://") as e:
        open_place(text)
    assert str(e.value).startswith(f"{text}: ")


@pytest.mark.parametrize("url", ["s3://", "s3:///", "s3:///sets", "gs://"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(DataError, match=f"{url}: names no bucket; write {url[:2]}://BUCKET/PREFIX"):
        open_place(url)


@pytest.mark.parametrize("prefix", ["a*", "a?versionId=1", "a[1]", "a::b"])
def test_a_prefix_that_fsspec_would_read_as_a_pattern_is_refused(prefix: str) -> None:
    with pytest.raises(DataError, match="take a prefix without them"):
        open_place(f"s3://bucket/{prefix}")
