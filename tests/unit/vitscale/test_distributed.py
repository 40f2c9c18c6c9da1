"""The collectives of connected ranks on 1 and 2 real ranks: what they give, and how errors travel."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from typing import Any, NoReturn

import pytest

from tests.helpers.distributed import _one_rank, forkserver, free_port, run_ranks
from vitscale.errors import CheckpointError, ConfigError, DataError
from vitscale.topology import Topology

TWO = [1, 2]


def _numbers(topology: Topology) -> None:
    import torch

    from vitscale.distributed import connect

    rank, world_size = topology.rank, topology.world_size
    with connect(topology, timeout_s=60) as ranks:
        assert (ranks.world_size, ranks.is_main, ranks.topology) == (world_size, rank == 0, topology)
        assert ranks.device == torch.device("cpu")
        assert ranks.sum_ints([1, rank, -7 * rank]) == [world_size, sum(range(world_size)), -7 * sum(range(world_size))]
        assert ranks.sum_ints([]) == []
        assert ranks.sum_ints([2**62 + 1, True]) == [
            {1: 2**62 + 1, 2: -(2**63) + 2}[world_size],
            world_size,
        ]
        # Sums of digests wrap, on one rank as on many; so do numbers that have no place in 64 bits.
        wide = ranks.sum_ints([2**64 - 1, 2**63, -(2**63) - 1, 2**64 + 5])
        assert wide == {1: [-1, -(2**63), 2**63 - 1, 5], 2: [-2, 0, -2, 10]}[world_size]
        assert ranks.from_main(torch.full((2, 1), rank + 0.5)).tolist() == [[0.5], [0.5]]
        rows = ranks.gather_floats([rank + 0.1, 1e300, float("-inf")])
        assert rows == [[r + 0.1, 1e300, float("-inf")] for r in range(world_size)]
        assert ranks.gather_floats([]) == [[]] * world_size
        assert ranks.gather({"rank": rank, "text": "é" * rank}) == [
            {"rank": r, "text": "é" * r} for r in range(world_size)
        ]
        ranks.barrier()


def _results(topology: Topology) -> None:
    from vitscale.distributed import connect

    calls = []

    def note() -> dict[str, Any]:
        calls.append(topology.rank)
        return {"rank": topology.rank}

    with connect(topology, timeout_s=60) as ranks:
        assert ranks.on_main(note) == {"rank": 0}
        assert calls == ([0] if topology.is_main else [])
        assert ranks.on_main(lambda: None) is None
        assert ranks.on_all(note) == [{"rank": r} for r in range(topology.world_size)]
        assert ranks.on_all(lambda: None) == [None] * topology.world_size


def _agreed_errors(topology: Topology) -> None:
    from vitscale.distributed import connect

    last = topology.world_size - 1

    def fail() -> NoReturn:
        raise DataError(f"on rank {topology.rank}")

    def fail_on_last() -> int:
        if topology.rank == last:
            raise CheckpointError("disk\nfull")
        return 1

    def fail_each_its_way() -> NoReturn:
        raise (DataError if topology.is_main else ConfigError)(f"on rank {topology.rank}")

    with connect(topology, timeout_s=60) as ranks:
        for collective, function, expected in (
            (ranks.on_main, fail, DataError("on rank 0")),
            (ranks.on_all, fail_on_last, CheckpointError("disk\nfull")),
            (ranks.on_all, fail_each_its_way, DataError("on rank 0")),
        ):
            with pytest.raises(type(expected)) as caught:
                collective(function)
            assert type(caught.value) is type(expected)
            assert str(caught.value) == str(expected)
            assert caught.value.agreed
            assert caught.value.exit_code == expected.exit_code
        # The ranks are still in step with each other.
        assert ranks.sum_ints([1]) == [topology.world_size]
    assert not DataError("another").agreed


def _bugs(topology: Topology) -> None:
    """An error that is no VitscaleError is a bug: it stays where it was raised, with its own type."""
    from vitscale.distributed import connect

    def fail() -> NoReturn:
        raise ZeroDivisionError("a bug")

    with connect(topology, timeout_s=60) as ranks:
        for collective in (ranks.on_main, ranks.on_all):
            with pytest.raises(ZeroDivisionError, match="a bug"):
                collective(fail)


@pytest.mark.parametrize("world_size", TWO)
@pytest.mark.parametrize("work", [_numbers, _results, _agreed_errors])
def test_collectives(work: Any, world_size: int) -> None:
    run_ranks(work, world_size)


def test_bugs_are_not_swallowed() -> None:
    run_ranks(_bugs, 1)


def _cannot_meet(topology: Topology, reason: str) -> None:
    from vitscale.distributed import connect
    from vitscale.errors import TopologyError

    start = time.monotonic()
    with pytest.raises(TopologyError) as caught, connect(topology, timeout_s=2):
        pass
    assert time.monotonic() - start < 30
    message = str(caught.value)
    where = f"127.0.0.1:{topology.master_port}"
    assert message.startswith(f"rank {topology.rank} cannot reach the others at {where} within 2 s ("), message
    assert message.endswith(
        "); see that all 2 ranks are started and the port is free, or set MASTER_ADDR and MASTER_PORT"
    ), message
    assert reason in message.lower()
    assert "\n" not in message


@pytest.mark.parametrize(
    ("rank", "occupied", "reason"),
    [
        (0, True, "address already in use"),
        (0, False, "timed out"),  # no other rank comes
        (1, False, "timed out"),  # no rank 0 listens
    ],
)
def test_an_address_where_the_ranks_do_not_meet_is_named(rank: int, occupied: bool, reason: str) -> None:
    context = forkserver()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        if occupied:
            other.listen()
        else:
            other.close()
        topology = Topology(rank=rank, world_size=2, local_rank=rank, master_port=port)
        process = context.Process(target=_one_rank, args=(_cannot_meet, topology, (reason,)))
        process.start()
        process.join(timeout=60)
        process.kill()
    assert process.exitcode == 0


def _unknown_host(topology: Topology) -> None:
    from vitscale.distributed import connect
    from vitscale.errors import TopologyError

    nowhere = dataclasses.replace(topology, world_size=2, master_addr="no-such-host.invalid")
    with (
        pytest.raises(TopologyError, match=r"rank 0's address 'no-such-host.invalid' cannot be resolved .*MASTER_ADDR"),
        connect(nowhere, timeout_s=60),
    ):
        pass


def test_a_host_that_nobody_knows_is_named() -> None:
    run_ranks(_unknown_host, 1, timeout_s=30)


def _leaves_its_block(topology: Topology, connected: threading.Barrier, code: int) -> None:
    from vitscale.distributed import connect

    def fail() -> NoReturn:
        with connect(topology, timeout_s=60):
            # A rank that has left already cannot be connected to, which is another error.
            connected.wait(timeout=60)
            raise DataError("mine alone")

    # No collective is tried on the way out, which would wait for ranks that are gone.
    with pytest.raises(DataError) as caught:
        fail()
    os._exit(1 if caught.value.agreed else code)


def test_a_rank_with_an_error_leaves_without_waiting_for_the_others() -> None:
    context = forkserver()
    port = free_port()
    connected = context.Barrier(2)
    ranks = [Topology(rank=rank, world_size=2, local_rank=rank, master_port=port) for rank in range(2)]
    processes = [context.Process(target=_leaves_its_block, args=(rank, connected, 9)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [9, 9]
