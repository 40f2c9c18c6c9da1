"""Several processes on one set, whatever happens to them, leave what one undisturbed process leaves."""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers.own_sources import LOG_NAME, TOGETHER_NAME
from tests.helpers.writing import (
    Identity,
    all_rows,
    children,
    content,
    identity,
    lines,
    make_images,
    plan_of,
    recorded,
    resize,
    spec_of,
    spoil,
    start_writing,
    wait_for,
)
from vitscale.data.manifest import read_manifest
from vitscale.data.shard_set import check_files
from vitscale.errors import DataError, Interrupted
from vitscale_shards.place import LocalPlace
from vitscale_shards.planning.planner import make_plans
from vitscale_shards.planning.settings import PlanSettings
from vitscale_shards.sources import SourceSpec
from vitscale_shards.sources.folder import ImageFolder
from vitscale_shards.writing import workers as workers_module
from vitscale_shards.writing.workers import write_sets
from vitscale_shards.writing.writer import write_set

IMAGES, PER_SHARD = 120, 10


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    return make_images(tmp_path_factory.mktemp("source") / "images", IMAGES)


@pytest.fixture(scope="module")
def whole(source: ImageFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tars and their indexes after an undisturbed writing by one process."""
    out = tmp_path_factory.mktemp("whole")
    write_set(plan_of(source, out, PER_SHARD), source)
    return tars(out)


def tars(out: Path) -> dict[str, bytes]:
    """All files but the plan, which tells how the source was opened."""
    return {path: data for path, data in content(out).items() if not path.endswith("plan.parquet")}


@pytest.fixture(autouse=True)
def read_log(source: ImageFolder) -> Path:
    """What :class:`tests.helpers.own_sources.Logged` tells, empty at first."""
    log = source.folder.parent / LOG_NAME
    clear(log, together=1)
    return log


def clear(log: Path, *, together: int) -> None:
    """Empty the log; images are then read when so many processes are at it."""
    log.write_text("")
    log.with_name(TOGETHER_NAME).write_text(str(together))


def reads(log: Path) -> list[tuple[int, str]]:
    """Process and image."""
    pairs = (line.split() for line in log.read_text().splitlines())
    return [(int(pid), path) for pid, path in pairs]


def workers_of_this_process() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def assert_nothing_runs() -> None:
    assert not workers_of_this_process()


def listener() -> tuple[list[tuple[str, int, int]], Callable[[str, int, int], None]]:
    """Reports of progress, and what takes them."""
    told: list[tuple[str, int, int]] = []
    return told, lambda split, done, total: told.append((split, done, total))


def in_background(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_three_workers_write_what_one_does(
    source: ImageFolder, whole: dict[str, bytes], tmp_path: Path, read_log: Path
) -> None:
    plan = plan_of(source, tmp_path, PER_SHARD, own="Logged")
    told, report = listener()
    clear(read_log, together=3)
    write_sets([plan], spec_of(source, "Logged"), workers=3, report=report, warn=pytest.fail)
    assert tars(tmp_path) == whole
    who = reads(read_log)
    assert Counter(path for _, path in who) == Counter(row.path for row in all_rows(plan))
    assert len({pid for pid, _ in who}) == 3
    assert os.getpid() not in {pid for pid, _ in who}
    assert {(split, total) for split, _, total in told} == {("train", IMAGES)}
    done = [done for _, done, _ in told]
    assert (done, done[-1]) == (sorted(done), IMAGES)


def test_sets_are_written_one_after_the_other(source: ImageFolder, tmp_path: Path) -> None:
    settings = PlanSettings(split="train=0.8,val=0.2", samples_per_shard=PER_SHARD)
    told, report = listener()
    for out, workers in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        plans = make_plans(source, spec_of(source).to_json(), settings, LocalPlace(out))
        write_sets(plans, spec_of(source), workers=workers, report=report)
        last = {now[0]: now for now in told}
        assert list(last.values()) == [(p.head.split, p.num_samples, p.num_samples) for p in plans]
        assert [split for split, _, _ in told] == sorted(split for split, _, _ in told)
        told.clear()
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_two_commands_at_a_time_share_the_work(
    source: ImageFolder, whole: dict[str, bytes], tmp_path: Path, read_log: Path
) -> None:
    plan = plan_of(source, tmp_path, PER_SHARD, own="Logged")
    clear(read_log, together=4)
    both = [start_writing(tmp_path, workers=2) for _ in range(2)]
    for process in both:
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
        assert output.splitlines()[-1] == f"{IMAGES} {IMAGES}"
    assert tars(tmp_path) == whole
    assert Counter(path for _, path in reads(read_log)) == Counter(row.path for row in all_rows(plan))


def kill_at_random(log: Path, folder: Path, seed: int, kills: int) -> Callable[[], Identity]:
    """Kill workers of this process at random moments of their work. The result: all finished shards seen then."""
    chance, finished = random.Random(seed), {}

    def kill() -> None:
        for images in sorted(chance.sample(range(IMAGES - 3 * PER_SHARD), kills)):
            wait_for(lambda images=images: len(reads(log)) > images)  # type: ignore[misc]
            finished.update(recorded(folder))
            os.kill(chance.choice(workers_of_this_process()), signal.SIGKILL)

    thread = in_background(kill)

    def seen() -> Identity:
        thread.join()
        return finished

    return seen


@pytest.mark.parametrize("seed", range(3))
def test_workers_killed_at_random_moments_are_made_up_for(
    source: ImageFolder, whole: dict[str, bytes], tmp_path: Path, read_log: Path, seed: int
) -> None:
    plan = plan_of(source, tmp_path, PER_SHARD, own="Logged")
    warnings: list[str] = []
    clear(read_log, together=3)
    finished = kill_at_random(read_log, tmp_path / "train", seed, kills=2)
    write_sets([plan], spec_of(source, "Logged"), workers=3, warn=warnings.append)
    assert tars(tmp_path) == whole
    assert finished().items() <= identity(tmp_path / "train").items()
    assert [text.partition("; ")[2] for text in warnings] == ["the others take over its shard"] * 2
    assert all("ended with exit code -9" in text for text in warnings)
    assert IMAGES <= len(reads(read_log)) <= IMAGES + 2 * PER_SHARD


@pytest.mark.parametrize("seed", range(2))
def test_after_the_command_is_killed_its_workers_end_and_the_same_call_goes_on(
    source: ImageFolder, whole: dict[str, bytes], tmp_path: Path, read_log: Path, seed: int
) -> None:
    plan = plan_of(source, tmp_path, PER_SHARD, own="Sluggish")
    folder, chance = tmp_path / "train", random.Random(seed)
    clear(read_log, together=2)
    with start_writing(tmp_path, workers=2) as process:
        images = chance.randrange(IMAGES // 2)
        wait_for(lambda: len(reads(read_log)) > images)
        workers = children(process.pid)
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert (len(workers), alive) == (2, [])
    assert len(reads(read_log)) < IMAGES
    assert not list(folder.rglob("*.tmp"))
    before = recorded(folder)
    clear(read_log, together=1)
    write_sets([plan], spec_of(source, "Logged"))
    assert tars(tmp_path) == whole
    assert before.items() <= identity(folder).items()
    assert len(reads(read_log)) == IMAGES - PER_SHARD * len(before)


def test_all_workers_killed_is_an_error(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path, PER_SHARD, own="Stuck")
    claims = tmp_path / "train" / ".progress"
    warnings: list[str] = []

    def kill_all() -> None:
        wait_for(lambda: len(list(claims.glob("*.tar.claim"))) == 2)
        for pid in workers_of_this_process():
            os.kill(pid, signal.SIGKILL)

    thread = in_background(kill_all)
    with pytest.raises(DataError, match=r"all 2 workers were killed \(exit code -9; .*\); finished shards are kept"):
        write_sets([plan], spec_of(source, "Stuck"), workers=2, warn=warnings.append)
    thread.join()
    assert len(warnings) == 2
    assert_nothing_runs()


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ("Broken", r"(?s)a worker failed, which is a bug .*Traceback.*in fail\n.*ZeroDivisionError: a mistake in a"),
        ("Talkative", r"(?s)a worker failed, .*xxx"),
        ("Contradictory", r"\Athe source is gone; mount it again\Z"),
        ("Impolite", r"\Aclass0/0\.jpg: cannot be read: No such file or directory; bad image 1, allowed are 0"),
    ],
)
def test_what_stops_one_worker_stops_all(
    source: ImageFolder, whole: dict[str, bytes], tmp_path: Path, own: str, words: str
) -> None:
    plan = plan_of(source, tmp_path, PER_SHARD, own=own)
    with pytest.raises(DataError, match=words):
        write_sets([plan], spec_of(source, own), workers=2, warn=pytest.fail)
    assert_nothing_runs()
    folder = tmp_path / "train"
    assert not list(folder.rglob("*.tmp"))  # those that were stopped leave nothing half-written
    assert not list(folder.rglob("*.claim"))
    before = recorded(folder)
    write_sets([plan], spec_of(source))
    assert tars(tmp_path) == whole
    assert before.items() <= identity(folder).items()


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_asked_to_stop_it_stops_and_goes_on(
    source: ImageFolder, whole: dict[str, bytes], tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    plan = plan_of(source, tmp_path, PER_SHARD, own="Slow")
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def stop(split: str, done: int, total: int) -> None:
        if done > total // 4:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=f"stopped on {number.name}; finished shards are kept") as caught:
        write_sets([plan], spec_of(source, "Slow"), workers=workers, report=stop)
    assert caught.value.exit_code == 75
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert_nothing_runs()
    folder = tmp_path / "train"
    assert not list(folder.rglob("*.tmp"))
    assert not list(folder.rglob("*.claim"))
    before = recorded(folder)
    assert before
    write_sets([plan], spec_of(source))
    assert tars(tmp_path) == whole
    assert before.items() <= identity(folder).items()


def test_a_group_that_gets_ctrl_c_ends_with_one_line(source: ImageFolder, tmp_path: Path, read_log: Path) -> None:
    plan_of(source, tmp_path, PER_SHARD, own="Sluggish")
    with start_writing(tmp_path, workers=2) as process:
        wait_for(lambda: len(reads(read_log)) > 10)
        workers = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (
        75,
        "stopped on SIGINT; finished shards are kept and the same command goes on\n",
    )
    assert not any(worker.is_running() for worker in workers)


def test_workers_leave_ctrl_c_to_their_parent_from_their_first_moment(source: ImageFolder, tmp_path: Path) -> None:
    plan_of(source, tmp_path, PER_SHARD)
    with start_writing(tmp_path, workers=2) as process:
        wait_for(lambda: len(children(process.pid)) == 2)
        while process.poll() is None:
            for worker in children(process.pid):
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(signal.SIGINT)
            time.sleep(0.05)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_a_worker_that_does_not_end_when_asked_is_killed(
    source: ImageFolder, tmp_path: Path, read_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "GRACE_S", 0.2)
    plan = plan_of(source, tmp_path, PER_SHARD, own="Deaf")

    def stop(split: str, done: int, total: int) -> None:
        if len(reads(read_log)) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        write_sets([plan], spec_of(source, "Deaf"), workers=2, report=stop)
    assert_nothing_runs()


def test_the_budget_of_bad_images_is_that_of_all_workers(tmp_path: Path) -> None:
    source = make_images(tmp_path / "images", 60)
    plan = plan_of(source, tmp_path / "out", PER_SHARD)
    bad = spoil(source, [plan.rows(shard)[0] for shard in range(6)])
    with pytest.raises(DataError, match=r"bad image \d, allowed are 3 \(all are listed in .*failures.jsonl\)"):
        write_sets([plan], spec_of(source), workers=3, max_failures=3)
    write_sets([plan], spec_of(source), max_failures=6)
    listed = lines(tmp_path / "out" / "train" / "failures.jsonl")
    assert [(line["path"], line["shard"]) for line in listed] == [
        (row.path, plan.shard_name(shard)) for shard, row in enumerate(bad)
    ]
    manifest = read_manifest(tmp_path / "out" / "train")
    check_files(manifest)
    assert manifest.num_samples == 54


def test_workers_on_a_full_disk_leave_nothing_half_written(
    source: ImageFolder,
    whole: dict[str, bytes],
    small_disk: Path,
) -> None:
    out = small_disk / "out"
    plan = plan_of(source, out, PER_SHARD)
    resize(small_disk, room=150_000)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); finished shards") as caught:
        write_sets([plan], spec_of(source), workers=3)
    assert "\n" not in str(caught.value)
    folder = out / "train"
    assert not list(folder.rglob("*.tmp"))
    before = recorded(folder)
    resize(small_disk, room=1 << 20)
    write_sets([plan], spec_of(source))
    assert tars(out) == whole
    assert before.items() <= identity(folder).items()


class Unwieldy(SourceSpec):
    """Cannot be sent to the second worker."""

    sent = 0

    def __reduce__(self) -> tuple[type[SourceSpec], tuple[tuple[str, ...]]]:
        Unwieldy.sent += 1
        if Unwieldy.sent > 1:
            raise OSError(11, "Resource temporarily unavailable")
        return SourceSpec, (self.locations,)


def test_if_a_worker_cannot_be_started_none_goes_on(source: ImageFolder, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path, PER_SHARD)
    with pytest.raises(OSError, match="Resource temporarily unavailable"):
        write_sets([plan], Unwieldy((str(source.folder),)), workers=3)
    assert Unwieldy.sent == 2
    assert_nothing_runs()
