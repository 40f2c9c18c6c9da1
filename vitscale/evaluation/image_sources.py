"""Images that a user names: files, folders, glob patterns and shard sets, as batches of pixels.

B images of a batch.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.config.schema import DataConfig, StorageConfig
from vitscale.data.decode import BadSampleError
from vitscale.data.loader import BatchLoader, evaluation_recipe
from vitscale.data.manifest import INDEX_NAME, Manifest
from vitscale.data.order import SequentialOrder
from vitscale.data.parts import split_part
from vitscale.data.shard_set import open_shard_set, open_source
from vitscale.data.storage.drivers import is_path, without_secrets
from vitscale.data.stream import IMAGE_EXTENSIONS, ShardStream
from vitscale.data.transforms import evaluation_crop
from vitscale.errors import DataError

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be used."""

    name: str
    reason: str


@dataclass(frozen=True)
class PixelBatch:
    """Neighbouring images, cropped as a model takes them."""

    names: list[str]
    images: Tensor
    """uint8 [B, 3, H, W], of those that can be read."""
    unreadable: list[Unreadable] = field(default_factory=list)
    """Those between and beside them that cannot."""


@dataclass(frozen=True)
class ImageSources:
    """What a user's words name, in their order."""

    parts: tuple[tuple[Path, ...] | Manifest, ...]
    """Files, or shard sets."""

    @property
    def num_images(self) -> int:
        """Images, whether they can be read or not."""
        return sum(part.num_samples if isinstance(part, Manifest) else len(part) for part in self.parts)

    def batches(self, data: DataConfig, *, batch_size: int, at_most: int | None = None) -> Iterator[PixelBatch]:
        """Central crops of the images, in order.

        Args:
            data: size and crop, and threads that decode.
            batch_size: images of a batch, unreadable ones included; the last ones of a source may be fewer.
            at_most: take so many only, spread evenly over each source.

        Raises:
            DataError: a storage is silent.
        """
        left = _shares([_size(part) for part in self.parts], at_most)
        for part, count in zip(self.parts, left, strict=True):
            places = range(count) if count == _size(part) else [n * _size(part) // count for n in range(count)]
            if isinstance(part, Manifest):
                yield from _set_batches(part, data, places, batch_size, sparse=count < _size(part))
            else:
                yield from _file_batches([part[place] for place in places], data, batch_size)


def find_images(words: Sequence[str], storage: StorageConfig) -> ImageSources:
    """Look up what each word names: a shard set (folder with index.json, URL, or a part of one), a file, a folder with
    image files at any depth, or a glob pattern of files and folders.

    Args:
        words: of the command line.
        storage: how shard sets are read.

    Raises:
        DataError: a word names nothing, or a folder without images.
    """
    if not words:
        raise DataError("no images are named; give files, folders, patterns or shard sets")
    return ImageSources(tuple(_look_up(word, storage) for word in words))


def _look_up(word: str, storage: StorageConfig) -> tuple[Path, ...] | Manifest:
    if _names_set(word):
        return open_shard_set(word, storage)
    if Path(word).exists():
        return _files_in(Path(word))
    # Path.glob() would need a folder to begin with, and these patterns may begin anywhere.
    found = sorted(glob.glob(word, recursive=True))  # noqa: PTH207
    files = tuple(dict.fromkeys(file for name in found for file in _files_in(Path(name), named=False)))
    if not files:
        kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise DataError(
            f"{without_secrets(word)}: names no image; a file, a folder with images ({kinds}), a pattern or a shard "
            f"set (a folder with {INDEX_NAME}, or a URL) is needed; check the name"
        )
    return files


def _names_set(word: str) -> bool:
    # "train[:500]" is a part of a shard set if "train" is one or a part of one; else brackets are a pattern's.
    if not is_path(word) or (Path(word) / INDEX_NAME).is_file():
        return True
    larger, part = split_part(word)
    return part is not None and _names_set(larger)


def _files_in(path: Path, *, named: bool = True) -> tuple[Path, ...]:
    """A file that was named, whatever it is called, or the images in a folder, by name."""
    if not path.is_dir():
        return (path,) if named or path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS else ()
    found = [
        Path(folder) / name
        for folder, _, names in os.walk(path)
        for name in names
        if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
    ]
    if named and not found:
        raise DataError(
            f"{path}: holds no image and no {INDEX_NAME}; a folder with files that end in "
            f"{', '.join(sorted(IMAGE_EXTENSIONS))}, or a shard set, is needed"
        )
    return tuple(sorted(found))


def _size(part: tuple[Path, ...] | Manifest) -> int:
    return part.num_samples if isinstance(part, Manifest) else len(part)


def _shares(sizes: Sequence[int], at_most: int | None) -> list[int]:
    """How many images of each source to take, in proportion to their sizes."""
    total = sum(sizes)
    if at_most is None or at_most >= total:
        return list(sizes)
    ends = [at_most * sum(sizes[: number + 1]) // total for number in range(len(sizes))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _set_batches(
    manifest: Manifest, data: DataConfig, places: Sequence[int], batch_size: int, *, sparse: bool
) -> Iterator[PixelBatch]:
    # One sample a window where only some are wanted, so that the others are not read.
    order = SequentialOrder([shard.num_samples for shard in manifest.shards], window=1 if sparse else batch_size)
    loader = BatchLoader(
        ShardStream([open_source(manifest, data.storage)], order),
        evaluation_recipe(data),
        image_hw=data.image_hw,
        num_classes=None,
        labels_per_sample=None,
        data=data,
        pin_memory=False,
    )
    chunks = (places[start : start + batch_size] for start in range(0, len(places), batch_size))
    for batch in loader.batches(chunks):
        yield PixelBatch(
            names=[key for key, is_there in zip(batch.keys, batch.mask.tolist(), strict=True) if is_there],
            images=batch.images[batch.mask],
            unreadable=[Unreadable(bad.key, bad.reason) for bad in batch.quarantined],
        )


def _file_batches(files: Sequence[Path], data: DataConfig, batch_size: int) -> Iterator[PixelBatch]:
    ahead: deque[_Reading] = deque()
    with ThreadPoolExecutor(data.workers, "decode") as pool:
        for start in range(0, len(files), batch_size):
            chunk = files[start : start + batch_size]
            pixels = np.zeros((len(chunk), *data.image_hw, 3), np.uint8)
            ahead.append(
                _Reading(chunk, pixels, [pool.submit(_read, *job, data) for job in zip(chunk, pixels, strict=True)])
            )
            if len(ahead) > _BATCHES_AHEAD:
                yield ahead.popleft().finish()
        while ahead:
            yield ahead.popleft().finish()


@dataclass(frozen=True)
class _Reading:
    """Files that are being read."""

    files: Sequence[Path]
    pixels: NDArray[np.uint8]
    """[B, H, W, 3]."""
    reasons: list[Future[str | None]]

    def finish(self) -> PixelBatch:
        reasons = [reason.result() for reason in self.reasons]
        good = [number for number, reason in enumerate(reasons) if reason is None]
        return PixelBatch(
            names=[str(self.files[number]) for number in good],
            images=torch.from_numpy(self.pixels[good]).permute(0, 3, 1, 2),
            unreadable=[
                Unreadable(str(file), reason) for file, reason in zip(self.files, reasons, strict=True) if reason
            ],
        )


def _read(file: Path, out: NDArray[np.uint8], data: DataConfig) -> str | None:
    """Fill ``out`` [H, W, 3], or tell why not."""
    try:
        evaluation_crop(file.read_bytes(), data, out)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except BadSampleError as error:
        return str(error)
    return None
