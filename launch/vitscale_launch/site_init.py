"""Drafts a site profile from what SLURM reports. Asks nothing; what it could not find out, it says."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitscale.config.document import plain_scalar
from vitscale.config.loader import parse_section
from vitscale.errors import LaunchError
from vitscale_launch import slurm
from vitscale_launch.capacity import choose_partition, gpus_of
from vitscale_launch.environment import resolves
from vitscale_launch.site import Site
from vitscale_launch.slurm import SlurmNode, SlurmPartition

LONGEST_ATTEMPT_MINUTES = 24 * 60


@dataclass
class Draft:
    """The lines of a profile, and what is left to the user."""

    lines: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def add(self, key: str, value: str | int | bool, remark: str) -> None:
        """Note a key that was found out."""
        # JSON is YAML, and quotes what would not stay text.
        plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.-]*", value) and plain_scalar(value) == value
        self.lines.append(f"{key}: {value if plain else json.dumps(value)}  # {remark}")

    def text(self) -> str:
        """The YAML file."""
        head = ["# Written from what SLURM reports. All keys: vitscale launch site keys", ""]
        tail = ["", "# Not told by SLURM; fill in what your cluster needs:", *(f"# {line}" for line in self.unknown)]
        return "\n".join([*head, *self.lines, *(tail if self.unknown else [])]) + "\n"


def draft_site(partition: str | None = None) -> Draft:
    """Ask SLURM and write down what it says.

    Args:
        partition: of the jobs; the cluster's default if it is None.

    Raises:
        LaunchError: SLURM does not answer, or has no such partition.
    """
    draft = draft_from(slurm.partitions(), slurm.nodes(), slurm.config(), os.environ, partition)
    # What is written must load.
    parse_section(Site, draft.text(), "draft")
    return draft


def draft_from(
    partitions: Sequence[SlurmPartition],
    nodes: Sequence[SlurmNode],
    config: Mapping[str, str],
    environment: Mapping[str, str],
    partition: str | None = None,
) -> Draft:
    """The same, from what SLURM said.

    Raises:
        LaunchError: there is no such partition, or it has no nodes.
    """
    draft = Draft()
    chosen = choose_partition(Site(partition=partition), partitions)
    members = [node for node in nodes if chosen.name in node.partitions]
    if not members:
        raise LaunchError(f"partition: {chosen.name} has no nodes; choose another with --partition")
    _add_partition(draft, chosen, partitions, nodes)
    _add_hardware(draft, members, config)
    _add_time(draft, chosen)
    _add_restarts(draft, chosen, config)
    _add_network(draft, members)
    _add_rest(draft, config, environment)
    return draft


def write_draft(draft: Draft, path: Path, *, force: bool) -> None:
    """Put the profile into a file.

    Raises:
        LaunchError: there is one already, or it cannot be written.
    """
    if path.exists() and not force:
        raise LaunchError(f"{path}: exists already; replace it with --force, or choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(draft.text(), encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"{path}: cannot be written: {error.strerror}; choose another path") from error


def _add_partition(
    draft: Draft, chosen: SlurmPartition, partitions: Sequence[SlurmPartition], nodes: Sequence[SlurmNode]
) -> None:
    others = [other.name for other in partitions if other.name != chosen.name]
    draft.add("partition", chosen.name, f"{chosen.nodes} nodes; others: {', '.join(others) or 'none'}")
    with_gpus = {name for node in nodes if gpus_of(node) for name in node.partitions}
    if with_gpus and chosen.name not in with_gpus:
        draft.unknown.append(f"partition: this one has no GPUs; with GPUs: {', '.join(sorted(with_gpus))}")


def _add_hardware(draft: Draft, members: Sequence[SlurmNode], config: Mapping[str, str]) -> None:
    shapes = Counter((gpus_of(node), _gpu_type(node)) for node in members)
    # On a tie, the larger nodes.
    (gpus, kind), count = max(shapes.items(), key=lambda item: (item[1], item[0][0]))
    alike = [node for node in members if (gpus_of(node), _gpu_type(node)) == (gpus, kind)]
    draft.add("gpus_per_node", gpus, f"{count} of {len(members)} nodes of the partition")
    if gpus and kind:
        draft.add("gpu_type", kind, "as SLURM names it")
    cpus = min(node.cpus for node in alike)
    draft.add("cpus_per_node", cpus, "all CPUs of the smallest of these nodes; lower it to share nodes")
    if not gpus:
        draft.add("ranks_per_node", 1, "each rank takes cpus_per_node / ranks_per_node CPUs")
    if "MEMORY" in config.get("SelectTypeParameters", "").upper():
        draft.add("memory_mb", 0, f"all of a node's memory ({min(node.memory_mb for node in alike)} MiB or more)")
    if features := sorted({name for node in alike for name in node.features}):
        draft.unknown.append(f"constraint: features of these nodes are {', '.join(features)}")


def _gpu_type(node: SlurmNode) -> str | None:
    first = next((part for part in node.gres.split(",") if part.startswith("gpu:")), "")
    words = first.partition("(")[0].split(":")
    return words[1] if len(words) == 3 else None


def _add_time(draft: Draft, chosen: SlurmPartition) -> None:
    longest = None if chosen.max_time_s is None else chosen.max_time_s // 60
    minutes = min(LONGEST_ATTEMPT_MINUTES, longest or LONGEST_ATTEMPT_MINUTES)
    told = "has no limit" if longest is None else f"allows {longest}"
    draft.add("time_limit_minutes", minutes, f"of one attempt; the partition {told}")
    delay_s = min(120, 60 * minutes // 4)
    draft.add("signal_delay_s", delay_s, "must cover a step and a save; submit compares it with earlier attempts")


def _add_restarts(draft: Draft, chosen: SlurmPartition, config: Mapping[str, str]) -> None:
    default = config.get("JobRequeue", "not told")
    draft.add("requeue", True, f"JobRequeue={default}; set it to false where jobs may not be requeued")
    if chosen.preempt_mode not in ("OFF", ""):
        draft.lines.append(
            f"# Jobs of this partition may be preempted ({chosen.preempt_mode}); they have {chosen.grace_s} s to save."
        )


def _add_network(draft: Draft, members: Sequence[SlurmNode]) -> None:
    first = members[0]
    if not resolves(first.name) and resolves(first.address):
        draft.add("rendezvous", "address", f"the name {first.name} does not resolve here, {first.address} does")
    draft.unknown.append("network_interface: the fast one between nodes; see: srun -N1 ip -brief address")


def _add_rest(draft: Draft, config: Mapping[str, str], environment: Mapping[str, str]) -> None:
    account = environment.get("SBATCH_ACCOUNT") or environment.get("SLURM_ACCOUNT")
    enforced = config.get("AccountingStorageEnforce", "none")
    if account:
        draft.add("account", account, "from SBATCH_ACCOUNT or SLURM_ACCOUNT")
    elif enforced.lower() not in ("none", ""):
        draft.unknown.append(f"account: jobs are charged ({enforced}); yours: sacctmgr show user $USER withassoc")
    if (scratch := config.get("TmpFS", "/tmp")) not in ("/tmp", "") and scratch.startswith("/"):
        draft.unknown.append(f"scratch: {scratch} is what SLURM calls temporary storage (TmpFS)")
    loaded = environment.get("LOADEDMODULES", "")
    if loaded:
        draft.unknown.append(f"modules: loaded here are [{', '.join(loaded.split(':'))}]")
    draft.unknown.append("container: [apptainer, exec, --nv, IMAGE], if vitscale is in an image")
