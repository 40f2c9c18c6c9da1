"""Why an attempt ended. The texts of srun were printed by a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitscale_launch.failures import Cause, RankError, explain, read_errors

CRASH_OF_ONE = """\
srun: error: node1: task 1: Exited with exit code 3
srun: launch/slurm: _step_signal: Terminating StepId=1002.2
slurmstepd-node1: error: *** STEP 1002.2 ON node1 CANCELLED AT 2026-11-21T22:41:32 ***
srun: error: node1: task 0: Terminated
srun: Force Terminated StepId=1002.2
"""
KILL_OF_ONE = """\
srun: error: node2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=1002.1
srun: error: node1: task 0: Exited with exit code 75
"""
LOST_NODE = """\
srun: error: Node failure on node2
slurmstepd-node1: error: *** JOB 1003 ON node1 CANCELLED AT 2026-11-21T22:41:46 DUE TO NODE FAILURE, SEE SLURMCTLD LOG
srun: error: node2: task 1: Terminated
srun: error: node1: task 0: Terminated
"""
STOPPED_UNEVENLY = """\
srun: error: node1: task 1: Exited with exit code 75
srun: error: node1: task 0: Terminated
"""
STOPPED_AT_ONCE = "srun: error: node[1-2]: tasks 0-3: User defined signal 2\n"


def error(kind: str = "RuntimeError", message: str = "planted", rank: int = 1, **more: object) -> RankError:
    values = {"host": "node2", "exit_code": 1, "unix_s": 10.0, **more}
    return RankError(rank=rank, kind=kind, message=message, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "errors", "said", "cause", "nodes"),
    [
        (0, [], "", Cause.FINISHED, ()),
        (75, [error("Interrupted", "stopped at step 3 of 9 on SIGTERM; ...", exit_code=75)], "", Cause.STOPPED, ()),
        (75, [], "", Cause.STOPPED, ()),
        (143, [error("Interrupted", "stopped at step 3 of 9 on SIGTERM; ...")], STOPPED_UNEVENLY, Cause.STOPPED, ()),
        (143, [], STOPPED_UNEVENLY, Cause.STOPPED, ()),
        (140, [], STOPPED_AT_ONCE, Cause.STOPPED, ()),
        (143, [error()], CRASH_OF_ONE, Cause.ERROR, ("node2",)),
        (143, [], CRASH_OF_ONE, Cause.ERROR, ()),
        (137, [error("DistBackendError", "closed", is_victim=True)], KILL_OF_ONE, Cause.KILLED, ("node2",)),
        (137, [], "", Cause.KILLED, ()),
        (143, [error("DistBackendError", "closed", is_victim=True)], LOST_NODE, Cause.NODE, ("node2",)),
        (1, [error("DistBackendError", "closed", is_victim=True)], "", Cause.CONTACT, ()),
        (1, [error("TopologyError", "cannot reach")], "", Cause.CONTACT, ("node2",)),
        (2, [error("ConfigError", "optim.lr", exit_code=2)], "", Cause.CONFIGURATION, ("node2",)),
        (2, [], "", Cause.CONFIGURATION, ()),
        (1, [error("OutOfMemoryError", "CUDA out of memory. Tried ...")], "", Cause.MEMORY, ("node2",)),
        (1, [error("RuntimeError", "[enforce fail] cannot allocate memory")], "", Cause.MEMORY, ("node2",)),
        (137, [], "srun: error: node1: task 0: Out Of Memory\n", Cause.MEMORY, ("node1",)),
        (1, [error("CheckpointError", "x: cannot write: No space left on device")], "", Cause.DISK, ("node2",)),
        (1, [error("DivergenceError", "the loss is not finite")], "", Cause.DIVERGED, ("node2",)),
        (1, [error("AcceleratorError", "CUDA error: uncorrectable ECC error")], "", Cause.HARDWARE, ("node2",)),
        (1, [], "", Cause.ERROR, ()),
        (1, [error("Killed", "killed by SIGSEGV")], "", Cause.KILLED, ("node2",)),
    ],
)  # fmt: skip
def test_the_cause_is_found(
    code: int, errors: list[RankError], said: str, cause: Cause, nodes: tuple[str, ...]
) -> None:
    failure = explain(code, errors, said)
    assert (failure.cause, failure.nodes if cause is not Cause.STOPPED else ()) == (cause, nodes)


def test_the_first_error_that_is_nobodys_consequence_is_the_cause() -> None:
    errors = [
        error("DistBackendError", "closed", rank=0, unix_s=9.0, is_victim=True),
        error("ValueError", "second", rank=2, unix_s=11.0),
        error("KeyError", "first", rank=3, unix_s=10.5),
    ]
    assert explain(143, errors, CRASH_OF_ONE).text == "KeyError: first (rank 3 on node2)"


@pytest.mark.parametrize(("said", "signal"), [(STOPPED_AT_ONCE, "SIGUSR2"), (STOPPED_UNEVENLY, None)])
def test_the_signal_is_told(said: str, signal: str | None) -> None:
    assert explain(140, [], said).signal == signal
    told = [error("Interrupted", "stopped before the first step on SIGTERM; there was nothing to save")]
    assert explain(75, told, said).signal == "SIGTERM"


def test_the_signature_forgets_numbers_and_ranks() -> None:
    one = explain(1, [error(message="block 7 at 0x7f00ab", rank=3, host="node9")], "")
    other = explain(1, [error(message="block 12 at 0x7eee00", rank=0)], "")
    assert one.text != other.text
    assert one.signature == other.signature
    assert one.signature != explain(1, [error(message="another")], "").signature


def test_torn_reports_tell_nothing(tmp_path: Path) -> None:
    record = {"rank": 3, "host": "a", "kind": "K", "message": "m", "exit_code": 1, "unix_s": 1.5, "traceback": None}
    (tmp_path / "rank-00003.json").write_text(json.dumps(record))
    (tmp_path / "rank-00004.json").write_text('{"rank": 4')
    (tmp_path / "rank-00005.json").write_text("[]")
    assert read_errors(tmp_path) == [RankError(3, "a", "K", "m", 1, 1.5)]
    assert read_errors(tmp_path / "missing") == []


def test_exit_code_2_of_a_foreign_command_is_an_error_like_any_other() -> None:
    said = "srun: error: node1: task 0: Exited with exit code 2\n"
    assert explain(2, [], said).cause is Cause.CONFIGURATION
    for text in (said, ""):
        assert explain(2, [], text, is_own=False).cause is Cause.ERROR
    # This project's own words for a command that cannot be started.
    own = error("LaunchError", "nosuch cannot be started", exit_code=2)
    assert explain(2, [own], said, is_own=False).cause is Cause.CONFIGURATION
