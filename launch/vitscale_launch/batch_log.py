"""What srun and SLURM say about an attempt: it lies in the log of the batch script, behind that of earlier attempts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vitscale_launch.submission import Submission

PREEMPTION, TIMEOUT, NODE_FAILURE = "DUE TO PREEMPTION", "DUE TO TIME LIMIT", "DUE TO NODE FAILURE"
MAX_BYTES = 1 << 20


def batch_log(submission: Submission, environment: Mapping[str, str]) -> Path | None:
    """The log that srun's messages go to; None outside of SLURM."""
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return submission.logs / f"{job}_0_log.err"


def size_of(log: Path | None) -> int:
    """Bytes of the log; 0 if there is none."""
    try:
        return 0 if log is None else log.stat().st_size
    except OSError:
        return 0


def read_from(log: Path | None, offset: int) -> str:
    """What was written since; at most the last megabyte of it."""
    try:
        if log is None:
            return ""
        with log.open("rb") as file:
            file.seek(max(offset, size_of(log) - MAX_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def read_end(log: Path | None, num_bytes: int = 4096) -> str:
    """The last that was written."""
    return read_from(log, max(0, size_of(log) - num_bytes))
