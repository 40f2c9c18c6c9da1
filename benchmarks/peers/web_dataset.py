"""webdataset on our own tars, batched in the workers of a torch DataLoader as its documentation advises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.contest import OURS, PILLOW, Contestant, Crop, Settings, our_crop, pillow_crop, shards_of, stack

SHUFFLE_POOL = 1000


def batches(root: Path, settings: Settings, crop: Crop) -> Iterator[Any]:
    """Batches that worker processes make, each of shards of its own."""
    import webdataset

    def encoded(sample: dict[str, Any]) -> NDArray[np.uint8]:
        return crop(sample["jpg"])

    dataset = (
        webdataset.WebDataset([str(path) for path in shards_of(root)], resampled=True, shardshuffle=False, seed=0)
        .shuffle(SHUFFLE_POOL)
        .map(encoded)
        .batched(settings.batch_size, collation_fn=stack)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=settings.workers, prefetch_factor=4)
    return iter(loader)


def start(root: Path, settings: Settings) -> Iterator[Any]:
    """With Pillow."""
    return batches(root, settings, pillow_crop(settings))


def start_with_our_pixels(root: Path, settings: Settings) -> Iterator[Any]:
    """With our decoder: what is left is the loader."""
    return batches(root, settings, our_crop(settings))


WEBDATASET = Contestant("webdataset + torch DataLoader, Pillow", PILLOW, "processes", start, ("webdataset",))
WEBDATASET_OUR_PIXELS = Contestant(
    "webdataset + torch DataLoader, our decoder", OURS, "processes", start_with_our_pixels, ("webdataset",)
)
