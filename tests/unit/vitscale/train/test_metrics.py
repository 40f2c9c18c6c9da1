"""What a run says when it is finished, what its records tell of the storage, and when they reach the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import run_ranks
from tests.helpers.runs import CONFIG, TINY
from tests.helpers.runs import metrics as records_of
from tests.helpers.shardset import as_mixture
from vitscale.checkpoint.state import TrainState
from vitscale.config.loader import load_config
from vitscale.data import shard_set
from vitscale.data.loader import Quarantined
from vitscale.data.manifest import Manifest, ShardInfo
from vitscale.data.stages import StageSeconds
from vitscale.data.storage import transfer
from vitscale.data.storage.node_cache import CacheCounters, NodeCache
from vitscale.data.storage.transfer import record_request
from vitscale.distributed import Ranks, connect
from vitscale.plan import RunPlan
from vitscale.topology import Topology
from vitscale.train.engine import StepResult
from vitscale.train.metrics import MetricLog

Open = Callable[[TrainState], MetricLog]


def _open(run: Path, ranks: Ranks, state: TrainState, *overrides: str) -> MetricLog:
    config = load_config(CONFIG, [*TINY, f"run={run}", *overrides])
    manifest = Manifest("data", (ShardInfo("a.tar", 1427, 10_000),))
    plan = RunPlan.create(config, ranks.world_size, as_mixture(manifest, slots=config.global_batch_size))
    return MetricLog(config, plan, ranks, state, 1)


@pytest.fixture
def open_log(tmp_path: Path) -> Iterator[Open]:
    """Opens the records of a run in ``tmp_path`` that goes on from a state."""
    with connect(Topology(), timeout_s=60) as ranks:

        def open_log(state: TrainState) -> MetricLog:
            return _open(tmp_path, ranks, state)

        yield open_log


@pytest.fixture
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has read nothing remotely."""
    monkeypatch.setattr(transfer, "_hosts", {})
    monkeypatch.setattr(shard_set, "_opened_caches", [])


def _take_step(log: MetricLog, step: int) -> None:
    result = StepResult(torch.tensor(1.0), 1.0, True, 0.0, StageSeconds(), 0, [])
    log.step(TrainState(step=step, examples_seen=16 * step), result, lr=0.1, digest=0)


def _ask(host: str, *, num_bytes: int = 0, retry: bool = False, error: str | None = None) -> None:
    record_request(host, num_bytes=num_bytes, seconds=0.1, retry=retry, error=error, timeout=error == "TimeoutError")


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
        log.evaluation(state, None, {"top1": 0.5, "top5": 1.0, "images": 2, "unreadable": 0}, 1.0)
        log.quarantine(1, [Quarantined(position=3, key="k", shard="s", reason="r", substitute=None)])
        with synced_files(monkeypatch) as contents:
            log.sync()
    assert sorted(contents) == ["metrics.jsonl", "quarantine.jsonl"]
    assert json.loads(contents["metrics.jsonl"])["eval_top1"] == 0.5
    assert json.loads(contents["quarantine.jsonl"])["key"] == "k"


def test_a_local_run_records_no_storage(open_log: Open, tmp_path: Path, nothing_read: None) -> None:
    with open_log(TrainState()) as log:
        _take_step(log, 1)
    (record,) = records_of(tmp_path)
    assert not {"storage", "cache"} & record.keys()


def test_a_record_tells_what_was_read_since_the_last_one(
    open_log: Open, tmp_path: Path, nothing_read: None, capsys: pytest.CaptureFixture[str]
) -> None:
    _ask("before", num_bytes=10**9, error="503")
    with open_log(TrainState()) as log:
        _ask("store", num_bytes=1_000_000)
        _ask("store", error="503")
        _ask("other", num_bytes=500_000, retry=True, error="TimeoutError")
        _take_step(log, 1)
        _take_step(log, 2)
        _ask("store", num_bytes=2_000_000)
        _take_step(log, 3)
    first, second, third = records_of(tmp_path)
    assert first["storage"] == {"requests": 3, "retries": 1, "timeouts": 1, "errors": 2, "mb": 1.5}
    assert second["storage"] == {"requests": 0, "retries": 0, "timeouts": 0, "errors": 0, "mb": 0}
    assert third["storage"] == {"requests": 1, "retries": 0, "timeouts": 0, "errors": 0, "mb": 2}
    assert not any("cache" in record for record in (first, second, third))
    shown = capsys.readouterr().err.splitlines()
    assert [line.partition("  storage ")[2] for line in shown] == ["1 retries, 2 errors", "", ""]


def test_an_evaluation_between_two_records_loses_no_request(open_log: Open, tmp_path: Path, nothing_read: None) -> None:
    with open_log(TrainState()) as log:
        _ask("store")
        log.evaluation(TrainState(step=1), None, {"top1": 0.5, "top5": 1.0, "images": 2, "unreadable": 0}, 1.0)
        _take_step(log, 2)
    (record,) = records_of(tmp_path)
    assert record["storage"]["requests"] == 1


def _ranks_that_read(topology: Topology, folder: Path) -> None:
    """Rank 0 asks two hosts; rank 1 asks another one, has a cache, and begins only with the third step."""
    with connect(topology, timeout_s=60) as ranks, _open(folder, ranks, TrainState(), "log.every={steps: 2}") as log:
        if ranks.is_main:
            _ask("a", num_bytes=1_000_000)
            _ask("b", num_bytes=1_000_000, retry=True)
        _take_step(log, 1)
        _take_step(log, 2)
        if not ranks.is_main:
            cache = NodeCache(folder / "cache", 10**6)
            shard_set._opened_caches.append(cache)
            cache.count(CacheCounters(hits=3, misses=1))
            _ask("c", num_bytes=4_000_000, error="500")
        _take_step(log, 3)
        if ranks.is_main:
            _ask("a", num_bytes=2_000_000)
        _take_step(log, 4)


def test_records_sum_over_all_ranks(tmp_path: Path) -> None:
    run_ranks(_ranks_that_read, 2, tmp_path)
    first, second, fourth = records_of(tmp_path)
    assert [record["step"] for record in (first, second, fourth)] == [1, 2, 4]
    assert first["storage"] == {"requests": 2, "retries": 1, "timeouts": 0, "errors": 0, "mb": 2}
    assert second["storage"] == {"requests": 0, "retries": 0, "timeouts": 0, "errors": 0, "mb": 0}
    assert fourth["storage"] == {"requests": 2, "retries": 0, "timeouts": 0, "errors": 1, "mb": 6}
    assert "cache" not in second
    assert fourth["cache"] == {"hits": 3, "misses": 1}
