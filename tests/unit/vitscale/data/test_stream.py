"""Windows of a shard set against what ``tarfile`` reads; damage gives faults that say what is wrong."""

from __future__ import annotations

import json
import os
import tarfile
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.shardset import (
    Parts,
    folder_of,
    image_bytes,
    key_of,
    make_shardset,
    overwrite,
    parts_of,
    place_of,
    read_tars,
)
from vitscale.data import stream as stream_module
from vitscale.data.manifest import Manifest, format_idx, read_idx
from vitscale.data.order import SampleOrder, SequentialOrder, WindowId
from vitscale.data.shard_set import open_source
from vitscale.data.stream import Fault, RawSample, ShardStream

SIZES = [7, 1, 20, 3, 12]


def in_order(manifest: Manifest, window: int = 8) -> list[RawSample | Fault]:
    """Every sample, window by window."""
    order = SequentialOrder([shard.num_samples for shard in manifest.shards], window=window)
    stream = ShardStream([open_source(manifest)], order)
    windows = range(-(-manifest.num_samples // window))
    return [sample for number in windows for sample in stream.read_window(WindowId(0, 0, number))]


def only(manifest: Manifest) -> RawSample | Fault:
    (sample,) = in_order(manifest)
    return sample


def reasons(samples: list[RawSample | Fault]) -> dict[int, str]:
    return {sample.sample_id: sample.reason for sample in samples if isinstance(sample, Fault)}


def samples_of(manifest: Manifest, shard: int) -> range:
    """Numbers of the samples of a shard."""
    first = sum(info.num_samples for info in manifest.shards[:shard])
    return range(first, first + manifest.shards[shard].num_samples)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shardset(tmp_path_factory.mktemp("shards") / "train", SIZES)


@pytest.fixture
def shardset(tmp_path: Path) -> Manifest:
    return make_shardset(tmp_path / "train", SIZES)


@pytest.mark.parametrize("window", [1, 5, 8, 43, 1000])
def test_samples_are_what_tarfile_reads(intact: Manifest, window: int) -> None:
    samples = in_order(intact, window)
    expected = read_tars(intact)
    assert len(samples) == len(expected) == sum(SIZES)
    for number, (sample, (key, parts)) in enumerate(zip(samples, expected, strict=True)):
        assert isinstance(sample, RawSample)
        assert (sample.key, sample.sample_id) == (key, number)
        assert sample.image == next(data for extension, data in parts.items() if extension != "cls")
        assert sample.labels == (int(parts["cls"]),)
        assert sample.shard == place_of(intact, number)[0].name


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 60))
def test_shuffled_windows_keep_the_order_of_their_draws(intact: Manifest, seed: int, lanes: int, window: int) -> None:
    order = SampleOrder(SIZES, seed=seed, lanes=lanes, window=window)
    stream = ShardStream([open_source(intact)], order)
    keys = [key for key, _ in read_tars(intact)]
    for position in range(0, 2 * order.num_samples, 3):
        place = order.locate(position)
        ref = order.window(place.window)[place.offset]
        sample = stream.read_window(place.window)[place.offset]
        assert isinstance(sample, RawSample)
        assert sample.sample_id == sum(SIZES[: ref.shard]) + ref.sample
        assert sample.key == keys[sample.sample_id]


def test_a_stream_serves_threads_at_once(intact: Manifest) -> None:
    order = SampleOrder(SIZES, seed=1, lanes=6, window=5)
    stream = ShardStream([open_source(intact)], order)
    windows = sorted({order.locate(p).window for p in range(5 * order.num_samples)})
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(stream.read_window, windows))
    assert together == [ShardStream([open_source(intact)], order).read_window(window) for window in windows]


def test_a_truncated_tar_spoils_only_what_was_cut(shardset: Manifest) -> None:
    path, place = place_of(shardset, 15)  # in the third tar
    members = read_idx(path.with_suffix(".idx"))[place]
    image = members[0]
    os.truncate(path, image.offset + image.size // 2)
    samples = in_order(shardset)
    assert set(reasons(samples)) == set(range(15, 28))
    half = f"the tar ends within {image.name}: {image.size // 2} of {image.size} bytes"
    assert reasons(samples)[15] == half
    assert reasons(samples)[16].startswith(f"the tar ends within {key_of(16)}.png: 0 of")


def test_a_tar_cut_between_the_members_of_a_sample_gives_no_half_sample(shardset: Manifest) -> None:
    path, place = place_of(shardset, 4)
    image, label = read_idx(path.with_suffix(".idx"))[place]
    os.truncate(path, label.offset - tarfile.BLOCKSIZE)
    assert reasons(in_order(shardset)) == {
        4: f"the tar ends within {label.name}: 0 of 1 bytes",
        5: f"the tar ends within {key_of(5)}.png: 0 of {len(parts_of(5)['png'])} bytes",
        6: f"the tar ends within {key_of(6)}.jpg: 0 of {len(parts_of(6)['jpg'])} bytes",
    }
    assert image.offset < label.offset


def test_a_missing_tar(shardset: Manifest) -> None:
    (folder_of(shardset) / shardset.shards[2].name).unlink()
    samples = in_order(shardset)
    assert reasons(samples) == dict.fromkeys(range(8, 28), "cannot read the shard: No such file or directory")
    fault = samples[8]
    assert (fault.key, fault.shard) == (key_of(8), shardset.shards[2].name)


def test_a_stale_index_never_yields_a_neighbours_bytes(shardset: Manifest) -> None:
    """The tar is written again in another order of the same samples: sizes and names still occur in it."""
    path = folder_of(shardset) / shardset.shards[2].name
    before = read_idx(path.with_suffix(".idx"))[:]
    make_shardset(folder_of(shardset) / "again", [20], parts=lambda n: parts_of(27 - n), key=lambda n: key_of(27 - n))
    (folder_of(shardset) / "again" / "train-000000.tar").replace(path)
    found = reasons(in_order(shardset))
    assert set(found) == set(range(8, 28))
    for n, reason in found.items():
        assert reason.startswith(("the tar has no member", "the tar ends within")), (n, reason)
    first = before[0][0]
    assert found[8] == f"the tar has no member {first.name} at byte {first.offset}"


@pytest.mark.parametrize("change", [-1, 1])
def test_a_stale_index_with_another_size_of_the_same_member(tmp_path: Path, change: int) -> None:
    manifest = make_shardset(tmp_path, [3])
    idx = (tmp_path / manifest.shards[0].idx_name).read_text()
    size = len(parts_of(1)["png"])
    assert idx.count(f" {size} {key_of(1)}") == 1
    stale = idx.replace(f" {size} {key_of(1)}", f" {size + change} {key_of(1)}")
    (tmp_path / manifest.shards[0].idx_name).write_text(stale)
    assert reasons(in_order(manifest)) == {
        1: f"{key_of(1)}.png has not {size + change} bytes in the tar, as the index says"
    }


def test_a_member_name_that_is_the_beginning_of_another(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path, [1], parts=lambda _: {"png": image_bytes(0), "cls2": b"3"})
    idx = tmp_path / manifest.shards[0].idx_name
    idx.write_text(idx.read_text().replace("cls2", "cls"))
    assert "the tar has no member sample_00000.cls at byte" in reasons(in_order(manifest))[0]


def test_absurd_numbers_in_an_index_are_faults(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path, [3])
    idx = tmp_path / manifest.shards[0].idx_name
    samples = [list(members) for members in read_idx(idx)]
    for offset, size in ((10**15, 10**15), (512, 10**15), (0, 5), (-5, 5)):
        broken = [[type(m)(m.extension, offset, size, m.name) for m in samples[1]]]
        idx.write_text(format_idx([samples[0], *broken, samples[2]]))
        faults = reasons(in_order(manifest, window=1))
        assert set(faults) == {1}, (offset, size)


@pytest.mark.parametrize("name", [f"{'long/' * 40}image", "köln/straße", "日本"])
def test_names_that_do_not_fit_a_plain_header(tmp_path: Path, name: str) -> None:
    manifest = make_shardset(tmp_path, [3], key=lambda n: f"{name}{n}")
    samples = in_order(manifest)
    assert reasons(samples) == {}
    assert [sample.key for sample in samples] == [f"{name}{n}" for n in range(3)]


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (b"x", "unreadable label: ValueError("),
        (b"-", "unreadable label: ValueError("),
        (b"\xff", "unreadable label: "),
        (b"\0", "unreadable label: "),
    ],
)
def test_flipped_label_bytes(shardset: Manifest, label: bytes, reason: str) -> None:
    overwrite(shardset, 9, "cls", label)
    found = reasons(in_order(shardset))
    assert set(found) == {9}
    assert found[9].startswith(reason)


def labelled(parts: Parts) -> Callable[[int], Parts]:
    return lambda _: {"png": image_bytes(0), **parts}


@pytest.mark.parametrize(
    ("parts", "labels"),
    [
        ({"cls": b"7"}, (7,)),
        ({"cls": b" 7\n"}, (7,)),
        ({"json": b'{"labels": [3, 1, 2]}'}, (3, 1, 2)),
        ({"json": b'{"labels": [5], "caption": "a bird"}'}, (5,)),
        ({"json": b'{"labels": []}'}, ()),
        ({"cls": b"1", "json": b'{"caption": "a bird"}'}, (1,)),
    ],
)
def test_labels(tmp_path: Path, parts: Parts, labels: tuple[int, ...]) -> None:
    sample = only(make_shardset(tmp_path, [1], parts=labelled(parts)))
    assert isinstance(sample, RawSample)
    assert sample.labels == labels


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"cls": b"-1"}, "negative label among [-1]"),
        ({"json": b'{"labels": [4, -3]}'}, "negative label among [4, -3]"),
        ({"cls": b""}, "unreadable label: ValueError("),
        ({"cls": b"1.5"}, "unreadable label: ValueError("),
        ({"json": b'{"labels": [1.5]}'}, "unreadable label: ValueError('whole numbers are needed, found [1.5]')"),
        ({"json": b'{"labels": ["3"]}'}, "unreadable label: ValueError("),
        ({"json": b'{"labels": [true]}'}, "unreadable label: ValueError("),
        ({"json": b'{"labels": "12"}'}, "unreadable label: ValueError("),
        ({"json": b'{"labels": 3}'}, "unreadable label: TypeError("),
        ({"json": b'{"label": [3]}'}, "unreadable label: KeyError('labels')"),
        ({"json": b"[3]"}, "unreadable label: TypeError("),
        ({"json": b"{"}, "unreadable label: JSONDecodeError("),
        ({"json": b"\xff"}, "unreadable label: UnicodeDecodeError("),
        ({"json": b"[" * 100_000}, "unreadable label: RecursionError("),
        ({}, "no label: a cls or json member is needed, found png"),
        ({"txt": b"a bird"}, "no label: a cls or json member is needed, found png, txt"),
    ],
)
def test_unusable_labels(tmp_path: Path, parts: Parts, reason: str) -> None:
    fault = only(make_shardset(tmp_path, [1], parts=labelled(parts)))
    assert isinstance(fault, Fault)
    assert fault.reason.startswith(reason)


def test_a_sample_without_image(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path, [3], parts=lambda n: {"cls": b"1"} if n == 1 else parts_of(n))
    assert reasons(in_order(manifest)) == {1: "no image among the members (cls)"}


def test_extensions_in_capitals(tmp_path: Path) -> None:
    sample = only(make_shardset(tmp_path, [1], parts=lambda _: {"PNG": image_bytes(4), "CLS": b"4"}))
    assert isinstance(sample, RawSample)
    assert (sample.key, sample.labels, sample.image) == (key_of(0), (4,), image_bytes(4))


def test_an_index_of_another_length(shardset: Manifest) -> None:
    path = folder_of(shardset) / shardset.shards[2].idx_name
    path.write_text(format_idx([list(members) for members in read_idx(path)[:19]]))
    reason = f"cannot use the member index: {path} lists 19 samples where index.json says 20"
    assert reasons(in_order(shardset)) == dict.fromkeys(samples_of(shardset, 2), reason)


def test_a_label_beyond_the_classes_of_the_set(shardset: Manifest) -> None:
    """A flipped digit must not stop a run whose head is large enough."""
    few = replace(shardset, classes=shardset.classes[:7])  # type: ignore[index]
    found = reasons(in_order(few))
    assert set(found) == {n for n in range(sum(SIZES)) if n % 10 >= 7}
    assert found[8] == "label 8, where the set has 7 classes"


@pytest.mark.parametrize("damage", ["swapped", "below", "far", "negative offset", "negative size"])
def test_a_member_index_that_leads_astray(shardset: Manifest, damage: str) -> None:
    path = folder_of(shardset) / shardset.shards[2].idx_name
    samples = [list(members) for members in read_idx(path)]
    if damage == "swapped":
        samples[0], samples[7] = samples[7], samples[0]
    else:
        wrong = {"below": {"offset": 10}, "far": {"offset": 10**12}, "negative offset": {"offset": -5}}
        samples[3] = [member._replace(**wrong.get(damage, {"size": -7})) for member in samples[3]]
    path.write_text(format_idx(samples))
    found = reasons(in_order(shardset))
    assert set(found) <= set(samples_of(shardset, 2))
    assert (samples_of(shardset, 2)[3] in found) == (damage != "swapped")


def test_threads_that_want_one_member_index_read_it_once(shardset: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    read, order = Counter[str](), SequentialOrder([shard.num_samples for shard in shardset.shards], window=1)
    source = open_source(shardset)
    files = source.indexes

    class Counting:
        location, reads_cheaply = files.location, False
        read = staticmethod(files.read)
        size = staticmethod(files.size)

        @staticmethod
        def read_all(name: str) -> bytes:
            read[name] += 1
            time.sleep(0.02)
            return files.read_all(name)

    for most in (1 << 20, 1):
        monkeypatch.setattr(stream_module, "OPEN_INDEX_BYTES", most)
        read.clear()
        stream = ShardStream([replace(source, indexes=Counting())], order)
        with ThreadPoolExecutor(8) as pool:
            samples = list(pool.map(lambda n, of=stream: of.read_window(WindowId(0, 0, n))[0], range(sum(SIZES))))
        assert all(isinstance(sample, RawSample) for sample in samples)
        assert set(read) == {shard.idx_name for shard in shardset.shards}
        assert most == 1 or set(read.values()) == {1}
    finished = weakref.ref(stream)
    del stream, pool
    assert finished() is None  # at once, not with the next collection


def test_a_missing_member_index(shardset: Manifest) -> None:
    path = folder_of(shardset) / shardset.shards[0].idx_name
    path.unlink()
    reason = "cannot read the member index train-000000.idx: No such file or directory"
    samples = in_order(shardset)
    assert reasons(samples) == dict.fromkeys(samples_of(shardset, 0), reason)
    # Without the member index, the keys are not known either.
    assert [s.key for s in samples if isinstance(s, Fault)] == [f"train-000000[{n}]" for n in samples_of(shardset, 0)]


def test_json_sets_keep_all_labels(tmp_path: Path) -> None:
    manifest = make_shardset(
        tmp_path,
        [4, 3],
        parts=lambda n: {"jpg": image_bytes(n, kind="jpg"), "json": json.dumps({"labels": [*range(n)]}).encode()},
        multi_label=True,
    )
    samples = in_order(manifest)
    assert [sample.labels for sample in samples if isinstance(sample, RawSample)] == [tuple(range(n)) for n in range(7)]
