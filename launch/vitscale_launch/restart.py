"""What happens after an attempt: a decision, made once.

It never starts a run again for ever: an attempt without a newer checkpoint counts, whatever ended it. Of a command that
leaves no checkpoints, only preemptions do not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    spare_nodes: Callable[[], int | None] = lambda: None
    """How many of the nodes that the job could use it can do without; None if nobody knows. Asked only where a node is
    to be left out: the answer takes time, and there is little of it."""
    next_link: bool = True
    """Whether a later job of the chain waits, where jobs may not be requeued."""
    leaves_checkpoints: bool = True
    """Whether the command's progress is seen by its checkpoints: not that of an array's."""

    @property
    def counted(self) -> tuple[str, ...]:
        """How the reasons of attempts begin that count as failures."""
        return (CRASHED, TIME_LIMIT) if self.leaves_checkpoints else (CRASHED,)


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
    without = fruitless([*earlier, replace(current, reason=reason)], policy)
    if (why := worn_out(without, policy)) is not None:
        return Decision(Action.STOP, reason, why)
    failures = _count(without, policy.counted)
    if failure.cause is Cause.UNHEALTHY:
        return _without_bad_nodes(failure, without, earlier, policy, reason)
    if reason == TIME_LIMIT:
        if failures >= policy.max_failures:
            why = f"{failures} attempts in a row left no new checkpoint; ask for more time, then resume"
            return Decision(Action.STOP, reason, why)
        return _again(policy, reason, "the time limit was reached")
    if not reason.startswith(policy.counted):
        return _again(policy, reason, "nothing was wrong with the run")
    if failure.cause is Cause.ERROR and _happened_before(current, earlier):
        step = " before the first step" if current.error_step is None else f" after step {current.error_step}"
        where = step if policy.leaves_checkpoints else ""
        return Decision(Action.STOP, reason, f"the same error came twice{where}: mend its cause, then resume")
    if without and failures >= policy.max_failures:
        told = "in a row failed without a new checkpoint" if policy.leaves_checkpoints else "failed"
        return Decision(Action.STOP, reason, f"{failures} attempts {told}; mend the cause, then resume")
    exclude = _excluded(failure, earlier, policy)
    delay = delay_after(failures, policy)
    why = f"tried again after {delay} s" + (f" without {', '.join(exclude)}" if exclude else "")
    return _again(policy, reason, why, delay_s=delay, exclude=exclude)


def excluded_so_far(earlier: Sequence[Attempt]) -> tuple[str, ...]:
    """Nodes that are left out already."""
    return earlier[-1].excluded if earlier else ()


def _again(policy: Policy, reason: str, why: str, *, delay_s: int = 0, exclude: tuple[str, ...] = ()) -> Decision:
    if policy.requeue:
        return Decision(Action.REQUEUE, reason, why, delay_s, exclude)
    then = "the next job of the chain goes on"
    if not policy.next_link:
        then = "this site requeues nothing, and no later job of a chain is known: go on with vitscale launch resume"
    return Decision(Action.NEXT_LINK, reason, f"{why}; {then}", delay_s, exclude)


def delay_after(failures: int, policy: Policy) -> int:
    """Seconds before the next start, after so many failures in a row."""
    return min(MAX_BACKOFF_S, policy.backoff_s << max(0, failures - 1))


def _count(attempts: Sequence[Attempt], beginnings: tuple[str, ...] | str) -> int:
    return sum((attempt.reason or "").startswith(beginnings) for attempt in attempts)


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


def fruitless(attempts: Sequence[Attempt], policy: Policy) -> list[Attempt]:
    """The attempts since the last one that left a newer checkpoint, newest first; where there are no checkpoints, all
    that were not preempted."""
    if not policy.leaves_checkpoints:
        return [attempt for attempt in reversed(attempts) if attempt.reason != PREEMPTED]
    rows: list[Attempt] = []
    for attempt in reversed(attempts):
        if attempt.made_progress:
            break
        rows.append(attempt)
    return rows


def worn_out(without: Sequence[Attempt], policy: Policy) -> str | None:
    """Why there were enough attempts, whatever ended them; None if there were not.

    Args:
        without: the :func:`fruitless` ones.
        policy: what is allowed.
    """
    if len(without) < MAX_FRUITLESS:
        return None
    if policy.leaves_checkpoints:
        return f"{len(without)} attempts in a row left no new checkpoint; save more often, then resume"
    return f"{len(without)} attempts were not enough; give each more time or less to do, then resume"


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
    spare = policy.spare_nodes() if added else None
    if spare is not None and len(before) + len(added) > spare:
        added = added[: max(0, spare - len(before))]
    return (*before, *added)


def _without_bad_nodes(
    failure: Failure, without: Sequence[Attempt], earlier: Sequence[Attempt], policy: Policy, reason: str
) -> Decision:
    before = excluded_so_far(earlier)
    if not failure.nodes:
        return _all_alike(_count(without, UNHEALTHY), before, policy, reason)
    exclude = (*before, *sorted(set(failure.nodes) - set(before)))
    spare = policy.spare_nodes()
    if spare is not None and len(exclude) > spare:
        why = "too few nodes are left without the bad ones; have them mended, or ask for fewer nodes"
        return Decision(Action.STOP, reason, why)
    return _again(policy, reason, f"tried again without {', '.join(exclude)}", exclude=exclude)


def _all_alike(failures: int, before: tuple[str, ...], policy: Policy, reason: str) -> Decision:
    """No node is to blame: what they share is."""
    told = "all nodes failed their health check"
    if failures >= policy.max_failures:
        why = f"{told}, {failures} times; mend what they share (network, disk, health_command), then resume"
        return Decision(Action.STOP, reason, why)
    delay = delay_after(failures, policy)
    why = f"{told}, so that none is left out; tried again after {delay} s"
    return _again(policy, reason, why, delay_s=delay, exclude=before)
