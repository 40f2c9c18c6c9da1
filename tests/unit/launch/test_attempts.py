"""The list of attempts of a run, and what is known of its steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from vitscale.errors import LaunchError
from vitscale_launch.attempts import (
    Attempt,
    attempts_path,
    last_recorded_step,
    newest_step,
    read_attempts,
    since_submission,
    write_attempt,
)

FIRST = Attempt(number=1, job="7", restart=0, nodes="a,b", ranks=4, started_unix_s=100, started_step=None)
SECOND = dataclasses.replace(FIRST, number=2, restart=1, started_unix_s=200, started_step=4, excluded=("c",))


def test_attempts_are_added_and_completed(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == []
    write_attempt(tmp_path, FIRST)
    write_attempt(tmp_path, SECOND)
    ended = dataclasses.replace(FIRST, ended_step=4, reason="preempted", ended_unix_s=150)
    write_attempt(tmp_path, ended)
    assert read_attempts(tmp_path) == [ended, SECOND]


def test_a_newer_version_may_know_more(tmp_path: Path) -> None:
    attempts_path(tmp_path).parent.mkdir()
    attempts_path(tmp_path).write_text(json.dumps({**dataclasses.asdict(FIRST), "moon": "full"}) + "\n")
    assert read_attempts(tmp_path) == [FIRST]


@pytest.mark.parametrize("text", ["{", "[]\n", '{"number": 1}\n'])
def test_a_damaged_list_is_named(tmp_path: Path, text: str) -> None:
    attempts_path(tmp_path).parent.mkdir()
    attempts_path(tmp_path).write_text(text)
    with pytest.raises(LaunchError, match=r"attempts.jsonl: is no list of attempts .*; move it aside"):
        read_attempts(tmp_path)


@pytest.mark.parametrize(
    ("started", "ended", "expected"),
    [(None, None, False), (None, 0, False), (None, 3, True), (3, 3, False), (3, 4, True)],
)
def test_progress_is_a_newer_checkpoint(started: int | None, ended: int | None, *, expected: bool) -> None:
    assert dataclasses.replace(FIRST, started_step=started, ended_step=ended).made_progress == expected


def test_an_earlier_submission_does_not_count() -> None:
    # By number: the clocks of the nodes differ.
    assert since_submission([FIRST, SECOND], 2) == [SECOND]
    assert since_submission([FIRST, SECOND], 1) == [FIRST, SECOND]
    assert since_submission([FIRST, SECOND], 3) == []


def test_a_folder_without_checkpoints_has_no_newest_step(tmp_path: Path) -> None:
    assert newest_step(tmp_path) is None
    assert newest_step(tmp_path / "missing") is None


def test_the_last_recorded_step_is_found_behind_a_torn_line(tmp_path: Path) -> None:
    assert last_recorded_step(tmp_path) is None
    lines = [json.dumps({"step": step, "loss": "x" * 1000}) for step in range(200)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 20')
    assert last_recorded_step(tmp_path) == 199
