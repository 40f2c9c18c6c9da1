"""What the order of samples costs at the scale of JFT, by simulation: indexes are generated, no tar is read.

    python benchmarks/order.py [--steps 128]

Each case runs in a process of its own, walks through what a rank does before and between batches, and counts seconds,
memory and the bytes that would be read. Prints one Markdown table; results that are worth keeping go to
benchmarks/results with the command, the versions and the machine.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import pickle
import platform
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from vitscale.config.schema import DataConfig
from vitscale.data.manifest import Manifest, Member, format_idx_line, parse_manifest
from vitscale.data.mixing import Forecast, MixedOrder, Mixture
from vitscale.data.order import WindowId, train_positions
from vitscale.data.readers import OpenWindows, Samples
from vitscale.data.shard_set import open_source
from vitscale.data.stream import ShardStream

T = TypeVar("T")
SEED = 0
RANKS_PER_NODE = 8
# ImageNet's JPEGs come to this on average, with their tar headers.
SAMPLE_BYTES = 110_000
DATA = DataConfig(train="simulated", image_size=224)
FIRST_WINDOW = WindowId(0, 0, 0)
NUMBER, SECONDS, MILLISECONDS, MICROSECONDS, MEGABYTES = "{:,.0f}", "{:.2f} s", "{:.1f} ms", "{:.0f} us", "{:,.1f} MB"


@dataclass(frozen=True)
class Case:
    """A shard set and a run on it."""

    name: str
    samples: int
    shards: int
    classes: int
    ranks: int
    micro_batch: int
    global_batch: int

    @property
    def lanes_of_rank(self) -> int:
        """Windows that a rank has open."""
        return self.global_batch // self.ranks

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a rank per step."""
        return self.lanes_of_rank // self.micro_batch

    def positions(self, batch: int, rank: int) -> list[int]:
        """Positions of a rank's micro-batch, by its number in the run; none is padding in training."""
        step, micro_step = divmod(batch, self.micro_steps)
        positions = train_positions(
            step,
            micro_step,
            rank=rank,
            world_size=self.ranks,
            micro_batch_size=self.micro_batch,
            global_batch_size=self.global_batch,
        )
        return [position for position in positions if position is not None]


# The batch of 4,096 is the ViT paper's (arXiv 2010.11929), that of 65,536 ViT-22B's (2302.05442). The last two cases
# differ from the third one in one number: what grows with it shows there.
CASES = (
    Case("ImageNet-1k", 1_280_000, 128, 1_000, ranks=8, micro_batch=128, global_batch=4_096),
    Case("JFT-300M", 300_000_000, 30_000, 18_291, ranks=512, micro_batch=8, global_batch=4_096),
    Case("JFT-3B", 3_000_000_000, 300_000, 29_593, ranks=4_096, micro_batch=16, global_batch=65_536),
    Case("an eighth of the ranks", 3_000_000_000, 300_000, 29_593, ranks=512, micro_batch=16, global_batch=65_536),
    Case("a tenth of the samples", 300_000_000, 30_000, 29_593, ranks=4_096, micro_batch=16, global_batch=65_536),
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2 * DATA.window, help="steps per measurement")
    arguments = parser.parse_args()
    # Memory is counted from what a fresh interpreter with these imports takes.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as process:
        columns = [process.submit(measure, case, arguments.steps).result() for case in CASES]
    print(
        f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}; one core, processor time\n"
    )
    print(f"| | {' | '.join(case.name for case in CASES)} |")
    print("|---|" + "---:|" * len(columns))
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


def measure(case: Case, steps: int) -> dict[str, str]:
    """All rows of one case, formatted."""
    rows = {
        "samples": NUMBER.format(case.samples),
        "shards": NUMBER.format(case.shards),
        "ranks": NUMBER.format(case.ranks),
        "global batch": NUMBER.format(case.global_batch),
        "micro-batch": NUMBER.format(case.micro_batch),
        "lanes of a rank": NUMBER.format(case.lanes_of_rank),
    }
    text = index_text(case)
    manifest, index_rows = measure_index(text)
    del text
    mixture = Mixture.create([manifest], [1.0], global_batch_size=case.global_batch)

    def build_order() -> MixedOrder:
        return MixedOrder(mixture, seed=SEED, lanes=case.global_batch, window=DATA.window)

    rows |= index_rows | measure_order(build_order) | measure_stream(manifest, build_order(), case)
    rows["one full garbage collection"] = MILLISECONDS.format(timed(gc.collect)[1] * 1e3)
    steps_per_epoch = case.samples // case.global_batch
    for when, middle in (("in mid-epoch", steps_per_epoch // 2), ("across an epoch's end", steps_per_epoch)):
        rows |= measure_batches(build_order(), case, range(middle - steps // 2, middle + steps // 2), when)
    rows |= measure_positions(case) | measure_first_batch(build_order(), case)
    rows["resident memory of the process"] = f"{memory_of_process('VmRSS'):,.0f} MB"
    rows["its largest resident memory"] = f"{memory_of_process('VmHWM'):,.0f} MB"
    return rows


def measure_index(text: str) -> tuple[Manifest, dict[str, str]]:
    """From the text of index.json to the Manifest, which the main rank pickles for the other ones."""
    manifest, seconds = timed(lambda: parse_manifest(text, "simulated"))
    held, peak = memory(lambda: parse_manifest(text, "simulated"))
    pickled, pickle_s = timed(lambda: pickle.dumps(manifest))
    received, unpickle_s = timed(lambda: pickle.loads(pickled))
    assert received == manifest
    _, digest_s = timed(lambda: manifest.digest)
    return manifest, {
        "index.json": MEGABYTES.format(len(text) / 1e6),
        "parse it (main rank)": SECONDS.format(seconds),
        "peak while parsing": MEGABYTES.format(peak),
        "Manifest, per rank": MEGABYTES.format(held),
        "Manifest, per node": MEGABYTES.format(held * RANKS_PER_NODE),
        "Manifest, broadcast": MEGABYTES.format(len(pickled) / 1e6),
        "pickle it (main rank)": SECONDS.format(pickle_s),
        "unpickle it (each rank)": SECONDS.format(unpickle_s),
        "digest of the Manifest": SECONDS.format(digest_s),
    }


def measure_order(build: Callable[[], MixedOrder]) -> dict[str, str]:
    """The order and the tape of its first epoch."""

    def build_with_tape() -> MixedOrder:
        order = build()
        order.window(FIRST_WINDOW)
        return order

    order, build_s = timed(build)
    _, tape_s = timed(lambda: order.window(FIRST_WINDOW))
    held, _ = memory(build_with_tape)
    return {
        "build the order": SECONDS.format(build_s),
        "lay the tape of an epoch": MILLISECONDS.format(tape_s * 1e3),
        "order and tape, per rank": MEGABYTES.format(held),
        "order and tape, per node": MEGABYTES.format(held * RANKS_PER_NODE),
    }


def measure_stream(manifest: Manifest, order: MixedOrder, case: Case) -> dict[str, str]:
    """What else a rank holds by shard, and what a cache asks the order."""

    def build() -> ShardStream:
        return ShardStream([open_source(manifest)], order)

    _, seconds = timed(build)
    held, _ = memory(build)
    forecast = Forecast(order, range(RANKS_PER_NODE * case.lanes_of_rank), step=1000)
    _, next_uses_s = timed(lambda: forecast.next_uses(0))
    return {
        "build the stream": SECONDS.format(seconds),
        "stream, per rank": MEGABYTES.format(held),
        "next uses of all shards, for a cache": MILLISECONDS.format(next_uses_s * 1e3),
    }


class Walk:
    """Asks for the windows of a rank's micro-batches as the loader does, and reads nothing."""

    def __init__(self, order: MixedOrder, case: Case, rank: int) -> None:
        self._order, self._case, self._rank = order, case, rank
        self._windows = OpenWindows(self._read)
        self.lengths: list[int] = []
        """Samples of the windows that were asked for."""

    def draw(self, batch: int) -> None:
        """One micro-batch."""
        for position in self._case.positions(batch, self._rank):
            self._windows.samples_of(self._order.locate(position).window)

    def _read(self, window: WindowId) -> Future[Samples]:
        self.lengths.append(len(self._order.window(window)))
        return Future()


def measure_batches(order: MixedOrder, case: Case, steps: range, when: str) -> dict[str, str]:
    """The order's share of a rank's micro-batches: places of all slots, samples of each window that begins."""
    walk = Walk(order, case, rank=1)
    # A rank that has been at it for a while has its windows open.
    for batch in range((steps.start - 1) * case.micro_steps, steps.start * case.micro_steps):
        walk.draw(batch)
    walk.lengths.clear()
    seconds = []
    for batch in range(steps.start * case.micro_steps, steps.stop * case.micro_steps):
        start = time.process_time()
        walk.draw(batch)
        seconds.append(time.process_time() - start)
    return {
        f"locate and window, {when}, per micro-batch": MICROSECONDS.format(np.mean(seconds) * 1e6),
        f"the same per image, {when}": f"{np.mean(seconds) / case.micro_batch * 1e6:.1f} us",
        f"slowest micro-batch, {when}": MILLISECONDS.format(max(seconds) * 1e3),
        f"windows begun per micro-batch, {when}": f"{len(walk.lengths) / len(seconds):.2f}",
    }


def measure_positions(case: Case) -> dict[str, str]:
    """The positions of all ranks in one step, against those of the global batch."""
    step = case.samples // case.global_batch
    batches = range(step * case.micro_steps, (step + 1) * case.micro_steps)
    drawn = [(batch, rank) for rank in range(case.ranks) for batch in batches]
    together, seconds = timed(lambda: [p for batch, rank in drawn for p in case.positions(batch, rank)])
    first = step * case.global_batch
    exact = sorted(together) == list(range(first, first + case.global_batch))
    return {
        "positions of all ranks are exactly the global batch": "yes" if exact else "NO",
        "positions, per micro-batch": MICROSECONDS.format(seconds / len(drawn) * 1e6),
    }


def measure_first_batch(order: MixedOrder, case: Case) -> dict[str, str]:
    """What must be read before a rank's first batch, and what is asked for by then."""
    needed, asked = zip(*(first_reads(order, case, rank) for rank in range(RANKS_PER_NODE)), strict=True)
    image, label = Member("jpg", 10**9, 110_000, "000/123456.jpg"), Member("cls", 10**9, 5, "000/123456.cls")
    index_bytes = (len(format_idx_line([image, label])) + 1) * case.samples // case.shards
    return {
        "images read before the first batch, per rank": NUMBER.format(np.mean(needed)),
        "the same, rank of a node with the most": NUMBER.format(max(needed)),
        "bytes of the images, per rank": MEGABYTES.format(np.mean(needed) * SAMPLE_BYTES / 1e6),
        "bytes of their member indexes, per rank": MEGABYTES.format(
            min(case.micro_batch, case.shards) * index_bytes / 1e6
        ),
        "bytes of images asked for by then, per rank": MEGABYTES.format(np.mean(asked) * SAMPLE_BYTES / 1e6),
        "open windows, per rank at most": MEGABYTES.format(case.lanes_of_rank * DATA.window * SAMPLE_BYTES / 1e6),
    }


def first_reads(order: MixedOrder, case: Case, rank: int) -> tuple[int, int]:
    """Images in the windows of a rank's first micro-batch, and in all those that are asked for until it is yielded."""
    walk = Walk(order, case, rank)
    walk.draw(0)
    needed = sum(walk.lengths)
    for batch in range(1, 1 + DATA.read_ahead_batches + DATA.prefetch_batches):
        walk.draw(batch)
    return needed, sum(walk.lengths)


def index_text(case: Case) -> str:
    """An index.json as the writer of shard sets makes it."""
    each = case.samples // case.shards
    shards = [
        {
            "url": f"train-{number:06d}.tar",
            "nsamples": each,
            "filesize": each * SAMPLE_BYTES + number,
            "sha256": hashlib.sha256(str(number).encode()).hexdigest(),
        }
        for number in range(case.shards)
    ]
    classes = [f"class {number:05d}" for number in range(case.classes)]
    return json.dumps({"shardlist": shards, "vitscale": {"format_version": 1, "split": "train", "classes": classes}})


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result of ``work``, and its seconds of processor time: nothing here waits for a disk or a network."""
    gc.collect()
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def memory(work: Callable[[], object]) -> tuple[float, float]:
    """Megabytes that the result of ``work`` holds, and the most that it took to make it."""
    gc.collect()
    tracemalloc.start()
    result = work()
    gc.collect()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return held / 1e6, peak / 1e6


def memory_of_process(key: str) -> float:
    """Megabytes, from what Linux counts for this process alone (ru_maxrss is inherited from the parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
