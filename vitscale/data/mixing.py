"""Several shard sets in one run: every global batch has the same number of images of each of them.

A slot of the global batch belongs to one set for the whole run, so which set serves a position is a table lookup, each
set keeps its own order and its own epochs, and the state of a run stays one integer. A run on a single set is the
mixture of one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitscale.data.manifest import Manifest, check_same_classes
from vitscale.data.order import Place, SampleOrder, SampleRef, WindowId, hash64
from vitscale.errors import ConfigError, DataError

# Salt that keeps the permutations of the sets of a mixture apart.
MIXTURE = 0x313


@dataclass(frozen=True)
class Part:
    """A shard set of a mixture, and how many images of each global batch are its own."""

    manifest: Manifest
    slots: int


@dataclass(frozen=True)
class Mixture:
    """What a run is trained on: one shard set, or several with fixed shares of every global batch."""

    parts: tuple[Part, ...]

    @classmethod
    def create(cls, manifests: Sequence[Manifest], weights: Sequence[float], *, global_batch_size: int) -> Mixture:
        """Give each set the slots that its weight comes to. Only contents count, not places or the order of naming.

        Raises:
            ConfigError: a weight comes to no slot.
            DataError: two are the same set, or a label means one thing in a set and another in the next.
        """
        pairs = sorted(zip(manifests, weights, strict=True), key=lambda pair: pair[0].digest)
        for (earlier, _), (manifest, _) in itertools.combinations(pairs, 2):
            if manifest.digest == earlier.digest:
                raise DataError(f"{manifest.shown}: holds the same shards as {earlier.shown}; name each set once")
            check_same_classes(manifest, earlier.classes, of=earlier.shown)
        slots = apportion([weight for _, weight in pairs], global_batch_size)
        return cls(tuple(Part(manifest, count) for (manifest, _), count in zip(pairs, slots, strict=True)))

    @property
    def manifests(self) -> list[Manifest]:
        """The shard sets."""
        return [part.manifest for part in self.parts]

    @property
    def num_samples(self) -> int:
        """Images of all sets. An epoch of the run is as many draws; each set has epochs of its own besides."""
        return sum(manifest.num_samples for manifest in self.manifests)

    @property
    def num_shards(self) -> int:
        """Tars of all sets."""
        return sum(len(manifest.shards) for manifest in self.manifests)

    @property
    def bytes_per_image(self) -> float:
        """Of the tars, as the mixture draws from them."""
        of_batch = sum(part.slots * part.manifest.num_bytes / part.manifest.num_samples for part in self.parts)
        return of_batch / sum(part.slots for part in self.parts)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the labels, by the set that names the most of them."""
        named = [manifest.classes for manifest in self.manifests if manifest.classes is not None]
        return max(named, key=len, default=None)

    @property
    def digest(self) -> str:
        """Identity of the content and of its order: that of the set, or of all sets and their slots."""
        if len(self.parts) == 1:
            return self.parts[0].manifest.digest
        rows = [[part.manifest.digest, part.slots] for part in self.parts]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def apportion(weights: Sequence[float], slots: int) -> list[int]:
    """Share out the slots of a batch by weight: largest remainder (Hamilton 1792); of equals, the first comes first.

    Raises:
        ConfigError: a weight comes to no slot.
    """
    quotas = [weight / sum(weights) * slots for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda k: counts[k] - quotas[k])
    for k in by_remainder[: slots - sum(counts)]:
        counts[k] += 1
    if 0 in counts:
        smallest = min(weights)
        raise ConfigError(
            f"data.train: weight {smallest:g} of {sum(weights):g} comes to no image of a global batch of {slots}; give "
            f"each set a weight of at least 1/{slots} of the sum, or raise global_batch_size"
        )
    return counts


class MixedOrder:
    """The training order over the shard sets of a mixture.

    Shards are numbered through all sets. Implements :class:`vitscale.data.order.Order`.

    Args:
        mixture: the sets and their slots.
        seed: seed of all permutations.
        lanes: lanes of a single set, which divide its slots; of a mixture each slot is a lane.
        window: samples that are shuffled among themselves.
    """

    replaces_bad = True

    def __init__(self, mixture: Mixture, *, seed: int, lanes: int, window: int) -> None:
        counts = [part.slots for part in mixture.parts]
        self._slots = counts
        self.num_slots = sum(counts)
        self._orders = [
            SampleOrder(
                [shard.num_samples for shard in part.manifest.shards],
                seed=seed if number == 0 else hash64(seed, MIXTURE, number),
                lanes=lanes if len(counts) == 1 else part.slots,
                window=window,
            )
            for number, part in enumerate(mixture.parts)
        ]
        self._first_shards = np.cumsum([0, *(len(manifest.shards) for manifest in mixture.manifests)]).tolist()
        self._owners = interleave(counts)
        # By slot, its set and how many slots of the set come before it. Lists: one number of an array takes longer.
        earlier = [itertools.count() for _ in counts]
        self._places = [(part, next(earlier[part])) for part in self._owners.tolist()]

    def locate(self, position: int) -> Place:
        """The window and the draw of a global position."""
        step, slot = divmod(position, self.num_slots)
        part, rank = self._places[slot]
        return _of_part(part, self._orders[part].locate(step * self._slots[part] + rank))

    def window(self, window: WindowId) -> list[SampleRef]:
        """The samples of a window in the order of their draws."""
        first = self._first_shards[window.part]
        return [SampleRef(first + shard, sample) for shard, sample in self._orders[window.part].window(window)]

    def substitutes(self, place: Place) -> Iterator[Place]:
        """Where to look for a good sample instead of a bad one: in the same set, so that shares stay as they are."""
        part = place.window.part
        return (_of_part(part, candidate) for candidate in self._orders[part].substitutes(place))

    def next_uses(self, part: int, step: int, mine: NDArray[np.bool_]) -> NDArray[np.float64]:
        """In how many steps each shard of a set is needed again, see :meth:`SampleOrder.next_uses`.

        Args:
            part: number of the set.
            step: the next one to be drawn.
            mine: by slot of the global batch, whether it counts.
        """
        position = step * self._slots[part]
        return self._orders[part].next_uses(position, mine[self._owners == part]) / self._slots[part]


class Forecast:
    """In how many steps the ranks of one node need a shard again. ``step`` is moved along by whoever draws."""

    def __init__(self, order: MixedOrder, slots: Sequence[int], *, step: int) -> None:
        """``slots`` of the global batch are those of the node."""
        self._order = order
        self._mine = np.zeros(order.num_slots, dtype=np.bool_)
        self._mine[slots] = True
        self.step = step

    def next_uses(self, part: int) -> NDArray[np.float64]:
        """Steps by shard of one set; infinite if neither its present epoch nor its next one has a use for it."""
        return self._order.next_uses(part, self.step, self._mine)


def interleave(counts: Sequence[int]) -> NDArray[np.int64]:
    """By slot, the number of the set that it belongs to: each set's slots are spread evenly over the batch, so that
    each rank gets about the same share of every set."""
    owners = np.repeat(np.arange(len(counts)), counts)
    middles = np.concatenate([(2 * np.arange(count) + 1) / count for count in counts])
    return owners[np.lexsort((owners, middles))]


def _of_part(part: int, place: Place) -> Place:
    return Place(place.window._replace(part=part), place.offset)
