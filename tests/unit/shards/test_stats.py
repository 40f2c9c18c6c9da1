"""The numbers of a shard set against counting by hand, and the measure of shuffling against brute force."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.shardset import Parts, image_bytes, make_shardset, overwrite, parts_of
from vitscale.data.manifest import Manifest
from vitscale.errors import DataError
from vitscale_shards.place import LocalPlace
from vitscale_shards.statistics.shuffle_quality import (
    NO_LABEL,
    Labels,
    ShuffleQuality,
    distinct_by_chance,
    measure_shuffle,
)
from vitscale_shards.statistics.stats import SetStats, gather_stats
from vitscale_shards.statistics.stats_text import format_stats, stats_warnings


def quality_of(labels: list[int] | np.ndarray, *, shards: int = 3) -> ShuffleQuality:
    found = measure_shuffle(np.array_split(np.array(labels, np.uint32), shards))
    assert found is not None
    return found


# The measure of shuffling


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda counts: 2 <= sum(counts) <= 7), st.data())
@settings(max_examples=40, deadline=None)
def test_chance_against_all_permutations(counts: list[int], data: st.DataObject) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    window = data.draw(st.integers(1, len(labels)))
    distinct = [len(set(order[:window])) for order in permutations(labels)]
    mean, variance = distinct_by_chance(np.array(counts), window)
    assert mean == pytest.approx(np.mean(distinct))
    assert variance >= np.var(distinct) - 1e-9


def test_chance_keeps_its_digits_with_many_samples() -> None:
    """A label of one image among 3e9 is in a window of w samples with probability w / n."""
    mean, _ = distinct_by_chance(np.array([1, 3_000_000_000 - 1]), 4096)
    assert mean - 1 == pytest.approx(4096 / 3_000_000_000, rel=1e-6)


@given(st.lists(st.lists(st.integers(0, 3)), min_size=1, max_size=5).filter(lambda s: sum(map(len, s)) > 1))
def test_measure_against_a_plain_loop(shards: list[list[int]]) -> None:
    labels = [label for shard in shards for label in shard]
    found = measure_shuffle([np.array(shard, np.uint32) for shard in shards])
    assert found is not None
    counts = Counter(labels)
    window = min(max(2, len(counts)), len(labels))
    windows = [labels[at : at + window] for at in range(0, len(labels) - window + 1, window)]
    mean, _ = distinct_by_chance(np.array(list(counts.values())), window)
    assert (found.window, found.num_windows) == (window, len(windows))
    assert found.quality == pytest.approx(np.mean([len(set(w)) for w in windows]) / mean)
    pairs = [a == b for i, a in enumerate(labels) for j, b in enumerate(labels) if i != j]
    neighbours = [a == b for a, b in pairwise(labels)]
    if any(pairs):
        assert found.neighbours == pytest.approx(np.mean(neighbours) / np.mean(pairs))
    else:
        assert found.neighbours is None


def test_blocks_of_labels_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(0).integers(0, 7, 5000)
    whole = quality_of(labels)
    monkeypatch.setattr("vitscale_shards.statistics.shuffle_quality._LABELS_AT_A_TIME", 100)
    assert quality_of(labels, shards=50) == whole


CLASSES, EACH = 100, 200


def shuffled(seed: int = 0) -> Labels:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(CLASSES, dtype=np.uint32), EACH))


@pytest.mark.parametrize("seed", range(5))
def test_a_random_permutation_is_shuffled(seed: int) -> None:
    found = quality_of(shuffled(seed))
    assert abs(found.quality - 1) < 4 * found.standard_error < 0.04
    assert found.neighbours == pytest.approx(1, abs=0.35)
    assert (found.window, found.num_windows) == (CLASSES, EACH)
    assert not found.is_clumped
    assert not found.is_sorted


def test_sorted_labels() -> None:
    """Each window lies in one class: 1 different label where chance gives (1 - 1/e) of the classes."""
    found = quality_of(np.sort(shuffled()))
    assert found.quality == pytest.approx(1 / (CLASSES * (1 - np.exp(-1))), rel=0.02)
    assert found.neighbours == pytest.approx(CLASSES, rel=0.02)
    assert found.is_sorted
    assert found.is_clumped


@pytest.mark.parametrize(("run", "quality"), [(2, 0.62), (4, 0.35), (10, 0.15)])
def test_images_of_a_class_in_runs(run: int, quality: float) -> None:
    found = quality_of(np.repeat(shuffled()[: CLASSES * EACH // run], run))
    assert found.quality == pytest.approx(quality, abs=0.03)
    assert found.is_clumped
    assert not found.is_sorted


def test_sorted_and_shuffled_within_blocks_lies_between() -> None:
    rng = np.random.default_rng(0)
    blocks = np.array_split(np.sort(shuffled()), 5)
    found = quality_of(np.concatenate([rng.permutation(block) for block in blocks]))
    assert quality_of(np.sort(shuffled())).quality < 0.1 < found.quality < 0.9
    assert found.is_clumped


def test_stratified_order_is_better_than_random() -> None:
    found = quality_of(np.tile(np.arange(CLASSES), EACH))
    assert found.quality == pytest.approx(1 / (1 - np.exp(-1)), rel=0.01)
    assert not found.is_clumped


@pytest.mark.parametrize("labels", [[0, 1], [0, 0], [0, 1, 2], [0, 0, 1, 1], [3] * 50, list(range(50))])
def test_small_sets_are_not_accused_by_chance(labels: list[int]) -> None:
    assert not quality_of(labels).is_clumped


@pytest.mark.parametrize("size", [20, 60, 200])
def test_false_alarms_are_rare(size: int) -> None:
    rng = np.random.default_rng(size)
    alarms = sum(quality_of(rng.integers(0, 10, size)).is_clumped for _ in range(300))
    assert alarms <= 3


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([0, 0, 1, 1], True), ([1, 1, 0, 0, 0], True), ([0, 1, 2], False), ([0, 0, 0], False), ([0, 1, 0], False)],
)
def test_sorted(labels: list[int], expected: bool) -> None:
    assert quality_of(labels).is_sorted == expected


def test_one_sample_has_no_order() -> None:
    assert measure_shuffle([np.array([3], np.uint32)]) is None


# The statistics of a set


def stats_of(folder: Path, **options: int) -> SetStats:
    return gather_stats(LocalPlace(folder), **options)


def test_single_labels(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path, [11, 7, 5], classes=12)
    stats = stats_of(tmp_path)
    assert (stats.num_samples, stats.num_shards, stats.num_bytes) == (23, 3, manifest.num_bytes)
    assert (stats.shard_samples.min, stats.shard_samples.max) == (5, 11)
    assert stats.shard_samples.mean == pytest.approx(23 / 3)
    assert stats.shard_bytes.max == max(shard.num_bytes for shard in manifest.shards)
    assert stats.labels.counts == Counter(n % 10 for n in range(23))
    assert (stats.labels.num_labels, stats.labels.num_unlabelled, stats.labels.unused) == (23, 0, [10, 11])
    assert (stats.images.num_images, stats.images.num_bad) == (23, 0)
    assert stats.images.formats == {"png": 15, "jpg": 8}
    sizes = sorted(len(next(iter(parts_of(n).values()))) for n in range(23))
    assert stats.images.num_bytes["min"] == sizes[0]
    assert stats.images.num_bytes["median"] == sizes[11]
    assert stats.images.num_bytes["max"] == sizes[-1]
    assert stats.shuffle == quality_of([n % 10 for n in range(23)])


def many_labels(number: int) -> Parts:
    labels = {0: [], 1: [number % 5], 2: [4, number % 4]}[number % 3]
    return {"png": image_bytes(number, hw=(8 + number, 60)), "json": json.dumps({"labels": labels}).encode()}


def test_many_labels(tmp_path: Path) -> None:
    make_shardset(tmp_path, [20, 20], parts=many_labels, multi_label=True, classes=None)
    stats = stats_of(tmp_path)
    labels = [json.loads(many_labels(n)["json"])["labels"] for n in range(40)]
    assert stats.labels.counts == Counter(label for found in labels for label in found)
    assert (stats.labels.num_labels, stats.labels.num_unlabelled) == (39, 14)
    assert (stats.labels.num_classes, stats.labels.unused) == (None, [])
    assert stats.shuffle == quality_of([found[0] if found else int(NO_LABEL) for found in labels])
    assert stats.images.widths_px == dict.fromkeys(stats.images.widths_px, 60)
    assert (stats.images.heights_px["min"], stats.images.heights_px["max"]) == (8, 47)
    assert "0.97 per image; 14 images have none" in format_stats(stats)


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    make_shardset(tmp_path, [11, 7, 5])
    reports: list[tuple[int, int]] = []
    stats = gather_stats(LocalPlace(tmp_path), workers=2, on_progress=lambda *numbers: reports.append(numbers))
    assert stats == stats_of(tmp_path)
    assert reports == [(11, 23), (18, 23), (23, 23)]


@pytest.mark.parametrize("most", [1, 2, 7, 22, 23, 100])
def test_images_are_spread_evenly(tmp_path: Path, most: int) -> None:
    make_shardset(tmp_path, [11, 7, 5], parts=lambda n: {"png": image_bytes(n, hw=(n + 1, n + 1)), "cls": b"0"})
    images = stats_of(tmp_path, max_images=most).images
    assert images.num_images == min(most, 23)
    places = [side - 1 for side in images.short_sides_px]
    assert places == [int((i + 0.5) * 23 / min(most, 23)) for i in range(min(most, 23))]


def test_bad_images_are_counted(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path, [11, 7])
    overwrite(manifest, 4, "png", b"no image at all")
    stats = stats_of(tmp_path)
    assert (stats.images.num_images, stats.images.num_bad) == (18, 1)
    assert stats_warnings(stats)[-1] == ("1 of 18 images have no readable header; 'vitscale shards verify' names them")


VERIFY = "'vitscale shards verify' names all faults"


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        stats_of(folder)
    return str(caught.value)


def test_a_bad_label(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path, [11, 7])
    overwrite(manifest, 14, "cls", b"x")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}/train-000001.tar: sample 3: at byte ")
    assert "sample_00014.cls: unreadable label: ValueError(" in message
    assert message.endswith(VERIFY)


@pytest.mark.parametrize("label", [b"10", b"4294967295", b"99999999999999999999"])
def test_a_label_beyond_the_classes(tmp_path: Path, label: bytes) -> None:
    make_shardset(tmp_path, [3], parts=lambda n: {"png": image_bytes(n), "cls": label})
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: label ") or ": sample 0: " in message
    assert message.endswith(VERIFY)


def test_damaged_sets(tmp_path: Path) -> None:
    make_shardset(tmp_path, [3, 3])
    idx = (tmp_path / "train-000001.idx").read_text().splitlines(keepends=True)
    (tmp_path / "train-000001.idx").write_text("".join(idx[:-1]))
    assert refusal(tmp_path) == (f"{tmp_path}/train-000001.idx: lists 2 samples where index.json says 3; {VERIFY}")
    (tmp_path / "train-000001.idx").write_text("".join([*idx, idx[-1]]))
    assert refusal(tmp_path).endswith(VERIFY)
    (tmp_path / "train-000001.idx").write_text("".join([*idx[:-1], "png -5 3 a.png cls 9 -1 a.cls\n"]))
    assert "a member is said to begin at byte -5" in refusal(tmp_path)
    (tmp_path / "train-000001.idx").write_text("".join([*idx[:-1], "png 512 -3 a.png cls 1024 -1 a.cls\n"]))
    assert "a.cls has -1 bytes" in refusal(tmp_path)
    (tmp_path / "train-000001.tar").unlink()
    assert "No such file" in refusal(tmp_path)
    (tmp_path / "index.json").unlink()
    assert refusal(tmp_path) == (
        f"{tmp_path}/index.json: missing; a shard set has one, which is written last: was the writing ended?"
    )


def test_tars_that_lie_elsewhere(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path, [3])
    content = Manifest(str(tmp_path), manifest.shards, base_url="https://host/set").to_json()
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert refusal(tmp_path).startswith(f"{tmp_path}: its tars lie in https://host/set, but only tars beside the")


def sorted_parts(number: int) -> Parts:
    return {"png": image_bytes(number), "cls": str(number // 4).encode()}


def test_report(tmp_path: Path) -> None:
    make_shardset(tmp_path, [20, 20], parts=sorted_parts, classes=11)
    text = format_stats(stats_of(tmp_path))
    lines = text.splitlines()
    assert lines[0] == f"{tmp_path}  (split train, from -)"
    assert lines[1].startswith("  40 samples in 2 shards, ")
    assert "Labels: 40, of 10 of 11 classes" in lines
    assert f"  0 class 0    4  {'█' * 40}" in lines
    assert "  10 class 10  0" in lines
    assert "Images: 40 looked at, evenly spread; png 100.0%" in lines
    assert f"  8 - 15  40  {'█' * 40}" in lines
    assert text.split("WARNING: ")[1:] == [
        "the labels are sorted: 10 neighbouring samples have 43% of the classes that they would have by chance; "
        f"shuffle the set with 'vitscale shards write {tmp_path} OUT'\n\n",
        "1 of 11 classes have no image: class 10",
    ]


def test_report_of_many_classes(tmp_path: Path) -> None:
    """Class n has n images, 0 <= n < 25."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(25), np.arange(25)))
    make_shardset(tmp_path, [300], parts=lambda n: {"png": image_bytes(0), "cls": str(labels[n]).encode()}, classes=25)
    stats = stats_of(tmp_path)
    lines = format_stats(stats).splitlines()
    at = lines.index("  Number of classes by their images")
    assert [line.split()[0] for line in lines[at - 11 : at]] == [
        *map(str, range(24, 19, -1)),
        "...",
        *map(str, range(4, -1, -1)),
    ]
    table = {line[2:9].strip(): int(line[9:].split()[0]) for line in lines[at + 1 : at + 7]}
    assert table == {"0": 1, "1": 1, "2 - 4": 3, "5 - 9": 5, "10 - 19": 10, "20 - 49": 5}
    assert stats_warnings(stats) == ["1 of 25 classes have no image: class 0"]


def test_json(tmp_path: Path) -> None:
    make_shardset(tmp_path, [20, 20], parts=sorted_parts, classes=11)
    content = json.loads(json.dumps(stats_of(tmp_path).to_json()))
    assert content["labels"]["counts"] == {str(label): 4 for label in range(10)}
    assert content["labels"]["unused"] == [10]
    assert content["shuffle"]["is_sorted"] is True
    assert content["images"]["widths_px"]["median"] == 12
    assert "short_sides_px" not in content["images"]


def test_class_names_cannot_disturb_the_terminal(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path, [3], parts=lambda n: {"png": image_bytes(n), "cls": b"0"}, classes=1)
    content = manifest.to_json()
    content["vitscale"]["classes"] = ["\x1b[31m" + "long " * 20]
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert r"  0 \x1b[31mlong long lon...  3  " in format_stats(stats_of(tmp_path))
