"""How fast the loader of a run is on this machine, without a model: what ``vitscale data bench`` does."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from vitscale.config.duration import Duration
from vitscale.config.schema import TrainConfig
from vitscale.data.shard_set import open_training_data
from vitscale.data.stages import Stage, StageSeconds
from vitscale.data.storage.node_cache import CacheCounters
from vitscale.data.storage.transfer import HostCounters
from vitscale.plan import RunPlan
from vitscale.train.batches import loader_processes, train_batches
from vitscale.train.counters import load_counters

STAGE_NAMES: dict[Stage, str] = {
    "read": "waiting for reads",
    "decode": "decoding",
    "augment": "augmenting",
    "hand_over": "handing over",
}
ADVICE: dict[Stage, str] = {
    "read": "raise data.storage.connections or data.read_ahead_batches, or put the shards on faster storage",
    "decode": "give the rank more cores and raise data.workers, or write smaller images (shards write --resize-short)",
    "augment": "give the rank more cores and raise data.workers",
    "hand_over": "raise micro_batch_size; the thread that drives the model has no time left",
}


@dataclass(frozen=True)
class LoaderReport:
    """Figures of one rank's loader."""

    images: int
    seconds: float
    first_batch_s: float
    cpu_s: float
    """Processor time of this process and those that load for it."""
    bytes_per_image: float
    stages: StageSeconds
    threads: int
    processes: int = 0
    """That the threads are spread over; 0 if they are this one's."""
    loading_s: float = 0.0
    """From the first request for data to the end."""
    quarantined: int = 0
    """Bad samples in ``loading_s``."""
    over_budget: bool = False
    """Whether they are more than a whole run with as many images would tolerate."""
    hosts: dict[str, HostCounters] = field(default_factory=dict)
    """What was asked of each host in ``loading_s``; empty where nothing is read remotely."""
    cache: CacheCounters | None = None
    """What the cache did in ``loading_s``, if there is one."""

    @property
    def images_per_s(self) -> float:
        """Rate of one rank."""
        return self.images / self.seconds

    @property
    def binding(self) -> Stage:
        """The stage that limits the rate."""
        return self.stages.binding(threads=self.threads)

    def cores_for(self, images_per_s: float) -> float:
        """Cores that are busy at a rate, if nothing but the processor limits it."""
        return images_per_s * self.cpu_s / self.images

    def describe(self, rates: Sequence[float]) -> list[str]:
        """Lines for a person. ``rates`` are images/s that one GPU takes."""
        return [
            f"first batch  after {self.first_batch_s:.2f} s",
            f"rate         {self.images_per_s:,.0f} images/s, {self._mb_per_s(self.images_per_s):,.1f} MB/s with "
            f"data.workers={self.threads}, data.processes={self.processes} "
            f"({self.images:,} images in {self.seconds:.1f} s)",
            *self._describe_time(),
            f"bound by     {STAGE_NAMES[self.binding]}: {ADVICE[self.binding]}",
            *(f"storage      {host}: {self._describe_host(counters)}" for host, counters in self.hosts.items()),
            *([f"cache        {_describe_cache(self.cache)}"] if self.cache else []),
            *([f"bad samples  {self._describe_bad()}"] if self.quarantined else []),
            "",
            "a GPU that takes   needs of its rank",
            *(self._need(rate) for rate in rates),
        ]

    def _describe_time(self) -> list[str]:
        shares = self.stages.shares(threads=self.threads, seconds=self.seconds)
        handing_over = shares.pop("hand_over")
        # The first batches were begun before the measurement: the sum may be more than the threads had.
        busy = sum(shares.values())
        parts = {STAGE_NAMES[stage]: share / max(busy, 1.0) for stage, share in shares.items()}
        parts["idle"] = max(1.0 - busy, 0.0)
        spent = ", ".join(f"{name} {percent}%" for name, percent in zip(parts, _percents(parts.values()), strict=True))
        return [f"threads      {spent}", f"main thread  {STAGE_NAMES['hand_over']} {handing_over:.0%}"]

    def _describe_host(self, host: HostCounters) -> str:
        kinds = ", ".join(f"{count:,} x {kind}" for kind, count in sorted(host.errors.items()))
        return (
            f"{host.requests:,} requests, {host.retries:,} retries, {host.timeouts:,} time-outs, "
            f"errors: {kinds or 'none'}; {host.bytes / self.loading_s / 1e6:,.1f} MB/s"
        )

    def _describe_bad(self) -> str:
        text = f"{self.quarantined:,} were replaced"
        if self.over_budget:
            text += "; more than data.max_bad_samples and data.max_bad_share allow: a run would stop"
        return text

    def _need(self, rate: float) -> str:
        cores = self.cores_for(rate)
        return f"{rate:>9,.0f} images/s   {cores:.1f} cores, {self._mb_per_s(rate):,.0f} MB/s; {self._remedy(rate)}"

    def _remedy(self, rate: float) -> str:
        workers = math.ceil(self.cores_for(rate))
        if self.images_per_s >= rate:
            return "this loader is enough"
        if self.binding == "read":
            needed, given = self._mb_per_s(rate), self._mb_per_s(self.images_per_s)
            return f"reads are too slow: needs {needed:,.1f} MB/s, this storage gave {given:,.1f} MB/s"
        if workers > self.threads:
            return f"data.workers={workers}"
        return f"more cores: this machine gave {self.images_per_s:,.0f} images/s with data.workers={self.threads}"

    def _mb_per_s(self, images_per_s: float) -> float:
        return images_per_s * self.bytes_per_image / 1e6


def bench_loader(config: TrainConfig, *, world_size: int, seconds: float, say: Callable[[str], None]) -> LoaderReport:
    """Load the batches of rank 0 of a run as fast as they come.

    Args:
        config: of the run; its folder is not touched.
        world_size: ranks of the run, for the shape of its micro-batches and windows; only this one loads.
        seconds: length of the measurement, which begins when the first batches are through.
        say: takes lines for a person.

    Raises:
        VitscaleError: the data or the configuration cannot be used, or the storage is silent.
    """
    # As long as it takes, however short the run is.
    config = dataclasses.replace(config, duration=Duration(examples=10**15))
    train_set = open_training_data(config.data, global_batch_size=config.global_batch_size)
    plan = RunPlan.create(config, world_size, train_set)
    for name, value in _describe_plan(plan):
        say(f"{name:<12} {value}")
    before = load_counters()
    start = began = time.perf_counter()
    batches = train_batches(config, plan, train_set, rank=0, ranks_of_node=[0], first_step=0, pin_memory=False)
    images, loaded, quarantined, stages = 0, 0, 0, StageSeconds()
    first_batch_s = elapsed_s = cpu_s = 0.0
    # What was prepared while nobody asked for it is not counted.
    uncounted = 1 + config.data.prefetch_batches
    for number, batch in enumerate(batches, start=1):
        loaded += len(batch.keys)
        quarantined += len(batch.quarantined)
        if number == 1:
            first_batch_s = time.perf_counter() - start
        if number == uncounted:
            start, cpu_start = time.perf_counter(), load_counters().cpu_s
        if number > uncounted:
            images += len(batch.keys)
            stages += batch.stages
            elapsed_s, cpu_s = time.perf_counter() - start, load_counters().cpu_s - cpu_start
            if elapsed_s >= seconds:
                break
    loading = load_counters().since(before)
    return LoaderReport(
        images=images,
        seconds=elapsed_s,
        first_batch_s=first_batch_s,
        cpu_s=cpu_s,
        bytes_per_image=train_set.bytes_per_image,
        stages=stages,
        threads=config.data.workers,
        processes=loader_processes(config.data, plan.micro_batch_size),
        loading_s=time.perf_counter() - began,
        quarantined=quarantined,
        # Of one rank alone, so it is certain of the run.
        over_budget=quarantined > plan.bad_sample_budget(loaded * world_size),
        hosts=loading.hosts,
        cache=loading.cache,
    )


def _describe_plan(plan: RunPlan) -> list[tuple[str, str]]:
    """What of the plan concerns the loader. Its length is not the run's, so nothing is said of epochs."""
    rows = {name: value for name, value in plan.describe() if name}
    shown = [("global batch", rows["global batch"]), ("data", rows["data"])]
    if len(plan.slots) > 1:
        for location, slots in plan.slots.items():
            images, share = plan.images_per_set[location], slots / plan.global_batch_size
            shown.append(("", f"{location}: {images:,} images, {slots} of each batch ({share:.2%})"))
    return [*shown, ("shuffle", rows["shuffle"])]


def _describe_cache(cache: CacheCounters) -> str:
    reads = cache.hits + cache.misses
    share = cache.hits / reads if reads else 0.0
    return f"answered {share:.0%} of {reads:,} reads; {cache.evicted_files:,} files evicted"


def _percents(shares: Iterable[float]) -> list[int]:
    """Shares of one in whole percent that sum to 100: the sums up to each are rounded, not the shares."""
    ends = [round(100 * end) for end in accumulate(shares, initial=0.0)]
    return [end - start for start, end in pairwise(ends)]
