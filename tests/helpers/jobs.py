"""Training jobs on a SLURM cluster, submitted and steered by the real command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.command import Outcome
from tests.helpers.job_faults import JobFaults
from tests.helpers.runs import CONFIG, environment, overrides
from tests.helpers.slurm import SlurmCluster
from vitscale_launch.attempts import Attempt, read_attempts

# The profile of the cluster of tests.helpers.slurm.
SITE: Mapping[str, Any] = {
    "partition": "main",
    "time_limit_minutes": 10,
    "cpus_per_node": 2,
    "ranks_per_node": 2,
    "signal_delay_s": 30,
    "backoff_s": 1,
    "environment": {"OMP_NUM_THREADS": "1"},
}
# An attempt's start takes seconds, on a busy machine more.
PATIENCE_S = 240


class Lab:
    """A cluster, its site profile, and a folder for the runs of one test."""

    def __init__(self, cluster: SlurmCluster, digits: Path, folder: Path) -> None:
        self.cluster, self.digits, self.folder = cluster, digits, folder

    def site(self, name: str = "lab", **changed: Any) -> Path:
        """Write a profile, with some keys changed."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**SITE, **changed}))
        return path

    def command(
        self,
        *words: object,
        faults: JobFaults | None = None,
        timeout_s: float = PATIENCE_S,
        cwd: Path | None = None,
    ) -> Outcome:
        """Run ``vitscale launch WORDS`` on the cluster's "login node"."""
        env = environment(**self.cluster.environment, **(faults.env if faults else {}))
        command = [sys.executable, "-m", "vitscale", "launch", *map(str, words)]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def submit(
        self,
        *changes: str,
        run: str = "run",
        site: Path | None = None,
        nodes: str = "2",
        faults: JobFaults | None = None,
        options: tuple[str, ...] = (),
    ) -> Job:
        """Submit a tiny training run, which must be accepted."""
        job = Job(self, self.folder / run)
        arguments = ["--site", site or self.site(), "--nodes", nodes, *options]
        outcome = self.command("submit", CONFIG, *overrides(self.digits, job.run, *changes), *arguments, faults=faults)
        assert outcome.code == 0, outcome.errors
        return job


class Job:
    """A run that was submitted."""

    def __init__(self, lab: Lab, run: Path) -> None:
        self.lab, self.cluster, self.run = lab, lab.cluster, run

    @property
    def ids(self) -> list[str]:
        """SLURM's numbers, the newest last."""
        return list(json.loads((self.run / "launch" / "submission.json").read_text())["jobs"])

    @property
    def id(self) -> str:
        """SLURM's number of the newest job."""
        return self.ids[-1]

    def attempts(self) -> list[Attempt]:
        """What is recorded of each attempt."""
        return read_attempts(self.run)

    def reasons(self) -> list[str | None]:
        """Why each attempt ended."""
        return [attempt.reason for attempt in self.attempts()]

    def wait_for(self, condition: Callable[[], bool], what: str, *, timeout_s: float = PATIENCE_S) -> None:
        """Wait for something, or fail with all that is known."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"{what} did not come within {timeout_s} s\n{self.story()}"
            time.sleep(0.2)

    def is_gone(self) -> bool:
        """Whether none of its jobs waits or runs."""
        return not set(self.ids) & set(self.cluster.jobs())

    def wait_until_gone(self, *, timeout_s: float = PATIENCE_S) -> None:
        """Wait until it has finished, or was given up."""
        self.wait_for(self.is_gone, "the job's end", timeout_s=timeout_s)

    def wait_until_waiting(self) -> None:
        """Wait until it is back in the queue."""
        self.wait_for(lambda: self.cluster.state_of(self.id) == "PENDING", "the requeue")

    def finish(self, *, timeout_s: float = PATIENCE_S) -> None:
        """Wait for the end, which must be that the run is finished, and that SLURM counts it as a success."""
        self.wait_until_gone(timeout_s=timeout_s)
        assert (self.reasons() or [None])[-1] == "finished", self.story()
        assert self.cluster.state_of(self.id) == "COMPLETED", self.story()

    def story(self) -> str:
        """What is known of it, for the message of a failed test."""
        parts = [f"{key}: {value}" for key, value in self.cluster.show(self.id).items()] if self.ids else []
        parts += [str(attempt) for attempt in self.attempts()]
        files = sorted(path for path in (self.run / "launch" / "logs").glob("*") if path.suffix in {".out", ".err"})
        parts += [f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in files]
        return "\n".join(parts)
