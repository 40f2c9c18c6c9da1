"""A real SLURM cluster on one machine: munged, slurmctld and one slurmd for each "node", all in one folder.

``python -m tests.helpers.slurm FOLDER`` runs one until Ctrl-C, to try commands on it by hand.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("srun", "sbatch", "scancel", "scontrol", "sinfo", "squeue")
# Set where a missing SLURM must not pass for a success.
REQUIRED = "VITSCALE_REQUIRE_SLURM"
READY_WITHIN_S = 30
# A node that says nothing for so long is down.
NODE_TIMEOUT_S = 10
CPUS_PER_NODE = 4
# Clusters at one time, each with ports and job numbers of its own: ranks derive their port from the job's number.
_SLOTS = 12
_FIRST_PORT, _PORTS_OF_SLOT = 12_000, 50

# Both "nodes" are this host. CPUs may exceed the real ones. Jobs in "high" preempt those in "main" and "frail"; those
# of "main" go back to the queue, those of "frail" are lost. A job that was requeued waits for the length of
# cred_expire.
_CONFIG = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket,cred_expire={requeue_wait_s}
CredType=cred/munge
FirstJobId={first_job}
StateSaveLocation={state}/controller
SlurmctldPidFile={state}/slurmctld.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdSpoolDir={state}/%n
SlurmdPidFile={state}/%n.pid
SlurmdLogFile={state}/%n.log
SlurmdTimeout={node_timeout_s}
SlurmdParameters=config_overrides
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes={names} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=frail Nodes={names} PriorityTier=1 PreemptMode=CANCEL GraceTime={grace_s}
PartitionName=high Nodes={names} PriorityTier=10
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000"
# The daemons of a "node" carry this, its tasks carry SLURM's own SLURMD_NODENAME.
_NODE_VARIABLE = "LAB_NODE"
_DAEMON = "LAB_DAEMON=1"


def missing_programs() -> list[str]:
    """Programs of slurm-wlm and munge that are not here."""
    return [program for program in (*DAEMONS, *COMMANDS) if shutil.which(program, path=_path()) is None]


def require_slurm() -> None:
    """Skip the test where SLURM is missing, or fail it where ``VITSCALE_REQUIRE_SLURM=1`` asks for it."""
    missing = missing_programs()
    if missing:
        reason = f"{', '.join(missing)} not found; install slurm-wlm and munge"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED}=1, but {reason}")
        pytest.skip(reason)


class SlurmCluster:
    """A running cluster. ``environment`` is what SLURM's commands and the jobs need."""

    def __init__(self, state: Path, nodes: Sequence[str]) -> None:
        self.state, self.nodes = state, tuple(nodes)
        self.environment = {"SLURM_CONF": str(state / "slurm.conf"), "PATH": _path()}

    def command(self, *words: str, check: bool = True) -> str:
        """Run one of SLURM's commands and give its output."""
        env = {**os.environ, **self.environment}
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=60)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)} left with {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def jobs(self) -> list[str]:
        """Ids of the jobs that wait or run."""
        return self.command("squeue", "--noheader", "--format=%i").split()

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job: ``JobState``, ``Reason``, ``Restarts`` ...; nothing of one it forgot."""
        text = self.command("scontrol", "--oneliner", "show", "job", job, check=False)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state_of(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED``, ``FAILED`` ..."""
        return self.show(job).get("JobState", "")

    def restarts_of(self, job: str) -> int:
        """How often a job went back to the queue."""
        return int(self.show(job).get("Restarts", "0"))

    def start_now(self, job: str) -> None:
        """Let a job that went back to the queue wait no longer. SLURM makes it wait first, also on a real cluster."""
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def preempt(self, *, seconds: float, nodes: int | None = None) -> str:
        """Queue a job that takes all of some nodes, all by default, from the jobs that others have there. Its id."""
        number = len(self.nodes) if nodes is None else nodes
        words = ["sbatch", "--parsable", "--partition=high", f"--nodes={number}", "--output=/dev/null"]
        words += [f"--ntasks-per-node={CPUS_PER_NODE}", "--job-name=important", f"--wrap=sleep {seconds}"]
        return self.command(*words)

    def tasks(self, job: str) -> dict[int, psutil.Process]:
        """The running tasks of a job by rank, each the process that SLURM has started."""
        found = {}
        for process in _processes(self, f"SLURM_JOB_ID={job}"):
            rank = _variable(process, "SLURM_PROCID")
            with suppress(psutil.Error):
                parent = process.parent()
                if rank and parent is not None and parent.name().startswith("slurmstepd"):
                    found[int(rank)] = process
        # The batch script looks like a task with number 0, but has no number within a step.
        return {rank: process for rank, process in found.items() if _variable(process, "SLURM_STEP_NUM_TASKS")}

    def kill_node(self, name: str) -> None:
        """What a power cut is: the daemon, its children and all tasks of a node are gone at once."""
        _kill(lambda: [*_processes(self, f"{_NODE_VARIABLE}={name}"), *_processes(self, f"SLURMD_NODENAME={name}")])

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        _start(self, "slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", name, **{_NODE_VARIABLE: name})

    def clear(self) -> None:
        """Leave no job behind and have all nodes again, for the next test."""
        for name in self.nodes:
            if not list(_processes(self, f"{_NODE_VARIABLE}={name}")):
                self.start_node(name)
        self.command("scancel", "--full", "--signal=KILL", "--user", getpass.getuser(), check=False)
        self.command("scancel", "--user", getpass.getuser(), check=False)
        _wait(self, lambda: not self.jobs() and _is_idle(self), "idle nodes")

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(self.state.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


@contextmanager
def slurm_cluster(
    num_nodes: int = 2, *, grace_s: int = 5, requeue_wait_s: int = 5, state: Path | None = None
) -> Iterator[SlurmCluster]:
    """A cluster with nodes ``node1`` ... for the length of a ``with`` block. Ends every process that it started.

    Args:
        num_nodes: how many.
        grace_s: between the signal that a preempted job gets and its end.
        requeue_wait_s: how long a requeued job waits before it may start, 5 or more; SLURM's own value is 120.
        state: folder of the cluster; a temporary one by default.
    """
    with ExitStack() as stack:
        slot, note = stack.enter_context(_slot())
        if state is None:
            # pytest's folders are too deep for a socket's path.
            state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
            stack.callback(shutil.rmtree, state, ignore_errors=True)
        note.write_text(str(state))
        state.chmod(0o755)
        cluster = SlurmCluster(state, [f"node{number}" for number in range(1, num_nodes + 1)])
        _configure(cluster, slot, grace_s=grace_s, requeue_wait_s=requeue_wait_s)
        stack.callback(_kill, lambda: list(_processes(cluster)))
        try:
            _start(cluster, "munged", *_munge_arguments(state))
            _wait(cluster, (state / "munge.socket").exists, "munged")
            _start(cluster, "slurmctld", "-D", "-f", str(state / "slurm.conf"))
            for name in cluster.nodes:
                cluster.start_node(name)
            _wait(cluster, lambda: _is_idle(cluster), "the nodes")
        except BaseException:
            sys.stderr.write(cluster.logs())
            raise
        yield cluster


@contextmanager
def _slot() -> Iterator[tuple[int, Path]]:
    """A number that no other cluster on this machine has, also none of another process, and where to note its folder.

    What is left of a cluster whose process was killed is ended by the next one with its number.
    """
    folder = Path(tempfile.gettempdir()) / f"vitscale-slurm-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for slot in range(_SLOTS):
        with (folder / str(slot)).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            note = folder / f"{slot}.state"
            if note.exists():
                _end_leftovers(Path(note.read_text()))
            try:
                yield slot, note
            finally:
                note.unlink(missing_ok=True)
            return
    raise RuntimeError(f"{_SLOTS} clusters are running on this machine already")


def _end_leftovers(state: Path) -> None:
    cluster = SlurmCluster(state, [])
    _kill(lambda: list(_processes(cluster)))
    shutil.rmtree(state, ignore_errors=True)


def _configure(cluster: SlurmCluster, slot: int, *, grace_s: int, requeue_wait_s: int) -> None:
    state, names = cluster.state, cluster.nodes
    key = state / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    (state / "controller").mkdir()
    host = socket.gethostname().partition(".")[0]
    controller_port, *ports = _free_ports(_FIRST_PORT + slot * _PORTS_OF_SLOT, 1 + len(names))
    nodes = [
        _NODE.format(name=name, host=host, port=port, cpus=CPUS_PER_NODE)
        for name, port in zip(names, ports, strict=True)
    ]
    config = _CONFIG.format(
        host=host,
        user=getpass.getuser(),
        state=state,
        controller_port=controller_port,
        first_job=1 + slot * 1000,
        node_timeout_s=NODE_TIMEOUT_S,
        grace_s=grace_s,
        requeue_wait_s=requeue_wait_s,
        nodes="\n".join(nodes),
        names=",".join(names),
    )
    (state / "slurm.conf").write_text(config)


def _munge_arguments(state: Path) -> list[str]:
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    return ["--foreground", "--force", *(f"--{option}={state / name}" for option, name in files.items())]


def _start(cluster: SlurmCluster, program: str, *arguments: str, **env: str) -> None:
    with (cluster.state / f"{program}.out.log").open("a") as log:
        subprocess.Popen(
            [program, *arguments],
            env={**os.environ, **cluster.environment, **dict([_DAEMON.split("=")]), **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_die_with_the_tests,
        )


def _die_with_the_tests() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def _wait(cluster: SlurmCluster, condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + READY_WITHIN_S
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not come up within {READY_WITHIN_S} s:\n{cluster.command('sinfo')}")
        time.sleep(0.1)


def _is_idle(cluster: SlurmCluster) -> bool:
    states = cluster.command("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False)
    return states.split() == ["idle"] * len(cluster.nodes)


def _kill(alive: Callable[[], list[psutil.Process]]) -> None:
    """Kill daemons, the step daemons that they have sent away, and tasks."""
    end = time.monotonic() + 10
    # More than once, because a daemon may start another process while the list is walked.
    while processes := alive():
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=5)
        if time.monotonic() > end:
            raise RuntimeError(f"still running: {processes}")


def _processes(cluster: SlurmCluster, *settings: str) -> Iterator[psutil.Process]:
    """The cluster's daemons and whatever runs in its jobs, if these settings are in their environment.

    Not a shell whose user has exported SLURM_CONF, nor what was started there.
    """
    wanted = {f"SLURM_CONF={cluster.environment['SLURM_CONF']}", *settings}
    for process in psutil.process_iter():
        found = set(_environment(process))
        if wanted <= found and (_DAEMON in found or any(text.startswith("SLURM_JOB_ID=") for text in found)):
            yield process


def _variable(process: psutil.Process, name: str) -> str | None:
    return dict(text.split("=", 1) for text in _environment(process) if "=" in text).get(name)


def _environment(process: psutil.Process) -> list[str]:
    # psutil gives up on the environment of slurmstepd, which writes its title over the beginning.
    with suppress(OSError):
        return os.fsdecode(Path(f"/proc/{process.pid}/environ").read_bytes()).split("\0")
    return []


def _free_ports(first: int, count: int) -> list[int]:
    """Ports of a slot that nobody listens on."""
    free: list[int] = []
    for port in range(first, first + _PORTS_OF_SLOT):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise RuntimeError(f"no {count} free ports from {first} on")


def _path() -> str:
    """Debian keeps the daemons where a user's PATH does not look."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def main() -> None:
    """Run a cluster until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A SLURM cluster on this machine, to try commands on.")
    parser.add_argument("folder", type=Path, help="for its files; must not exist; a short path")
    parser.add_argument("--nodes", type=int, default=2, help=f"of {CPUS_PER_NODE} CPUs each")
    options = parser.parse_args()
    if missing := missing_programs():
        parser.error(f"{', '.join(missing)} not found; install slurm-wlm and munge")
    folder = options.folder.absolute()
    if re.search(r"\s", str(folder)) or len(str(folder)) > 80:
        parser.error(f"{folder}: SLURM wants a short path without spaces")
    folder.mkdir()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt), slurm_cluster(options.nodes, state=folder) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}\n{', '.join(cluster.nodes)} up; Ctrl-C ends them")
        sys.stdout.flush()
        signal.pause()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
