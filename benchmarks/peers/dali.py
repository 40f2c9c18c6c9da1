"""NVIDIA DALI without a GPU: its own tar reader, our member indexes, decoding of the crop's region only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers.contest import Contestant, Settings, shards_of


def start(root: Path, settings: Settings) -> Iterator[Any]:
    """Batches of its iterator for torch."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    data = settings.data
    tars = shards_of(root)

    @pipeline_def(batch_size=settings.batch_size, num_threads=settings.workers, device_id=None, seed=0)  # type: ignore[untyped-decorator]
    def crops() -> Any:
        encoded = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["jpg"],
            random_shuffle=True,
            name="tars",
        )
        images = fn.decoders.image_random_crop(
            encoded,
            device="cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            random_area=list(data.crop_area),
            random_aspect_ratio=list(data.crop_aspect),
        )
        images = fn.resize(images, size=[settings.image_size] * 2, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    iterator = DALIGenericIterator([crops()], ["images"], auto_reset=True)
    for (batch,) in iterator:
        yield batch["images"]


DALI = Contestant(
    "NVIDIA DALI on CPU",
    "libjpeg-turbo, region of the crop; log-uniform aspect, uniform area; triangular with antialiasing",
    "threads",
    start,
    ("nvidia-dali-cuda120",),
)
