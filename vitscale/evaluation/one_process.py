"""Commands that are done by one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vitscale.config.schema import EngineConfig
from vitscale.distributed import Ranks, connect
from vitscale.errors import TopologyError, on_every_rank
from vitscale.topology import Topology


@contextmanager
def one_process(topology: Topology, command: str) -> Iterator[Ranks]:
    """Be the only rank, for the length of a ``with`` block.

    Args:
        topology: of this process.
        command: that is done, for the message.

    Raises:
        TopologyError: there are other ranks, who would all do the same.
    """
    if topology.world_size > 1:
        raise on_every_rank(
            TopologyError(
                f"vitscale {command} runs in one process, but {topology.world_size} ranks were started; start one"
            )
        )
    with connect(topology, timeout_s=EngineConfig().timeout_s) as ranks:
        yield ranks
