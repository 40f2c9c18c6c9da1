"""Run a function on several ranks of this machine: real processes, real gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from vitscale.topology import Topology

# The last four are imported late, by metrics, AdamW and DeepSpeed, and take each rank seconds.
PRELOADED = [
    "vitscale.train.loop",
    "deepspeed",
    "torch.distributed",
    "torchmetrics.functional.classification",
    "torch._dynamo.aot_compile",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]


def forkserver() -> ForkServerContext:
    """Processes that are forked from one that has the heavy imports done but has started no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_ranks(function: Callable[..., None], world_size: int, *arguments: Any, timeout_s: float = 120) -> None:
    """Call ``function(topology, *arguments)`` on each rank and check that all return."""
    ranks = start_ranks(function, world_size, *arguments)
    for process in ranks:
        process.join(timeout=timeout_s)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * world_size


def start_ranks(function: Callable[..., None], world_size: int, *arguments: Any) -> list[ForkServerProcess]:
    """Start a process for each rank, which calls ``function(topology, *arguments)`` and ends with 1 if that raises."""
    context = forkserver()
    port = free_port()
    ranks = [
        context.Process(
            target=_one_rank,
            args=(function, Topology(rank=rank, world_size=world_size, local_rank=rank, master_port=port), arguments),
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def _one_rank(function: Callable[..., None], topology: Topology, arguments: tuple[Any, ...]) -> None:
    code = 0
    try:
        function(topology, *arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Skips interpreter shutdown, where threads of native libraries sometimes abort.
    os._exit(code)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
