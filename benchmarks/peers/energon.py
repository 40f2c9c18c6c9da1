"""Megatron-Energon: the same tars with its metadata beside them, behind its own loader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers.contest import PILLOW, Contestant, Settings, pillow_crop, shards_of, stack

FOLDER = "energon"
SHUFFLE_POOL = 1000
# Raw members; the task encoder decodes them.
DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


def prepare(root: Path) -> None:
    """Index the tars as ``energon prepare`` does."""
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    folder = root / FOLDER
    folder.mkdir()
    for tar in shards_of(root):
        os.link(tar, folder / tar.name)
    names = [tar.name for tar in shards_of(root)]
    WebdatasetPreparator.prepare_dataset(EPath(folder), names, split_parts_ratio=[("train", 1.0)], workers=2)
    (folder / ".nv-meta" / "dataset.yaml").write_text(DATASET)


def start(root: Path, settings: Settings) -> Iterator[Any]:
    """Shuffled samples, decoded and batched by worker processes."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        ImageSample,
        WorkerConfig,
        basic_sample_keys,
        get_loader,
        get_train_dataset,
        stateless,
    )

    crop = pillow_crop(settings)

    @stateless  # type: ignore[untyped-decorator]
    def cook(sample: dict[str, Any]) -> Any:
        return ImageSample(**basic_sample_keys(sample), image=sample["jpg"])

    class Crops(DefaultTaskEncoder):  # type: ignore[misc,valid-type]
        cookers = (Cooker(cook),)
        decoder = None

        @stateless(restore_seeds=True)  # type: ignore[untyped-decorator]
        def encode_sample(self, sample: Any) -> Any:
            sample.image = crop(sample.image)
            return sample

        def batch(self, samples: list[Any]) -> Any:
            return stack([sample.image for sample in samples])

    workers = WorkerConfig(rank=0, world_size=1, num_workers=settings.workers)
    dataset = get_train_dataset(
        root / FOLDER,
        batch_size=settings.batch_size,
        batch_drop_last=True,
        shuffle_buffer_size=SHUFFLE_POOL,
        max_samples_per_sequence=100,
        worker_config=workers,
        task_encoder=Crops(),
    )
    return iter(get_loader(dataset, prefetch_factor=4))


ENERGON = Contestant("Megatron-Energon, Pillow", PILLOW, "processes", start, ("megatron-energon",), prepare)
