"""What stands on disk afterwards: opened by others, the same to the byte, whole after any interruption."""

import hashlib
import io
import itertools
import json
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from PIL import Image

from tests.helpers.writing import (
    Counting,
    Killed,
    all_rows,
    content,
    identity,
    make_images,
    plan_of,
    recorded,
    samples_of,
    wait_for,
    write_and_stop,
)
from vitscale.data.manifest import read_idx, read_manifest
from vitscale.data.order import SequentialOrder, WindowId
from vitscale.data.shard_set import check_files, open_source
from vitscale.data.stream import RawSample, ShardStream
from vitscale_shards.place import LocalPlace
from vitscale_shards.planning.plan import Plan
from vitscale_shards.planning.planner import make_plans
from vitscale_shards.planning.settings import PlanSettings
from vitscale_shards.rows import Row
from vitscale_shards.sources.digits import Digits
from vitscale_shards.sources.folder import ImageFolder
from vitscale_shards.writing.writer import Tally, write_set

SET_FILES = {f"train-{i:06d}.{e}" for i in range(4) for e in ("tar", "idx")} | {"index.json", "plan.parquet"}


class Tagged(ImageFolder):
    """As many labels as there are images of a class before it, modulo 4."""

    multi_label = True

    def rows(self) -> Iterator[Row]:
        for number, row in enumerate(super().rows()):
            yield row._replace(labels=tuple((number + i) % 4 for i in range(number % 4)))


def test_index_sizes_and_digests_are_right(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path)
    write_set(plan, source)
    manifest = read_manifest(tmp_path / "train")
    check_files(manifest)
    assert (manifest.num_samples, manifest.split, manifest.source) == (40, "train", "images")
    assert (manifest.classes, manifest.multi_label, manifest.plan) == (source.classes, False, plan.head.digest)
    assert manifest.order == "shuffled"
    assert [(shard.name, shard.num_samples) for shard in manifest.shards] == [
        (plan.shard_name(i), plan.shard_size(i)) for i in range(4)
    ]
    for shard in manifest.shards:
        assert hashlib.sha256((tmp_path / "train" / shard.name).read_bytes()).hexdigest() == shard.sha256
    assert {path.name for path in (tmp_path / "train").iterdir()} == SET_FILES


def test_members_are_plain_and_the_member_index_points_at_them(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path)
    write_set(plan, source)
    for shard in range(plan.num_shards):
        path = tmp_path / "train" / plan.shard_name(shard)
        samples = list(read_idx(path.with_suffix(".idx")))
        with tarfile.open(path) as tar:
            infos = tar.getmembers()
        flat = [member for sample in samples for member in sample]
        assert [(m.name, m.offset, m.size) for m in flat] == [(i.name, i.offset_data, i.size) for i in infos]
        assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {
            (0, 0, 0, "vitscale", "vitscale", 0o444)
        }
        assert all(i.isreg() and not i.pax_headers and i.offset_data == i.offset + 512 for i in infos)
        data = path.read_bytes()
        for row, members in zip(plan.rows(shard), samples, strict=True):
            assert {m.extension: data[m.offset : m.offset + m.size] for m in members} == {
                "cls": str(row.labels[0]).encode(),
                row.path.rpartition(".")[2]: source.read(row),
            }
            assert [m.name for m in members] == [f"{row.key}.{m.extension}" for m in members]


@pytest.mark.parametrize("kind", [ImageFolder, Tagged])
def test_webdataset_wids_and_our_stream_read_the_same(
    source: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ImageFolder]
) -> None:
    import webdataset
    import wids

    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    source = kind(source.folder)
    plan = plan_of(source, tmp_path)
    write_set(plan, source)
    folder = tmp_path / "train"
    expected = []
    for row in all_rows(plan):
        label = ("json", json.dumps({"labels": row.labels})) if source.multi_label else ("cls", str(row.labels[0]))
        parts = {label[0]: label[1].encode(), row.path.rpartition(".")[2]: source.read(row)}
        expected.append((row.key, parts, row.labels))

    urls = [str(folder / plan.shard_name(shard)) for shard in range(4)]
    streamed = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [(s["__key__"], {e: s[e] for e in s if not e.startswith("__")}) for s in streamed] == [
        (key, parts) for key, parts, _ in expected
    ]

    indexed = wids.ShardListDataset(str(folder / "index.json"), keep=True, transformations=lambda sample: sample)
    assert len(indexed) == len(expected)
    for sample, (key, parts, _) in zip((indexed[i] for i in range(40)), expected, strict=True):
        found = {e[1:]: v if isinstance(v, bytes) else v.read() for e, v in sample.items() if e.startswith(".")}
        assert (sample["__key__"], found) == (key, parts)

    manifest = read_manifest(folder)
    stream = ShardStream([open_source(manifest)], SequentialOrder([s.num_samples for s in manifest.shards], window=7))
    ours = [sample for number in range(6) for sample in stream.read_window(WindowId(0, 0, number))]
    assert all(isinstance(sample, RawSample) for sample in ours)
    assert [(s.key, s.image, s.labels) for s in ours if isinstance(s, RawSample)] == [
        (key, next(data for e, data in parts.items() if e not in ("cls", "json")), labels)
        for key, parts, labels in expected
    ]


def test_a_rewrite_is_the_same_to_the_byte(source: ImageFolder, tmp_path: Path, whole: dict[str, bytes]) -> None:
    write_set(plan_of(source, tmp_path / "again"), source)
    assert content(tmp_path / "again") == whole


def test_a_complete_set_is_left_alone(source: ImageFolder, tmp_path: Path) -> None:
    plan, told = plan_of(source, tmp_path), []
    write_set(plan, source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()}
    counting = Counting(source.folder)
    write_set(plan, counting, tell=lambda tally: told.append(tally.finished))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()} == before
    assert not counting.reads
    assert told == [40]


def test_progress_counts_every_image_and_ends_at_all(source: ImageFolder, tmp_path: Path) -> None:
    told: list[int] = []
    write_set(plan_of(source, tmp_path), source, tell=lambda tally: told.append(tally.finished + tally.current))
    assert told == sorted(told)
    assert set(told) == set(range(41))


RENAMES = 14  # a sign of life; four times tar, idx, record; the index


@pytest.mark.parametrize("point", range(RENAMES + 1))
def test_killed_at_any_rename_it_goes_on(
    source: ImageFolder, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    out = tmp_path / "killed"
    plan = plan_of(source, out)
    real, calls = Path.replace, itertools.count()

    def stop_there(self: Path, target: Path) -> Path:
        if next(calls) == point:
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_there)
        if point < RENAMES:
            with pytest.raises(Killed):
                write_set(plan, source)
            assert not (out / "train" / "index.json").exists()
        else:
            write_set(plan, source)
    before = recorded(out / "train")
    assert len(before) == max(0, point - 1) // 3 if point < RENAMES else not before
    write_set(plan, source)
    assert content(out) == whole
    assert before.items() <= identity(out / "train").items()


CHANGES = ("fsync", "rename", "replace", "link", "unlink", "mkdir", "rmdir")


def killed_before_change(number: int, plan: Plan, source: ImageFolder) -> bool:
    """Write in a fork that gets SIGKILL before the n-th change of the disk, or image. False: there are fewer."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        assert status in (0, signal.SIGKILL)
        return status != 0
    left = number

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            count()
            return function(*arguments, **keywords)

        return wrapper

    status = 1
    try:
        for name in CHANGES:
            setattr(os, name, deadly(getattr(os, name)))
        write_set(plan, source, tell=count)
        status = 0
    finally:
        os._exit(status)


def test_killed_by_the_system_at_any_change_of_the_disk_it_goes_on(tmp_path: Path) -> None:
    source = make_images(tmp_path / "images", 4)
    whole = tmp_path / "whole"
    write_set(plan_of(source, whole, per_shard=2), source)
    point = 0
    for point in itertools.count():
        out = tmp_path / f"killed-{point}"
        plan = plan_of(source, out, per_shard=2)
        killed = killed_before_change(point, plan, source)
        before = recorded(out / "train")
        write_set(plan, source)
        assert content(out) == content(whole), f"killed before change {point}"
        assert not [path for path in (out / "train").iterdir() if path.is_dir()]
        assert before.items() <= identity(out / "train").items()
        if not killed:
            break
    assert point > 40


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_a_recorded_shard_whose_file_is_gone_is_written_again(
    source: ImageFolder, tmp_path: Path, whole: dict[str, bytes], suffix: str
) -> None:
    out = tmp_path / "out"
    plan = plan_of(source, out)
    write_and_stop(plan, source, images=25)
    before = recorded(out / "train")
    gone, kept = before
    (out / "train" / gone).with_suffix(suffix).unlink()
    counting = Counting(source.folder)
    write_set(plan, counting)
    assert content(out) == whole
    assert identity(out / "train")[kept] == before[kept]
    assert counting.reads.total() == 30


def test_a_record_of_another_size_or_plan_is_not_believed(
    source: ImageFolder, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    plan = plan_of(source, out)
    write_and_stop(plan, source, images=25)
    one, other = (path for path in sorted((out / "train" / ".progress").glob("*.tar.json")))
    one.write_text(json.dumps(json.loads(one.read_text()) | {"plan": "another"}))
    (out / "train" / other.name.removesuffix(".json")).write_bytes(b"cut short")
    counting = Counting(source.folder)
    write_set(plan, counting)
    assert content(out) == whole
    assert counting.reads.total() == 40


def test_images_of_finished_shards_are_not_read_again(source: ImageFolder, tmp_path: Path) -> None:
    plan, counting = plan_of(source, tmp_path), Counting(source.folder)
    write_and_stop(plan, counting, images=35)
    write_set(plan, counting)
    assert counting.reads.total() == 35 + 10
    assert max(counting.reads.values()) == 2


def test_a_second_writer_joins(source: ImageFolder, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    plan = plan_of(source, out)
    counting = Counting(source.folder)
    both_at_it = threading.Event()

    def wait_for_the_other(tally: Tally) -> None:
        if tally.current == 3:
            assert both_at_it.wait(60)

    first = threading.Thread(target=write_set, args=(plan, counting), kwargs={"tell": wait_for_the_other})
    first.start()
    wait_for(lambda: counting.reads.total() >= 3)
    write_set(Plan(LocalPlace(out / "train")), counting, tell=lambda tally: both_at_it.set())
    first.join()
    assert content(out) == whole
    assert set(counting.reads.values()) == {1}


class Finished(LocalPlace):
    """A folder in which other workers finish the set just as this one gives its first sign of life."""

    def __init__(self, folder: Path, finish: Callable[[], None]) -> None:
        super().__init__(folder)
        self._finish: Callable[[], None] | None = finish

    @contextmanager
    def published(self, name: str) -> Iterator[BinaryIO]:
        with super().published(name) as file:
            yield file
            if name.endswith(".alive") and self._finish is not None:
                finish, self._finish = self._finish, None
                finish()


def test_a_worker_that_comes_as_others_tidy_up_finds_the_set_complete(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path)
    late = Finished(tmp_path / "train", lambda: write_set(plan, source))
    write_set(Plan(late), source)
    assert {path.name for path in (tmp_path / "train").iterdir()} == SET_FILES


def test_what_dead_workers_left_half_written_makes_room_at_once(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path)
    folder = tmp_path / "train"
    for name in ("train-000000.tar", "train-000003.idx", "index.json", "plan.parquet"):
        (folder / f".{name}.node7-123.tmp").write_bytes(b"half")
    seen: set[str] = set()

    def look(tally: Tally) -> None:
        seen.update(path.name for path in folder.glob(".train-*node7*"))

    write_set(plan, source, tell=look)
    assert not seen
    assert {path.name for path in folder.iterdir()} == SET_FILES


def test_shuffled_labels_reach_every_shard_and_images_open(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path)
    write_set(plan, source)
    for shard in range(plan.num_shards):
        samples = samples_of(tmp_path / "train" / plan.shard_name(shard))
        labels = [int(parts["cls"]) for parts in samples.values()]
        assert len(set(labels)) > 1
        assert any(b < a for a, b in pairwise(labels))
        for parts in samples.values():
            Image.open(io.BytesIO(next(data for e, data in parts.items() if e != "cls"))).load()


def test_every_image_of_a_source_without_files_is_there(tmp_path: Path) -> None:
    source = Digits()
    (plan,) = make_plans(source, {}, PlanSettings(samples_per_shard=300), LocalPlace(tmp_path))
    write_set(plan, source)
    manifest = read_manifest(tmp_path / "train")
    samples = {k: v for shard in manifest.shards for k, v in samples_of(tmp_path / "train" / shard.name).items()}
    assert samples == {row.key: {"png": source.read(row), "cls": str(row.labels[0]).encode()} for row in source.rows()}
