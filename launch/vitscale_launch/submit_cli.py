"""``vitscale launch submit`` and ``vitscale launch array``."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscale.errors import LaunchError

if TYPE_CHECKING:
    from vitscale_launch.site import Site
    from vitscale_launch.submission import Submission
    from vitscale_launch.submit import Executor, Prepared

SiteOption = Annotated[str | None, typer.Option(help="Profile of the cluster: a name, or the path of a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Changed key of the profile; may be repeated."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and the batch script; write nothing.")]
MaxFailures = Annotated[
    int, typer.Option(help="Attempts in a row without progress after which it is not started again.", min=1)
]
# A week more than any queue allows: the limit of runs that no queue limits.
_NO_LIMIT_MINUTES = 366 * 24 * 60


def register(app: typer.Typer) -> None:
    """Add the commands to a group."""
    app.command()(submit)
    app.command()(array)


def submit(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changed values: optim.lr=3e-4 ...")] = None,
    site: SiteOption = None,
    set_: SetOption = None,
    nodes: Annotated[
        str, typer.Option(metavar="N or N:M", help="Nodes; 8:32 takes what the queue gives at each attempt.")
    ] = "1",
    chain: Annotated[
        int, typer.Option(help="Jobs queued one after another, for sites that do not requeue.", min=1)
    ] = 1,
    health_check: Annotated[
        bool | None, typer.Option(help="Check the nodes before each attempt; default: as the profile says.")
    ] = None,
    max_failures: MaxFailures = 3,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Key whose change is meant, as in vitscale train; may be repeated."),
    ] = None,
    dry_run: DryRun = False,
    local: Annotated[
        bool, typer.Option("--local", help="Run on this machine, in the background, without SLURM.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Run on this machine, in this terminal.")] = False,
) -> None:
    """Queue a training run. Its code and configuration are kept as they are now."""
    from vitscale_launch.submit import prepare_run
    from vitscale_launch.submit import submit as send

    executor = _executor(local=local, debug=debug)
    prepared = prepare_run(
        config,
        overrides or [],
        _site(site, set_, needed=executor == "slurm"),
        nodes=parse_nodes(nodes, executor),
        executor=executor,
        allow_change=allow_change or [],
        max_failures=max_failures,
        health_check=health_check,
        dry=dry_run,
    )
    _echo_plan(prepared)
    if dry_run:
        _echo_script(prepared)
        return
    submission = send(prepared, chain=chain)
    if debug:
        from vitscale_launch.batch import run_here

        raise typer.Exit(run_here(submission))
    _echo_submitted(submission, jobs=chain)


def array(
    command: Annotated[
        list[str], typer.Argument(help="What each task runs, after --; {task} and {tasks} are replaced.")
    ],
    tasks: Annotated[int, typer.Option(help="Number of tasks, counted from 0.", min=1)],
    site: SiteOption = None,
    set_: SetOption = None,
    folder: Annotated[
        Path | None, typer.Option(help="For logs and the state of each task; default: arrays/ and the time.")
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(help="CPUs of a task; default: the profile's cpus_per_node.", min=1)
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of a task.", min=0)] = 0,
    memory_mb: Annotated[
        int | None,
        typer.Option(help="Memory of a task, in MiB; default: the profile's, or with --cpus the cluster's.", min=1),
    ] = None,
    max_failures: MaxFailures = 3,
    dry_run: DryRun = False,
) -> None:
    """Queue an array of tasks: vitscale launch array --tasks 16 --site S -- COMMAND --part {task} --of {tasks}."""
    from vitscale_launch.submit import prepare_array
    from vitscale_launch.submit import submit as send

    fewer = [f"gpus_per_node={gpus}", "ranks_per_node=null", "tasks_per_node=node", "health_check=false"]
    # A profile for training takes whole nodes.
    fewer += ["exclusive=false"]
    fewer += [] if gpus else ["gpu_type=null"]
    fewer += [] if cpus is None else [f"cpus_per_node={cpus}", "memory_mb=null"]
    fewer += [] if memory_mb is None else [f"memory_mb={memory_mb}"]
    prepared = prepare_array(
        command,
        _site(site, [*fewer, *(set_ or [])], needed=True),
        folder=folder or Path("arrays") / time.strftime("%Y%m%d-%H%M%S"),
        tasks=tasks,
        max_failures=max_failures,
        dry=dry_run,
    )
    _echo_plan(prepared)
    if dry_run:
        _echo_script(prepared)
        return
    _echo_submitted(send(prepared))


def parse_nodes(text: str, executor: Executor = "slurm") -> tuple[int, int]:
    """The fewest and the most nodes of ``8`` or ``8:32``.

    Raises:
        LaunchError: it is neither, or too much for this machine.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if low > high:
        raise LaunchError(f"--nodes {text}: allowed is a number such as 8, or the fewest and the most such as 8:32")
    if high > 1 and executor != "slurm":
        raise LaunchError(f"--nodes {text}: --local and --debug have this machine only; leave --nodes out")
    return low, high


def _executor(*, local: bool, debug: bool) -> Executor:
    if local and debug:
        raise LaunchError("--local and --debug exclude each other: in the background, or in this terminal; choose one")
    return "local" if local else "debug" if debug else "slurm"


def _site(name: str | None, changes: list[str] | None, *, needed: bool) -> Site:
    from vitscale.config.loader import parse_section
    from vitscale_launch.site import Site, load_site

    if name is not None:
        return load_site(name, changes or [])
    if needed:
        raise LaunchError(
            "--site is not given; name the profile of the cluster (write one with `vitscale launch site init NAME`), "
            "or run on this machine with --local"
        )
    return parse_section(Site, f"time_limit_minutes: {_NO_LIMIT_MINUTES}\n", "this machine", changes or [])


def _echo_plan(prepared: Prepared) -> None:
    for name, value in prepared.plan:
        typer.echo(f"{name:<12} {value}")


def _echo_script(prepared: Prepared) -> None:
    if prepared.submission.executor == "slurm":
        typer.echo(f"\n{prepared.text()}")
    else:
        typer.echo(f"\nvitscale {shlex.join(prepared.submission.command)}")


def _echo_submitted(submission: Submission, jobs: int = 1) -> None:
    """Say what was queued, the newest ``jobs``, and what to type next."""
    run, noun = shlex.quote(str(submission.run)), "process" if submission.executor == "local" else "job"
    typer.echo(f"{'submitted':<12} {noun}{'s' if jobs > 1 else ''} {', '.join(submission.jobs[-jobs:])}")
    for word, command in (("watch", "status"), ("read", "logs"), ("stop", "cancel")):
        typer.echo(f"{word:<12} vitscale launch {command} {run}")
    if not submission.site.requeue and submission.executor == "slurm":
        typer.echo(
            f"{'note':<12} this site does not requeue: after the last job, go on with vitscale launch resume {run}"
        )
