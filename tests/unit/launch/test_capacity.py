"""Whether a cluster has what a profile asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vitscale.errors import LaunchError
from vitscale_launch.capacity import check_capacity, expand, gpus_of, usable_nodes
from vitscale_launch.site import Site
from vitscale_launch.slurm import SlurmNode, SlurmPartition

NODE = SlurmNode(
    name="gpu1",
    state="IDLE",
    cpus=96,
    memory_mb=500_000,
    gres="gpu:h100:8(S:0-1)",
    partitions=("gpu", "all"),
    address="gpu1",
    host="gpu1",
    features=("nvlink", "ib"),
    reason="",
)
NODES = [
    NODE,
    replace(NODE, name="gpu2", state="DOWN*"),
    replace(NODE, name="gpu3", gres="gpu:a100:4", memory_mb=200_000, features=("ib",)),
    replace(NODE, name="cpu1", gres="", cpus=32, memory_mb=100_000, partitions=("cpu", "all"), features=()),
]
PARTITION = SlurmPartition(
    name="gpu",
    is_default=False,
    state="UP",
    node_list="gpu[1-3]",
    nodes=3,
    cpus=288,
    max_nodes=None,
    max_time_s=86_400,
    default_time_s=None,
    priority_tier=1,
    preempt_mode="OFF",
    grace_s=0,
)
PARTITIONS = [
    PARTITION,
    replace(PARTITION, name="cpu", is_default=True, node_list="cpu1", nodes=1, max_time_s=None),
    replace(PARTITION, name="all", node_list="gpu[1-3],cpu1", nodes=4, max_nodes=2),
    replace(PARTITION, name="closed", state="DOWN"),
]
GPU = Site(partition="gpu", gpus_per_node=8, cpus_per_node=96)


@pytest.mark.parametrize(
    ("gres", "kind", "count"),
    [
        ("", None, 0),
        ("gpu:8", None, 8),
        ("gpu:8", "h100", 0),
        ("gpu:h100:8(S:0-1)", None, 8),
        ("gpu:H100:8", "h100", 8),
        ("gpu:h100:4,gpu:a100:2(S:1),nic:2", None, 6),
        ("gpu:h100:4,gpu:a100:2(S:1),nic:2", "a100", 2),
        ("mygpu:3", None, 0),
    ],
)
def test_counting_gpus(gres: str, kind: str | None, count: int) -> None:
    assert gpus_of(replace(NODE, gres=gres), kind) == count


@pytest.mark.parametrize(
    ("site", "nodes", "partition"),
    [
        (GPU, 2, "gpu"),
        (replace(GPU, gpus_per_node=4), 3, "gpu"),
        (replace(GPU, gpu_type="h100", constraint="nvlink"), 2, "gpu"),
        (replace(GPU, constraint="nvlink&ib"), 2, "gpu"),
        (Site(cpus_per_node=32), 1, "cpu"),
        (replace(GPU, partition="cpu,gpu"), 2, "gpu"),
        (replace(GPU, time_limit_minutes=1440), 1, "gpu"),
    ],
)
def test_what_fits(site: Site, nodes: int, partition: str) -> None:
    assert check_capacity(site, nodes, PARTITIONS, NODES).name == partition


@pytest.mark.parametrize(
    ("site", "nodes", "message"),
    [
        (
            replace(GPU, partition="gpus"),
            1,
            "partition: gpus is no partition of this cluster; allowed are gpu, cpu, all",
        ),
        (replace(GPU, partition="closed"), 1, "closed is DOWN"),
        (GPU, 3, r"gpus_per_node \(8\): only 2 of the 3 nodes of partition gpu .* largest having 8, and 3 are needed"),
        (GPU, 4, "--nodes: 4 is more than partition gpu has; at most 3"),
        (replace(GPU, exclude=("gpu1",)), 2, r"only 1 of the 2 nodes"),
        (replace(GPU, exclude=("gpu[1-2]",)), 2, "at most 1"),
        (replace(GPU, gpu_type="v100"), 1, r"gpus_per_node of type v100 \(8\): only 0"),
        (replace(GPU, gpus_per_node=4, cpus_per_node=100), 1, r"cpus_per_node \(100\): only 0"),
        (replace(GPU, memory_mb=600_000), 1, r"memory_mb \(600000\): only 0"),
        (replace(GPU, constraint="nvlinc"), 1, "constraint: 0 of the 3 .* their features: ib, nvlink"),
        (replace(GPU, time_limit_minutes=1441), 1, "time_limit_minutes: 1441 is more than .* at most 1440"),
        (Site(partition="all"), 3, "--nodes: 3 is more than partition all gives to a job; at most 2"),
        (replace(GPU, partition="cpu,nope"), 1, "nope is no partition"),
    ],
)
def test_what_does_not(site: Site, nodes: int, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        check_capacity(site, nodes, PARTITIONS, NODES)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("gpu1", ["gpu1"]),
        ("gpu[08-10]", ["gpu08", "gpu09", "gpu10"]),
        ("a[1,3-4]-ib,b", ["a1-ib", "a3-ib", "a4-ib", "b"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
    ],
)
def test_compact_lists_of_nodes(text: str, names: list[str]) -> None:
    assert list(expand(text)) == names


@pytest.mark.parametrize(
    ("site", "count"),
    [
        (GPU, 1),  # gpu2 is down, gpu3 too small
        (replace(GPU, gpus_per_node=4), 2),
        (replace(GPU, gpus_per_node=4, gpu_type="a100"), 1),
        (replace(GPU, gpus_per_node=4, constraint="nvlink"), 1),
        (replace(GPU, gpus_per_node=4, exclude=("gpu[2-3]",)), 1),
        (Site(cpus_per_node=1), 1),
        (Site(cpus_per_node=1, partition="cpu,gpu"), 2),
        (Site(cpus_per_node=1, partition="closed"), 0),
    ],
)
def test_nodes_that_a_run_could_use(site: Site, count: int) -> None:
    assert usable_nodes(site, PARTITIONS, NODES) == count


def test_a_cluster_without_a_default_partition() -> None:
    with pytest.raises(LaunchError, match="no default partition; set partition in the site profile: gpu"):
        check_capacity(Site(), 1, [PARTITION], NODES)
