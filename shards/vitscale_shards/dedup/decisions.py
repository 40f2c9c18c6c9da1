"""Which images to leave out, and because of which other image each.

1. An image of the source that matches a held-out one is left out.
2. Of those that are left, by ascending key, an image is left out if it matches one that is kept.

So no image that is kept matches a held-out one or another kept one, and every image that is left out matches one that
is held out or kept. (Chains are not followed: if b is near a and c, but c is not near a, then a and c are both kept.)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vitscale_shards.dedup.candidates import Candidates
from vitscale_shards.dedup.hamming import Hashes, distance
from vitscale_shards.dedup.settings import DedupSettings, Match

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
NONE = -1
KINDS = ("near", "pixels", "bytes")
"""How two images are alike; a pair has the last kind that holds for it."""


@dataclass(frozen=True)
class Decisions:
    """Pairs of images, the least alike first, and which images are left out. An image is its place among the
    candidates."""

    first: Ints
    """An image of the source that is left out."""

    second: Ints
    """What it matches: a held-out image, or one of the source that is kept. Every image that is left out is paired
    with the closest, and every held-out image that is matched with the closest of the source."""

    kind: Ints
    """Position in ``KINDS``."""

    distance: Ints
    """Bits in which the perceptual hashes differ; 0 for the other kinds."""

    matches_held_out: Bools
    """For each image of the source: left out because of a held-out one."""

    repeated: Bools
    """For each image of the source: left out because of another one of the source."""


@dataclass(frozen=True)
class _Images:
    """The candidates as numbers. Images with the same id in a level are alike in that way; finest level first."""

    levels: list[Ints]
    """Of the bytes, the pixels, and the look, as far as they are compared. The last one are the *groups*."""

    hashes: Hashes
    """Perceptual hashes, 0 for images without."""

    num_source: int

    @property
    def groups(self) -> Ints:
        return self.levels[-1]


@dataclass(frozen=True)
class _Edges:
    """Pairs of groups that are near each other, in both directions."""

    start: Ints
    end: Ints
    distance: Ints

    def closest(self, allowed: Bools, first_image: Ints) -> Ints:
        """For each group the closest allowed one, of several that with the first image; NONE if there is none."""
        use = np.flatnonzero(allowed[self.end])
        order = use[np.lexsort((first_image[self.end[use]], self.distance[use], self.start[use]))]
        starts, places = np.unique(self.start[order], return_index=True)
        closest = np.full(len(allowed), NONE)
        closest[starts] = self.end[order[places]]
        return closest


def decide(candidates: Candidates, settings: DedupSettings) -> Decisions:
    """Apply the two rules; the second one only if duplicates within the source are looked for."""
    images = _number(candidates, settings.match)
    edges = _edges(images, candidates.near)
    source = np.arange(images.num_source)
    held_out = np.arange(images.num_source, len(images.groups))

    closest_held = _closest(images, edges, source, held_out)
    closest_source = _closest(images, edges, held_out, source)
    matches_held_out = closest_held != NONE
    matched = closest_source != NONE
    pairs = [
        np.stack([source, closest_held], 1)[matches_held_out],
        np.stack([closest_source, held_out], 1)[matched],
    ]
    repeated = np.zeros(images.num_source, dtype=bool)
    if settings.within:
        rest = source[~matches_held_out]
        kept = _keep(images, edges, rest)
        left_out = np.setdiff1d(rest, kept)
        repeated[left_out] = True
        pairs.append(np.stack([left_out, _closest(images, edges, left_out, kept)], 1))
    first, second = np.unique(np.concatenate(pairs), axis=0).T
    kind, bits = _likeness(images, first, second)
    order = np.lexsort((second, first, kind, -bits))
    return Decisions(first[order], second[order], kind[order], bits[order], matches_held_out, repeated)


def _number(candidates: Candidates, match: Match) -> _Images:
    table = candidates.table
    levels = [_ids(table["bytes_sha256"])]
    if match != "bytes":
        levels.append(_ids(table["pixels_sha256"]))
    hashes = table["dct_hash"].fill_null(0).to_numpy()
    if match == "near":
        # Images too plain for a hash are alike if their pixels are; their ids follow those of the hashes.
        plain = table["dct_hash"].is_null().to_numpy()
        ids = _ids(table["dct_hash"].fill_null(0))
        levels.append(np.where(plain, len(ids) + levels[-1], ids))
    return _Images(levels, hashes, candidates.num_source)


def _ids(column: pa.ChunkedArray) -> Ints:
    """Equal values have equal ids, which are smaller than the number of values."""
    ids: Ints = column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    return ids


def _edges(images: _Images, near: tuple[Hashes, Hashes]) -> _Edges:
    hashes, places = np.unique(images.hashes, return_index=True)
    first, second = (images.groups[places[np.searchsorted(hashes, side)]] for side in near)
    bits = distance(*near).astype(np.int64)
    return _Edges(np.concatenate([first, second]), np.concatenate([second, first]), np.concatenate([bits, bits]))


def _first(ids: Ints, images: Ints) -> Ints:
    """For each id the first of the images (ascending) that has it, or NONE."""
    first = np.full(2 * len(ids), NONE)
    first[ids[images[::-1]]] = images[::-1]  # the last one that is assigned stays
    return first


def _closest(images: _Images, edges: _Edges, queries: Ints, targets: Ints) -> Ints:
    """For each query the first of the targets at the finest level at which there is one, or NONE."""
    closest = np.full(len(queries), NONE)
    for ids in images.levels:
        first = _first(ids, targets)
        closest = np.where(closest == NONE, first[ids[queries]], closest)
    # ``first`` is now that of each group.
    near_group = edges.closest(first != NONE, first)[images.groups[queries]]
    near = np.where(near_group == NONE, NONE, first[near_group])
    return np.where(closest == NONE, near, closest)


def _keep(images: _Images, edges: _Edges, rest: Ints) -> Ints:
    """Images of ``rest``, ascending, of which no two match, each the first that could be kept after those before."""
    first = _first(images.groups, rest)
    kept = first != NONE
    order = np.lexsort((edges.start, first[edges.start]))
    starts, ends = edges.start[order], edges.end[order]
    borders = [0, *(np.flatnonzero(starts[1:] != starts[:-1]) + 1), len(starts)]
    for begin, end in itertools.pairwise(borders):
        if begin < end and kept[starts[begin]]:
            kept[ends[begin:end]] = False
    return np.sort(first[kept])


def _likeness(images: _Images, first: Ints, second: Ints) -> tuple[Ints, Ints]:
    """Kind and distance of pairs."""
    kind = np.zeros(len(first), dtype=np.int64)
    for name, ids in zip(("bytes", "pixels"), images.levels, strict=False):
        kind = np.where((kind == 0) & (ids[first] == ids[second]), KINDS.index(name), kind)
    bits = distance(images.hashes[first], images.hashes[second]).astype(np.int64)
    return kind, np.where(kind == 0, bits, 0)
