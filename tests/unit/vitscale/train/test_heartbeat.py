"""Heartbeats by the real thread into a real folder."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import wait_until
from vitscale.train import heartbeat as module
from vitscale.train.heartbeat import Heartbeat, Phase


def record(run: Path, rank: int = 3) -> dict[str, Any]:
    path = run / "heartbeat" / f"rank-{rank:05}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def place(run: Path) -> tuple[object, ...]:
    found = record(run)
    return found.get("phase"), found.get("step"), found.get("attempt")


def test_the_record(tmp_path: Path) -> None:
    start = time.time()
    with Heartbeat(3) as beat:
        beat.begin(tmp_path)
        beat.enter(Phase.SAVE, 40, attempt=2)
    found = record(tmp_path)
    assert list(found) == ["rank", "host", "unix_s", "step", "phase", "attempt"]
    assert (found["rank"], found["step"], found["phase"], found["attempt"]) == (3, 40, "save", 2)
    assert start - 1 < found["unix_s"] < time.time() + 1


def test_nothing_is_written_before_it_begins(tmp_path: Path) -> None:
    with Heartbeat(3) as beat:
        beat.enter(Phase.EVALUATE, 1)
    assert list(tmp_path.iterdir()) == []


def test_longer_phases_are_written_at_once_and_those_of_a_step_now_and_then(tmp_path: Path) -> None:
    with Heartbeat(3) as beat:
        beat.begin(tmp_path)
        assert wait_until(lambda: place(tmp_path) == ("start", 0, None), timeout_s=5)
        beat.enter(Phase.EVALUATE, 7, attempt=1)
        assert wait_until(lambda: place(tmp_path) == ("evaluate", 7, 1), timeout_s=5)
        assert list(beat.loading(iter("ab"), 7)) == ["a", "b"]
        assert wait_until(lambda: place(tmp_path)[0] != "evaluate", timeout_s=5)
        time.sleep(0.2)
        written = (tmp_path / "heartbeat" / "rank-00003.json").stat().st_mtime_ns
        for step in range(8, 500):
            beat.enter(Phase.LOAD, step)
            beat.enter(Phase.TRAIN, step)
        time.sleep(0.2)
        assert (tmp_path / "heartbeat" / "rank-00003.json").stat().st_mtime_ns == written
    assert place(tmp_path) == ("train", 499, 1), "the last place is told at the end"


def test_the_last_place_of_a_rank_that_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_WRITES", 0.1)
    released = threading.Event()
    with Heartbeat(3) as beat:

        def batches() -> Any:
            yield "first"
            released.wait()

        def train() -> None:
            list(beat.loading(batches(), 5))

        beat.begin(tmp_path)
        loop = threading.Thread(target=train)
        loop.start()
        assert wait_until(lambda: place(tmp_path) == ("load", 5, None), timeout_s=5)
        told = record(tmp_path)
        time.sleep(0.5)
        assert record(tmp_path) == told, "its time is when it came to that place"
        released.set()
        loop.join()


def test_an_error_of_the_loader_is_not_hidden(tmp_path: Path) -> None:
    def batches() -> Any:
        yield 1
        raise RuntimeError("planted")

    with Heartbeat(0) as beat, pytest.raises(RuntimeError, match="planted"):
        list(beat.loading(batches(), 0))


def test_a_folder_that_cannot_be_written_is_told_once_and_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_WRITES", 0.02)
    (tmp_path / "heartbeat").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING), Heartbeat(3) as beat:
        beat.begin(tmp_path)
        for step in range(10):
            beat.enter(Phase.SAVE, step)
            time.sleep(0.03)
    (told,) = caplog.records
    assert "rank-00003.json cannot be written: " in told.getMessage()
    assert told.getMessage().endswith("; the run goes on")


def test_no_thread_is_left(tmp_path: Path) -> None:
    with Heartbeat(3) as beat:
        beat.begin(tmp_path)
    assert all(thread.name != "heartbeat" for thread in threading.enumerate())
