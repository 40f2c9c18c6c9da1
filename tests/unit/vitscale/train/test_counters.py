"""Counters of several processes add up, and what was counted before is taken off."""

from __future__ import annotations

import pytest

from vitscale.data.storage.node_cache import CacheCounters
from vitscale.data.storage.transfer import HostCounters
from vitscale.train import counters
from vitscale.train.counters import LoadCounters, load_counters, record_counters

ONE = LoadCounters(
    hosts={"a": HostCounters(5, 1, 2, {"503": 1}, 100, 0.5), "b": HostCounters(requests=1)},
    cache=CacheCounters(hits=3, misses=1),
    cpu_s=1.5,
)
OTHER = LoadCounters(hosts={"a": HostCounters(2, 0, 1, {"503": 2, "timeout": 1}, 50, 0.25)}, cpu_s=0.5)


def test_sum() -> None:
    both = LoadCounters(
        hosts={"a": HostCounters(7, 1, 3, {"503": 3, "timeout": 1}, 150, 0.75), "b": HostCounters(requests=1)},
        cache=CacheCounters(hits=3, misses=1),
        cpu_s=2.0,
    )
    assert ONE + OTHER == OTHER + ONE == both
    assert ONE + LoadCounters() == ONE
    assert (OTHER + OTHER).cache is None


def test_since() -> None:
    added = (ONE + OTHER).since(ONE)
    # A host that was asked for nothing meanwhile is left out.
    assert added == LoadCounters(OTHER.hosts, CacheCounters(), cpu_s=0.5)


def test_other_processes_count_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_of_others", {})
    alone = load_counters()
    record_counters(1, OTHER)
    record_counters(2, OTHER)
    record_counters(1, ONE)
    added = load_counters().since(alone)
    assert (added.hosts, added.cache) == ((ONE + OTHER).hosts, ONE.cache)
    assert added.cpu_s >= 2.0
