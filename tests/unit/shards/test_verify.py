"""What verify says of every kind of damage, and that it says nothing of a sound set."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.shardset import Parts, folder_of, image_bytes, key_of, make_shardset, overwrite, parts_of
from vitscale.data.manifest import Manifest, Member, format_idx, parse_manifest, read_idx
from vitscale.errors import DataError
from vitscale_shards.checking import inspect_shard
from vitscale_shards.checking.keys import find_repeated, hash_keys
from vitscale_shards.checking.reading import DigestingReader
from vitscale_shards.checking.verify import LEVELS, Level, SetFault, format_fault, verify_set
from vitscale_shards.place import LocalPlace

PLAN = "5ec0ded1" * 8
SIZES = [5, 4, 6]
TARS = [f"train-{n:06d}.tar" for n in range(4)]
DEEP: tuple[Level, ...] = ("headers", "pixels")


@pytest.fixture
def shardset(tmp_path: Path) -> Manifest:
    return make_shardset(tmp_path / "train", SIZES, sha256=True, plan=PLAN)


def faults_of(folder: Path, level: Level = "headers", **options: Any) -> list[SetFault]:
    return list(verify_set(LocalPlace(folder), level=level, **options))


def lines_of(folder: Path, level: Level = "headers", **options: Any) -> list[str]:
    return [f"{fault.kind}: {format_fault(fault)}" for fault in faults_of(folder, level, **options)]


def change_index(folder: Path, change: Callable[[Any], Any]) -> None:
    raw = json.loads((folder / "index.json").read_text())
    change(raw)
    (folder / "index.json").write_text(json.dumps(raw))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("multi_label", [False, True])
def test_a_sound_set_has_no_fault(tmp_path: Path, level: Level, multi_label: bool) -> None:
    def parts(number: int) -> Parts:
        return {"png": image_bytes(number), "json": json.dumps({"labels": [number % 3, 7][: number % 3]}).encode()}

    make_shardset(
        tmp_path, SIZES, parts=parts if multi_label else parts_of, multi_label=multi_label, sha256=True, plan=PLAN
    )
    (tmp_path / "plan.parquet").write_bytes(b"")
    (tmp_path / "failures.jsonl").write_bytes(b"")
    (tmp_path / ".lock").write_bytes(b"")
    assert lines_of(tmp_path, level, plan=PLAN, on_note=pytest.fail) == []


def test_several_processes_say_the_same(shardset: Manifest) -> None:
    overwrite(shardset, 7, "cls", b"x")
    overwrite(shardset, 12, "jpg", b"no image at all")
    reports: list[tuple[int, int]] = []
    faults = faults_of(folder_of(shardset), workers=2, on_progress=lambda done, total: reports.append((done, total)))
    assert faults == faults_of(folder_of(shardset))
    assert len(faults) == 4
    total = shardset.num_bytes
    ends = [shardset.shards[0].num_bytes, total - shardset.shards[2].num_bytes, total]
    assert reports == [(end, total) for end in ends]


def test_truncated_tar(shardset: Manifest) -> None:
    os.truncate(folder_of(shardset) / TARS[1], 5000)
    cut = (
        f"size: {TARS[1]} at byte 5000, sample sample_00007: truncated: 5000 of 10240 bytes; the cut is at "
        f"sample_00007.png, and 2 of 4 samples are not whole"
    )
    assert [lines_of(folder_of(shardset), level) for level in LEVELS] == [[cut]] * 4


def test_truncated_tar_without_what_was_in_it(shardset: Manifest) -> None:
    os.truncate(folder_of(shardset) / TARS[1], 5000)
    (folder_of(shardset) / "train-000001.idx").unlink()
    assert lines_of(folder_of(shardset), "sizes") == [
        f"size: {TARS[1]} at byte 5000: truncated: 5000 of 10240 bytes",
        "idx: train-000001.idx: missing",
    ]


def test_truncated_tar_without_index(shardset: Manifest) -> None:
    os.truncate(folder_of(shardset) / TARS[1], 5300)
    (folder_of(shardset) / "index.json").unlink()
    index, tar = faults_of(folder_of(shardset))
    assert (index.kind, index.file) == ("index", "index.json")
    assert (tar.kind, tar.file) == ("tar", TARS[1])
    assert tar.message == "sample_00007.png is truncated: 180 of 512 bytes; nothing behind it was looked at"


@pytest.mark.parametrize("level", LEVELS[1:])
def test_flipped_byte_in_an_image(shardset: Manifest, level: Level) -> None:
    """Only the checksum can see the second one: the image still decodes."""
    idx = read_idx(folder_of(shardset) / "train-000001.idx")
    (image,) = (member for member in idx[2] if member.extension == "png")
    flip(folder_of(shardset) / TARS[1], image.offset)
    padding = read_idx(folder_of(shardset) / "train-000002.idx")[0][1]
    flip(folder_of(shardset) / TARS[2], padding.offset + padding.size)
    faults = faults_of(folder_of(shardset), level)
    found = {(fault.kind, fault.file, fault.offset, fault.key) for fault in faults}
    checksums = {("checksum", TARS[1], None, None), ("checksum", TARS[2], None, None)}
    broken = {("sample", TARS[1], image.offset, key_of(7))} if level in DEEP else set()
    assert found == checksums | broken
    assert faults[-1].message.endswith("which bytes differ cannot be told from it")


@pytest.mark.parametrize("level", DEEP)
def test_flipped_byte_in_a_tar_header(shardset: Manifest, level: Level) -> None:
    label = read_idx(folder_of(shardset) / "train-000001.idx")[1][1]
    flip(folder_of(shardset) / TARS[1], label.offset - 512 + 7)
    checksum, tar = faults_of(folder_of(shardset), level)
    assert (checksum.kind, checksum.file) == ("checksum", TARS[1])
    assert (tar.kind, tar.file, tar.offset) == ("tar", TARS[1], label.offset - 512)
    assert tar.message.startswith("no tar header")


def test_an_image_that_only_decoding_finds_broken(shardset: Manifest) -> None:
    overwrite(shardset, 7, "png", b"\xff", at=120)
    assert [fault.kind for fault in faults_of(folder_of(shardset), "headers")] == ["checksum"]
    (image,) = (m for m in read_idx(folder_of(shardset) / "train-000001.idx")[2] if m.extension == "png")
    checksum, sample = faults_of(folder_of(shardset), "pixels")
    assert checksum.kind == "checksum"
    assert (sample.kind, sample.offset, sample.key) == ("sample", image.offset, key_of(7))


def test_missing_tar(shardset: Manifest) -> None:
    (folder_of(shardset) / TARS[1]).unlink()
    for level in LEVELS:
        assert lines_of(folder_of(shardset), level) == [f"missing: {TARS[1]}: missing; index.json lists it"]


def test_missing_idx(shardset: Manifest) -> None:
    (folder_of(shardset) / "train-000001.idx").unlink()
    for level in LEVELS:
        assert lines_of(folder_of(shardset), level) == ["idx: train-000001.idx: missing"]


@pytest.mark.parametrize("with_idx", [False, True])
def test_swapped_tars(shardset: Manifest, with_idx: bool) -> None:
    for suffix in (".tar", ".idx") if with_idx else (".tar",):
        swap(*((folder_of(shardset) / TARS[n]).with_suffix(suffix) for n in (0, 1)))
    first, second = faults_of(folder_of(shardset), "sizes")
    assert {(fault.kind, fault.file) for fault in (first, second)} == {("size", TARS[0]), ("size", TARS[1])}
    assert first.message == f"has 10240 bytes, as {TARS[1]} should; not its own size"
    for level in LEVELS[1:]:
        assert lines_of(folder_of(shardset), level) == [
            f"swapped: {TARS[0]}: holds the content of {TARS[1]}",
            f"swapped: {TARS[1]}: holds the content of {TARS[0]}",
        ]


def test_a_size_that_several_tars_have_is_no_hint(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path, [4, 4, 9], sha256=True, plan=PLAN)
    (tmp_path / TARS[2]).write_bytes((tmp_path / TARS[0]).read_bytes())
    assert len({shard.num_bytes for shard in manifest.shards[:2]}) == 1
    (fault,) = faults_of(tmp_path, "sizes")
    assert (fault.kind, fault.file, fault.offset) == ("size", TARS[2], manifest.shards[0].num_bytes)
    assert fault.message.startswith("truncated: ")


def test_a_tar_copied_over_another(shardset: Manifest) -> None:
    shutil.copy(folder_of(shardset) / TARS[0], folder_of(shardset) / TARS[2])
    assert lines_of(folder_of(shardset)) == [f"swapped: {TARS[2]}: holds the content of {TARS[0]}"]


def test_foreign_files(shardset: Manifest) -> None:
    for name in ("notes.txt", "other-000000.tar", "train-000000.json", "stray.idx"):
        (folder_of(shardset) / name).write_text("something")
    (folder_of(shardset) / "pictures").mkdir()
    (folder_of(shardset) / ".DS_Store").write_text("hidden")
    shutil.copy(folder_of(shardset) / TARS[0], folder_of(shardset) / TARS[3])
    found = {(fault.kind, fault.file) for fault in faults_of(folder_of(shardset))}
    names = (TARS[3], "notes.txt", "other-000000.tar", "train-000000.json", "stray.idx", "pictures")
    assert found == {("foreign", name) for name in names}


def test_a_set_that_was_only_indexed_may_lie_among_other_files(tmp_path: Path) -> None:
    make_shardset(tmp_path, SIZES, sha256=True)
    (tmp_path / "notes.txt").write_text("something")
    (tmp_path / "pictures").mkdir()
    assert lines_of(tmp_path) == []


def test_what_writers_left(shardset: Manifest) -> None:
    (folder_of(shardset) / f".{TARS[0]}.node-77.tmp").write_bytes(b"half")
    (folder_of(shardset) / ".progress").mkdir()
    found = {(fault.kind, fault.file) for fault in faults_of(folder_of(shardset))}
    assert found == {("leftover", f".{TARS[0]}.node-77.tmp"), ("leftover", ".progress")}


def test_index_of_an_older_writing(shardset: Manifest) -> None:
    """All sizes have changed and there is one tar more; one line says it, and the tars are judged by themselves."""
    old = (folder_of(shardset) / "index.json").read_text()
    make_shardset(folder_of(shardset), [9, 8, 12, 2], sha256=True, plan=PLAN)
    (folder_of(shardset) / "index.json").write_text(old)
    stale = (
        f"index: index.json: stale: 3 of 3 tars have another size than it says, though they fit their own .idx "
        f"({TARS[0]}: 30720 bytes, not 20480); tars that it does not list lie here: 1 ({TARS[3]})"
    )
    for level in LEVELS:
        assert lines_of(folder_of(shardset), level) == [stale]
    overwrite(parse_manifest(old, shardset.location), 1, "cls", b"x")
    assert [(fault.kind, fault.file) for fault in faults_of(folder_of(shardset))] == [
        ("index", "index.json"),
        ("sample", TARS[0]),
    ]


def test_index_without_the_last_tar(shardset: Manifest) -> None:
    def forget(raw: Any) -> None:
        del raw["shardlist"][2]
        raw["vitscale"]["num_samples"] = 9

    change_index(folder_of(shardset), forget)
    os.truncate(folder_of(shardset) / TARS[0], 9000)
    stale, size = lines_of(folder_of(shardset))
    assert stale == f"index: index.json: stale: tars that it does not list lie here: 1 ({TARS[2]})"
    assert size.startswith(f"size: {TARS[0]} at byte 9000")


def test_index_of_tars_that_are_all_gone(shardset: Manifest) -> None:
    for path in [*folder_of(shardset).glob("*.tar"), *folder_of(shardset).glob("*.idx")]:
        path.rename(path.with_name(path.name.replace("train", "val")))
    (line,) = lines_of(folder_of(shardset))
    assert line == (
        "index: index.json: stale: tars that it does not list lie here: 3 (val-000000.tar to val-000002.tar); none of "
        "the 3 that it lists lies here"
    )


def test_index_of_another_plan(shardset: Manifest) -> None:
    for level in LEVELS:
        assert lines_of(folder_of(shardset), level, plan="0123456789abcdef") == [
            "index: index.json: stale: of plan 5ec0ded15ec0, while the folder's plan.parquet is plan 0123456789ab"
        ]


def test_tars_of_another_writing_with_the_same_sizes(shardset: Manifest) -> None:
    """Nothing but the checksums differs, so either side may be wrong; a note says so."""
    old = (folder_of(shardset) / "index.json").read_text()
    make_shardset(folder_of(shardset), SIZES, parts=lambda n: parts_of(n + 30), sha256=True, plan=PLAN)
    (folder_of(shardset) / "index.json").write_text(old)
    notes: list[str] = []
    assert {fault.kind for fault in faults_of(folder_of(shardset), on_note=notes.append)} == {"checksum"}
    assert notes == ["3 of 3 tars have other checksums than index.json says: it may be stale itself"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("shardlist"), "not a shard index (KeyError('shardlist')); write the shard set again"),
        (
            lambda raw: raw["vitscale"].update(num_samples=16),
            "says 16 samples in all, but its shards have 15; both must agree: write the shard set again",
        ),
        (
            lambda raw: raw["shardlist"].append(raw["shardlist"][0]),
            f"lists {TARS[0]} twice; every tar stands there once: write the shard set again",
        ),
        (
            lambda raw: raw["vitscale"].update(format_version=9),
            "format version 9; this vitscale reads version 1: use the vitscale that wrote it, or write the shard set "
            "again",
        ),
    ],
)
def test_index_that_says_nothing(shardset: Manifest, change: Callable[[Any], Any], message: str) -> None:
    """The tars are looked at all the same."""
    change_index(folder_of(shardset), change)
    overwrite(shardset, 7, "cls", b"x")
    index, sample = faults_of(folder_of(shardset))
    assert (index.kind, index.file, index.message) == ("index", "index.json", message)
    assert (sample.kind, sample.file, sample.key) == ("sample", TARS[1], key_of(7))


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[" * 100_000])
def test_index_missing_or_unreadable(shardset: Manifest, content: bytes | None) -> None:
    path = folder_of(shardset) / "index.json"
    path.unlink() if content is None else path.write_bytes(content)
    for level in LEVELS:
        assert [(fault.kind, fault.file) for fault in faults_of(folder_of(shardset), level)] == [
            ("index", "index.json")
        ]


def test_index_with_wrong_numbers_of_a_sound_tar(shardset: Manifest) -> None:
    def change(raw: Any) -> None:
        raw["shardlist"][1].update(nsamples=5, filesize=11111)
        raw["vitscale"].update(num_samples=16)

    change_index(folder_of(shardset), change)
    assert lines_of(folder_of(shardset), "checksums") == [
        f"index: index.json: says 11111 bytes of {TARS[1]}, which has 10240 and the right checksum"
    ]
    change_index(folder_of(shardset), lambda raw: raw["shardlist"][1].update(filesize=10240))
    assert lines_of(folder_of(shardset), "sizes") == [
        "idx: train-000001.idx at byte 0: lists 4 samples where index.json says 5"
    ]
    assert lines_of(folder_of(shardset)) == [f"index: index.json: says 5 samples of {TARS[1]}, which has 4"]


def write_idx(folder: Path, change: Callable[[list[list[Member]]], Any]) -> None:
    path = folder / "train-000001.idx"
    samples = [list(members) for members in read_idx(path)]
    change(samples)
    path.write_text(format_idx(samples))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda samples: samples.reverse(), "line 2 is 'png "),
        (lambda samples: samples[2].reverse(), "line 4 is 'cls "),
        (lambda samples: samples.pop(), "line 1 is b'v1.2 3\\n' where the tar has 'v1.2 4'"),
        (lambda samples: samples.__setitem__(3, samples[2]), "line 5 is 'png "),
    ],
)
def test_idx_that_does_not_fit(shardset: Manifest, change: Callable[[list[list[Member]]], Any], message: str) -> None:
    write_idx(folder_of(shardset), change)
    (fault,) = faults_of(folder_of(shardset))
    assert (fault.kind, fault.file) == ("idx", "train-000001.idx")
    lines = (folder_of(shardset) / "train-000001.idx").read_bytes().splitlines(keepends=True)
    number = int(fault.message.split()[1])
    assert fault.offset == sum(map(len, lines[: number - 1]))
    assert fault.message.startswith(message)
    assert " where the tar has " in fault.message


@pytest.mark.parametrize(
    "content", [b"", b"v1.2 4", b"v1.2 4\n", b"v1.1 4\npng 512 700 a.png\n", b"v1.2 4\nx\n", b"v1.2 4\npng 512 700 a.p"]
)
@pytest.mark.parametrize("level", LEVELS)
def test_damaged_idx(shardset: Manifest, content: bytes, level: Level) -> None:
    (folder_of(shardset) / "train-000001.idx").write_bytes(content)
    (fault,) = faults_of(folder_of(shardset), level)
    assert (fault.kind, fault.file) == ("idx", "train-000001.idx")
    assert "format v1.2" in fault.message


@pytest.mark.parametrize("level", LEVELS)
def test_idx_cut_within_its_last_line(shardset: Manifest, level: Level) -> None:
    path = folder_of(shardset) / "train-000001.idx"
    path.write_bytes(path.read_bytes()[:-3])
    assert [(fault.kind, fault.file) for fault in faults_of(folder_of(shardset), level)] == [("idx", path.name)]


def test_idx_of_a_larger_tar(shardset: Manifest) -> None:
    def grow(samples: list[list[Member]]) -> None:
        last = samples[-1][-1]
        samples[-1][-1] = Member(last.extension, last.offset, 20_000, last.name)

    write_idx(folder_of(shardset), grow)
    (fault,) = faults_of(folder_of(shardset), "sizes")
    assert (fault.kind, fault.file) == ("idx", "train-000001.idx")
    assert fault.message.startswith("its last member ends at byte 2")
    assert fault.message.endswith(f", but {TARS[1]} has 10240 bytes")


def test_idx_with_an_extra_line(shardset: Manifest) -> None:
    path = folder_of(shardset) / "train-000001.idx"
    path.write_text(path.read_text() + "png 512 1 extra.png\n")
    assert [fault.kind for fault in faults_of(folder_of(shardset))] == ["idx"]


def spoil(number: int, **parts: bytes | None) -> Callable[[int], Parts]:
    """Members of a sample replaced, or taken away."""

    def of(n: int) -> Parts:
        usual: dict[str, bytes | None] = {"png": image_bytes(n), "cls": b"3"}
        return {ext: data for ext, data in (usual | parts if n == number else usual).items() if data is not None}

    return of


@pytest.mark.parametrize(
    ("parts", "at", "message"),
    [
        (spoil(7, cls=b"ten"), "cls", "sample_00007.cls: unreadable label: ValueError("),
        (spoil(7, cls=b"-1"), "cls", "sample_00007.cls: negative label among [-1]"),
        (spoil(7, cls=b"10"), "cls", "label 10; the index names 10 classes, so at most 9 is allowed"),
        (spoil(7, cls=None), "png", "no label among the members sample_00007.png; a cls or json member is needed"),
        (
            spoil(7, cls=None, json=b'{"labels": [3]}'),
            "json",
            "the label is in sample_00007.json; the index says that this set has cls labels",
        ),
        (spoil(7, png=None), "cls", "no image among the members sample_00007.cls"),
        (spoil(7, jpg=b""), "jpg", "2 images among the members "),
        (spoil(7, txt=b"a cat"), "txt", "sample_00007.txt is neither the image nor the label"),
        (spoil(7, png=b""), "png", "sample_00007.png: no known image header in 0 bytes"),
        (spoil(7, png=image_bytes(7, kind="jpg")), "png", "sample_00007.png is of the kind jpg by its content"),
        (spoil(7, PNG=b"", png=None), "PNG", "sample_00007.PNG: no known image header in 0 bytes"),
    ],
)
def test_wrong_samples(tmp_path: Path, parts: Callable[[int], Parts], at: str, message: str) -> None:
    make_shardset(tmp_path, SIZES, parts=parts, sha256=True, plan=PLAN)
    (member,) = (m for m in read_idx(tmp_path / "train-000001.idx")[2] if m.extension == at)
    (fault,) = faults_of(tmp_path)
    assert (fault.kind, fault.file, fault.offset, fault.key) == ("sample", TARS[1], member.offset, key_of(7))
    assert fault.message.startswith(message)


@pytest.mark.parametrize("key", ["a b", "klass/name", "ünï", "x" * 91, "a*"])
def test_keys_of_our_own_sets(tmp_path: Path, key: str) -> None:
    def name(number: int) -> str:
        return key if number == 7 else key_of(number)

    make_shardset(tmp_path / "ours", SIZES, key=name, sha256=True, plan=PLAN)
    (fault,) = faults_of(tmp_path / "ours")
    assert (fault.kind, fault.key) == ("sample", key)
    assert fault.message == f"the key has {len(key)} characters; 1 to 90 of A-Z a-z 0-9 _ - are allowed"
    make_shardset(tmp_path / "foreign", SIZES, key=name, sha256=True)
    assert faults_of(tmp_path / "foreign") == []


def test_a_key_in_two_tars(tmp_path: Path) -> None:
    def name(number: int) -> str:
        return key_of({11: 2, 13: 2, 6: 0}.get(number, number))

    make_shardset(tmp_path / "ours", SIZES, key=name, sha256=True, plan=PLAN)
    idx = read_idx(tmp_path / "ours" / "train-000002.idx")
    other = read_idx(tmp_path / "ours" / "train-000001.idx")[1][0]
    reason = "has a sample of this key, too; keys are unique in a set"
    assert lines_of(tmp_path / "ours")[1:] == [
        f"sample: {TARS[1]} at byte {other.offset}, sample {key_of(0)}: {TARS[0]} {reason}",
        f"sample: {TARS[2]} at byte {idx[2][0].offset}, sample {key_of(2)}: {TARS[0]} {reason}",
    ]
    notes: list[str] = []
    make_shardset(tmp_path / "foreign", SIZES, key=lambda n: key_of(n % 6), sha256=True)
    assert faults_of(tmp_path / "foreign", on_note=notes.append) == []
    assert notes == ["about 6 keys occur more than once in the set; training does not mind"]


def test_a_key_twice_in_a_tar(tmp_path: Path) -> None:
    """Its members are not neighbours, be it one sample torn apart or two of one name."""
    make_shardset(tmp_path, SIZES, key=lambda n: key_of(5 if n == 8 else n), sha256=True, plan=PLAN)
    again = read_idx(tmp_path / "train-000001.idx")[3][0]
    (fault,) = faults_of(tmp_path)
    assert (fault.kind, fault.file, fault.offset, fault.key) == ("sample", TARS[1], again.offset, key_of(5))
    assert fault.message == ("the key stands for an earlier sample of this tar already; its members must be neighbours")


def test_members_that_are_not_neighbours(tmp_path: Path) -> None:
    members = [(f"{key}.{extension}", data) for extension, data in parts_of(7).items() for key in ("a", "b")]
    write_tar(tmp_path / TARS[0], members)
    faults = [(fault.kind, fault.key, fault.message.split(" among ")[0]) for fault in faults_of(tmp_path)]
    again = "the key stands for an earlier sample of this tar already; its members must be neighbours"
    assert faults[1:] == [
        ("idx", None, "missing"),
        ("sample", "a", "no label"),
        ("sample", "b", "no label"),
        ("sample", "a", again),
        ("sample", "a", "no image"),
        ("sample", "b", again),
        ("sample", "b", "no image"),
    ]


def write_tar(path: Path, members: list[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_member_twice(tmp_path: Path) -> None:
    write_tar(tmp_path / TARS[0], [("a.cls", b"1"), ("a.jpg", b""), ("a.cls", b"1")])
    fault = faults_of(tmp_path)[-1]
    assert (fault.kind, fault.offset, fault.message) == ("sample", 2048, "the sample has two members a.cls")


def test_a_member_of_a_negative_size(tmp_path: Path) -> None:
    """Reading -1 bytes would mean: all of the file."""
    write_tar(tmp_path / TARS[0], [("a.cls", b"1"), ("a.jpg", b""), ("b.cls", b"1"), ("b.jpg", image_bytes(1))])
    content = bytearray((tmp_path / TARS[0]).read_bytes())
    content[1024 + 124 : 1024 + 136] = b"-0000000001\0"
    content[1024 + 148 : 1024 + 156] = b"%06o\0 " % (sum(content[1024 : 1024 + 148]) + 256 + sum(content[1180:1536]))
    (tmp_path / TARS[0]).write_bytes(content)
    fault = next(fault for fault in faults_of(tmp_path) if fault.file == TARS[0])
    assert fault.kind in ("sample", "tar")
    assert "a.jpg has -1 bytes" in fault.message or "no tar header" in fault.message


def test_very_many_faults_of_one_tar_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_shard, "MAX_FAULTS", 20)
    make_shardset(tmp_path, [3, 40], parts=lambda n: {"cls": b"1"} if n > 5 else parts_of(n), sha256=True, plan=PLAN)
    faults = faults_of(tmp_path)
    assert len(faults) == 21
    assert format_fault(faults[-1]) == f"{TARS[1]}: 17 more faults in this tar"


def test_a_tar_that_cannot_be_read(tmp_path: Path) -> None:
    what = inspect_shard.Inspection("none.tar", True, True, False, False, inspect_shard.Rules())
    findings = inspect_shard.inspect_shard(LocalPlace(tmp_path), what)
    assert findings.faults == [SetFault("tar", "none.tar", 0, None, "cannot be read: No such file or directory")]


def test_checksums_that_the_index_does_not_have(tmp_path: Path) -> None:
    make_shardset(tmp_path, SIZES)
    overwrite(parse_manifest((tmp_path / "index.json").read_text(), str(tmp_path)), 7, "png", b"\xff", at=120)
    notes: list[str] = []
    assert faults_of(tmp_path, "headers", on_note=notes.append) == []
    assert notes == ["index.json has no sha256 of 3 of 3 tars: their checksums were not compared"]
    assert len(faults_of(tmp_path, "pixels")) == 1


def test_no_set(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        faults_of(tmp_path / "nowhere")
    assert str(caught.value) == (
        f"{tmp_path}/nowhere: no such shard set; a folder with index.json and *.tar files is needed"
    )


def test_tars_that_lie_elsewhere(shardset: Manifest) -> None:
    change_index(folder_of(shardset), lambda raw: raw["vitscale"].update(base_url="s3://bucket/set"))
    with pytest.raises(DataError) as caught:
        faults_of(folder_of(shardset))
    assert str(caught.value) == (
        f"{folder_of(shardset)}: its tars lie in s3://bucket/set, but only tars beside the index are read: copy or "
        f"link them into {folder_of(shardset)}"
    )


def test_names_from_a_tar_cannot_disturb_the_terminal(tmp_path: Path) -> None:
    write_tar(tmp_path / TARS[0], [("a\x1b[31m\nb.jpg", b"x")])
    assert format_fault(faults_of(tmp_path)[-1]) == (
        f"{TARS[0]} at byte 512, sample a\\x1b[31m\\nb: no label among the members a\\x1b[31m\\nb.jpg; a cls or json "
        f"member is needed"
    )


@given(st.lists(st.lists(st.integers(0, 40).map(lambda n: (n * 0x9E3779B97F4A7C15) % 2**64))), st.integers(0, 9))
def test_repeated_hashes_against_a_table(shards: list[list[int]], limit: int) -> None:
    table = defaultdict(list)
    for shard, hashes in enumerate(shards):
        for sample, value in enumerate(hashes):
            table[value].append((shard, sample))
    repeated = sorted(value for value, places in table.items() if len(places) > 1)
    groups, count = find_repeated([np.array(hashes, np.uint64) for hashes in shards], limit=limit)
    assert count == len(repeated)
    assert groups == sorted(table[value] for value in repeated[:limit])


def test_hashes_of_keys() -> None:
    keys = ["", "a", "b", "ünï", "\udcff"]
    hashes = hash_keys(keys)
    assert hashes.dtype == np.uint64
    assert len(set(hashes.tolist())) == len(keys)
    assert hash_keys(keys[3:4]) == hashes[3]


class Counting(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


@settings(max_examples=30)
@given(st.integers(0, 2**22), st.lists(st.tuples(st.integers(0, 2**22), st.integers(0, 2**17)), max_size=9))
def test_digest_of_a_file_that_is_read_with_jumps(size: int, reads: list[tuple[int, int]]) -> None:
    content = random.Random(size).randbytes(size)
    reader = DigestingReader(Counting(content))
    for offset, length in reads:
        reader.seek(offset)
        assert reader.read(length) == content[offset : offset + length]
    assert reader.sha256() == hashlib.sha256(content).hexdigest()
    assert reader.num_digested == size


def test_a_tar_is_read_once() -> None:
    content = random.Random(1).randbytes(5_000_000)
    file = Counting(content)
    reader = DigestingReader(file)
    reader.seek(0, os.SEEK_END)
    for offset in range(0, len(content), 70_000):
        reader.seek(offset)
        reader.read(512)
        reader.seek(offset)  # tarfile looks twice
        reader.read(60_000)
    reader.sha256()
    assert file.count <= 1.01 * len(content)
