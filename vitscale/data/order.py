"""The order of samples: a pure function of (seed, epoch, index), the same for any number of ranks and workers.

Each epoch permutes the shards and lays them end to end as one tape of N samples. The tape is cut into L *lanes*
that are read side by side; a lane walks its stretch in *windows* of w samples, each permuted by its own seed.
Global position p is index p % N of epoch p // N; index i is draw i // L of lane i % L. A window is one
contiguous range of a tar (or of a few, at borders), so reading stays sequential while L * w samples are mixed.

The only state of a run's data order is one integer, the number of positions already delivered.
Permutations are argsorts of 64-bit hashes, so that they do not change with the version of a random generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# Places outside its window that are tried for a bad sample. If all are bad, that is no accident.
FAR_SUBSTITUTES = 64


def hash64(*parts: int) -> int:
    """Mix non-negative integers into 64 bits (splitmix64 finaliser, Steele et al. 2014)."""
    value = 0
    for part in parts:
        value = _mix((value ^ (part & _MASK)) + _GOLDEN)
    return value


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permutation(length: int, *key: int) -> NDArray[np.int64]:
    """A permutation of ``range(length)`` that depends on ``key`` only."""
    values = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(hash64(*key))
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(values ^ (values >> np.uint64(31)), kind="stable").astype(np.int64)


class SampleRef(NamedTuple):
    """One sample of a shard set: number of its shard, and its place in that shard."""

    shard: int
    sample: int


class WindowId(NamedTuple):
    """Names one window of one lane of one epoch. ``part`` is the shard set of a mixture."""

    epoch: int
    lane: int
    number: int
    part: int = 0

    @property
    def key(self) -> tuple[int, int, int]:
        """What the randomness of a window depends on, within its set."""
        return self[:3]


class Place(NamedTuple):
    """Where a position lies: the window, and the draw within it."""

    window: WindowId
    offset: int


class Order(Protocol):
    """What the stream and the loader need to know of an order."""

    replaces_bad: bool
    """Whether a bad sample is replaced by a substitute, or masked out."""

    def locate(self, position: int) -> Place:
        """The window and the draw of a global position."""

    def window(self, window: WindowId) -> list[SampleRef]:
        """The samples of a window in the order of their draws; together they are contiguous on the tape."""

    def substitutes(self, place: Place) -> Iterator[Place]:
        """Where to look for a good sample when the one at ``place`` is bad, in order."""


@dataclass(frozen=True)
class _Tape:
    """One epoch's shards laid end to end."""

    shards: NDArray[np.int64]
    ends: NDArray[np.int64]

    def refs(self, places: NDArray[np.int64]) -> list[SampleRef]:
        slots = np.searchsorted(self.ends, places, side="right")
        starts = np.where(slots > 0, self.ends[slots - 1], 0)
        return [
            SampleRef(shard, sample)
            for shard, sample in zip(self.shards[slots].tolist(), (places - starts).tolist(), strict=True)
        ]


def _build_tape(sizes: NDArray[np.int64], seed: int, epoch: int) -> _Tape:
    shards = permutation(len(sizes), seed, epoch)
    return _Tape(shards, np.cumsum(sizes[shards]))


class SampleOrder:
    """The training order over a shard set.

    Args:
        shard_sizes: samples of every shard.
        seed: seed of all permutations.
        lanes: L, stretches that are read side by side; divides the global batch size.
        window: w, samples that are shuffled among themselves.
    """

    replaces_bad = True

    def __init__(self, shard_sizes: list[int], *, seed: int, lanes: int, window: int) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self._sizes.sum())
        self.seed, self.lanes, self.window_size = seed, lanes, window
        every = np.arange(lanes)
        self._lane_starts = every * (self.num_samples // lanes) + np.minimum(every, self.num_samples % lanes)
        self._tape = lru_cache(maxsize=2)(partial(_build_tape, self._sizes, seed))

    def locate(self, position: int) -> Place:
        """The window and the draw of a global position."""
        epoch, index = divmod(position, self.num_samples)
        draw, lane = divmod(index, self.lanes)
        first = self._first_window(lane)
        if draw < first:
            return Place(WindowId(epoch, lane, 0), draw)
        number, offset = divmod(draw - first, self.window_size)
        return Place(WindowId(epoch, lane, number + 1), offset)

    def window(self, window: WindowId) -> list[SampleRef]:
        """The samples of a window in the order of their draws."""
        start, end = self._bounds(window)
        places = self._lane_starts[window.lane] + start + permutation(end - start, self.seed, *window.key)
        return self._tape(window.epoch).refs(places)

    def substitutes(self, place: Place) -> Iterator[Place]:
        """The rest of the window, wrapping around; then places that a hash picks from the whole epoch.

        The rule knows nothing of ranks or workers, so a bad sample has the same substitute everywhere. A whole
        shard may be bad, and the lanes beside with it, so places farther away are not the neighbouring ones.
        """
        window, offset = place
        length = self._length(window)
        yield from (Place(window, (offset + k) % length) for k in range(1, length))
        start = window.epoch * self.num_samples
        for k in range(FAR_SUBSTITUTES):
            yield self.locate(start + hash64(self.seed, *window.key, offset, k) % self.num_samples)

    def next_uses(self, position: int, mine: NDArray[np.bool_]) -> NDArray[np.float64]:
        """How soon each shard is needed again by some of the slots, for whoever must choose what to keep at hand.

        Within a lane, samples count as drawn in the order of the tape; the shuffling of a window is left out.

        Args:
            position: the next one to be drawn.
            mine: by slot, whether it counts. Slot s draws at the positions p with p % len(mine) == s, and the number
                of slots is a multiple of the number of lanes.

        Returns:
            Positions from ``position`` on, by shard; infinite if this epoch and the next one do not need it.
        """
        first_epoch = position // self.num_samples
        epochs = [self._next_uses(epoch, position, mine) for epoch in (first_epoch, first_epoch + 1)]
        return np.minimum(*epochs)

    def _next_uses(self, epoch: int, position: int, mine: NDArray[np.bool_]) -> NDArray[np.float64]:
        lanes, tape, start = np.arange(self.lanes), self._tape(epoch), epoch * self.num_samples
        mine_by_lane = np.logical_or.reduce(mine.reshape(-1, self.lanes))[(start + lanes) % self.lanes]
        # Cut the tape where a shard or a lane begins: each piece is of one shard and of one lane.
        cuts = np.union1d(tape.ends[:-1], self._lane_starts[: self.num_samples])
        shard = tape.shards[np.searchsorted(tape.ends, cuts, side="right")]
        lane = np.searchsorted(self._lane_starts, cuts, side="right") - 1
        first_draw = cuts - self._lane_starts[lane]
        end_draw = np.append(cuts[1:], self.num_samples) - self._lane_starts[lane]
        current_draw = np.maximum(0, -(-(position - start - lane) // self.lanes))
        draw = np.maximum(first_draw, current_draw)
        needed = mine_by_lane[lane] & (draw < end_draw)
        uses = np.full(len(self._sizes), np.inf)
        np.minimum.at(uses, shard[needed], (start + draw * self.lanes + lane - position)[needed].astype(np.float64))
        return uses

    def _first_window(self, lane: int) -> int:
        # Neighbouring lanes belong to one rank; staggered first windows spread their reads over the steps.
        return 1 + lane % self.window_size

    def _lane_length(self, lane: int) -> int:
        return (self.num_samples - lane + self.lanes - 1) // self.lanes

    def _bounds(self, window: WindowId) -> tuple[int, int]:
        first = self._first_window(window.lane)
        start = 0 if window.number == 0 else first + (window.number - 1) * self.window_size
        end = start + (first if window.number == 0 else self.window_size)
        return start, min(end, self._lane_length(window.lane))

    def _length(self, window: WindowId) -> int:
        start, end = self._bounds(window)
        return end - start


class SequentialOrder:
    """Every sample once, in the order of the tars: for evaluation and feature extraction."""

    replaces_bad = False

    def __init__(self, shard_sizes: list[int], *, window: int) -> None:
        self.num_samples = sum(shard_sizes)
        self._tape = _Tape(np.arange(len(shard_sizes)), np.cumsum(np.asarray(shard_sizes, dtype=np.int64)))
        self._window = window

    def locate(self, position: int) -> Place:
        """The window and the draw of a position below ``num_samples``."""
        number, offset = divmod(position, self._window)
        return Place(WindowId(0, 0, number), offset)

    def window(self, window: WindowId) -> list[SampleRef]:
        """The samples of a window, unshuffled."""
        start = window.number * self._window
        return self._tape.refs(np.arange(start, min(start + self._window, self.num_samples)))

    def substitutes(self, place: Place) -> Iterator[Place]:
        """None: a bad sample is masked out, never replaced, when each sample is to be counted once."""
        return iter(())


def train_positions(
    step: int, micro_step: int, *, rank: int, world_size: int, micro_batch_size: int, global_batch_size: int
) -> list[int | None]:
    """Global positions of one micro-batch of one rank. All ranks and micro-steps of a step make its global batch."""
    start = step * global_batch_size + (micro_step * world_size + rank) * micro_batch_size
    return list(range(start, start + micro_batch_size))


def evaluation_positions(
    num_samples: int, *, rank: int, world_size: int, batch_size: int
) -> Iterator[list[int | None]]:
    """Batches of one rank that together with the other ranks' cover every sample once.

    Every rank yields the same number of full batches; ``None`` is padding.
    """
    per_round = world_size * batch_size
    for round_start in range(0, num_samples, per_round):
        start = round_start + rank * batch_size
        yield [p if p < num_samples else None for p in range(start, start + batch_size)]
