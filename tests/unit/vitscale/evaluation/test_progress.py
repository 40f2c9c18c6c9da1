"""Progress in a log file: a line now and then, none at the end."""

from __future__ import annotations

import os

import pytest

import vitscale.evaluation.progress as progress_module
from vitscale.evaluation.progress import progress


def test_results_are_not_drawn_into_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a command whose standard output goes into a file."""
    ours, terminal = os.openpty()
    with os.fdopen(terminal, "w") as screen, os.fdopen(ours, "rb", buffering=0) as shown:
        monkeypatch.setattr(progress_module.sys, "stderr", screen)
        with progress("predictions", 3) as advance:
            print("a.png: cat 90%")
            advance(3)
        os.set_blocking(ours, False)
        assert b"predictions" in shown.read()
    assert capsys.readouterr().out == "a.png: cat 90%\n"


def test_lines_in_a_log_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with progress("features of a", 1000) as advance:
        for _ in range(5):
            now[0] += 6.0
            advance(200)
    assert capsys.readouterr().err == (
        "features of a: 400 of 1,000 images, 33/s\nfeatures of a: 800 of 1,000 images, 33/s\n"
    )
    with progress("features of a", 1000, shown=False) as advance:
        now[0] += 60.0
        advance(10)
    assert capsys.readouterr().err == ""
