"""Progress in a log file: a line now and then, none at the end."""

from __future__ import annotations

import pytest

import vitscale.evaluation.progress as progress_module
from vitscale.evaluation.progress import progress


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
