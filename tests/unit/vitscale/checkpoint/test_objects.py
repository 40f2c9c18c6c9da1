"""Checkpoints on a real S3 API: what becomes visible, what is refused, what survives which fault."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import random
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.distributed import run_ranks
from tests.helpers.s3 import S3Server
from tests.unit.vitscale.checkpoint.buckets import MANIFEST, PREFIX, Bucket, flip, keys_of
from tests.unit.vitscale.checkpoint.small_state import (
    RANK_0,
    RANK_1,
    SIZE,
    file_of,
    is_state_of,
    restored,
    save,
)
from vitscale.checkpoint import objects
from vitscale.checkpoint.folder import DAMAGED
from vitscale.checkpoint.format import Checkpoint, step_name
from vitscale.checkpoint.objects import ObjectFolder
from vitscale.checkpoint.reading import read_parameters
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.store import CheckpointStore, checkpoint_names, open_checkpoint
from vitscale.config.schema import StorageConfig
from vitscale.data.storage import transfer
from vitscale.distributed import Ranks, connect
from vitscale.errors import CheckpointError
from vitscale.topology import Topology

PART = 5 << 20  # the smallest that S3 takes
STEP_10, STEP_20, STEP_30 = map(step_name, (10, 20, 30))


@pytest.fixture(autouse=True)
def short_pauses(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(transfer, "LONGEST_PAUSE_S", 0.1)
    yield
    s3.fail_next(0)


@pytest.fixture
def bucket(s3: S3Server) -> Bucket:
    return Bucket(s3)


@pytest.fixture
def folder(bucket: Bucket) -> ObjectFolder:
    return ObjectFolder(f"{bucket.url}/{PREFIX}/")


@pytest.fixture
def store(folder: ObjectFolder, ranks: Ranks) -> CheckpointStore:
    return CheckpointStore(folder, ranks, Retention(last=3))


def blocks_of(data: bytes, *lengths: int) -> Iterator[memoryview]:
    """Data in blocks of these lengths, over and over."""
    view = memoryview(data)
    while view:
        for length in lengths:
            yield view[:length]
            view = view[length:]


def test_a_commit_makes_a_complete_checkpoint(store: CheckpointStore, bucket: Bucket, ranks: Ranks) -> None:
    assert checkpoint_names(store.folder) == []
    assert restored(store) is None
    save(store, ranks, 10, 20)
    assert bucket.keys() == {*keys_of(10, 20), "latest"}
    assert bucket.get("latest") == f"{STEP_20}\n".encode()
    assert bucket.get(f"{STEP_20}/{RANK_0}") == file_of(20)
    assert checkpoint_names(store.folder) == [STEP_20, STEP_10]
    checkpoint = open_checkpoint(store.folder)
    assert (checkpoint.step, checkpoint.shown) == (20, f"{bucket.url}/{PREFIX}/{STEP_20}")
    assert is_state_of(20, read_parameters(checkpoint))
    assert open_checkpoint(store.folder, 10).step == 10
    assert restored(store) == 20
    assert bucket.keys() == {*keys_of(10, 20), "latest"}
    assert bucket.uploads() == []


def test_a_whole_bucket_is_a_folder(bucket: Bucket, ranks: Ranks) -> None:
    store = CheckpointStore(ObjectFolder(bucket.url), ranks, Retention(last=3))
    save(store, ranks, 10)
    assert bucket.keys() == {*keys_of(10), "latest"}
    assert restored(store) == 10


def test_superfluous_ones_go(store: CheckpointStore, bucket: Bucket, ranks: Ranks) -> None:
    save(store, ranks, 10, 20, 30, 40, 50)
    assert bucket.keys() == {*keys_of(30, 40, 50), "latest"}


def test_the_manifest_goes_first(
    folder: ObjectFolder, store: CheckpointStore, bucket: Bucket, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    remove = folder._driver.rm_file

    def noted(path: str) -> None:
        removed.append(path.rpartition("/")[2])
        remove(path)

    save(store, ranks, 10, 20)
    monkeypatch.setattr(folder._driver, "rm_file", noted)
    folder.remove(STEP_10)
    assert removed == [MANIFEST, RANK_0]
    assert bucket.keys() == {*keys_of(20), "latest"}


def test_files_go_up_in_parts(folder: ObjectFolder, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", PART)
    data = random.Random(1).randbytes(2 * PART + 1_234_567)
    folder.stage(STEP_10)
    folder.write(STEP_10, RANK_0, blocks_of(data, 4 << 20, 1, 77_777))
    assert bucket.get(f"{STEP_10}/{RANK_0}") == data
    assert bucket.etag(f"{STEP_10}/{RANK_0}").endswith('-3"')
    assert folder.file_size(STEP_10, RANK_0) == len(data)
    assert folder.read(STEP_10, RANK_0, PART - 5, 10) == data[PART - 5 : PART + 5]
    assert folder.read(STEP_10, RANK_0, len(data) - 5, 100) == data[-5:]
    assert folder.read(STEP_10, RANK_0, len(data) + 5, 100) == b""


@pytest.mark.parametrize("size", [0, 1, PART, 2 * PART])
def test_any_size_goes_up(folder: ObjectFolder, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", PART)
    data = random.Random(2).randbytes(size)
    folder.write(STEP_10, RANK_0, blocks_of(data, 1 << 20))
    assert bucket.get(f"{STEP_10}/{RANK_0}") == data


def test_an_upload_needs_memory_for_a_few_parts(folder: ObjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", PART)
    block = bytes(4 << 20)
    folder.write(STEP_10, RANK_0, [memoryview(block)])  # what is loaded once
    tracemalloc.start()
    try:
        folder.write(STEP_10, RANK_1, (memoryview(block) for _ in range(16)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert folder.file_size(STEP_10, RANK_1) == 64 << 20
    assert peak < 6 * PART


def test_what_has_no_manifest_is_not_seen_and_goes_at_the_next_start(
    store: CheckpointStore, bucket: Bucket, ranks: Ranks
) -> None:
    save(store, ranks, 10)
    others = {f"{STEP_20}-copy/{RANK_0}", "notes.txt", f"{STEP_30}/{DAMAGED}{MANIFEST}", f"{STEP_30}/{RANK_0}"}
    for key in (*others, f"{STEP_20}/{RANK_0}", f"{STEP_20}/{RANK_1}"):
        bucket.put(key, b"x")
    neighbour = f"{PREFIX}-more/{STEP_20}/{RANK_0}"
    bucket.client.put_object(Bucket=bucket.name, Key=neighbour, Body=b"x")
    for key in (f"{PREFIX}/{STEP_20}/{RANK_0}", neighbour):
        bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    assert checkpoint_names(store.folder) == [STEP_10]
    assert open_checkpoint(store.folder).step == 10
    assert restored(store) == 10
    assert bucket.keys() == {*keys_of(10), "latest", *others, neighbour}
    assert bucket.uploads() == [neighbour]


def test_left_overs_of_more_ranks_do_not_stay_in_a_checkpoint(
    store: CheckpointStore, bucket: Bucket, ranks: Ranks
) -> None:
    bucket.put(f"{STEP_10}/{RANK_1}", b"x")
    save(store, ranks, 10)
    assert bucket.keys() == {*keys_of(10), "latest"}


DAMAGES: list[tuple[Callable[[Bucket], None], str]] = [
    (lambda bucket: flip(bucket, f"{STEP_20}/{RANK_0}"), f"{RANK_0} has other content from byte 0 on"),
    (lambda bucket: bucket.delete(f"{STEP_20}/{RANK_0}"), f"{RANK_0} is missing"),
    (lambda bucket: bucket.put(f"{STEP_20}/{RANK_0}", file_of(20)[:-1]), f"{RANK_0} has {SIZE - 1} of {SIZE} bytes"),
    (lambda bucket: flip(bucket, f"{STEP_20}/{MANIFEST}"), "manifest"),
    (lambda bucket: bucket.put(f"{STEP_20}/{MANIFEST}", b""), "unreadable manifest"),
]


@pytest.mark.parametrize(("damage", "fault"), DAMAGES, ids=["flipped", "deleted", "truncated", "manifest", "empty"])
def test_a_damaged_one_is_set_aside(
    store: CheckpointStore,
    bucket: Bucket,
    ranks: Ranks,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Bucket], None],
    fault: str,
) -> None:
    save(store, ranks, 10, 20)
    damage(bucket)
    left = {key: bucket.get(key) for key in bucket.keys() - {"latest"}}
    assert open_checkpoint(store.folder).step == 10
    assert restored(store) == 10
    aside = f"{STEP_20}/{DAMAGED}{MANIFEST}"
    assert f"checkpoint {STEP_20} is damaged" in caplog.text
    assert fault in caplog.text
    assert f"moved to {aside}" in caplog.text
    left[aside] = left.pop(f"{STEP_20}/{MANIFEST}")
    assert {key: bucket.get(key) for key in bucket.keys() - {"latest"}} == left
    assert bucket.get("latest") == f"{STEP_10}\n".encode()
    assert restored(store) == 10
    save(store, ranks, 20)
    assert f"{STEP_20} was set aside as damaged; it is written anew" in caplog.text
    assert bucket.keys() == {*keys_of(10, 20), "latest"}
    assert restored(store) == 20


def test_if_all_are_damaged_a_run_begins_anew(store: CheckpointStore, bucket: Bucket, ranks: Ranks) -> None:
    save(store, ranks, 10)
    flip(bucket, f"{STEP_10}/{RANK_0}")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_checkpoint(store.folder)
    assert restored(store) is None
    assert bucket.keys() == {f"{STEP_10}/{DAMAGED}{MANIFEST}", f"{STEP_10}/{RANK_0}"}


def save_and_die(environment: dict[str, str], url: str, when: str) -> None:
    """Save step 10, and die while step 20 is saved."""
    os.environ.update(environment)
    folder = ObjectFolder(url)
    with connect(Topology(), timeout_s=60) as ranks:
        store = CheckpointStore(folder, ranks, Retention(last=3))
        save(store, ranks, 10)
        if when == "before the manifest":
            folder.publish = lambda name, manifest: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
            save(store, ranks, 20)
        elif when == "within a removal":
            save(store, ranks, 5)
            remove, seen = folder._driver.rm_file, list[str]()

            def remove_one(path: str) -> None:
                if seen:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen.append(path)
                remove(path)

            folder._driver.rm_file = remove_one
            folder.remove(step_name(5))
        else:
            objects.PART_BYTES = PART

            def blocks() -> Iterator[memoryview]:
                yield memoryview(bytes(PART))
                yield memoryview(bytes(1000))
                os.kill(os.getpid(), signal.SIGKILL)

            folder.stage(STEP_20)
            folder.write(STEP_20, RANK_0, blocks())


@pytest.mark.parametrize("when", ["before the manifest", "within a removal", "within an upload"])
def test_a_process_that_is_killed_leaves_what_was_committed(
    s3: S3Server, store: CheckpointStore, bucket: Bucket, when: str
) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=save_and_die, args=(s3.environment, store.folder.location, when)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    left = {
        "before the manifest": {f"{STEP_20}/{RANK_0}"},
        "within a removal": {f"{step_name(5)}/{RANK_0}"},
        "within an upload": set(),
    }[when]
    assert bucket.keys() == {*keys_of(10), "latest", *left}
    assert len(bucket.uploads()) == (when == "within an upload")
    assert checkpoint_names(store.folder) == [STEP_10]
    assert restored(store) == 10
    assert bucket.keys() == {*keys_of(10), "latest"}
    assert bucket.uploads() == []


def two_ranks(topology: Topology, environment: dict[str, str], url: str) -> None:
    os.environ.update(environment)
    with connect(topology, timeout_s=60) as ranks:
        store = CheckpointStore(ObjectFolder(url), ranks, Retention(last=2))
        save(store, ranks, 10, 20, 30)
        assert restored(store) == 30


def test_two_ranks_write_at_a_time_and_one_reads(
    s3: S3Server, store: CheckpointStore, bucket: Bucket, ranks: Ranks
) -> None:
    run_ranks(two_ranks, 2, s3.environment, store.folder.location)
    assert bucket.keys() == {
        "latest",
        *(f"{name}/{file}" for name in (STEP_20, STEP_30) for file in (MANIFEST, RANK_0, RANK_1)),
    }
    assert bucket.get(f"{STEP_30}/{RANK_1}") == file_of(30, 1, 2)
    assert restored(store) == 30
    save(store, ranks, 40)
    assert restored(store) == 40


def test_threads_share_a_folder(folder: ObjectFolder, bucket: Bucket) -> None:
    def work(number: int) -> bool:
        data = random.Random(number).randbytes(100_000)
        file = f"rank-{number:05d}.safetensors"
        folder.write(STEP_10, file, blocks_of(data, 30_000))
        return folder.read(STEP_10, file, 10, 50_000) == data[10:50_010] and folder.names() == []

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))
    assert len(bucket.keys()) == 16


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (503, "ServiceUnavailable")])
@pytest.mark.parametrize("method", ["PUT", "GET", "POST", "HEAD"])
def test_a_passing_failure_is_tried_again(
    s3: S3Server, store: CheckpointStore, ranks: Ranks, status: int, code: str, method: str
) -> None:
    s3.fail_next(3, status, code, method)
    save(store, ranks, 10)
    s3.fail_next(3, status, code, method)
    assert restored(store) == 10


def test_removals_are_tried_again(s3: S3Server, store: CheckpointStore, bucket: Bucket, ranks: Ranks) -> None:
    save(store, ranks, 10, 20, 30)
    s3.fail_next(3, method="DELETE")
    save(store, ranks, 40)
    assert bucket.keys() == {*keys_of(20, 30, 40), "latest"}


@pytest.fixture
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "STORAGE", StorageConfig(request_timeout_s=2, total_timeout_s=0.5))


@pytest.mark.usefixtures("little_time")
def test_a_failure_that_lasts_fails_the_save_and_nothing_else(
    s3: S3Server, bucket: Bucket, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(ObjectFolder(f"{bucket.url}/{PREFIX}"), ranks, Retention(last=3))
    save(store, ranks, 10)
    s3.fail_next(10_000, method="PUT")
    with pytest.raises(CheckpointError, match=rf"{STEP_20}/{RANK_0}: cannot write: given up after \d+ s: .*SlowDown"):
        save(store, ranks, 20)
    s3.fail_next(0)
    assert bucket.keys() == {*keys_of(10), "latest"}
    assert bucket.uploads() == []
    save(store, ranks, 20)
    s3.fail_next(10_000)
    with pytest.raises(CheckpointError, match="given up after"):
        restored(store)
    s3.fail_next(0)
    assert "damaged" not in caplog.text
    assert restored(store) == 20


@pytest.mark.usefixtures("little_time")
def test_what_is_out_of_reach_is_not_damaged(s3: S3Server, bucket: Bucket, ranks: Ranks) -> None:
    store = CheckpointStore(ObjectFolder(f"{bucket.url}/{PREFIX}"), ranks, Retention(last=3))
    save(store, ranks, 10, 20)
    read: dict[str, Tensor] = {}

    def load(checkpoint: Checkpoint) -> None:
        s3.fail_next(10_000, 500, "InternalError", "GET")
        read.update(read_parameters(checkpoint))

    with pytest.raises(CheckpointError, match=f"{STEP_20}/{RANK_0}: this rank cannot read it: .*InternalError"):
        store.restore(load)
    s3.fail_next(0)
    assert bucket.keys() == {*keys_of(10, 20), "latest"}
    assert restored(store) == 20


def test_a_long_failure_is_told(
    s3: S3Server, folder: ObjectFolder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "TELL_AFTER_S", 0)
    s3.fail_next(3)
    assert folder.names() == []
    told = [record for record in caplog.records if "it is tried for 240 s" in record.message]
    assert len(told) == 1
    assert told[0].levelno == logging.WARNING


def test_a_broken_upload_is_aborted(folder: ObjectFolder, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", PART)

    def blocks() -> Iterator[memoryview]:
        yield memoryview(bytes(PART))
        assert len(bucket.uploads()) == 1
        raise MemoryError("planted")

    with pytest.raises(MemoryError, match="planted"):
        folder.write(STEP_10, RANK_0, blocks())
    assert bucket.uploads() == []
    assert bucket.keys() == set()


def lose(folder: ObjectFolder, method: str, *, before: Callable[[], object] = lambda: None) -> None:
    """The answer to the next call of this kind gets lost; it was met."""
    real = folder._driver.call_s3

    def call(name: str, **more: Any) -> Any:
        answer = real(name, **more)
        if name == method:
            folder._driver.call_s3 = real
            before()
            raise ConnectionError("the answer got lost")
        return answer

    folder._driver.call_s3 = call


def test_an_upload_whose_last_answer_gets_lost_is_complete(folder: ObjectFolder, bucket: Bucket) -> None:
    lose(folder, "complete_multipart_upload")
    folder.write(STEP_10, RANK_0, blocks_of(b"abc" * 1000, 100))
    assert bucket.get(f"{STEP_10}/{RANK_0}") == b"abc" * 1000


def test_an_upload_that_someone_ends_is_named(s3: S3Server, folder: ObjectFolder, bucket: Bucket) -> None:
    lose(folder, "upload_part", before=lambda: s3.fail_next(1, 404, "NoSuchUpload", "PUT"))
    with pytest.raises(OSError, match="the upload is gone") as raised:
        folder.write(STEP_10, RANK_0, blocks_of(b"abc" * 1000, 100))
    assert raised.value.errno == errno.ESTALE
    assert bucket.keys() == set()
    assert bucket.uploads() == []


def test_what_fails_after_the_manifest_does_not_undo_it(
    folder: ObjectFolder,
    store: CheckpointStore,
    bucket: Bucket,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(name: str | None) -> None:
        raise OSError(errno.ETIMEDOUT, "given up")

    save(store, ranks, 10)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "point_latest", fail)
        save(store, ranks, 20)
    assert "latest cannot be written, or old checkpoints be removed, yet: " in caplog.text
    assert bucket.keys() == {*keys_of(10, 20), "latest"}
    assert restored(store) == 20
    assert bucket.get("latest") == f"{STEP_20}\n".encode()


def test_rights_that_are_missing_stop_a_run_at_its_start(
    s3: S3Server, store: CheckpointStore, bucket: Bucket, ranks: Ranks
) -> None:
    s3.fail_next(1, 403, "AccessDenied", "PUT")
    with pytest.raises(CheckpointError, match="AccessDenied was asked for"):
        restored(store)
    s3.fail_next(1, 403, "AccessDenied", "GET")
    with pytest.raises(CheckpointError, match="cannot be read: AccessDenied was asked for"):
        restored(store)
    assert bucket.keys() == set()
    save(store, ranks, 10)


def test_a_removal_that_is_refused_is_no_reason_to_stop(
    s3: S3Server, store: CheckpointStore, bucket: Bucket, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, ranks, 10, 20, 30)
    s3.fail_next(1, 403, "AccessDenied", "DELETE")
    save(store, ranks, 40)
    assert f"{STEP_10} cannot be removed yet: AccessDenied was asked for." in caplog.text
    assert checkpoint_names(store.folder)[0] == step_name(40)
    save(store, ranks, 50)
    assert bucket.keys() == {*keys_of(30, 40, 50), "latest"}


def test_a_bucket_that_is_not_there_is_named(s3: S3Server, ranks: Ranks) -> None:
    store = CheckpointStore(ObjectFolder("s3://nowhere/run"), ranks, Retention(last=3))
    with pytest.raises(CheckpointError, match=r"s3://nowhere/run: cannot be read: there is no such bucket"):
        restored(store)
    with pytest.raises(CheckpointError, match=r"there is no such bucket"):
        open_checkpoint(store.folder)


def test_another_process_gets_the_same_folder(folder: ObjectFolder, store: CheckpointStore, ranks: Ranks) -> None:
    save(store, ranks, 10)
    checkpoint = pickle.loads(pickle.dumps(open_checkpoint(folder)))
    assert checkpoint.folder.location == folder.location
    assert torch.equal(read_parameters(checkpoint)["w"], read_parameters(open_checkpoint(folder))["w"])
