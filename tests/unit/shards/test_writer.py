"""What stands on disk afterwards: opened by others, the same to the byte, whole after any interruption."""

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from vitscale.data.manifest import check_files, read_idx, read_manifest
from vitscale.errors import DataError
from vitscale_shards.plan import SplitPlan, make_plan
from vitscale_shards.sources import Digits, ImageFolder
from vitscale_shards.writer import write_split

Identity = dict[str, tuple[int, int]]


class Killed(BaseException):
    """Stands for the end of the process at a chosen point."""


@pytest.fixture
def source(tmp_path: Path) -> ImageFolder:
    for i in range(40):
        path = tmp_path / "images" / f"class{i % 4}" / f"{i}.{'png' if i % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5 + i, 7), (i, 2 * i, 3 * i)).save(path)
    return ImageFolder(tmp_path / "images")


def plan_of(source: ImageFolder | Digits, per_shard: int = 10, seed: int = 0) -> SplitPlan:
    (plan,) = make_plan(
        source.rows(), source=source.name, classes=source.classes, samples_per_shard=per_shard, seed=seed
    )
    return plan


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def identity(folder: Path) -> Identity:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


def spoil(source: ImageFolder, number: int) -> list[str]:
    paths = [row.path for row in plan_of(source).shards[0].rows[:number]]
    for path in paths:
        (source.folder / path).write_bytes(b"\xff\xd8broken")
    return paths


def test_index_sizes_and_digests_are_right(source: ImageFolder, tmp_path: Path) -> None:
    result = write_split(plan_of(source), source, tmp_path / "train")
    manifest = read_manifest(tmp_path / "train")
    assert replace(manifest, folder=result.manifest.folder) == result.manifest
    check_files(manifest)
    assert (manifest.num_samples, manifest.split, manifest.source) == (40, "train", "images")
    assert manifest.classes == source.classes
    for shard in manifest.shards:
        assert hashlib.sha256((tmp_path / "train" / shard.name).read_bytes()).hexdigest() == shard.sha256
    expected = {f"train-{i:06d}.{e}" for i in range(4) for e in ("tar", "idx")} | {"index.json"}
    assert {path.name for path in (tmp_path / "train").iterdir()} == expected


def test_members_are_plain_and_the_member_index_points_at_them(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source)
    folder = write_split(plan, source, tmp_path / "train").manifest.folder
    for shard in plan.shards:
        samples = read_idx(folder / shard.name.replace(".tar", ".idx"))
        with tarfile.open(folder / shard.name) as tar:
            infos = tar.getmembers()
        flat = [member for sample in samples for member in sample]
        assert [(m.name, m.offset, m.size) for m in flat] == [(i.name, i.offset_data, i.size) for i in infos]
        assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {
            (0, 0, 0, "vitscale", "vitscale", 0o444)
        }
        assert all(i.isreg() and not i.pax_headers and i.offset_data == i.offset + 512 for i in infos)
        data = (folder / shard.name).read_bytes()
        for row, members in zip(shard.rows, samples, strict=True):
            extension, image = source.read(row)
            assert {m.extension: data[m.offset : m.offset + m.size] for m in members} == {
                "cls": str(row.label).encode(),
                extension: image,
            }
            assert [m.name for m in members] == [f"{row.key}.{m.extension}" for m in members]


def test_webdataset_and_wids_read_the_same(
    source: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import webdataset
    import wids

    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    plan = plan_of(source)
    folder = write_split(plan, source, tmp_path / "train").manifest.folder
    rows = [row for shard in plan.shards for row in shard.rows]
    expected = [(row.key, str(row.label).encode(), *source.read(row)) for row in rows]

    urls = [str(folder / shard.name) for shard in plan.shards]
    streamed = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [(s["__key__"], s["cls"], e, s[e]) for s, (_, _, e, _) in zip(streamed, expected, strict=True)] == expected

    indexed = wids.ShardListDataset(str(folder / "index.json"), keep=True, transformations=lambda sample: sample)
    assert len(indexed) == len(expected)
    for sample, (key, label, extension, image) in zip((indexed[i] for i in range(40)), expected, strict=True):
        members = {e: v if isinstance(v, bytes) else v.read() for e, v in sample.items() if e.startswith(".")}
        assert (sample["__key__"], members) == (key, {".cls": label, f".{extension}": image})


def test_a_rewrite_is_the_same_to_the_byte(source: ImageFolder, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_split(plan_of(source), source, tmp_path / name / "train")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_complete_set_is_left_alone(source: ImageFolder, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    write_split(plan_of(source), source, folder)
    before = identity(folder)
    result = write_split(plan_of(source), source, folder)
    assert result.already_complete
    assert identity(folder) == before


@pytest.mark.parametrize("point", range(14))
def test_killed_at_any_rename_it_goes_on(
    source: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    plan = plan_of(source)
    folder = tmp_path / "killed" / "train"
    write_split(plan, source, tmp_path / "whole" / "train")
    real, calls = Path.replace, iter(range(100))

    def stop_there(self: Path, target: Path) -> Path:
        if next(calls) == point:
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_there)
        if point < 13:  # four times tar, idx, record; then the index
            with pytest.raises(Killed):
                write_split(plan, source, folder)
            assert not (folder / "index.json").exists()
    recorded = [path.name.removesuffix(".json") for path in folder.glob(".progress/*.json")]
    before = identity(folder)
    done: list[int] = []
    write_split(plan, source, folder, advance=done.append)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert {name: identity(folder)[name] for name in recorded} == {name: before[name] for name in recorded}
    assert sum(done) == 40


def test_killed_by_the_system_it_goes_on(tmp_path: Path) -> None:
    source = Digits()
    plan = plan_of(source, per_shard=20)
    write_split(plan, source, tmp_path / "whole" / "train")
    folder = tmp_path / "killed" / "train"
    command = [sys.executable, "-c", "from vitscale_shards.cli import app; app()", "write", "digits"]
    command += [str(folder.parent), "--samples-per-shard", "20"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment) as process:
        while len(list(folder.glob(".progress/*.json"))) < 3:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "index.json").exists()
    recorded = {path.name.removesuffix(".json") for path in folder.glob(".progress/*.json")}
    before = {name: identity(folder)[name] for name in recorded}
    assert len(recorded) < len(plan.shards)

    subprocess.run(command, env=environment, check=True)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert {name: identity(folder)[name] for name in recorded} == before


def test_a_recorded_shard_whose_file_is_gone_is_written_again(source: ImageFolder, tmp_path: Path) -> None:
    write_split(plan_of(source), source, tmp_path / "whole")
    folder = tmp_path / "train"
    interrupt_after(plan_of(source), source, folder, shards=2)
    (folder / "train-000000.tar").unlink()
    write_split(plan_of(source), source, folder)
    assert content(folder) == content(tmp_path / "whole")


def interrupt_after(plan: SplitPlan, source: ImageFolder, folder: Path, shards: int) -> None:
    left = sum(len(shard.rows) for shard in plan.shards[:shards]) + 1

    def stop(samples: int) -> None:
        nonlocal left
        left -= samples
        if not left:
            raise Killed

    with pytest.raises(Killed):
        write_split(plan, source, folder, advance=stop)


def test_another_plan_is_refused_whether_complete_or_not(source: ImageFolder, tmp_path: Path) -> None:
    write_split(plan_of(source), source, tmp_path / "complete")
    with pytest.raises(DataError, match=r"other images or settings \(40 samples of images in 4 shards\)"):
        write_split(plan_of(source, seed=1), source, tmp_path / "complete")
    interrupt_after(plan_of(source), source, tmp_path / "unfinished", shards=2)
    before = content(tmp_path / "unfinished")
    with pytest.raises(DataError, match="2 shards of an unfinished set"):
        write_split(plan_of(source, seed=1), source, tmp_path / "unfinished")
    assert content(tmp_path / "unfinished") == before


@pytest.mark.parametrize("name", ["thesis.tex", "train-000000.tar", "failures.jsonl"])
def test_other_files_are_never_overwritten(source: ImageFolder, tmp_path: Path, name: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).write_text("mine")
    with pytest.raises(DataError, match=f"holds 1 other files, such as {name}; .*choose another OUT"):
        write_split(plan_of(source), source, tmp_path / "train")
    assert content(tmp_path / "train") == {name: b"mine"}


def test_a_neighbour_with_other_classes_is_refused(source: ImageFolder, tmp_path: Path) -> None:
    write_split(plan_of(source), source, tmp_path / "out" / "train")
    (source.folder / "aardvark").mkdir()
    grown = ImageFolder(source.folder)
    with pytest.raises(DataError, match=r"classes would differ from those of .*train"):
        write_split(plan_of(grown), grown, tmp_path / "out" / "val")


def test_bad_images_within_the_budget_are_left_out_and_listed(source: ImageFolder, tmp_path: Path) -> None:
    bad = spoil(source, 2)
    result = write_split(plan_of(source), source, tmp_path / "train", max_failures=2)
    lines = [json.loads(line) for line in (tmp_path / "train" / "failures.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [failure.path for failure in result.failures] == bad
    assert {"key", "path", "reason"} == lines[0].keys()
    assert [shard.num_samples for shard in result.manifest.shards] == [8, 10, 10, 10]
    again = write_split(plan_of(source), source, tmp_path / "train", max_failures=2)
    assert again.already_complete
    assert again.failures == result.failures


@pytest.mark.parametrize(("spoiled", "allowed"), [(1, 0), (3, 2)])
def test_a_spent_budget_stops_with_the_file_and_the_reason(
    source: ImageFolder, tmp_path: Path, spoiled: int, allowed: int
) -> None:
    bad = spoil(source, spoiled)
    with pytest.raises(DataError) as caught:
        write_split(plan_of(source), source, tmp_path / "train", max_failures=allowed)
    assert str(caught.value).startswith(f"{bad[-1]}: no known image header in 8 bytes; bad image {spoiled}")
    assert len((tmp_path / "train" / "failures.jsonl").read_text().splitlines()) == spoiled
    assert not (tmp_path / "train" / "index.json").exists()
    result = write_split(plan_of(source), source, tmp_path / "train", max_failures=spoiled)
    assert result.manifest.num_samples == 40 - spoiled


def test_a_bad_image_can_be_removed_when_no_shard_is_finished(source: ImageFolder, tmp_path: Path) -> None:
    (bad,) = spoil(source, 1)
    with pytest.raises(DataError, match="bad image 1"):
        write_split(plan_of(source), source, tmp_path / "train")
    (source.folder / bad).unlink()
    result = write_split(plan_of(source), source, tmp_path / "train")
    assert result.manifest.num_samples == 39
    assert not (tmp_path / "train" / "failures.jsonl").exists()


def test_failures_of_a_former_attempt_count(source: ImageFolder, tmp_path: Path) -> None:
    spoil(source, 2)
    plan = plan_of(source)
    with pytest.raises(Killed):
        write_split(plan, source, tmp_path / "train", max_failures=2, advance=stop_in_second_shard())
    with pytest.raises(DataError, match="bad image 2, allowed are 1"):
        write_split(plan, source, tmp_path / "train", max_failures=1)


def stop_in_second_shard() -> Callable[[int], None]:
    counts: Iterator[int] = iter(range(100))

    def stop(samples: int) -> None:
        if next(counts) == 11:
            raise Killed

    return stop


def test_a_shard_of_bad_images_has_no_file(source: ImageFolder, tmp_path: Path) -> None:
    spoil(source, 10)
    result = write_split(plan_of(source), source, tmp_path / "train", max_failures=10)
    assert [s.name for s in result.manifest.shards] == [f"train-{i:06d}.tar" for i in (1, 2, 3)]
    assert not list((tmp_path / "train").glob("train-000000*"))
    check_files(read_manifest(tmp_path / "train"))


def test_a_set_of_bad_images_is_refused(source: ImageFolder, tmp_path: Path) -> None:
    for row in source.rows():
        (source.folder / row.path).write_bytes(b"x")
    with pytest.raises(DataError, match="all 40 images are bad"):
        write_split(plan_of(source), source, tmp_path / "train", max_failures=100)


def test_a_full_disk_leaves_nothing_half_written(source: ImageFolder, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "train"
    folder.mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"cannot be written \(.+\); finished shards are kept: make room"):
            write_split(plan_of(source), source, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in folder.iterdir()} == {".progress"}
    write_split(plan_of(source), source, folder)
    check_files(read_manifest(folder))


def test_a_second_writer_is_kept_out(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source)
    refused: list[str] = []

    def try_too(samples: int) -> None:
        if not refused:
            with pytest.raises(DataError, match="another command is writing here") as caught:
                write_split(plan, source, tmp_path / "train")
            refused.append(str(caught.value))

    write_split(plan, source, tmp_path / "train", advance=try_too)
    assert refused
    check_files(read_manifest(tmp_path / "train"))


def test_shuffled_labels_reach_every_shard_and_images_open(source: ImageFolder, tmp_path: Path) -> None:
    folder = write_split(plan_of(source), source, tmp_path / "train").manifest.folder
    with tarfile.open(folder / "train-000000.tar") as tar:
        images: list[bytes] = []
        labels: list[bytes] = []
        for info in tar:
            data = tar.extractfile(info).read()  # type: ignore[union-attr]
            (labels if info.name.endswith(".cls") else images).append(data)
    assert len({int(label) for label in labels}) > 1
    assert any(int(b) < int(a) for a, b in pairwise(labels))
    for data in images:
        Image.open(io.BytesIO(data)).load()
