"""``vitscale launch status | logs | cancel | resume | list``: what has become of runs, and steering them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscale.text_table import print_table
from vitscale_launch.hints import launch_command
from vitscale_launch.table import clock, duration, print_pairs

if TYPE_CHECKING:
    from vitscale_launch.attempts import Attempt
    from vitscale_launch.status import Status

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or folder of an array.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
# Of an array, more rows than this are left to --json.
MOST_TASKS = 50


def register(app: typer.Typer) -> None:
    """Add the commands to ``vitscale launch``."""
    app.command()(status)
    app.command()(logs)
    app.command()(cancel)
    app.command()(resume)
    app.command("list")(list_runs)


def status(run: Run, as_json: AsJson = False) -> None:
    """What a run is doing: attempts and why they ended, step, rate, remaining time, queue, last commit, stuck ranks."""
    from vitscale_launch.status import read_status

    found = read_status(run)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
        return
    print_pairs(_overview(found))
    if found.attempts:
        typer.echo()
        print_table(_ATTEMPT_COLUMNS, [_attempt_row(found, attempt) for attempt in found.attempts])
    if found.tasks:
        typer.echo()
        shown = [task for task in found.tasks if task.state.value != "finished"]
        print_table(("task", "state", "attempts", "why"), [_task_row(task) for task in shown[:MOST_TASKS]])
        if len(shown) > MOST_TASKS:
            typer.echo(f"... and {len(shown) - MOST_TASKS} more; --json tells of all")


def logs(
    run: Run,
    rank: Annotated[int | None, typer.Option(help="Rank, or task of an array; default: the first one.", min=0)] = None,
    attempt: Annotated[int | None, typer.Option(help="Only what this attempt said.", min=1)] = None,
    lines: Annotated[int, typer.Option(help="At most so many lines from the end of each file; 0: all.", min=0)] = 100,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run ends, also across requeues.")
    ] = False,
) -> None:
    """What a run has printed."""
    from vitscale_launch.logs import follow_logs, show_logs

    if follow:
        follow_logs(run, rank=rank, attempt=attempt, lines=lines, write=_write)
    else:
        show_logs(run, rank=rank, attempt=attempt, lines=lines, write=_write)


def cancel(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="Do not commit first: steps since the last one are lost.")] = False,
    wait_s: Annotated[
        float, typer.Option("--wait", help="Seconds to wait for the end; 0: do not wait.", min=0)
    ] = 600.0,
) -> None:
    """Stop a run for good, after a commit. `resume` goes on from there."""
    from vitscale_launch.cancel import cancel_run

    cancel_run(run, now=now, wait_s=wait_s, say=typer.echo)


def resume(
    run: Run,
    nodes: Annotated[str | None, typer.Option(help="Nodes: 8, or 8:32; default: as before.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Changed key of the site profile that was kept; repeatable."),
    ] = None,
    chain: Annotated[
        int, typer.Option(help="Jobs queued one after another, for sites that do not requeue.", min=1)
    ] = 1,
) -> None:
    """Submit a run again that has stopped or failed, with the code and the configuration that it was submitted with."""
    from vitscale_launch.resume import resume_run

    submission, jobs = resume_run(run, nodes, changes=set_ or [], chain=chain)
    if submission.executor == "debug":
        from vitscale_launch.batch import run_here

        raise typer.Exit(run_here(submission))
    typer.echo(f"submitted as {'job' if submission.executor == 'slurm' else 'process'} {', '.join(jobs)}")
    typer.echo(f"watch it with: {launch_command('status', run)}")


def list_runs(
    folder: Annotated[Path, typer.Argument(help="Runs below this folder.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Every run below a folder: state, step, rate, remaining time."""
    from vitscale_launch.listing import find_runs, read_all

    found, notes = read_all(list(find_runs(folder)))
    for note in notes:
        typer.echo(note, err=True)
    if as_json:
        typer.echo(json.dumps([status.to_json() for status in found]))
    elif found:
        columns = ("run", "state", "step", "images/s", "remaining", "commit", "attempts", "job")
        print_table(columns, [_list_row(folder, status) for status in found])
    else:
        typer.echo(f"{folder}: no run below this folder")


def _write(text: str) -> None:
    typer.echo(text, nl=False)


def _overview(found: Status) -> list[tuple[str, str]]:
    rows = [("run", str(found.run)), ("state", f"{found.state.value}: {found.why}")]
    if not found.tasks:
        rows += [("step", _step(found)), ("commit", _commit(found))]
    if found.failure:
        failure = found.failure
        first_line = failure.message.strip().partition("\n")[0]
        rows.append(("failure", f"rank {failure.rank} on {failure.host}: {failure.kind}: {first_line}"))
    if found.beats:
        rows.append(("ranks", _ranks(found)))
    rows += [("stuck", line) for line in _stuck(found)]
    rows += [("next", line) for line in _next(found)]
    return rows + [("note", note) for note in found.notes]


def _step(found: Status) -> str:
    progress = found.progress
    parts = [f"{found.step:,}"]
    if progress.total_steps:
        parts = [f"{found.step:,} of {progress.total_steps:,} ({found.step / progress.total_steps:.1%})"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.images_per_s is not None:
        parts.append(f"{progress.images_per_s:,.0f} images/s")
    if found.state.is_active and progress.remaining_s is not None:
        parts.append(f"{duration(progress.remaining_s)} of training remaining")
    return ", ".join(parts)


def _commit(found: Status) -> str:
    if found.commit is None:
        return "none yet"
    age = "" if found.commit.unix_s is None else f", {duration(time.time() - found.commit.unix_s)} ago"
    return f"step {found.commit.step:,}{age}"


def _ranks(found: Status) -> str:
    phases = Counter(beat.phase for beat in found.beats)
    told = ", ".join(f"{count} {phase}" for phase, count in phases.most_common())
    last = duration(time.time() - max(beat.unix_s for beat in found.beats))
    return f"{len(found.beats)} of {found.attempts[-1].ranks} have told their place ({told}), the last one {last} ago"


def _stuck(found: Status) -> list[str]:
    if found.silence is None:
        return []
    since = duration(found.silence.seconds)
    lines = [
        f"rank {beat.rank} on {beat.host} in phase {beat.phase} after step {beat.step:,}; no rank has moved for {since}"
        for beat in found.silence.ranks[:8]
    ]
    if missing := found.silence.missing:
        shown = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
        lines.append(f"ranks {shown} have told nothing in this attempt; it began {since} ago or was silent since")
    return lines or [f"all ranks are at the same place, and none has moved for {since}"]


def _next(found: Status) -> list[str]:
    run = found.run
    told = {
        "running": [launch_command("logs", run, "--follow")],
        "waiting": [launch_command("cancel", run)],
        "stopped": [launch_command("resume", run)],
        "failed": [launch_command("logs", run), launch_command("resume", run)],
    }
    return told.get(found.state.value, [])


_ATTEMPT_COLUMNS = ("attempt", "job", "restart", "nodes", "ranks", "started", "lasted", "steps", "ended")


def _attempt_row(found: Status, attempt: Attempt) -> Sequence[str]:
    is_last = attempt is found.attempts[-1]
    goes_on = is_last and attempt.ended_unix_s is None and found.state.value == "running"
    end = time.time() if goes_on else attempt.ended_unix_s
    step = found.step if is_last and attempt.ended_step is None else attempt.ended_step
    if step is None and attempt.reason is not None:
        # It has told of its end, and nothing was committed.
        step = 0
    return (
        str(attempt.number),
        attempt.job or "-",
        str(attempt.restart),
        attempt.nodes,
        str(attempt.ranks),
        clock(attempt.started_unix_s),
        "-" if end is None else duration(end - attempt.started_unix_s),
        f"{attempt.started_step or 0:,} -> {'?' if step is None else f'{step:,}'}",
        attempt.reason or ("goes on" if goes_on else "-"),
    )


def _task_row(task: Status) -> Sequence[str]:
    return task.run.name, task.state.value, str(len(task.attempts)), task.why


def _list_row(folder: Path, found: Status) -> Sequence[str]:
    progress = found.progress
    of_total = f" of {progress.total_steps:,}" if progress.total_steps else ""
    remaining = progress.remaining_s if found.state.is_active else None
    active = [job.job_id for job in found.jobs if not job.has_ended]
    relative = found.run.relative_to(folder.absolute()) if found.run.is_relative_to(folder.absolute()) else found.run
    return (
        str(relative),
        found.state.value,
        "-" if found.tasks else f"{found.step:,}{of_total}",
        "-" if progress.images_per_s is None else f"{progress.images_per_s:,.0f}",
        "-" if remaining is None else duration(remaining),
        "-" if found.commit is None else f"{found.commit.step:,}",
        str(len(found.attempts)) if not found.tasks else str(sum(len(task.attempts) for task in found.tasks)),
        active[-1] if active else "-",
    )
