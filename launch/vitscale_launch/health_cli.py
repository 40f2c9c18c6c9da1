"""``vitscale launch health``."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vitscale_launch.site import Site

# For nodes to become free. It is part of the time that starting may take.
WAIT_S = 30


def register(app: typer.Typer) -> None:
    """Add the command to a group."""
    app.command()(health)


def health(
    site: Annotated[
        str | None,
        typer.Option(help="Profile of a cluster whose nodes are checked; default: this machine or job."),
    ] = None,
    nodes: Annotated[int, typer.Option(help="How many nodes of that cluster.", min=1)] = 1,
    folder: Annotated[
        Path, typer.Option(help="Where files are written and read back, on a disk that all nodes share.")
    ] = Path(),
    seconds: Annotated[int, typer.Option(help="For the check of a node.", min=10)] = 180,
) -> None:
    """Check nodes: GPUs, matrix products, network, files, clocks. Exit code 1 if one is bad."""
    from vitscale.errors import LaunchError
    from vitscale_launch.health import run_check
    from vitscale_launch.site import Site, load_site

    profile = load_site(site) if site else Site()
    try:
        with tempfile.TemporaryDirectory(prefix=".health-", dir=folder) as temporary:
            reports = Path(temporary).absolute()
            words = ["-m", "vitscale_launch.health_node", str(reports), str(folder.absolute())]
            words += [f"--gpus={profile.gpus_per_node}", f"--seconds={seconds}"]
            words += [f"--command={profile.health_command}"] if profile.health_command else []
            command, names = _place(profile, nodes, site)
            environment = {**os.environ, **profile.environment}
            if "SLURM_CPUS_PER_TASK" in os.environ:
                environment["SRUN_CPUS_PER_TASK"] = os.environ["SLURM_CPUS_PER_TASK"]
            python = (*profile.container, profile.container_python) if profile.container else (sys.executable,)
            typer.echo(f"checking: {shlex.join(command) or 'this machine'}", err=True)
            bad = run_check(
                [*command, *python, *words],
                names,
                reports,
                seconds,
                environment,
                unnamed=0 if names else nodes,
            )
    except OSError as error:
        raise LaunchError(f"--folder {folder}: cannot be written: {error.strerror}; choose another one") from error
    if bad:
        for node, problem in sorted(bad.items()):
            typer.echo(f"{node}: {problem}")
        raise typer.Exit(1)
    typer.echo(f"all {len(names) or nodes} nodes are good")


def _place(profile: Site, nodes: int, site: str | None) -> tuple[list[str], list[str]]:
    """The words that start a process on each node, and the nodes' names where they are known already."""
    from vitscale_launch import slurm
    from vitscale_launch.capacity import check_capacity

    if "SLURM_JOB_NODELIST" in os.environ and "SLURM_STEP_ID" not in os.environ:
        names = slurm.host_names(os.environ["SLURM_JOB_NODELIST"])
        return ["srun", *_each(len(names))], names
    if site is None:
        return [], [os.environ.get("SLURMD_NODENAME", socket.gethostname())]
    check_capacity(profile, nodes, slurm.partitions(), slurm.nodes())
    return ["srun", f"--immediate={WAIT_S}", *_each(nodes), *_options(profile)], []


def _each(nodes: int) -> list[str]:
    return [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]


def _options(profile: Site) -> Iterator[str]:
    options = profile.selection | profile.gpus_option(profile.gpus_per_node)
    yield from (f"--{name}={value}" for name, value in options.items())
    if profile.exclusive:
        yield "--exclusive"
