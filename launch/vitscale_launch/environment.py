"""The environment of an attempt: where rank 0 is found, what srun starts, where caches lie.

The batch script exports what all tasks share (:func:`shared_environment`); each task adds what is its node's or its
own (:func:`task_environment`, :func:`rank_environment`).
"""

from __future__ import annotations

import getpass
import shlex
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from vitscale.errors import LaunchError
from vitscale_launch.allocation import Allocation
from vitscale_launch.site import Site
from vitscale_launch.submission import Submission

ATTEMPT, ERRORS, LOG_OFFSET = "VITSCALE_ATTEMPT", "VITSCALE_ERRORS", "VITSCALE_LOG_OFFSET"
"""Variables: number of the attempt; where ranks tell why they failed; size of the batch script's log at its start."""
# Below the range that kernels give to clients.
FIRST_PORT, NUM_PORTS = 20_000, 12_000
# Kernels that are compiled at the first step; on a shared disk thousands of ranks would wait for one another.
_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def shared_environment(
    site: Site,
    allocation: Allocation,
    environment: Mapping[str, str],
    *,
    node_address: Callable[[str], str | None] = lambda _: None,
) -> dict[str, str]:
    """What the batch script exports for srun and for all tasks. To be called on the node of rank 0.

    Args:
        site: the cluster's profile.
        allocation: the nodes of the ranks.
        environment: of the batch script.
        node_address: the address that SLURM has of a node.

    Raises:
        LaunchError: the network interface is not there, or no port is free.
    """
    job, restart = int(environment.get("SLURM_JOB_ID", "0")), int(environment.get("SLURM_RESTART_COUNT", "0"))
    shared = {
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _rendezvous(site, allocation.nodes, node_address),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(free_port(job, restart)),
    }
    if site.network_interface:
        shared |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), site.network_interface)
    return shared | _step(site, len(allocation.nodes), environment)


def _step(site: Site, nodes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What srun reads of the size of the step; sbatch has set it to that of the job, or not at all."""
    tasks = site.tasks_on_node
    cpus = environment.get("SLURM_CPUS_PER_TASK", str(site.cpus_per_task))
    return {
        **dict.fromkeys(("SLURM_NNODES", "SLURM_JOB_NUM_NODES"), str(nodes)),
        **dict.fromkeys(("SLURM_NTASKS", "SLURM_NPROCS"), str(nodes * tasks)),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_TASKS_PER_NODE": f"{tasks}(x{nodes})" if nodes > 1 else str(tasks),
        # Since SLURM 22.05 srun does not take it from sbatch, and every task would be bound to a single core.
        **dict.fromkeys(("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK"), cpus),
    }


def task_environment(submission: Submission, environment: Mapping[str, str]) -> dict[str, str]:
    """What a task adds to its environment, on its own node."""
    added = {}
    scratch = submission.site.scratch or Path("/tmp")
    folder = scratch / f"vitscale-{getpass.getuser()}-{socket.gethostname()}"
    for name, cache in _CACHES.items():
        if name not in environment:
            added[name] = str(folder / cache)
    if "OMP_NUM_THREADS" not in environment:
        ranks = submission.ranks_per_node if submission.site.tasks_per_node == "node" else 1
        added["OMP_NUM_THREADS"] = str(max(1, int(environment.get("SLURM_CPUS_PER_TASK", "1")) // ranks))
    if submission.array_task is not None:
        added |= {"VITSCALE_TASK": str(submission.array_task), "VITSCALE_TASKS": str(submission.array_tasks)}
    return added


def rank_environment(node: int, num_nodes: int, local_rank: int, ranks_per_node: int) -> dict[str, str]:
    """The place of a rank that a task starts for itself, in torchrun's words."""
    return {
        "RANK": str(node * ranks_per_node + local_rank),
        "WORLD_SIZE": str(num_nodes * ranks_per_node),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "GROUP_RANK": str(node),
    }


def free_port(job: int, restart: int) -> int:
    """A port that nobody on this node listens at: another one for each job and start, so that none meets its past.

    Raises:
        LaunchError: all are taken.
    """
    for offset in range(100):
        port = FIRST_PORT + (job * 31 + restart * 7 + offset) % NUM_PORTS
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise LaunchError("a hundred ports of this node are all taken; see who listens there (ss -ltn), or set MASTER_PORT")


def as_shell(variables: Mapping[str, str]) -> str:
    """Lines of shell that export the variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def _rendezvous(site: Site, nodes: tuple[str, ...], node_address: Callable[[str], str | None]) -> str:
    if len(nodes) == 1:
        return "127.0.0.1"
    if site.network_interface:
        return interface_address(site.network_interface)
    first = nodes[0]
    if site.rendezvous == "name" or (site.rendezvous == "auto" and resolves(first)):
        return first
    return node_address(first) or first


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface of this node.

    Raises:
        LaunchError: there is no such interface, or it has no address.
    """
    interfaces = psutil.net_if_addrs()
    if name not in interfaces:
        raise LaunchError(
            f"network_interface: {socket.gethostname()} has no interface {name}, only {', '.join(sorted(interfaces))}; "
            f"correct the site's profile"
        )
    for address in interfaces[name]:
        if address.family == socket.AF_INET:
            return address.address
    raise LaunchError(
        f"network_interface: {name} of {socket.gethostname()} has no IPv4 address; choose another one in the site's "
        f"profile"
    )


def resolves(host: str) -> bool:
    """Whether this machine knows the name or number."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
