"""The head's accuracy over a shard set, exact for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vitscale.config.schema import DataConfig, StorageConfig
from vitscale.data.loader import Batch, BatchLoader, evaluation_recipe
from vitscale.data.manifest import Manifest, check_same_classes
from vitscale.data.order import SequentialOrder, evaluation_positions
from vitscale.data.shard_set import open_shard_set, open_source
from vitscale.data.stream import ShardStream
from vitscale.distributed import Ranks
from vitscale.errors import DataError, on_every_rank
from vitscale.evaluation.metrics import Accuracy, AccuracyMeter, LabelSetAccuracy, LabelSetMeter
from vitscale.evaluation.pieces import never

A = TypeVar("A", Accuracy, LabelSetAccuracy)


def open_labelled_set(
    location: str, storage: StorageConfig, num_classes: int, classes: Sequence[str] | None
) -> Manifest:
    """A set that a head is judged on, whose images have one label each or several.

    Args:
        location: folder or URL of the set, or of a part of it.
        storage: how it is read.
        num_classes: outputs of the head.
        classes: what they mean, if it is known.

    Raises:
        DataError: it cannot be used, has more classes than the head, or its labels mean something else.
    """
    manifest = open_shard_set(location, storage)
    if manifest.classes is not None and len(manifest.classes) > num_classes:
        raise DataError(
            f"{manifest.shown}: has {len(manifest.classes)} classes, but the model's head has {num_classes} "
            f"outputs; evaluate on a set with the classes of the training set"
        )
    check_same_classes(manifest, classes, of="the training set")
    return manifest


def head_accuracy(
    logits_of: Callable[[Tensor], Tensor],
    manifest: Manifest,
    data: DataConfig,
    *,
    num_classes: int,
    batch_size: int,
    ranks: Ranks,
    is_stopping: Callable[[], bool] = never,
    confusion: bool = False,
    note: Callable[[Batch], None] = lambda batch: None,
) -> Accuracy | LabelSetAccuracy | None:
    """Judge a head on a set whose images have one label each or several. Collective.

    Args:
        logits_of: maps uint8 images [B, 3, H, W] to logits [B, K].
        manifest: the set.
        data: how it is read and cropped.
        num_classes: K.
        batch_size: B.
        ranks: who takes part.
        is_stopping: collective; asked after each batch. If true, the evaluation is given up.
        confusion: whether the confusion matrix is wanted; not with several labels.
        note: is told each batch.

    Returns:
        What was found, or ``None`` if it was given up.

    Raises:
        DataError: no image can be read.
    """
    several = manifest.multi_label
    batches = evaluation_batches(
        manifest,
        data,
        num_classes=num_classes,
        batch_size=batch_size,
        ranks=ranks,
        labels_per_sample=None if several else 1,
    )
    if not several:
        return evaluate_accuracy(
            logits_of,
            batches,
            num_classes=num_classes,
            ranks=ranks,
            is_stopping=is_stopping,
            confusion=confusion,
            note=note,
        )
    return evaluate_label_sets(
        logits_of,
        batches,
        num_classes=num_classes,
        num_images=manifest.num_samples,
        ranks=ranks,
        is_stopping=is_stopping,
        note=note,
    )


def evaluate_accuracy(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterator[Batch],
    *,
    num_classes: int,
    ranks: Ranks,
    is_stopping: Callable[[], bool] = never,
    confusion: bool = False,
    note: Callable[[Batch], None] = lambda batch: None,
) -> Accuracy | None:
    """Count right answers. Collective: every rank has the same number of batches.

    Args:
        logits_of: maps uint8 images [B, 3, H, W] to logits [B, K].
        batches: padded batches of this rank, of images with one label each.
        num_classes: K.
        ranks: who takes part.
        is_stopping: collective; asked after each batch. If true, the evaluation is given up.
        confusion: whether the confusion matrix is wanted.
        note: is told each batch.

    Returns:
        The accuracy, or ``None`` if it was given up.

    Raises:
        DataError: no image can be read.
    """
    meter = AccuracyMeter(num_classes, confusion=confusion)
    unreadable = _count(
        logits_of, batches, lambda logits, labels: meter.add(logits, labels[:, 0]), is_stopping=is_stopping, note=note
    )
    return None if unreadable is None else _found(meter.total(ranks, unreadable=unreadable), ranks, unreadable)


def evaluate_label_sets(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterator[Batch],
    *,
    num_classes: int,
    num_images: int,
    ranks: Ranks,
    is_stopping: Callable[[], bool] = never,
    note: Callable[[Batch], None] = lambda batch: None,
) -> LabelSetAccuracy | None:
    """The same for images with any number of labels, of which the set has ``num_images``."""
    meter = LabelSetMeter(num_classes, num_images=num_images)
    unreadable = _count(logits_of, batches, meter.add, is_stopping=is_stopping, note=note)
    return None if unreadable is None else _found(meter.total(ranks, unreadable=unreadable), ranks, unreadable)


def _count(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterator[Batch],
    add: Callable[[Tensor, Tensor], None],
    *,
    is_stopping: Callable[[], bool],
    note: Callable[[Batch], None],
) -> int | None:
    """Add all readable images. Returns the number of others on this rank, or ``None`` if it was given up."""
    unreadable = 0
    # Not inference_mode: ZeRO 3 keeps the parameters that it gathers here, and training goes on with them.
    with torch.no_grad():
        for batch in batches:
            logits = logits_of(batch.images).float()
            # Counted where the logits are: with many classes, copying them costs more than counting.
            add(logits[batch.mask], batch.labels.to(logits.device)[batch.mask])
            unreadable += len(batch.quarantined)
            note(batch)
            if is_stopping():
                return None
    return unreadable


def _found(accuracy: A | None, ranks: Ranks, unreadable: int) -> A:
    """The accuracy, of which there is none if no rank could read an image."""
    if accuracy is not None:
        return accuracy
    (total,) = ranks.sum_ints([unreadable])
    raise on_every_rank(DataError(f"none of {total} images can be read; write the shard set again and evaluate anew"))


def evaluation_batches(
    manifest: Manifest,
    data: DataConfig,
    *,
    num_classes: int | None,
    batch_size: int,
    ranks: Ranks,
    labels_per_sample: int | None = 1,
) -> Iterator[Batch]:
    """This rank's share of a shard set, in order, padded so that all ranks have equally many batches."""
    # Windows as long as a batch: each is read by exactly one rank.
    order = SequentialOrder([shard.num_samples for shard in manifest.shards], window=batch_size)
    loader = BatchLoader(
        ShardStream([open_source(manifest, data.storage)], order),
        evaluation_recipe(data),
        image_hw=data.image_hw,
        num_classes=num_classes,
        labels_per_sample=labels_per_sample,
        data=data,
        pin_memory=ranks.device.type == "cuda",
    )
    positions = evaluation_positions(
        manifest.num_samples, rank=ranks.topology.rank, world_size=ranks.world_size, batch_size=batch_size
    )
    return loader.batches(positions)
