"""Parts of shard sets against one list of all samples that is built in full, and what is read of them."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.bad_http import BadServer
from tests.helpers.shardset import folder_of, key_of, make_shardset, overwrite
from vitscale.config.schema import DataConfig, StorageConfig
from vitscale.data import shard_set
from vitscale.data.manifest import Manifest, ShardInfo, parse_manifest
from vitscale.data.order import SampleOrder, SequentialOrder, WindowId
from vitscale.data.parts import check_disjoint, counts_among_first, split_part, take_part
from vitscale.data.shard_set import open_shard_set, open_source, open_training_data
from vitscale.data.storage.transfer import host_counters
from vitscale.data.stream import Fault, RawSample, ShardStream
from vitscale.errors import DataError

SIZES = [7, 1, 20, 3, 12]
SHUFFLED = "shuffled"
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)
bounds = st.one_of(st.just(""), st.integers(0, 12).map(str), st.decimals(0, 100, places=2).map(lambda n: f"{n}%"))


def manifest_of(shard_sizes: list[int], order: str | None = SHUFFLED) -> Manifest:
    shards = tuple(ShardInfo(f"{number}.tar", size, 100 * size) for number, size in enumerate(shard_sizes))
    return Manifest("set", shards, order=order)


def as_written(shard_sizes: list[int]) -> list[tuple[str, int]]:
    """All samples in the order of the list that parts are stretches of."""
    places = [
        (Fraction(2 * sample + 1, 2 * size), tar, sample)
        for tar, size in enumerate(shard_sizes)
        for sample in range(size)
    ]
    return [(f"{tar}.tar", sample) for _, tar, sample in sorted(places)]


def held(manifest: Manifest) -> list[tuple[str, int]]:
    """Name of the tar and place in there of every sample."""
    return [
        (shard.name, sample)
        for shard in manifest.shards
        for sample in range(shard.first_sample, shard.first_sample + shard.num_samples)
    ]


def part_of(manifest: Manifest, part: str) -> Manifest | None:
    """None if it holds no sample."""
    try:
        return take_part(manifest, part)
    except DataError as error:
        if "so it holds none" in str(error) or "is more than all" in str(error):
            return None
        raise


def refusal(location: str) -> str:
    with pytest.raises(DataError) as caught:
        open_shard_set(location)
    return str(caught.value)


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_the_first_samples_are_those_of_the_list(shard_sizes: list[int]) -> None:
    listed = as_written(shard_sizes)
    for number in range(len(listed) + 1):
        expected = [sum(name == f"{tar}.tar" for name, _ in listed[:number]) for tar in range(len(shard_sizes))]
        assert counts_among_first(shard_sizes, number) == expected


@settings(max_examples=300, deadline=None)
@given(sizes, bounds, bounds)
def test_a_part_is_a_stretch_of_the_list(shard_sizes: list[int], start: str, stop: str) -> None:
    part = part_of(manifest_of(shard_sizes), f"[{start}:{stop}]")
    if part is not None:
        total = sum(shard_sizes)

        def position(text: str, default: int) -> int:
            return int(Fraction(text[:-1]) * total / 100) if text.endswith("%") else int(text or default)

        assert sorted(held(part)) == sorted(as_written(shard_sizes)[position(start, 0) : position(stop, total)])
        assert part.num_samples == position(stop, total) - position(start, 0)
        assert all(shard.num_in_tar == shard_sizes[int(shard.name.removesuffix(".tar"))] for shard in part.shards)


@settings(max_examples=200, deadline=None)
@given(sizes, st.lists(st.integers(0, 100), min_size=1, max_size=5).map(sorted))
def test_neighbouring_parts_make_up_the_set_and_larger_ones_hold_smaller_ones(
    shard_sizes: list[int], percents: list[int]
) -> None:
    edges = [0, *percents, 100]
    parts = [part_of(manifest_of(shard_sizes), f"[{a}%:{b}%]") for a, b in itertools.pairwise(edges)]
    together = [sample for part in parts if part is not None for sample in held(part)]
    assert sorted(together) == sorted(held(manifest_of(shard_sizes)))
    nested = [part_of(manifest_of(shard_sizes), f"[:{percent}%]") for percent in edges]
    samples = [set() if part is None else set(held(part)) for part in nested]
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(samples))


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 100), st.integers(0, 100))
def test_parts_of_parts(shard_sizes: list[int], percent: int, cut: int) -> None:
    whole = part_of(manifest_of(shard_sizes), f"[:{percent}%]")
    if whole is not None:
        both = [part_of(whole, bounds) for bounds in (f"[:{cut}%]", f"[{cut}%:]")]
        pieces = [piece for piece in both if piece is not None]
        assert sorted(sample for piece in pieces for sample in held(piece)) == sorted(held(whole))
        assert sum(piece.num_samples for piece in pieces) == whole.num_samples
        known = {f"{tar}.tar": size for tar, size in enumerate(shard_sizes)}
        assert all(shard.num_in_tar == known[shard.name] for piece in pieces for shard in piece.shards)


@pytest.mark.parametrize("percent", [1, 10, 37, 98])
def test_every_tar_gives_its_share(percent: int) -> None:
    shard_sizes = [1000 + number % 2 for number in range(300)]
    counts = counts_among_first(shard_sizes, sum(shard_sizes) * percent // 100)
    assert all(abs(count - size * percent / 100) <= 1 for count, size in zip(counts, shard_sizes, strict=True))
    assert sum(counts) == sum(shard_sizes) * percent // 100


def test_parts_of_a_billion_samples_are_exact() -> None:
    shard_sizes = [10_000 - number % 7 for number in range(100_000)]
    for number in (1, 12_345_678, sum(shard_sizes) - 1):
        assert sum(counts_among_first(shard_sizes, number)) == number


def test_a_part_is_known_by_what_it_holds() -> None:
    whole = manifest_of(SIZES)
    assert take_part(whole, "[:]") is whole
    assert take_part(whole, "[0%:100%]") is whole
    assert take_part(whole, "[:43]") is whole
    half, rest = take_part(whole, "[:50%]"), take_part(whole, "[50%:]")
    assert len({whole.digest, half.digest, rest.digest}) == 3
    assert half.digest == take_part(whole, "[0:21]").digest
    assert half.shown == "set[:50%]"
    assert (half.classes, half.split, half.plan) == (whole.classes, whole.split, whole.plan)
    assert half.num_bytes + rest.num_bytes == pytest.approx(whole.num_bytes, abs=2 * len(SIZES))
    # Tars that are left out play no part, tars that are taken whole are those of the set.
    (only,) = take_part(manifest_of([1, 1]), "[:1]").shards
    assert only == ShardInfo("0.tar", 1, 100)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("a/train", ("a/train", None)),
        ("a/train[:98%]", ("a/train", "[:98%]")),
        ("s3://bucket/set[10%:20%]", ("s3://bucket/set", "[10%:20%]")),
        ("https://host/set?sig=a[b][5:]", ("https://host/set?sig=a[b]", "[5:]")),
        ("http://[::1]/set", ("http://[::1]/set", None)),
        ("http://[::1]", ("http://[::1]", None)),
        ("http://[::1]/set[:]", ("http://[::1]/set", "[:]")),
        ("a/train[:50%][100:]", ("a/train[:50%]", "[100:]")),
        ("sets[2012]", ("sets[2012]", None)),
        ("sets[:5]/train", ("sets[:5]/train", None)),
        ("train[98%]", ("train", "[98%]")),
    ],
)
def test_where_a_part_is_named(location: str, expected: tuple[str, str | None]) -> None:
    assert split_part(location) == expected


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("[98%]", "a part is written [FROM:TO], as in [:98%], [98%:] or [500:1000]; there is no ':'"),
        ("[:x]", "'x' is no bound of a part; a number of samples (500) or a percentage (98%) is"),
        ("[-5:]", "'-5' is no bound of a part"),
        ("[:0.5]", "'0.5' is no bound of a part"),
        ("[:1:2]", "'1:2' is no bound of a part"),
        ("[:101%]", "101% is more than all 43 samples of the set; give at most 43 or 100%"),
        ("[:44]", "44 is more than all 43 samples"),
        ("[10:10]", "goes from sample 10 to sample 10 of 43, so it holds none; widen it"),
        ("[50%:10]", "goes from sample 21 to sample 10 of 43"),
        ("[:1%]", "goes from sample 0 to sample 0 of 43"),
    ],
)
def test_no_such_part(part: str, reason: str, tmp_path: Path) -> None:
    location = f"{make_shardset(tmp_path / 'train', SIZES).location}{part}"
    assert refusal(location).startswith(f"{location}: {reason}")


def test_a_part_of_nothing() -> None:
    assert refusal("[:5]") == "[:5]: a part of nothing; write the folder or URL of the shard set before it"
    assert refusal("nowhere[:5]").startswith("nowhere: no such shard set")


def test_a_part_of_a_set_that_may_be_sorted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=r"^set\[:5\]: the set was written in the order of its source \(--order source"):
        take_part(manifest_of(SIZES, "source"), "[:5]")
    location = make_shardset(tmp_path / "train", SIZES).location
    with caplog.at_level(logging.WARNING):
        open_shard_set(f"{location}[:]")
        assert not caplog.records
        open_shard_set(f"{location}[:5]")
    (record,) = caplog.records
    assert f"{location}[:5]: the index does not say that the set was shuffled" in record.getMessage()


def test_an_index_says_how_the_set_was_ordered() -> None:
    for order in ("shuffled", "stratified", "source", None):
        content = manifest_of(SIZES, order).to_json()
        assert ("order" in content["vitscale"]) == (order is not None)
        assert replace(manifest_of(SIZES), order=order).to_json() == content
        assert parse_manifest(json.dumps(content), "set").order == order


@pytest.fixture
def written(tmp_path: Path) -> Manifest:
    return make_shardset(tmp_path / "train", SIZES, sha256=True)


def in_order(manifest: Manifest, storage: StorageConfig = shard_set.DEFAULT_STORAGE) -> list[RawSample | Fault]:
    order = SequentialOrder([shard.num_samples for shard in manifest.shards], window=8)
    stream = ShardStream([open_source(manifest, storage)], order)
    return [sample for n in range(-(-manifest.num_samples // 8)) for sample in stream.read_window(WindowId(0, 0, n))]


def numbers(manifest: Manifest) -> list[int]:
    """Numbers of a part's samples in the whole set."""
    first = {f"train-{tar:06d}.tar": sum(SIZES[:tar]) for tar in range(len(SIZES))}
    return [first[name] + sample for name, sample in held(manifest)]


@pytest.mark.parametrize("part", ["[:50%]", "[50%:]", "[10:30]", "[42:]", "[:]", "[10:30][5:]", "[50%:][50%:][1:]"])
def test_what_is_read_of_a_part(written: Manifest, part: str) -> None:
    manifest = open_shard_set(f"{written.location}{part}")
    samples, whole = in_order(manifest), in_order(written)
    assert [sample.key for sample in samples] == [key_of(number) for number in numbers(manifest)]
    assert [sample.sample_id for sample in samples] == list(range(manifest.num_samples))
    for sample, number in zip(samples, numbers(manifest), strict=True):
        known = whole[number]
        assert isinstance(sample, RawSample)
        assert isinstance(known, RawSample)
        assert sample._replace(sample_id=number) == known


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32))
def test_every_sample_of_a_part_once_in_an_epoch(
    shared_set: Manifest, start: int, lanes: int, window: int, seed: int
) -> None:
    manifest = take_part(shared_set, f"[{start}%:]")
    shard_sizes = [shard.num_samples for shard in manifest.shards]
    order = SampleOrder(shard_sizes, seed=seed, lanes=lanes, window=window)
    stream = ShardStream([open_source(manifest)], order)
    for epoch in (0, 1):
        positions = range(epoch * manifest.num_samples, (epoch + 1) * manifest.num_samples)
        drawn = [stream.read_sample(order.locate(position)) for position in positions]
        assert sorted(sample.key for sample in drawn) == [key_of(number) for number in numbers(manifest)]


@pytest.fixture(scope="module")
def shared_set(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return replace(make_shardset(tmp_path_factory.mktemp("sets") / "train", SIZES), order=SHUFFLED)


def test_faults_name_places_of_the_whole_tar(written: Manifest) -> None:
    overwrite(written, 20, "cls", b"x")
    manifest = open_shard_set(f"{written.location}[50%:]")
    (fault,) = (sample for sample in in_order(manifest) if isinstance(sample, Fault))
    assert (fault.key, fault.sample_id) == (key_of(20), numbers(manifest).index(20))
    (folder_of(written) / "train-000004.idx").write_text("v1.2 1\ncls 512 1 a.cls\n")
    keys = [sample.key for sample in in_order(manifest) if sample.shard == "train-000004.tar"]
    assert keys == [f"train-000004[{place}]" for place in range(6, 12)]


def test_parts_in_a_mixture(written: Manifest) -> None:
    location = written.location
    data = DataConfig(train={f"{location}[:50%]": 1.0, f"{location}[50%:]": 3.0}, image_size=8)
    mixture = open_training_data(data, global_batch_size=8)
    assert {part.manifest.shown: part.slots for part in mixture.parts} == {
        f"{location}[:50%]": 2,
        f"{location}[50%:]": 6,
    }
    twice = DataConfig(train={f"{location}[:21]": 1.0, f"{location}[:50%]": 1.0}, image_size=8)
    with pytest.raises(DataError, match="holds the same shards as"):
        open_training_data(twice, global_batch_size=8)


def shared(train: Manifest, test: Manifest) -> int:
    """Images that the refusal counts; 0 if there is none."""
    try:
        check_disjoint(train, test)
    except DataError as error:
        found = re.search(r": (\d+) of its (\d+) images are learnt from", str(error))
        assert found is not None
        assert int(found[2]) == test.num_samples
        return int(found[1])
    return 0


@settings(max_examples=200, deadline=None)
@given(sizes, bounds, bounds, bounds, bounds)
def test_images_that_two_parts_share_are_counted(shard_sizes: list[int], a: str, b: str, c: str, d: str) -> None:
    one, other = (part_of(manifest_of(shard_sizes), f"[{start}:{stop}]") for start, stop in ((a, b), (c, d)))
    if one is not None and other is not None:
        common = len(set(held(one)) & set(held(other)))
        assert shared(one, other) == shared(other, one) == common


def test_a_tar_is_known_by_its_content_or_by_its_place(written: Manifest, tmp_path: Path) -> None:
    def with_digests(manifest: Manifest, *digests: str | None) -> Manifest:
        shards = (replace(shard, sha256=digest) for shard, digest in zip(manifest.shards, digests, strict=True))
        return replace(manifest, shards=tuple(shards))

    here, there = manifest_of([4, 6]), replace(manifest_of([4, 6]), location="elsewhere")
    assert shared(here, there) == 0, "without digests nothing tells"
    assert shared(here, replace(there, base_url=str(Path("set").resolve()))) == 10
    assert shared(with_digests(here, "a", "b"), with_digests(there, "b", "c")) == 4
    assert shared(with_digests(here, "a", "b"), with_digests(there, None, "b")) == 6
    assert shared(with_digests(here, "a", None), with_digests(here, None, "b")) == 10
    # Images that the training set holds twice are counted once.
    assert shared(with_digests(here, "a", "a"), take_part(with_digests(there, "a", "c"), "[:50%]")) == 2
    link = tmp_path / "link"
    link.symlink_to(folder_of(written))
    opened = open_shard_set(f"{link}[:20%]")
    assert shared(open_shard_set(written.location), opened) == opened.num_samples > 0
    with pytest.raises(DataError, match=r"SET\[:80%\] to learn from and SET\[80%:\] to test"):
        check_disjoint(open_shard_set(written.location), opened)


@pytest.fixture
def server(written: Manifest) -> Iterator[BadServer]:
    served = BadServer()
    served.files = {path.name: path.read_bytes() for path in folder_of(written).iterdir()}
    yield served
    served.stop()


def test_parts_of_a_remote_set_share_their_tars_in_the_cache(
    written: Manifest, server: BadServer, tmp_path: Path
) -> None:
    storage = StorageConfig(cache=tmp_path / "cache")
    half, rest = (open_shard_set(f"{server.url}{part}", storage) for part in ("[:50%]", "[50%:]"))
    assert in_order(half, storage) == in_order(open_shard_set(f"{written.location}[:50%]"))
    in_order(open_shard_set(server.url, storage), storage)
    asked = sum(counters.requests for counters in host_counters().values())
    assert [sample.key for sample in in_order(rest, storage)] == [key_of(number) for number in numbers(rest)]
    assert sum(counters.requests for counters in host_counters().values()) == asked


def test_only_the_tars_of_a_part_are_needed(written: Manifest, server: BadServer) -> None:
    assert [shard.name for shard in open_shard_set(f"{written.location}[:3]").shards] == [
        "train-000000.tar",
        "train-000002.tar",
        "train-000004.tar",
    ]
    del server.files["train-000001.tar"]
    assert open_shard_set(f"{server.url}[:3]").num_samples == 3
    assert "train-000001.tar is missing" in refusal(server.url)
