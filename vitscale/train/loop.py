"""The training run, top to bottom.

``train`` connects the ranks, derives the plan, builds the model and its engine, picks up the newest complete
checkpoint, and then makes one optimizer step after another until the plan is fulfilled or someone asks to stop.

Two rules make a run repeatable after any interruption: what a step trains on is a function of the step's number,
and all ranks decide alike because they decide on sums over all ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext

from vitscale.checkpoint.engine_state import Checkpoints, Identity
from vitscale.checkpoint.opening import checkpoint_folder
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.state import TrainState
from vitscale.checkpoint.store import CheckpointStore
from vitscale.config.duration import is_due
from vitscale.config.reference import dump_config
from vitscale.config.schema import TrainConfig
from vitscale.data.shard_set import open_training_data
from vitscale.data.storage.drivers import without_secrets
from vitscale.distributed import Ranks, connect
from vitscale.errors import Interrupted, VitscaleError, on_every_rank
from vitscale.models.batch_norm import synchronize
from vitscale.models.build import build_model
from vitscale.models.init import initialize
from vitscale.plan import RunPlan
from vitscale.topology import Topology
from vitscale.train.average import WeightAverage
from vitscale.train.batches import train_batches
from vitscale.train.changes import AUTO, ResumePolicy
from vitscale.train.engine import build_engine, train_step
from vitscale.train.evaluators import due_evaluators, open_evaluators, run_evaluators
from vitscale.train.first_batch import when_loaded
from vitscale.train.health import check_health
from vitscale.train.heartbeat import Heartbeat, Phase
from vitscale.train.initial import begin_with_initial, check_initial
from vitscale.train.metrics import MetricLog
from vitscale.train.run_folder import RunLock, check_policy, check_run, record_attempt
from vitscale.train.schedule import planned_learning_rate
from vitscale.train.screen import announce
from vitscale.train.signals import StopRequest


def train(config: TrainConfig, topology: Topology, stop: StopRequest, policy: ResumePolicy = AUTO) -> TrainState:
    """Train, or continue the run in ``config.run``, until it is finished or ``stop`` has received a signal.

    Raises:
        Interrupted: a signal asked to stop; a checkpoint was committed and the same call continues.
        VitscaleError: anything else that the user can mend.
    """
    with connect(topology, timeout_s=config.engine.timeout_s) as ranks, Heartbeat(topology.rank) as heartbeat:
        # Each rank has read the file for itself; they must not disagree if it was just changed.
        config = ranks.on_main(lambda: config)
        train_set = ranks.on_main(lambda: open_training_data(config.data, global_batch_size=config.global_batch_size))
        plan = ranks.on_main(lambda: RunPlan.create(config, ranks.world_size, train_set))
        evaluators = ranks.on_main(lambda: open_evaluators(config, plan, train_set))
        # Before the lock, which would make a folder of a mistyped name.
        ranks.on_main(lambda: check_policy(config, policy))
        ranks.on_main(lambda: check_initial(config, train_set.classes))
        lock = RunLock(config.run)
        ranks.on_main(lock.take)
        start = ranks.on_main(lambda: check_run(config, plan, train_set.digest, policy, say=announce))
        heartbeat.begin(config.run)
        leave_if_stopped(stop, ranks)

        model = build_model(config.model, config.data.image_hw)
        initialize(model, config.seed)
        synchronize(model, ranks.sum_in_graph)
        engine = build_engine(model, config, plan, ranks)
        leave_if_stopped(stop, ranks)
        average = None if config.optim.ema_decay is None else WeightAverage(engine, decay=config.optim.ema_decay)
        lr_of = planned_learning_rate(config, plan)
        retention = Retention(config.checkpoint.keep, plan.keep_checkpoint_every, config.checkpoint.keep_best)
        checkpoints = Checkpoints(
            CheckpointStore(checkpoint_folder(config.run, config.checkpoint), ranks, retention),
            engine,
            ranks,
            Identity(train_set.digest, train_set.classes, without_secrets(dump_config(config)), start.free_data),
            averages=average.partitions if average else None,
            tolerated_failures=config.checkpoint.tolerate_failures,
        )
        restored = checkpoints.restore(lr_of=lambda step: lr_of(step) if step in start.same_lr_steps else None)
        initial = None if restored else begin_with_initial(config, train_set.classes, checkpoints, ranks, say=announce)
        # Not before the checkpoint was accepted: a refused start leaves the run folder as it was.
        attempt = ranks.on_main(
            lambda: record_attempt(config, plan, start, restored.step if restored else None, initial)
        )
        state = restored or TrainState()
        heartbeat.enter(Phase.START, state.step, attempt)
        clock = SaveClock(config.checkpoint.every_minutes)
        batches = train_batches(
            config,
            plan,
            train_set,
            rank=topology.rank,
            ranks_of_node=ranks.on_same_node(),
            first_step=state.step,
            pin_memory=ranks.device.type == "cuda",
        )
        with MetricLog(config, plan, ranks, state, attempt) as log:
            checkpoints.before_commit = log.sync
            log.start(resumed=restored is not None, initial=initial["path"] if initial else None)
            if state.step < plan.total_steps:
                batches = when_loaded(batches, lambda: leave_if_stopped(stop, ranks), ranks)
            stopping = False
            while not stopping:
                # Before the step, so that an attempt makes up for an evaluation that its predecessor did not finish.
                if due := due_evaluators(evaluators, state, plan, log):
                    heartbeat.enter(Phase.EVALUATE, state.step)
                    with average.in_place() if average else nullcontext():
                        poll = stop_poll(state, ranks, stop, checkpoints, heartbeat)
                        stopping = run_evaluators(engine, config, due, state, log, ranks, poll)
                if stopping or state.step == plan.total_steps:
                    break

                lr = lr_of(state.step)
                result = train_step(engine, heartbeat.loading(batches, state.step), config, state.step, lr)
                if average and result.applied:
                    average.update()
                stop_votes, bad_samples, digest, saves_pending, clock_votes = ranks.sum_ints(
                    [
                        stop.received is not None,
                        len(result.quarantined),
                        result.digest,
                        checkpoints.pending(),
                        ranks.is_main and clock.is_over(),
                    ]
                )
                checkpoints.advance(saves_pending)
                state = state.advance(examples=plan.global_batch_size, quarantined=bad_samples, applied=result.applied)

                log.step(state, result, lr=lr, digest=digest)
                if bad_samples:
                    log.quarantine(state.step, result.quarantined)
                try:
                    check_health(state, config, plan)
                except VitscaleError:
                    # Raised on all ranks alike. What was sound when its save began is worth keeping.
                    checkpoints.wait(say=log.say)
                    raise

                stopping = stop_votes > 0
                to_be_scored = config.checkpoint.keep_best > 0 and is_due(state.step, plan.evaluate_every)
                if clock_votes or to_be_scored or is_due(state.step, plan.checkpoint_every):
                    heartbeat.enter(Phase.SAVE, state.step)
                    log.stall(checkpoints.save(state, next_lr=lr_of(state.step), scores=log.scores()))
                    clock.restart()
            heartbeat.enter(Phase.SAVE, state.step)
            checkpoints.save(state, next_lr=lr_of(state.step), scores=log.scores(), must=True)
            if not stopping:
                log.finish(state)
    if stopping:
        raise interrupted(
            stop,
            f"at step {state.step} of {plan.total_steps}",
            "a checkpoint is committed and the same command continues",
        )
    return state


def interrupted(stop: StopRequest, where: str, what: str) -> Interrupted:
    """The error that all ranks leave with when one of them was asked to stop."""
    return on_every_rank(Interrupted(f"stopped {where} on {stop.received or 'a signal to another rank'}; {what}"))


def leave_if_stopped(stop: StopRequest, ranks: Ranks) -> None:
    """Leave if any rank was asked to, before the first step: there is nothing yet that would be lost. Collective."""
    if ranks.sum_ints([stop.received is not None])[0]:
        raise interrupted(stop, "before the first step", "there was nothing to save and the same command continues")


class SaveClock:
    """Tells when so many minutes have passed since the last save; never without a number."""

    def __init__(self, minutes: float | None) -> None:
        self._seconds = math.inf if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        """A save has begun."""
        self._end = time.monotonic() + self._seconds

    def is_over(self) -> bool:
        """Whether it is time for one."""
        return time.monotonic() >= self._end


def stop_poll(
    state: TrainState, ranks: Ranks, stop: StopRequest, checkpoints: Checkpoints, heartbeat: Heartbeat
) -> Callable[[], bool]:
    """What an evaluation asks after each batch: whether a stop was requested, on all ranks alike. A save that is in
    flight goes on meanwhile."""

    def is_stopping() -> bool:
        heartbeat.enter(Phase.EVALUATE, state.step)
        stop_votes, saves_pending = ranks.sum_ints([stop.received is not None, checkpoints.pending()])
        checkpoints.advance(saves_pending)
        return stop_votes > 0

    return is_stopping
