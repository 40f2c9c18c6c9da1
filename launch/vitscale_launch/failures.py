"""Why an attempt ended: from what its ranks wrote, from what srun printed, and from the exit code, in this order."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vitscale.errors import Interrupted

STOPPED_ON_REQUEST = Interrupted.exit_code
CONFIGURATION_IS_WRONG = 2
# What torch, CUDA and the kernel say, in small letters.
_MEMORY = ("out of memory", "cannot allocate memory")
_DISK = ("no space left on device", "disk quota exceeded", "read-only file system")
_HARDWARE = (
    "uncorrectable ecc",
    "fallen off the bus",
    "nvlink",
    "driver initialization failed",
    "busy or unavailable",
    "no cuda-capable device",
    "no cuda gpus are available",
)
_TASK = re.compile(r"^srun: error: (?P<nodes>\S+): tasks? (?P<tasks>[\d,\-\[\]]+): (?P<status>.+?)\s*$", re.MULTILINE)
_NODE = re.compile(r"^srun: error: Node failure on (?P<nodes>\S+)", re.MULTILINE)
# How srun calls the end by a signal that asks to stop. After a failure it sends the first one to the other tasks.
_ASKED = {"Terminated": "SIGTERM", "User defined signal 2": "SIGUSR2"}
_EXIT = re.compile(r"Exited with exit code (\d+)")


class Cause(Enum):
    """Kinds of ends that are treated differently."""

    FINISHED = "finished"
    STOPPED = "stopped on request"
    CONFIGURATION = "the configuration is wrong"
    MEMORY = "out of memory"
    DISK = "the disk is full"
    DIVERGED = "training diverged"
    HARDWARE = "a device failed"
    NODE = "a node failed"
    UNHEALTHY = "a node failed its health check"
    KILLED = "a rank was killed"
    ERROR = "an error"
    CONTACT = "ranks lost contact"


@dataclass(frozen=True)
class RankError:
    """What a rank wrote when it failed."""

    rank: int
    host: str
    kind: str
    """Name of the exception's class."""
    message: str
    exit_code: int
    unix_s: float
    is_victim: bool = False
    """Whether another rank's end made it fail."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended."""

    cause: Cause
    text: str
    """One line for a person."""
    nodes: tuple[str, ...] = ()
    """The nodes where it happened, as SLURM calls them."""
    signal: str | None = None
    """The signal that asked to stop."""

    @property
    def signature(self) -> str:
        """The text without what differs between two failures of the same kind: numbers, addresses, the rest of it."""
        return re.sub(r"0x[0-9a-f]+|\d+", "#", f"{self.cause.value}: {self.text.partition(' (rank')[0]}")[:500]


def read_errors(folder: Path) -> list[RankError]:
    """What the ranks of an attempt wrote. Torn files of killed ranks tell nothing."""
    try:
        paths = sorted(folder.glob("rank-*.json"))
    except OSError:
        return []  # what srun said is left
    return [error for path in paths if (error := _read_error(path)) is not None]


def explain(exit_code: int, errors: Sequence[RankError], said: str, *, is_own: bool = True) -> Failure:
    """Why an attempt ended.

    Args:
        exit_code: srun's. It is that of any rank, also of one that was stopped because another had failed.
        errors: of the ranks.
        said: what srun and SLURM printed meanwhile.
        is_own: whether the command is this project's, whose exit code 2 means that the configuration is wrong. To
            others it is an error like any other.
    """
    if exit_code == 0:
        return Failure(Cause.FINISHED, "finished")
    tasks = list(_tasks(said))
    if starved := [nodes for nodes, _, status in tasks if status == "Out Of Memory"]:
        return Failure(Cause.MEMORY, f"SLURM killed a rank on {starved[0]} for want of memory", (starved[0],))
    own = sorted((e for e in errors if not e.is_victim and e.kind != "Interrupted"), key=lambda e: (e.unix_s, e.rank))
    if own:
        return _of_error(own[0])
    if lost := _NODE.search(said):
        return Failure(Cause.NODE, f"node failure on {lost['nodes']}", tuple(lost["nodes"].split(",")))
    for nodes, numbers, status in tasks:
        if (failure := _of_status(nodes, numbers, status, is_own=is_own)) is not None:
            return failure
    interrupted = [error for error in errors if error.kind == "Interrupted"]
    left_in_order = any(status.startswith(f"Exited with exit code {STOPPED_ON_REQUEST}") for _, _, status in tasks)
    if interrupted or left_in_order or exit_code == STOPPED_ON_REQUEST:
        named = re.search(r"\bon (SIG[A-Z0-9]+)", interrupted[0].message) if interrupted else None
        return Failure(Cause.STOPPED, "stopped on request", signal=named[1] if named else None)
    if errors:
        first = min(errors, key=lambda error: (error.unix_s, error.rank))
        return Failure(Cause.CONTACT, f"ranks lost contact: {_line(first.message)} (rank {first.rank} on {first.host})")
    asked = [name for _, _, status in tasks for words, name in _ASKED.items() if status.startswith(words)]
    if asked:
        # A command that saves nothing, or one that had not begun to listen.
        return Failure(Cause.STOPPED, "stopped on request", signal=asked[0])
    return _of_code(exit_code, is_own=is_own)


def _of_error(error: RankError) -> Failure:
    text = f"{error.kind}: {_line(error.message)} (rank {error.rank} on {error.host})"
    lower = error.message.lower()
    cause = Cause.ERROR
    if error.kind == "DivergenceError":
        cause = Cause.DIVERGED
    elif error.kind in ("OutOfMemoryError", "MemoryError") or any(words in lower for words in _MEMORY):
        cause = Cause.MEMORY
    elif any(words in lower for words in _DISK):
        cause = Cause.DISK
    elif any(words in lower for words in _HARDWARE):
        cause = Cause.HARDWARE
    elif error.exit_code == CONFIGURATION_IS_WRONG:
        cause = Cause.CONFIGURATION
    elif error.kind in ("Killed", "TopologyError"):
        cause = Cause.KILLED if error.kind == "Killed" else Cause.CONTACT
    return Failure(cause, text, (error.host,))


def _of_status(nodes: str, tasks: str, status: str, *, is_own: bool) -> Failure | None:
    """The failure that a line of srun tells of; None for a task that was only stopped."""
    where = f"task {tasks} on {nodes}"
    if code := _EXIT.match(status):
        number = int(code[1])
        if number in (0, STOPPED_ON_REQUEST):
            return None
        cause = Cause.CONFIGURATION if is_own and number == CONFIGURATION_IS_WRONG else Cause.ERROR
        return Failure(cause, f"{where} left with exit code {number}")
    if status.startswith(tuple(_ASKED)):
        return None
    # The list may be compact; then it is several nodes, and no single one is to blame.
    return Failure(Cause.KILLED, f"{where}: {status}", () if re.search(r"[\[,]", nodes) else (nodes,))


def _of_code(exit_code: int, *, is_own: bool) -> Failure:
    if is_own and exit_code == CONFIGURATION_IS_WRONG:
        return Failure(Cause.CONFIGURATION, "left with exit code 2, the configuration is wrong")
    if exit_code > 128:
        try:
            name = signal.Signals(exit_code - 128).name
        except ValueError:
            name = f"signal {exit_code - 128}"
        return Failure(Cause.KILLED, f"killed by {name}")
    return Failure(Cause.ERROR, f"left with exit code {exit_code}")


def _tasks(said: str) -> Iterator[tuple[str, str, str]]:
    """Node, task and status of the tasks that srun calls failed, in its order."""
    for match in _TASK.finditer(said):
        yield match["nodes"], match["tasks"], match["status"]


def _line(message: str) -> str:
    return " ".join(message.split())[:300]


def _read_error(path: Path) -> RankError | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return RankError(
            rank=int(record["rank"]),
            host=str(record["host"]),
            kind=str(record["kind"]),
            message=str(record["message"]),
            exit_code=int(record["exit_code"]),
            unix_s=float(record["unix_s"]),
            is_victim=bool(record.get("is_victim", False)),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
