"""How far a run is, from files as training writes them, torn and old ones among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.train.heartbeat import Beat
from vitscale_launch import progress as module
from vitscale_launch.progress import find_silence, newest_commit, read_progress


def record(step: int, unix_s: float, attempt: int = 1) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "images_per_s": 100.0, "attempt": attempt, "unix_s": unix_s}


def write(run: Path, *records: object, total: int = 100) -> None:
    (run / "plan.json").write_text(json.dumps({"total_steps": total, "global_batch_size": 32}))
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in records))


def test_a_run_that_has_written_nothing(tmp_path: Path) -> None:
    progress = read_progress(tmp_path)
    assert (progress.step, progress.total_steps, progress.loss, progress.remaining_s) == (0, None, None, None)
    assert newest_commit(tmp_path) is None


def test_the_rate_is_that_of_the_newest_attempt(tmp_path: Path) -> None:
    evaluation = {"step": 20, "eval_top1": 0.5, "attempt": 2}
    write(tmp_path, record(1, 0), record(10, 9), record(12, 1000, 2), record(20, 1016, 2), evaluation)
    progress = read_progress(tmp_path)
    assert (progress.step, progress.attempt, progress.loss) == (20, 2, 1 / 20)
    assert progress.step_s == 2
    assert progress.remaining_s == 160


def test_the_first_record_of_an_attempt_gives_a_rate_too(tmp_path: Path) -> None:
    write(tmp_path, record(1, 0), record(10, 9), record(12, 1000, 2))
    assert read_progress(tmp_path).step_s == 32 / 100


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TAIL_BYTES", 500)
    write(tmp_path, *(record(step, step * 3.0) for step in range(1, 5000)), total=5999)
    progress = read_progress(tmp_path)
    assert (progress.step, progress.step_s, progress.remaining_s) == (4999, 3.0, 3000.0)


def test_a_torn_last_line(tmp_path: Path) -> None:
    write(tmp_path, record(3, 1.0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert read_progress(tmp_path).step == 3


def beat(rank: int, step: int, phase: str, unix_s: float) -> Beat:
    return Beat(rank, f"node{rank // 2}", unix_s, step, phase, 1)


def silence(*beats: Beat, now: float = 1000.0, ranks: int = 4, step_s: float | None = 0.5) -> module.Silence | None:
    return find_silence(beats, now, ranks=ranks, since=100.0, step_s=step_s)


def test_a_run_that_moves_is_not_silent() -> None:
    assert silence(*(beat(rank, 50, "train", 990.0) for rank in range(4))) is None
    # Of long steps, one is no reason to worry.
    assert silence(*(beat(rank, 50, "train", 700.0) for rank in range(4)), step_s=60.0) is None


def test_the_rank_that_the_others_wait_for() -> None:
    others = [beat(rank, 50, "train", 800.0) for rank in (0, 1, 3)]
    found = silence(*others, beat(2, 50, "load", 800.0))
    assert found is not None
    assert [suspect.rank for suspect in found.ranks] == [2]
    assert (found.seconds, found.missing) == (200.0, ())
    # By the step rather than by the clock, for clocks differ.
    found = silence(*others, beat(2, 49, "save", 801.0))
    assert found is not None
    assert [suspect.rank for suspect in found.ranks] == [2]


def test_ranks_that_are_all_at_one_place_are_no_suspects() -> None:
    found = silence(*(beat(rank, 50, "train", 800.0) for rank in range(4)))
    assert found is not None
    assert found.ranks == ()


def test_ranks_that_never_told_anything() -> None:
    beats = [beat(rank, 0, "start", 110.0) for rank in (0, 3)]
    assert silence(*beats, step_s=None) is None, "a start may take long"
    found = silence(*beats, step_s=None, now=2000.0)
    assert found is not None
    assert found.missing == (1, 2)


@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["load", "train", "save"])), min_size=1, max_size=6),
    age_s=st.floats(0, 500),
)
def test_suspects_are_behind_somebody(steps: list[tuple[int, str]], age_s: float) -> None:
    beats = [beat(rank, step, phase, 1000.0 - age_s) for rank, (step, phase) in enumerate(steps)]
    found = silence(*beats, ranks=len(beats))
    assert (found is None) == (1000.0 - (1000.0 - age_s) < module.SILENT_S)
    if found is not None:
        innocent = [b for b in beats if b not in found.ranks]
        assert innocent, "someone must be waiting for them"
        order = ["load", "train", "evaluate", "save"]
        keys = {b.rank: (b.step, order.index(b.phase)) for b in beats}
        assert all(keys[s.rank] < keys[i.rank] for s in found.ranks for i in innocent)
