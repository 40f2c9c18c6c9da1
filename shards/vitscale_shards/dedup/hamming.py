"""All pairs of 64-bit hashes that differ in few bits, without comparing each with each.

The hashes are cut into m parts. Two of them that differ in at most r bits agree in at least m - r whole parts. So for
each choice of m - r parts the hashes are sorted by these, and only those that agree in them are compared (G. Manku,
A. Jain, A. Das Sarma, "Detecting Near-Duplicates for Web Crawling", WWW 2007, section 3).

With n hashes this takes C(m, r) sorts, O(n log n) each, and about C(m, r) * n**2 / 2**(64 * (m - r) / m + 1)
comparisons; m is chosen for the smallest sum. Memory: 16 bytes per hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_BITS = 64
_BLOCK = 1 << 18  # hashes whose comparisons are in memory at a time; they fit into the cache
# Measured on a 64-bit server core: what sorting costs per hash, in comparisons.
_SORT_COST = 10.0


def near_pairs(
    hashes: Hashes, radius: int, *, progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[Hashes, Hashes]]:
    """Pairs of different hashes whose Hamming distance is at most ``radius``, each once, in blocks of pairs.

    Args:
        hashes: each value once, in any order.
        progress: told how many of how many sorted orders are done.
    """
    if radius == 0 or len(hashes) < 2:
        return
    parts = _parts(len(hashes), radius)
    choices = list(combinations(range(len(parts)), len(parts) - radius))
    for done, choice in enumerate(choices):
        yield from _pairs_agreeing(hashes, parts, choice, radius)
        if progress is not None:
            progress(done + 1, len(choices))


def distance(first: Hashes, second: Hashes) -> NDArray[np.uint8]:
    """Number of bits in which hashes differ, element by element."""
    bits: NDArray[np.uint8] = np.bitwise_count(first ^ second)
    return bits


def _parts(num_hashes: int, radius: int) -> list[tuple[int, int]]:
    """Lowest bit and width of each part, from the highest bits down, for the cheapest number of parts."""

    def cost(num_parts: int) -> float:
        agreeing_bits = _BITS * (num_parts - radius) / num_parts
        return comb(num_parts, radius) * (_SORT_COST + num_hashes / 2 ** (agreeing_bits + 1))

    num_parts = min(range(radius + 1, radius + 5), key=cost)
    edges = [_BITS * i // num_parts for i in range(num_parts + 1)]
    return [(_BITS - high, high - low) for low, high in pairwise(edges)]


def _pairs_agreeing(
    hashes: Hashes, parts: Sequence[tuple[int, int]], choice: tuple[int, ...], radius: int
) -> Iterator[tuple[Hashes, Hashes]]:
    """Near pairs that agree in the chosen parts, unless an earlier choice has them too."""
    order = [*choice, *(i for i in range(len(parts)) if i not in choice)]
    shuffled = np.empty_like(hashes)
    for start in range(0, len(hashes), _BLOCK):
        shuffled[start : start + _BLOCK] = _join(hashes[start : start + _BLOCK], [parts[i] for i in order])
    shuffled.sort()
    widths = [parts[i][1] for i in order]
    lows = [sum(widths[i + 1 :]) for i in range(len(widths))]
    back = [(lows[order.index(i)], parts[i][1]) for i in range(len(parts))]
    # Choices come in lexicographic order. The first that has a pair is its first agreeing parts: a part before the
    # last chosen one that agrees without being chosen means that the pair has been found already.
    earlier = [back[i] for i in range(choice[-1]) if i not in choice]
    agreeing = np.uint64(1 << (_BITS - sum(parts[i][1] for i in choice)))
    for start in range(0, len(shuffled), _BLOCK):
        for first, second in _compare(shuffled, start, agreeing, radius):
            fresh = np.ones(len(first), dtype=bool)
            for low, width in earlier:
                fresh &= _cut(first ^ second, low, width) != 0
            if fresh.any():
                yield _join(first[fresh], back), _join(second[fresh], back)


def _compare(ascending: Hashes, start: int, agreeing: np.uint64, radius: int) -> Iterator[tuple[Hashes, Hashes]]:
    """Near pairs of a hash in one block and one behind it. Two agree in the chosen, leading parts if their difference
    is below ``agreeing``; as the hashes ascend, one that disagrees with the n-th behind it does so with all further."""
    at = np.arange(start, min(start + _BLOCK, len(ascending) - 1))
    step = 1
    while len(at):
        first, second = ascending[at], ascending[at + step]
        difference = first ^ second
        near = (difference < agreeing) & (np.bitwise_count(difference) <= radius)
        if near.any():
            yield first[near], second[near]
        step += 1
        at = at[difference < agreeing]
        at = at[: np.searchsorted(at, len(ascending) - step)]


def _cut(hashes: Hashes, low: int, width: int) -> Hashes:
    return (hashes >> np.uint64(low)) & np.uint64((1 << width) - 1)


def _join(hashes: Hashes, parts: Sequence[tuple[int, int]]) -> Hashes:
    """The hashes with their bits in another order: the parts one after the other, the first one highest."""
    joined = np.zeros_like(hashes)
    for low, width in parts:
        joined = (joined << np.uint64(width)) | _cut(hashes, low, width)
    return joined
