"""What the measurement of a loader tells: where the time went, what a GPU needs, and what the storage did."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.bad_http import BadServer, bad_server, ranged, status
from tests.helpers.runs import CONFIG, TINY
from tests.helpers.shardset import folder_of, make_shardset, spoil_image
from vitscale.config.loader import load_config
from vitscale.data.stages import StageSeconds
from vitscale.data.storage import transfer
from vitscale.data.storage.node_cache import CacheCounters
from vitscale.data.storage.transfer import HostCounters
from vitscale.train.loader_bench import LoaderReport, bench_loader

# 100 images/s of 20 ms of processor time each, of 10 s with 4 threads.
REPORT = LoaderReport(
    images=1000,
    seconds=10.0,
    first_batch_s=0.5,
    cpu_s=20.0,
    bytes_per_image=100_000,
    stages=StageSeconds(read=1.6, decode=28.0, augment=6.8, hand_over=0.2),
    threads=4,
    loading_s=12.5,
)
READING = dataclasses.replace(REPORT, stages=StageSeconds(read=30.0, decode=5.0, augment=1.0))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with bad_server() as running:
        yield running


def line_of(report: LoaderReport, name: str) -> str:
    (line,) = (line for line in report.describe([]) if line.startswith(f"{name}  "))
    return line.removeprefix(name).strip()


def need(report: LoaderReport, rate: float) -> str:
    return report.describe([rate])[-1].partition("; ")[2]


def bench(train: str, *overrides: str, world_size: int = 1) -> tuple[LoaderReport, list[str]]:
    said: list[str] = []
    config = load_config(CONFIG, [*TINY, f"data.train={train}", *overrides])
    return bench_loader(config, world_size=world_size, seconds=0.1, say=said.append), said


def test_shares_of_the_threads_and_of_the_main_thread() -> None:
    assert line_of(REPORT, "threads") == "waiting for reads 4%, decoding 70%, augmenting 17%, idle 9%"
    assert line_of(REPORT, "main thread") == "handing over 2%"


@given(st.tuples(*[st.floats(0, 60)] * 3), st.integers(1, 7))
def test_shares_of_the_threads_sum_to_all_of_their_time(seconds: tuple[float, float, float], threads: int) -> None:
    report = dataclasses.replace(REPORT, stages=StageSeconds(*seconds), threads=threads)
    percents = [int(number) for number in re.findall(r"(-?\d+)%", line_of(report, "threads"))]
    assert sum(percents) == 100
    total = max(sum(seconds), 10.0 * threads)
    idle = total - sum(seconds)
    exact = [100 * part / total for part in (*seconds, idle)]
    assert all(abs(shown - share) <= 1 + 1e-6 for shown, share in zip(percents, exact, strict=True))


def test_more_workers_where_processors_are_the_limit() -> None:
    assert need(REPORT, 100) == "this loader is enough"
    assert need(REPORT, 400) == "data.workers=8"


@given(st.floats(1, 10_000), st.integers(1, 64))
def test_never_as_many_workers_as_there_are(rate: float, threads: int) -> None:
    text = need(dataclasses.replace(REPORT, threads=threads), rate)
    proposed = re.fullmatch(r"data\.workers=(\d+)", text)
    assert text == "this loader is enough" if rate <= 100 else proposed or text.startswith("more cores: ")
    assert proposed is None or int(proposed[1]) > threads


@pytest.mark.parametrize("threads", [8, 16])
def test_more_cores_where_more_threads_would_share_the_same_ones(threads: int) -> None:
    report = dataclasses.replace(REPORT, threads=threads)
    assert need(report, 400) == f"more cores: this machine gave 100 images/s with data.workers={threads}"


def test_workers_do_not_help_slow_reads() -> None:
    assert need(READING, 100) == "this loader is enough"
    assert need(READING, 400) == "reads are too slow: needs 40.0 MB/s, this storage gave 10.0 MB/s"


def test_hosts_and_cache_are_told_of() -> None:
    hosts = {
        "s3://b": HostCounters(1200, 3, 1, {"TimeoutError": 1, "503": 2}, 25_000_000, 60.0),
        "well": HostCounters(1, 0, 0, {}, 0, 0.1),
    }
    report = dataclasses.replace(REPORT, hosts=hosts, cache=CacheCounters(hits=75, misses=25, evicted_files=6))
    lines = report.describe([])
    assert (
        "storage      s3://b: 1,200 requests, 3 retries, 1 time-outs, errors: 2 x 503, 1 x TimeoutError; 2.0 MB/s"
        in (lines)
    )
    assert "storage      well: 1 requests, 0 retries, 0 time-outs, errors: none; 0.0 MB/s" in lines
    assert "cache        answered 75% of 100 reads; 6 files evicted" in lines
    assert not any(line.startswith(("storage", "cache")) for line in REPORT.describe([]))


def test_a_local_set_has_neither_hosts_nor_epochs(tmp_path: Path) -> None:
    local = make_shardset(tmp_path / "local", [40, 40])
    report, said = bench(local.location)
    assert report.images > 0
    assert (report.hosts, report.quarantined) == ({}, 0)
    assert [line[:12].strip() for line in said] == ["global batch", "data", "shuffle"]


def test_requests_errors_and_cache_of_a_remote_set(server: BadServer, tmp_path: Path) -> None:
    local = make_shardset(tmp_path / "remote", [40, 40])
    server.files = {path.name: path.read_bytes() for path in folder_of(local).iterdir()}
    # After the index and the sizes of two tars and their member indexes.
    server.rule = lambda number: status(503) if number == 7 else ranged
    report, _ = bench(server.url, f"data.storage.cache={tmp_path / 'cache'}")
    (host,) = report.hosts.values()
    assert list(report.hosts) == [server.host]
    assert (host.retries, host.errors) == (1, {"503": 1})
    # All that was asked before the loader began is left out, and what is still under way.
    assert 0 < host.requests <= len(server.requests) - 5
    assert report.cache is not None
    assert report.cache.hits > 0 < report.cache.misses


def test_a_mixture_is_shown_without_epochs(tmp_path: Path) -> None:
    first = make_shardset(tmp_path / "first", [40])
    second = make_shardset(tmp_path / "second", [60], key=lambda n: f"other_{n}")
    _, said = bench(f"{{{first.location}: 3, {second.location}: 1}}")
    rows = sorted(line.strip() for line in said if " of each batch " in line)
    assert rows == [
        f"{first.location}: 40 images, 12 of each batch (75.00%)",
        f"{second.location}: 60 images, 4 of each batch (25.00%)",
    ]
    assert not any("epochs" in line for line in said)


@pytest.mark.parametrize("allowed", [0, 10])
def test_more_bad_samples_than_a_run_tolerates(tmp_path: Path, allowed: int) -> None:
    local = make_shardset(tmp_path / "local", [64])
    spoil_image(local, 5)
    report, _ = bench(local.location, f"data.max_bad_samples={allowed}", "data.max_bad_share=0.5")
    assert report.quarantined > 0
    text = f"{report.quarantined:,} were replaced"
    if not allowed:
        text += "; more than data.max_bad_samples and data.max_bad_share allow: a run would stop"
    assert line_of(report, "bad samples") == text
