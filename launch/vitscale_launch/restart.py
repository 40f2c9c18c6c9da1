"""What happens after an attempt: a pure decision, made once.

It never starts a run again for ever: an attempt without a newer checkpoint counts, whatever ended it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from vitscale_launch.attempts import (
    CANCELLED,
    CRASHED,
    FINISHED,
    LOST,
    PREEMPTED,
    TIME_LIMIT,
    UNHEALTHY,
    Attempt,
)
from vitscale_launch.failures import Cause, Failure

# Attempts in a row that left nothing behind, although nothing of ours was wrong: preempted, lost, on a bad node.
MAX_FRUITLESS = 20
MAX_BACKOFF_S = 1800
_COUNTED = (CRASHED, TIME_LIMIT)
# They would come again: nothing changes between two attempts but the nodes and the time.
_HOPELESS = {
    Cause.CONFIGURATION: "mend the configuration and submit again",
    Cause.MEMORY: "lower micro_batch_size, data.workers or data.window, or ask for more memory, and submit again",
    Cause.DISK: "make room or write elsewhere, then resume",
    Cause.DIVERGED: "another attempt would take the same steps; change the recipe and submit again",
}


class Queue(Enum):
    """What SLURM has done with the job so far."""

    RUNNING = "running"
    REQUEUED = "requeued"
    """It has put the job back into the queue by itself."""
    TIMED_OUT = "timed out"
    CANCELLED = "cancelled"


class Action(Enum):
    """What follows."""

    FINISH = "finish"
    REQUEUE = "requeue"
    NEXT_LINK = "next link"
    """The next job of a chain of dependencies goes on."""
    STOP = "stop"


@dataclass(frozen=True)
class Policy:
    """What the site and the submission allow."""

    max_failures: int
    """Attempts in a row that fail without a new checkpoint."""
    requeue: bool
    """Whether jobs may be requeued; else the next job of a chain goes on."""
    backoff_s: int
    """Before the first new start after a failure; doubled with each failure in a row."""
    spare_nodes: int | None = None
    """How many of the nodes that the job could use it can do without; None if nobody knows."""


@dataclass(frozen=True)
class Decision:
    """What follows an attempt, once."""

    action: Action
    reason: str
    """How the attempt ended, in the words of :class:`Attempt`."""
    because: str
    """Why this follows, in a sentence."""
    delay_s: int = 0
    exclude: tuple[str, ...] = ()
    """Every node that the next attempt must leave out."""


def decide(
    failure: Failure,
    current: Attempt,
    earlier: Sequence[Attempt],
    policy: Policy,
    *,
    queue: Queue = Queue.RUNNING,
    cancel_requested: bool = False,
) -> Decision:
    """What follows the attempt that has just ended.

    Args:
        failure: how it ended.
        current: the attempt, with ``ended_step`` and, of an error, ``error`` and ``error_step``.
        earlier: the attempts before it, oldest first, since the run was submitted.
        policy: what is allowed.
        queue: what SLURM has done already.
        cancel_requested: whether the user asked for an end.
    """
    if failure.cause is Cause.FINISHED:
        return Decision(Action.FINISH, FINISHED, "the run is finished")
    if cancel_requested or queue is Queue.CANCELLED:
        return Decision(Action.STOP, CANCELLED, "the user cancelled it")
    reason = _reason(failure, queue)
    if failure.cause in _HOPELESS:
        return Decision(Action.STOP, reason, f"{failure.cause.value}: {_HOPELESS[failure.cause]}")
    without = fruitless([*earlier, current])
    if len(without) >= MAX_FRUITLESS:
        why = f"{len(without)} attempts in a row left no new checkpoint; save more often, then resume"
        return Decision(Action.STOP, reason, why)
    # The current one has no reason yet.
    failures = sum((attempt.reason or reason).startswith(_COUNTED) for attempt in without)
    if not reason.startswith(_COUNTED):
        if failure.cause is not Cause.UNHEALTHY:
            return _again(policy, reason, "nothing was wrong with the run")
        return _without_bad_nodes(failure, current, earlier, policy, reason)
    if reason == TIME_LIMIT:
        if without and failures >= policy.max_failures:
            why = f"{failures} attempts in a row left no new checkpoint; ask for more time, then resume"
            return Decision(Action.STOP, reason, why)
        return _again(policy, reason, "the time limit was reached")
    if failure.cause is Cause.ERROR and _happened_before(current, earlier):
        step = "before the first step" if current.error_step is None else f"after step {current.error_step}"
        return Decision(Action.STOP, reason, f"the same error came twice {step}: mend its cause, then resume")
    if without and failures >= policy.max_failures:
        why = f"{failures} attempts in a row failed without a new checkpoint; mend the cause, then resume"
        return Decision(Action.STOP, reason, why)
    exclude = _excluded(failure, earlier, policy)
    delay = min(MAX_BACKOFF_S, policy.backoff_s * 2 ** max(0, failures - 1))
    why = f"tried again after {delay} s" + (f" without {', '.join(exclude)}" if exclude else "")
    return _again(policy, reason, why, delay_s=delay, exclude=exclude)


def excluded_so_far(earlier: Sequence[Attempt]) -> tuple[str, ...]:
    """Nodes that are left out already."""
    return earlier[-1].excluded if earlier else ()


def _again(policy: Policy, reason: str, why: str, *, delay_s: int = 0, exclude: tuple[str, ...] = ()) -> Decision:
    if not policy.requeue:
        return Decision(Action.NEXT_LINK, reason, f"{why}; the next job of the chain goes on")
    return Decision(Action.REQUEUE, reason, why, delay_s, exclude)


def _reason(failure: Failure, queue: Queue) -> str:
    if failure.cause is Cause.UNHEALTHY:
        return UNHEALTHY + failure.text
    if failure.cause is Cause.NODE:
        return LOST + failure.text
    if queue is Queue.TIMED_OUT or (failure.cause is Cause.STOPPED and failure.signal == "SIGUSR2"):
        return TIME_LIMIT
    # SLURM takes back only what it preempts, what lost a node, and what an administrator requeues.
    if failure.cause is Cause.STOPPED or queue is Queue.REQUEUED:
        return PREEMPTED
    return CRASHED + failure.text


def fruitless(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The attempts since the last one that left a newer checkpoint, newest first."""
    rows: list[Attempt] = []
    for attempt in reversed(attempts):
        if attempt.made_progress:
            break
        rows.append(attempt)
    return rows


def _happened_before(current: Attempt, earlier: Sequence[Attempt]) -> bool:
    return any(
        attempt.error is not None and (attempt.error, attempt.error_step) == (current.error, current.error_step)
        for attempt in earlier
    )


def _excluded(failure: Failure, earlier: Sequence[Attempt], policy: Policy) -> tuple[str, ...]:
    """Every node to leave out: a device failed there, or it was named by two failures in a row."""
    named = set(failure.nodes) if failure.cause is Cause.HARDWARE else set()
    if failure.cause is Cause.KILLED and earlier and (earlier[-1].reason or "").startswith(CRASHED):
        reason = earlier[-1].reason or ""
        named |= {node for node in failure.nodes if re.search(rf"\bon {re.escape(node)}(?![\w.-])", reason)}
    before = excluded_so_far(earlier)
    added = sorted(named - set(before))
    if policy.spare_nodes is not None and len(before) + len(added) > policy.spare_nodes:
        added = added[: max(0, policy.spare_nodes - len(before))]
    return (*before, *added)


def _without_bad_nodes(
    failure: Failure, current: Attempt, earlier: Sequence[Attempt], policy: Policy, reason: str
) -> Decision:
    before = excluded_so_far(earlier)
    exclude = (*before, *sorted(set(failure.nodes) - set(before)))
    if policy.spare_nodes is not None and len(exclude) > policy.spare_nodes:
        why = "too few nodes are left without the bad ones; have them mended, or ask for fewer nodes"
        return Decision(Action.STOP, reason, why)
    return _again(policy, reason, f"tried again without {', '.join(exclude)}", exclude=exclude)
