"""Who am I among the ranks: plain data, from what torchrun or srun put into the environment. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from vitscale.errors import TopologyError


@dataclass(frozen=True)
class Topology:
    """The place of this process in the job, and where rank 0 listens."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise TopologyError(
                f"rank must be at least 0 and less than world size ({self.world_size}), but is {self.rank}; "
                f"check RANK and WORLD_SIZE, or start the ranks with --nproc, torchrun or srun"
            )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Topology:
        """Read torchrun's variables, else those of a task started by srun, else be a single process.

        Raises:
            TopologyError: variables are missing or are not numbers.
        """
        if "RANK" in environment or "WORLD_SIZE" in environment:
            return cls(
                rank=_number(environment, "RANK"),
                world_size=_number(environment, "WORLD_SIZE"),
                local_rank=_number(environment, "LOCAL_RANK"),
                node=_number(environment, "GROUP_RANK", default=0),
                master_addr=_text(environment, "MASTER_ADDR"),
                master_port=_number(environment, "MASTER_PORT"),
            )
        # Only srun sets this one: a batch script or an salloc shell is a single process, not a rank of many.
        if "SLURM_STEP_NUM_TASKS" in environment:
            return cls._from_slurm(environment)
        return cls()

    @classmethod
    def _from_slurm(cls, environment: Mapping[str, str]) -> Topology:
        job = _number(environment, "SLURM_JOB_ID")
        step = _number(environment, "SLURM_STEP_ID")
        first_host = first_of_nodelist(_text(environment, "SLURM_STEP_NODELIST"))
        alone = _number(environment, "SLURM_STEP_NUM_NODES", default=1) == 1
        return cls(
            rank=_number(environment, "SLURM_PROCID"),
            world_size=_number(environment, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(environment, "SLURM_LOCALID"),
            node=_number(environment, "SLURM_NODEID"),
            master_addr=environment.get("MASTER_ADDR", "127.0.0.1" if alone else first_host),
            # The same on every task without talking, another one for each step; below the ephemeral range.
            master_port=_number(environment, "MASTER_PORT", default=20_000 + (job * 31 + step) % 12_000),
        )


def first_of_nodelist(nodelist: str) -> str:
    """First host of SLURM's compact notation, such as ``gpu[003-010,012],cpu1``."""
    # Each bracket gives way to the first of its numbers.
    host = re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", nodelist).split(",")[0].strip()
    if not host or "[" in host:
        raise TopologyError(f"SLURM_STEP_NODELIST {nodelist!r} names no host; set MASTER_ADDR to rank 0's host")
    return host


def _text(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise TopologyError(f"{name} is not set; start the ranks with --nproc, torchrun or srun, which set it")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environment:
        return default
    text = _text(environment, name)
    if not text.isdecimal():
        raise TopologyError(f"{name} is {text!r}; a whole number is needed, as --nproc, torchrun or srun set it")
    return int(text)
