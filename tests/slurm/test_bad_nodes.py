"""A node that fails its health check is named, and left out of the next attempt."""

from __future__ import annotations

import json

import pytest

from tests.helpers.jobs import Lab

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
