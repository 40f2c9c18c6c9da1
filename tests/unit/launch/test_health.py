"""Which nodes are bad."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.runs import environment
from vitscale.errors import LaunchError
from vitscale_launch.health import (
    DONE,
    GPU_QUERY,
    CheckInterrupted,
    NodeReport,
    gpu_problems,
    judge,
    report_path,
    run_check,
)
from vitscale_launch.health_node import partners

GOOD = NodeReport(
    node="a",
    stage=DONE,
    tflops=(400.0, 410.0),
    write_mb_per_s=900.0,
    skew_s=0.01,
    reduce_gb_per_s=20.0,
    links_gb_per_s={"b": 10.0, "c": 11.0, "d": 9.0},
)
NODES = ("a", "b", "c", "d")


def reports(**changed: NodeReport | None) -> dict[str, NodeReport | None]:
    others = {node: dataclasses.replace(GOOD, node=node) for node in NODES}
    return {**others, **changed}


def test_good_nodes_are_good() -> None:
    assert judge(NODES, reports()) == {}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"problems": ("7 GPUs instead of 8",)}, "7 GPUs instead of 8"),
        ({"tflops": (400.0, 250.0)}, "device 1 makes 250 TFLOP/s, the median is 400"),
        ({"links_gb_per_s": {"a": 2.0, "c": 2.1, "d": 1.9}}, "its network moves 2 GB/s, the median is 9.5"),
        ({"write_mb_per_s": 50.0}, "it writes 50 MB/s, the median is 900"),
        ({"skew_s": 33.0}, "its clock is +33.0 s off"),
        ({"stage": "matrix product"}, "did not come to an end of: matrix product"),
    ],
)
def test_a_bad_node_is_named_and_no_other(changes: dict[str, object], text: str) -> None:
    bad = judge(NODES, reports(b=dataclasses.replace(GOOD, node="b", **changes)))  # type: ignore[arg-type]
    assert bad == {"b": text}


def test_a_node_without_an_answer_is_bad_and_those_that_wait_for_it_are_not() -> None:
    waiting = {node: dataclasses.replace(GOOD, node=node, stage="network") for node in "acd"}
    assert judge(NODES, {**waiting, "b": None}) == {"b": "no answer within the time"}
    stuck = dataclasses.replace(GOOD, node="b", stage="files")
    assert judge(NODES, {**waiting, "b": stuck}) == {"b": "did not come to an end of: files"}


def test_a_network_that_nobody_gets_through_is_everybodys() -> None:
    waiting = {node: dataclasses.replace(GOOD, node=node, stage="network") for node in NODES}
    assert set(judge(NODES, waiting)) == set(NODES)


def test_the_partners_of_a_slow_node_keep_their_good_name() -> None:
    links = {node: dict.fromkeys(set(NODES) - {node}, 10.0) for node in NODES}
    for node in "acd":
        links[node]["b"] = links["b"][node] = 0.1
    found = {node: dataclasses.replace(GOOD, node=node, links_gb_per_s=links[node]) for node in NODES}
    assert set(judge(NODES, found)) == {"b"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("0, 81559, 3, 0, Not Active", []),
        ("0, 81559, 3, [N/A], [N/A]", []),
        ("0, 81559, 60000, 0, Not Active", ["GPU 0: 60000 of 81559 MiB are in use already"]),
        ("0, 81559, 3, 2, Not Active", ["GPU 0: 2 uncorrected memory errors (ECC)"]),
        ("0, 81559, 3, 0, Active", ["GPU 0: the hardware slows its clock down (heat or power)"]),
        ("Unable to determine", ["nvidia-smi says 'Unable to determine'"]),
    ],
)
def test_what_nvidia_smi_says(row: str, expected: list[str]) -> None:
    assert len(GPU_QUERY) == 5
    assert gpu_problems(row + "\n", 1) == expected
    assert gpu_problems(row + "\n", 2) == ["1 GPUs instead of 2", *expected]


@given(st.integers(1, 24))
def test_everyone_meets_everyone_at_the_same_time(world_size: int) -> None:
    plans = [list(partners(rank, world_size)) for rank in range(world_size)]
    assert len({len(plan) for plan in plans}) == 1
    for rank, plan in enumerate(plans):
        met = [other for other in plan if other is not None]
        assert len(set(met)) == len(met)
        assert rank not in met
        if world_size <= 16:
            assert set(met) == set(range(world_size)) - {rank}
        for number, other in enumerate(plan):
            assert other is None or plans[other][number] == rank


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="srunx cannot be started"):
        run_check(["srunx"], ["a"], tmp_path, 1, environment())


def test_silent_nodes_are_given_up_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale_launch.health.START_S", 0.3)
    bad = run_check(["sleep", "60"], ["a", "b"], tmp_path, 0.1, environment())
    assert bad == dict.fromkeys("ab", "no answer within the time")


def _end_within(tmp_path: Path, stages: dict[str, str], ending: str) -> dict[str, str]:
    """A check whose nodes have come that far when its command ends like that."""
    lines = [
        f'echo \'{{"node": "{node}", "stage": "{stage}"}}\' > {report_path(tmp_path, node)}'
        for node, stage in stages.items()
    ]
    return run_check(["sh", "-c", "; ".join([*lines, ending])], ["a", "b"], tmp_path, 30, environment())


@pytest.mark.parametrize("ending", ["exit 143", "exit 140", "kill -TERM $$"])
def test_a_check_that_is_ended_from_outside_blames_nobody(tmp_path: Path, ending: str) -> None:
    with pytest.raises(CheckInterrupted, match="ended from outside"):
        _end_within(tmp_path, {"a": "health_command", "b": "health_command"}, ending)


def test_a_check_that_fails_by_itself_blames_its_node(tmp_path: Path) -> None:
    assert set(_end_within(tmp_path, {"a": DONE, "b": "matrix product"}, "exit 143")) == {"b"}
    assert set(_end_within(tmp_path, {"a": "files", "b": "files"}, "exit 139")) == {"a", "b"}


def test_a_check_that_no_node_was_free_for_says_so(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"no check was started, .* 3 nodes may not be free"):
        run_check(["sh", "-c", "exit 1"], [], tmp_path, 30, environment(), unnamed=3)
