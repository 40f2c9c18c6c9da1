"""Mixtures of shard sets against what is written down slot by slot."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.data.manifest import Manifest, ShardInfo
from vitscale.data.mixing import MIXTURE, Forecast, MixedOrder, Mixture, Part, apportion, interleave
from vitscale.data.order import SampleOrder, hash64
from vitscale.errors import ConfigError, DataError

examples = settings(max_examples=80, deadline=None)
shard_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=5)
parts = st.lists(st.tuples(shard_sizes, st.integers(1, 6)), min_size=1, max_size=3)


def shardset(name: str, sizes: list[int], **fields: Any) -> Manifest:
    return Manifest(name, tuple(ShardInfo(f"{n}.tar", size, 100 * size) for n, size in enumerate(sizes)), **fields)


def mixture(sets: list[tuple[list[int], int]]) -> Mixture:
    return Mixture(tuple(Part(shardset(f"set{n}", sizes), slots) for n, (sizes, slots) in enumerate(sets)))


def order_of(sets: list[tuple[list[int], int]], seed: int = 5, window: int = 3) -> MixedOrder:
    return MixedOrder(mixture(sets), seed=seed, lanes=sets[0][1], window=window)


def sample_at(order: MixedOrder, position: int) -> tuple[int, int]:
    place = order.locate(position)
    return tuple(order.window(place.window)[place.offset])  # type: ignore[return-value]


@examples
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 5000))
def test_slots_are_shared_out_as_the_weights_say(weights: list[float], slots: int) -> None:
    quotas = [Fraction(weight) / sum(map(Fraction, weights)) * slots for weight in weights]
    try:
        counts = apportion(weights, slots)
    except ConfigError:
        assert min(quotas) < 1
        return
    assert sum(counts) == slots
    assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))


def test_a_weight_without_a_slot_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        apportion([1.0, 0.001], 64)
    assert str(caught.value) == (
        "data.train: weight 0.001 of 1.001 comes to no image of a global batch of 64; give each set a weight of at "
        "least 1/64 of the sum, or raise global_batch_size"
    )


@examples
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_slots_of_a_set_are_spread_evenly(counts: list[int]) -> None:
    owners = interleave(counts).tolist()
    assert [owners.count(part) for part in range(len(counts))] == counts
    for part, count in enumerate(counts):
        for end in range(1, len(owners) + 1):
            # As many as fall to the first slots, give or take one for each set that is in the way.
            assert abs(owners[:end].count(part) - end * count / len(owners)) <= len(counts) / 2


@examples
@given(parts, st.integers(0, 60))
def test_each_set_keeps_its_own_order(sets: list[tuple[list[int], int]], step: int) -> None:
    order, owners = order_of(sets), interleave([slots for _, slots in sets]).tolist()
    seen: Counter[int] = Counter()
    first_shards = [sum(len(sizes) for sizes, _ in sets[:part]) for part in range(len(sets))]
    for slot, part in enumerate(owners):
        sizes, slots = sets[part]
        alone = SampleOrder(sizes, seed=5 if part == 0 else hash64(5, MIXTURE, part), lanes=slots, window=3)
        place = alone.locate(step * slots + seen[part])
        shard, sample = alone.window(place.window)[place.offset]
        assert sample_at(order, step * len(owners) + slot) == (first_shards[part] + shard, sample)
        seen[part] += 1


@examples
@given(parts)
def test_each_set_has_epochs_of_its_own(sets: list[tuple[list[int], int]]) -> None:
    order, owners = order_of(sets), interleave([slots for _, slots in sets]).tolist()
    first_shards = np.cumsum([0, *(len(sizes) for sizes, _ in sets)]).tolist()
    drawn: dict[int, list[tuple[int, int]]] = {part: [] for part in range(len(sets))}
    for position in range(len(owners) * (max(sum(sizes) for sizes, _ in sets) + 1)):
        drawn[owners[position % len(owners)]].append(sample_at(order, position))
    for part, (sizes, _) in enumerate(sets):
        every = sorted((first_shards[part] + n, sample) for n, size in enumerate(sizes) for sample in range(size))
        epochs = [drawn[part][i : i + len(every)] for i in range(0, len(drawn[part]) - len(every), len(every))]
        assert epochs
        assert all(sorted(epoch) == every for epoch in epochs)


def test_a_single_set_is_its_own_order() -> None:
    one = SampleOrder([7, 3, 12], seed=9, lanes=4, window=5)
    order = MixedOrder(mixture([([7, 3, 12], 8)]), seed=9, lanes=4, window=5)
    for position in range(100):
        assert order.locate(position) == one.locate(position)
        assert list(order.substitutes(order.locate(position))) == list(one.substitutes(one.locate(position)))


def test_sets_of_equal_sizes_are_shuffled_differently() -> None:
    order = order_of([([40], 4), ([40], 4)])
    drawn = [sample_at(order, position) for position in range(80)]
    assert [sample for shard, sample in drawn if shard == 0] != [sample for shard, sample in drawn if shard == 1]


@examples
@given(parts, st.integers(0, 300))
def test_substitutes_are_of_the_same_set(sets: list[tuple[list[int], int]], position: int) -> None:
    order = order_of(sets)
    place = order.locate(position)
    assert {p.window.part for p in order.substitutes(place)} <= {place.window.part}


def next_use(order: MixedOrder, sets: list[tuple[list[int], int]], step: int, mine: set[int]) -> dict[int, float]:
    """Walks position after position, with windows of one sample, in which nothing is shuffled."""
    uses: dict[int, float] = {}
    slots = sum(count for _, count in sets)
    for position in range(step * slots, (step + 2 * max(sum(sizes) for sizes, _ in sets) + 2) * slots):
        if position % slots in mine:
            shard = sample_at(order, position)[0]
            uses.setdefault(shard, position // slots - step)
    return uses


@examples
@given(parts, st.integers(0, 25), st.data())
def test_the_forecast_against_walking(sets: list[tuple[list[int], int]], step: int, data: st.DataObject) -> None:
    slots = sum(count for _, count in sets)
    mine = data.draw(st.sets(st.integers(0, slots - 1), min_size=1))
    order = order_of(sets, window=1)
    walked = next_use(order, sets, step, mine)
    first_shard = 0
    for part, (sizes, count) in enumerate(sets):
        uses = Forecast(order, sorted(mine), step=step).next_uses(part)
        assert len(uses) == len(sizes)
        # This epoch and the next one are looked at, as far as they go.
        horizon = (step * count // sum(sizes) + 2) * sum(sizes) // count - step
        for shard, steps in enumerate(uses.tolist(), start=first_shard):
            expected = walked.get(shard, float("inf"))
            assert int(steps) == expected if expected < horizon else steps >= horizon - 1
        first_shard += len(sizes)


def test_what_a_mixture_says_of_itself() -> None:
    one, other = shardset("a", [5], classes=("x",)), shardset("b", [7, 2], classes=("x", "y"))
    mixed = Mixture.create([one, other], [3.0, 1.0], global_batch_size=8)
    assert {part.manifest.location: part.slots for part in mixed.parts} == {"a": 6, "b": 2}
    assert (mixed.num_samples, mixed.num_shards, mixed.classes) == (14, 3, ("x", "y"))
    assert Mixture.create([one], [0.1], global_batch_size=8).digest == one.digest
    digests = {
        Mixture.create(manifests, weights, global_batch_size=8).digest
        for manifests, weights in [([one, other], [3.0, 1.0]), ([one, other], [1.0, 1.0]), ([other, one], [1.0, 3.0])]
    }
    # The order of naming does not count.
    assert len(digests) == 2


def test_a_set_is_named_once() -> None:
    one, same = shardset("a", [5]), shardset("b", [5])
    with pytest.raises(DataError, match="b: holds the same shards as a; name each set once"):
        Mixture.create([one, same], [1.0, 1.0], global_batch_size=8)


def test_sets_whose_labels_mean_different_things_are_refused() -> None:
    one, other = shardset("a", [5], classes=("x", "y")), shardset("b", [7], classes=("x", "z"))
    with pytest.raises(DataError, match=r"label 1 is '.', but '.' in .; write both sets from sources with the same"):
        Mixture.create([one, other], [1.0, 1.0], global_batch_size=8)
