"""Tries a site profile: what is missing here, at SLURM, and on a node of the cluster."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitscale.errors import LaunchError
from vitscale_launch import slurm
from vitscale_launch.batch import batch_text, environment_lines, without_job_variables
from vitscale_launch.capacity import check_capacity
from vitscale_launch.preflight import check_writable
from vitscale_launch.site import Site
from vitscale_launch.site_probe import MARK
from vitscale_launch.submission import Submission

COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
# More than this, and what one node has just written looks old or future to another.
CLOCK_SKEW_S = 5.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    state: Literal["ok", "note", "missing"]
    what: str
    text: str


def check_site(site: Site, folder: Path, *, nodes: int = 1, wait_s: int | None = 60) -> Iterator[Finding]:
    """Look at everything that a job on this site will need, the cheap things first.

    Args:
        site: the profile.
        folder: where runs will lie; nodes must be able to write there.
        nodes: of a job.
        wait_s: seconds for which a node is waited for, to look at it from inside; None not to.
    """
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        yield Finding("missing", "commands", f"{', '.join(missing)} not found; is this a machine of the cluster?")
        return
    yield Finding("ok", "commands", ", ".join(COMMANDS))
    try:
        config = slurm.config()
        yield Finding("ok", "controller", f"SLURM {config.get('SLURM_VERSION', 'of unknown version')} answers")
        partition = check_capacity(site, nodes, slurm.partitions(), slurm.nodes())
        yield Finding("ok", "partition", f"{partition.name} has {nodes} such nodes")
    except LaunchError as error:
        yield Finding("missing", "SLURM", str(error))
        return
    yield from _restarts(site, config, partition)
    try:
        check_writable(folder)
        yield Finding("ok", "folder", f"{folder} can be written from here")
    except LaunchError as error:
        yield Finding("missing", "folder", str(error))
    submittable = _test_submission(site, folder, nodes)
    yield submittable
    if wait_s is None:
        yield Finding("note", "node", "was not looked at")
    elif submittable.state == "ok":
        yield from _look_at_node(site, folder, wait_s)


def _restarts(site: Site, config: dict[str, str], partition: slurm.SlurmPartition) -> Iterator[Finding]:
    if site.requeue and config.get("JobRequeue") == "0":
        yield Finding(
            "note", "requeue", "JobRequeue=0: jobs ask for it themselves; if SLURM refuses, set requeue: false"
        )
    if partition.preempt_mode not in ("OFF", ""):
        kill_s = config.get("KillWait", "some")
        yield Finding(
            "note",
            "preemption",
            f"{partition.preempt_mode} after {partition.grace_s} s of grace and a KillWait of {kill_s}; a step and a "
            f"save must fit into it, or the steps since the last checkpoint are made again",
        )


def _test_submission(site: Site, folder: Path, nodes: int) -> Finding:
    """Let SLURM itself say whether it would take such a job: account, qos, constraint, limits."""
    trial = Submission(
        run=folder.absolute(),
        command=(),
        global_batch_size=None,
        micro_batch_size=None,
        nodes_min=nodes,
        nodes_max=nodes,
        ranks_per_node=site.ranks_on_node,
        site=site,
        python=sys.executable,
        submitted_unix_s=0,
    )
    with without_job_variables():
        done = _run(["sbatch", "--test-only"], timeout_s=slurm.TIMEOUT_S, stdin=batch_text(trial))
    said = " ".join((done.stderr or done.stdout).split())
    if done.returncode == 0:
        return Finding("ok", "job", f"SLURM would take it: {said.removeprefix('sbatch: ')}")
    return Finding("missing", "job", f"SLURM would refuse it: {said}; mend the profile (account, qos, constraint ...)")


def _look_at_node(site: Site, folder: Path, wait_s: int) -> Iterator[Finding]:
    asked = {
        "folder": str(folder.absolute() if folder.exists() else _first_that_exists(folder)),
        "scratch": str(site.scratch) if site.scratch else None,
        "health_command": site.health_command,
        "health_timeout_s": site.health_timeout_s,
    }
    command = shlex.join([sys.executable, "-m", "vitscale_launch.site_probe", json.dumps(asked)])
    script = "\n".join([*environment_lines(site), f"exec {command}"])
    start = time.time()
    with without_job_variables():
        done = _run(
            ["srun", *_srun_options(site, wait_s), "bash", "-c", script], timeout_s=wait_s + site.health_timeout_s + 120
        )
    end = time.time()
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        said = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        if "Unable to allocate resources" in done.stderr or "immediate" in done.stderr:
            yield Finding("note", "node", f"none was free within {wait_s} s ({said}); try again, or give --wait")
        else:
            yield Finding("missing", "node", f"Python did not run on a node: {said}")
        return
    yield from _judge(site, json.loads(line.removeprefix(MARK)), start, end)


def _judge(site: Site, found: dict[str, Any], start: float, end: float) -> Iterator[Finding]:
    """What a node told, compared with the profile."""
    host = found["host"]
    yield Finding("ok", "node", f"{host} runs this Python, with {found['cpus']} CPUs")
    if problem := found["folder"]:
        yield Finding("missing", "shared folder", f"{host} cannot write to the run folder's place: {problem}")
    else:
        yield Finding("ok", "shared folder", f"{host} can write there")
    if site.scratch is not None:
        problem = found["scratch"]
        told = f"{host} cannot write to {site.scratch}: {problem}" if problem else f"{host} can write to {site.scratch}"
        yield Finding("missing" if problem else "ok", "scratch", told)
    interface = site.network_interface
    if interface is not None and interface not in found["interfaces"]:
        known = ", ".join(found["interfaces"])
        yield Finding("missing", "interface", f"{host} has no {interface}; it has {known}")
    if site.gpus_per_node and (found["gpus"] or 0) < 1:
        yield Finding("missing", "GPUs", f"nvidia-smi lists none on {host}")
    if site.health_command is not None:
        problem = found["health"]
        yield Finding("missing" if problem else "ok", "health", problem or f"{site.health_command!r} passes on {host}")
    skew = max(start - found["unix_s"], found["unix_s"] - end, 0.0)
    state: Literal["ok", "missing"] = "missing" if skew > CLOCK_SKEW_S else "ok"
    yield Finding(state, "clock", f"{host} is {skew:.1f} s off" if skew else f"{host} agrees with this machine")


def _srun_options(site: Site, wait_s: int) -> list[str]:
    options = {
        **site.selection,
        **site.gpus_option(1),
        "immediate": str(wait_s),
        "time": "5",
        "job-name": "vitscale-site-check",
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    return ["--nodes=1", "--ntasks=1", "--quiet", *given]


def _first_that_exists(folder: Path) -> Path:
    return next(path for path in folder.absolute().parents if path.exists())


def _run(words: list[str], *, timeout_s: float, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 1, "", f"{words[0]} did not answer within {timeout_s:.0f} s")
