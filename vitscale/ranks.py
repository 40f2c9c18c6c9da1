"""Start the ranks of one machine through torch's elastic launcher, and leave a failed rank in an orderly way."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from vitscale.durable import publish_text
from vitscale.errors import Interrupted, LaunchError, VitscaleError
from vitscale.topology import Topology

# Set for the ranks that this module starts: the process id of their launcher.
STARTED_BY_US = "VITSCALE_LAUNCHER"
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
# Folder where a rank that fails writes why, for whoever decides about a restart.
ERRORS = "VITSCALE_ERRORS"
# How long a rank that lost another one stays, so that the other's exit status is seen first.
VICTIM_STAYS_S = 3.0


def start_ranks(nproc: int, arguments: list[str]) -> int:
    """Run ``vitscale ARGUMENTS`` on ``nproc`` ranks of this machine and wait. Returns the exit status.

    Stop signals are passed on to the ranks. If a rank dies, the others are taken down.

    Raises:
        LaunchError: ``nproc`` is not a possible number of ranks here.
    """
    started = Topology.from_environment().world_size
    if started > 1:
        raise LaunchError(f"--nproc starts ranks, but torchrun or srun has started {started} already; omit --nproc")
    forward = _Forwarding()
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = torch.cuda.device_count()
    if nproc < 1 or (gpus and nproc > gpus):
        allowed = f"1 to {gpus}, the GPUs of this machine" if gpus else "1 or more"
        raise LaunchError(f"--nproc is {nproc}; allowed is {allowed}")
    # The launcher's own account of a failure would bury the failed rank's.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    os.environ[STARTED_BY_US] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=f"vitscale-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        # The launcher would turn a stop signal into a deadline. The ranks end by themselves, after their commit.
        signals_to_handle="SIGQUIT",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "vitscale", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        number = signal.Signals(-failure.exitcode)
        if number in forward.passed_on:
            return _stopped_early(number)
        sys.stderr.write(f"vitscale: rank {rank} was killed by {number.name}; the other ranks were stopped\n")
        return 128 + number
    return 0


class _Forwarding:
    """Passes stop signals on to the ranks, from its creation on."""

    def __init__(self) -> None:
        self.passed_on: set[int] = set()
        for number in FORWARDED_SIGNALS:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        ranks = psutil.Process().children()
        if not ranks:
            # The ranks that are about to be started would never hear of it.
            os._exit(_stopped_early(signal.Signals(number)))
        self.passed_on.add(number)
        for rank in ranks:
            rank.send_signal(number)


def _stopped_early(number: signal.Signals) -> int:
    """Tell of a stop while the ranks were starting. Returns the exit status."""
    sys.stderr.write(f"vitscale: stopped on {number.name}, there was nothing to save; start the same command again\n")
    sys.stderr.flush()
    return Interrupted.exit_code


def is_started_by_launcher() -> bool:
    """Whether this process is one of the ranks of :func:`start_ranks`."""
    return STARTED_BY_US in os.environ


def run_rank(work: Callable[[Topology], None]) -> NoReturn:
    """Do the work of this rank and end the process.

    The interpreter is not given the time to shut down: threads may be reading, other ranks may be gone, and unloading
    the libraries takes seconds.
    """
    topology = Topology.from_environment()
    _die_with_launcher()
    code = 0
    try:
        work(topology)
    except Exception as error:
        code = _explain(error, topology)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_with_launcher() -> None:
    """Let this rank die with the launcher that started it, and at once when it is asked to stop while it starts.

    Without the first, ranks whose launcher got SIGKILL would go on writing to the run folder beside a second start.
    """
    if not is_started_by_launcher():
        return
    # Python would print a traceback. Training installs its own handlers of stop signals.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[STARTED_BY_US]):
            os._exit(1)


def _explain(error: Exception, topology: Topology) -> int:
    """Say what happened, once for all ranks. Returns the exit status."""
    if isinstance(error, VitscaleError):
        if topology.is_main or not error.agreed:
            _record(error, topology, error.exit_code)
            kind = "" if isinstance(error, Interrupted) else "error: "
            sys.stderr.write(f"vitscale: {kind}{error}\n")
        return error.exit_code
    is_victim = topology.world_size > 1 and _is_lost_contact(error)
    _record(error, topology, 1, is_victim=is_victim)
    if is_victim:
        _wait_to_be_stopped()
        reason = str(error).partition("\n")[0]
        sys.stderr.write(f"vitscale: rank {topology.rank} lost contact with another rank ({reason})\n")
    else:
        sys.stderr.write(f"vitscale: rank {topology.rank} failed\n" + "".join(traceback.format_exception(error)))
    return 1


def _record(error: Exception, topology: Topology, exit_code: int, *, is_victim: bool = False) -> None:
    """Write why this rank fails into the folder that ``VITSCALE_ERRORS`` names, if it names one."""
    folder = os.environ.get(ERRORS)
    if not folder:
        return
    is_told = isinstance(error, VitscaleError)
    record = {
        "rank": topology.rank,
        # As SLURM calls the node, so that it can be left out of the next attempt.
        "host": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "kind": type(error).__name__,
        "message": str(error),
        "traceback": None if is_told else "".join(traceback.format_exception(error)),
        "exit_code": exit_code,
        "unix_s": time.time(),
        "is_victim": is_victim,
    }
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        publish_text(Path(folder) / f"rank-{topology.rank:05}.json", json.dumps(record, indent=1) + "\n")
    except OSError as problem:
        # The disk may be what failed. The message on stderr tells the rest.
        sys.stderr.write(f"vitscale: {folder} cannot be written: {problem.strerror}\n")


def _is_lost_contact(error: Exception) -> bool:
    """Whether a collective operation failed because of another rank."""
    if not isinstance(error, RuntimeError):
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or "/gloo/" in str(error)


def _wait_to_be_stopped() -> None:
    """Give whoever started the ranks the time to notice the one that failed first, and to stop this one.

    The first exit status is taken for the cause, and one rank's report is lost among a thousand of its victims'.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    time.sleep(VICTIM_STAYS_S)
