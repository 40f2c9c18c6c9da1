"""Make one rank of a real run crash, die or wait at a chosen step, without a line of test code in the program."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.runs import environment, wait_until

# Python imports a module of this name at start.
_PLANTED = """
import os
import signal
import time
from pathlib import Path

rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
if rank == os.environ["FAULT_RANK"]:
    import vitscale.train.loop as loop

    real_step = loop.train_step

    def train_step(engine, batches, config, step, lr):
        if step == int(os.environ["FAULT_STEP"]):
            Path(os.environ["FAULT_MARK"]).touch()
            if os.environ["FAULT"] == "raise":
                raise RuntimeError("planted fault")
            if os.environ["FAULT"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            request = signal.getsignal(signal.SIGTERM).__self__
            while request.received is None:
                time.sleep(0.02)
        return real_step(engine, batches, config, step, lr)

    loop.train_step = train_step
"""


class Fault:
    """A fault of one rank before it makes the step after ``step``.

    Args:
        folder: for the planted module; one for each start of a run.
        what: ``raise`` an exception, ``kill`` itself with SIGKILL, or ``hold`` until a stop is requested.
        rank: the rank that it happens to.
        step: number of steps that are finished before.
    """

    def __init__(self, folder: Path, what: str, *, rank: int, step: int) -> None:
        folder.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(_PLANTED)
        self._mark = folder / "happened"
        self.env = {
            "PYTHONPATH": f"{folder}{os.pathsep}{environment()['PYTHONPATH']}",
            "FAULT": what,
            "FAULT_RANK": str(rank),
            "FAULT_STEP": str(step),
            "FAULT_MARK": str(self._mark),
        }

    def wait(self, start: subprocess.Popen[str]) -> None:
        """Wait until it happens in the run that ``start`` has started."""
        wait_until(lambda: self._mark.exists() or start.poll() is not None, timeout_s=90)
        if not self._mark.exists():
            start.kill()
            pytest.fail(f"the rank did not come to the step of its fault:\n{start.communicate()[1]}")

    def seconds_ago(self) -> float:
        """Time since it happened."""
        return time.time() - self._mark.stat().st_mtime
