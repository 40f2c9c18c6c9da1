"""Start the ranks of one machine through torch's elastic launcher, and leave a failed rank in an orderly way."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

import psutil

from vitscale.errors import Interrupted, LaunchError, VitscaleError

# Set for the ranks that this module starts.
STARTED_BY_US = "VITSCALE_NPROC"
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def start_ranks(nproc: int, arguments: list[str]) -> int:
    """Run ``vitscale ARGUMENTS`` on ``nproc`` ranks of this machine and wait. Returns the exit status.

    Stop signals are passed on to the ranks. If a rank dies, the others are taken down.

    Raises:
        LaunchError: ``nproc`` is not a possible number of ranks here.
    """
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
    os.environ[STARTED_BY_US] = str(nproc)
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
    for number in FORWARDED_SIGNALS:
        signal.signal(number, _forward_to_ranks)
    try:
        elastic_launch(config, sys.executable)("-m", "vitscale", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            sys.stderr.write(f"vitscale: rank {rank} was killed by {name}; the other ranks were stopped\n")
            return 128 - failure.exitcode
        return int(failure.exitcode)
    return 0


def _forward_to_ranks(number: int, _frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        child.send_signal(number)


def die_with_launcher() -> None:
    """Ask the kernel to kill this rank if the launcher that started it is killed (Linux only).

    Without it, ranks whose launcher got SIGKILL would go on writing to the run folder beside a second start.
    """
    if STARTED_BY_US in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def leave_after_error(error: BaseException, *, rank: int, world_size: int) -> NoReturn:
    """Say what happened, once, and end this process at once.

    Threads may be reading and other ranks may be gone, so the interpreter is not given the time to wait for them.
    """
    if isinstance(error, VitscaleError):
        if rank == 0 or not error.agreed:
            sys.stderr.write(f"vitscale: {'stopped' if isinstance(error, Interrupted) else 'error'}: {error}\n")
        code = error.exit_code
    elif world_size > 1 and _is_lost_contact(error):
        sys.stderr.write(f"vitscale: rank {rank} lost contact with another rank, which failed first\n")
        code = 1
    else:
        sys.stderr.write(f"vitscale: rank {rank} failed\n" + "".join(traceback.format_exception(error)))
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_lost_contact(error: BaseException) -> bool:
    """Whether a collective operation failed because of another rank."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and bool(frames) and frames[-1].filename.endswith("distributed_c10d.py")
