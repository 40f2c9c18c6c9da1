"""Errors that a user can cause. Each message says what is wrong (with the value), what was allowed, what to do.

The command line prints these without a traceback. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from typing import TypeVar


class VitscaleError(Exception):
    """Base of every error with a cause that the user can mend. ``exit_code`` is the process's exit status."""

    exit_code = 1
    agreed = False
    """Whether every rank raises this same error, so that one of them is enough to print it."""


class ConfigError(VitscaleError):
    """The configuration file, an override or a combination of values is wrong."""

    exit_code = 2


class DataError(VitscaleError):
    """A shard set, a shard or a sample is missing, broken or does not fit the model."""


class CheckpointError(VitscaleError):
    """A checkpoint is missing, incomplete, damaged or belongs to something else."""


class WeightsError(VitscaleError):
    """A file of weights is missing, damaged, of no known format or does not fit the model."""


class TopologyError(VitscaleError):
    """The ranks that were started do not fit each other or the run."""


class DivergenceError(VitscaleError):
    """The loss or the gradients stopped being finite and skipping updates did not help."""

    exit_code = 3


class LaunchError(VitscaleError):
    """Starting ranks or submitting a job failed."""


class Interrupted(VitscaleError):  # noqa: N818 (a request was met, nothing went wrong)
    """The run was asked to stop, committed a checkpoint and left; the same command continues it.

    75 is EX_TEMPFAIL of sysexits.h: try again later.
    """

    exit_code = 75


Error = TypeVar("Error", bound=VitscaleError)


def on_every_rank(error: Error) -> Error:
    """Mark an error that all ranks raise alike, because they decide on the same numbers."""
    error.agreed = True
    return error
