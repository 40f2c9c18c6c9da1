"""Preemptions that meet something else than training: the check of the nodes, and commands that know nothing of us."""

from __future__ import annotations

import pytest

from tests.helpers.jobs import Lab
from tests.helpers.runs import wait_until
from vitscale_launch.attempts import read_attempts
from vitscale_launch.submission import task_folder

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_preemption_during_the_health_check_blames_no_node(lab: Lab) -> None:
    marker = lab.folder / "checked"
    site = lab.site(health_check=True, health_command=f"[ -e '{marker}' ] || {{ touch '{marker}'; sleep 100; }}")
    job = lab.submit("duration={steps: 4}", site=site)
    job.wait_for(marker.exists, "the check")
    lab.cluster.preempt(seconds=1)
    job.wait_until_waiting()
    (attempt,) = job.attempts()
    assert (attempt.reason, attempt.followed_by, attempt.excluded) == ("preempted", "requeue", ()), job.story()
    job.finish()
    assert job.reasons() == ["preempted", "finished"]


def test_a_command_that_leaves_with_a_code_of_its_own_comes_back_after_each_preemption(lab: Lab) -> None:
    folder, count = lab.folder / "array", lab.folder / "starts"
    # Twice it waits to be told to leave.
    code = f"trap 'exit 143' TERM; echo >> '{count}'; [ $(wc -l < '{count}') -gt 2 ] || {{ sleep 300 & wait; }}"
    words = ["--tasks", 2, "--site", lab.site(cpus_per_node=2, ranks_per_node=1), "--folder", folder]
    outcome = lab.command("array", *words, "--", "bash", "-c", f"[ {{task}} = 1 ] || {{ {code}; }}")
    assert outcome.code == 0, outcome.errors
    task = task_folder(folder, 0)
    for starts in (1, 2):

        def has_started(starts: int = starts) -> bool:
            return count.exists() and len(count.read_text().splitlines()) == starts

        assert wait_until(has_started, timeout_s=120, every_s=0.2), read_attempts(task)
        lab.cluster.preempt(seconds=1)
    assert wait_until(lambda: lab.cluster.jobs() == [], timeout_s=240, every_s=0.2), lab.cluster.command("squeue")
    assert [attempt.reason for attempt in read_attempts(task)] == ["preempted", "preempted", "finished"]
