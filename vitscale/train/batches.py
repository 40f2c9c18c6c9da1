"""The micro-batches of a run: its shard sets, their order, and the loader that walks through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from vitscale.config.schema import TrainConfig
from vitscale.data.loader import Batch, BatchLoader, train_recipe
from vitscale.data.mixing import Forecast, MixedOrder, Mixture
from vitscale.data.order import train_positions
from vitscale.data.shard_set import open_source
from vitscale.data.stream import ShardStream
from vitscale.plan import RunPlan


def train_batches(
    config: TrainConfig,
    plan: RunPlan,
    train_set: Mixture,
    *,
    rank: int,
    ranks_of_node: Sequence[int],
    first_step: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """One rank's micro-batches from ``first_step`` to the end of the run.

    Args:
        config: of the run.
        plan: of the run.
        train_set: its shard sets.
        rank: whose batches.
        ranks_of_node: the ranks that share this machine's cache.
        first_step: steps that are done.
        pin_memory: page-lock images and labels for an asynchronous copy to a GPU.

    Raises:
        DataError: as :meth:`vitscale.data.loader.BatchLoader.batches`.
    """
    order = MixedOrder(train_set, seed=config.seed, lanes=plan.lanes, window=plan.window)
    forecast = Forecast(order, plan.slots_of_ranks(ranks_of_node), step=first_step)
    sources = [
        open_source(manifest, config.data.storage, next_uses=partial(forecast.next_uses, part))
        for part, manifest in enumerate(train_set.manifests)
    ]
    loader = BatchLoader(
        ShardStream(sources, order),
        train_recipe(config.data, config.seed),
        image_hw=config.data.image_hw,
        num_classes=config.model.num_classes,
        labels_per_sample=1 if config.loss.kind == "softmax" else None,
        data=config.data,
        pin_memory=pin_memory,
    )

    def positions() -> Iterator[list[int | None]]:
        for step in range(first_step, plan.total_steps):
            forecast.step = step
            for micro_step in range(plan.gradient_accumulation_steps):
                yield train_positions(
                    step,
                    micro_step,
                    rank=rank,
                    world_size=plan.world_size,
                    micro_batch_size=plan.micro_batch_size,
                    global_batch_size=plan.global_batch_size,
                )

    return loader.batches(positions())
