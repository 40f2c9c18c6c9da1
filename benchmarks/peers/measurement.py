"""One measurement of one loader, in a process of its own, with or without a training loop beside it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch

from peers.contest import Contestant, Settings

T = TypeVar("T")
WARM_S = 2.0
ALONE_S = 1.0

Work = Literal["nothing", "matrix products", "pure Python"]
"""What the main thread does while the loader runs. Products release the interpreter lock, Python does not."""


@dataclass(frozen=True)
class Measured:
    """What came out."""

    first_s: float
    """From the construction of the loader to its first batch. Imports of its package are counted, torch's are not."""
    rate: float
    """Images per second once it is warm."""
    rate_per_core: float
    """Images per second of processor time, of all its processes and threads."""
    work_share: float
    """Speed of the main thread's work, as a share of its speed without a loader."""


@dataclass(frozen=True)
class Failure:
    """Why nothing came out."""

    reason: str


def in_own_process(function: Callable[..., T], *arguments: object, timeout_s: float) -> T | Failure:
    """The result of ``function``, or why there is none. Whatever it leaves behind ends with its process."""
    spawn = multiprocessing.get_context("spawn")
    receiving, sending = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_answer, args=(sending, function, arguments))
    process.start()
    sending.close()
    try:
        if receiving.poll(timeout_s):
            result: T | Failure = receiving.recv()
            return result
        _kill_children(process.pid)
        return Failure(f"no result after {timeout_s:g} s")
    except EOFError:
        process.join()
        return Failure(f"its process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _answer(sending: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    # What packages print must not come between the rows of a table.
    os.dup2(2, 1)
    # A spawned process would spawn the workers of its loader, too; up to Python 3.13, Linux forks them by default.
    multiprocessing.set_start_method("fork", force=True)
    try:
        result = function(*arguments)
    except Exception as error:
        result = Failure(f"{type(error).__name__}: {error}")
    # Before anyone hears of the result and ends this process, which would leave them behind.
    _kill_children(os.getpid())
    sending.send(result)
    sending.close()
    os._exit(0)


def _kill_children(pid: int | None) -> None:
    """Workers of a loader whose process is gone would go on for a while and disturb the next measurement."""
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def measure(contestant: Contestant, root: Path, settings: Settings, seconds: float, work: Work) -> Measured:
    """Run a loader until it is warm, then for ``seconds``."""
    torch.set_num_threads(1)
    stretch = _Stretch()
    if work == "nothing":
        _consume(contestant, root, settings, seconds, stretch)
        share = 1.0
    else:
        unit = _matrix_product() if work == "matrix products" else _python
        alone = _work_rate(unit, _Timer(ALONE_S).is_over)
        consumer = threading.Thread(target=_consume, args=(contestant, root, settings, seconds, stretch))
        consumer.start()
        while not stretch.begun.is_set():
            unit()
        share = _work_rate(unit, stretch.ended.is_set) / alone
        consumer.join()
    if stretch.error is not None:
        raise stretch.error
    rates = (stretch.images / stretch.seconds, stretch.images / stretch.core_seconds)
    return Measured(stretch.first_s, *rates, work_share=share)


@dataclass
class _Stretch:
    """The time that counts, as the consumer of the batches sees it."""

    begun: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    first_s: float = 0.0
    images: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    error: Exception | None = None


class _Timer:
    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def is_over(self) -> bool:
        return time.perf_counter() >= self._end


def _consume(contestant: Contestant, root: Path, settings: Settings, seconds: float, stretch: _Stretch) -> None:
    try:
        start = time.perf_counter()
        batches = contestant.start(root, settings)
        _take(batches, settings)
        stretch.first_s = time.perf_counter() - start
        warming = _Timer(WARM_S)
        while not warming.is_over():
            _take(batches, settings)
        stretch.begun.set()
        begun, core_seconds, timer = time.perf_counter(), _core_seconds(), _Timer(seconds)
        while not timer.is_over():
            stretch.images += _take(batches, settings)
        stretch.seconds, stretch.core_seconds = time.perf_counter() - begun, _core_seconds() - core_seconds
    except Exception as error:  # raised by the main thread
        stretch.error = error
    finally:
        stretch.begun.set()
        stretch.ended.set()


def _take(batches: Iterator[Any], settings: Settings) -> int:
    """The number of images in the next batch, which must be what all loaders were asked for."""
    batch, side = next(batches), settings.image_size
    shape = tuple(batch.shape)
    right = shape[1:] in ((side, side, 3), (3, side, side)) and str(batch.dtype).endswith("uint8")
    if not right or shape[0] != settings.batch_size:
        raise ValueError(f"a batch of {shape} {batch.dtype}; {settings} was asked for, in uint8")
    return settings.batch_size


def _core_seconds() -> float:
    """Processor time of this process and of all that it has started and that still run."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _work_rate(unit: Callable[[], object], is_over: Callable[[], bool]) -> float:
    start, units = time.perf_counter(), 0
    while not is_over():
        unit()
        units += 1
    return units / (time.perf_counter() - start)


def _matrix_product() -> Callable[[], object]:
    matrix = torch.rand(256, 256)
    return lambda: matrix @ matrix


def _python() -> object:
    return sum(number % 7 for number in range(10_000))
