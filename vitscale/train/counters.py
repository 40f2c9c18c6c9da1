"""What loading has cost so far: requests, cache and processor time, of this process and of its loader's processes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from vitscale.data.shard_set import cache_counters
from vitscale.data.storage.node_cache import CacheCounters
from vitscale.data.storage.transfer import HostCounters, host_counters


@dataclass(frozen=True)
class LoadCounters:
    """Sums since the start of a process, or of several."""

    hosts: dict[str, HostCounters] = field(default_factory=dict)
    """What was asked of each host; empty where nothing is read remotely."""
    cache: CacheCounters | None = None
    """What the cache did, if one is open."""
    cpu_s: float = 0.0
    """Processor time of all threads, those of the model too."""

    @classmethod
    def of_process(cls) -> LoadCounters:
        """Of this process alone."""
        return cls(host_counters(), cache_counters(), time.process_time())

    def __add__(self, other: LoadCounters) -> LoadCounters:
        names = self.hosts.keys() | other.hosts.keys()
        none = HostCounters()
        hosts = {name: self.hosts.get(name, none) + other.hosts.get(name, none) for name in sorted(names)}
        caches = [counters for counters in (self.cache, other.cache) if counters is not None]
        return LoadCounters(hosts, sum(caches, CacheCounters()) if caches else None, self.cpu_s + other.cpu_s)

    def since(self, earlier: LoadCounters) -> LoadCounters:
        """What was added to an earlier state; hosts that were asked for nothing are left out."""
        hosts = {name: now.since(earlier.hosts.get(name, HostCounters())) for name, now in self.hosts.items()}
        return LoadCounters(
            hosts={name: counters for name, counters in hosts.items() if counters.requests},
            cache=None if self.cache is None else self.cache.since(earlier.cache or CacheCounters()),
            cpu_s=self.cpu_s - earlier.cpu_s,
        )


# By process id. A process that has ended stays in the sum, under a number that no other can take.
_of_others: dict[int, LoadCounters] = {}


def load_counters() -> LoadCounters:
    """Of this process and of all its loader's processes, as far as they have told."""
    return sum(_of_others.values(), LoadCounters.of_process())


def record_counters(process: int, counters: LoadCounters) -> None:
    """Take what another process says of itself; it counts on from what it said before."""
    _of_others[process] = counters
