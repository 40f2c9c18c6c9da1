"""Runs whose last rank is asked to stop within a chosen step."""

from __future__ import annotations

import os
import signal

from tests.helpers.runs import CONFIG
from vitscale.topology import Topology


def train_and_stop(topology: Topology, arguments: list[str], stop_at: int | None) -> None:
    """One rank of a run; the last rank alone gets SIGTERM within step ``stop_at``."""
    import vitscale.train.engine as engine_module
    import vitscale.train.loop as loop
    from vitscale.config.loader import load_config
    from vitscale.errors import Interrupted
    from vitscale.train.signals import StopRequest

    real_step, real_settings = loop.train_step, engine_module.deepspeed_config

    def settings_that_release_parameters(config, plan):
        """DeepSpeed keeps small parameters whole in stage 3; tiny models would never see a partitioned one."""
        settings = real_settings(config, plan)
        if config.engine.zero_stage == 3:
            settings["zero_optimization"] |= {
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
            }
        return settings

    def step_with_signal(engine, batches, config, step, lr):
        result = real_step(engine, batches, config, step, lr)
        if step + 1 == stop_at and topology.rank == topology.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    loop.train_step = step_with_signal
    engine_module.deepspeed_config = settings_that_release_parameters
    stopped = False
    try:
        with StopRequest() as stop:
            loop.train(load_config(CONFIG, arguments), topology, stop)
    except Interrupted:
        stopped = True
    assert stopped == (stop_at is not None)
