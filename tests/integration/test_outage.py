"""A storage that goes away in the middle of a run: one error for all ranks, and the same command goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import bad_http
from tests.helpers.bad_http import bad_server
from tests.helpers.command import train
from tests.helpers.runs import metrics, overrides, trajectory


def test_an_outage_stops_all_ranks_with_one_error_and_the_run_goes_on(digits: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    plain = ["duration={steps: 60}", "checkpoint.every={steps: 5}", "data.eval=null", "model.dropout=0"]
    plain += ["data.storage.request_timeout_s=1", "data.storage.total_timeout_s=2", "engine.timeout_s=30"]
    with bad_server() as server:
        server.files = {path.name: path.read_bytes() for path in (digits / "train").iterdir()}
        arguments = overrides(digits, run, *plain, f"data.train={server.url}")
        failing = bad_http.status(503)
        server.rule = lambda _: failing if len(metrics(run)) >= 8 else bad_http.ranged
        errors = train(arguments, expect=1)
        assert errors.count("vitscale: error:") == 1
        assert "no file could be read for" in errors
        assert "then give the same command again" in errors
        assert "Traceback" not in errors
        server.rule = lambda _: bad_http.ranged
        train(arguments)
    train(overrides(digits, whole, *plain))
    assert [row[:2] for row in trajectory(run)] == [row[:2] for row in trajectory(whole)]
    assert [row[2] for row in trajectory(run)] == pytest.approx([row[2] for row in trajectory(whole)], rel=1e-5)
