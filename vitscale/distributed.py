"""The ranks of a run as one object. The only file with collective operations.

A single process is one rank and runs the same code. Control messages (stop flags, counts, agreements) travel over
gloo in host memory, so that they never wait for the GPU.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed
from torch.distributed import HashStore, distributed_c10d  # type: ignore[attr-defined]

from vitscale.errors import TopologyError, VitscaleError, on_every_rank
from vitscale.topology import Topology

T = TypeVar("T")


class Ranks:
    """Connected ranks. Every method is collective: all ranks call it, in the same order."""

    def __init__(self, topology: Topology, device: torch.device, control: distributed.ProcessGroup | None) -> None:
        self.topology = topology
        self.device = device
        self._control = control

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.topology.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.topology.is_main

    def sum_ints(self, values: Sequence[int]) -> list[int]:
        """Elementwise sum over ranks (64-bit, wrapping)."""
        packed = torch.tensor([(value + 2**63) % 2**64 - 2**63 for value in values], dtype=torch.int64)
        distributed.all_reduce(packed, group=self._control)
        return [int(value) for value in packed]

    def sum_in_graph(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks, on the tensors' device, through which gradients flow: theirs are summed, too."""
        if self.world_size == 1:
            return values
        return cast(Tensor, _SumOverRanks.apply(values))  # type: ignore[no-untyped-call]

    def gather_floats(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's values, by rank."""
        mine = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        distributed.all_gather(gathered, mine, group=self._control)
        return [row.tolist() for row in gathered]

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable value, by rank."""
        gathered: list[T | None] = [None] * self.world_size
        distributed.all_gather_object(gathered, value, group=self._control)
        return gathered  # type: ignore[return-value]

    def on_same_node(self) -> list[int]:
        """The ranks that share this one's machine, itself among them."""
        nodes = self.gather(self.topology.node)
        return [rank for rank, node in enumerate(nodes) if node == self.topology.node]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum_ints([0])

    def on_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0 and give its result, or its VitscaleError, to every rank."""
        outcome: list[T | VitscaleError | None] = [None]
        if self.is_main:
            try:
                outcome = [function()]
            except VitscaleError as error:
                outcome = [error]
        distributed.broadcast_object_list(outcome, src=0, group=self._control)
        return _unwrap(outcome[0])

    def from_main(self, values: Tensor) -> Tensor:
        """Rank 0's contiguous values, in place, on every rank. They lie in host memory and are alike in shape."""
        distributed.broadcast(values, src=0, group=self._control)
        return values

    def on_all(self, function: Callable[[], T]) -> list[T]:
        """Run ``function`` on every rank and give all results, by rank, to every rank.

        A VitscaleError on any rank is raised on all.
        """
        mine: T | VitscaleError
        try:
            mine = function()
        except VitscaleError as error:
            mine = error
        outcomes = self.gather(mine)
        failed = next((outcome for outcome in outcomes if isinstance(outcome, VitscaleError)), None)
        return outcomes if failed is None else _unwrap(failed)  # type: ignore[return-value]


class _SumOverRanks(torch.autograd.Function):
    """Every rank's result depends on every rank's input alike, so the gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total


def _unwrap(outcome: T | VitscaleError | None) -> T:
    if isinstance(outcome, VitscaleError):
        raise on_every_rank(outcome)
    return outcome  # type: ignore[return-value]


@contextmanager
def connect(topology: Topology, *, timeout_s: int) -> Iterator[Ranks]:
    """Connect the ranks for the length of a ``with`` block.

    After an error no collective is called: the other ranks may be gone, and waiting for them would hide the cause.

    Raises:
        TopologyError: the address of rank 0 has no meaning here.
    """
    device = _device(topology)
    timeout = timedelta(seconds=timeout_s)
    # The groups that DeepSpeed makes for itself take torch's default, which is half an hour.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    alone = topology.world_size == 1
    if not alone:
        _check_address(topology)
    try:
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=HashStore() if alone else None,
            init_method=None if alone else f"tcp://{topology.master_addr}:{topology.master_port}",
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (distributed.DistNetworkError, distributed.DistStoreError) as error:
        raise TopologyError(
            f"rank {topology.rank} cannot reach the others at {topology.master_addr}:{topology.master_port} within "
            f"{timeout_s} s ({str(error).partition(chr(10))[0]}); see that all {topology.world_size} ranks are started "
            f"and the port is free, or set MASTER_ADDR and MASTER_PORT"
        ) from error
    control = distributed.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else None
    ranks = Ranks(topology, device, control)
    yield ranks
    # Leaving without this aborts some runs at interpreter exit, and a finished job would look failed.
    ranks.barrier()
    distributed.destroy_process_group()


def _check_address(topology: Topology) -> None:
    """torch would retry an unknown name until the time-out, with a screen of stack frames for each try."""
    try:
        socket.getaddrinfo(topology.master_addr, topology.master_port)
    except OSError as error:
        raise TopologyError(
            f"rank 0's address {topology.master_addr!r} cannot be resolved on {socket.gethostname()} "
            f"({error.strerror or error}); set MASTER_ADDR to a name or number that every node knows"
        ) from error


def _device(topology: Topology) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher that shows each task one GPU makes it device 0, whatever the local rank.
    device = torch.device("cuda", topology.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
