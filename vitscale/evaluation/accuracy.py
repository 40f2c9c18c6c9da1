"""Top-1 and top-5 accuracy over a shard set, exact for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_stat_scores

from vitscale.config.schema import DataConfig
from vitscale.data.loader import Batch, BatchLoader, evaluation_recipe
from vitscale.data.manifest import Manifest
from vitscale.data.order import SequentialOrder, evaluation_positions
from vitscale.data.shard_set import open_source
from vitscale.data.stream import ShardStream
from vitscale.distributed import Ranks
from vitscale.errors import DataError, on_every_rank


@dataclass(frozen=True)
class Accuracy:
    """Counts over all ranks; every readable sample is counted once."""

    images: int
    correct: int
    correct_top5: int
    unreadable: int

    @property
    def top1(self) -> float:
        """Share of images whose best class is right."""
        return self.correct / self.images

    @property
    def top5(self) -> float:
        """Share of images whose class is among the best five (or all, if there are fewer)."""
        return self.correct_top5 / self.images

    def to_json(self) -> dict[str, float | int]:
        """Plain data for records."""
        return {"top1": self.top1, "top5": self.top5, "images": self.images, "unreadable": self.unreadable}


def evaluate_accuracy(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterator[Batch],
    *,
    num_classes: int,
    ranks: Ranks,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Accuracy | None:
    """Count right answers. Collective: every rank has the same number of batches.

    Args:
        logits_of: maps uint8 images [B, 3, H, W] to logits [B, K].
        batches: padded batches of this rank.
        num_classes: K.
        ranks: who takes part.
        is_stopping: collective; asked after each batch. If true, the evaluation is given up.

    Returns:
        The accuracy, or ``None`` if it was given up.

    Raises:
        DataError: no image can be read.
    """
    counts = torch.zeros(4, dtype=torch.int64)
    # Not inference_mode: ZeRO 3 keeps the parameters that it gathers here, and training goes on with them.
    with torch.no_grad():
        for batch in batches:
            logits = logits_of(batch.images).float()
            # Counted where the logits are: with many classes, copying them costs more than counting.
            labels = batch.labels[:, 0].to(logits.device)[batch.mask]
            logits = logits[batch.mask]
            if len(labels):
                counts += torch.tensor(
                    [
                        len(labels),
                        _correct(logits, labels, num_classes, 1),
                        _correct(logits, labels, num_classes, min(5, num_classes)),
                        0,
                    ]
                )
            counts[3] += len(batch.quarantined)
            if is_stopping():
                return None
    accuracy = Accuracy(*ranks.sum_ints(counts.tolist()))
    if not accuracy.images:
        raise on_every_rank(
            DataError(f"none of {accuracy.unreadable} images can be read; write the shard set again and evaluate anew")
        )
    return accuracy


def _correct(logits: Tensor, labels: Tensor, num_classes: int, top_k: int) -> int:
    if num_classes == 1:
        return len(labels)
    # The loader has checked the labels already.
    scores = multiclass_stat_scores(
        logits, labels, num_classes=num_classes, top_k=top_k, average="micro", validate_args=False
    )
    return int(scores[0])  # true positives


def evaluation_batches(
    manifest: Manifest, data: DataConfig, *, num_classes: int | None, batch_size: int, ranks: Ranks
) -> Iterator[Batch]:
    """This rank's share of a shard set, in order, padded so that all ranks have equally many batches."""
    # Windows as long as a batch: each is read by exactly one rank.
    order = SequentialOrder([shard.num_samples for shard in manifest.shards], window=batch_size)
    loader = BatchLoader(
        ShardStream([open_source(manifest, data.storage)], order),
        evaluation_recipe(data),
        image_hw=data.image_hw,
        num_classes=num_classes,
        labels_per_sample=1,
        data=data,
        pin_memory=ranks.device.type == "cuda",
    )
    positions = evaluation_positions(
        manifest.num_samples, rank=ranks.topology.rank, world_size=ranks.world_size, batch_size=batch_size
    )
    return loader.batches(positions)
