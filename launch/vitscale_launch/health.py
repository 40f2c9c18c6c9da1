"""A check of the nodes before an attempt: which are bad, and why.

Each node writes what it measured into a file of its own (:mod:`vitscale_launch.health_node`), after each stage anew,
so that a node that hangs is known, and where. What is slow is judged by the other nodes: no numbers of any hardware
are in here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from pydantic import TypeAdapter, ValidationError

from vitscale.errors import LaunchError
from vitscale.train.signals import STOP_SIGNALS
from vitscale_launch.allocation import Allocation
from vitscale_launch.environment import ATTEMPT
from vitscale_launch.submission import Submission

# Below these shares of what the median node does, a node is a bad one: it would hold up all others.
SLOW_PRODUCT, SLOW_LINK, SLOW_FILES = 0.7, 0.5, 0.1
MAX_SKEW_S = 5.0
# For starting Python and for srun's own end, beyond the time that the site allows.
START_S, END_S = 60.0, 10.0
DONE = "done"
# With these srun leaves whose tasks were ended by such a signal, and with their negatives if it got one itself.
_STOPPED = {code for number in STOP_SIGNALS for code in (128 + number, -number)}


class CheckInterrupted(LaunchError):  # noqa: N818 (nothing is wrong with the nodes)
    """A check was ended from outside before it could find anything."""


@dataclass(frozen=True)
class NodeReport:
    """What a node told of itself."""

    node: str
    stage: str
    """What it was about to do; "done" at the end."""
    problems: tuple[str, ...] = ()
    tflops: tuple[float, ...] = ()
    """Of a matrix product, by device."""
    write_mb_per_s: float | None = None
    """Into the run folder."""
    skew_s: float | None = None
    """Of its clock against that of the first node."""
    reduce_gb_per_s: float | None = None
    """Of an all-reduce over all nodes."""
    links_gb_per_s: Mapping[str, float] = field(default_factory=dict)
    """With other nodes, by their names; both ways at a time."""
    gpus: tuple[str, ...] = ()
    """Names of its GPUs."""


def health_folder(run: Path, attempt: str) -> Path:
    """Where the nodes of an attempt write their reports."""
    return run / "launch" / "health" / attempt


def report_path(folder: Path, node: str) -> Path:
    """The report of a node."""
    return folder / f"{node}.json"


def read_report(folder: Path, node: str) -> NodeReport | None:
    """What a node told; None if it told nothing."""
    try:
        return TypeAdapter(NodeReport).validate_json(report_path(folder, node).read_bytes())
    except (OSError, ValidationError):
        return None


def judge(nodes: Sequence[str], reports: Mapping[str, NodeReport | None]) -> dict[str, str]:
    """The bad nodes and what is wrong with each."""
    known = {node: report for node in nodes if (report := reports.get(node)) is not None}
    bad = {node: "no answer within the time" for node in nodes if node not in known}
    bad |= {node: "; ".join(report.problems) for node, report in known.items() if report.problems}
    stuck = {node: report.stage for node, report in known.items() if report.stage != DONE and not report.problems}
    # Waiting for the others is no fault of a node, as long as one of them is at fault.
    waiting = {node for node, stage in stuck.items() if stage == "network"}
    bad |= {node: f"did not come to an end of: {stage}" for node, stage in stuck.items() if node not in waiting}
    if not bad:
        bad |= dict.fromkeys(waiting, "did not come to an end of: network")
    for node, problem in _slow(known):
        bad.setdefault(node, problem)
    return bad


def describe(nodes: Sequence[str], reports: Mapping[str, NodeReport | None], bad: Mapping[str, str]) -> Iterator[str]:
    """Lines for a person."""
    for node in nodes:
        report = reports.get(node)
        measured = [] if report is None else list(_measured(report))
        yield f"{node:<20} {'BAD' if node in bad else 'good'}  {', '.join([bad[node]] if node in bad else measured)}"


def check_job(submission: Submission, allocation: Allocation, environment: Mapping[str, str]) -> dict[str, str]:
    """Check the nodes of a job from within its batch script. Returns the bad ones and why."""
    folder = health_folder(submission.run, environment[ATTEMPT])
    site, count = submission.site, len(allocation.nodes)
    command = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    command += [*submission.rank_python, "-m", "vitscale_launch.health_node", str(folder), str(submission.run)]
    command += [f"--gpus={site.gpus_per_node}", f"--seconds={site.health_timeout_s}"]
    command += [f"--command={site.health_command}"] if site.health_command else []
    return run_check(command, allocation.nodes, folder, site.health_timeout_s, environment)


def run_check(
    command: Sequence[str],
    nodes: Sequence[str],
    folder: Path,
    timeout_s: float,
    environment: Mapping[str, str],
    *,
    unnamed: int = 0,
) -> dict[str, str]:
    """Run a command that makes every node write its report, for a bounded time. Returns the bad ones and why.

    Args:
        command: what makes them.
        nodes: those that must report.
        folder: of the reports.
        timeout_s: for the nodes' work.
        environment: of the command.
        unnamed: how many report instead of ``nodes``, where SLURM is yet to choose them.

    Raises:
        CheckInterrupted: it was ended from outside, as by a preemption.
        LaunchError: the command cannot be started, or no nodes are free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        path.unlink()
    start = time.monotonic()
    try:
        check = subprocess.Popen(
            list(command), env=dict(environment), stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno()
        )
    except OSError as error:
        raise LaunchError(f"{command[0]} cannot be started: {error.strerror}; see that it is on the PATH") from error
    try:
        check.wait(timeout_s + START_S)
    except subprocess.TimeoutExpired:
        check.terminate()
        try:
            check.wait(END_S)
        except subprocess.TimeoutExpired:
            check.kill()
            check.wait()
    in_time = time.monotonic() - start < timeout_s
    found = sorted(path.stem for path in folder.glob("*.json"))
    if unnamed and not found and check.returncode not in (0, *_STOPPED) and in_time:
        raise LaunchError(
            f"no check was started, see the message of {command[0]} above: {unnamed} nodes may not be free; try again "
            f"later or with fewer --nodes (sinfo shows what is idle)"
        )
    if unnamed:
        nodes = [*found, *(f"(unnamed node {number})" for number in range(len(found) + 1, unnamed + 1))]
    reports = {node: read_report(folder, node) for node in nodes}
    bad = judge(nodes, reports)
    if in_time and check.returncode in _STOPPED and _knows_nothing(nodes, reports):
        raise CheckInterrupted("the health check was ended from outside, and tells nothing of the nodes; try again")
    (folder / "verdict.json").write_text(json.dumps({"nodes": list(nodes), "bad": bad}, indent=1) + "\n")
    for line in describe(nodes, reports, bad):
        sys.stderr.write(f"vitscale launch: health: {line}\n")
    return bad


def _knows_nothing(nodes: Sequence[str], reports: Mapping[str, NodeReport | None]) -> bool:
    """Whether no node came to an end or has a problem of its own."""
    known = [report for node in nodes if (report := reports.get(node)) is not None]
    return not any(report.problems or report.stage == DONE for report in known)


def gpu_problems(said: str, expected: int) -> list[str]:
    """What is wrong with the GPUs of a node, by what ``nvidia-smi`` says.

    Args:
        said: one line a GPU, as :data:`GPU_QUERY` asks for them.
        expected: how many there must be.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()]
    problems = [f"{len(rows)} GPUs instead of {expected}"] if len(rows) != expected else []
    for row in rows:
        if len(row) != len(GPU_QUERY):
            problems.append(f"nvidia-smi says {','.join(row)!r}")
            continue
        gpu, facts = f"GPU {row[0]}", dict(zip(GPU_QUERY, row, strict=True))
        total, used = _number(facts["memory.total"]), _number(facts["memory.used"])
        if total and used is not None and used > 0.1 * total:
            problems.append(f"{gpu}: {used:.0f} of {total:.0f} MiB are in use already")
        if errors := _number(facts["ecc.errors.uncorrected.volatile.total"]):
            problems.append(f"{gpu}: {errors:.0f} uncorrected memory errors (ECC)")
        if facts["clocks_throttle_reasons.hw_slowdown"] == "Active":
            problems.append(f"{gpu}: the hardware slows its clock down (heat or power)")
    return problems


GPU_QUERY = (
    "index",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
)
"""Facts that ``nvidia-smi --query-gpu`` is asked for."""


def _slow(known: Mapping[str, NodeReport]) -> Iterator[tuple[str, str]]:
    """Nodes that hold up the others, and nodes whose clocks are wrong."""
    rates = [rate for report in known.values() for rate in report.tflops]
    links = [rate for report in known.values() for rate in report.links_gb_per_s.values()]
    writes = [report.write_mb_per_s for report in known.values() if report.write_mb_per_s is not None]
    skews = [report.skew_s for report in known.values() if report.skew_s is not None]
    for node, report in known.items():
        for device, rate in enumerate(report.tflops):
            if rate < SLOW_PRODUCT * median(rates):
                yield node, f"device {device} makes {rate:.3g} TFLOP/s, the median is {median(rates):.3g}"
        own = list(report.links_gb_per_s.values())
        # The median over a node's links, so that a bad node does not take its partners down with it.
        if len(own) > 1 and median(own) < SLOW_LINK * median(links):
            yield node, f"its network moves {median(own):.3g} GB/s, the median is {median(links):.3g}"
        if report.write_mb_per_s is not None and report.write_mb_per_s < SLOW_FILES * median(writes):
            yield node, f"it writes {report.write_mb_per_s:.3g} MB/s, the median is {median(writes):.3g}"
        if report.skew_s is not None and abs(report.skew_s - median(skews)) > MAX_SKEW_S:
            yield node, f"its clock is {report.skew_s - median(skews):+.1f} s off"


def _measured(report: NodeReport) -> Iterator[str]:
    if report.gpus:
        yield f"{len(report.gpus)} x {report.gpus[0]}"
    if report.tflops:
        yield f"product {min(report.tflops):.3g} TFLOP/s"
    if report.reduce_gb_per_s is not None:
        yield f"all-reduce {report.reduce_gb_per_s:.3g} GB/s"
    if report.links_gb_per_s:
        slowest = min(report.links_gb_per_s, key=lambda node: report.links_gb_per_s[node])
        yield f"slowest link {report.links_gb_per_s[slowest]:.3g} GB/s with {slowest}"
    if report.write_mb_per_s is not None:
        yield f"write {report.write_mb_per_s:.3g} MB/s"
    if report.skew_s is not None:
        yield f"clock {report.skew_s:+.3f} s"


def _number(text: str) -> float | None:
    """nvidia-smi says [N/A] of what a GPU does not have."""
    try:
        return float(text)
    except ValueError:
        return None
