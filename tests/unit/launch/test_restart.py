"""What follows an attempt: a table, and what holds for every history."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale_launch.attempts import Attempt
from vitscale_launch.failures import Cause, Failure
from vitscale_launch.restart import MAX_BACKOFF_S, MAX_FRUITLESS, Action, Decision, Policy, Queue, decide, fruitless

POLICY = Policy(max_failures=3, requeue=True, backoff_s=60)
BLANK = Attempt(number=1, job="7", restart=0, nodes="a,b", ranks=4, started_unix_s=0, started_step=4, ended_step=4)
GOOD = dataclasses.replace(BLANK, ended_step=9, reason="preempted")
CRASH = Failure(Cause.ERROR, "RuntimeError: planted (rank 1 on b)", ("b",))
HOPELESS = [Cause.CONFIGURATION, Cause.MEMORY, Cause.DISK, Cause.DIVERGED]


def crashed(number: int = 1, error: str = "x", step: int | None = 5, **more: object) -> Attempt:
    values = {"number": number, "reason": f"crashed: {error}", "error": error, "error_step": step, **more}
    return dataclasses.replace(BLANK, **values)  # type: ignore[arg-type]


def after(failure: Failure, earlier: list[Attempt] | None = None, **more: object) -> Decision:
    current = dataclasses.replace(BLANK, number=9, error=failure.signature, error_step=7)
    options = {"policy": POLICY, **more}
    return decide(failure, current, earlier or [], **options)  # type: ignore[arg-type]


def test_a_finished_run_is_finished_whatever_else_was_asked() -> None:
    decision = after(Failure(Cause.FINISHED, "finished"), queue=Queue.CANCELLED, cancel_requested=True)
    assert (decision.action, decision.reason) == (Action.FINISH, "finished")


@pytest.mark.parametrize(
    ("signal", "queue", "reason"),
    [
        ("SIGTERM", Queue.RUNNING, "preempted"),
        ("SIGTERM", Queue.REQUEUED, "preempted"),
        ("SIGUSR2", Queue.RUNNING, "time limit"),
        ("SIGTERM", Queue.TIMED_OUT, "time limit"),
        (None, Queue.RUNNING, "preempted"),
    ],
)
def test_a_stop_on_request_goes_on_at_once(signal: str | None, queue: Queue, reason: str) -> None:
    decision = after(Failure(Cause.STOPPED, "stopped", signal=signal), queue=queue)
    assert (decision.action, decision.reason, decision.delay_s, decision.exclude) == (Action.REQUEUE, reason, 0, ())


@pytest.mark.parametrize("failure", [CRASH, Failure(Cause.STOPPED, "stopped", signal="SIGUSR2")])
@pytest.mark.parametrize("more", [{"cancel_requested": True}, {"queue": Queue.CANCELLED}])
def test_what_was_cancelled_stays_so(failure: Failure, more: dict[str, object]) -> None:
    decision = after(failure, **more)
    assert (decision.action, decision.reason) == (Action.STOP, "cancelled")


@pytest.mark.parametrize("cause", HOPELESS)
def test_hopeless_errors_stop_at_the_first_time_and_say_what_to_do(cause: Cause) -> None:
    decision = after(Failure(cause, "it"), [GOOD])
    assert decision.action is Action.STOP
    assert decision.reason == "crashed: it"
    assert decision.because.startswith(cause.value)


def test_crashes_wait_longer_each_time_and_end() -> None:
    earlier: list[Attempt] = []
    delays = []
    for number in range(1, 4):
        decision = after(CRASH, earlier)
        delays.append(decision.delay_s if decision.action is Action.REQUEUE else None)
        earlier.append(crashed(number, error=f"another {number}"))
    assert delays == [60, 120, None]
    assert "3 attempts in a row failed without a new checkpoint" in decision.because


def test_progress_wipes_the_slate() -> None:
    earlier = [crashed(1, "a"), crashed(2, "b"), GOOD]
    assert after(CRASH, earlier).delay_s == 60
    current = dataclasses.replace(BLANK, ended_step=20, error="new", error_step=21)
    assert decide(CRASH, current, [crashed(n, f"{n}") for n in range(1, 9)], POLICY).action is Action.REQUEUE


def test_the_back_off_is_bounded() -> None:
    policy = dataclasses.replace(POLICY, max_failures=15)
    assert after(CRASH, [crashed(n, f"e{n}") for n in range(1, 12)], policy=policy).delay_s == MAX_BACKOFF_S


def test_the_same_error_at_the_same_step_stops_also_with_a_preemption_in_between() -> None:
    same = crashed(1, CRASH.signature, 7)
    between = dataclasses.replace(BLANK, number=2, reason="preempted")
    decision = after(CRASH, [same, between])
    assert decision.action is Action.STOP
    assert "the same error came twice after step 7" in decision.because


def test_the_same_error_at_another_step_or_another_error_at_the_same_step_is_tried_again() -> None:
    assert after(CRASH, [crashed(1, CRASH.signature, 6)]).action is Action.REQUEUE
    assert after(CRASH, [crashed(1, "other", 7)]).action is Action.REQUEUE


def test_lost_contact_and_kills_are_not_taken_for_deterministic() -> None:
    for cause in (Cause.CONTACT, Cause.KILLED):
        failure = Failure(cause, "closed by peer")
        assert after(failure, [crashed(1, failure.signature, 7)]).action is Action.REQUEUE


def test_a_node_whose_device_failed_is_left_out_with_those_before() -> None:
    failure = Failure(Cause.HARDWARE, "ECC (rank 1 on b)", ("b",))
    assert after(failure).exclude == ("b",)
    assert after(failure, [crashed(1, excluded=("c",))]).exclude == ("c", "b")


def test_a_node_is_left_out_when_ranks_are_killed_there_twice_in_a_row() -> None:
    killed = Failure(Cause.KILLED, "task 1 on b: Killed", ("b",))
    assert after(killed).exclude == ()
    assert after(killed, [crashed(1, "task 3 on b: Killed")]).exclude == ("b",)
    assert after(killed, [crashed(1, "task 3 on bb: Killed")]).exclude == ()


def test_nodes_that_cannot_be_spared_are_kept() -> None:
    failure = Failure(Cause.HARDWARE, "ECC", ("b",))
    assert after(failure, policy=dataclasses.replace(POLICY, spare_nodes=lambda: 0)).exclude == ()
    assert after(failure, policy=dataclasses.replace(POLICY, spare_nodes=lambda: 1)).exclude == ("b",)


def test_an_unhealthy_node_is_left_out_or_the_run_stops() -> None:
    failure = Failure(Cause.UNHEALTHY, "b: slow", ("b",))
    decision = after(failure, policy=dataclasses.replace(POLICY, spare_nodes=lambda: 1))
    assert (decision.action, decision.exclude, decision.delay_s) == (Action.REQUEUE, ("b",), 0)
    assert decision.reason == "unhealthy: b: slow"
    decision = after(failure, policy=dataclasses.replace(POLICY, spare_nodes=lambda: 0))
    assert decision.action is Action.STOP
    assert "too few nodes are left" in decision.because


def test_time_limits_without_progress_end() -> None:
    limited = [dataclasses.replace(BLANK, number=n, reason="time limit") for n in (1, 2)]
    decision = after(Failure(Cause.STOPPED, "", signal="SIGUSR2"), limited)
    assert decision.action is Action.STOP
    assert "ask for more time" in decision.because


def test_where_jobs_may_not_be_requeued_the_next_link_goes_on() -> None:
    policy = dataclasses.replace(POLICY, requeue=False)
    for failure in (CRASH, Failure(Cause.STOPPED, "", signal="SIGTERM"), Failure(Cause.NODE, "node failure on b")):
        assert after(failure, policy=policy).action is Action.NEXT_LINK
    assert after(Failure(Cause.MEMORY, "it"), policy=policy).action is Action.STOP


def test_the_next_link_waits_and_leaves_out_as_a_requeued_job_would() -> None:
    chain = dataclasses.replace(POLICY, requeue=False)
    failure = Failure(Cause.HARDWARE, "ECC (rank 1 on b)", ("b",))
    same, other = after(failure), after(failure, policy=chain)
    assert (other.delay_s, other.exclude) == (same.delay_s, same.exclude) == (60, ("b",))
    last = after(failure, policy=dataclasses.replace(chain, next_link=False))
    assert "no later job of a chain is known" in last.because
    assert "the next job of the chain goes on" not in last.because


def test_nobody_counts_nodes_where_none_is_left_out() -> None:
    def ask() -> int:
        pytest.fail("the controller was asked")

    policy = dataclasses.replace(POLICY, spare_nodes=ask)
    for failure in (CRASH, Failure(Cause.FINISHED, ""), Failure(Cause.STOPPED, "", signal="SIGTERM")):
        after(failure, policy=policy)


def test_nodes_that_all_fail_their_check_are_not_to_blame() -> None:
    failure = Failure(Cause.UNHEALTHY, "a: no disk; b: no disk")
    decision = after(failure, [crashed(1, excluded=("c",))])
    assert (decision.action, decision.exclude, decision.delay_s) == (Action.REQUEUE, ("c",), 60)
    earlier = [dataclasses.replace(BLANK, number=n, reason="unhealthy: a: no disk") for n in (1, 2)]
    assert after(failure, earlier[:1]).delay_s == 120
    decision = after(failure, earlier)
    assert decision.action is Action.STOP
    assert "mend what they share" in decision.because


ARRAY = dataclasses.replace(POLICY, leaves_checkpoints=False)


def test_a_command_without_checkpoints_may_be_preempted_and_need_several_allocations() -> None:
    preempted = [dataclasses.replace(BLANK, number=n, reason="preempted") for n in range(1, 60)]
    assert after(Failure(Cause.STOPPED, ""), preempted, policy=ARRAY).action is Action.REQUEUE
    limited = [dataclasses.replace(BLANK, number=n, reason="time limit") for n in range(1, MAX_FRUITLESS)]
    asked = Failure(Cause.STOPPED, "", signal="SIGUSR2")
    assert after(asked, [*limited[:-1], *preempted], policy=ARRAY).action is Action.REQUEUE
    decision = after(asked, limited, policy=ARRAY)
    assert decision.action is Action.STOP
    assert "20 attempts were not enough" in decision.because


def test_a_command_without_checkpoints_is_given_up_when_it_keeps_failing() -> None:
    limit = dataclasses.replace(BLANK, number=3, reason="time limit")
    decision = after(CRASH, [crashed(1, "one"), crashed(2, "two"), limit], policy=ARRAY)
    assert (decision.action, decision.because) == (Action.STOP, "3 attempts failed; mend the cause, then resume")
    current = dataclasses.replace(BLANK, number=9, error=CRASH.signature)
    again = decide(CRASH, current, [crashed(1, CRASH.signature, None)], ARRAY)
    assert (again.action, again.because) == (Action.STOP, "the same error came twice: mend its cause, then resume")


failures = st.builds(
    Failure,
    st.sampled_from([cause for cause in Cause if cause is not Cause.FINISHED]),
    st.sampled_from(["one (rank 1 on a)", "two (rank 0 on b)", "three", "four: killed"]),
    st.sampled_from([(), ("a",), ("b",), ("a", "b")]),
    st.sampled_from([None, "SIGTERM", "SIGUSR2"]),
)
spares = (st.none() | st.integers(-1, 3)).map(lambda number: lambda: number)
policies = st.builds(Policy, st.integers(1, 30), st.booleans(), st.integers(1, 300), spares)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(failures, st.sampled_from(Queue), st.integers(0, 3)), min_size=25, max_size=25), policies)
def test_no_history_without_progress_goes_on_for_ever(ends: list[tuple[Failure, Queue, int]], policy: Policy) -> None:
    attempts: list[Attempt] = []
    excluded: tuple[str, ...] = ()
    for failure, queue, step in ends:
        number = len(attempts) + 1
        current = dataclasses.replace(
            BLANK, number=number, restart=number - 1, error=failure.signature, error_step=step, excluded=excluded
        )
        decision = decide(failure, current, attempts, policy, queue=queue)
        assert decision.because
        assert decision.reason
        assert 0 <= decision.delay_s <= MAX_BACKOFF_S
        if decision.action is Action.STOP:
            return
        assert decision.action is (Action.REQUEUE if policy.requeue else Action.NEXT_LINK)
        # What was left out once stays out, and never more than can be spared.
        assert set(excluded) <= set(decision.exclude) or not decision.exclude
        if (spare := policy.spare_nodes()) is not None and set(decision.exclude) - set(excluded):
            assert len(decision.exclude) <= spare
        excluded = decision.exclude or excluded
        attempts.append(dataclasses.replace(current, reason=decision.reason, excluded=excluded))
        assert len(fruitless(attempts, policy)) == number < MAX_FRUITLESS
    pytest.fail("it went on")
