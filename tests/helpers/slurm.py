"""A real SLURM cluster on loopback: munged, slurmctld and one slurmd for each "node", all in one temporary folder."""

from __future__ import annotations

import ctypes
import getpass
import os
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

# Both "nodes" are this host. CPUs may exceed the real ones. Jobs in "high" preempt those in "main".
_CONFIG = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket
CredType=cred/munge
StateSaveLocation={state}/controller
SlurmctldPidFile={state}/slurmctld.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdSpoolDir={state}/%n
SlurmdPidFile={state}/%n.pid
SlurmdLogFile={state}/%n.log
SlurmdTimeout=10
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
PartitionName=main Nodes={names} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes={names} PriorityTier=10
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000"


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

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(self.state.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


@contextmanager
def slurm_cluster(num_nodes: int = 2) -> Iterator[SlurmCluster]:
    """A cluster with nodes ``node1`` ... for the length of a ``with`` block. Ends every process that it started."""
    # pytest's folders are too deep for a socket's path.
    state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    state.chmod(0o755)
    names = [f"node{number}" for number in range(1, num_nodes + 1)]
    cluster = SlurmCluster(state, names)
    _configure(state, names)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, state, ignore_errors=True)
        stack.callback(_end, cluster)
        try:
            _start(cluster, "munged", *_munge_arguments(state))
            _wait(cluster, (state / "munge.socket").exists, "munged")
            _start(cluster, "slurmctld", "-D", "-f", str(state / "slurm.conf"))
            for name in names:
                _start(cluster, "slurmd", "-D", "-f", str(state / "slurm.conf"), "-N", name)
            _wait(cluster, lambda: _is_idle(cluster), "the nodes")
        except BaseException:
            sys.stderr.write(cluster.logs())
            raise
        yield cluster


def _configure(state: Path, names: list[str]) -> None:
    key = state / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    (state / "controller").mkdir()
    host = socket.gethostname().partition(".")[0]
    controller_port, *ports = _free_ports(1 + len(names))
    nodes = [_NODE.format(name=name, host=host, port=port) for name, port in zip(names, ports, strict=True)]
    config = _CONFIG.format(
        host=host,
        user=getpass.getuser(),
        state=state,
        controller_port=controller_port,
        nodes="\n".join(nodes),
        names=",".join(names),
    )
    (state / "slurm.conf").write_text(config)


def _munge_arguments(state: Path) -> list[str]:
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    return ["--foreground", "--force", *(f"--{option}={state / name}" for option, name in files.items())]


def _start(cluster: SlurmCluster, program: str, *arguments: str) -> None:
    with (cluster.state / f"{program}.out.log").open("a") as log:
        subprocess.Popen(
            [program, *arguments],
            env={**os.environ, **cluster.environment},
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
            raise RuntimeError(f"{what} did not come up within {READY_WITHIN_S} s")
        time.sleep(0.1)


def _is_idle(cluster: SlurmCluster) -> bool:
    states = cluster.command("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False)
    return states.split() == ["idle"] * len(cluster.nodes)


def _end(cluster: SlurmCluster) -> None:
    """Kill the daemons, the step daemons that they have sent away, and the tasks."""
    end = time.monotonic() + 10
    # More than once, because a daemon may start another process while the list is walked.
    while processes := list(_processes(cluster)):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=5)
        if time.monotonic() > end:
            raise RuntimeError(f"still running: {processes}")


def _processes(cluster: SlurmCluster) -> Iterator[psutil.Process]:
    """Whoever has the cluster's configuration in its environment."""
    setting = f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode()
    for process in psutil.process_iter():
        # psutil gives up on the environment of slurmstepd, which writes its title over the beginning.
        with suppress(OSError, psutil.Error):
            if setting in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                yield process


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _path() -> str:
    """Debian keeps the daemons where a user's PATH does not look."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
