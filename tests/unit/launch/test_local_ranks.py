"""Ranks as children of one task: real processes and real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.runs import environment, wait_until
from vitscale.errors import ConfigError
from vitscale.train.signals import STOP_SIGNALS
from vitscale_launch import local_ranks
from vitscale_launch.environment import ERRORS, rank_environment
from vitscale_launch.local_ranks import run_ranks

# What the ranks do: leave with a code, die, or wait for a signal that was blocked when they started.
RANK = """
import os, signal, sys, time
rank, what = os.environ["RANK"], sys.argv[1:]
mine = what[int(rank)]
open(os.path.join(os.environ["MARKS"], rank), "w").write(os.environ["WORLD_SIZE"])
if mine == "wait":
    number = signal.sigwait({signal.SIGTERM, signal.SIGINT, signal.SIGUSR2})
    open(os.path.join(os.environ["MARKS"], rank), "w").write(signal.Signals(number).name)
    os._exit(75)
if mine == "deaf":
    while True:
        signal.sigwait({signal.SIGTERM})
if mine == "die":
    os.kill(os.getpid(), signal.SIGKILL)
os._exit(int(mine))
"""


def environments(marks: Path, count: int) -> list[dict[str, str]]:
    common = {**os.environ, "MARKS": str(marks), ERRORS: str(marks / "errors")}
    return [{**common, **rank_environment(0, 1, rank, count)} for rank in range(count)]


def run(marks: Path, *what: str) -> int:
    return run_ranks([sys.executable, "-S", "-c", RANK, *what], environments(marks, len(what)))


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ranks, "NOTICE_S", 0.1)
    monkeypatch.setattr(local_ranks, "TERM_S", 0.3)


@pytest.mark.parametrize(("what", "code"), [("00", 0), ("03", 3), ("30", 3)])
def test_the_exit_code_is_that_of_the_first_failure(tmp_path: Path, what: str, code: int) -> None:
    assert run(tmp_path, *what) == code
    assert {path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {"2"}


def test_a_stop_of_all_is_a_stop(tmp_path: Path) -> None:
    assert run(tmp_path, "75", "75") == 75


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_reach_all_ranks_and_none_is_lost(tmp_path: Path, number: signal.Signals) -> None:
    def send() -> None:
        assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert run(tmp_path, "wait", "wait") == 75
    finally:
        sender.join()
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == [number.name] * 2


def test_the_others_are_taken_down_and_the_dead_is_told_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert run(tmp_path, "deaf", "die", "wait") == 128 + signal.SIGKILL
    assert time.monotonic() - start < 10
    record = json.loads((tmp_path / "errors" / "rank-00001.json").read_text())
    assert (record["rank"], record["kind"], record["exit_code"]) == (1, "Killed", 137)
    assert "rank 1 was killed by SIGKILL" in capfd.readouterr().err
    assert not (tmp_path / "errors" / "rank-00000.json").exists()


def test_the_mask_of_the_caller_is_as_before(tmp_path: Path) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    run(tmp_path, "0")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/nowhere/python cannot be started on"):
        run_ranks(["/nowhere/python"], environments(tmp_path, 2))


def test_the_ranks_of_a_killed_task_die_with_it(tmp_path: Path) -> None:
    """As ranks of a launcher do; vitscale.ranks asks the kernel for it."""
    mark = tmp_path / "pid"
    rank_code = (
        "import os, sys, time; from vitscale.ranks import _die_with_launcher; _die_with_launcher(); "
        "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    )
    task_code = (
        "import os, sys; from vitscale_launch.local_ranks import run_ranks; "
        "env = dict(os.environ, RANK='0', VITSCALE_LAUNCHER=str(os.getpid())); "
        "run_ranks([sys.executable, '-c', *sys.argv[1:]], [env])"
    )
    task = subprocess.Popen([sys.executable, "-c", task_code, rank_code, str(mark)], env=environment())
    assert wait_until(lambda: mark.exists() and mark.read_text() != "", timeout_s=30)
    rank = psutil.Process(int(mark.read_text()))
    task.kill()
    task.wait()
    assert not psutil.wait_procs([rank], timeout=20)[1]
