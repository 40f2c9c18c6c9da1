"""How well the labels of a set are shuffled in the order in which they are stored, as a number.

A window of w neighbouring samples of a well shuffled set holds almost as many different labels as w samples drawn at
random without replacement. If images of one class lie together, it holds fewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.uint32]
NO_LABEL = np.uint32(0xFFFF_FFFF)
"""First label of a sample that has none; such samples are a class of their own here."""

MAX_WINDOW = 4096
CLUMPED_BELOW = 0.9
"""Quality under which a warning is due. Measured on 100,000 samples (1,000 equal classes; Zipf's law gives nearly the
same): random permutations 1.000 +- 0.002; a sorted set 0.02; sorted, then through a shuffle buffer of a hundredth, a
tenth, half of the set 0.09, 0.43, 0.91; images of one class in pairs, in fours 0.62, 0.35; only the last tenth, fifth
of the set sorted 0.92, 0.82; sorted, cut into 10 shards and shuffled within them 0.16."""
NUM_STANDARD_ERRORS = 3.0
"""A small set of few windows must be further than this from 1, too."""

_LABELS_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class ShuffleQuality:
    """What was measured."""

    window: int
    """Samples per window: as many as labels are in use, but 2 to 4,096 and no more than there are samples."""

    num_windows: int
    """Windows side by side; what is left of the set at its end is not used."""

    quality: float
    """Mean number of different labels in a window, over the mean for random permutations of the same labels: 1 is as
    good as random, 0.01 is sorted."""

    standard_error: float
    """How far from 1 chance takes the quality of a random permutation, at most (one standard deviation)."""

    neighbours: float | None
    """How much more often two neighbours have the same label than by chance; None if they never do by chance."""

    is_sorted: bool
    """Whether every label has one run of samples, and there are at least two labels of several samples."""

    @property
    def is_clumped(self) -> bool:
        """Whether equal labels lie closer together than in a shuffled set, beyond chance."""
        return 1 - self.quality > max(1 - CLUMPED_BELOW, NUM_STANDARD_ERRORS * self.standard_error)


def measure_shuffle(shards: Sequence[Labels]) -> ShuffleQuality | None:
    """Measure the order of the first labels of all samples, shard after shard; None for fewer than two samples."""
    num_samples = sum(map(len, shards))
    if num_samples < 2:
        return None
    counts = _counts(shards)
    window = min(max(2, min(MAX_WINDOW, len(counts))), num_samples)
    num_windows = num_samples // window
    distinct = np.concatenate([_num_distinct(block, window) for block in _blocks(shards, window)])
    expected, variance = distinct_by_chance(counts, window)
    changes = _num_changes(shards)
    by_chance = float(np.sum(counts * (counts - 1.0)) / (num_samples * (num_samples - 1.0)))
    return ShuffleQuality(
        window=window,
        num_windows=num_windows,
        quality=float(distinct.mean()) / expected,
        standard_error=(variance / num_windows) ** 0.5 / expected,
        neighbours=(1 - changes / (num_samples - 1)) / by_chance if by_chance else None,
        is_sorted=changes == len(counts) - 1 and int(np.sum(counts > 1)) > 1,
    )


def distinct_by_chance(counts: NDArray[np.int64], window: int) -> tuple[float, float]:
    """Different labels among ``window`` samples drawn without replacement: the mean, and a bound of the variance.

    A label of c among n samples is missed with probability C(n - c, w) / C(n, w), which is the product of
    1 - c / (n - i) over i < w; the sum of its logarithms keeps its digits where factorials would lose them. Having one
    label leaves less room for others, so that the variances of single labels add up to more than that of their number.

    Args:
        counts: samples of each label.
    """
    num_samples = int(counts.sum())
    sizes, how_many = np.unique(counts, return_counts=True)
    log_missed = np.zeros(len(sizes))
    with np.errstate(divide="ignore"):  # -inf where too few other samples are left to fill the window
        for i in range(window):
            log_missed += np.log1p(-np.minimum(sizes / (num_samples - i), 1.0))
    found = -np.expm1(log_missed)
    return float(np.sum(how_many * found)), float(np.sum(how_many * found * (1 - found)))


def _counts(shards: Sequence[Labels]) -> NDArray[np.int64]:
    """Samples of each label in use."""
    total: dict[int, int] = {}
    for labels in shards:
        for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
            total[int(label)] = total.get(int(label), 0) + int(count)
    return np.array(list(total.values()), np.int64)


def _blocks(shards: Iterable[Labels], window: int) -> Iterator[Labels]:
    """The labels end to end in pieces of whole windows; what is left at the end is dropped."""
    held: list[Labels] = []
    for labels in shards:
        held.append(labels)
        if sum(map(len, held)) >= _LABELS_AT_A_TIME:
            block = np.concatenate(held)
            stop = len(block) - len(block) % window
            yield block[:stop]
            held = [block[stop:]]
    block = np.concatenate(held)
    yield block[: len(block) - len(block) % window]


def _num_distinct(block: Labels, window: int) -> NDArray[np.int64]:
    """Different labels in each window."""
    rows = np.sort(block.reshape(-1, window), axis=1)
    changes: NDArray[np.int64] = np.count_nonzero(rows[:, 1:] != rows[:, :-1], axis=1)
    return changes + 1


def _num_changes(shards: Iterable[Labels]) -> int:
    """How often a sample has another label than the one before it."""
    changes, last = 0, np.zeros(0, np.uint32)
    for labels in shards:
        joined = np.concatenate([last, labels])
        changes += int(np.count_nonzero(joined[1:] != joined[:-1]))
        last = joined[-1:]
    return changes
