"""How close the loader comes to the bare decoder, in one run on one machine.

    python benchmarks/loader.py [SHARDSET] [--image-size 224]

Without a shard set, photograph-sized JPEGs are made in a temporary folder. Prints images per second and their ratios;
results that are worth keeping go to benchmarks/results with the command, the versions and the machine.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

from vitscale.config.schema import DataConfig
from vitscale.data.loader import BatchLoader, train_recipe
from vitscale.data.manifest import Manifest, read_manifest
from vitscale.data.order import Place, SampleOrder, WindowId, train_positions
from vitscale.data.stream import RawSample, ShardStream

BATCH = 64
REPEATS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="?", type=Path, help="a shard set; photographs are made if omitted")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=512, help="images per measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = read_manifest(arguments.shards or make_photographs(Path(folder), arguments.images))
        config = DataConfig(train=manifest.folder, image_size=arguments.image_size)
        measure(manifest, config, arguments.images)


def measure(manifest: Manifest, config: DataConfig, images: int) -> None:
    """Interleave the contestants, so that a busy moment of the machine hits all of them."""
    contestants: dict[str, Callable[[], None]] = {"bare decoder, 1 thread": bare_decoder(manifest, config, images)}
    for workers in (1, 2):
        contestants[f"loader, {workers} thread{'s' * (workers > 1)}"] = loader(manifest, config, images, workers)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(REPEATS):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            rates[name].append(images / (time.perf_counter() - start))
    print(
        f"torch {torch.__version__}, Pillow {PIL.__version__}, Python {platform.python_version()}, {platform.machine()}"
    )
    print(f"{images} images of {manifest.folder.name}, crops of {config.image_size} px, {REPEATS} repeats\n")
    print("| what | images/s, median | min | max | of the bare decoder |\n|---|---|---|---|---|")
    limit = statistics.median(rates["bare decoder, 1 thread"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.0f} | {min(values):.0f} | {max(values):.0f} | {median / limit:.2f} |")


def bare_decoder(manifest: Manifest, config: DataConfig, images: int) -> Callable[[], None]:
    """The limit: decode and crop images that are in memory already, one after another."""
    order = SampleOrder([s.num_samples for s in manifest.shards], seed=0, lanes=1, window=images)
    stream = ShardStream(manifest, order)
    windows = (stream.read_window(WindowId(0, 0, number)) for number in range(3))
    samples = [s for window in windows for s in window if isinstance(s, RawSample)][:images]
    pixels = train_recipe(config, seed=0)

    def run() -> None:
        for sample in samples:
            pixels(sample, Place(WindowId(0, 0, 0), 0))

    return run


def loader(manifest: Manifest, config: DataConfig, images: int, workers: int) -> Callable[[], None]:
    """Everything between the tars and a batch."""
    order = SampleOrder([s.num_samples for s in manifest.shards], seed=0, lanes=BATCH, window=config.window)
    batches = BatchLoader(
        ShardStream(manifest, order),
        train_recipe(config, seed=0),
        image_hw=config.image_hw,
        num_classes=None,
        labels_per_sample=None,
        workers=workers,
        prefetch=config.prefetch_batches,
        pin_memory=False,
    )
    steps = images // BATCH

    def run() -> None:
        positions = (
            train_positions(s, 0, rank=0, world_size=1, micro_batch_size=BATCH, global_batch_size=BATCH)
            for s in range(steps)
        )
        assert sum(len(batch.keys) for batch in islice(batches.batches(positions), steps)) == steps * BATCH

    return run


def make_photographs(folder: Path, count: int) -> Path:
    """JPEGs of 500 x 375 pixels with smooth shapes and grain, about the weight of ImageNet's, as one shard set."""
    from vitscale_shards.place import LocalPlace
    from vitscale_shards.planning.planner import make_plans
    from vitscale_shards.planning.settings import PlanSettings
    from vitscale_shards.sources import SourceSpec
    from vitscale_shards.writing.workers import write_sets

    rng = np.random.default_rng(0)
    images = folder / "images" / "photograph"
    images.mkdir(parents=True)
    for number in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        grain = rng.normal(0, 12, (375, 500, 3))
        picture = Image.fromarray(np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8))
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=90)
        (images / f"{number:05d}.jpg").write_bytes(encoded.getvalue())
    spec = SourceSpec((str(folder / "images"),))
    write_sets(make_plans(spec.open(), spec.to_json(), PlanSettings(), LocalPlace(folder / "photographs")), spec)
    return folder / "photographs" / "train"


if __name__ == "__main__":
    main()
