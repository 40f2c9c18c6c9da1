"""Whether a run is worth going on with."""

from __future__ import annotations

from vitscale.checkpoint.state import TrainState
from vitscale.config.schema import TrainConfig
from vitscale.errors import DataError, DivergenceError, on_every_rank
from vitscale.plan import RunPlan


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
