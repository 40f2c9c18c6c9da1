"""The training run, top to bottom.

``train`` connects the ranks, derives the plan, builds the model and its engine, picks up the newest complete
checkpoint, and then makes one optimizer step after another until the plan is fulfilled or someone asks to stop.

Two rules make a run repeatable after any interruption: what a step trains on is a function of the step's number,
and all ranks decide alike because they decide on sums over all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from vitscale.checkpoint.engine_state import commit_state, restore_state
from vitscale.checkpoint.state import TrainState
from vitscale.checkpoint.store import CheckpointStore
from vitscale.config.duration import is_due
from vitscale.config.schema import TrainConfig
from vitscale.data.loader import Batch, BatchLoader, train_recipe
from vitscale.data.manifest import Manifest, check_files, read_manifest
from vitscale.data.order import SampleOrder, train_positions
from vitscale.data.stream import ShardStream
from vitscale.distributed import Ranks, connect
from vitscale.errors import DataError, DivergenceError, Interrupted, on_every_rank
from vitscale.evaluation.accuracy import evaluate_accuracy, evaluation_batches, open_evaluation_set
from vitscale.models.init import initialize
from vitscale.models.vit import build_vit
from vitscale.plan import RunPlan
from vitscale.topology import Topology
from vitscale.train.engine import build_engine, model_input, train_step
from vitscale.train.metrics import MetricLog, announce
from vitscale.train.run_folder import open_run
from vitscale.train.schedule import learning_rate
from vitscale.train.signals import StopRequest


def train(config: TrainConfig, topology: Topology, stop: StopRequest) -> TrainState:
    """Train, or continue the run in ``config.run``, until it is finished or ``stop`` has received a signal.

    Raises:
        Interrupted: a signal asked to stop; a checkpoint was committed and the same call continues.
        VitscaleError: anything else that the user can mend.
    """
    with connect(topology, timeout_s=config.engine.timeout_s) as ranks:
        train_set = ranks.on_main(lambda: open_training_set(config))
        plan = ranks.on_main(lambda: RunPlan.create(config, ranks.world_size, train_set))
        eval_set = ranks.on_main(lambda: open_held_out_set(config))
        attempt = ranks.on_main(lambda: open_run(config, plan, say=announce))

        model = build_vit(config.model, config.data.image_hw)
        initialize(model, config.seed)
        engine = build_engine(model, config, plan, ranks)
        store = CheckpointStore(config.run / "checkpoints", ranks, keep=config.checkpoint.keep)
        restored = restore_state(store, engine, data_digest=train_set.digest)
        state = restored or TrainState()

        batches = train_batches(config, plan, train_set, ranks, first_step=state.step)
        with MetricLog(config, plan, ranks, state, attempt) as log:
            log.start(resumed=restored is not None)
            stopping = False
            while not stopping:
                if evaluation_due(state, plan, eval_set, log):
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
                    commit_state(store, engine, state, data_digest=train_set.digest)
            if stopping:
                commit_state(store, engine, state, data_digest=train_set.digest)
    if stopping:
        raise on_every_rank(
            Interrupted(
                f"stopped at step {state.step} of {plan.total_steps} on {stop.received or 'a signal to another rank'}; "
                f"a checkpoint is committed and the same command continues"
            )
        )
    return state


def open_training_set(config: TrainConfig) -> Manifest:
    """Read the training set's index and compare it with the files."""
    manifest = read_manifest(config.data.train)
    check_files(manifest)
    return manifest


def open_held_out_set(config: TrainConfig) -> Manifest | None:
    """The same for the set that is evaluated on, if there is one."""
    if config.data.eval is None:
        return None
    return open_evaluation_set(read_manifest(config.data.eval), config.model.num_classes)


def train_batches(
    config: TrainConfig, plan: RunPlan, manifest: Manifest, ranks: Ranks, *, first_step: int
) -> Iterator[Batch]:
    """This rank's micro-batches from ``first_step`` to the end of the run."""
    order = SampleOrder(
        [shard.num_samples for shard in manifest.shards],
        seed=config.seed,
        lanes=plan.lanes,
        window=plan.window,
    )
    loader = BatchLoader(
        ShardStream(manifest, order),
        train_recipe(config.data, config.seed),
        image_hw=config.data.image_hw,
        num_classes=config.model.num_classes,
        labels_per_sample=1 if config.loss.kind == "softmax" else None,
        workers=config.data.workers,
        prefetch=config.data.prefetch_batches,
        pin_memory=ranks.device.type == "cuda",
    )
    return loader.batches(
        train_positions(
            step,
            micro_step,
            rank=ranks.topology.rank,
            world_size=ranks.world_size,
            micro_batch_size=plan.micro_batch_size,
            global_batch_size=plan.global_batch_size,
        )
        for step in range(first_step, plan.total_steps)
        for micro_step in range(plan.gradient_accumulation_steps)
    )


def evaluation_due(state: TrainState, plan: RunPlan, eval_set: Manifest | None, log: MetricLog) -> bool:
    """After the last step always, before that at the plan's cadence; once for each step, also across attempts."""
    if eval_set is None:
        return False
    is_last = state.step == plan.total_steps
    # An evaluation shortly before the last one would tell nothing new.
    near_the_end = 4 * (plan.total_steps - state.step) < (plan.evaluate_every or 0)
    due = is_last or (is_due(state.step, plan.evaluate_every) and not near_the_end)
    return due and not log.was_evaluated(state.step)


def evaluate(
    engine: Any,
    config: TrainConfig,
    eval_set: Manifest | None,
    state: TrainState,
    log: MetricLog,
    ranks: Ranks,
    stop: StopRequest,
) -> bool:
    """Evaluate and record. Returns whether a stop was requested meanwhile, on all ranks alike."""
    assert eval_set is not None
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


def check_health(state: TrainState, config: TrainConfig, plan: RunPlan) -> None:
    """Stop a run that is not worth going on with. The state is the same on all ranks, and so is the decision.

    Raises:
        DataError: more bad samples than the budget allows.
        DivergenceError: too many updates in a row were skipped.
    """
    budget = plan.bad_sample_budget(state.examples_seen)
    if state.quarantined > budget:
        raise on_every_rank(
            DataError(
                f"{state.quarantined} bad samples by step {state.step}; data.max_bad_samples and data.max_bad_share "
                f"allow {budget}; see {config.run / 'quarantine.jsonl'}, mend the shard set or raise the budget"
            )
        )
    if state.skipped_in_a_row >= config.engine.max_skipped_steps:
        raise on_every_rank(
            DivergenceError(
                f"gradients were not finite in {state.skipped_in_a_row} steps in a row up to step {state.step} "
                f"(engine.max_skipped_steps); lower optim.lr, lengthen schedule.warmup, or use precision fp32"
            )
        )
