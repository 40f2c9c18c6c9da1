"""How many of the nodes that SLURM gave an attempt are used."""

from __future__ import annotations

from dataclasses import dataclass

from vitscale.errors import LaunchError


@dataclass(frozen=True)
class Allocation:
    """The nodes of an attempt's ranks, in SLURM's order. Rank 0 is on the first, where the batch script runs."""

    nodes: tuple[str, ...]
    ranks_per_node: int
    spared: tuple[str, ...] = ()
    """Nodes of the job that stay idle, because the batch cannot be shared by all."""

    @property
    def ranks(self) -> int:
        """Ranks of the attempt."""
        return len(self.nodes) * self.ranks_per_node


def choose_nodes(
    allocated: tuple[str, ...], *, nodes_min: int, nodes_max: int, ranks_per_node: int, micro_batches: int | None
) -> Allocation:
    """The largest number of nodes whose ranks can share the global batch evenly.

    Args:
        allocated: the nodes that SLURM gave.
        nodes_min: fewest nodes to run on.
        nodes_max: most nodes to run on.
        ranks_per_node: ranks on each of them.
        micro_batches: micro-batches of a global batch; None if the command is no training.

    Raises:
        LaunchError: no number of nodes fits.
    """
    for count in range(min(len(allocated), nodes_max), nodes_min - 1, -1):
        if micro_batches is None or micro_batches % (count * ranks_per_node) == 0:
            return Allocation(allocated[:count], ranks_per_node, allocated[count:])
    if len(allocated) < nodes_min:
        raise LaunchError(
            f"SLURM gave {len(allocated)} nodes, but the run needs at least {nodes_min}; submit it again with "
            f"--nodes {len(allocated)}, or with a range such as --nodes 1:{nodes_max}"
        )
    fitting = [str(n) for n in range(1, (micro_batches or 0) + 1) if (micro_batches or 0) % (n * ranks_per_node) == 0]
    raise LaunchError(
        f"{micro_batches} micro-batches cannot be shared evenly by {ranks_per_node} ranks on each of {nodes_min} to "
        f"{min(len(allocated), nodes_max)} nodes; numbers of nodes that fit: {', '.join(fitting) or 'none'}; "
        f"submit again with one of them, or change micro_batch_size"
    )
