"""Make ranks of a submitted job wait, crash or die at a chosen place, without a line of test code in the program."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.helpers.runs import environment, wait_until

# Python imports a module of this name at start. Only ranks that train are concerned, not the programs around them.
_PLANTED = """
import json
import os
import signal
import sys
import time
from pathlib import Path

words = sys.orig_argv
rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "-1")))
mine = [fault for fault in json.loads(os.environ["JOB_FAULTS"]) if fault["rank"] == rank]
if mine and "vitscale" in words and "train" in words:
    import vitscale.evaluation.accuracy as accuracy
    from vitscale.checkpoint.store import CheckpointStore

    real_batches, real_write = accuracy.evaluation_batches, CheckpointStore._write

    def strike(place, step):
        for fault in mine:
            mark = Path(fault["mark"])
            if fault["place"] != place or step not in (fault["step"], None) or (mark.exists() and not fault["always"]):
                continue
            mark.write_text(loop.__file__)
            if fault["what"] == "raise":
                raise RuntimeError("planted fault")
            if fault["what"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            while fault["what"] == "hang":
                time.sleep(1)
            request = signal.getsignal(signal.SIGTERM).__self__
            while request.received is None:
                time.sleep(0.02)

    def train_step(engine, batches, config, step, lr):
        strike("step", step)
        return real_step(engine, batches, config, step, lr)

    def evaluation_batches(*args, **kwargs):
        for number, batch in enumerate(real_batches(*args, **kwargs)):
            if number == 1:
                strike("evaluation", None)
            yield batch

    def _write(self, name, file, snapshot):
        strike("save", int(name.partition("-")[2]))
        return real_write(self, name, file, snapshot)

    # Before the loop takes its name of it.
    accuracy.evaluation_batches, CheckpointStore._write = evaluation_batches, _write

    import vitscale.train.loop as loop

    real_step, loop.train_step = loop.train_step, train_step
"""


class JobFaults:
    """Faults of the ranks of one job, over all of its attempts.

    Args:
        folder: for the planted module and the marks; must not exist.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(_PLANTED)
        self._folder = folder
        self._faults: list[dict[str, Any]] = []

    def add(self, what: str, *, rank: int, place: str = "step", step: int | None = None, always: bool = False) -> Fault:
        """Plan a fault.

        Args:
            what: ``raise`` an exception, ``kill`` itself with SIGKILL, ``hold`` until a stop is requested, or ``hang``
                until it is killed.
            rank: the rank that it happens to.
            place: before a ``step``, within an ``evaluation``, or in the ``save`` of a step.
            step: number of steps that are finished before; of no meaning for an evaluation.
            always: in each attempt that comes to the place; else once.
        """
        mark = self._folder / f"{len(self._faults)}-{place}-{step}"
        self._faults.append(
            {"what": what, "rank": rank, "place": place, "step": step, "always": always, "mark": str(mark)}
        )
        return Fault(mark)

    @property
    def env(self) -> dict[str, str]:
        """For the environment of the submission."""
        paths = f"{self._folder}{os.pathsep}{environment()['PYTHONPATH']}"
        return {"PYTHONPATH": paths, "JOB_FAULTS": json.dumps(self._faults)}


class Fault:
    """One of them."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def has_happened(self) -> bool:
        """Whether it has, in any attempt."""
        return self._mark.exists()

    def wait(self, *, timeout_s: float = 90) -> None:
        """Wait until it happens."""
        assert wait_until(self.has_happened, timeout_s=timeout_s, every_s=0.05), f"{self._mark.name} did not happen"

    def code(self) -> Path:
        """The file of the training loop that it happened in."""
        return Path(self._mark.read_text())
