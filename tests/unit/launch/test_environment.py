"""What the batch script and the tasks export."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from vitscale.errors import LaunchError
from vitscale.topology import Topology
from vitscale_launch.allocation import Allocation
from vitscale_launch.environment import (
    FIRST_PORT,
    NUM_PORTS,
    as_shell,
    free_port,
    interface_address,
    rank_environment,
    shared_environment,
    task_environment,
)
from vitscale_launch.site import Site
from vitscale_launch.submission import Submission

ONE = Allocation(("nowhere.invalid",), 2)
TWO = Allocation(("nowhere.invalid", "other.invalid"), 2)


def submission(site: Site, **more: object) -> Submission:
    values = {
        "run": Path("/run"),
        "command": ("train", "config.yaml"),
        "global_batch_size": 16,
        "micro_batch_size": 4,
        "nodes_min": 1,
        "nodes_max": 2,
        "ranks_per_node": site.ranks_on_node,
        "site": site,
        "python": "python",
        "submitted_unix_s": 0,
        **more,
    }
    return Submission(**values)  # type: ignore[arg-type]


def test_one_node_meets_on_itself_and_several_at_an_address_that_resolves() -> None:
    assert shared_environment(Site(), ONE, {})["MASTER_ADDR"] == "127.0.0.1"
    addresses = {"nowhere.invalid": "10.0.0.7"}
    assert shared_environment(Site(), TWO, {}, node_address=addresses.get)["MASTER_ADDR"] == "10.0.0.7"
    assert shared_environment(Site(rendezvous="name"), TWO, {})["MASTER_ADDR"] == "nowhere.invalid"
    here = Allocation(("localhost", "other"), 1)
    assert shared_environment(Site(), here, {}, node_address=addresses.get)["MASTER_ADDR"] == "localhost"
    assert shared_environment(Site(), TWO, {"MASTER_ADDR": "given"})["MASTER_ADDR"] == "given"


def test_the_interface_of_the_site_is_the_address_and_the_libraries_way() -> None:
    shared = shared_environment(Site(network_interface="lo"), TWO, {})
    assert shared["MASTER_ADDR"] == interface_address("lo") == "127.0.0.1"
    assert shared["NCCL_SOCKET_IFNAME"] == shared["GLOO_SOCKET_IFNAME"] == "lo"
    with pytest.raises(LaunchError, match=r"has no interface ib9, only .*lo"):
        interface_address("ib9")


def test_a_port_that_is_taken_is_left_to_its_owner() -> None:
    first = free_port(1234, 0)
    assert FIRST_PORT <= first < FIRST_PORT + NUM_PORTS
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert free_port(1234, 0) != first
    assert free_port(1234, 1) != first


def test_srun_is_told_the_size_of_the_step() -> None:
    spared = Allocation(("a",), 2, spared=("b",))
    shared = shared_environment(Site(ranks_per_node=2), spared, {"SLURM_CPUS_PER_TASK": "3"})
    assert shared["SRUN_CPUS_PER_TASK"] == "3"
    assert (shared["SLURM_NNODES"], shared["SLURM_NTASKS"], shared["SLURM_TASKS_PER_NODE"]) == ("1", "2", "2")
    per_node = shared_environment(Site(ranks_per_node=2, tasks_per_node="node"), spared, {})
    assert (per_node["SLURM_NTASKS"], per_node["SLURM_TASKS_PER_NODE"]) == ("1", "1")
    # Not what an elastic job had at its last start.
    site = Site(ranks_per_node=2, cpus_per_node=6)
    shared = shared_environment(site, TWO, {"SLURM_NTASKS": "12", "MASTER_ADDR": "a"})
    assert (shared["SLURM_NNODES"], shared["SLURM_NTASKS"], shared["SLURM_TASKS_PER_NODE"]) == ("2", "4", "2(x2)")
    assert (shared["SLURM_NTASKS_PER_NODE"], shared["SRUN_CPUS_PER_TASK"]) == ("2", "3")


def test_each_node_has_its_caches_and_each_rank_its_cores() -> None:
    site = Site(scratch=Path("/disk"), ranks_per_node=4, cpus_per_node=8, tasks_per_node="node")
    added = task_environment(submission(site), {"SLURM_CPUS_PER_TASK": "8"})
    assert added["OMP_NUM_THREADS"] == "2"
    assert added["TRITON_CACHE_DIR"].startswith("/disk/vitscale-")
    assert socket.gethostname() in added["TORCHINDUCTOR_CACHE_DIR"]
    given = {"OMP_NUM_THREADS": "5", "TRITON_CACHE_DIR": "/x", "TORCHINDUCTOR_CACHE_DIR": "/y"}
    assert task_environment(submission(site), given) == {}


def test_a_task_of_an_array_knows_its_number() -> None:
    added = task_environment(submission(Site(), array_task=3, array_tasks=8), {})
    assert (added["VITSCALE_TASK"], added["VITSCALE_TASKS"]) == ("3", "8")


def test_ranks_of_a_node_know_their_place() -> None:
    place = {"MASTER_ADDR": "a", "MASTER_PORT": "7"}
    seen = [
        Topology.from_environment({**rank_environment(node, 3, local, 2), **place})
        for node in range(3)
        for local in range(2)
    ]
    assert [topology.rank for topology in seen] == list(range(6))
    assert [topology.local_rank for topology in seen] == [0, 1] * 3
    assert [topology.node for topology in seen] == [0, 0, 1, 1, 2, 2]
    assert {topology.world_size for topology in seen} == {6}


def test_a_shell_gets_every_value_as_it_is() -> None:
    values = {"A": "plain", "B": "two words; $HOME `x` 'y'\n!"}
    script = as_shell(values) + 'printf "%s|%s" "$A" "$B"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "|".join(values.values())
