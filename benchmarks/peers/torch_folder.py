"""A folder of images behind torch's DataLoader, the set-up of most training scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from peers.contest import OURS, PILLOW, Contestant, Crop, Settings, images_of, our_crop, pillow_crop, stack


class FolderDataset(Dataset[NDArray[np.uint8]]):
    """Crops of files. It has many epochs in one, so that the end of an epoch of a small set does not count."""

    EPOCHS = 1000

    def __init__(self, files: list[Path], crop: Crop) -> None:
        self._files, self._crop = [str(file) for file in files], crop

    def __len__(self) -> int:
        return len(self._files) * self.EPOCHS

    def __getitem__(self, number: int) -> NDArray[np.uint8]:
        with open(self._files[number % len(self._files)], "rb") as file:  # noqa: PTH123
            return self._crop(file.read())


def batches(root: Path, settings: Settings, crop: Crop) -> Iterator[Any]:
    """Batches that worker processes collate."""
    files = images_of(root)
    # Shuffling a thousand epochs at once would take a second that no epoch of a training run takes.
    numbers = np.random.default_rng(0).permutation(len(files)).tolist() * FolderDataset.EPOCHS
    loader = DataLoader(
        FolderDataset(files, crop),
        batch_size=settings.batch_size,
        sampler=numbers,
        num_workers=settings.workers,
        collate_fn=stack,
        prefetch_factor=4,
    )
    return iter(loader)


def start(root: Path, settings: Settings) -> Iterator[Any]:
    """With Pillow."""
    return batches(root, settings, pillow_crop(settings))


def start_with_our_pixels(root: Path, settings: Settings) -> Iterator[Any]:
    """With our decoder: what is left is the loader."""
    return batches(root, settings, our_crop(settings))


FOLDER = Contestant("image folder + torch DataLoader, Pillow", PILLOW, "processes", start)
FOLDER_OUR_PIXELS = Contestant("image folder + torch DataLoader, our decoder", OURS, "processes", start_with_our_pixels)
