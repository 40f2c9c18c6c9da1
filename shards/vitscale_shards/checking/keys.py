"""Find keys that occur more than once among hundreds of millions, with 8 bytes of memory for each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
_PASSES_BITS = 4


def hash_keys(keys: Sequence[str]) -> Hashes:
    """64-bit hashes of keys. Equal ones do not prove equal keys: of n keys, about n^2 / 2^65 pairs collide."""
    digests = (hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def find_repeated(shards: Sequence[Hashes], *, limit: int) -> tuple[list[list[tuple[int, int]]], int]:
    """Places of hashes that occur more than once.

    Args:
        shards: the hashes of the samples of each shard, in order.
        limit: most hashes whose places are wanted.

    Returns:
        For each of the first repeated hashes its places (shard, sample) in order; and how many hashes are repeated.
    """
    repeated = [_repeated_in_range(shards, top) for top in range(1 << _PASSES_BITS)]
    values = np.concatenate(repeated)[:limit]
    places: dict[int, list[tuple[int, int]]] = {int(value): [] for value in values}
    if places:
        for shard, hashes in enumerate(shards):
            for sample in np.flatnonzero(np.isin(hashes, values)):
                places[int(hashes[sample])].append((shard, int(sample)))
    return sorted(places.values()), sum(map(len, repeated))


def _repeated_in_range(shards: Sequence[Hashes], top: int) -> Hashes:
    """Those that begin with the bits ``top``: sorting one range at a time keeps the copy small."""
    shift = np.uint64(64 - _PASSES_BITS)
    parts = [hashes[hashes >> shift == top] for hashes in shards]
    values = np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
    return np.unique(values[1:][values[1:] == values[:-1]])
