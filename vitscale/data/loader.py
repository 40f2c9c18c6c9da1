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
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.config.schema import DataConfig
from vitscale.data.allocation import ImageMemory, keep_freed_memory
from vitscale.data.decode import BadSampleError
from vitscale.data.order import Place, hash64
from vitscale.data.readers import OpenWindows, Readers, Samples
from vitscale.data.stages import StageClock, StageSeconds
from vitscale.data.stream import Fault, RawSample, ShardStream
from vitscale.data.transforms import evaluation_crop, train_crop
from vitscale.errors import DataError

NO_LABEL = -1
# Salt that keeps augmentation randomness apart from the permutations of the order.
AUGMENTATION = 0xA06

Pixels = Callable[[RawSample, Place, NDArray[np.uint8], StageClock], None]
"""Decodes and crops a sample into uint8 pixels [H, W, 3], and says how long each took."""


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
    """uint8 [B, 3, H, W]; the channels of a pixel lie together"""
    labels: Tensor
    """int64 [B, M], padded with -1"""
    mask: Tensor
    """bool [B], False where the slot is padding or a bad sample of an evaluation"""
    keys: list[str]
    sample_ids: list[int]
    quarantined: list[Quarantined] = field(default_factory=list)
    digest: int = 0
    """Sum of a 48-bit hash of (position, key) per sample: summed over ranks it names the global batch."""
    stages: StageSeconds = field(default_factory=StageSeconds)
    """Where the time of the threads went."""


class _Slot(NamedTuple):
    """One slot of a batch to fill, and the window that its sample comes with."""

    number: int
    position: int
    place: Place
    samples: Future[Samples]


class BatchLoader:
    """Assembles batches at the positions it is given.

    Args:
        stream: source of windows.
        pixels: decodes and crops one sample.
        image_hw: height and width of the crops.
        num_classes: outputs of the head; a label outside is an error.
        labels_per_sample: exactly this many labels are needed, or any number if ``None``.
        data: threads, and how far ahead they work.
        pin_memory: page-lock images and labels for an asynchronous copy to a GPU.
        memory: gives the memory for the images of a batch of so many, instead of one's own.
    """

    def __init__(
        self,
        stream: ShardStream,
        pixels: Pixels,
        *,
        image_hw: tuple[int, int],
        num_classes: int | None,
        labels_per_sample: int | None,
        data: DataConfig,
        pin_memory: bool,
        memory: Callable[[int], Tensor] | None = None,
    ) -> None:
        self._stream, self._pixels = stream, pixels
        self._num_classes, self._labels_per_sample = num_classes, labels_per_sample
        self._data, self._pin_memory = data, pin_memory
        self._memory = memory or ImageMemory(image_hw, pin_memory=pin_memory).take
        keep_freed_memory()

    def batches(self, position_lists: Iterable[Sequence[int | None]]) -> Iterator[Batch]:
        """Batches at the given positions, in order. ``None`` is padding.

        Raises:
            DataError: a label is outside the head, no sample can take a bad one's place, or the storage is silent.
        """
        readers = Readers(self._data.storage.connections)
        decoders = ThreadPoolExecutor(self._data.workers, "decode")
        windows = OpenWindows(lambda window: readers.submit(partial(self._stream.read_window, window)))
        # A batch is asked for, its windows are read; later it is being decoded; later still it is taken.
        asked: deque[tuple[int, list[_Slot]]] = deque()
        decoding: deque[_PendingBatch] = deque()
        try:
            for positions in position_lists:
                asked.append((len(positions), self._ask(positions, windows)))
                if len(asked) > self._data.read_ahead_batches:
                    decoding.append(self._decode(*asked.popleft(), decoders, readers))
                if len(decoding) > self._data.prefetch_batches:
                    yield decoding.popleft().finish()
            while asked or decoding:
                if asked:
                    decoding.append(self._decode(*asked.popleft(), decoders, readers))
                if not asked or len(decoding) > self._data.prefetch_batches:
                    yield decoding.popleft().finish()
        finally:
            # Reads are cancelled first, so that no decoder waits for them.
            readers.stop()
            decoders.shutdown(cancel_futures=True)

    def _ask(self, positions: Sequence[int | None], windows: OpenWindows) -> list[_Slot]:
        slots = []
        for number, position in enumerate(positions):
            if position is not None:
                place = self._stream.order.locate(position)
                slots.append(_Slot(number, position, place, windows.samples_of(place.window)))
        return slots

    def _decode(self, size: int, slots: list[_Slot], decoders: ThreadPoolExecutor, readers: Readers) -> _PendingBatch:
        batch = _PendingBatch(self._memory(size), self._pin_memory)
        share = -(-len(slots) // self._data.workers) or 1
        for start in range(0, len(slots), share):
            batch.work.append(decoders.submit(self._fill, batch, slots[start : start + share], readers))
        return batch

    def _fill(self, batch: _PendingBatch, slots: list[_Slot], readers: Readers) -> StageSeconds:
        clock = StageClock()
        for slot in slots:
            self._fill_slot(batch, slot, readers, clock)
        return clock.seconds

    def _fill_slot(self, batch: _PendingBatch, slot: _Slot, readers: Readers, clock: StageClock) -> None:
        number, position = slot.number, slot.position
        bad: list[Fault] = []
        for candidate, sample in self._candidates(slot, readers):
            clock.lap("read")
            if isinstance(sample, RawSample):
                try:
                    labels = self._checked_labels(sample)
                    self._pixels(sample, candidate, batch.pixels[number], clock)
                    batch.samples[number], batch.labels[number] = sample, labels
                    break
                except BadSampleError as error:
                    sample = Fault(sample.key, sample.sample_id, sample.shard, str(error))
            bad.append(sample)
        filled = batch.samples[number]
        if filled is not None:
            batch.digests[number] = _digest(position, filled.key)
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
            batch.bad[number] = Quarantined(position, fault.key, fault.shard, fault.reason, substitute)

    def _candidates(self, slot: _Slot, readers: Readers) -> Iterator[tuple[Place, RawSample | Fault]]:
        place, samples = slot.place, slot.samples.result()
        yield place, samples[place.offset]
        for candidate in self._stream.order.substitutes(place):
            near = candidate.window == place.window
            if near:
                yield candidate, samples[candidate.offset]
            else:
                yield candidate, readers.submit(partial(self._stream.read_sample, candidate)).result()

    def _checked_labels(self, sample: RawSample) -> tuple[int, ...]:
        labels = sample.labels
        if self._labels_per_sample is not None and len(labels) != self._labels_per_sample:
            raise BadSampleError(f"{len(labels)} labels; this loss needs {self._labels_per_sample} per image")
        if self._num_classes is not None and labels and max(labels) >= self._num_classes:
            raise DataError(
                f"{sample.shard}: sample {sample.key} has label {max(labels)}, but the head has "
                f"{self._num_classes} outputs (0 to {self._num_classes - 1}); set model.num_classes to the "
                f"number of classes of the shard set"
            )
        return labels


class _PendingBatch:
    """A batch whose slots are being filled by threads."""

    def __init__(self, images: Tensor, pin_memory: bool) -> None:
        self._images, self._pin_memory, size = images, pin_memory, len(images)
        self.pixels: NDArray[np.uint8] = images.numpy()
        self.samples: list[RawSample | None] = [None] * size
        self.labels: list[tuple[int, ...]] = [()] * size
        self.bad: list[Quarantined | None] = [None] * size
        self.digests = [0] * size
        self.work: list[Future[StageSeconds]] = []

    def finish(self) -> Batch:
        """Wait until all slots are filled."""
        stages = sum((part.result() for part in self.work), StageSeconds())
        clock = StageClock()
        for number, sample in enumerate(self.samples):
            if sample is None:
                self.pixels[number] = 0
        batch = Batch(
            images=self._images.permute(0, 3, 1, 2),
            labels=_padded(self.labels, self._pin_memory),
            mask=torch.tensor([sample is not None for sample in self.samples]),
            keys=[sample.key if sample else "" for sample in self.samples],
            sample_ids=[sample.sample_id if sample else -1 for sample in self.samples],
            quarantined=[fault for fault in self.bad if fault is not None],
            digest=sum(self.digests),
        )
        clock.lap("hand_over")
        batch.stages = stages + clock.seconds
        return batch


def join_batches(parts: Sequence[Batch], images: Tensor, *, pin_memory: bool) -> Batch:
    """One batch of several ones, whose images are joined already."""
    return Batch(
        images=images,
        labels=_padded([labels for part in parts for labels in part.labels.tolist()], pin_memory),
        mask=torch.cat([part.mask for part in parts]),
        keys=[key for part in parts for key in part.keys],
        sample_ids=[sample_id for part in parts for sample_id in part.sample_ids],
        quarantined=[fault for part in parts for fault in part.quarantined],
        digest=sum(part.digest for part in parts),
        stages=sum((part.stages for part in parts), StageSeconds()),
    )


def _padded(labels: Sequence[Sequence[int]], pin_memory: bool) -> Tensor:
    """Labels of each image, to the length of the longest: int64 [B, M]."""
    widest = max(1, *map(len, labels))
    rows = [(*of_image, *[NO_LABEL] * (widest - len(of_image))) for of_image in labels]
    return torch.tensor(rows, dtype=torch.int64, pin_memory=pin_memory)


def _digest(position: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{position} {key}".encode(), digest_size=6).digest(), "big")


def train_recipe(config: DataConfig, seed: int) -> Pixels:
    """Random crops; the randomness depends on (seed, epoch, sample), never on who decodes it."""

    def pixels(sample: RawSample, place: Place, out: NDArray[np.uint8], clock: StageClock) -> None:
        randomness = hash64(seed, AUGMENTATION, place.window.epoch, sample.sample_id)
        train_crop(sample.image, config, randomness, out, clock)

    return pixels


def evaluation_recipe(config: DataConfig) -> Pixels:
    """Central crops."""

    def pixels(sample: RawSample, _place: Place, out: NDArray[np.uint8], clock: StageClock) -> None:
        evaluation_crop(sample.image, config, out, clock)

    return pixels


def value_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels to [-1, 1] on whatever device they are, computed in fp32 (ViT reference: x / 127.5 - 1).

    Args:
        images: [B, 3, H, W], with any strides.
        dtype: of the result, which is contiguous.
    """
    return (images.contiguous().float() / 127.5 - 1).to(dtype)
