"""Which images may have a duplicate at all. Only of these are keys, paths and full digests read into memory.

Every image has a code of 64 bits: the start of its digest, or its perceptual hash. Codes are all that is in memory of
the other images: 8 bytes each, 16 to 24 while they are sorted and compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vitscale.errors import DataError
from vitscale_shards.dedup.fingerprint_sets import SCHEMA, FingerprintSet
from vitscale_shards.dedup.hamming import Hashes, near_pairs
from vitscale_shards.dedup.settings import DedupSettings, Match
from vitscale_shards.progress import Advance

MAX_NEAR_PAIRS = 20_000_000

_DIGEST_COLUMN = {"bytes": "bytes_sha256", "pixels": "pixels_sha256", "near": "pixels_sha256"}


@dataclass(frozen=True)
class Counts:
    """Images of one source."""

    images: int
    unreadable: int
    plain: int
    """Without a perceptual hash: compared by their pixels only."""


@dataclass(frozen=True)
class Candidates:
    """What may have a duplicate, and the pairs of different perceptual hashes that are near each other."""

    table: pa.Table
    """Columns of the fingerprints, and ``set``: the position of the image's set, 0 for the source. First the source's
    images by key, then the held-out ones in the order of their sets."""

    num_source: int
    near: tuple[Hashes, Hashes]


def count_images(images: FingerprintSet, match: Match) -> Counts:
    """Count the images of a set."""
    num_images = unreadable = plain = 0
    for table in images.tables(only=["reason", "dct_hash"]):
        num_images += len(table)
        unreadable += len(table) - table["reason"].null_count
        plain += table["dct_hash"].null_count
    return Counts(num_images, unreadable, plain - unreadable if match == "near" else 0)


def find_candidates(
    source: FingerprintSet,
    against: Sequence[FingerprintSet],
    settings: DedupSettings,
    *,
    advance: Advance,
) -> Candidates:
    """Find the images that may have a duplicate.

    Raises:
        DataError: more pairs of hashes are near each other than fit into memory.
    """
    match, within = settings.match, settings.within
    exact, hashes = _sorted_codes([source], match)
    held_exact, held_hashes = _sorted_codes(against, match)
    wanted_exact = _shared(exact, held_exact, within=within)
    wanted_hashes = _shared(hashes, held_hashes, within=within)
    near = _near(_distinct(hashes), _distinct(held_hashes), settings, advance)
    wanted_hashes = np.unique(np.concatenate([wanted_hashes, *near]))

    tables = [
        _concat(_chosen(images, number, match, wanted_exact, wanted_hashes))
        for number, images in enumerate([source, *against])
    ]
    tables[0] = tables[0].sort_by("key")
    return Candidates(_concat(tables), len(tables[0]), near)


def _chosen(
    images: FingerprintSet, number: int, match: Match, wanted_exact: Hashes, wanted_hashes: Hashes
) -> Iterator[pa.Table]:
    for table in images.tables():
        codes, is_exact, readable = _codes(table, match)
        wanted = np.where(is_exact, _is_in(codes, wanted_exact), _is_in(codes, wanted_hashes)) & readable
        table = table.filter(pa.array(wanted)).replace_schema_metadata(None)
        yield table.append_column("set", pa.array(np.full(len(table), number), pa.int64()))


def _concat(tables: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables([SCHEMA.append(pa.field("set", pa.int64())).empty_table(), *tables]).combine_chunks()


def _codes(table: pa.Table, match: Match) -> tuple[Hashes, NDArray[np.bool_], NDArray[np.bool_]]:
    """Code of each image, whether it is the start of a digest, and whether the image is readable at all."""
    readable = table["reason"].is_null().to_numpy()
    codes = _starts(table[_DIGEST_COLUMN[match]].combine_chunks())
    if match != "near":
        return codes, readable, readable
    plain = table["dct_hash"].is_null().to_numpy()
    hashes = table["dct_hash"].fill_null(0).to_numpy()
    return np.where(plain, codes, hashes), plain & readable, readable


def _starts(digests: pa.FixedSizeBinaryArray) -> Hashes:
    """The first 8 of the 32 bytes of each; anything where there is none."""
    numbers = np.frombuffer(digests.buffers()[1], dtype="<u8").reshape(-1, 4)
    return numbers[digests.offset : digests.offset + len(digests), 0].astype(np.uint64)


def _sorted_codes(sets: Sequence[FingerprintSet], match: Match) -> tuple[Hashes, Hashes]:
    """Codes of readable images: starts of digests, and perceptual hashes."""
    exact: list[Hashes] = [np.zeros(0, np.uint64)]
    hashes: list[Hashes] = [np.zeros(0, np.uint64)]
    for images in sets:
        for table in images.tables(only=["reason", "dct_hash", _DIGEST_COLUMN[match]]):
            codes, is_exact, readable = _codes(table, match)
            exact.append(codes[is_exact])
            hashes.append(codes[readable & ~is_exact])
    return _sort(exact), _sort(hashes)


def _sort(parts: list[Hashes]) -> Hashes:
    codes = np.concatenate(parts)
    parts.clear()
    codes.sort()
    return codes


def _distinct(ascending: Hashes) -> Hashes:
    first = np.ones(len(ascending), dtype=bool)
    first[1:] = ascending[1:] != ascending[:-1]
    distinct: Hashes = ascending[first]
    return distinct


def _shared(ascending: Hashes, held_ascending: Hashes, *, within: bool) -> Hashes:
    """Codes that several images have, if that matters."""
    both = held_ascending[_is_in(held_ascending, ascending)]
    repeated = ascending[1:][ascending[1:] == ascending[:-1]] if within else both[:0]
    return np.unique(np.concatenate([both, repeated]))


def _is_in(codes: Hashes, ascending: Hashes) -> NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(codes), dtype=bool)
    found: NDArray[np.bool_] = ascending[np.minimum(np.searchsorted(ascending, codes), len(ascending) - 1)] == codes
    return found


def _near(hashes: Hashes, held_hashes: Hashes, settings: DedupSettings, advance: Advance) -> tuple[Hashes, Hashes]:
    """Pairs of different hashes within the radius, at least one of them the source's, or exactly one if not within."""
    only_held = held_hashes[~_is_in(held_hashes, hashes)]
    union = np.concatenate([hashes, only_held])
    del hashes
    union.sort()
    found: list[tuple[Hashes, Hashes]] = [(union[:0], union[:0])]
    num_found = 0

    def tell(done: int, of: int) -> None:
        advance("comparing", len(union) * done // of, len(union))

    for first, second in near_pairs(union, settings.radius, progress=tell):
        in_source = [~_is_in(side, only_held) for side in (first, second)]
        held_out = [_is_in(side, held_hashes) for side in (first, second)]
        matters = (in_source[0] & held_out[1]) | (held_out[0] & in_source[1])
        if settings.within:
            matters |= in_source[0] & in_source[1]
        found.append((first[matters], second[matters]))
        num_found += int(matters.sum())
        if num_found > MAX_NEAR_PAIRS:
            raise DataError(
                f"radius {settings.radius}: more than {MAX_NEAR_PAIRS:,} pairs of hashes are that near; so many do not "
                f"fit into memory, and few can be duplicates: give a smaller radius"
            )
    return np.concatenate([first for first, _ in found]), np.concatenate([second for _, second in found])
