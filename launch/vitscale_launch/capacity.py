"""Whether a cluster has what a site profile asks for, so that no job waits for nodes that do not exist."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from vitscale.errors import LaunchError
from vitscale_launch.site import Site
from vitscale_launch.slurm import SlurmNode, SlurmPartition

# Of partitions that start no job.
_CLOSED = {"DOWN", "DRAIN", "INACTIVE"}


def gpus_of(node: SlurmNode, kind: str | None = None) -> int:
    """GPUs of a node; ``kind`` counts only those of one type."""
    found = re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)", node.gres)
    return sum(int(number) for name, number in found if kind is None or name.lower() == kind.lower())


def choose_partition(site: Site, partitions: Sequence[SlurmPartition]) -> SlurmPartition:
    """The partition that the jobs would go to.

    Raises:
        LaunchError: there is none.
    """
    names = ", ".join(partition.name for partition in partitions) or "none"
    for partition in partitions:
        if partition.name == site.partition or (site.partition is None and partition.is_default):
            return partition
    if site.partition is None:
        raise LaunchError(
            f"partition: the cluster has no default partition; set partition in the site profile: {names}"
        )
    raise LaunchError(f"partition: {site.partition} is no partition of this cluster; allowed are {names}")


def check_capacity(
    site: Site, nodes_min: int, partitions: Sequence[SlurmPartition], nodes: Sequence[SlurmNode]
) -> SlurmPartition:
    """See that ``nodes_min`` nodes of the partition have what the profile asks for. Nodes that are down count: they
    may come back while the job waits. Of a list of partitions, one must do.

    Returns:
        The partition.

    Raises:
        LaunchError: too few have it, or the partition does not take such jobs.
    """
    refusals: list[LaunchError] = []
    for name in site.partition.split(",") if site.partition else [None]:
        try:
            return _check_partition(dataclasses.replace(site, partition=name), nodes_min, partitions, nodes)
        except LaunchError as error:
            refusals.append(error)
    raise refusals[-1]


def _check_partition(
    site: Site, nodes_min: int, partitions: Sequence[SlurmPartition], nodes: Sequence[SlurmNode]
) -> SlurmPartition:
    partition = choose_partition(site, partitions)
    if partition.state.upper() in _CLOSED:
        raise LaunchError(f"partition: {partition.name} is {partition.state}, so no job starts there; choose another")
    limit_s = site.time_limit_minutes * 60
    if partition.max_time_s is not None and limit_s > partition.max_time_s:
        raise LaunchError(
            f"time_limit_minutes: {site.time_limit_minutes} is more than partition {partition.name} allows; at most "
            f"{partition.max_time_s // 60}: a run takes as many attempts as it needs"
        )
    if partition.max_nodes is not None and nodes_min > partition.max_nodes:
        raise LaunchError(
            f"--nodes: {nodes_min} is more than partition {partition.name} gives to a job; at most "
            f"{partition.max_nodes}"
        )
    members = [node for node in nodes if partition.name in node.partitions and node.name not in site.exclude]
    if len(members) < nodes_min:
        raise LaunchError(f"--nodes: {nodes_min} is more than partition {partition.name} has; at most {len(members)}")
    _check_nodes(site, nodes_min, partition.name, members)
    return partition


def _check_nodes(site: Site, nodes_min: int, partition: str, members: Sequence[SlurmNode]) -> None:
    cpus, memory = site.cpus_per_task * site.tasks_on_node, site.memory_mb or 0
    gpus = f"gpus_per_node ({site.gpus_per_node}{' ' + site.gpu_type if site.gpu_type else ''})"
    wanted = (
        (gpus, site.gpus_per_node, [gpus_of(node, site.gpu_type) for node in members]),
        (f"cpus_per_node ({cpus})", cpus, [node.cpus for node in members]),
        (f"memory_mb ({memory})", memory, [node.memory_mb for node in members]),
    )
    for key, need, have in wanted:
        fitting = sum(value >= need for value in have)
        if fitting < nodes_min:
            raise LaunchError(
                f"{key}: only {fitting} of the {len(members)} nodes of partition {partition} have that, the largest "
                f"having {max(have)}, and {nodes_min} are needed; ask for less in the site profile, or for fewer nodes"
            )
    if site.constraint is not None and re.fullmatch(r"[\w.-]+", site.constraint):
        fitting = sum(site.constraint in node.features for node in members)
        if fitting < nodes_min:
            features = ", ".join(sorted({name for node in members for name in node.features})) or "none"
            raise LaunchError(
                f"constraint: {fitting} of the {len(members)} nodes of partition {partition} are {site.constraint}, "
                f"and {nodes_min} are needed; their features: {features}"
            )
