"""Frozen representations of every image of a shard set, gathered over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.data.loader import Batch
from vitscale.distributed import Ranks


@dataclass(frozen=True)
class Features:
    """Representations [n, D] in float64 and labels [n], in the order of the shard set."""

    values: NDArray[np.float64]
    labels: NDArray[np.int64]


def extract_features(
    representation_of: Callable[[Tensor], Tensor], batches: Iterator[Batch], *, ranks: Ranks
) -> Features:
    """Run the model over this rank's batches and gather. Collective. Every rank gets all features.

    Args:
        representation_of: maps uint8 images [B, 3, H, W] to representations [B, D].
        batches: padded batches of this rank.
        ranks: who takes part.
    """
    ids, values, labels = [], [], []
    with torch.inference_mode():
        for batch in batches:
            mask = batch.mask
            values.append(representation_of(batch.images).float().cpu()[mask].numpy())
            labels.append(batch.labels[mask, 0].numpy())
            ids.append(np.asarray(batch.sample_ids, dtype=np.int64)[mask.numpy()])
    parts = ranks.gather((np.concatenate(ids), np.concatenate(values), np.concatenate(labels)))
    all_ids, all_values, all_labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    # Back to the set's own order, so that the draw of shots does not depend on the number of ranks.
    order = np.argsort(all_ids)
    return Features(all_values[order].astype(np.float64), all_labels[order])
