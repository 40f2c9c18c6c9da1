"""SLURM through its own commands: what is queued and running, what the cluster has, and what to do with a job.

Needs neither accounting (sacct) nor JSON output, which many clusters lack. SLURM forgets a job some minutes after its
end (``MinJobAge``): from then on only the run folder tells of it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from vitscale.errors import LaunchError
from vitscale_launch.slurm_text import exit_code, number, records, seconds, unix_s, word

# A controller that is busy answers within seconds; one that is gone makes the commands try again for minutes.
TIMEOUT_S = 60.0
_GONE = ("Invalid job id", "Invalid job array", " not found")
# Final states, in which a job will never run again by itself.
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)


@dataclass(frozen=True)
class SlurmJob:
    """A job, or one task of an array, as SLURM sees it. Times are Unix seconds; None where SLURM names none."""

    job_id: str
    name: str
    user: str
    state: str
    """In capitals: PENDING, RUNNING, COMPLETING, ... and those of ``ENDED``."""
    reason: str
    """Why it waits or failed; empty if there is nothing to say."""
    partition: str
    node_list: str
    """Compact, such as ``gpu[003-010]``; empty while it waits."""
    nodes: int
    restarts: int
    requeues: bool
    """Whether SLURM may requeue it."""
    submitted_unix_s: int | None
    started_unix_s: int | None
    """For a job that waits: the earliest or the expected start."""
    ended_unix_s: int | None
    time_limit_s: int | None
    time_left_s: int | None
    """Until its time limit; None unless it runs and has one."""
    exit_code: int | None
    """Of the batch script, once it has ended; 128 + n if signal n ended it."""
    dependency: str
    command: str
    work_dir: str
    array_job: str | None = None
    array_task: str | None = None
    """The number of the task; for those that wait together, such as ``4-15%2``."""
    is_preempted: bool = False
    """Whether SLURM has told it to make room, and it runs in the time that is left."""

    @property
    def numbers(self) -> set[str]:
        """What SLURM's commands find it by: its own number, its array's, and that of a task within it."""
        return {self.job_id, *((self.array_job, f"{self.array_job}_{self.array_task}") if self.array_job else ())}

    @property
    def is_waiting(self) -> bool:
        """Whether it is in the queue."""
        return self.state in {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUE_FED"}

    @property
    def has_ended(self) -> bool:
        """Whether it is over for good."""
        return self.state in ENDED


@dataclass(frozen=True)
class SlurmNode:
    """One node."""

    name: str
    state: str
    """In capitals, with flags: ``IDLE``, ``MIXED``, ``IDLE+DRAIN``, ``DOWN*`` (does not answer) ..."""
    cpus: int
    memory_mb: int
    gres: str
    """Such as ``gpu:h200:8(S:0-1)``; empty if it has none."""
    partitions: tuple[str, ...]
    address: str
    """What the other nodes reach it by: a name or an IP address."""
    host: str
    features: tuple[str, ...]
    reason: str
    """Why an administrator, or SLURM, took it out."""


@dataclass(frozen=True)
class SlurmPartition:
    """One partition."""

    name: str
    is_default: bool
    state: str
    node_list: str
    nodes: int
    cpus: int
    max_nodes: int | None
    max_time_s: int | None
    default_time_s: int | None
    priority_tier: int
    preempt_mode: str
    """``REQUEUE``, ``CANCEL``, ``SUSPEND`` or ``OFF``."""
    grace_s: int
    """Between the signal of a preemption and the kill."""


def jobs(*, user: str | None = None, ids: Iterable[str] | None = None) -> list[SlurmJob]:
    """The jobs that SLURM still knows, each task of an array by itself; also those that ended minutes ago.

    Asks once, for controllers serve many users: for one number by it, for several by listing all jobs.

    Args:
        user: only this one's.
        ids: only those with these numbers; the number of an array stands for all its tasks.

    Raises:
        LaunchError: SLURM is not here or does not answer.
    """
    wanted = None if ids is None else set(ids)
    if wanted is not None and len(wanted) <= 1:
        found = [job for job_id in wanted for job in _known(job_id)]
    else:
        found = [_job(record) for record in records(_run("scontrol", "--all", "show", "job"))]
        found = [job for job in found if wanted is None or wanted & job.numbers]
    return [job for job in found if user in (None, job.user)]


def job(job_id: str) -> SlurmJob | None:
    """A job, or None if SLURM no longer knows it. For an array: the first task that it lists.

    Raises:
        LaunchError: SLURM is not here or does not answer.
    """
    return next(iter(_known(job_id)), None)


def requeue(job_id: str) -> bool:
    """Put a running job back into the queue.

    Returns:
        False if it was there already.

    Raises:
        LaunchError: it may not be requeued, is gone, or SLURM does not answer.
    """
    done = _call("scontrol", "requeue", job_id)
    if "is pending execution" in done.stderr:
        return False
    _check(done)
    return True


def update(job_id: str, **keys: str) -> None:
    """Change a job: ``update("7", StartTime="now+60", ExcNodeList="gpu3")``, with the keys of ``scontrol update``.

    Raises:
        LaunchError: SLURM refuses it or does not answer.
    """
    _run("scontrol", "update", f"JobId={job_id}", *(f"{key}={value}" for key, value in keys.items()))


def cancel(job_id: str, *, signal: str | None = None, to: str | None = None, state: str | None = None) -> None:
    """End a job or send it a signal. A job that SLURM no longer knows is no error.

    Args:
        job_id: of the job.
        signal: such as ``USR2``; None ends the job (SIGTERM, then SIGKILL after ``KillWait``).
        to: who gets the signal: None for the tasks, ``batch`` for the batch script, ``full`` for both.
        state: only if it is in this state, such as ``PENDING``; None for any.

    Raises:
        LaunchError: SLURM refuses it or does not answer.
    """
    options = [f"--{name}={value}" for name, value in (("signal", signal), ("state", state)) if value is not None]
    done = _call("scancel", *options, *([] if to is None else [f"--{to}"]), job_id)
    if not any(text in done.stderr for text in _GONE):
        _check(done)


def nodes() -> list[SlurmNode]:
    """The nodes of the cluster."""
    return [_node(record) for record in records(_run("scontrol", "--all", "show", "node"))]


def partitions() -> list[SlurmPartition]:
    """The partitions of the cluster."""
    return [_partition(record) for record in records(_run("scontrol", "--all", "show", "partition"))]


def config() -> dict[str, str]:
    """SLURM's settings, by their names."""
    found: dict[str, str] = {}
    for line in _run("scontrol", "show", "config").splitlines():
        key, equals, value = line.partition("=")
        if equals:
            found.setdefault(key.strip(), word(value.strip()))
    return found


def host_names(node_list: str) -> list[str]:
    """The nodes of a compact list such as ``gpu[003-010],cpu1``."""
    return _run("scontrol", "show", "hostnames", node_list).split() if node_list else []


def _known(job_id: str) -> list[SlurmJob]:
    done = _call("scontrol", "--all", "show", "job", job_id)
    if done.returncode != 0 and any(text in done.stderr for text in _GONE):
        return []
    _check(done)
    return [_job(record) for record in records(done.stdout)]


def _job(record: dict[str, str]) -> SlurmJob:
    state = record["JobState"]
    limit, ran = seconds(record.get("TimeLimit", "")), seconds(record.get("RunTime", ""))
    return SlurmJob(
        job_id=record["JobId"],
        name=word(record.get("JobName", "")),
        user=record.get("UserId", "").partition("(")[0],
        state=state,
        reason=word(record.get("Reason", "")),
        partition=word(record.get("Partition", "")),
        node_list=word(record.get("NodeList", "")),
        nodes=number(record.get("NumNodes", "0")),
        restarts=number(record.get("Restarts", "0")),
        requeues=record.get("Requeue") == "1",
        submitted_unix_s=unix_s(record.get("SubmitTime", "")),
        started_unix_s=unix_s(record.get("StartTime", "")),
        ended_unix_s=unix_s(record.get("EndTime", "")) if state in ENDED else None,
        time_limit_s=limit,
        time_left_s=max(0, limit - (ran or 0)) if limit is not None and state == "RUNNING" else None,
        exit_code=exit_code(record.get("ExitCode", "")) if state in ENDED else None,
        dependency=word(record.get("Dependency", "")),
        command=word(record.get("Command", "")),
        work_dir=word(record.get("WorkDir", "")),
        array_job=record.get("ArrayJobId"),
        array_task=record.get("ArrayTaskId"),
        is_preempted=unix_s(record.get("PreemptTime", "")) is not None,
    )


def _node(record: dict[str, str]) -> SlurmNode:
    name = record["NodeName"]
    return SlurmNode(
        name=name,
        state=record.get("State", "UNKNOWN"),
        cpus=number(record.get("CPUTot", "0")),
        memory_mb=number(record.get("RealMemory", "0")),
        gres=word(record.get("Gres", "")),
        partitions=tuple(filter(None, word(record.get("Partitions", "")).split(","))),
        address=word(record.get("NodeAddr", "")) or name,
        host=word(record.get("NodeHostName", "")) or name,
        features=tuple(filter(None, word(record.get("AvailableFeatures", "")).split(","))),
        reason=word(record.get("Reason", "")),
    )


def _partition(record: dict[str, str]) -> SlurmPartition:
    max_nodes = record.get("MaxNodes", "")
    return SlurmPartition(
        name=record["PartitionName"],
        is_default=record.get("Default") == "YES",
        state=record.get("State", "UNKNOWN"),
        node_list=word(record.get("Nodes", "")),
        nodes=number(record.get("TotalNodes", "0")),
        cpus=number(record.get("TotalCPUs", "0")),
        max_nodes=number(max_nodes) if max_nodes.isdecimal() else None,
        max_time_s=seconds(record.get("MaxTime", "")),
        default_time_s=seconds(record.get("DefaultTime", "")),
        priority_tier=number(record.get("PriorityTier", "0")),
        preempt_mode=record.get("PreemptMode", "OFF"),
        grace_s=number(record.get("GraceTime", "0")),
    )


def _run(*words: str) -> str:
    done = _call(*words)
    _check(done)
    return done.stdout


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    # These would change what is printed or what is signalled.
    clean = {
        name: value
        for name, value in os.environ.items()
        if name != "SLURM_TIME_FORMAT" and not name.startswith(("SCANCEL_", "SCONTROL_"))
    }
    try:
        return subprocess.run(
            words,
            env={**clean, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise LaunchError(
            f"{words[0]} was not found; log in to a machine of the cluster, or put SLURM's commands on the PATH "
            f"(often: module load slurm)"
        ) from error
    except OSError as error:
        raise LaunchError(
            f"{words[0]} cannot be started: {error.strerror}; ask the cluster's administrators"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"`{' '.join(words)}` did not answer within {TIMEOUT_S:.0f} s; SLURM's controller is overloaded or down: "
            f"look at `scontrol ping` and try again later"
        ) from error


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode == 0:
        return
    lines = (done.stderr or done.stdout).splitlines()
    # What comes before a fatal error are the ways that were tried.
    said = " ".join(" ".join([line for line in lines if "fatal:" in line] or lines).split())
    said = said or f"exit code {done.returncode}"
    cure = "try again later, or ask the cluster's administrators"
    if any(words in said for words in ("contact slurm controller", "configuration source", "configuration file")):
        cure = "look at `scontrol ping`, at SLURM_CONF, and whether this machine belongs to the cluster"
    raise LaunchError(f"`{' '.join(done.args)}` failed: {said}; {cure}")
