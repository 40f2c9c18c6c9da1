"""The training run, top to bottom.

``train`` connects the ranks, derives the plan, builds the model and its engine, picks up the newest complete
checkpoint, and then makes one optimizer step after another until the plan is fulfilled or someone asks to stop.

Two rules make a run repeatable after any interruption: what a step trains on is a function of the step's number,
and all ranks decide alike because they decide on sums over all ranks.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from vitscale.checkpoint.engine_state import commit_state, restore_state
from vitscale.checkpoint.state import TrainState
from vitscale.checkpoint.store import CheckpointStore
from vitscale.config.duration import is_due
from vitscale.config.schema import TrainConfig
from vitscale.data.manifest import Manifest
from vitscale.data.mixing import Mixture
from vitscale.data.shard_set import open_evaluation_set, open_training_data
from vitscale.distributed import Ranks, connect
from vitscale.errors import Interrupted, on_every_rank
from vitscale.evaluation.accuracy import evaluate_accuracy, evaluation_batches
from vitscale.models.init import initialize
from vitscale.models.vit import build_vit
from vitscale.plan import RunPlan
from vitscale.topology import Topology
from vitscale.train.batches import train_batches
from vitscale.train.engine import build_engine, model_input, train_step
from vitscale.train.health import check_health
from vitscale.train.metrics import MetricLog
from vitscale.train.run_folder import RunLock, check_run, record_attempt
from vitscale.train.schedule import learning_rate
from vitscale.train.screen import announce
from vitscale.train.signals import StopRequest


def train(config: TrainConfig, topology: Topology, stop: StopRequest) -> TrainState:
    """Train, or continue the run in ``config.run``, until it is finished or ``stop`` has received a signal.

    Raises:
        Interrupted: a signal asked to stop; a checkpoint was committed and the same call continues.
        VitscaleError: anything else that the user can mend.
    """
    with connect(topology, timeout_s=config.engine.timeout_s) as ranks:
        # Each rank has read the file for itself; they must not disagree if it was just changed.
        config = ranks.on_main(lambda: config)
        train_set = ranks.on_main(lambda: open_training_data(config.data, global_batch_size=config.global_batch_size))
        plan = ranks.on_main(lambda: RunPlan.create(config, ranks.world_size, train_set))
        eval_set = ranks.on_main(lambda: open_held_out_set(config, train_set))
        lock = RunLock(config.run)
        ranks.on_main(lock.take)
        ranks.on_main(lambda: check_run(config, say=announce))

        model = build_vit(config.model, config.data.image_hw)
        initialize(model, config.seed)
        engine = build_engine(model, config, plan, ranks)
        store = CheckpointStore(config.run / "checkpoints", ranks, keep=config.checkpoint.keep)
        restored = restore_state(store, engine, data_digest=train_set.digest)
        # Not before the checkpoint was accepted: a refused start leaves the run folder as it was.
        attempt = ranks.on_main(lambda: record_attempt(config, plan))
        state = restored or TrainState()
        commit = partial(commit_state, store, engine, data_digest=train_set.digest, classes=train_set.classes)

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
            log.start(resumed=restored is not None)
            stopping = False
            while not stopping:
                # Before the step, so that an attempt makes up for an evaluation that its predecessor did not finish.
                if eval_set and evaluation_due(state, plan, log):
                    stopping = evaluate(engine, config, eval_set, state, log, ranks, stop)
                if stopping or state.step == plan.total_steps:
                    break

                lr = learning_rate(
                    state.step,
                    optim=config.optim,
                    schedule=config.schedule,
                    warmup=plan.warmup_steps,
                    total=plan.total_steps,
                )
                result = train_step(engine, batches, config, state.step, lr)
                stop_votes, bad_samples, digest = ranks.sum_ints(
                    [stop.received is not None, len(result.quarantined), result.digest]
                )
                state = state.advance(examples=plan.global_batch_size, quarantined=bad_samples, applied=result.applied)

                log.step(state, result, lr=lr, digest=digest)
                if bad_samples:
                    log.quarantine(state.step, result.quarantined)
                check_health(state, config, plan)

                stopping = stop_votes > 0
                if is_due(state.step, plan.checkpoint_every) or state.step == plan.total_steps:
                    log.sync()
                    commit(state)
            log.sync()
            commit(state)  # nothing to do if this step is committed already
            if not stopping:
                log.finish(state)
    if stopping:
        raise on_every_rank(
            Interrupted(
                f"stopped at step {state.step} of {plan.total_steps} on {stop.received or 'a signal to another rank'}; "
                f"a checkpoint is committed and the same command continues"
            )
        )
    return state


def open_held_out_set(config: TrainConfig, train_set: Mixture) -> Manifest | None:
    """The set that is evaluated on, if there is one. Its labels must mean what they mean in training."""
    if config.data.eval is None:
        return None
    return open_evaluation_set(
        config.data.eval,
        config.data.storage,
        num_classes=config.model.num_classes,
        classes=train_set.classes,
    )


def evaluation_due(state: TrainState, plan: RunPlan, log: MetricLog) -> bool:
    """After the last step always, before that at the plan's cadence; once for each step, also across attempts."""
    is_last = state.step == plan.total_steps
    # An evaluation shortly before the last one would tell nothing new.
    near_the_end = 4 * (plan.total_steps - state.step) < (plan.evaluate_every or 0)
    due = is_last or (is_due(state.step, plan.evaluate_every) and not near_the_end)
    return due and not log.was_evaluated(state.step)


def evaluate(
    engine: Any,
    config: TrainConfig,
    eval_set: Manifest,
    state: TrainState,
    log: MetricLog,
    ranks: Ranks,
    stop: StopRequest,
) -> bool:
    """Evaluate and record. Returns whether a stop was requested meanwhile, on all ranks alike."""
    start = time.perf_counter()
    engine.eval()
    accuracy = evaluate_accuracy(
        lambda images: engine(model_input(images, engine)),
        evaluation_batches(
            eval_set,
            config.data,
            num_classes=config.model.num_classes,
            batch_size=config.micro_batch_size,
            ranks=ranks,
        ),
        num_classes=config.model.num_classes,
        ranks=ranks,
        is_stopping=lambda: ranks.sum_ints([stop.received is not None])[0] > 0,
    )
    engine.train()
    if accuracy is None:
        return True
    log.evaluation(state, accuracy.to_json(), time.perf_counter() - start)
    return False
