"""SPDL: threads that run FFmpeg, which decodes, crops and resizes in one filter graph per image.

spdl-io loads FFmpeg's shared libraries (versions 4 to 9), which must be installed or on LD_LIBRARY_PATH.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from peers.contest import OURS, Contestant, Settings, images_of, our_crop, stack
from vitscale.data.transforms import inception_crop


def shuffled(root: Path) -> Iterable[str]:
    """Files, over and over again."""
    files = [str(path) for path in images_of(root)]
    random.Random(0).shuffle(files)
    return cycle(files)


def start(root: Path, settings: Settings) -> Iterator[Any]:
    """With its own decoder."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    data, size, rng = settings.data, settings.image_size, random.Random(0)

    def decode(path: str) -> Any:
        packets = spdl.io.demux_image(path)
        box = inception_crop(packets.width, packets.height, rng, area=data.crop_area, aspect=data.crop_aspect)
        # hflip is a filter too; without one, FFmpeg has less to do.
        flip = ",hflip" if rng.random() < 0.5 else ""
        crop = f"crop={box.right - box.left}:{box.bottom - box.top}:{box.left}:{box.top}:exact=1"
        scale = f"scale={size}:{size}:flags=bilinear,format=pix_fmts=rgb24"
        return spdl.io.decode_packets(packets, filter_desc=f"{crop},{scale}{flip}")

    def batch(frames: list[Any]) -> Any:
        return spdl.io.to_torch(spdl.io.convert_frames(frames))

    pipeline = (
        PipelineBuilder()
        .add_source(shuffled(root))
        .pipe(decode, concurrency=settings.workers)
        .aggregate(settings.batch_size)
        .pipe(batch)
        .add_sink(4)
        .build(num_threads=settings.workers, max_failures=0)
    )
    with pipeline.auto_stop():
        yield from pipeline


def start_with_our_pixels(root: Path, settings: Settings) -> Iterator[Any]:
    """With our decoder: what is left is its pipeline."""
    from spdl.pipeline import PipelineBuilder

    crop = our_crop(settings)
    pipeline = (
        PipelineBuilder()
        .add_source(shuffled(root))
        .pipe(lambda path: crop(Path(path).read_bytes()), concurrency=settings.workers)
        .aggregate(settings.batch_size)
        .pipe(stack)
        .add_sink(4)
        .build(num_threads=settings.workers, max_failures=0)
    )
    with pipeline.auto_stop():
        yield from pipeline


SPDL = Contestant(
    "SPDL", "FFmpeg, whole image; our crop law; bilinear (swscale)", "threads", start, ("spdl-core", "spdl-io")
)
SPDL_OUR_PIXELS = Contestant("SPDL pipeline, our decoder", OURS, "threads", start_with_our_pixels, ("spdl-core",))
