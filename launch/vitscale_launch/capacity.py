"""Whether a cluster has what a site profile asks for, so that no job waits for nodes that do not exist."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from vitscale.errors import LaunchError
from vitscale_launch.site import Site
from vitscale_launch.slurm import SlurmNode, SlurmPartition

# Of partitions that start no job.
_CLOSED = {"DOWN", "DRAIN", "INACTIVE"}
# In the state of a node that starts no job.
_OUT = ("DOWN", "DRAIN", "FAIL", "*")
_BRACKETS = re.compile(r"\[([\d,-]+)\]")


def gpus_of(node: SlurmNode, kind: str | None = None) -> int:
    """GPUs of a node; ``kind`` counts only those of one type."""
    found = re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)", node.gres)
    return sum(int(number) for name, number in found if kind is None or name.lower() == kind.lower())


def expand(node_list: str) -> Iterator[str]:
    """The names in a compact list such as ``gpu[003-010,12],cpu1``."""
    for part in re.split(r",(?![^\[]*\])", node_list):
        match = _BRACKETS.search(part)
        if match is None:
            yield from [part] if part else []
            continue
        for numbers in match[1].split(","):
            first, _, last = numbers.partition("-")
            for number in range(int(first), int(last or first) + 1):
                yield from expand(f"{part[: match.start()]}{number:0{len(first)}}{part[match.end() :]}")


def members(site: Site, partition: str, nodes: Sequence[SlurmNode]) -> list[SlurmNode]:
    """The nodes of a partition that the profile does not exclude."""
    excluded = {name for text in site.exclude for name in expand(text)}
    return [node for node in nodes if partition in node.partitions and node.name not in excluded]


def usable_nodes(site: Site, partitions: Sequence[SlurmPartition], nodes: Sequence[SlurmNode]) -> int:
    """How many nodes have what the profile asks for and are up. Of a list of partitions, those of the largest: a job
    runs in one of them."""
    wanted = site.partition.split(",") if site.partition else [p.name for p in partitions if p.is_default]
    is_open = {p.name for p in partitions if p.state.upper() not in _CLOSED}
    counts = [sum(_fits(site, node) for node in members(site, name, nodes)) for name in wanted if name in is_open]
    return max(counts, default=0)


def _fits(site: Site, node: SlurmNode) -> bool:
    feature = _plain_constraint(site)
    return (
        not any(word in node.state for word in _OUT)
        and (feature is None or feature in node.features)
        and all(have >= need for _, need, have in _wanted(site, node))
    )


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
    found = members(site, partition.name, nodes)
    if len(found) < nodes_min:
        raise LaunchError(f"--nodes: {nodes_min} is more than partition {partition.name} has; at most {len(found)}")
    _check_nodes(site, nodes_min, partition.name, found)
    return partition


def _check_nodes(site: Site, nodes_min: int, partition: str, found: Sequence[SlurmNode]) -> None:
    for rows in zip(*(_wanted(site, node) for node in found), strict=True):
        key, need, _ = rows[0]
        have = [value for _, _, value in rows]
        fitting = sum(value >= need for value in have)
        if fitting < nodes_min:
            raise LaunchError(
                f"{key} ({need}): only {fitting} of the {len(found)} nodes of partition {partition} have that, the "
                f"largest having {max(have)}, and {nodes_min} are needed; ask for less in the site profile, or for "
                f"fewer nodes"
            )
    if (feature := _plain_constraint(site)) is not None:
        fitting = sum(feature in node.features for node in found)
        if fitting < nodes_min:
            features = ", ".join(sorted({name for node in found for name in node.features})) or "none"
            raise LaunchError(
                f"constraint: {fitting} of the {len(found)} nodes of partition {partition} are {feature}, and "
                f"{nodes_min} are needed; their features: {features}"
            )


def _wanted(site: Site, node: SlurmNode) -> Iterator[tuple[str, int, int]]:
    """What the profile asks of a node: key, how much, and how much the node has."""
    gpus = f"gpus_per_node of type {site.gpu_type}" if site.gpu_type else "gpus_per_node"
    yield gpus, site.gpus_per_node, gpus_of(node, site.gpu_type)
    yield "cpus_per_node", site.cpus_per_task * site.tasks_on_node, node.cpus
    yield "memory_mb", site.memory_mb or 0, node.memory_mb


def _plain_constraint(site: Site) -> str | None:
    """A feature that nodes must have; of expressions such as ``a&b``, SLURM is the judge."""
    plain = site.constraint is not None and re.fullmatch(r"[\w.-]+", site.constraint)
    return site.constraint if plain else None
