"""Frozen representations of every image of a shard set, gathered from all ranks.

B images of a batch, n images of the set, D width of the representation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.data.loader import Batch, Quarantined
from vitscale.distributed import Ranks
from vitscale.evaluation.pieces import never
from vitscale.evaluation.unreadable import gather_unreadable


@dataclass(frozen=True)
class Features:
    """What a model made of the readable images of a set, in the order of the set."""

    values: NDArray[np.floating]
    """[n, D]"""
    labels: NDArray[np.int64]
    """[n]"""
    unreadable: tuple[str, ...] = ()
    """The other images: shard, key and reason."""

    @classmethod
    def none(cls) -> Features:
        """What ranks other than 0 have of a set."""
        return cls(np.empty((0, 0), np.float32), np.empty(0, np.int64))


def extract_features(
    representation_of: Callable[[Tensor], Tensor],
    batches: Iterator[Batch],
    *,
    ranks: Ranks,
    is_stopping: Callable[[], bool] = never,
    advance: Callable[[int], None] = lambda images: None,
) -> Features | None:
    """Run the model over this rank's batches and gather. Collective.

    Args:
        representation_of: maps uint8 images [B, 3, H, W] to representations [B, D].
        batches: padded batches of this rank, of images with one label each.
        ranks: who takes part.
        is_stopping: collective; asked after each batch. If true, the extraction is given up.
        advance: told how many images this rank is through with.

    Returns:
        All features on rank 0, those of no image elsewhere; ``None`` if it was given up.
    """
    ids, values, labels, bad = [], [], [], list[Quarantined]()
    # Not inference_mode: ZeRO 3 keeps the parameters that it gathers here, and training goes on with them.
    with torch.no_grad():
        for batch in batches:
            mask = batch.mask
            values.append(representation_of(batch.images).float().cpu()[mask].numpy())
            labels.append(batch.labels[mask, 0].numpy())
            ids.append(np.asarray(batch.sample_ids, dtype=np.int64)[mask.numpy()])
            bad += batch.quarantined
            advance(len(batch.images))
            if is_stopping():
                return None
    parts = ranks.gather((np.concatenate(ids), np.concatenate(values), np.concatenate(labels)))
    unreadable = gather_unreadable(ranks, bad)
    if not ranks.is_main:
        return Features.none()
    all_ids, all_values, all_labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    # Back to the set's own order, so that the draw of shots does not depend on the number of ranks.
    order = np.argsort(all_ids)
    return Features(all_values[order], all_labels[order], unreadable)
