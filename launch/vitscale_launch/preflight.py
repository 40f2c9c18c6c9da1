"""Checks that a run can start, made on the login node instead of after hours in the queue."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vitscale.config.loader import load_config
from vitscale.config.schema import TrainConfig
from vitscale.data.shard_set import open_evaluation_set, open_training_data
from vitscale.errors import LaunchError
from vitscale.models.shapes import resolve_shape
from vitscale.plan import RunPlan
from vitscale_launch.save_time import step_and_save_s
from vitscale_launch.site import Site

Rows = list[tuple[str, str]]
OTHER_RUN, OTHER_FOLDER = "choose another folder with run=...", "choose another folder with --folder"
"""What to do if that of a training run, or that of an array, cannot be taken."""


def check_run(config_file: Path, overrides: Sequence[str], *, world_size: int) -> Rows:
    """The rows of the run's plan on ``world_size`` ranks.

    Raises:
        VitscaleError: the configuration is wrong, a shard set is missing, does not match its index or does not fit
            the head, the global batch cannot be shared by the ranks, or the run folder cannot be written.
    """
    return check_config(load_config(config_file, overrides), world_size=world_size)


def check_config(config: TrainConfig, *, world_size: int, allow_change: Sequence[str] = ()) -> Rows:
    """Like :func:`check_run`, and that what lies in the run folder may go on with this configuration.

    Args:
        config: of the run.
        world_size: ranks.
        allow_change: keys whose change is meant.

    Raises:
        VitscaleError: it cannot start.
    """
    resolve_shape(config.model, config.data.image_hw)
    train_set = open_training_data(config.data, global_batch_size=config.global_batch_size)
    if config.data.eval is not None:
        open_evaluation_set(
            config.data.eval,
            config.data.storage,
            num_classes=config.model.num_classes,
            classes=train_set.classes,
        )
    check_writable(config.run)
    plan = RunPlan.create(config, world_size, train_set)
    changes = _check_continuation(config, plan, train_set.digest, allow_change)
    return [*plan.describe(), ("run", str(config.run)), *(("change", change) for change in changes)]


def check_signal_delay(config: TrainConfig, site: Site) -> Rows:
    """See that the warning before the time limit suffices for a step and a save, as an earlier attempt took them.

    Raises:
        LaunchError: it does not.
    """
    needed_s = step_and_save_s(config)
    if needed_s is None:
        return [("signal", f"{site.signal_delay_s} s before the time limit; no save was measured yet")]
    if needed_s > site.signal_delay_s:
        raise LaunchError(
            f"signal_delay_s: {site.signal_delay_s} s before the time limit are too few, for a step and a save took "
            f"{needed_s:.0f} s in this run; at least {2 * needed_s:.0f} is safe: set it in the site profile or with "
            f"--set signal_delay_s={2 * needed_s:.0f}"
        )
    return [("signal", f"{site.signal_delay_s} s before the time limit; a step and a save took {needed_s:.1f} s")]


def fitting_nodes(config: TrainConfig, ranks_per_node: int, nodes_min: int, nodes_max: int) -> list[int]:
    """The numbers of nodes whose ranks can share the global batch."""
    micro_batches = config.global_batch_size // config.micro_batch_size
    return [n for n in range(nodes_min, nodes_max + 1) if micro_batches % (n * ranks_per_node) == 0]


def check_writable(run: Path, choose: str = OTHER_RUN) -> None:
    """Write a nameless file to the first folder that exists on the way to the run folder.

    Args:
        run: the folder.
        choose: what to do if it cannot be written.

    Raises:
        LaunchError: it cannot be written.
    """
    folder = run
    try:
        folder = next(path for path in (run, *run.absolute().parents) if path.exists())
        # Access bits tell little of read-only mounts, of quotas, and of root on a network file system.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise LaunchError(f"{folder} cannot be written: {error.strerror}; {choose}") from error


def _check_continuation(config: TrainConfig, plan: RunPlan, data_digest: str, allow_change: Sequence[str]) -> list[str]:
    """What changes in a run that was begun already."""
    if not (config.run / "config.yaml").exists():
        return []
    # Reading checkpoints needs torch, which a new run is planned without.
    from vitscale.train.changes import Resume, ResumePolicy
    from vitscale.train.run_folder import check_run as check_folder

    said: list[str] = []
    check_folder(config, plan, data_digest, ResumePolicy(Resume.AUTO, tuple(allow_change)), say=said.append)
    return said
