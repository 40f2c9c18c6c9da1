"""MosaicML Streaming: MDS shards behind torch's DataLoader."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from peers.contest import PILLOW, Contestant, Settings, images_of, pillow_crop, stack

FOLDER = "mds"
# One epoch that does not end while it is measured.
EPOCH = 200_000


def prepare(root: Path) -> None:
    """Write MDS shards of the default size, 64 MB."""
    load()
    from streaming import MDSWriter

    with MDSWriter(out=str(root / FOLDER), columns={"image": "bytes", "label": "int"}) as writer:
        for path in images_of(root):
            writer.write({"image": path.read_bytes(), "label": int(path.parent.name)})


def start(root: Path, settings: Settings) -> Iterator[Any]:
    """Shuffled samples, decoded and collated by worker processes."""
    load()
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    crop = pillow_crop(settings)

    class Crops(StreamingDataset):  # type: ignore[misc,valid-type]
        def __getitem__(self, number: int) -> Any:
            return crop(super().__getitem__(number)["image"])

    dataset = Crops(local=str(root / FOLDER), shuffle=True, batch_size=settings.batch_size, epoch_size=EPOCH)
    loader = DataLoader(
        dataset, batch_size=settings.batch_size, num_workers=settings.workers, collate_fn=stack, prefetch_factor=4
    )
    return iter(loader)


def load() -> None:
    """Import the package. It imports torchvision for data sets that are not used here, and torchvision's wheels do
    not load beside a CPU-only torch: empty modules take its place if it is not there."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ):
            sys.modules[name] = module_from_spec(ModuleSpec(name, None))
        vars(sys.modules["torchvision.datasets"]).update(VisionDataset=object, CIFAR10=object)
        vars(sys.modules["torchvision.transforms.functional"]).update(to_tensor=None)
    import streaming  # noqa: F401


STREAMING = Contestant("MosaicML Streaming, Pillow", PILLOW, "processes", start, ("mosaicml-streaming",), prepare)
