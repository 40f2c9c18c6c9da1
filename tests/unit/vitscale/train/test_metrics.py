"""What a run says when it is finished, and that its records reach the disk before a checkpoint does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.runs import CONFIG, TINY
from tests.helpers.shardset import as_mixture
from vitscale.checkpoint.state import TrainState
from vitscale.config.loader import load_config
from vitscale.data.loader import Quarantined
from vitscale.data.manifest import Manifest, ShardInfo
from vitscale.distributed import Ranks, connect
from vitscale.plan import RunPlan
from vitscale.topology import Topology
from vitscale.train.metrics import MetricLog

Open = Callable[[TrainState], MetricLog]


@pytest.fixture
def open_log(tmp_path: Path) -> Iterator[Open]:
    """Opens the records of a run in ``tmp_path`` that goes on from a state."""
    config = load_config(CONFIG, [*TINY, f"run={tmp_path}"])
    manifest = Manifest("data", (ShardInfo("a.tar", 1427, 10_000),))
    plan = RunPlan.create(config, 1, as_mixture(manifest, slots=config.global_batch_size))
    with connect(Topology(), timeout_s=60) as ranks:

        def open_log(state: TrainState, ranks: Ranks = ranks) -> MetricLog:
            return MetricLog(config, plan, ranks, state, 1)

        yield open_log


@contextmanager
def synced_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Names of the files that are synced within, with what they held by then."""
    contents: dict[str, str] = {}
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        contents[path.name] = path.read_text()
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield contents


def test_a_run_that_is_finished_says_so(open_log: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(TrainState(step=8, examples_seen=128)) as log:
        log.finish(TrainState(step=12, examples_seen=123_456))
    expected = f"the run is finished: step 12, 123,456 images seen; see {tmp_path}\n"
    assert capsys.readouterr() == ("", expected)


def test_a_run_that_was_finished_says_so(open_log: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = TrainState(step=12, examples_seen=192)
    with open_log(state) as log:
        log.finish(state)
    expected = f"the run was finished before; nothing was left to do: step 12, 192 images seen; see {tmp_path}\n"
    assert capsys.readouterr() == ("", expected)


def test_sync_puts_all_records_on_the_disk(open_log: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainState(step=1, examples_seen=16)
    with open_log(TrainState()) as log:
        log.evaluation(state, {"top1": 0.5, "top5": 1.0, "images": 2, "unreadable": 0}, 1.0)
        log.quarantine(1, [Quarantined(position=3, key="k", shard="s", reason="r", substitute=None)])
        with synced_files(monkeypatch) as contents:
            log.sync()
    assert sorted(contents) == ["metrics.jsonl", "quarantine.jsonl"]
    assert json.loads(contents["metrics.jsonl"])["eval_top1"] == 0.5
    assert json.loads(contents["quarantine.jsonl"])["key"] == "k"
