"""A controller that does not answer, a disk that fails: the attempt may be lost, the run is not.

SLURM's command is a script that writes down what it was asked. tests/slurm has the real one.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.launch.test_environment import submission
from vitscale.errors import LaunchError
from vitscale_launch import follow as following
from vitscale_launch import slurm
from vitscale_launch.after import conclude, end
from vitscale_launch.allocation import Allocation
from vitscale_launch.attempts import Attempt, attempts_path, read_attempts, write_attempt
from vitscale_launch.before import prepare, unhealthy
from vitscale_launch.failures import Cause, Failure
from vitscale_launch.follow import follow, is_passing, later_jobs, patiently, read_patiently
from vitscale_launch.requests import cancel_path
from vitscale_launch.restart import Action, Decision, Queue
from vitscale_launch.site import Site
from vitscale_launch.submission import Submission

RUNNING = "JobId=7 JobName=vit\n   JobState=RUNNING Reason=None\n   Restarts=0 PreemptTime=None\n"
PREEMPTED = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-11-21T23:50:19")
BATCH = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "VITSCALE_ATTEMPT": "1"}
OPEN = Attempt(number=1, job="7", restart=0, nodes="node1,node2", ranks=2, started_unix_s=100, started_step=None)
SILENT = "echo 'slurm_load_node error: Socket timed out on send/recv operation' >&2; exit 1"

Cluster = Callable[..., Callable[[], list[str]]]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Set up a ``scontrol``. What it returns gives the changes that were asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(following, "BETWEEN_TRIES_S", 0.0)
    monkeypatch.setattr(following, "WAIT_FOR_THE_END_S", 0.0)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def build(job: str = RUNNING, nodes: str = "", update: str = "") -> Callable[[], list[str]]:
        (folder / "job").write_text(job)
        log = folder / "log"
        log.touch()
        path = folder / "scontrol"
        path.write_text(
            f"#!/bin/sh\ncase \"$*\" in\n'show hostnames'*) printf 'node1\\nnode2\\n';;\n"
            f"*'show job'*) cat {folder}/job;;\n*'show node'*) {nodes or ':'};;\n"
            f'requeue*) echo "$*" >> {log};;\nupdate*) echo "$*" >> {log}; {update or ":"};;\nesac\n'
        )
        path.chmod(0o755)
        return lambda: log.read_text().splitlines()

    yield build
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def job_of(run: Path, site: Site | None = None, **more: object) -> Submission:
    return submission(site or Site(), run=run, **more)


def unwritable(run: Path) -> None:
    """A list of attempts that can be neither read nor written, by anybody."""
    attempts_path(run).mkdir(parents=True)


@pytest.mark.parametrize("cause", [Cause.ERROR, Cause.KILLED, Cause.UNHEALTHY, Cause.CONTACT])
def test_what_a_preemption_ends_in_its_own_way_is_preempted(tmp_path: Path, cluster: Cluster, cause: Cause) -> None:
    asked = cluster(PREEMPTED)
    write_attempt(tmp_path, OPEN)
    failure = Failure(cause, "task 0 on node1 left with exit code 143", ("node1",))
    decision = conclude(job_of(tmp_path), OPEN, failure, 143)
    assert (decision.action, decision.reason, decision.exclude) == (Action.REQUEUE, "preempted", ())
    assert asked() == ["requeue 7"]
    assert read_attempts(tmp_path)[0].error is None


def test_what_would_come_again_stops_also_at_a_preemption(tmp_path: Path, cluster: Cluster) -> None:
    asked = cluster(PREEMPTED)
    write_attempt(tmp_path, OPEN)
    assert conclude(job_of(tmp_path), OPEN, Failure(Cause.MEMORY, "it"), 1).action is Action.STOP
    assert asked() == []


def test_a_command_that_leaves_with_a_code_of_its_own_is_preempted_by_what_slurm_printed(
    tmp_path: Path, cluster: Cluster
) -> None:
    cluster()
    write_attempt(tmp_path, OPEN)
    said = "slurmstepd: error: *** STEP 7.0 ON node1 CANCELLED AT x DUE TO PREEMPTION ***\n"
    assert conclude(job_of(tmp_path), OPEN, Failure(Cause.ERROR, "x"), 1, said=said).reason == "preempted"


def test_without_preemption_it_is_a_crash(tmp_path: Path, cluster: Cluster) -> None:
    asked = cluster()
    write_attempt(tmp_path, OPEN)
    assert conclude(job_of(tmp_path), OPEN, Failure(Cause.ERROR, "x"), 1).reason == "crashed: x"
    assert asked() == ["requeue 7", "update JobId=7 StartTime=now+60"]


def test_a_disk_that_fails_at_the_end_does_not_lose_the_requeue(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = cluster()
    unwritable(tmp_path)
    end(job_of(tmp_path), 75, BATCH)
    assert asked() == ["requeue 7"]
    assert "the end of attempt 1 could not be recorded" in capsys.readouterr().err


def test_an_attempt_that_is_not_on_record_is_concluded_all_the_same(tmp_path: Path, cluster: Cluster) -> None:
    asked = cluster()
    end(job_of(tmp_path), 75, {**BATCH, "SLURM_RESTART_COUNT": "3"})
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.job, attempt.restart, attempt.reason, attempt.made_progress) == ("7", 3, "preempted", False)
    assert asked() == ["requeue 7"]


def test_a_silent_controller_at_the_start_costs_the_address_only(tmp_path: Path, cluster: Cluster) -> None:
    cluster(nodes=SILENT)
    shell = prepare(job_of(tmp_path, Site(rendezvous="address"), global_batch_size=None), BATCH)
    assert "export MASTER_ADDR=node1\n" in shell
    assert read_attempts(tmp_path)[0].reason is None


def test_what_fails_after_the_beginning_is_a_crash_that_comes_back(tmp_path: Path, cluster: Cluster) -> None:
    asked = cluster()
    site = Site(network_interface="nosuch0")
    assert prepare(job_of(tmp_path, site), BATCH) == "exit 1\n"
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.reason or "").startswith("crashed: could not start: network_interface: ")
    assert attempt.followed_by == "requeue"
    assert asked() == ["requeue 7", "update JobId=7 StartTime=now+60"]


def test_nodes_that_cannot_share_the_batch_are_told_of_in_the_record(tmp_path: Path, cluster: Cluster) -> None:
    asked = cluster()
    assert prepare(job_of(tmp_path, nodes_min=2, micro_batch_size=16), BATCH) == "exit 1\n"
    (attempt,) = read_attempts(tmp_path)
    assert attempt.followed_by == "stop"
    assert "1 micro-batches cannot be shared evenly" in (attempt.reason or "")
    assert asked() == []


def test_a_disk_that_fails_at_the_start_brings_the_job_back_but_not_for_ever(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = cluster()
    unwritable(tmp_path)
    assert prepare(job_of(tmp_path), BATCH) == "exit 1\n"
    assert asked() == ["requeue 7", "update JobId=7 StartTime=now+60"]
    prepare(job_of(tmp_path), {**BATCH, "SLURM_RESTART_COUNT": "19"})
    prepare(job_of(tmp_path, Site(requeue=False)), BATCH)
    assert len(asked()) == 2
    assert "vitscale launch resume" in capsys.readouterr().err


def test_a_long_run_may_have_started_often(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cluster()
    write_attempt(tmp_path, dataclasses.replace(OPEN, restart=49, reason="preempted", followed_by="requeue"))
    monkeypatch.setattr("vitscale_launch.before.write_attempt", _full)
    prepare(job_of(tmp_path), {**BATCH, "SLURM_RESTART_COUNT": "50"})
    prepare(job_of(tmp_path), {**BATCH, "SLURM_RESTART_COUNT": "51"})
    assert [line.split()[-1] for line in asked()] == ["7", "StartTime=now+60", "7", "StartTime=now+120"]
    prepare(job_of(tmp_path), {**BATCH, "SLURM_RESTART_COUNT": "52"})
    assert len(asked()) == 4


def test_a_damaged_list_of_attempts_is_not_tried_again(tmp_path: Path, cluster: Cluster) -> None:
    asked = cluster()
    attempts_path(tmp_path).parent.mkdir()
    attempts_path(tmp_path).write_text("{")
    assert prepare(job_of(tmp_path), BATCH) == "exit 1\n"
    assert asked() == []


def test_a_cancel_while_the_attempt_begins_is_heard(tmp_path: Path, cluster: Cluster) -> None:
    path = cancel_path(tmp_path)
    asked = cluster(nodes=f"mkdir -p '{path.parent}'; echo '{{}}' > '{path}'")
    shell = prepare(job_of(tmp_path, Site(rendezvous="address"), global_batch_size=None), BATCH)
    assert shell == "exit 75\n"
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.reason, attempt.followed_by, asked()) == ("cancelled", "stop", [])


def test_a_new_submission_leaves_no_node_out(tmp_path: Path, cluster: Cluster) -> None:
    cluster()
    old = dataclasses.replace(OPEN, reason="crashed: x", followed_by="stop", excluded=("node9",))
    write_attempt(tmp_path, old)
    prepare(job_of(tmp_path, global_batch_size=None, first_attempt=2), BATCH)
    assert read_attempts(tmp_path)[-1].excluded == ()
    write_attempt(tmp_path, dataclasses.replace(OPEN, number=2, excluded=("node8",), reason="lost: x"))
    prepare(job_of(tmp_path, global_batch_size=None, first_attempt=2), BATCH)
    assert read_attempts(tmp_path)[-1].excluded == ("node8",)


def test_the_next_job_of_a_chain_gets_the_pause_and_the_nodes(tmp_path: Path, cluster: Cluster) -> None:
    asked = cluster()
    chain = job_of(tmp_path, Site(requeue=False, exclude=("node9",)), jobs=("7", "8", "9"))
    assert (later_jobs(chain, "8"), later_jobs(chain, "9"), later_jobs(chain, "1")) == (("9",), (), ())
    decision = Decision(Action.NEXT_LINK, "crashed: x", "why", 60, ("node1",))
    follow(decision, chain, "7", Queue.RUNNING)
    assert asked() == ["update JobId=8 StartTime=now+60 ExcNodeList=node9,node1"]
    follow(decision, chain, "9", Queue.RUNNING)
    assert len(asked()) == 1
    # It goes on all the same.
    cluster(update="exit 1")
    follow(decision, chain, "7", Queue.RUNNING)


def test_the_last_job_of_a_chain_does_not_promise_another(tmp_path: Path, cluster: Cluster) -> None:
    cluster()
    write_attempt(tmp_path, OPEN)
    chain = job_of(tmp_path, Site(requeue=False), jobs=("6", "7"))
    decision = conclude(chain, OPEN, Failure(Cause.ERROR, "x"), 1)
    assert (decision.action, "no later job" in decision.because) == (Action.NEXT_LINK, True)
    decision = conclude(dataclasses.replace(chain, jobs=("7", "8")), OPEN, Failure(Cause.ERROR, "y"), 1)
    assert "the next job of the chain goes on" in decision.because


def test_nodes_that_all_fail_are_not_named_as_bad_ones() -> None:
    two, one = Allocation(("a", "b"), 1), Allocation(("a",), 1)
    assert unhealthy({"b": "slow"}, two) == Failure(Cause.UNHEALTHY, "b: slow", ("b",))
    assert unhealthy({"a": "slow"}, one).nodes == ("a",)
    assert unhealthy({"b": "x", "a": "x"}, two) == Failure(Cause.UNHEALTHY, "a: x; b: x", ())
    many = Allocation(tuple(f"n{i}" for i in range(20)), 1)
    assert unhealthy(dict.fromkeys(many.nodes, "x"), many).text.endswith("; and 12 more")


def test_only_what_may_pass_is_tried_again(tmp_path: Path, cluster: Cluster) -> None:
    cluster(nodes=SILENT)
    with pytest.raises(LaunchError, match="Socket timed out") as caught:
        slurm.nodes()
    assert is_passing(caught.value)
    assert is_passing(OSError(116, "Stale file handle"))
    with pytest.raises(LaunchError, match="was never submitted") as missing:
        read_patiently(tmp_path)
    assert not is_passing(missing.value)
    calls: list[int] = []

    def act() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise OSError(116, "Stale file handle")
        return 5

    assert (patiently(act), len(calls)) == (5, 3)


def _full(*_: object) -> None:
    raise OSError(122, "Disk quota exceeded")
