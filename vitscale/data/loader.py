"""Micro-batches for one rank: windows are read ahead, threads decode each image straight into its slot.

Threads, not processes: decoding releases the interpreter lock, and no pixels are pickled.
What a slot holds depends on its global position only, never on the number of ranks or threads.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.config.schema import DataConfig
from vitscale.data.decode import BadSampleError, decode_image
from vitscale.data.order import Place, WindowId, hash64
from vitscale.data.stream import Fault, RawSample, ShardStream
from vitscale.data.transforms import evaluation_pixels, train_pixels
from vitscale.errors import DataError

READ_THREADS = 2
NO_LABEL = -1
# Salt that keeps augmentation randomness apart from the permutations of the order.
AUGMENTATION = 0xA06

Samples = list[RawSample | Fault]
Pixels = Callable[[RawSample, Place], NDArray[np.uint8]]


@dataclass(frozen=True)
class Quarantined:
    """A bad sample that was met at a position, and the key of the sample that took its place."""

    position: int
    key: str
    shard: str
    reason: str
    substitute: str | None


@dataclass
class Batch:
    """One micro-batch of one rank. B is the micro-batch size, M the largest number of labels in it."""

    images: Tensor
    """uint8 [B, 3, H, W]"""
    labels: Tensor
    """int64 [B, M], padded with -1"""
    mask: Tensor
    """bool [B], False where the slot is padding or a bad sample of an evaluation"""
    keys: list[str]
    sample_ids: list[int]
    quarantined: list[Quarantined] = field(default_factory=list)
    digest: int = 0
    """Sum of a 48-bit hash of (position, key) per sample: summed over ranks it names the global batch."""


class BatchLoader:
    """Assembles batches at the positions it is given.

    Args:
        stream: source of windows.
        pixels: decodes and crops one sample to uint8 [H, W, 3].
        image_hw: height and width of the crops.
        num_classes: outputs of the head; a label outside is an error.
        labels_per_sample: exactly this many labels are needed, or any number if ``None``.
        workers: decoding threads.
        prefetch: batches prepared ahead.
        pin_memory: page-lock images and labels for an asynchronous copy to a GPU.
    """

    def __init__(
        self,
        stream: ShardStream,
        pixels: Pixels,
        *,
        image_hw: tuple[int, int],
        num_classes: int | None,
        labels_per_sample: int | None,
        workers: int,
        prefetch: int,
        pin_memory: bool,
    ) -> None:
        self._stream, self._pixels, self._image_hw = stream, pixels, image_hw
        self._num_classes, self._labels_per_sample = num_classes, labels_per_sample
        self._workers, self._prefetch, self._pin_memory = workers, prefetch, pin_memory

    def batches(self, position_lists: Iterable[Sequence[int | None]]) -> Iterator[Batch]:
        """Batches at the given positions, in order. ``None`` is padding.

        Raises:
            DataError: a label is outside the head, or no sample can take a bad one's place.
        """
        reader = ThreadPoolExecutor(READ_THREADS, "read")
        decoder = ThreadPoolExecutor(self._workers, "decode")
        windows = _OpenWindows(lambda window: reader.submit(self._stream.read_window, window))
        pending: deque[_PendingBatch] = deque()
        try:
            for positions in position_lists:
                pending.append(self._start(positions, windows, decoder))
                if len(pending) > self._prefetch:
                    yield pending.popleft().finish()
            while pending:
                yield pending.popleft().finish()
        finally:
            # Reads that have not begun are dropped first, so that no decoder waits for them.
            reader.shutdown(wait=False, cancel_futures=True)
            decoder.shutdown(cancel_futures=True)
            reader.shutdown()

    def _start(
        self, positions: Sequence[int | None], windows: _OpenWindows, decoder: ThreadPoolExecutor
    ) -> _PendingBatch:
        batch = _PendingBatch(len(positions), self._image_hw, self._pin_memory)
        tasks = []
        for slot, position in enumerate(positions):
            if position is not None:
                place = self._stream.order.locate(position)
                tasks.append((slot, position, place, windows.samples_of(place.window)))

        def fill(part: list[tuple[int, int, Place, Future[Samples]]]) -> None:
            for slot, position, place, samples in part:
                self._fill_slot(batch, slot, position, place, samples.result())

        chunk = -(-len(tasks) // self._workers) or 1
        batch.work = [decoder.submit(fill, tasks[i : i + chunk]) for i in range(0, len(tasks), chunk)]
        return batch

    def _fill_slot(self, batch: _PendingBatch, slot: int, position: int, place: Place, samples: Samples) -> None:
        bad: list[Fault] = []
        for candidate, sample in self._candidates(place, samples):
            if isinstance(sample, RawSample):
                try:
                    batch.put(slot, sample, self._pixels(sample, candidate), self._checked_labels(sample))
                    break
                except BadSampleError as error:
                    sample = Fault(sample.key, sample.sample_id, sample.shard, str(error))
            bad.append(sample)
        filled = batch.samples[slot]
        if filled is not None:
            batch.digests[slot] = _digest(position, filled.key)
        elif self._stream.order.replaces_bad:
            raise DataError(
                f"{bad[0].shard}: neither {bad[0].key} ({bad[0].reason}) nor any of {len(bad) - 1} samples tried in "
                f"its place can be used, the last being {bad[-1].key} of {bad[-1].shard} ({bad[-1].reason}); "
                f"mend the shard set"
            )
        if bad:
            # A bad substitute is recorded where it is drawn itself, so that each bad sample counts once.
            fault = bad[0]
            substitute = filled.key if filled else None
            batch.bad[slot] = Quarantined(position, fault.key, fault.shard, fault.reason, substitute)

    def _candidates(self, place: Place, samples: Samples) -> Iterator[tuple[Place, RawSample | Fault]]:
        yield place, samples[place.offset]
        window = place.window
        for candidate in self._stream.order.substitutes(place):
            if candidate.window != window:
                window, samples = candidate.window, self._stream.read_window(candidate.window)
            yield candidate, samples[candidate.offset]

    def _checked_labels(self, sample: RawSample) -> tuple[int, ...]:
        labels = sample.labels
        if self._labels_per_sample is not None and len(labels) != self._labels_per_sample:
            raise BadSampleError(f"{len(labels)} labels; this loss needs {self._labels_per_sample} per image")
        if self._num_classes is not None and any(label >= self._num_classes for label in labels):
            raise DataError(
                f"{sample.shard}: sample {sample.key} has label {max(labels)}, but the head has "
                f"{self._num_classes} outputs (0 to {self._num_classes - 1}); set model.num_classes to the "
                f"number of classes of the shard set"
            )
        return labels


class _OpenWindows:
    """The windows that a rank is walking through: of each lane the newest one. Batches keep older ones they need.

    From one epoch to the next a rank's slots may move to other lanes, so all windows of the old epoch are let go.
    """

    def __init__(self, read: Callable[[WindowId], Future[Samples]]) -> None:
        self._read = read
        self._epoch = 0
        self._newest: dict[int, tuple[WindowId, Future[Samples]]] = {}

    def samples_of(self, window: WindowId) -> Future[Samples]:
        """The samples of a window, read or being read."""
        if window.epoch != self._epoch:
            self._newest.clear()
            self._epoch = window.epoch
        known = self._newest.get(window.lane)
        if known is None or known[0] != window:
            known = self._newest[window.lane] = (window, self._read(window))
        return known[1]


class _PendingBatch:
    """A batch whose slots are being filled by threads."""

    def __init__(self, size: int, image_hw: tuple[int, int], pin_memory: bool) -> None:
        self._pin_memory = pin_memory
        self.images = torch.zeros((size, 3, *image_hw), dtype=torch.uint8, pin_memory=pin_memory)
        self._pixels = self.images.numpy()
        self.samples: list[RawSample | None] = [None] * size
        self.labels: list[tuple[int, ...]] = [()] * size
        self.bad: list[Quarantined | None] = [None] * size
        self.digests = [0] * size
        self.work: list[Future[None]] = []

    def put(self, slot: int, sample: RawSample, pixels: NDArray[np.uint8], labels: tuple[int, ...]) -> None:
        self._pixels[slot] = pixels.transpose(2, 0, 1)
        self.samples[slot] = sample
        self.labels[slot] = labels

    def finish(self) -> Batch:
        for part in self.work:
            part.result()
        widest = max(1, *map(len, self.labels))
        padded = [(*labels, *[NO_LABEL] * (widest - len(labels))) for labels in self.labels]
        return Batch(
            images=self.images,
            labels=torch.tensor(padded, dtype=torch.int64, pin_memory=self._pin_memory),
            mask=torch.tensor([sample is not None for sample in self.samples]),
            keys=[sample.key if sample else "" for sample in self.samples],
            sample_ids=[sample.sample_id if sample else -1 for sample in self.samples],
            quarantined=[fault for fault in self.bad if fault is not None],
            digest=sum(self.digests),
        )


def _digest(position: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{position} {key}".encode(), digest_size=6).digest(), "big")


def train_recipe(config: DataConfig, seed: int) -> Pixels:
    """Random crops; the randomness depends on (seed, epoch, sample), never on who decodes it."""

    def pixels(sample: RawSample, place: Place) -> NDArray[np.uint8]:
        image = decode_image(sample.image, max_pixels=config.max_image_pixels)
        return train_pixels(image, config, hash64(seed, AUGMENTATION, place.window.epoch, sample.sample_id))

    return pixels


def evaluation_recipe(config: DataConfig) -> Pixels:
    """Central crops."""

    def pixels(sample: RawSample, _place: Place) -> NDArray[np.uint8]:
        return evaluation_pixels(decode_image(sample.image, max_pixels=config.max_image_pixels), config)

    return pixels


def value_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels to [-1, 1] on whatever device they are, computed in fp32 (ViT reference: x / 127.5 - 1)."""
    return (images.float() / 127.5 - 1).to(dtype)
