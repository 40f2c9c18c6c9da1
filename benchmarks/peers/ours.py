"""Our own loader, as a training run builds it, and the bare decoder that bounds it."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.contest import OURS, Contestant, Settings, images_of
from vitscale.config.duration import Duration
from vitscale.config.schema import ModelConfig, OptimConfig, TrainConfig
from vitscale.data.order import hash64
from vitscale.data.shard_set import open_training_data
from vitscale.data.transforms import train_crop
from vitscale.plan import RunPlan
from vitscale.train.batches import train_batches

# Images that the bare decoder holds in memory.
IN_MEMORY = 512


def start(root: Path, settings: Settings, processes: int | None) -> Iterator[Any]:
    """Batches of one rank whose global batch is its micro-batch, loaded in so many processes."""
    config = TrainConfig(
        run=root / "run",
        duration=Duration(steps=1_000_000),
        global_batch_size=settings.batch_size,
        micro_batch_size=settings.batch_size,
        data=dataclasses.replace(settings.data, train=str(root / "shards" / "train"), processes=processes),
        model=ModelConfig(num_classes=1000),
        optim=OptimConfig(lr=1e-3),
    )
    train_set = open_training_data(config.data, global_batch_size=config.global_batch_size)
    plan = RunPlan.create(config, 1, train_set)
    batches = train_batches(config, plan, train_set, rank=0, ranks_of_node=[0], first_step=0, pin_memory=False)
    for batch in batches:
        assert not batch.quarantined
        yield batch.images


def decode_for_ever(root: Path, settings: Settings, deliver: Callable[[Exception | None], object]) -> None:
    """Decode and crop images that are in memory, and call ``deliver`` after every batch."""
    files = images_of(root)
    encoded = [path.read_bytes() for path in files[:: -(-len(files) // IN_MEMORY)]]
    batch, data = np.empty(shape_of(settings), dtype=np.uint8), settings.data
    try:
        for draw in count():
            slot = draw % settings.batch_size
            train_crop(encoded[draw % len(encoded)], data, hash64(draw), batch[slot])
            if slot == settings.batch_size - 1:
                deliver(None)
    except Exception as error:  # raised where the batches are counted
        deliver(error)


def counted(settings: Settings, take: Callable[[], Exception | None]) -> Iterator[NDArray[np.uint8]]:
    """An empty batch for each delivery: the pixels stay where they were decoded."""
    batch = np.empty(shape_of(settings), dtype=np.uint8)
    while (error := take()) is None:
        yield batch
    raise error


def shape_of(settings: Settings) -> tuple[int, int, int, int]:
    """Of a batch."""
    return (settings.batch_size, settings.image_size, settings.image_size, 3)


def start_bare_threads(root: Path, settings: Settings) -> Iterator[NDArray[np.uint8]]:
    """Threads that share nothing but the interpreter."""
    deliveries: SimpleQueue[Exception | None] = SimpleQueue()
    for _ in range(settings.workers):
        threading.Thread(target=decode_for_ever, args=(root, settings, deliveries.put), daemon=True).start()
    return counted(settings, deliveries.get)


def start_bare_processes(root: Path, settings: Settings) -> Iterator[NDArray[np.uint8]]:
    """Processes that share nothing: the limit."""
    fork = multiprocessing.get_context("fork")
    deliveries = fork.SimpleQueue()
    for _ in range(settings.workers):
        fork.Process(target=decode_for_ever, args=(root, settings, deliveries.put), daemon=True).start()
    return counted(settings, deliveries.get)


LIMIT = Contestant(
    "bare decoder, processes", OURS + "; images in memory, no batches", "processes", start_bare_processes
)
BARE_THREADS = Contestant(
    "bare decoder, threads", OURS + "; images in memory, no batches", "threads", start_bare_threads
)
LOADER = Contestant("vitscale", OURS, "processes", partial(start, processes=None))
LOADER_IN_RANK = Contestant("vitscale, data.processes=0", OURS, "threads", partial(start, processes=0))
LOADER_IN_ONE_PROCESS = Contestant("vitscale, data.processes=1", OURS, "threads", partial(start, processes=1))
