"""Repair and retry: the set is afterwards what an undisturbed writing would have given, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vitscale.data.manifest import read_manifest
from vitscale.data.shard_set import check_files
from vitscale.errors import DataError
from vitscale_shards.checking.locate import locate
from vitscale_shards.checking.verify import SetFault, verify_set
from vitscale_shards.place import LocalPlace
from vitscale_shards.planning.plan import Plan
from vitscale_shards.planning.planner import make_plans
from vitscale_shards.planning.settings import PlanSettings
from vitscale_shards.rows import Row
from vitscale_shards.sources import SourceSpec
from vitscale_shards.sources.folder import ImageFolder
from vitscale_shards.writing.mend import changed_shards, prepare_repair, retry
from vitscale_shards.writing.records import Records
from vitscale_shards.writing.workers import write_sets


class Counting(ImageFolder):
    """Remembers which images were read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read_paths: list[str] = []

    def read(self, row: Row) -> bytes:
        self.read_paths.append(row.path)
        return super().read(row)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i in range(40):
        path = tmp_path / "images" / f"class{i % 4}" / f"{i}.{'png' if i % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5 + i, 7), (i, 2 * i, 3 * i)).save(path)
    return tmp_path / "images"


def spec_of(images: Path) -> SourceSpec:
    return SourceSpec((str(images),))


def written(images: Path, out: Path, max_failures: int = 0) -> Plan:
    spec = spec_of(images)
    (plan,) = make_plans(spec.open(), spec.to_json(), PlanSettings(samples_per_shard=10), LocalPlace(out))
    write_sets([plan], spec, max_failures=max_failures)
    return plan


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.tar")}


def faults_of(plan: Plan) -> list[SetFault]:
    return list(verify_set(plan.place, plan=plan.head.digest))


def repair(plan: Plan, images: Path) -> list[str]:
    repairs = prepare_repair(plan, plan.place, faults_of(plan), spec_of(images))
    if repairs.reopened:
        write_sets([plan], spec_of(images))
    return repairs.to_write


def truncate(folder: Path) -> None:
    with (folder / "train-000001.tar").open("r+b") as file:
        file.truncate(6000)


def flip(folder: Path) -> None:
    with (folder / "train-000002.tar").open("r+b") as file:
        file.seek(2100)
        byte = file.read(1)
        file.seek(2100)
        file.write(bytes([byte[0] ^ 1]))


def swap(folder: Path) -> None:
    (folder / "train-000000.tar").rename(folder / "x")
    (folder / "train-000003.tar").rename(folder / "train-000000.tar")
    (folder / "x").rename(folder / "train-000003.tar")


DAMAGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "truncated": (truncate, {"train-000001.tar"}),
    "flipped": (flip, {"train-000002.tar"}),
    "missing": (lambda folder: (folder / "train-000002.tar").unlink(), {"train-000002.tar"}),
    "swapped": (swap, {"train-000000.tar", "train-000003.tar"}),
    "empty idx": (lambda folder: (folder / "train-000000.idx").write_text("v1.2 0\n"), set()),
    "no idx": (lambda folder: (folder / "train-000000.idx").unlink(), set()),
    "no index": (lambda folder: (folder / "index.json").unlink(), set()),
    "damaged index": (lambda folder: (folder / "index.json").write_text("{"), set()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_what_is_broken_is_written_again(images: Path, tmp_path: Path, damage: str) -> None:
    plan = written(images, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    whole, before = content(folder), inodes(folder)
    harm, broken = DAMAGES[damage]
    harm(folder)
    assert faults_of(plan)
    assert set(repair(plan, images)) == broken
    assert content(folder) == whole
    assert not faults_of(plan)
    kept = set(before) - broken
    assert {name: inodes(folder)[name] for name in kept} == {name: before[name] for name in kept}


def test_an_index_of_another_writing_is_replaced(images: Path, tmp_path: Path) -> None:
    plan = written(images, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    whole, before = content(folder), inodes(folder)
    (images / "class0" / "0.jpg").rename(tmp_path / "0.jpg")
    written(images, tmp_path / "other")
    (tmp_path / "0.jpg").rename(images / "class0" / "0.jpg")
    (folder / "index.json").write_bytes((tmp_path / "other" / "train" / "index.json").read_bytes())
    assert {fault.kind for fault in faults_of(plan)} == {"index"}
    assert repair(plan, images) == []
    assert content(folder) == whole
    assert inodes(folder) == before


def test_a_foreign_file_is_set_aside_not_removed(images: Path, tmp_path: Path) -> None:
    plan = written(images, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    (folder / "holiday.jpg").write_bytes(b"mine")
    (folder / ".train-000001.tar.gone-1.tmp").write_bytes(b"half")
    assert {fault.kind for fault in faults_of(plan)} == {"foreign", "leftover"}
    repair(plan, images)
    assert not faults_of(plan)
    assert (folder / ".set-aside" / "holiday.jpg").read_bytes() == b"mine"
    assert not (folder / ".train-000001.tar.gone-1.tmp").exists()


def test_without_a_plan_broken_tars_cannot_be_repaired(images: Path, tmp_path: Path) -> None:
    plan = written(images, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    (folder / "plan.parquet").unlink()
    truncate(folder)
    faults = list(verify_set(plan.place))
    with pytest.raises(DataError, match=r"broken tars \(1\), and no plan\.parquet to write from"):
        prepare_repair(None, plan.place, faults, None)


def test_without_a_plan_member_indexes_follow_from_the_tars(images: Path, tmp_path: Path) -> None:
    plan = written(images, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    (folder / "plan.parquet").unlink()
    whole = content(folder)
    (folder / "train-000001.idx").write_text("nothing")
    prepare_repair(None, plan.place, list(verify_set(plan.place)), None)
    assert content(folder) == whole


def test_an_unfinished_set_is_not_repaired_but_written(images: Path, tmp_path: Path) -> None:
    plan = written(images, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    (folder / "index.json").unlink()
    (folder / ".progress").mkdir()
    (folder / ".progress" / "x.alive").touch()
    with pytest.raises(DataError, match="is not complete; 'vitscale shards write"):
        repair(plan, images)


def test_a_damaged_index_beside_what_a_writing_left_is_mended(images: Path, tmp_path: Path) -> None:
    plan = written(images, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    whole = content(folder)
    (folder / "index.json").write_text("{")
    (folder / ".progress").mkdir()
    (folder / ".progress" / "x.alive").touch()
    assert repair(plan, images) == []
    assert content(folder) == whole
    assert not faults_of(plan)


def test_a_source_that_changed_since_is_told(images: Path, tmp_path: Path) -> None:
    plan = written(images, tmp_path / "out")
    before = read_manifest(tmp_path / "out" / "train")
    row = plan.rows(1)[0]
    data = bytearray((images / row.path).read_bytes())
    data[-5] ^= 1
    (images / row.path).write_bytes(data)
    truncate(tmp_path / "out" / "train")
    repair(plan, images)
    after = read_manifest(tmp_path / "out" / "train")
    assert changed_shards(before, after) == ["train-000001.tar"]
    assert changed_shards(before, before) == []


@pytest.mark.parametrize("offset", [0, 300, 600, 1536, 2048, 2100])
def test_the_first_wrong_byte_is_found(images: Path, tmp_path: Path, offset: int) -> None:
    plan = written(images, tmp_path / "out")
    path = tmp_path / "out" / "train" / "train-000002.tar"
    data = bytearray(path.read_bytes())
    data[offset] ^= 255
    path.write_bytes(data)
    fault = SetFault("checksum", path.name, None, None, "differs; which bytes cannot be told")
    (placed,) = locate(plan, [fault])
    assert placed.offset == offset
    assert placed.key in {row.key for row in plan.rows(2)}
    assert f"byte {offset} is the first wrong one, in the" in placed.message


def test_a_wrong_byte_is_not_looked_for_when_the_source_is_gone(images: Path, tmp_path: Path) -> None:
    plan = written(images, tmp_path / "out")
    images.rename(tmp_path / "elsewhere")
    fault = SetFault("checksum", "train-000002.tar", None, None, "differs")
    assert locate(plan, [fault]) == [fault]


def test_retry_reads_only_what_failed_and_gives_the_undisturbed_set(images: Path, tmp_path: Path) -> None:
    written(images, tmp_path / "whole")
    good = {}
    plan = Plan(LocalPlace(tmp_path / "whole" / "train"))
    for row in [*plan.rows(0)[:2], *plan.rows(2)[4:5]]:
        good[row.path] = (images / row.path).read_bytes()
        (images / row.path).write_bytes(b"\xff\xd8" + bytes(row.num_bytes - 2))
    plan = written(images, tmp_path / "out", max_failures=3)
    folder = tmp_path / "out" / "train"
    before = inodes(folder)
    assert read_manifest(folder).num_samples == 37

    source = Counting(images)
    assert retry(plan, source) == 0
    assert sorted(source.read_paths) == sorted(good)
    assert inodes(folder) == before

    first, *_ = good
    (images / first).write_bytes(good[first])
    source = Counting(images)
    assert retry(plan, source) == 1
    assert set(source.read_paths) == set(good)
    assert read_manifest(folder).num_samples == 38
    assert not faults_of(plan)

    for path, data in good.items():
        (images / path).write_bytes(data)
    assert retry(plan, Counting(images)) == 2
    assert content(folder) == content(tmp_path / "whole" / "train")
    assert inodes(folder)["train-000001.tar"] == before["train-000001.tar"]


def test_retry_brings_back_a_shard_all_of_whose_images_were_bad(images: Path, tmp_path: Path) -> None:
    written(images, tmp_path / "whole")
    plan = Plan(LocalPlace(tmp_path / "whole" / "train"))
    good = {row.path: (images / row.path).read_bytes() for row in plan.rows(1)}
    for path, data in good.items():
        (images / path).write_bytes(bytes(len(data)))
    plan = written(images, tmp_path / "out", max_failures=10)
    for path, data in good.items():
        (images / path).write_bytes(data)
    assert retry(plan, ImageFolder(images)) == 10
    assert content(tmp_path / "out" / "train") == content(tmp_path / "whole" / "train")


def test_retry_of_an_interrupted_retry_goes_on_by_writing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(images, tmp_path / "whole")
    plan = Plan(LocalPlace(tmp_path / "whole" / "train"))
    good = {}
    for row in (plan.rows(0)[0], plan.rows(3)[0]):
        good[row.path] = (images / row.path).read_bytes()
        (images / row.path).write_bytes(bytes(row.num_bytes))
    plan = written(images, tmp_path / "out", max_failures=2)
    for path, data in good.items():
        (images / path).write_bytes(data)

    class Killed(BaseException):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("vitscale_shards.writing.mend.write_set", stop)
        with pytest.raises(Killed):
            retry(plan, ImageFolder(images))
    with pytest.raises(DataError, match="is not complete; 'vitscale shards write"):
        retry(plan, ImageFolder(images))
    write_sets([plan], spec_of(images))
    assert content(tmp_path / "out" / "train") == content(tmp_path / "whole" / "train")


def test_retry_refuses_a_damaged_tar(images: Path, tmp_path: Path) -> None:
    row = Plan(written(images, tmp_path / "whole").place).rows(2)[0]
    good = (images / row.path).read_bytes()
    (images / row.path).write_bytes(bytes(len(good)))
    plan = written(images, tmp_path / "out", max_failures=1)
    (images / row.path).write_bytes(good)
    flip(tmp_path / "out" / "train")
    with pytest.raises(DataError, match=r"train-000002\.tar: is not what the index says; mend the set first"):
        retry(plan, ImageFolder(images))
    check_files(read_manifest(tmp_path / "out" / "train"))


def test_a_repair_without_the_source_changes_nothing(images: Path, tmp_path: Path) -> None:
    plan = written(images, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    flip(folder)
    before = content(folder)
    images.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="no such file or folder"):
        repair(plan, images)
    assert content(folder) == before
    assert repair(plan, tmp_path / "elsewhere") == ["train-000002.tar"]
    assert not faults_of(plan)


def test_a_repair_that_fails_leaves_the_former_index(images: Path, tmp_path: Path) -> None:
    plan = written(images, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    flip(folder)
    before = content(folder)
    (images / plan.rows(2)[3].path).unlink()
    repairs = prepare_repair(plan, plan.place, faults_of(plan), spec_of(images))
    assert repairs.reopened
    assert not (folder / "index.json").exists()
    with pytest.raises(DataError, match="cannot be read"):
        write_sets([plan], spec_of(images))
    Records(plan).close_again()
    (folder / "failures.jsonl").unlink()
    assert content(folder) == before
    assert {fault.file for fault in faults_of(plan)} == {"train-000002.tar"}


def test_a_set_that_is_only_planned_is_not_repaired(images: Path, tmp_path: Path) -> None:
    spec = spec_of(images)
    (plan,) = make_plans(spec.open(), spec.to_json(), PlanSettings(), LocalPlace(tmp_path / "out"))
    with pytest.raises(DataError, match="is not complete; 'vitscale shards write"):
        repair(plan, images)
    assert not list(tmp_path.rglob("*.tar"))
