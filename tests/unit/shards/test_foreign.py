"""Foreign WebDataset tars become a set that reads as ``webdataset`` reads them; their bytes stay as they are."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import webdataset
import wids
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.s3 import S3Server
from tests.helpers.shardset import folder_of, image_bytes, make_shardset, parts_of
from vitscale.data.manifest import Manifest, read_manifest
from vitscale.data.order import SequentialOrder, WindowId
from vitscale.data.shard_set import check_files, open_source
from vitscale.data.stream import IMAGE_EXTENSIONS, RawSample, ShardStream
from vitscale.errors import DataError
from vitscale_shards.checking.verify import format_fault, verify_set
from vitscale_shards.indexing import index_tar
from vitscale_shards.indexing.foreign import IndexedSet, index_set
from vitscale_shards.place import LocalPlace
from vitscale_shards.remote import open_place

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Members = Sequence[tuple[str, bytes]]
CURE = (
    'a sample needs one image and its label, KEY.cls with a whole number or KEY.json with {"labels": [...]}; '
    "'vitscale shards write' reads other tars, too, and writes them anew"
)


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members_of(first: int, count: int, prefix: str = "") -> Members:
    return [(f"{prefix}{n:05d}.{ext}", data) for n in range(first, first + count) for ext, data in parts_of(n).items()]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A folder with two tars."""
    for number in range(2):
        write_tar(tmp_path / "set" / f"part-{number}.tar", members_of(10 * number, 4 + number))
    return tmp_path / "set"


def refusal(url: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        index_set(str(url), **options)
    return str(caught.value)


def read_all(manifest: Manifest) -> list[RawSample]:
    """As training reads it."""
    stream = ShardStream(
        [open_source(manifest)], SequentialOrder([shard.num_samples for shard in manifest.shards], window=3)
    )
    windows = range(-(-manifest.num_samples // 3))
    samples = [sample for number in windows for sample in stream.read_window(WindowId(0, 0, number))]
    assert all(isinstance(sample, RawSample) for sample in samples)
    return samples  # type: ignore[return-value]


def as_webdataset(manifest: Manifest) -> list[tuple[str, bytes, tuple[int, ...]]]:
    """Key, image and labels of every sample, as the ``webdataset`` package reads them."""
    urls = [str(folder_of(manifest) / shard.name) for shard in manifest.shards]
    found = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        image = next(sample[ext] for ext in sample if ext in IMAGE_EXTENSIONS)
        labels = (int(sample["cls"]),) if "cls" in sample else tuple(json.loads(sample["json"])["labels"])
        found.append((sample["__key__"], image, labels))
    return found


def as_wds2idx(path: Path) -> str:
    """The index that NVIDIA DALI's ``wds2idx`` documents for a tar, format v1.2.

    The first line is "v1.2" and the number of samples. Then there is a line per sample, with four words per component:
    extension, offset of the first byte of the content in the archive, size in bytes, full name. A name is split at the
    first dot of its last part; neighbouring files with the same front part are a sample; only regular files count, and
    of these none whose last part begins with a dot.
    """
    components = []
    with tarfile.open(path) as tar:
        for info in tar:
            dot = info.name.find(".", info.name.rfind("/") + 1)
            front = info.name[:dot]
            if info.isreg() and front and not front.endswith("/"):
                words = f"{info.name[dot + 1 :]} {info.offset_data} {info.size} {info.name}"
                components.append((front, words))
    lines = [" ".join(words for _, words in run) for _, run in groupby(components, key=lambda component: component[0])]
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


LONG = "a_long_folder_name/" * 6
SPECIAL: Members = [
    ("photos/", b""),
    (".hidden.jpg", b"not an image"),
    *members_of(0, 3, "photos/"),
    *members_of(3, 3, LONG),
    *members_of(6, 2, "./dotted/"),
    ("ünï.jpg", image_bytes(20, kind="jpg")),
    ("ünï.cls", b"7"),
    ("upper.JPG", image_bytes(21, kind="jpg")),
    ("upper.cls", b" 3\n"),
    ("more.cls", b"4"),
    ("more.json", b'{"caption": "a cat", "width": 12}'),
    ("more.seg.png", image_bytes(22)),
    ("more.txt", b"a cat"),
    ("more.webp", image_bytes(23)),
    *members_of(8, 2, LONG + "photos/"),
]


@pytest.mark.parametrize("format", ["gnu", "pax"])
@pytest.mark.parametrize("checksums", [True, False])
def test_the_loader_reads_what_webdataset_reads(tmp_path: Path, format: str, checksums: bool) -> None:
    write_tar(tmp_path / "a.tar", SPECIAL, FORMATS[format])
    write_tar(tmp_path / "b.tar", members_of(30, 5), FORMATS[format])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = index_set(str(tmp_path), checksums=checksums)
    assert result.notes == ()
    manifest = read_manifest(tmp_path)
    assert manifest == result.manifest
    assert [shard.num_samples for shard in manifest.shards] == [13, 5]
    check_files(manifest)
    samples = [(sample.key, sample.image, sample.labels) for sample in read_all(manifest)]
    assert samples == as_webdataset(manifest)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert {path.name for path in tmp_path.iterdir()} == {*before, "a.idx", "b.idx", "index.json"}
    for shard in manifest.shards:
        right = hashlib.sha256(before[shard.name]).hexdigest()
        assert shard.sha256 == (right if checksums else None)
        assert (tmp_path / shard.idx_name).read_text() == as_wds2idx(tmp_path / shard.name)
    assert [format_fault(fault) for fault in verify_set(LocalPlace(tmp_path))] == []


def test_wids_reads_the_same(tars: Path) -> None:
    index_set(str(tars))
    dataset = wids.ShardListDataset(str(tars / "index.json"), cache_dir=str(tars / "cache"), transformations=[])
    samples = read_all(read_manifest(tars))
    assert len(dataset) == len(samples) == 9
    for ours, theirs in zip(samples, (dataset[n] for n in range(9)), strict=True):
        assert theirs["__key__"] == ours.key
        assert int(theirs[".cls"].read()) == ours.labels[0]
        assert next(theirs[f".{ext}"].read() for ext in ("jpg", "png") if f".{ext}" in theirs) == ours.image


@pytest.mark.parametrize("format", sorted(FORMATS))
@settings(max_examples=10, deadline=None)
@given(
    keys=st.lists(
        st.from_regex(r"([a-z]{1,40}/){0,4}[a-zA-Z0-9_-]{1,60}", fullmatch=True), min_size=1, max_size=6, unique=True
    ),
    sizes=st.lists(st.integers(0, 2000), min_size=6, max_size=6),
    extension=st.sampled_from(["jpg", "PNG", "webp", "jpeg"]),
    extra=st.sampled_from([None, "txt", "seg.png", "metadata.json"]),
)
def test_idx_against_wds2idx(
    tmp_path_factory: pytest.TempPathFactory,
    format: str,
    keys: list[str],
    sizes: list[int],
    extension: str,
    extra: str | None,
) -> None:
    folder = tmp_path_factory.mktemp("set")
    extensions = [extension, "cls", *([] if extra is None else [extra])]
    content = {extension: b"x", "cls": b"1", extra: b"text"}
    members = [
        (f"{key}.{ext}", content[ext] * (size if ext == extension else 1))
        for key, size in zip(keys, sizes, strict=False)
        for ext in extensions
    ]
    if format == "ustar":  # a name of more than 100 bytes is cut at a slash
        members = [(name, data) for name, data in members if len(name) <= 100]
        if not members:
            return
        members += [("last.jpg", b""), ("last.cls", b"0")]
    write_tar(folder / "a.tar", members, FORMATS[format])
    index_set(str(folder))
    assert (folder / "a.idx").read_bytes() == as_wds2idx(folder / "a.tar").encode()


def test_idx_of_our_own_sets_against_wds2idx(tmp_path: Path) -> None:
    for shard in make_shardset(tmp_path, [5, 4]).shards:
        assert (tmp_path / shard.idx_name).read_text() == as_wds2idx(tmp_path / shard.name)


def labelled(*labels: object) -> Members:
    return [
        member
        for n, label in enumerate(labels)
        for member in ((f"{n:03d}.png", image_bytes(n)), (f"{n:03d}.json", json.dumps({"labels": label}).encode()))
    ]


def test_many_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", labelled([1, 2], [], [7]))
    result = index_set(str(tmp_path), classes=[f"class {n}" for n in range(8)])
    assert result.manifest.multi_label
    assert result.manifest.classes == tuple(f"class {n}" for n in range(8))
    assert [sample.labels for sample in read_all(read_manifest(tmp_path))] == [(1, 2), (), (7,)]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{folder}", ["part-0.tar", "part-1.tar"]),
        ("{folder}/", ["part-0.tar", "part-1.tar"]),
        ("{folder}/*.tar", ["part-0.tar", "part-1.tar"]),
        ("{folder}/part-?.tar", ["part-0.tar", "part-1.tar"]),
        ("{folder}/part-[1].tar", ["part-1.tar"]),
        ("{folder}/part-{{0..1}}.tar", ["part-0.tar", "part-1.tar"]),
        ("{folder}/part-{{1,0}}.tar", ["part-1.tar", "part-0.tar"]),
        ("{folder}/part-1.tar", ["part-1.tar"]),
        ("file://{folder}/part-{{0..1}}.tar", ["part-0.tar", "part-1.tar"]),
    ],
)
def test_which_tars(tars: Path, pattern: str, names: list[str]) -> None:
    manifest = index_set(pattern.format(folder=tars)).manifest
    assert [shard.name for shard in manifest.shards] == names
    assert (manifest.split, manifest.source, manifest.base_url) == ("set", "set", None)
    assert folder_of(manifest) == tars


def test_hidden_files_and_others_are_passed_over(tars: Path) -> None:
    for name in (".part-9.tar", ".part-0.tar.node-7.tmp", "part-0.tar.txt"):
        (tars / name).write_bytes(b"no tar")
    assert len(index_set(str(tars)).manifest.shards) == 2


def test_folders_of_notes_are_passed_over_as_webdataset_does(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("__meta__/about.json", b"{}"), *members_of(0, 2)])
    manifest = index_set(str(tmp_path)).manifest
    assert manifest.num_samples == 2
    samples = [(sample.key, sample.image, sample.labels) for sample in read_all(manifest)]
    assert samples == as_webdataset(manifest)


def test_relative_names(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tars)
    assert len(index_set("part-{0..1}.tar").manifest.shards) == 2
    assert index_set(".", overwrite=True).manifest.split == "set"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "{folder}/nowhere",
            "no tar was found (no file at all); give a folder of *.tar files, or a pattern such as "
            "{folder}/nowhere/train-{{000..099}}.tar, which needs no listing",
        ),
        (
            "{folder}/train-*.tar",
            "no tar was found (2 other files); give a folder of *.tar files, or a pattern such as "
            "{folder}/train-{{000..099}}.tar, which needs no listing",
        ),
        ("{folder}/{{a,b}}/0.tar", "lies in several folders ({folder}/a, {folder}/b); a shard set is one folder: "),
        ("{folder}/*/0.tar", "has a wildcard in the name of a folder; a shard set is one folder: name it"),
        ("{folder}/{{0..9999999}}.tar", "stands for more than 1000000 tars; name fewer"),
        ("{folder}/part-{{0..1.tar", "Unbalanced braces"),
        ("{folder}/part-{{0,0}}.tar", "names part-0.tar twice; name every tar once"),
        ("{folder}/{{a,b}}.zip", "'a.zip' is not named like a tar; name tars NAME.tar, or give their folder"),
        ("pipe:cat {folder}/part-0.tar", "no shard set can lie there; give a folder, s3://BUCKET/PREFIX or "),
        ("ftp://host/set", "no shard set can lie there; give a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"),
    ],
)
def test_no_tars(tars: Path, pattern: str, message: str) -> None:
    url = pattern.format(folder=tars)
    refused = refusal(url)
    assert message.format(folder=tars) in refused
    assert sorted(path.name for path in tars.iterdir()) == ["part-0.tar", "part-1.tar"]


def test_a_tar_that_is_not_there(tars: Path) -> None:
    assert refusal(f"{tars}/part-{{0..2}}.tar") == (
        f"{tars}/part-2.tar: no such file, or no answer; name only tars that are there"
    )
    assert not (tars / "index.json").exists()


@pytest.mark.parametrize("name", ["c.tar.gz", "c.tgz", "c.tar"])
def test_compressed_tars(tars: Path, name: str) -> None:
    (tars / name).write_bytes(gzip.compress((tars / "part-0.tar").read_bytes()))
    message = refusal(tars)
    assert name in message
    assert " is compressed" in message
    assert "unpack it" in message


def png(name: str) -> tuple[str, bytes]:
    return name, image_bytes(0)


GOOD: Members = [png("good.png"), ("good.cls", b"1")]


@pytest.mark.parametrize(
    ("members", "key", "at", "reason"),
    [
        ([png("a.png")], "a", "a.png", "no label among the members a.png; a cls or json member is needed"),
        (
            [png("a.png"), ("a.txt", b"3")],
            "a",
            "a.png",
            "no label among the members a.png, a.txt; a cls or json member",
        ),
        ([("a.cls", b"3")], "a", "a.cls", "no image among the members a.cls"),
        ([png("a.png"), png("a.jpg"), ("a.cls", b"3")], "a", "a.jpg", "2 images among the members "),
        ([png("a.png"), ("a.cls", b"cat")], "a", "a.cls", "a.cls: unreadable label: ValueError("),
        ([png("a.png"), ("a.cls", b"-3")], "a", "a.cls", "a.cls: negative label among [-3]"),
        ([png("a.png"), ("a.json", b'{"caption": 3}')], "a", "a.json", "a.json: unreadable label: KeyError('labels')"),
        ([png("a.png"), ("a.json", b"{")], "a", "a.json", "a.json: unreadable label: JSONDecodeError("),
        ([png("a.png"), ("a.json", b'{"labels": ["cat"]}')], "a", "a.json", "a.json: unreadable label: ValueError("),
        (
            [png("a.png"), ("b.cls", b"1"), ("a.cls", b"1")],
            "a",
            "a.png",
            "no label among the members a.png; a cls or json",
        ),
        (
            [png("a.png"), ("a.cls", b"1"), png("b.png"), ("b.cls", b"1"), png("a.jpg")],
            "a",
            "a.jpg",
            "the key stands for an earlier sample, or its members are torn apart",
        ),
        ([png("a.png"), ("a.cls", b"1"), ("a.cls", b"1")], "a", None, "the sample has two members a.cls"),
        ([png("a b.png"), ("a b.cls", b"1")], "a b", "a b.png", "'a b.png' has a character that an .idx cannot hold"),
        ([png("a."), ("a.cls", b"1")], "a", "a.", "'a.' has a character that an .idx cannot hold"),
        ([png("a\n.png")], r"a\n", "a\n.png", "'a\\n.png' has a character that an .idx cannot hold"),
        (
            [*labelled([1]), png("b.png"), ("b.cls", b"1")],
            "b",
            "b.cls",
            "the label is in b.cls, others are not",
        ),
    ],
)
def test_samples_that_cannot_be_used(tmp_path: Path, members: Members, key: str, at: str | None, reason: str) -> None:
    write_tar(tmp_path / "a.tar", GOOD)
    write_tar(tmp_path / "b.tar", members)
    with tarfile.open(tmp_path / "b.tar") as tar:
        offset = tar.getmembers()[-1].offset_data if at is None else tar.getmember(at).offset_data
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}/b.tar: sample {key} at byte {offset}: {reason}")
    assert message.endswith(f"; {CURE}")
    assert "\n" not in message
    assert not (tmp_path / "index.json").exists()


def test_a_label_beyond_the_classes(tars: Path) -> None:
    with tarfile.open(tars / "part-0.tar") as tar:
        offset = tar.getmember("00003.cls").offset_data
    assert refusal(tars, classes=["zero", "one", "two"]) == (
        f"{tars}/part-0.tar: sample 00003 at byte {offset}: label 3; 3 classes were named, so that 0 to 2 are allowed: "
        f"name all classes (and 1 more tars of the first 2 have faults)"
    )
    assert refusal(tars, classes=["a", "b", "a"]) == "classes: 'a' stands twice; a class has one label: name it once"
    assert index_set(str(tars), classes=list("abcde")).manifest.classes == tuple("abcde")


def test_two_kinds_of_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", GOOD)
    write_tar(tmp_path / "b.tar", labelled([1]))
    assert refusal(tmp_path) == (
        f"{tmp_path}: labels are in cls members in a.tar (sample good), but in json members in b.tar (sample 000); a "
        f"set has one kind: index them apart, in two folders"
    )


def test_a_damaged_tar(tars: Path) -> None:
    content = (tars / "part-1.tar").read_bytes()
    (tars / "part-1.tar").write_bytes(content[:2000])
    message = refusal(tars)
    assert message.startswith(f"{tars}/part-1.tar: at byte ")
    assert "is truncated" in message
    assert message.endswith("; the tar is damaged: get it again")


def test_many_bad_tars_are_counted(tmp_path: Path) -> None:
    for number in range(15):
        write_tar(tmp_path / f"{number:02d}.tar", [png("a.png")] if number % 5 else GOOD)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}/01.tar: sample a at byte 512: ")
    assert message.endswith(" (and 9 more tars of the first 13 have faults)")


def test_empty_tars_are_left_out(tars: Path) -> None:
    write_tar(tars / "part-2.tar", [])
    write_tar(tars / "part-3.tar", [("README", b"text"), (".hidden.png", b"")])
    result = index_set(str(tars))
    assert result.notes == ("2 of 4 tars hold no sample and are left out: part-2.tar, part-3.tar",)
    assert [shard.name for shard in result.manifest.shards] == ["part-0.tar", "part-1.tar"]
    assert not (tars / "part-2.idx").exists()
    assert list(verify_set(LocalPlace(tars))) == []
    assert refusal(f"{tars}/part-{{2..3}}.tar", overwrite=True).startswith(f"{tars}/part-{{2..3}}.tar: no tar holds a ")


def test_keys_that_come_again_in_another_tar(tars: Path) -> None:
    write_tar(tars / "part-2.tar", members_of(2, 3))
    write_tar(tars / "empty.tar", [])
    result = index_set(str(tars))
    _, note = result.notes
    assert note.startswith("about 2 keys occur in more than one tar, such as 0000")
    assert " in part-0.tar and part-2.tar; training does not mind" in note
    assert result.manifest.num_samples == 12


def test_an_index_is_not_overwritten_unasked(tars: Path) -> None:
    first = index_set(str(tars))
    assert refusal(tars) == (
        f"{tars}: is a vitscale shard set already, which 'vitscale shards verify' checks; to index its tars anew, give "
        f"--overwrite"
    )
    assert index_set(str(tars), overwrite=True).manifest == first.manifest
    (tars / "index.json").write_text('{"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": []}')
    assert refusal(tars) == (
        f"{tars}: holds an index.json of another program; replace it with --overwrite, or have ours written elsewhere "
        f"with --out FOLDER"
    )
    assert index_set(str(tars), overwrite=True).manifest == first.manifest


def test_other_files_named_idx_are_not_overwritten(tars: Path) -> None:
    (tars / "part-1.idx").write_text("v1.1 1\njpg 512 3\n")
    (tars / "part-0.idx").write_text("something else")
    assert refusal(tars) == (
        f"{tars}/part-0.idx: is there already and no member index of DALI's; move it away, or have the index written "
        f"elsewhere with --out FOLDER"
    )
    assert (tars / "part-0.idx").read_text() == "something else"
    assert (tars / "part-1.idx").read_text() == as_wds2idx(tars / "part-1.tar")


def test_index_elsewhere(tars: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in tars.iterdir())
    out = tmp_path / "index"
    result = index_set(str(tars), out=out)
    assert sorted(path.name for path in tars.iterdir()) == before
    assert sorted(path.name for path in out.iterdir()) == ["index.json", "part-0.idx", "part-1.idx"]
    assert result.manifest.base_url == str(tars)
    manifest = read_manifest(out)
    assert manifest == result.manifest
    check_files(manifest)
    elsewhere = read_all(manifest)
    (tars / "part-1.tar").rename(tars / "moved.tar")
    with pytest.raises(DataError) as caught:
        check_files(manifest)
    assert str(caught.value) == (
        f"{out}: part-1.tar is missing (the tars lie in {tars}); the index and the tars must come from one writing: "
        f"copy the set again or write it anew with 'vitscale shards write'"
    )
    (tars / "moved.tar").rename(tars / "part-1.tar")
    for name in before:
        (out / name).symlink_to(tars / name)
    assert [sample.key for sample in elsewhere] == [key for key, _, _ in as_webdataset(manifest)]
    assert index_set(str(tars), out=tars).manifest.base_url is None


def test_a_folder_that_cannot_be_written(tars: Path) -> None:
    (tars / ".indexing").write_text("in the way")
    message = refusal(tars)
    assert message.startswith(f"{tars}/part-0.tar: cannot be indexed (")
    assert "\n" not in message


def test_several_processes_write_the_same(tars: Path, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    one = index_set(str(tars), out=tmp_path / "one")
    two = index_set(
        str(tars), out=tmp_path / "two", workers=2, on_progress=lambda done, total: reports.append((done, total))
    )
    assert one.manifest.shards == two.manifest.shards
    assert reports == [(1, 2), (2, 2)]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def change_within_the_same_moment(path: Path) -> None:
    moment = path.stat().st_mtime_ns
    write_tar(path, members_of(50, 9))
    os.utime(path, ns=(moment, moment))


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tars that are read."""
    names: list[str] = []
    index = index_tar.TarIndexer._index

    def noting(self: index_tar.TarIndexer, name: str, *rest: Any) -> Any:
        names.append(name)
        return index(self, name, *rest)

    monkeypatch.setattr(index_tar.TarIndexer, "_index", noting)
    return names


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda folder: None, []),
        (lambda folder: (folder / "part-0.idx").unlink(), ["part-0.tar"]),
        (lambda folder: (folder / "part-0.idx").write_text("v1.2 0\n"), ["part-0.tar"]),
        (lambda folder: (folder / ".indexing" / "part-0.tar.json").unlink(), ["part-0.tar"]),
        (lambda folder: (folder / ".indexing" / "part-0.tar.json").write_text("{"), ["part-0.tar"]),
        (lambda folder: write_tar(folder / "part-0.tar", members_of(50, 3)), ["part-0.tar"]),
        (lambda folder: change_within_the_same_moment(folder / "part-0.tar"), ["part-0.tar"]),
    ],
)
def test_an_interrupted_indexing_goes_on(
    tars: Path, walked: list[str], change: Callable[[Path], Any], again: list[str]
) -> None:
    write_tar(tars / "part-2.tar", [png("a.png")])
    refusal(tars)
    assert walked == ["part-0.tar", "part-1.tar", "part-2.tar"]
    assert [fault.file for fault in verify_set(LocalPlace(tars)) if fault.kind == "leftover"] == [".indexing"]
    walked.clear()
    write_tar(tars / "part-2.tar", members_of(2, 3))
    change(tars)
    result = index_set(str(tars))
    assert walked == [*again, "part-2.tar"]
    assert not (tars / ".indexing").exists()
    assert list(verify_set(LocalPlace(tars))) == []
    assert result.manifest.shards[0].num_samples == len((tars / "part-0.idx").read_text().splitlines()) - 1
    assert len(result.notes) == (1 if (tars / "part-0.idx").read_text().count("00002") else 0)


def test_checksums_are_computed_if_they_were_not_before(tars: Path, walked: list[str]) -> None:
    write_tar(tars / "part-2.tar", [png("a.png")])
    refusal(tars, checksums=False)
    (tars / "part-2.tar").unlink()
    walked.clear()
    assert all(shard.sha256 is not None for shard in index_set(str(tars)).manifest.shards)
    assert walked == ["part-0.tar", "part-1.tar"]


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves files, and parts of them."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range", "")
        if not path.is_file() or not wanted.startswith("bytes="):
            super().do_GET()
            return
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        content = path.read_bytes()
        piece = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(piece) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tars: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of the folder of tars."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = functools.partial(Ranges, directory=str(tars.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/set"
        running.shutdown()


@pytest.mark.parametrize("pattern", ["part-{0..1}.tar", "*.tar", ""])
@pytest.mark.parametrize("checksums", [True, False])
def test_tars_over_http(server: str, tars: Path, tmp_path: Path, pattern: str, checksums: bool) -> None:
    out = tmp_path / "index"
    local = index_set(str(tars), out=tmp_path / "local", checksums=checksums)
    remote = index_set(f"{server}/{pattern}", out=out, checksums=checksums)
    assert remote.manifest.shards == local.manifest.shards
    assert (remote.manifest.base_url, remote.manifest.source, remote.manifest.split) == (server, server, "set")
    for name in ("part-0.idx", "part-1.idx"):
        assert (out / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_http_refusals(server: str, tmp_path: Path) -> None:
    assert refusal(server) == f"{server}: nothing can be written there; give a folder for the index with --out FOLDER"
    message = refusal(f"{server}/part-{{1..2}}.tar", out=tmp_path / "index")
    assert message == f"{server}/part-2.tar: no such file, or no answer; name only tars that are there"


def test_tars_in_object_storage(s3: S3Server, tars: Path, tmp_path: Path) -> None:
    bucket = s3.bucket()
    for path in tars.iterdir():
        s3.put(bucket, f"sets/photos/{path.name}", path.read_bytes())
    local = index_set(str(tars))
    elsewhere = index_set(f"{bucket}/sets/photos/part-{{0..1}}.tar", out=tmp_path / "index")
    assert elsewhere.manifest.shards == local.manifest.shards
    assert elsewhere.manifest.base_url == f"{bucket}/sets/photos"
    beside: IndexedSet = index_set(f"{bucket}/sets/photos")
    assert beside.manifest.shards == local.manifest.shards
    assert beside.manifest.base_url is None
    place = open_place(f"{bucket}/sets/photos")
    assert place.names() == ["index.json", "part-0.idx", "part-0.tar", "part-1.idx", "part-1.tar"]
    assert place.folders() == []
    assert place.read_text("part-0.idx") == (tars / "part-0.idx").read_text()
    assert list(verify_set(place, level="pixels")) == []
    with place.published("part-0.tar") as file:
        file.write((tars / "part-0.tar").read_bytes()[:3000])
    (fault,) = verify_set(place)
    assert (fault.kind, fault.file, fault.offset) == ("size", "part-0.tar", 3000)
