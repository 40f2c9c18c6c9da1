"""The same JPEGs for every loader: one file each, and one shard set."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from vitscale.data.manifest import read_manifest
from vitscale.errors import DataError
from vitscale_shards.place import LocalPlace
from vitscale_shards.planning.planner import make_plans
from vitscale_shards.planning.settings import PlanSettings
from vitscale_shards.sources import SourceSpec
from vitscale_shards.writing.workers import write_sets

CLASSES = 100
# Several shards for each worker of those who share them out.
SHARDS = 16


def write_images(root: Path, shard_set: Path | None, count: int) -> list[int]:
    """Write ``count`` images, those of a shard set over and over again or made ones, to ``images`` and ``shards``.

    Returns:
        The bytes of each.

    Raises:
        DataError: the shard set cannot be read or holds no JPEGs.
    """
    source = photographs() if shard_set is None else cycle(jpegs_of(shard_set))
    sizes = []
    for number, encoded in enumerate(islice(source, count)):
        path = root / "images" / f"{number % CLASSES:04d}" / f"{number:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        sizes.append(path.write_bytes(encoded))
    spec = SourceSpec((str(root / "images"),))
    settings = PlanSettings(samples_per_shard=-(-count // SHARDS))
    write_sets(make_plans(spec.open(), spec.to_json(), settings, LocalPlace(root / "shards")), spec)
    return sizes


def jpegs_of(shard_set: Path) -> list[bytes]:
    """The JPEGs of all tars."""
    found = []
    for shard in read_manifest(shard_set).shards:
        with tarfile.open(shard_set / shard.name) as tar:
            names = (member for member in tar if member.name.lower().endswith((".jpg", ".jpeg")))
            found += [file.read() for member in names if (file := tar.extractfile(member)) is not None]
    if not found:
        raise DataError(f"{shard_set}: holds no JPEGs; this benchmark compares decoders of JPEGs: name another set")
    return found


def photographs() -> Iterator[bytes]:
    """JPEGs of 500 x 375 pixels with smooth shapes and grain, about the weight of ImageNet's."""
    rng = np.random.default_rng(0)
    while True:
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        picture = np.asarray(shapes) + rng.normal(0, 12, (375, 500, 3))
        encoded = io.BytesIO()
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
        yield encoded.getvalue()
