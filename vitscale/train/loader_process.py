"""Loaders in processes of their own, and how their parts come together.

Decoding gives up the interpreter's lock, but the Python around it does not: some threads of it and the thread that
drives the model would wait for one another. So a rank starts a few processes, each of which loads some slots of every
micro-batch into a ring of shared memory. The rank copies a batch out of it when all parts are there; only keys and
labels are pickled.

A process ends when the connection to its rank does, so none outlives a rank that is killed.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Semaphore, Thread

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.data.allocation import ImageMemory
from vitscale.data.loader import Batch, join_batches
from vitscale.data.stages import StageClock
from vitscale.errors import DataError, VitscaleError
from vitscale.train.counters import LoadCounters, record_counters
from vitscale.train.share import LoaderShare, load_share
from vitscale.train.signals import STOP_SIGNALS

# Batches in the ring beside those being decoded: one that is ready, one that is being copied.
SPARE_BATCHES = 2
# For a process to end by itself.
ENDING_S = 2.0
# One of these takes the place of OpenMP's or BLAS's threads: the work is spread over processes and threads already.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

# Not a module that is run: its classes would have another name there than here.
_PROGRAM = f"import ast, sys; sys.path[:] = ast.literal_eval(sys.argv[1]); import {__name__} as p; p.main(sys.argv[2:])"

_numbers = count()


@dataclass(frozen=True)
class _Job:
    """What a process is told."""

    share: LoaderShare
    ring_shape: tuple[int, ...]
    is_quiet: bool
    """Whether another process of the rank says what there is to warn of."""


@dataclass(frozen=True)
class _Part:
    """What a process tells of its part of a batch. The images lie in the ring."""

    batch: Batch
    counters: LoadCounters


@dataclass(frozen=True)
class _Failure:
    """Why a process ends."""

    error: VitscaleError | None
    traceback: str


def load_in_processes(share: LoaderShare, processes: int, *, pin_memory: bool) -> Iterator[Batch]:
    """What :func:`vitscale.train.share.load_share` gives, loaded by several processes.

    Raises:
        DataError: likewise, or a process died.
    """
    data = share.config.data
    shape = (data.prefetch_batches + SPARE_BATCHES, len(share.slots), *data.image_hw, 3)
    memory = ImageMemory(data.image_hw, pin_memory=pin_memory)
    with ExitStack() as stack:
        descriptor = stack.enter_context(_shared_memory(math.prod(shape)))
        ring = _ring(descriptor, shape)
        loaders = []
        for _ in range(processes):
            loader = _LoaderProcess(descriptor)
            stack.callback(loader.end)
            loaders.append(loader)
        for number, (loader, part) in enumerate(zip(loaders, share.split(processes), strict=True)):
            loader.send(_Job(part, shape, is_quiet=number > 0))
        for batch_number in count():
            parts = [batch for loader in loaders if (batch := loader.next_part()) is not None]
            if not parts:
                return
            clock = StageClock()
            images = memory.take(len(share.slots))
            images.copy_(torch.from_numpy(ring[batch_number % len(ring)]))
            for loader in loaders:
                loader.release_batch()
            batch = join_batches(parts, images.permute(0, 3, 1, 2), pin_memory=pin_memory)
            clock.lap("hand_over")
            # The processes hand over too, but that keeps nobody waiting.
            batch.stages = replace(batch.stages, hand_over=clock.seconds.hand_over)
            yield batch


class _LoaderProcess:
    """A process that loads, seen from its rank."""

    def __init__(self, ring_descriptor: int) -> None:
        self._number = next(_numbers)
        self._connection, theirs = Pipe()
        # The rank alone decides what a signal means. Blocked ones stay so in what is started meanwhile.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, repr(sys.path), str(theirs.fileno()), str(ring_descriptor)],
                pass_fds=(theirs.fileno(), ring_descriptor),
                stdin=subprocess.DEVNULL,
                env=os.environ | ONE_THREAD,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()

    def send(self, job: _Job) -> None:
        """Tell it what to load."""
        try:
            self._connection.send_bytes(pickle.dumps(job))
        except OSError as error:
            raise self._death() from error

    def next_part(self) -> Batch | None:
        """Its part of the next batch, without images; None after the last one.

        Raises:
            DataError: as it raised it, or it died.
        """
        try:
            message = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(message, _Part):
            record_counters(self._number, message.counters)
            return message.batch
        if isinstance(message, _Failure):
            raise message.error or RuntimeError(f"a loader's process failed:\n{message.traceback}")
        return None

    def release_batch(self) -> None:
        """Let it use the memory of the oldest batch again."""
        # It may have sent its last part. If it died, the next one cannot be had.
        with suppress(OSError):
            self._connection.send_bytes(b"\0")

    def end(self) -> None:
        """Make it end, and wait for it."""
        self._connection.close()
        try:
            self._process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _death(self) -> DataError:
        status = self._process.wait()
        how = f"with exit status {status}" if status >= 0 else f"of {signal.Signals(-status).name}"
        return DataError(
            f"a process that loads images died {how}; if the node ran out of memory (SIGKILL), lower data.workers, "
            f"data.processes, data.prefetch_batches or data.window, then give the same command again"
        )


@contextmanager
def _shared_memory(num_bytes: int) -> Iterator[int]:
    """A descriptor of memory that only those have whom it is given to, so that nothing of it stays behind.

    Not of /dev/shm, which containers keep small.
    """
    if sys.platform == "linux":
        descriptor = os.memfd_create("vitscale-batches")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.truncate(descriptor, num_bytes)
        yield descriptor
    finally:
        os.close(descriptor)


def _ring(descriptor: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Shared memory for batches: [batches, B, H, W, 3]."""
    return np.frombuffer(mmap.mmap(descriptor, math.prod(shape)), dtype=np.uint8).reshape(shape)


class _PartOfRing:
    """The share's rows of each batch of the ring, in turn, as soon as the rank has copied what was there.

    Args:
        ring: the whole of it.
        slots: rows of the share.
        connection: tells by a message that the oldest batch was copied, and by its end that the rank is gone.
    """

    def __init__(self, ring: NDArray[np.uint8], slots: range, connection: Connection) -> None:
        self._rows = ring[:, slots.start : slots.stop]
        self._taken, self._free = 0, Semaphore(len(ring))
        self._connection = connection
        Thread(target=self._follow, daemon=True, name="copied-batches").start()

    def take(self, size: int) -> Tensor:
        """Memory for ``size`` images: uint8 [size, H, W, 3]."""
        self._free.acquire()
        rows = self._rows[self._taken % len(self._rows)]
        assert len(rows) == size
        self._taken += 1
        return torch.from_numpy(rows)

    def _follow(self) -> None:
        try:
            while True:
                self._connection.recv_bytes()
                self._free.release()
        except (EOFError, OSError):
            os._exit(0)  # whatever the other threads are waiting for


def main(descriptors: Sequence[str]) -> None:
    """Load for a rank, over the connection and the ring of which it has left the descriptors here."""
    descriptor, ring_descriptor = map(int, descriptors)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)
    connection = Connection(descriptor)
    job: _Job = pickle.loads(connection.recv_bytes())
    if job.is_quiet:
        logging.disable(logging.WARNING)
    ring = _PartOfRing(_ring(ring_descriptor, job.ring_shape), job.share.slots, connection)
    nothing = torch.empty(0, dtype=torch.uint8)
    last: _Failure | None = None
    try:
        for batch in load_share(job.share, pin_memory=False, memory=ring.take):
            batch.images = nothing
            connection.send_bytes(pickle.dumps(_Part(batch, LoadCounters.of_process())))
    except VitscaleError as error:
        last = _Failure(error, "")
    except Exception:  # raised in the rank
        last = _Failure(None, traceback.format_exc())
    connection.send_bytes(pickle.dumps(last))
    # Reads that hang are not waited for.
    os._exit(0)
