"""The cluster that the other tests use: two at a time, preemption, lost nodes, and an end that leaves nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers.runs import wait_until
from tests.helpers.slurm import SlurmCluster, require_slurm, slurm_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
# On a busy machine.
PATIENCE_S = 120


def _comes(condition: Callable[[], bool]) -> bool:
    return wait_until(condition, timeout_s=PATIENCE_S, every_s=0.2)


def test_two_clusters_run_side_by_side_and_end_also_after_an_error() -> None:
    require_slurm()
    states: list[Path] = []

    def use_two() -> None:
        with slurm_cluster(1) as one, slurm_cluster(1) as other:
            states.extend([one.state, other.state])
            mine, theirs = one.preempt(seconds=60), other.preempt(seconds=60)
            assert mine != theirs
            assert _comes(lambda: (one.state_of(mine), other.state_of(theirs)) == ("RUNNING", "RUNNING"))
            assert (one.jobs(), other.jobs()) == ([mine], [theirs])
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        use_two()
    assert len(states) == 2
    for state in states:
        assert not state.exists()
        assert not [pid for pid in psutil.pids() if str(state) in _words(pid)]


@pytest.mark.slow
def test_a_preempted_job_and_one_of_a_lost_node_go_back_to_the_queue(cluster: SlurmCluster) -> None:
    # With --ntasks-per-node, SLURM would wait for as many nodes as the job has had before.
    words = ["sbatch", "--parsable", "--nodes=1-2", "--mincpus=2", "--requeue", "--output=/dev/null"]
    job = cluster.command(*words, "--wrap=srun -n$((2 * SLURM_NNODES)) --ntasks-per-node=2 sleep 600; sleep 600")
    assert _comes(lambda: sorted(cluster.tasks(job)) == [0, 1, 2, 3])
    cluster.preempt(seconds=1)
    assert _comes(lambda: cluster.restarts_of(job) == 1)
    assert _comes(lambda: sorted(cluster.tasks(job)) == [0, 1, 2, 3])
    cluster.kill_node("node2")
    assert len(cluster.tasks(job)) <= 2
    assert _comes(lambda: cluster.restarts_of(job) == 2)
    assert _comes(lambda: sorted(cluster.tasks(job)) == [0, 1])
    cluster.clear()
    assert cluster.jobs() == []
    assert cluster.command("sinfo", "--noheader", "--partition=main", "--format=%D %t") == "2 idle"


def _words(pid: int) -> str:
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return ""


def test_who_has_exported_the_configuration_outlives_the_cluster() -> None:
    require_slurm()
    with slurm_cluster(1) as cluster:
        bystander = subprocess.Popen(["sleep", "60"], env={**os.environ, **cluster.environment})
        cluster.command("srun", "true")
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
