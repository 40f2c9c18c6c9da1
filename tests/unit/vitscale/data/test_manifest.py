"""Reading index.json and .idx: round trips, and what each mistake is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wids

from tests.helpers.shardset import image_bytes, key_of, make_shardset
from vitscale.data.manifest import Manifest, Member, check_files, format_idx, read_idx, read_manifest
from vitscale.errors import DataError

WRITE = "write one with 'vitscale shards write SOURCE OUT'"


@pytest.fixture
def shardset(tmp_path: Path) -> Manifest:
    return make_shardset(tmp_path / "train", [3, 2, 4, 1])


def change_index(manifest: Manifest, change: Callable[[Any], Any]) -> Path:
    path = manifest.folder / "index.json"
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
    again = read_manifest(shardset.folder)
    assert again == shardset
    assert (again.num_samples, len(again.shards)) == (10, 4)
    assert again.num_bytes == sum(path.stat().st_size for path in shardset.folder.glob("*.tar"))


def test_the_helper_writes_what_wids_reads(shardset: Manifest) -> None:
    folder = shardset.folder
    dataset = wids.ShardListDataset(str(folder / "index.json"), cache_dir=str(folder / "cache"), transformations=[])
    assert len(dataset) == 10
    assert dataset[1][".png"].read() == image_bytes(1)
    assert dataset[1]["__key__"] == key_of(1)


def test_a_foreign_wids_index_needs_only_its_shards(shardset: Manifest) -> None:
    change_index(shardset, lambda raw: {"shardlist": raw["shardlist"][:2]})
    manifest = read_manifest(shardset.folder)
    assert (manifest.num_samples, manifest.classes, manifest.multi_label) == (5, None, False)


def test_digest_names_the_content(shardset: Manifest) -> None:
    digest = shardset.digest
    assert Manifest(Path("elsewhere"), shardset.shards).digest == digest
    assert Manifest(shardset.folder, shardset.shards[::-1]).digest != digest
    change_index(shardset, lambda raw: raw["shardlist"][1].update(sha256="00"))
    assert read_manifest(shardset.folder).digest != digest


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
    folder = shardset.folder.parent
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
    assert refusal(lambda: read_manifest(shardset.folder)) == (
        f"{path}: the shard set is empty; at least one sample is needed"
    )


@pytest.mark.parametrize("count", [0, -4])
def test_empty_shard(shardset: Manifest, count: int) -> None:
    path = change_index(shardset, lambda raw: raw["shardlist"][2].update(nsamples=count))
    assert refusal(lambda: read_manifest(shardset.folder)) == (
        f"{path}: shard train-000002.tar says {count} samples; an empty shard is not allowed"
    )


@pytest.mark.parametrize(
    "url", ["../x.tar", "/etc/x.tar", "sub/x.tar", "http://host/x.tar", "x.zip", "x.tar.gz", "", ".."]
)
def test_shards_lie_beside_the_index(shardset: Manifest, url: str) -> None:
    path = change_index(shardset, lambda raw: raw["shardlist"][0].update(url=url))
    assert refusal(lambda: read_manifest(shardset.folder)) == (
        f"{path}: shard url {url!r}; a plain file name ending in .tar beside the index is allowed"
    )


def test_a_newer_format(shardset: Manifest) -> None:
    """Said before anything else is found strange in it."""

    def change(raw: Any) -> Any:
        raw["vitscale"]["format_version"] = 2
        del raw["shardlist"]

    path = change_index(shardset, change)
    assert refusal(lambda: read_manifest(shardset.folder)) == (
        f"{path}: format version 2; this vitscale reads version 1: use the vitscale that wrote it, "
        f"or write the shard set again"
    )


def test_files_that_do_not_match_the_index(shardset: Manifest) -> None:
    tars = [shardset.folder / shard.name for shard in shardset.shards]
    tars[0].unlink()
    size = tars[1].stat().st_size
    tars[1].write_bytes(tars[1].read_bytes()[:-1])
    advice = (
        "; the index and the tars must come from one writing: copy the set again or write it anew with "
        "'vitscale shards write'"
    )
    start = (
        f"{shardset.folder}: train-000000.tar is missing; "
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


@pytest.mark.parametrize("content", [b"", b"hello\n", b"a b c\n", b"\xff\xff\n"])
def test_member_index_of_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(content)
    assert refusal(lambda: read_idx(path)).startswith(f"{path}: not a DALI member index (")


@pytest.mark.parametrize("header", ["v1.1 2", "v1.2 3", "v1.2 1", "v1.2 x"])
def test_member_index_with_a_wrong_header(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.idx"
    path.write_text(f"{header}\njpg 512 9 a.jpg\njpg 1536 9 b.jpg\n")
    assert refusal(lambda: read_idx(path)) == f"{path}: says {header} but 'v1.2 2' is right; index the shard again"


@pytest.mark.parametrize("line", ["", "jpg 512 9", "jpg x 9 a.jpg", "jpg 512 9 a b.jpg"])
def test_member_index_with_a_broken_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.idx"
    path.write_text(f"v1.2 2\njpg 512 9 a.jpg\n{line}\n")
    index = read_idx(path)
    assert index[0] == (Member("jpg", 512, 9, "a.jpg"),)
    assert refusal(lambda: index[1]) == f"{path}: not a DALI member index ({line!r}); index the shard again"
