"""How fast the loader of a run is on this machine, without a model: what ``vitscale data bench`` does."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitscale.config.duration import Duration
from vitscale.config.schema import TrainConfig
from vitscale.data.shard_set import open_training_data
from vitscale.data.stages import Stage, StageSeconds
from vitscale.plan import RunPlan
from vitscale.train.batches import train_batches

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
    """Processor time of the whole process."""
    bytes_per_image: float
    stages: StageSeconds
    threads: int
    quarantined: int

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
        shares = self.stages.shares(threads=self.threads, seconds=self.seconds)
        spent = ", ".join(f"{STAGE_NAMES[stage]} {share:.0%}" for stage, share in shares.items())
        return [
            f"first batch  after {self.first_batch_s:.2f} s",
            f"rate         {self.images_per_s:,.0f} images/s, {self._mb_per_s(self.images_per_s):,.1f} MB/s with "
            f"data.workers={self.threads} ({self.images:,} images in {self.seconds:.1f} s)",
            f"time         {spent}",
            f"bound by     {STAGE_NAMES[self.binding]}: {ADVICE[self.binding]}",
            *([f"bad samples  {self.quarantined:,} were replaced"] if self.quarantined else []),
            "",
            "a GPU that takes   needs of its rank",
            *(self._need(rate) for rate in rates),
        ]

    def _need(self, rate: float) -> str:
        cores = self.cores_for(rate)
        enough = "this loader is enough" if self.images_per_s >= rate else f"data.workers={math.ceil(cores)}"
        return f"{rate:>9,.0f} images/s   {cores:.1f} cores, {self._mb_per_s(rate):,.0f} MB/s; {enough}"

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
    for name, value in plan.describe():
        if name in ("data", "", "shuffle", "global batch"):
            say(f"{name:<12} {value}")
    start = time.perf_counter()
    batches = train_batches(config, plan, train_set, rank=0, ranks_of_node=[0], first_step=0, pin_memory=False)
    images, quarantined, stages = 0, 0, StageSeconds()
    first_batch_s = elapsed_s = cpu_s = 0.0
    # What was prepared while nobody asked for it is not counted.
    uncounted = 1 + config.data.prefetch_batches
    for number, batch in enumerate(batches, start=1):
        if number == 1:
            first_batch_s = time.perf_counter() - start
        if number == uncounted:
            start, cpu_start = time.perf_counter(), _cpu_s()
        if number > uncounted:
            images += len(batch.keys)
            quarantined += len(batch.quarantined)
            stages += batch.stages
            elapsed_s, cpu_s = time.perf_counter() - start, _cpu_s() - cpu_start
            if elapsed_s >= seconds:
                break
    return LoaderReport(
        images=images,
        seconds=elapsed_s,
        first_batch_s=first_batch_s,
        cpu_s=cpu_s,
        bytes_per_image=train_set.bytes_per_image,
        stages=stages,
        threads=config.data.workers,
        quarantined=quarantined,
    )


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system
