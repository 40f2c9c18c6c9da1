"""What was submitted: ``RUN/launch/submission.json``, from which a run is started again without its author.

The folder ``RUN/launch`` holds all of a submission: the resolved ``config.yaml``, the ``code`` as it was, and
submitit's ``logs`` (batch script, standard output and errors of every task).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from vitscale.config.section import section
from vitscale.durable import publish_text
from vitscale.errors import LaunchError
from vitscale_launch.site import Site

FOLDER = "launch"
# In names of variables whose values other users must not read.
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


@section
class Submission:
    """A run, or one task of an array, as it was handed to SLURM or to this machine."""

    run: Path
    """Absolute path of the run folder; of an array's task, the folder of that task."""
    command: tuple[str, ...]
    """Arguments after ``python -m vitscale``; of an array, the whole command of a task."""
    global_batch_size: int | None
    """Images per step; None if the command is no training."""
    micro_batch_size: int | None
    """Images per forward pass of one rank; None if the command is no training."""
    nodes_min: int
    """Fewest nodes of an attempt."""
    nodes_max: int
    """Most nodes of an attempt."""
    ranks_per_node: int
    """Ranks on each node."""
    site: Site
    """The cluster's profile, as it was."""
    python: str
    """The Python that submitted; the batch script uses it, and so do ranks without a container."""
    submitted_unix_s: int
    """When."""
    jobs: tuple[str, ...] = ()
    """SLURM's ids, the newest last; empty while sbatch has not answered yet."""
    executor: Literal["slurm", "local", "debug"] = "slurm"
    """Who starts the ranks: SLURM, processes of this machine, or this process."""
    max_failures: int = 3
    """Attempts without progress after which a run is not started again."""
    health_check: bool = False
    """Whether nodes are checked before each attempt."""
    array_tasks: int | None = None
    """How many tasks the array has; None if the command is a training run."""
    array_task: int | None = None
    """Which of them this is; None for a training run, and in the folder of the array itself."""
    first_attempt: int = 1
    """Number of the first attempt that counts for decisions: one that is submitted again has a clean slate."""
    cwd: Path | None = None
    """Folder that it was submitted from, in which the job starts; None for the one of the moment."""

    @property
    def folder(self) -> Path:
        """Where everything of the submission lies."""
        return self.run / FOLDER

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"

    @property
    def code(self) -> Path:
        """The packages as they were; an entry of PYTHONPATH. The tasks of an array share theirs."""
        return (self.run if self.array_task is None else array_folder(self.run)) / FOLDER / "code"

    @property
    def logs(self) -> Path:
        """submitit's folder. The tasks of an array share theirs."""
        return (self.run if self.array_task is None else array_folder(self.run)) / FOLDER / "logs"

    @property
    def rank_python(self) -> tuple[str, ...]:
        """The words that start Python on a rank."""
        return (*self.site.container, self.site.container_python) if self.site.container else (self.python,)


def task_folder(array: Path, task: int) -> Path:
    """The folder of one task of an array: its submission, attempts and requests, as in a run."""
    return array / "tasks" / f"{task:05}"


def array_folder(task_run: Path) -> Path:
    """The folder of the array that a task's folder belongs to."""
    return task_run.parent.parent


def submission_path(run: Path) -> Path:
    """The file that describes the submission of a run."""
    return run / FOLDER / "submission.json"


def read_submission(run: Path) -> Submission:
    """What was submitted to train in ``run``.

    Raises:
        LaunchError: nothing was, or the file cannot be read.
    """
    path = submission_path(run)
    try:
        return TypeAdapter(Submission).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise LaunchError(
            f"{run}: was never submitted, for there is no {path}; "
            f"submit it with: vitscale launch submit CONFIG --site SITE run={run}"
        ) from None
    except OSError as error:
        raise LaunchError(f"{path}: cannot be read: {error.strerror}; check the folder") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise LaunchError(
            f"{path}: is no description of a submission ({key}: {first['msg']}); submit the run again"
        ) from None


def write_submission(submission: Submission) -> None:
    """Replace the description of a submission in one step.

    If the profile's environment holds what looks like a secret, the whole folder is closed to other users: the batch
    script and its log hold it, too.
    """
    submission.folder.mkdir(parents=True, exist_ok=True)
    if any(_SECRET.search(name) for name in submission.site.environment):
        submission.folder.chmod(0o700)
    text = TypeAdapter(Submission).dump_json(submission, indent=1).decode()
    publish_text(submission_path(submission.run), f"{text}\n")
