"""``python -m vitscale_launch.health_node FOLDER RUN``: what a node measures of itself and of its links.

One process on each node. Torch is imported here and nowhere else in this package.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor, distributed

from vitscale.distributed import Ranks, connect
from vitscale.durable import publish_text
from vitscale.errors import VitscaleError
from vitscale.topology import Topology
from vitscale_launch.health import DONE, GPU_QUERY, NodeReport, gpu_problems, report_path

FILE_BYTES = 32 << 20
MESSAGE_BYTES = 16 << 20
# Side of the matrices: large enough for the device to be busy, a fraction of a second long.
GPU_SIDE, CPU_SIDE = 8192, 768
REPEATS = 5
# With many nodes, each is measured with so many others.
MAX_PARTNERS = 16


class Check:
    """The check of one node. Every stage adds to the report."""

    def __init__(self, folder: Path, node: str) -> None:
        self.report = NodeReport(node=node, stage="start")
        self._folder = folder

    def enter(self, stage: str) -> None:
        """Write the report, so that it is known where this node hangs if it does."""
        self.report = replace(self.report, stage=stage)
        text = TypeAdapter(NodeReport).dump_json(self.report).decode()
        publish_text(report_path(self._folder, self.report.node), text)

    def complain(self, *problems: str) -> None:
        """Note what is wrong."""
        self.report = replace(self.report, problems=(*self.report.problems, *problems))


def check_gpus(check: Check, expected: int) -> None:
    """Their number, their memory, and what nvidia-smi knows of their errors and clocks."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < expected:
        check.complain(f"torch finds {count} GPUs instead of {expected}")
    if not count:
        return
    check.report = replace(check.report, gpus=tuple(torch.cuda.get_device_name(device) for device in range(count)))
    if shutil.which("nvidia-smi") is None:
        return
    words = ["nvidia-smi", f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader,nounits"]
    if shown := os.environ.get("CUDA_VISIBLE_DEVICES"):
        words.append(f"--id={shown}")
    said = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if said.returncode:
        check.complain(f"nvidia-smi failed: {(said.stderr or said.stdout).strip()[:200]}")
    else:
        check.complain(*gpu_problems(said.stdout, expected or count))


def check_files(check: Check, run: Path) -> None:
    """Write into the run folder, read it back, and compare."""
    path = run / f".health-{socket.gethostname()}-{os.getpid()}"
    content = os.urandom(1 << 20) * (FILE_BYTES >> 20)
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        same = path.read_bytes() == content
    except OSError as error:
        check.complain(f"{run} cannot be written: {error.strerror}")
        return
    finally:
        path.unlink(missing_ok=True)
    check.report = replace(check.report, write_mb_per_s=FILE_BYTES / 1e6 / seconds)
    if not same:
        check.complain(f"{run} gives back other bytes than were written")


def check_products(check: Check) -> None:
    """A matrix product on each device, whose result is known and whose time is measured."""
    count = len(check.report.gpus)
    devices = [torch.device("cuda", number) for number in range(count)] or [torch.device("cpu")]
    rates = []
    for number, device in enumerate(devices):
        side, kind = (GPU_SIDE, torch.bfloat16) if count else (CPU_SIDE, torch.float32)
        try:
            left = torch.ones(side, side, dtype=kind, device=device)
            # Sums of powers of two below 2^8: exact in bf16 as well.
            right = torch.full((side, side), 2.0**-6, dtype=kind, device=device)
            product = left @ right
            if not bool((product == side * 2.0**-6).all()):
                check.complain(f"device {number} computes a wrong product")
            _wait(device)
            start = time.perf_counter()
            for _ in range(REPEATS):
                torch.matmul(left, right, out=product)
            _wait(device)
            rates.append(REPEATS * 2 * side**3 / (time.perf_counter() - start) / 1e12)
        except RuntimeError as error:
            check.complain(f"device {number} fails: {str(error).partition(chr(10))[0][:200]}")
    check.report = replace(check.report, tflops=tuple(rates))


def check_command(check: Check, command: str) -> None:
    """The site's own check."""
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[-200:]
        check.complain(f"health_command left with {done.returncode}: {said}")


def check_network(check: Check, topology: Topology, seconds: int) -> None:
    """Clocks, an all-reduce over all nodes, and the links of this node with others."""
    with connect(topology, timeout_s=seconds) as ranks:
        names = ranks.gather(check.report.node)
        ranks.barrier()
        clocks = [row[0] for row in ranks.gather_floats([time.time()])]
        check.report = replace(check.report, skew_s=clocks[topology.rank] - clocks[0])
        if ranks.world_size == 1:
            return
        message = torch.ones(MESSAGE_BYTES // 4, device=ranks.device)
        distributed.all_reduce(message)
        rate = _rate(ranks, lambda: distributed.all_reduce(message))
        links = {}
        for partner in partners(topology.rank, ranks.world_size):
            ranks.barrier()
            if partner is not None:
                incoming = torch.empty_like(message)
                _exchange(message, incoming, partner)
                links[names[partner]] = _rate(ranks, partial(_exchange, message, incoming, partner))
        check.report = replace(check.report, reduce_gb_per_s=rate, links_gb_per_s=links)


def partners(rank: int, world_size: int) -> Iterator[int | None]:
    """Whom a rank meets in each round, so that all meet at a time and everyone meets everyone; None: nobody.

    The circle method: the last player stays, the others move on by one place each round.
    """
    players = world_size + world_size % 2
    for number in range(min(players - 1, MAX_PARTNERS)):
        if rank == players - 1:
            # The one who meets the player that stays: twice its place is the round's number.
            other = number * (players // 2) % (players - 1)
        else:
            other = (number - rank) % (players - 1)
            other = players - 1 if other == rank else other
        yield other if other < world_size else None


def _exchange(outgoing: Tensor, incoming: Tensor, partner: int) -> None:
    operations = [
        distributed.P2POp(distributed.isend, outgoing, partner),
        distributed.P2POp(distributed.irecv, incoming, partner),
    ]
    for work in distributed.batch_isend_irecv(operations):
        work.wait()


def _rate(ranks: Ranks, act: Callable[[], object]) -> float:
    """Gigabytes of message per second."""
    _wait(ranks.device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        act()
    _wait(ranks.device)
    return REPEATS * MESSAGE_BYTES / (time.perf_counter() - start) / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--command")
    options = parser.parse_args()
    # Ends this process even within a driver's call.
    signal.alarm(options.seconds)
    check = Check(options.folder, os.environ.get("SLURMD_NODENAME", socket.gethostname()))
    check.enter("GPUs")
    check_gpus(check, options.gpus)
    check.enter("files")
    check_files(check, options.run)
    check.enter("matrix product")
    check_products(check)
    if options.command:
        check.enter("health_command")
        check_command(check, options.command)
    check.enter("network")
    try:
        check_network(check, Topology.from_environment(), max(10, options.seconds // 2))
    except (VitscaleError, RuntimeError) as error:
        # Whose fault it is, the reports of all nodes together tell.
        sys.stderr.write(f"{check.report.node}: network: {error}\n")
    else:
        check.enter(DONE)
    os._exit(bool(check.report.problems))


if __name__ == "__main__":
    main()
