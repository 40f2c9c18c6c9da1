"""Global batches of a mixture with bad samples: the same keys and pixels for every world size, from every step on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.shardset import make_shardset, overwrite, spoil_image
from vitscale.config.schema import DataConfig
from vitscale.data.loader import Batch, BatchLoader, train_recipe
from vitscale.data.mixing import MixedOrder, Mixture
from vitscale.data.order import train_positions
from vitscale.data.shard_set import open_source
from vitscale.data.stream import ShardStream

GLOBAL_BATCH, STEPS = 12, 9


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("mixture")
    manifests = [make_shardset(folder / "a", [7, 20, 3, 12]), make_shardset(folder / "b", [9, 14])]
    for number in (2, 8, 9, 10, 11, 17):
        spoil_image(manifests[0], number)
    overwrite(manifests[1], 5, "cls", b"x")
    (folder / "b" / manifests[1].shards[1].name).unlink()
    return Mixture.create(manifests, [2.0, 1.0], global_batch_size=GLOBAL_BATCH)


def global_batches(mixture: Mixture, world_size: int, *, first_step: int = 0, workers: int = 2) -> list[list[Batch]]:
    """Of each step, the micro-batches of all ranks in the order of their slots."""
    micro_batch_size = 2 if GLOBAL_BATCH % (2 * world_size) == 0 else 1
    data = DataConfig(train="unused", image_size=(6, 8), workers=workers, prefetch_batches=workers)

    def of_rank(rank: int) -> list[Batch]:
        order = MixedOrder(mixture, seed=4, lanes=GLOBAL_BATCH, window=3)
        loader = BatchLoader(
            ShardStream([open_source(manifest) for manifest in mixture.manifests], order),
            train_recipe(data, seed=4),
            image_hw=(6, 8),
            num_classes=10,
            labels_per_sample=1,
            data=data,
            pin_memory=False,
        )
        return list(
            loader.batches(
                train_positions(
                    step,
                    micro_step,
                    rank=rank,
                    world_size=world_size,
                    micro_batch_size=micro_batch_size,
                    global_batch_size=GLOBAL_BATCH,
                )
                for step in range(first_step, STEPS)
                for micro_step in range(GLOBAL_BATCH // (world_size * micro_batch_size))
            )
        )

    in_order = [batch for together in zip(*map(of_rank, range(world_size)), strict=True) for batch in together]
    per_step = GLOBAL_BATCH // micro_batch_size
    return [in_order[i : i + per_step] for i in range(0, len(in_order), per_step)]


def assert_same(ours: list[list[Batch]], theirs: list[list[Batch]]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(torch.cat([b.images for b in one]), torch.cat([b.images for b in other]))
        assert torch.equal(torch.cat([b.labels for b in one]), torch.cat([b.labels for b in other]))
        assert [key for b in one for key in b.keys] == [key for b in other for key in b.keys]
        assert [f for b in one for f in b.quarantined] == [f for b in other for f in b.quarantined]
        assert sum(b.digest for b in one) == sum(b.digest for b in other)


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("first_step", [0, 1, 4, 8])
def test_world_size_workers_and_resumption_change_nothing(mixture: Mixture, world_size: int, first_step: int) -> None:
    expected = global_batches(mixture, 1)
    resumed = global_batches(mixture, world_size, first_step=first_step, workers=1 + world_size % 3)
    assert_same(resumed, expected[first_step:])


def test_each_batch_has_its_share_of_every_set_and_names_the_set_of_bad_samples(mixture: Mixture) -> None:
    first = mixture.parts[0].manifest
    for step, batches in enumerate(global_batches(mixture, 3)):
        ids = [number for batch in batches for number in batch.sample_ids]
        assert sum(number < first.num_samples for number in ids) == 8
        for fault in (fault for batch in batches for fault in batch.quarantined):
            assert fault.position // GLOBAL_BATCH == step
            assert Path(fault.shard).parent in {Path(manifest.location) for manifest in mixture.manifests}
