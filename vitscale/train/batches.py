"""The micro-batches of a run, loaded by threads of this process or of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vitscale.config.schema import DataConfig, TrainConfig
from vitscale.data.loader import Batch
from vitscale.data.mixing import Mixture
from vitscale.plan import RunPlan
from vitscale.train.loader_process import load_in_processes
from vitscale.train.share import LoaderShare, load_share


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

    What they hold does not depend on ``data.workers`` and ``data.processes``.

    Args:
        config: of the run.
        plan: of the run.
        train_set: its shard sets.
        rank: whose batches.
        ranks_of_node: the ranks that share this machine's cache.
        first_step: steps that are done.
        pin_memory: page-lock images and labels for an asynchronous copy to a GPU.

    Raises:
        DataError: as :meth:`vitscale.data.loader.BatchLoader.batches`, or a loader's process died.
    """
    share = LoaderShare(
        config, plan, train_set, rank, tuple(ranks_of_node), first_step, slots=range(plan.micro_batch_size)
    )
    processes = loader_processes(config.data, plan.micro_batch_size)
    if not processes:
        return load_share(share, pin_memory=pin_memory)
    return load_in_processes(share, processes, pin_memory=pin_memory)


def loader_processes(data: DataConfig, micro_batch_size: int) -> int:
    """Processes that load for a rank beside its own, each with a thread and a slot at least; 0: its own one loads."""
    return min(data.workers if data.processes is None else data.processes, data.workers, micro_batch_size)
