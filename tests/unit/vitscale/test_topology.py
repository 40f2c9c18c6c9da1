"""Who am I: torchrun's variables, srun's, or a single process; and what wrong ones are told."""

from __future__ import annotations

import pytest

from vitscale.errors import TopologyError
from vitscale.topology import Topology, first_of_nodelist

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}
# What srun adds to what the job has anyway.
JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[003-004]"}
SRUN = {
    **JOB,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}


def refusal(environment: dict[str, str]) -> str:
    with pytest.raises(TopologyError) as caught:
        Topology.from_environment(environment)
    return str(caught.value)


def test_nothing_set_is_a_single_process() -> None:
    topology = Topology.from_environment({"PATH": "/bin"})
    assert topology == Topology(0, 1, 0, 0, "127.0.0.1", 0)
    assert topology.is_main


def test_torchrun() -> None:
    topology = Topology.from_environment(TORCHRUN)
    assert topology == Topology(5, 8, 1, 1, "node7", 29500)
    assert not topology.is_main


def test_torchrun_inside_a_slurm_step_counts_its_own_ranks() -> None:
    assert Topology.from_environment({**SRUN, **TORCHRUN}) == Topology(5, 8, 1, 1, "node7", 29500)


def test_torchrun_on_one_node_needs_no_group_rank() -> None:
    assert Topology.from_environment({k: v for k, v in TORCHRUN.items() if k != "GROUP_RANK"}).node == 0


def test_srun() -> None:
    topology = Topology.from_environment(SRUN)
    assert (topology.rank, topology.world_size, topology.local_rank, topology.node) == (6, 8, 2, 1)
    assert topology.master_addr == "gpu003"
    assert 20_000 <= topology.master_port < 32_000


def test_all_tasks_of_a_step_meet_at_one_place_and_steps_apart() -> None:
    def place(**changes: str) -> tuple[str, int]:
        topology = Topology.from_environment({**SRUN, **changes})
        return topology.master_addr, topology.master_port

    tasks = {place(SLURM_PROCID=str(n), SLURM_LOCALID=str(n % 4), SLURM_NODEID=str(n // 4)) for n in range(8)}
    assert len(tasks) == 1
    assert len({place(SLURM_STEP_ID=str(n)) for n in range(30)}) == 30
    assert place(SLURM_JOB_ID="4712") != place()


def test_srun_on_one_node_needs_no_name_resolution() -> None:
    assert Topology.from_environment({**SRUN, "SLURM_STEP_NUM_NODES": "1"}).master_addr == "127.0.0.1"


def test_srun_with_a_meeting_place_of_the_users() -> None:
    topology = Topology.from_environment({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (topology.master_addr, topology.master_port) == ("10.0.0.1", 1234)


def test_a_batch_script_without_srun_is_a_single_process() -> None:
    batch = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "4(x2)"}
    assert Topology.from_environment(batch) == Topology()


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[1-4]", "gpu1"),
        ("gpu[003-010,012],cpu1", "gpu003"),
        ("gpu[012,003]", "gpu012"),
        ("gpu[7]", "gpu7"),
        ("node-a-[09-11]", "node-a-09"),
        ("r1-gpu[2-3].cluster.org", "r1-gpu2.cluster.org"),
        ("a,b[1-2]", "a"),
        ("rack[2-3]n[5,7-9],x", "rack2n5"),
        ("[1-3]", "1"),
        ("10.0.0.[1-3]", "10.0.0.1"),
    ],
)
def test_first_host_of_a_nodelist(nodelist: str, host: str) -> None:
    assert first_of_nodelist(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", ",", "[", "gpu[", "gpu[1-3", "gpu[]"])
def test_a_nodelist_without_host(nodelist: str) -> None:
    with pytest.raises(TopologyError) as caught:
        first_of_nodelist(nodelist)
    assert str(caught.value) == (f"SLURM_STEP_NODELIST {nodelist!r} names no host; set MASTER_ADDR to rank 0's host")


@pytest.mark.parametrize("name", sorted(TORCHRUN.keys() - {"GROUP_RANK"}))
def test_a_missing_variable_of_torchrun(name: str) -> None:
    message = refusal({k: v for k, v in TORCHRUN.items() if k != name})
    assert message == f"{name} is not set; start the ranks with --nproc, torchrun or srun, which set it"


@pytest.mark.parametrize("name", sorted(SRUN.keys() - JOB.keys() - {"SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"}))
def test_a_missing_variable_of_srun(name: str) -> None:
    assert refusal({k: v for k, v in SRUN.items() if k != name}).startswith(f"{name} is not set; ")


@pytest.mark.parametrize("text", ["", "one", "-1", "1.0", " 1", "0x1", "²"])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_PORT"])
def test_what_is_no_number(name: str, text: str) -> None:
    assert refusal({**TORCHRUN, name: text}) == (
        f"{name} is {text!r}; a whole number is needed, as --nproc, torchrun or srun set it"
    )


@pytest.mark.parametrize(("rank", "world_size"), [("8", "8"), ("9", "8"), ("0", "0")])
def test_a_rank_outside_the_world(rank: str, world_size: str) -> None:
    assert refusal({**TORCHRUN, "RANK": rank, "WORLD_SIZE": world_size}) == (
        f"rank must be at least 0 and less than world size ({world_size}), but is {rank}; "
        f"check RANK and WORLD_SIZE, or start the ranks with --nproc, torchrun or srun"
    )
    with pytest.raises(TopologyError, match="but is -1"):
        Topology(rank=-1)
