"""Which images are left out, and because of which: against rules applied to each pair of images in plain Python."""

import hashlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.errors import DataError
from vitscale_shards.dedup.candidates import Candidates, count_images, find_candidates
from vitscale_shards.dedup.decisions import KINDS, Decisions, decide
from vitscale_shards.dedup.fingerprint_sets import SCHEMA, FingerprintSet
from vitscale_shards.dedup.settings import DedupSettings
from vitscale_shards.sources.digits import Digits

Match = Literal["bytes", "pixels", "near"]


class Image(NamedTuple):
    """An image by what is alike of it: the same look, of that the same pixels, of those the same bytes."""

    look: int | None
    pixels: int = 0
    data: int = 0
    readable: bool = True

    @property
    def pixels_sha256(self) -> bytes:
        return hashlib.sha256(repr((self.look, self.pixels)).encode()).digest()

    @property
    def bytes_sha256(self) -> bytes:
        return hashlib.sha256(repr((self.look, self.pixels, self.data)).encode()).digest()


def fingerprint_set(folder: Path, name: str, images: Sequence[Image], per_chunk: int = 8) -> FingerprintSet:
    """A set on disk whose keys do not ascend in the order of its images."""
    folder.mkdir()
    keys = [f"{name}-{i * 37 % 101:03d}-{i}" for i in range(len(images))]
    chunks = range(0, len(images), per_chunk)
    for number, start in enumerate(chunks):
        rows = [
            {
                "key": key,
                "labels": [0],
                "path": key.encode(),
                "num_bytes": 1,
                "bytes_sha256": image.bytes_sha256 if image.readable else None,
                "pixels_sha256": image.pixels_sha256 if image.readable else None,
                "dct_hash": image.look if image.readable else None,
                "reason": None if image.readable else "broken",
            }
            for key, image in zip(keys[start : start + per_chunk], images[start : start + per_chunk], strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / f"chunk-{number:06d}.parquet")
    return FingerprintSet(name, Digits(), folder, len(chunks))


def search(
    folder: Path, source: Sequence[Image], against: Sequence[Sequence[Image]], chosen: DedupSettings
) -> tuple[Candidates, Decisions]:
    sets = [fingerprint_set(folder / f"s{i}", f"s{i}", images) for i, images in enumerate([source, *against])]
    candidates = find_candidates(sets[0], sets[1:], chosen, advance=lambda what, done, total: None)
    return candidates, decide(candidates, chosen)


def likeness(a: Image, b: Image, match: Match, radius: int) -> tuple[int, int] | None:
    """How far apart two images are, smaller is closer, and the position of the kind; None if they do not match."""
    if a.bytes_sha256 == b.bytes_sha256:
        return 0, KINDS.index("bytes")
    if match != "bytes" and a.pixels_sha256 == b.pixels_sha256:
        return 0, KINDS.index("pixels")
    if match == "near" and a.look is not None and b.look is not None and (a.look ^ b.look).bit_count() <= radius:
        return (a.look ^ b.look).bit_count(), KINDS.index("near")
    return None


# Few bits: many are the same, and each has neighbours at every distance.
LOOKS = st.sampled_from([None, *range(1, 16), 0x1F, 0xFF])
IMAGES = st.builds(Image, LOOKS, st.integers(0, 1), st.integers(0, 1), st.sampled_from([True] * 9 + [False]))


@given(
    st.lists(IMAGES, min_size=1, max_size=20),
    st.lists(st.lists(IMAGES, max_size=8), max_size=2),
    st.sampled_from(["bytes", "pixels", "near"]),
    st.integers(0, 3),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_decisions_follow_the_rules(
    source: list[Image], against: list[list[Image]], match: Match, radius: int, within: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        candidates, decisions = search(Path(folder), source, against, DedupSettings(match, radius, within))
    all_sets = [source, *against]
    by_key = {
        f"s{n}-{i * 37 % 101:03d}-{i}": image for n, images in enumerate(all_sets) for i, image in enumerate(images)
    }
    by_key = {key: image for key, image in by_key.items() if image.readable}
    mine = sorted(key for key in by_key if key.startswith("s0"))
    held_out = [key for key in by_key if not key.startswith("s0")]

    def matching(key: str, others: list[str]) -> dict[str, tuple[int, int]]:
        found = {other: likeness(by_key[key], by_key[other], match, radius) for other in others if other != key}
        return {other: like for other, like in found.items() if like is not None}

    expected_held = {key for key in mine if matching(key, held_out)}
    kept: list[str] = []
    for key in mine:
        if key not in expected_held and not (within and matching(key, kept)):
            kept.append(key)
    keys = candidates.table["key"].to_pylist()
    own_keys = keys[: candidates.num_source]
    assert {own_keys[i] for i in np.flatnonzero(decisions.matches_held_out)} == expected_held
    assert {own_keys[i] for i in np.flatnonzero(decisions.repeated)} == set(mine) - expected_held - set(kept)

    pairs = [(keys[a], keys[b]) for a, b in zip(decisions.first, decisions.second, strict=True)]
    assert len(set(pairs)) == len(pairs)
    for (first, second), kind, bits in zip(pairs, decisions.kind, decisions.distance, strict=True):
        assert likeness(by_key[first], by_key[second], match, radius) == (bits, kind)
        assert second in held_out if first in expected_held else second in kept

    def closest(found: dict[str, tuple[int, int]]) -> tuple[int, int]:
        return min(found.values(), key=lambda like: (like[0], -like[1]))

    of_pair = dict(zip(pairs, zip(decisions.distance, decisions.kind, strict=True), strict=True))
    for key in set(mine) - set(kept):
        allowed = matching(key, held_out if key in expected_held else kept)
        assert closest(allowed) in [like for (first, _), like in of_pair.items() if first == key]
    for key in held_out:
        if allowed := matching(key, mine):
            assert closest(allowed) in [like for (_, second), like in of_pair.items() if second == key]
    doubt = [(-bits, kind) for bits, kind in zip(decisions.distance, decisions.kind, strict=True)]
    assert doubt == sorted(doubt)


def test_chains_are_not_followed(tmp_path: Path) -> None:
    """By key: a is near b, b is near c, but c is not near a."""
    chosen = DedupSettings(radius=2)
    candidates, decisions = search(tmp_path, [Image(0b1), Image(0b111), Image(0b11111)], [], chosen)
    left_out = [candidates.table["key"][i].as_py() for i in np.flatnonzero(decisions.repeated)]
    assert left_out == ["s0-037-1"]


def test_an_image_is_paired_with_the_closest_that_is_kept(tmp_path: Path) -> None:
    chosen = DedupSettings(radius=2)
    _, decisions = search(tmp_path, [Image(0b1011), Image(0b1100), Image(0b1000)], [], chosen)
    assert (decisions.first.tolist(), decisions.second.tolist(), decisions.distance.tolist()) == ([2], [1], [1])


def test_without_a_search_within_only_what_is_held_out_matters(tmp_path: Path) -> None:
    source = [Image(0b1), Image(0b11), Image(0b1, pixels=1), Image(0xFF00), Image(0xFF01), Image(0xFF00)]
    chosen = DedupSettings(radius=1, within=False)
    candidates, decisions = search(tmp_path, source, [[Image(0b111), Image(0b110)]], chosen)
    assert candidates.table["key"].to_pylist() == ["s0-037-1", "s1-000-0"]
    assert len(candidates.near[0]) == 1
    assert decisions.matches_held_out.tolist() == [True]


def test_a_hundred_thousand_images_with_one_hash_are_one_group(tmp_path: Path) -> None:
    images = [Image(0xABC, pixels) for pixels in range(100_000)]
    sets = [fingerprint_set(tmp_path / "s", "s", images, per_chunk=10_000)]
    start = time.perf_counter()
    candidates = find_candidates(sets[0], [], DedupSettings(), advance=lambda what, done, total: None)
    decisions = decide(candidates, DedupSettings())
    assert len(decisions.first) == 99_999
    assert set(decisions.second.tolist()) == {0}
    assert time.perf_counter() - start < 5


def test_too_many_near_pairs_are_an_error_not_a_full_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale_shards.dedup.candidates.MAX_NEAR_PAIRS", 20)
    images = [Image(look) for look in range(1, 16)]
    search(tmp_path, images[:6], [], DedupSettings(radius=4))
    fingerprints = fingerprint_set(tmp_path / "more", "more", images)
    with pytest.raises(DataError, match=r"radius 4: more than 20 pairs .* give a smaller radius"):
        find_candidates(fingerprints, [], DedupSettings(radius=4), advance=lambda what, done, total: None)


def test_counts(tmp_path: Path) -> None:
    images = [Image(1), Image(None), Image(None, readable=False), Image(2)]
    counts = count_images(fingerprint_set(tmp_path / "s", "s", images), "near")
    assert (counts.images, counts.unreadable, counts.plain) == (4, 1, 1)


@pytest.mark.parametrize("radius", [-1, 13])
def test_a_radius_that_makes_no_sense_is_refused(radius: int) -> None:
    with pytest.raises(DataError, match=rf"radius {radius}: 0 to 12 are allowed"):
        DedupSettings(radius=radius)
