"""The commands of docs/launching.md, typed one after another as a new user would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import REPOSITORY, environment
from tests.helpers.slurm import SlurmCluster
from vitscale_launch.attempts import read_attempts

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
COMMANDS = ("vitscale", "sbatch", "sleep")


def test_the_first_submission_works_by_copy_and_paste(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    env = environment(**cluster.environment, XDG_CONFIG_HOME=str(tmp_path / "config"), COLUMNS="200")
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    # Long enough to be preempted and stopped on the way.
    script = _script().replace("{epochs: 100}", "{epochs: 30}")
    assert script.count("\n") > 10
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=840, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    run = tmp_path / "runs" / "lab"
    reasons = [attempt.reason for attempt in read_attempts(run)]
    assert reasons[0] == "preempted", reasons
    assert "cancelled" in reasons
    assert reasons[-1] == "finished"
    assert "missing" not in done.stdout.partition("global batch")[0]
    for text in ("#SBATCH --nodes=2", "preempted", "stopped; ", '"top1":'):
        assert text in done.stdout, done.stdout


def _script() -> str:
    """The shell of the section, without what the commands print."""
    text = (REPOSITORY / "docs" / "launching.md").read_text()
    section = text.partition("## The first submission\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return "".join(block for block in blocks if block.startswith(COMMANDS))
