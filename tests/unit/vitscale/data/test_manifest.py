"""Reading index.json and .idx: round trips, and what each mistake is told."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import wids

from tests.helpers.shardset import folder_of, image_bytes, key_of, make_shardset
from vitscale.data.manifest import (
    Manifest,
    Member,
    check_same_classes,
    format_idx,
    read_idx,
    read_manifest,
)
from vitscale.data.shard_set import check_files
from vitscale.errors import DataError

WRITE = "write one with 'vitscale shards write SOURCE OUT'"


@pytest.fixture
def shardset(tmp_path: Path) -> Manifest:
    return make_shardset(tmp_path / "train", [3, 2, 4, 1])


def change_index(manifest: Manifest, change: Callable[[Any], Any]) -> Path:
    path = folder_of(manifest) / "index.json"
    raw = json.loads(path.read_text())
    changed = change(raw)
    path.write_text(json.dumps(raw if changed is None else changed))
    return path


def refusal(function: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        function()
    return str(caught.value)


def test_round_trip(shardset: Manifest) -> None:
    check_files(shardset)
    again = read_manifest(folder_of(shardset))
    assert again == shardset
    assert (again.num_samples, len(again.shards)) == (10, 4)
    assert again.num_bytes == sum(path.stat().st_size for path in folder_of(shardset).glob("*.tar"))


def test_the_helper_writes_what_wids_reads(shardset: Manifest) -> None:
    folder = folder_of(shardset)
    dataset = wids.ShardListDataset(str(folder / "index.json"), cache_dir=str(folder / "cache"), transformations=[])
    assert len(dataset) == 10
    assert dataset[1][".png"].read() == image_bytes(1)
    assert dataset[1]["__key__"] == key_of(1)


def test_a_foreign_wids_index_needs_only_its_shards(shardset: Manifest) -> None:
    change_index(shardset, lambda raw: {"shardlist": raw["shardlist"][:2]})
    manifest = read_manifest(folder_of(shardset))
    assert (manifest.num_samples, manifest.classes, manifest.multi_label) == (5, None, False)


def test_digest_names_the_content(shardset: Manifest) -> None:
    digest = shardset.digest
    assert Manifest("elsewhere", shardset.shards).digest == digest
    assert Manifest(shardset.location, shardset.shards[::-1]).digest != digest
    change_index(shardset, lambda raw: raw["shardlist"][1].update(sha256="00"))
    assert read_manifest(folder_of(shardset)).digest != digest


def test_missing_folder(tmp_path: Path) -> None:
    folder = tmp_path / "nowhere"
    assert refusal(lambda: read_manifest(folder)) == (
        f"{folder}: no such shard set; a folder with index.json and *.tar files is needed: {WRITE}"
    )


def test_folder_without_index(tmp_path: Path) -> None:
    assert refusal(lambda: read_manifest(tmp_path)) == (
        f"{tmp_path}: holds no index.json, so it is not a shard set; {WRITE}"
    )


def test_folder_above_the_shard_set(shardset: Manifest) -> None:
    folder = folder_of(shardset).parent
    assert refusal(lambda: read_manifest(folder)) == (
        f"{folder}: holds no index.json, so it is not a shard set; did you mean {folder / 'train'}?"
    )


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "JSONDecodeError"),
        (b"{", "JSONDecodeError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (b"[1, 2]", "AttributeError"),
        (b"3", "AttributeError"),
        (b'{"name": "package"}', "KeyError('shardlist')"),
        (b'{"shardlist": 5}', "TypeError"),
        (b'{"shardlist": [{"url": "a.tar"}]}', "KeyError('nsamples')"),
        (b'{"shardlist": [{"url": "a.tar", "nsamples": "many", "filesize": 1}]}', "ValueError"),
        (b'{"shardlist": [{"url": "a.tar", "nsamples": null, "filesize": 1}]}', "TypeError"),
        (b'{"shardlist": [], "vitscale": []}', "AttributeError"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_foreign_json(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(content)
    message = refusal(lambda: read_manifest(tmp_path))
    assert message.startswith(f"{path}: not a shard index ({cause}")
    assert message.endswith("); write the shard set again")


def test_empty_set(shardset: Manifest) -> None:
    path = change_index(shardset, lambda raw: raw.update(shardlist=[]))
    assert refusal(lambda: read_manifest(folder_of(shardset))) == (
        f"{path}: the shard set is empty; at least one sample is needed"
    )


@pytest.mark.parametrize("count", [0, -4])
def test_empty_shard(shardset: Manifest, count: int) -> None:
    path = change_index(shardset, lambda raw: raw["shardlist"][2].update(nsamples=count))
    assert refusal(lambda: read_manifest(folder_of(shardset))) == (
        f"{path}: shard train-000002.tar says {count} samples; an empty shard is not allowed"
    )


@pytest.mark.parametrize(
    "url", ["../x.tar", "/etc/x.tar", "sub/x.tar", "http://host/x.tar", "x.zip", "x.tar.gz", "", ".."]
)
def test_shards_lie_beside_the_index(shardset: Manifest, url: str) -> None:
    path = change_index(shardset, lambda raw: raw["shardlist"][0].update(url=url))
    assert refusal(lambda: read_manifest(folder_of(shardset))) == (
        f"{path}: shard url {url!r}; a plain file name ending in .tar beside the index is allowed"
    )


def test_a_newer_format(shardset: Manifest) -> None:
    """Said before anything else is found strange in it."""

    def change(raw: Any) -> Any:
        raw["vitscale"]["format_version"] = 2
        del raw["shardlist"]

    path = change_index(shardset, change)
    assert refusal(lambda: read_manifest(folder_of(shardset))) == (
        f"{path}: format version 2; this vitscale reads version 1: use the vitscale that wrote it, "
        f"or write the shard set again"
    )


def test_files_that_do_not_match_the_index(shardset: Manifest) -> None:
    tars = [folder_of(shardset) / shard.name for shard in shardset.shards]
    tars[0].unlink()
    size = tars[1].stat().st_size
    tars[1].write_bytes(tars[1].read_bytes()[:-1])
    advice = (
        "; the index and the tars must come from one writing: copy the set again or write it anew with "
        "'vitscale shards write'"
    )
    start = (
        f"{folder_of(shardset)}: train-000000.tar is missing; "
        f"train-000001.tar has {size - 1} bytes where the index says {size}"
    )
    assert refusal(lambda: check_files(shardset)) == start + advice
    tars[2].with_suffix(".idx").unlink()
    assert refusal(lambda: check_files(shardset)) == f"{start}; train-000002.idx is missing{advice}"
    tars[3].with_suffix(".idx").unlink()
    assert refusal(lambda: check_files(shardset)) == f"{start}; train-000002.idx is missing (and 1 more){advice}"


def test_member_index_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    samples = [
        [Member("jpg", 512, 99, "a/1.jpg"), Member("cls", 1536, 1, "a/1.cls")],
        [Member("png", 2560, 5, "b.x.png")],
        [Member("jpg", 3584, 0, "straße.jpg"), Member("json", 4608, 3, "straße.json")],
    ]
    path.write_text(format_idx(samples), encoding="utf-8")
    index = read_idx(path)
    assert len(index) == 3
    assert [*index] == [tuple(members) for members in samples]
    assert index[1:] == [tuple(members) for members in samples[1:]]
    assert index[-1] == tuple(samples[-1])


def test_member_index_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    assert refusal(lambda: read_idx(path)) == f"{path}: missing; write the shard set again"


def test_member_index_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    path.mkdir()
    assert refusal(lambda: read_idx(path)) == f"{path}: cannot be read (Is a directory); check the file system"


@pytest.mark.parametrize(
    ("content", "header", "lines"),
    [
        (b"", "", 0),
        (b"hello", "", 0),
        (b"hello\n", "hello", 0),
        (b"a b c\n", "a b c", 0),
        (b"\xff\xff\n", "\ufffd\ufffd", 0),
        (b"\n" * 4, "", 3),
        (b"x" * 500 + b"\n\n", "x" * 80, 1),
        (b"v1.2 1\r\njpg 512 9 a.jpg\r\n", "v1.2 1\r", 1),
    ],
)
def test_member_index_of_something_else(tmp_path: Path, content: bytes, header: str, lines: int) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(content)
    assert refusal(lambda: read_idx(path)) == (
        f"{path}: begins with {header!r} where 'v1.2 {lines}' is right; write the shard set again"
    )


@pytest.mark.parametrize("header", ["v1.1 2", "v1.2 3", "v1.2 1", "v1.2 x", "v1.2 02", " v1.2 2", "v1.2 2 ", "v1.2"])
def test_member_index_with_a_wrong_header(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.idx"
    path.write_text(f"{header}\njpg 512 9 a.jpg\njpg 1536 9 b.jpg\n")
    assert refusal(lambda: read_idx(path)) == (
        f"{path}: begins with {header!r} where 'v1.2 2' is right; write the shard set again"
    )


def test_every_truncation_of_a_member_index_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    whole = format_idx(numbered(12)).encode()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert refusal(lambda: read_idx(path)).startswith(f"{path}: begins with ")


@pytest.mark.parametrize("line", ["", "jpg 512 9", "jpg x 9 a.jpg", "jpg 512 9 a b.jpg"])
def test_member_index_with_a_broken_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.idx"
    path.write_text(f"v1.2 3\njpg 512 9 a.jpg\n{line}\njpg 2560 9 c.jpg\n")
    index = read_idx(path)
    assert index[0] == (Member("jpg", 512, 9, "a.jpg"),)
    assert index[2] == (Member("jpg", 2560, 9, "c.jpg"),)
    told = f"{path}: not a DALI member index ({line!r}); write the shard set again"
    assert refusal(lambda: index[1]) == told
    assert refusal(lambda: index[:]) == told


def test_member_index_with_a_line_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(b"v1.2 2\njpg 512 9 a.jpg\njpg 1536 9 \xff.jpg\n")
    index = read_idx(path)
    assert index[0] == (Member("jpg", 512, 9, "a.jpg"),)
    message = refusal(lambda: index[1])
    assert message.startswith(f"{path}: cannot be read ('utf-8' codec can't decode byte 0xff")
    assert message.endswith("); write the shard set again")


def numbered(count: int) -> list[list[Member]]:
    """Samples with one to three members, whose lines differ in length; some names hold what breaks lines elsewhere."""
    return [
        [Member("e" * (m + 1), 512 * n, n**m, f"{n}{'é' * (n % 7)}\x85\u2028{m}") for m in range(1 + n % 3)]
        for n in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_a_member_index_is_a_sequence(tmp_path: Path, count: int) -> None:
    path = tmp_path / "a.idx"
    path.write_text(format_idx(numbered(count)), encoding="utf-8")
    index, expected = read_idx(path), [tuple(members) for members in numbered(count)]
    assert len(index) == count
    assert list(index) == expected
    assert list(reversed(index)) == expected[::-1]
    for n in range(-count, count):
        assert index[n] == expected[n]
        assert expected[n] in index
        assert index.index(expected[n]) == n % count
    for n in (count, count + 1, -count - 1, 10**30):
        with pytest.raises(IndexError):
            index[n]
    bounds = [None, *range(-count - 2, count + 3)]
    for start, stop, step in itertools.product(bounds, bounds, [None, 1, 2, 3, 50, -1, -2, -50]):
        assert index[start:stop:step] == expected[start:stop:step], (start, stop, step)
    with pytest.raises(ValueError, match="slice step cannot be zero"):
        index[::0]


def test_a_member_index_keeps_offsets_only(tmp_path: Path) -> None:
    path, count = tmp_path / "a.idx", 20_000
    path.write_text(format_idx(numbered(count)), encoding="utf-8")
    assert path.stat().st_size > 60 * count
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        index = read_idx(path)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(index) == count
    assert grown < 10 * count


def test_a_member_index_reads_what_it_is_asked_for(tmp_path: Path) -> None:
    """Lines that nobody asks for may be anything."""
    path, expected = tmp_path / "a.idx", [tuple(members) for members in numbered(30)]
    path.write_text(format_idx(numbered(30)), encoding="utf-8")
    index = read_idx(path)
    lines = path.read_bytes().splitlines(keepends=True)
    spoiled = [line if n in (0, 11, 12, 13) else b"\xff" * (len(line) - 1) + b"\n" for n, line in enumerate(lines)]
    path.write_bytes(b"".join(spoiled))
    assert index[10:13] == expected[10:13]
    assert index[12] == expected[12]
    assert refusal(lambda: index[13]).startswith(f"{path}: cannot be read (")


@pytest.mark.parametrize("damage", ["removed", "cut", "emptied"])
def test_a_member_index_that_is_lost_while_it_is_open(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.idx"
    path.write_text(format_idx(numbered(5)), encoding="utf-8")
    index = read_idx(path)
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else b"")
    for ask in (lambda: index[4], lambda: index[-1], lambda: index[2:], lambda: list(index)):
        message = refusal(ask)
        assert message.startswith(f"{path}: cannot be read (")
        assert message.endswith("); write the shard set again")


def test_a_member_index_serves_threads_at_once(tmp_path: Path) -> None:
    path, expected = tmp_path / "a.idx", [tuple(members) for members in numbered(500)]
    path.write_text(format_idx(numbered(500)), encoding="utf-8")
    index = read_idx(path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(index.__getitem__, range(500))) == expected


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["cat", "dog"], ("cat", "dog")),
        (["cat", "dog"], None),
        (None, ["cat", "dog"]),
        (None, None),
        ([], ["cat"]),
        (["cat", "dog"], ["cat"]),
        (["cat"], ["cat", "dog"]),
    ],
)
def test_same_classes(tmp_path: Path, ours: list[str] | None, theirs: Sequence[str] | None) -> None:
    manifest = Manifest(str(tmp_path), (), None if ours is None else tuple(ours))
    check_same_classes(manifest, theirs, of="the training set")


@pytest.mark.parametrize(
    ("theirs", "label", "name"),
    [
        (["dog", "cat", "eel"], 0, "dog"),
        (["cat", "eel", "dog"], 1, "eel"),
        (["cat", "dog", "Eel"], 2, "Eel"),
        (["cat", "dog", "elk", "fox"], 2, "elk"),
        (["cat", "hen"], 1, "hen"),
    ],
)
def test_other_classes(tmp_path: Path, theirs: list[str], label: int, name: str) -> None:
    ours = ("cat", "dog", "eel")
    message = refusal(lambda: check_same_classes(Manifest(str(tmp_path), (), ours), theirs, of="run/model.json"))
    assert message == (
        f"{tmp_path}: label {label} is {ours[label]!r}, but {name!r} in run/model.json; write both sets from "
        f"sources with the same classes"
    )
