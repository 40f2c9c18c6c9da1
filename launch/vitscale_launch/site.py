"""A cluster's own facts: partition, hardware of a node, environment, restarts. Read from a YAML file, never coded.

Own design; the words are those of ``sbatch``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vitscale.config.loader import load_section
from vitscale.config.section import section
from vitscale.errors import LaunchError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Scalar = str | int | bool

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# The keys of Site that become these options; naming them twice would contradict.
_OWN_OPTIONS = {
    "account", "array", "constraint", "cpus-per-task", "dependency", "error", "exclude", "exclusive", "export",
    "gpus-per-node", "job-name", "mem", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "partition",
    "qos", "requeue", "no-requeue", "reservation", "signal", "time",
}  # fmt: skip


@section
class Site:
    """What jobs on one cluster need. `vitscale launch site init` writes one, `vitscale launch site check` tries it."""

    partition: str | None = None
    """Partition of the jobs; null for the cluster's default."""
    account: str | None = None
    """Account that pays, where the cluster asks for one."""
    qos: str | None = None
    """Quality of service, where the cluster asks for one."""
    constraint: str | None = None
    """Features that nodes must have, as in sbatch --constraint."""
    reservation: str | None = None
    """Reservation to run in."""
    exclude: tuple[str, ...] = ()
    """Nodes that no job of yours shall use."""
    time_limit_minutes: Positive = 60
    """Length of one attempt. A run takes as many attempts as it needs."""
    gpus_per_node: NonNegative = 0
    """GPUs asked for on each node; 0 trains on CPUs."""
    gpu_type: str | None = None
    """Kind of GPU, as in sbatch --gpus-per-node=KIND:8; null for any."""
    cpus_per_node: Positive | None = None
    """CPUs asked for on each node, shared evenly by its tasks; null for one per task."""
    memory_mb: NonNegative | None = None
    """Memory asked for on each node, in MiB; 0 for all of it, null for the cluster's default."""
    exclusive: bool = False
    """Ask for whole nodes that nobody else's jobs use."""
    ranks_per_node: Positive | None = None
    """Ranks on each node; null for one per GPU, or a single one without GPUs."""
    tasks_per_node: Literal["gpu", "node"] = "gpu"
    """What srun starts: a task for each rank ("gpu"), or one for each node that starts the node's ranks ("node")."""
    signal_delay_s: Positive = 120
    """Seconds before the time limit at which the job is told to save and leave. Must cover a step and a save; SLURM
    may send the signal up to 60 s early."""
    requeue: bool = True
    """Whether jobs may be put back into the queue. Where they may not, submit chains jobs with --chain."""
    backoff_s: Positive = 60
    """Seconds before a job that has crashed starts again; doubled with each crash in a row."""
    modules: tuple[str, ...] = ()
    """Environment modules that are loaded first."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run in the batch script before the ranks start."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the ranks."""
    container: tuple[str, ...] = ()
    """Command in front of Python on the ranks: [apptainer, exec, --nv, /images/vitscale.sif]. The batch script itself
    runs outside of it."""
    container_python: str = "python3"
    """Python inside of the container."""
    network_interface: str | None = None
    """Network interface through which ranks of several nodes talk (ib0, eth0); null leaves the choice to NCCL."""
    rendezvous: Literal["auto", "name", "address"] = "auto"
    """Where rank 0 is found, if no network_interface is given: by the name of its node, by the address that SLURM knows
    (NodeAddr), or by the name where that resolves and by the address elsewhere (auto)."""
    scratch: Path | None = None
    """Folder on the node's own disk, for caches of compiled kernels; null for the node's /tmp."""
    health_check: bool = False
    """Check every node before each attempt, and leave bad ones out of the next."""
    health_command: str | None = None
    """A check of your own, run by the shell on each node; an exit status other than 0 makes the node a bad one."""
    health_timeout_s: Positive = 180
    """Seconds that the check of a node may take."""
    sbatch: dict[str, Scalar] = field(default_factory=dict)
    """More options of sbatch by their long names: {mail-type: END, comment: ...}."""

    def __post_init__(self) -> None:
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ValueError(f"gpu_type ({self.gpu_type}) needs gpus_per_node; give it, or leave gpu_type out")
        if self.gpus_per_node and self.ranks_per_node is not None and self.ranks_per_node > self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node ({self.ranks_per_node}) must be at most gpus_per_node ({self.gpus_per_node}): "
                f"each rank has a GPU of its own"
            )
        if self.cpus_per_node is not None and self.cpus_per_node < self.ranks_on_node:
            raise ValueError(
                f"cpus_per_node ({self.cpus_per_node}) must be at least the ranks of a node ({self.ranks_on_node})"
            )
        if self.signal_delay_s >= self.time_limit_minutes * 60:
            raise ValueError(
                f"signal_delay_s ({self.signal_delay_s}) must be shorter than time_limit_minutes "
                f"({self.time_limit_minutes}, {self.time_limit_minutes * 60} s)"
            )
        if self.scratch is not None and not self.scratch.is_absolute():
            raise ValueError(f"scratch ({self.scratch}) must be an absolute path")
        for name, value in self.environment.items():
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"environment: {name!r} is no name of a variable; write letters, digits and _")
            if "\0" in value:
                raise ValueError(f"environment: {name}: the value holds a character that no variable can hold")
        for name in self.sbatch:
            if name in _OWN_OPTIONS or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise ValueError(
                    f"sbatch: {name!r} cannot be given here; use the site's or the command line's own key for it, or "
                    f"the option's long name without dashes in front"
                )

        for line in (*self.setup, *self.modules):
            if "\n" in line.strip():
                raise ValueError(f"setup and modules: {line!r} holds a line break; write one line for each")

    @property
    def ranks_on_node(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def tasks_on_node(self) -> int:
        """Tasks that srun starts on each node."""
        return 1 if self.tasks_per_node == "node" else self.ranks_on_node

    @property
    def cpus_per_task(self) -> int:
        """CPUs of each task."""
        return (self.cpus_per_node or self.ranks_on_node) // self.tasks_on_node

    @property
    def selection(self) -> dict[str, str]:
        """Which nodes a job may get: options of sbatch and srun by their long names."""
        options = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "reservation": self.reservation,
            "exclude": ",".join(self.exclude) or None,
        }
        return {name: value for name, value in options.items() if value is not None}

    def gpus_option(self, count: int) -> dict[str, str]:
        """The option of sbatch and srun that asks for GPUs on each node; none where the site has none."""
        kind = f"{self.gpu_type}:" if self.gpu_type else ""
        return {"gpus-per-node": f"{kind}{count}"} if self.gpus_per_node else {}


def load_site(name_or_path: str, changes: Sequence[str] = ()) -> Site:
    """Read a site's profile.

    Args:
        name_or_path: path of a YAML file, or the name of a profile in one of the :func:`site_folders`.
        changes: changed keys, ``key=value``.

    Raises:
        LaunchError: there is no profile of that name.
        ConfigError: with every mistake in the file.
    """
    return load_section(Site, find_site(name_or_path), changes)


def find_site(name_or_path: str) -> Path:
    """The file of a profile.

    Raises:
        LaunchError: there is none of that name.
    """
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        return Path(name_or_path)
    for folder in site_folders():
        if (path := folder / f"{name_or_path}.yaml").exists():
            return path
    known = ", ".join(sorted(set(_known_sites()))) or "none"
    raise LaunchError(
        f"--site {name_or_path}: no such profile; allowed are the path of a YAML file and the names {known}; "
        f"write one for this cluster with: vitscale launch site init {name_or_path}"
    )


def site_folders() -> list[Path]:
    """Where profiles are looked for by name: $VITSCALE_SITES, the user's folder, then those that come along."""
    named = os.environ.get("VITSCALE_SITES")
    here = Path(__file__).parent
    # In a wheel the profiles lie inside of the package, in a checkout beside it.
    return [*([Path(named)] if named else []), user_sites(), here / "sites", here.parent / "sites"]


def user_sites() -> Path:
    """The user's own folder of profiles."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "vitscale" / "sites"


def _known_sites() -> Iterator[str]:
    for folder in site_folders():
        if folder.is_dir():
            yield from (path.stem for path in folder.glob("*.yaml"))
