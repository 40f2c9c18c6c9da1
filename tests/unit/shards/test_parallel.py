"""One function in several processes: order, errors, killed workers, and a killed parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from vitscale.errors import DataError
from vitscale_shards.parallel import in_order


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order(workers: int) -> None:
    assert list(in_order(abs, range(-50, 0), workers)) == list(range(50, 0, -1))
    assert list(in_order(abs, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_taken_as_they_are_needed(workers: int) -> None:
    tasks = iter(range(1, 101))
    results = in_order(abs, tasks, workers)
    assert next(results) == 1
    assert next(tasks) <= 4 * workers + 2
    results.close()
    assert not _workers(psutil.Process())


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_are_passed_on(workers: int) -> None:
    results = in_order(int, ["1", "x", "3"], workers)
    assert next(results) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        next(results)


def test_a_killed_worker() -> None:
    with pytest.raises(DataError) as caught:
        list(in_order(os._exit, [9, 9, 9], 2))
    assert str(caught.value) == (
        "one of 2 worker processes was killed, which often means: out of memory; give fewer --workers"
    )


def test_workers_do_not_outlive_their_parent() -> None:
    script = (
        "import time\nfrom vitscale_shards.parallel import in_order\n"
        "if __name__ == '__main__':\n    list(in_order(time.sleep, [60, 60], 2))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as process:
        parent = psutil.Process(process.pid)
        deadline = time.monotonic() + 60
        while len(workers := _at_work(parent)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(workers) == 2
        process.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert (len(gone), alive) == (2, [])


def _workers(parent: psutil.Process) -> list[psutil.Process]:
    return [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]


def _at_work(parent: psutil.Process) -> list[psutil.Process]:
    """Those that have begun: besides the main thread, one looks after the parent."""
    return [worker for worker in _workers(parent) if worker.num_threads() > 1]
