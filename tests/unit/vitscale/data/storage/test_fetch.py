"""Reading from a server that misbehaves on purpose: the bytes are right, or the error says who is at fault."""

from __future__ import annotations

import errno
import logging
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import bad_http
from tests.helpers.bad_http import Answer, BadServer, bad_server
from vitscale.config.schema import StorageConfig
from vitscale.data.storage import fetch, ranges, transfer
from vitscale.data.storage.fetch import open_files
from vitscale.data.storage.files import ShardFiles, StorageSilentError
from vitscale.data.storage.transfer import HostCounters, Patience, host_counters

DATA = random.Random(0).randbytes(100_000)
QUICK = StorageConfig(request_timeout_s=0.3, total_timeout_s=1)
HASTY = StorageConfig(request_timeout_s=0.3, total_timeout_s=20)
PATIENT = StorageConfig(request_timeout_s=5, total_timeout_s=20)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(transfer, "_hosts", {})  # ports of earlier servers come again
    monkeypatch.setattr(transfer, "LONGEST_PAUSE_S", 0.1)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[BadServer]:
    with bad_server() as running:
        running.files["a.tar"] = DATA
        yield running


@pytest.fixture
def files(server: BadServer) -> ShardFiles:
    return open_files(server.url, PATIENT)


def counters(server: BadServer) -> HostCounters:
    return host_counters()[server.host]


# What comes


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 100_000), (512, 1000), (99_999, 1), (7, 0)])
def test_a_range_is_what_stands_in_the_file(files: ShardFiles, start: int, length: int) -> None:
    assert files.read("a.tar", start, length) == DATA[start : start + length]


@pytest.mark.parametrize("answer", [bad_http.ranged, bad_http.whole, bad_http.whole_in_chunks])
@pytest.mark.parametrize(("start", "length"), [(99_990, 100), (100_000, 1), (100_001, 5), (0, 200_000)])
def test_only_what_there_is_comes_of_a_file_that_is_too_short(
    server: BadServer, files: ShardFiles, answer: Answer, start: int, length: int
) -> None:
    server.rule = lambda number: answer
    assert files.read("a.tar", start, length) == DATA[start : start + length]


@pytest.mark.parametrize("num_bytes", [0, 1, 100_000])
@pytest.mark.parametrize("answer", [bad_http.ranged, bad_http.whole, bad_http.whole_in_chunks])
def test_a_whole_file_and_its_size(server: BadServer, files: ShardFiles, answer: Answer, num_bytes: int) -> None:
    server.files["b"] = DATA[:num_bytes]
    server.rule = lambda number: answer
    assert files.read_all("b") == DATA[:num_bytes]
    assert files.size("b") == num_bytes


def test_a_missing_file_is_missing_at_once(server: BadServer, files: ShardFiles) -> None:
    assert files.size("none.tar") is None
    for read in (lambda: files.read("none.tar", 0, 5), lambda: files.read_all("none.tar")):
        with pytest.raises(FileNotFoundError, match="the server answered 404 Not Found") as raised:
            read()
        assert raised.value.filename == f"{server.url}/none.tar"
    assert len(server.requests) == 3


def test_a_large_range_comes_in_one_request(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PIECE_BYTES", 999)
    assert open_files(server.url, PATIENT).read("a.tar", 10, 90_000) == DATA[10:90_010]
    assert server.asked_for("a.tar") == ["bytes=10-90009"]


def test_names_are_parts_of_the_path_and_nothing_else(server: BadServer) -> None:
    name = "a b/../#1?x=y%20&ü.tar"
    server.files[name] = b"odd"
    assert open_files(f"{server.url}/", PATIENT).read_all(name) == b"odd"


def test_threads_read_at_the_same_time(server: BadServer) -> None:
    """All of them wait in the server at once, which shows that none waits for another."""
    everybody = threading.Barrier(64, timeout=20)

    def together(handler: bad_http.Handler, data: bytes | None) -> None:
        everybody.wait()
        bad_http.ranged(handler, data)

    files = open_files(server.url, PATIENT)
    server.script = [together] * 64
    with ThreadPoolExecutor(64) as pool:
        came = list(pool.map(lambda i: files.read("a.tar", i, 1000 + i), range(64)))
        assert came == [DATA[i : 1000 + 2 * i] for i in range(64)]
        again = list(pool.map(lambda i: files.read("a.tar", 3 * i, 500), range(1000)))
    assert again == [DATA[3 * i : 3 * i + 500] for i in range(1000)]


def test_connections_serve_again_until_they_are_stale(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    dial = ranges._dial
    monkeypatch.setattr(ranges, "_dial", lambda *args: (opened.append(args[0]), dial(*args))[1])
    files = open_files(server.url, PATIENT)
    for _ in range(5):
        files.read("a.tar", 0, 100)
    assert len(opened) == 1
    server.hang_up()
    time.sleep(0.05)
    files.read("a.tar", 0, 100)
    assert len(opened) == 2
    monkeypatch.setattr(ranges, "IDLE_S", 0)
    files.read("a.tar", 0, 100)
    assert len(opened) == 3
    assert counters(server).errors == {}


def test_a_server_without_ranges_is_told_of_once(
    server: BadServer, files: ShardFiles, caplog: pytest.LogCaptureFixture
) -> None:
    server.rule = lambda number: bad_http.whole
    with caplog.at_level(logging.WARNING):
        for start in (0, 10, 20):
            files.read("a.tar", start, 10)
    (line,) = caplog.messages
    assert line.startswith(f"{server.url}: the server knows no ranges")
    assert "copy the set" in line


# What passes


@pytest.mark.parametrize("code", [500, 502, 503, 504, 408, 429])
def test_a_passing_status_is_tried_again(server: BadServer, files: ShardFiles, code: int) -> None:
    server.script = [bad_http.status(code)] * 3
    assert files.read("a.tar", 5, 5000) == DATA[5:5005]
    assert counters(server).requests == 4
    assert counters(server).retries == 3
    assert counters(server).errors == {str(code): 3}


def test_a_server_may_say_when_to_come_again(server: BadServer, files: ShardFiles) -> None:
    times: list[float] = []
    server.rule = lambda number: (times.append(time.monotonic()), bad_http.ranged)[1]
    server.script = [bad_http.status(503, Retry_After="1")]
    began = time.monotonic()
    files.read("a.tar", 0, 1)
    assert times[0] - began >= 1


def test_a_broken_transfer_goes_on_where_it_broke(server: BadServer, files: ShardFiles) -> None:
    server.script = [bad_http.cut(40_000), bad_http.status(500), bad_http.cut(50_000)]
    assert files.read("a.tar", 1000, 99_000) == DATA[1000:]
    assert server.asked_for("a.tar") == ["bytes=1000-99999", *["bytes=41000-99999"] * 2, "bytes=91000-99999"]
    assert counters(server).bytes == 99_000


def test_of_a_whole_file_only_the_rest_is_asked_for_again(server: BadServer, files: ShardFiles) -> None:
    server.script = [bad_http.cut(40_000)]
    assert files.read_all("a.tar") == DATA
    assert server.asked_for("a.tar") == ["bytes=0-", "bytes=40000-"]


def test_a_server_that_cuts_every_third_answer(server: BadServer, files: ShardFiles) -> None:
    server.rule = lambda number: bad_http.cut(300) if number % 3 == 2 else bad_http.ranged
    for start in range(0, 90_000, 9_000):
        assert files.read("a.tar", start, 9_000) == DATA[start : start + 9_000]


def test_a_server_without_ranges_that_hangs_up_is_not_taken_for_a_short_file(server: BadServer) -> None:
    def cut_whole(handler: bad_http.Handler, data: bytes | None) -> None:
        assert data is not None
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data[:20_000])
        handler.break_off()

    for start in (0, 10_000, 50_000):
        server.script, server.rule = [cut_whole], lambda number: bad_http.whole
        assert open_files(server.url, PATIENT).read("a.tar", start, 30_000) == DATA[start : start + 30_000]


@pytest.mark.parametrize(
    "answer",
    [
        bad_http.wrong_range,
        bad_http.no_http,
        bad_http.cut(0),
        bad_http.short(0),
        bad_http.status(206),
        bad_http.status(416, Content_Range="bytes */100000"),
    ],
)
def test_an_answer_that_cannot_be_right_is_not_believed(server: BadServer, files: ShardFiles, answer: Answer) -> None:
    server.script = [answer, answer]
    assert files.read("a.tar", 10, 3000) == DATA[10:3010]
    assert sum(counters(server).errors.values()) == 2


def test_a_silent_server_is_asked_again(server: BadServer) -> None:
    server.script = [bad_http.silent]
    assert open_files(server.url, HASTY).read("a.tar", 1, 2) == DATA[1:3]
    assert counters(server).timeouts == 1


def test_bytes_that_came_before_a_hang_are_kept(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(handler: bad_http.Handler, data: bytes | None) -> None:
        assert data is not None
        handler.wfile.write(handler.start_range(data)[:60_000])
        handler.wfile.flush()
        bad_http.silent(handler, data)

    monkeypatch.setattr(ranges, "PIECE_BYTES", 25_000)
    server.script = [hang]
    assert open_files(server.url, HASTY).read_all("a.tar") == DATA
    assert server.asked_for("a.tar") == ["bytes=0-", "bytes=50000-"]


def test_an_outage_that_ends_is_survived(server: BadServer, files: ShardFiles) -> None:
    files.read("a.tar", 0, 10)
    server.stop()
    back = threading.Timer(0.5, server.start)
    back.start()
    assert files.read("a.tar", 20, 5000) == DATA[20:5020]
    back.join()
    assert counters(server).errors["ConnectionRefusedError"] > 0


GOOD = st.sampled_from([bad_http.ranged, bad_http.whole, bad_http.whole_in_chunks])
FAULTS = st.one_of(
    GOOD,
    st.integers(0, 5000).map(bad_http.cut),
    st.integers(1, 5000).map(bad_http.short),
    st.sampled_from([bad_http.status(500), bad_http.status(429), bad_http.wrong_range, bad_http.no_http]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(FAULTS, max_size=5),
    good=GOOD,
    start=st.integers(0, 12_000),
    length=st.integers(0, 12_000),
    piece=st.sampled_from([100, 4096, 1 << 20]),
)
def test_whatever_the_server_does_the_bytes_are_right(
    server: BadServer, script: list[Answer], good: Answer, start: int, length: int, piece: int
) -> None:
    server.files["b.tar"] = data = DATA[:10_000]
    server.script, server.rule = script, lambda number: good
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "PIECE_BYTES", piece)
        # A fault that has no bytes to spoil fails in the server, which is one more way to hang up.
        assert open_files(server.url, PATIENT).read("b.tar", start, length) == data[start : start + length]


# What does not pass


@pytest.mark.parametrize("code", [401, 403])
def test_a_file_that_is_refused_is_at_fault_alone(server: BadServer, files: ShardFiles, code: int) -> None:
    server.rule = lambda number: bad_http.status(code) if server.requests[-1].name == "a.tar" else bad_http.ranged
    with pytest.raises(PermissionError, match=f"the server answered {code}") as raised:
        files.read("a.tar", 0, 10)
    assert str(raised.value.filename) == f"{server.url}/a.tar"
    assert len(server.asked_for("a.tar")) == 1


def test_a_storage_that_refuses_everything_stops_the_run(server: BadServer, files: ShardFiles) -> None:
    files.read("a.tar", 0, 10)
    server.rule = lambda number: bad_http.status(403)
    with pytest.raises(
        StorageSilentError, match=r"the storage refuses \(the server answered 403 Forbidden\)"
    ) as raised:
        files.read("b.tar", 0, 10)
    assert server.url in str(raised.value)
    assert [request.name for request in server.requests] == ["a.tar", "b.tar", "a.tar"]


def test_an_index_that_is_refused_is_an_error_of_its_own(server: BadServer, files: ShardFiles) -> None:
    server.rule = lambda number: bad_http.status(403)
    with pytest.raises(PermissionError):
        files.read_all("index.json")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer", [bad_http.status(400), bad_http.status(501), bad_http.status(301), bad_http.compressed]
)
def test_what_cannot_get_better_is_asked_once(server: BadServer, files: ShardFiles, answer: Answer) -> None:
    server.script = [answer]
    with pytest.raises(OSError, match="the server"):
        files.read("a.tar", 0, 10)
    assert server.asked_for("a.tar") == ["bytes=0-9"]


@pytest.mark.parametrize(
    "answer", [bad_http.silent, bad_http.drip(), bad_http.drip(head=True)], ids=["silent", "drips", "drips its head"]
)
def test_a_file_that_never_comes_is_given_up_in_time(server: BadServer, answer: Answer) -> None:
    server.rule = lambda number: answer if server.requests[-1].name == "a.tar" else bad_http.ranged
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"given up after [12] s: no whole answer in 0.3 s") as raised:
        open_files(server.url, QUICK).read("a.tar", 0, 10_000)
    assert raised.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - began < 10  # and not for the half minute of the server's silence
    assert len(server.asked_for("a.tar")) > 1


def test_a_file_that_was_given_up_gets_a_short_look_only(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other windows must not wait as long again, one after another."""
    monkeypatch.setattr("vitscale.data.storage.files.SHORT_LOOK_S", 0.1)
    files = open_files(server.url, QUICK)
    failing = bad_http.status(500)
    server.rule = lambda _: failing if server.requests[-1].name == "a.tar" else bad_http.ranged
    with pytest.raises(OSError, match="given up after"):
        files.read("a.tar", 0, 10)
    tried = len(server.asked_for("a.tar"))
    assert tried > 2
    with pytest.raises(OSError, match="given up after"):
        files.read("a.tar", 500, 10)
    assert 0 < len(server.asked_for("a.tar")) - tried < tried
    # Nothing is held against it once it can be read.
    server.rule = lambda _: bad_http.ranged
    assert files.read("a.tar", 0, 10) == DATA[:10]
    server.script = [failing] * 3
    assert files.read("a.tar", 0, 10) == DATA[:10]


def test_a_file_that_always_fails_is_at_fault_alone(server: BadServer) -> None:
    server.rule = lambda number: bad_http.status(500) if server.requests[-1].name == "a.tar" else bad_http.ranged
    with pytest.raises(OSError, match=r"given up after \d s: the server answered 500 Internal Server Error") as raised:
        open_files(server.url, QUICK).read("a.tar", 0, 10)
    assert not isinstance(raised.value, StorageSilentError)
    assert len(server.asked_for("index.json")) == 1


@pytest.mark.parametrize("name", ["a.tar", "index.json"])
def test_an_outage_stops_the_run(server: BadServer, name: str) -> None:
    files = open_files(server.url, QUICK)
    server.stop()
    with pytest.raises(StorageSilentError) as raised:
        files.read_all(name)
    text = str(raised.value)
    assert text.startswith(f"{server.url}: no file could be read for ")
    assert "(Connection refused); see that the storage is up and the network leads to it" in text
    assert text.endswith("; then give the same command again")


def test_a_storage_that_fell_silent_is_probed_once_and_shortly(
    server: BadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PROBE_S", 0.2)
    server.rule = lambda number: bad_http.silent
    with pytest.raises(StorageSilentError, match=r"no file could be read for [12] s \(no whole answer in 0.5 s\)"):
        open_files(server.url, StorageConfig(request_timeout_s=0.5, total_timeout_s=1.2)).read("a.tar", 0, 10)
    assert server.asked_for("index.json") == ["bytes=0-0"]


def test_a_last_attempt_without_time_does_not_hide_what_is_wrong(server: BadServer) -> None:
    server.rule = lambda number: bad_http.silent
    server.script = [bad_http.status(500, b"<Code>Broken</Code>", Retry_After="1")]
    with pytest.raises(StorageSilentError, match="500 Internal Server Error: Broken"):
        open_files(server.url, StorageConfig(request_timeout_s=5, total_timeout_s=1.3)).read_all("index.json")
    assert len(server.requests) == 2


def test_tars_without_an_index_beside_them_can_be_at_fault(server: BadServer) -> None:
    del server.files["index.json"]
    server.rule = lambda number: bad_http.status(500) if server.requests[-1].name == "a.tar" else bad_http.ranged
    with pytest.raises(OSError, match="given up"):
        open_files(server.url, QUICK).read("a.tar", 0, 10)


def test_a_name_that_nobody_knows_is_told_before_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetch, "TELL_AFTER_S", 0)
    url = "http://nowhere.invalid/set"
    with caplog.at_level(logging.WARNING), pytest.raises(StorageSilentError, match="address of nowhere"):
        open_files(url, QUICK).read_all("index.json")
    (line,) = caplog.messages
    assert line.startswith(f"{url}/index.json: not read for 0 s (the address of nowhere.invalid cannot be found")
    assert line.endswith("; it is tried for 1 s")


# What is counted, and how long pauses are


def test_requests_are_counted_by_host(server: BadServer, files: ShardFiles) -> None:
    server.script = [bad_http.cut(100), bad_http.status(500), bad_http.ranged, bad_http.status(404)]
    files.read("a.tar", 0, 1000)
    assert files.size("b.tar") is None
    copy = counters(server)
    assert (copy.requests, copy.retries, copy.timeouts, copy.bytes) == (4, 2, 0, 1000)
    assert copy.errors == {"ConnectionResetError": 1, "500": 1, "404": 1}
    assert copy.seconds > 0
    files.read("a.tar", 0, 1000)
    assert copy.requests == 4
    assert counters(server).requests == 5


def test_counting_is_safe_in_threads() -> None:
    def record(number: int) -> None:
        for _ in range(500):
            transfer.record_request("many", num_bytes=2, seconds=0.5, retry=False, error="500", timeout=True)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(record, range(8)))
    finally:
        sys.setswitchinterval(switch)
    assert host_counters()["many"] == HostCounters(4000, 0, 4000, {"500": 4000}, 8000, 2000.0)


def test_pauses_grow_and_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.25)
    monkeypatch.setattr(transfer, "LONGEST_PAUSE_S", 15.0)
    slept: list[float] = []
    monkeypatch.setattr(transfer.time, "sleep", slept.append)
    for _ in range(300):
        patience = Patience(StorageConfig(total_timeout_s=1e9))
        assert all(patience.pause(progress=False) for _ in range(10))
    by_attempt = [slept[i::10] for i in range(10)]
    for attempt, pauses in enumerate(by_attempt):
        most = min(15.0, 0.5 * 2**attempt)
        assert max(pauses) <= most
        assert most * 0.4 < sum(pauses) / 300 < most * 0.6
    slept.clear()
    assert patience.pause(progress=True)
    assert slept[0] <= 0.25
    assert not Patience(StorageConfig(total_timeout_s=1)).pause(progress=True, at_least_s=1)


def test_pauses_draw_nothing_from_the_seeded_generator(server: BadServer, files: ShardFiles) -> None:
    random.seed(1)
    before = random.getstate()
    server.script = [bad_http.status(500)]
    files.read("a.tar", 0, 1)
    assert random.getstate() == before
