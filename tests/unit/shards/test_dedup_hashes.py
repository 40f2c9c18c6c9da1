"""The perceptual hash against its definition, and the search for near hashes against comparing each with each."""

import io
import math
import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from vitscale_shards.dedup.hamming import distance, near_pairs
from vitscale_shards.dedup.perceptual import dct_hash

HASHES = st.integers(0, 2**64 - 1)


def photo(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Something with structure everywhere, as photographs have: smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def bits_apart(first: int | None, second: int | None) -> int:
    assert first is not None
    assert second is not None
    return (first ^ second).bit_count()


def test_the_hash_is_that_of_the_definition() -> None:
    image = photo(0).convert("L").resize((32, 32))
    pixels = np.asarray(image).astype(float)
    coefficients = []
    for u in range(1, 9):
        for v in range(1, 9):
            rows = [math.cos(math.pi * (2 * y + 1) * u / 64) for y in range(32)]
            columns = [math.cos(math.pi * (2 * x + 1) * v / 64) for x in range(32)]
            coefficients.append(float(np.outer(rows, columns).ravel() @ pixels.ravel()))
    middle = float(np.median(coefficients))
    assert min(abs(c - middle) for c in coefficients) > 1.0, "no bit of this image is in doubt"
    bits = "".join("1" if c > middle else "0" for c in coefficients)
    assert dct_hash(image) == int(bits, 2)


def test_the_hash_is_the_same_on_every_machine() -> None:
    grey = np.array(
        [[(37 * (x // 3) + 91 * (y // 4) + 53 * (x // 5) * (y // 3)) % 256 for x in range(32)] for y in range(32)],
        dtype=np.uint8,
    )
    assert dct_hash(Image.fromarray(grey)) == 0x9A36160B34F5CA76


@pytest.mark.parametrize("seed", range(5))
def test_what_looks_alike_has_a_near_hash(seed: int) -> None:
    image = photo(seed, (400, 300))
    original = dct_hash(image)
    assert bits_apart(dct_hash(as_jpeg(image, 75)), original) <= 4
    assert bits_apart(dct_hash(image.resize((200, 150))), original) <= 4
    assert bits_apart(dct_hash(image.convert("L")), original) <= 4
    assert bits_apart(dct_hash(photo(seed + 100)), original) > 12
    assert bits_apart(dct_hash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), original) > 12


def plain_images() -> dict[str, Image.Image]:
    white = Image.new("RGB", (300, 200), "white")
    halves, disc = white.copy(), white.copy()
    ImageDraw.Draw(halves).rectangle((0, 0, 300, 100), fill="black")
    ImageDraw.Draw(disc).ellipse((100, 50, 200, 150), fill="black")
    gradient = Image.fromarray(np.tile(np.linspace(0, 255, 300).astype(np.uint8), (200, 1)))
    noise = Image.fromarray(np.random.default_rng(0).normal(128, 1, (200, 300)).astype(np.uint8))
    dot = Image.new("L", (1, 1), 77)
    return {"white": white, "halves": halves, "disc": disc, "gradient": gradient, "faint noise": noise, "dot": dot}


@pytest.mark.parametrize("name", plain_images())
def test_plain_images_have_no_hash(name: str) -> None:
    assert dct_hash(plain_images()[name]) is None


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (8, 8), (3000, 40)])
def test_images_of_odd_shapes_are_borne(size: tuple[int, int]) -> None:
    value = dct_hash(photo(1, size))
    assert value is None or 0 < value < 2**64


def found(hashes: np.ndarray, radius: int) -> list[tuple[int, int]]:
    pairs = [
        tuple(sorted((int(a), int(b))))
        for first, second in near_pairs(hashes, radius)
        for a, b in zip(first, second, strict=True)
    ]
    assert len(pairs) == len(set(pairs)), "a pair was found twice"
    return sorted(pairs)


def brute_force(hashes: np.ndarray, radius: int) -> list[tuple[int, int]]:
    values = sorted(int(value) for value in hashes)
    return [(a, b) for a, b in combinations(values, 2) if (a ^ b).bit_count() <= radius]


@given(
    st.sets(HASHES, max_size=12),
    st.lists(st.tuples(st.integers(0, 11), st.sets(st.integers(0, 63), max_size=9))),
    st.integers(0, 8),
)
@settings(max_examples=150, deadline=None)
def test_near_pairs_are_those_of_comparing_each_with_each(
    base: set[int], changes: list[tuple[int, set[int]]], radius: int
) -> None:
    values = set(base)
    for number, flipped in changes:
        if base:
            value = sorted(base)[number % len(base)]
            values.add(value ^ sum(1 << bit for bit in flipped))
    hashes = np.array(sorted(values), dtype=np.uint64)
    assert found(hashes, radius) == brute_force(hashes, radius)


@pytest.mark.parametrize("radius", [1, 2, 4, 7, 12])
def test_near_pairs_of_many_hashes_in_clusters(radius: int) -> None:
    """Enough for several blocks, several numbers of parts, and long runs that agree in some part."""
    rng = np.random.default_rng(radius)
    centres = rng.integers(0, 2**64, 40, dtype=np.uint64)
    flips = np.uint64(1) << rng.integers(0, 64, (2000, 6), dtype=np.uint64)
    masks = np.bitwise_or.reduce(np.where(rng.random((2000, 6)) < 0.6, flips, np.uint64(0)), axis=1)
    hashes = np.unique(rng.choice(centres, 2000) ^ masks)
    hashes = np.unique(np.concatenate([hashes, hashes[:300] & np.uint64(0xFFFFFFFF)]))
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])
    first, second = np.nonzero(np.triu(bits <= radius, 1))
    expected = sorted((int(hashes[a]), int(hashes[b])) for a, b in zip(first, second, strict=True))
    assert len(expected) > 100
    assert found(hashes, radius) == expected


def test_blocks_do_not_hide_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale_shards.dedup.hamming._BLOCK", 7)
    hashes = np.unique(np.random.default_rng(0).integers(0, 1 << 12, 300, dtype=np.uint64))
    assert found(hashes, 3) == brute_force(hashes, 3)


def test_progress_of_the_search_ends_complete() -> None:
    told: list[tuple[int, int]] = []
    list(near_pairs(np.arange(5, dtype=np.uint64), 2, progress=lambda done, of: told.append((done, of))))
    assert [done for done, _ in told] == list(range(1, told[0][1] + 1))


def test_distance_counts_bits() -> None:
    first = np.array([0, 1, 2**64 - 1], dtype=np.uint64)
    assert distance(first, np.array([0, 2, 0], dtype=np.uint64)).tolist() == [0, 2, 64]


def test_a_hundred_thousand_hashes_take_no_pass_over_all_pairs() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    start = time.perf_counter()
    list(near_pairs(hashes, 4))
    assert time.perf_counter() - start < 5  # comparing each with each takes minutes
