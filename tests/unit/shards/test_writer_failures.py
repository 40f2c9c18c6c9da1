"""Bad images and full disks: what is left out is told, a budget bounds it, and nothing stays half-written."""

import resource
from pathlib import Path

import pytest

from tests.helpers.writing import (
    Counting,
    Killed,
    all_rows,
    content,
    identity,
    lines,
    plan_of,
    recorded,
    resize,
    samples_of,
    spoil,
    write_and_stop,
    write_until,
)
from vitscale.data.manifest import read_manifest
from vitscale.data.shard_set import check_files
from vitscale.errors import DataError
from vitscale_shards.place import LocalPlace
from vitscale_shards.planning.plan import Plan
from vitscale_shards.sources.folder import ImageFolder
from vitscale_shards.writing.records import Records
from vitscale_shards.writing.writer import Tally, write_set


def test_bad_images_within_the_budget_are_left_out_and_listed(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path)
    bad = spoil(source, all_rows(plan)[9:11])
    write_set(plan, source, max_failures=2)
    reasons = [f"no known image header in {row.num_bytes} bytes" for row in bad]
    assert lines(tmp_path / "train" / "failures.jsonl") == [
        {"key": row.key, "path": row.path, "reason": reason, "shard": f"train-{shard:06d}.tar"}
        for shard, (row, reason) in enumerate(zip(bad, reasons, strict=True))
    ]
    manifest = read_manifest(tmp_path / "train")
    check_files(manifest)
    assert [shard.num_samples for shard in manifest.shards] == [9, 9, 10, 10]
    keys = [key for shard in manifest.shards for key in samples_of(tmp_path / "train" / shard.name)]
    assert keys == [row.key for row in all_rows(plan) if row not in bad]
    before = content(tmp_path)
    write_set(plan, source)
    assert content(tmp_path) == before


@pytest.mark.parametrize(("spoiled", "allowed"), [(1, 0), (3, 2), (10, 9)])
def test_a_spent_budget_stops_with_the_file_and_the_reason(
    source: ImageFolder, tmp_path: Path, spoiled: int, allowed: int
) -> None:
    plan = plan_of(source, tmp_path)
    bad = spoil(source, all_rows(plan)[:spoiled])
    with pytest.raises(DataError) as caught:
        write_set(plan, source, max_failures=allowed)
    last = f"{bad[-1].path}: no known image header in {bad[-1].num_bytes} bytes"
    assert str(caught.value).startswith(f"{last}; bad image {spoiled}, allowed are {allowed} (all are listed in")
    listed = lines(tmp_path / "train" / "failures.jsonl")
    assert [(line["path"], line["shard"]) for line in listed] == [(row.path, "train-000000.tar") for row in bad]
    assert not (tmp_path / "train" / "index.json").exists()
    assert not list((tmp_path / "train").glob(".*.tmp"))
    write_set(plan, source, max_failures=spoiled)
    assert read_manifest(tmp_path / "train").num_samples == 40 - spoiled


def test_with_the_file_mended_the_same_call_goes_on(
    source: ImageFolder, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    plan = plan_of(source, out)
    (row,) = all_rows(plan)[5:6]
    good = source.read(row)
    spoil(source, [row])
    with pytest.raises(DataError, match="bad image 1, allowed are 0"):
        write_set(plan, source)
    assert (out / "train" / "failures.jsonl").exists()
    before = recorded(out / "train")
    (source.folder / row.path).write_bytes(good)
    write_set(plan, source)
    assert content(out) == whole
    assert before.items() <= identity(out / "train").items()


def test_an_image_that_is_gone_or_of_another_size_is_bad(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path)
    gone, grown = all_rows(plan)[:2]
    (source.folder / gone.path).unlink()
    with (source.folder / grown.path).open("ab") as file:
        file.write(b"more")
    write_set(plan, source, max_failures=2)
    size = grown.num_bytes
    assert {line["path"]: line["reason"] for line in lines(tmp_path / "train" / "failures.jsonl")} == {
        gone.path: "cannot be read: No such file or directory",
        grown.path: f"has {size + 4} bytes, {size} when it was planned: the source changed since",
    }


def test_failures_in_the_shards_of_all_workers_count(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path)
    bad = spoil(source, [plan.rows(shard)[0] for shard in range(4)])
    write_and_stop(plan, source, images=25, max_failures=4)
    with pytest.raises(DataError, match="bad image 3, allowed are 2"):
        write_set(plan, source, max_failures=2)
    listed = lines(tmp_path / "train" / "failures.jsonl")
    assert len(listed) == 3
    assert {(line["path"], line["shard"]) for line in listed} < {
        (row.path, plan.shard_name(shard)) for shard, row in enumerate(bad)
    }
    with pytest.raises(DataError, match="bad image 2, allowed are 1"):
        write_set(plan, source, max_failures=1)
    write_set(plan, source, max_failures=4)
    assert len(lines(tmp_path / "train" / "failures.jsonl")) == 4


def test_workers_side_by_side_do_not_record_more_than_the_budget(source: ImageFolder, tmp_path: Path) -> None:
    """Else the budget would stay spent after the files are mended."""
    plan = plan_of(source, tmp_path, per_shard=20)
    bad = {plan.shard_name(shard): plan.rows(shard)[0] for shard in range(2)}
    good = {row.path: source.read(row) for row in bad.values()}
    spoil(source, list(bad.values()))
    joined = False

    def let_another_finish_its_shard(tally: Tally) -> None:
        nonlocal joined
        if tally.current == 10 and not joined:
            joined = True
            write_until(Plan(plan.place), source, lambda tally: tally.finished == 20, max_failures=1)

    with pytest.raises(DataError, match="bad image 2, allowed are 1"):
        write_set(plan, source, max_failures=1, tell=let_another_finish_its_shard)
    (first,) = recorded(tmp_path / "train")
    (mended,) = (row for name, row in bad.items() if name != first)
    (source.folder / mended.path).write_bytes(good[mended.path])
    write_set(plan, source, max_failures=1)
    assert [line["shard"] for line in lines(tmp_path / "train" / "failures.jsonl")] == [first]


def test_a_shard_of_bad_images_has_no_file(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path)
    spoil(source, plan.rows(0))
    write_set(plan, source, max_failures=10)
    manifest = read_manifest(tmp_path / "train")
    assert [shard.name for shard in manifest.shards] == [plan.shard_name(i) for i in (1, 2, 3)]
    assert not [path.name for path in (tmp_path / "train").iterdir() if "train-000000" in path.name]
    check_files(manifest)
    assert len(lines(tmp_path / "train" / "failures.jsonl")) == 10


def test_a_shard_whose_images_went_bad_meanwhile_has_no_file_either(
    source: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was written once, and the worker died before it could leave a record."""

    def die(place: LocalPlace) -> None:
        raise Killed

    plan = plan_of(source, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(LocalPlace, "sync", die)
        with pytest.raises(Killed):
            write_set(plan, source)
    (name,) = identity(tmp_path / "train")
    assert not recorded(tmp_path / "train")
    spoil(source, plan.rows(int(name[6:12])))
    write_set(plan, source, max_failures=10)
    assert len(read_manifest(tmp_path / "train").shards) == 3
    assert not list((tmp_path / "train").glob(f"{name[:12]}*"))


def test_an_empty_shard_stays_empty_in_later_attempts(source: ImageFolder, tmp_path: Path) -> None:
    plan, counting = plan_of(source, tmp_path), Counting(source.folder)
    spoil(source, all_rows(plan))
    write_and_stop(plan, counting, images=25, max_failures=40)
    with pytest.raises(DataError, match="all 40 images are bad"):
        write_set(plan, counting, max_failures=40)
    assert counting.reads.total() == 25 + 20


def test_a_set_of_bad_images_is_refused(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path)
    spoil(source, all_rows(plan))
    with pytest.raises(DataError, match="all 40 images are bad") as caught:
        write_set(plan, source, max_failures=100)
    assert f"remove {tmp_path / 'train'}" in str(caught.value)  # what to do when they are mended
    assert not (tmp_path / "train" / "index.json").exists()
    assert len(lines(tmp_path / "train" / "failures.jsonl")) == 40


FULL = r"cannot be written \(.+\); finished shards are kept: make room or mend the permissions, then give"


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_a_file_that_may_not_grow_leaves_nothing_half_written(
    source: ImageFolder, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    plan = plan_of(source, out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        with pytest.raises(DataError, match=FULL):
            write_set(plan, source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert visible(out / "train") == {"plan.parquet"}
    write_set(plan, source)
    assert content(out) == whole


@pytest.mark.parametrize("room", [0, 4096, 20_000, 70_000, 100_000])
def test_a_full_disk_leaves_nothing_half_written(
    source: ImageFolder,
    small_disk: Path,
    whole: dict[str, bytes],
    room: int,
) -> None:
    """The tars have 30,720 bytes each."""
    out = small_disk / "out"
    plan = plan_of(source, out)
    resize(small_disk, room=room)
    with pytest.raises(DataError, match=FULL) as caught:
        write_set(plan, source)
    assert "No space left on device" in str(caught.value)
    assert "\n" not in str(caught.value)
    folder = out / "train"
    before = recorded(folder)
    assert len(before) == max(0, room - 9000) // (30_720 + 8192)
    assert not list(folder.rglob("*.tmp"))
    assert not list(folder.rglob("*.claim"))
    resize(small_disk, room=1 << 20)
    write_set(plan, source)
    assert content(out) == whole
    assert before.items() <= identity(folder).items()


def test_a_shard_that_two_records_tell_of_counts_once(source: ImageFolder, tmp_path: Path) -> None:
    """One of the set that was complete once, and one of its shard that was lost since and written again."""
    plan = plan_of(source, tmp_path)
    folder = tmp_path / "train"
    spoil(source, [plan.rows(shard)[0] for shard in range(4)])
    write_and_stop(plan, source, images=31, max_failures=4)
    records = Records(plan)
    records.refresh()
    lost, *others = (record.shard.name for record in records.all())
    records.reopen(records.all())
    for name in (lost, *others):
        (folder / ".progress" / f"{name}.json").unlink()
    (folder / lost).unlink()
    write_until(plan, source, lambda _: (folder / ".progress" / f"{lost}.json").exists(), max_failures=4)
    told: list[int] = []
    write_set(plan, source, max_failures=4, tell=lambda tally: told.append(tally.finished + tally.current))
    assert max(told) == 40
    assert len(lines(folder / "failures.jsonl")) == 4
