"""A node that fails its health check is named, and left out of the next attempt."""

from __future__ import annotations

import json

import pytest

from tests.helpers.jobs import Lab
from tests.helpers.runs import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_bad_node_is_left_out_of_the_next_attempt(lab: Lab) -> None:
    site = lab.site(health_check=True, health_command='[ "$SLURMD_NODENAME" != node1 ] || { echo cracked; exit 4; }')
    job = lab.submit("duration={steps: 4}", site=site, nodes="1")
    job.finish()
    first, second = job.attempts()
    assert first.nodes == "node1"
    assert first.reason == "unhealthy: node1: health_command left with 4: cracked"
    assert (first.followed_by, first.excluded) == ("requeue", ("node1",))
    assert (second.nodes, second.excluded) == ("node2", ("node1",))
    verdict = json.loads((job.run / "launch" / "health" / "2" / "verdict.json").read_text())
    assert verdict == {"nodes": ["node2"], "bad": {}}


def test_without_a_spare_node_the_run_stops_and_says_so(lab: Lab) -> None:
    site = lab.site(health_check=True, health_command='[ "$SLURMD_NODENAME" != node2 ]')
    job = lab.submit("duration={steps: 4}", site=site, nodes="2")
    job.wait_until_gone()
    (attempt,) = job.attempts()
    assert attempt.reason == "unhealthy: node2: health_command left with 1: "
    assert attempt.followed_by == "stop"
    assert "too few nodes are left" in (attempt.because or "")


def test_a_check_by_hand_says_when_there_are_too_few_nodes_or_none_is_free(lab: Lab) -> None:
    words = ("health", "--site", lab.site(), "--folder", lab.folder, "--nodes")
    refused = lab.command(*words, 3)
    assert refused.code == 1
    assert "--nodes: 3 is more than partition main has; at most 2" in " ".join(refused.errors.split())
    lab.cluster.preempt(seconds=300)
    assert wait_until(lambda: "R" in lab.cluster.command("squeue", "--noheader", "--format=%t"), timeout_s=60)
    busy = lab.command(*words, 2)
    assert busy.code == 1
    assert "2 nodes may not be free" in " ".join(busy.errors.split())
    assert "unnamed node" not in busy.out + busy.errors
