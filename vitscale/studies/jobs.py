"""The jobs of a study: each is a few commands with one result, done once, by any number of workers on any machines.

Workers share nothing but a folder. Each takes the first job that nobody works on and that has no result, and waits at
the end for the jobs of the others. A worker that dies leaves its job to the others, as soon as the command that it had
started is over; the job's own commands go on where they stopped. A job that was begun remembers its settings, and is
refused under others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscale.durable import Lock, publish_text
from vitscale.errors import ConfigError, Interrupted, LaunchError
from vitscale.train.signals import StopRequest

Result = dict[str, Any]
POLL_S = 1.0
# How often a worker that has nothing to do looks whether the others are done.
PATIENCE_S = 5.0
LINES_OF_LOG = 12
SETTINGS, RESULT = "settings.json", "result.json"


@dataclass(frozen=True)
class Job:
    """A piece of work with a name, a folder of its own and a result."""

    name: str
    """Unique in the study; also the path of its folder."""
    settings: Mapping[str, Any]
    """Plain data: all that the result depends on."""
    work: Callable[[Workplace], Result]
    """Does the work; called again after an interruption."""


class CommandError(LaunchError):
    """A command of a job failed. ``exit_code`` is the command's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Workplace:
    """Where one job does its work."""

    folder: Path
    stop: StopRequest
    lock: Lock

    @property
    def log(self) -> Path:
        """What the commands said."""
        return self.folder / "log.txt"

    def vitscale(self, *arguments: str) -> str:
        """Run a ``vitscale`` command to its end. Returns its standard output; everything else goes to the log.

        A stop request is passed on to it, so that it can commit.

        Raises:
            Interrupted: it was stopped.
            CommandError: it failed.
        """
        with self.log.open("ab") as log:
            log.write(f"$ vitscale {' '.join(arguments)}\n".encode())
            log.flush()
            output = self.folder / "output.txt"
            with output.open("wb") as out:
                command = [sys.executable, "-m", "vitscale", *arguments]
                # The command keeps the lock if this process is killed: another worker would start it beside itself.
                keeps = (self.lock.fileno(),)
                code = self._wait(subprocess.Popen(command, stdout=out, stderr=log, pass_fds=keeps))
            text = output.read_text(encoding="utf-8", errors="replace")
            log.write(text.encode())
        if code == Interrupted.exit_code or (code and self.stop.received):
            raise Interrupted(
                f"stopped on {self.stop.received or 'a signal to a job'}; the same command goes on with what is left"
            )
        if code:
            last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_LOG:]
            told = "\n".join(f"  {line}" for line in last)
            raise CommandError(f"'vitscale {' '.join(arguments)}' left with {code}; {self.log} ends with\n{told}", code)
        return text

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        passed_on = False
        while True:
            try:
                return process.wait(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                if self.stop.received and not passed_on:
                    process.terminate()
                    passed_on = True


def run_jobs(jobs: Sequence[Job], folder: Path, *, stop: StopRequest, say: Callable[[str], None]) -> dict[str, Result]:
    """Do all jobs that have no result yet, and wait for those that other workers do. Returns all results by name.

    Args:
        jobs: of the study.
        folder: shared by the workers; each job gets a folder below it.
        stop: ends the work between two jobs, and within one as soon as its command has committed.
        say: is told of every job that ends.

    Raises:
        Interrupted: a stop was requested.
        ConfigError: a job has a result that came from other settings, or the folder cannot be written.
        CommandError: commands failed; all other jobs are done first.
    """
    results: dict[str, Result] = {}
    failed: dict[str, CommandError] = {}
    for job in jobs:
        if (result := _read_result(job, folder)) is not None:
            results[job.name] = result
    if results:
        say(f"{len(results)} of {len(jobs)} jobs are done already")
    while left := [job for job in jobs if job.name not in results and job.name not in failed]:
        if not _round(left, folder, results, failed, total=len(jobs), stop=stop, say=say):
            # All that is left is being done by others.
            time.sleep(PATIENCE_S)
        if stop.received:
            raise Interrupted(f"stopped on {stop.received}; the same command goes on with what is left")
    if failed:
        raise CommandError(
            f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}. The first: {next(iter(failed.values()))}",
            next(iter(failed.values())).exit_code,
        )
    return results


def _round(
    left: Sequence[Job],
    folder: Path,
    results: dict[str, Result],
    failed: dict[str, CommandError],
    *,
    total: int,
    stop: StopRequest,
    say: Callable[[str], None],
) -> bool:
    """Go through the jobs once, and do those that are free. Returns whether anything was done or found."""
    progress = False
    for job in left:
        if stop.received:
            break
        lock = Lock(folder / job.name / ".lock")
        place = Workplace(folder / job.name, stop, lock)
        try:
            place.folder.mkdir(parents=True, exist_ok=True)
            taken = lock.take()
        except OSError as error:
            raise ConfigError(
                f"folder: cannot write to {place.folder}: {error.strerror}; choose another folder"
            ) from error
        if not taken:
            continue
        try:
            # Another worker may have finished it since.
            result = _read_result(job, folder)
            if result is None:
                result = _work(job, place)
            results[job.name] = result
            say(f"{len(results)} of {total}: {job.name}: {_shown(result)}")
        except CommandError as error:
            failed[job.name] = error
            say(f"{job.name} failed; see {place.log}")
        finally:
            lock.release()
        progress = True
    return progress


def _work(job: Job, place: Workplace) -> Result:
    _check_settings(job, place.folder)
    publish_text(place.folder / SETTINGS, json.dumps(job.settings, indent=1) + "\n")
    start = time.monotonic()
    result = job.work(place)
    record = {"result": result, "seconds": round(time.monotonic() - start, 1)}
    publish_text(place.folder / RESULT, json.dumps(record, indent=1) + "\n")
    return result


def _read_result(job: Job, folder: Path) -> Result | None:
    path = folder / job.name / RESULT
    if not path.is_file():
        return None
    _check_settings(job, path.parent)
    result: Result = json.loads(path.read_text(encoding="utf-8"))["result"]
    return result


def _check_settings(job: Job, folder: Path) -> None:
    """A job that was begun under other settings would go on, and its result would be nobody's."""
    path = folder / SETTINGS
    if not path.is_file():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(job.settings))
    if before != now:
        changed = sorted(key for key in {*now, *before} if now.get(key) != before.get(key))
        key = changed[0]
        raise ConfigError(
            f"{folder}: was begun with other settings ({', '.join(changed)}; {key} was {before.get(key)!r} and is "
            f"{now.get(key)!r}); remove that folder to do it again, or choose another folder"
        )


def _shown(result: Result) -> str:
    return ", ".join(
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.items()
        if isinstance(value, int | float | str)
    )
