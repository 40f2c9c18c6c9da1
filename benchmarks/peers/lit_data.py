"""LitData: its own chunks behind its own DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers.contest import PILLOW, Contestant, Settings, images_of, pillow_crop, stack

FOLDER = "litdata"


def read(path: str) -> dict[str, Any]:
    """One sample."""
    return {"image": Path(path).read_bytes(), "label": int(Path(path).parent.name)}


def prepare(root: Path) -> None:
    """Write chunks of the size that its documentation takes."""
    from litdata import optimize

    files = [str(path) for path in images_of(root)]
    optimize(fn=read, inputs=files, output_dir=str(root / FOLDER), chunk_bytes="64MB", num_workers=1, verbose=False)


def start(root: Path, settings: Settings) -> Iterator[Any]:
    """Shuffled samples, decoded and collated by worker processes that live from one epoch to the next."""
    from litdata import StreamingDataLoader, StreamingDataset

    crop = pillow_crop(settings)

    class Crops(StreamingDataset):  # type: ignore[misc,valid-type]
        def __getitem__(self, number: Any) -> Any:
            return crop(super().__getitem__(number)["image"])

    loader = StreamingDataLoader(
        Crops(str(root / FOLDER), shuffle=True, drop_last=True),
        batch_size=settings.batch_size,
        num_workers=settings.workers,
        collate_fn=stack,
        persistent_workers=True,
        prefetch_factor=4,
    )
    while True:
        yield from loader


LITDATA = Contestant("LitData, Pillow", PILLOW, "processes", start, ("litdata",), prepare)
