from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.runs import CONFIG, overrides, write_digits
from vitscale.errors import ConfigError, Interrupted
from vitscale.studies import jobs as jobs_module
from vitscale.studies.jobs import CommandError, Job, Result, Workplace, run_jobs
from vitscale.train.signals import StopRequest


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "PATIENCE_S", 0.05)
    monkeypatch.setattr(jobs_module, "POLL_S", 0.05)


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    with StopRequest() as request:
        yield request


def square(number: int, *, pause_s: float = 0.0) -> Job:
    def work(place: Workplace) -> Result:
        with (place.folder / "done-by").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(pause_s)
        return {"square": number**2}

    return Job(f"squares/{number}", {"number": number}, work)


def run(jobs: list[Job], folder: Path, stop: StopRequest) -> tuple[dict[str, Result], list[str]]:
    said: list[str] = []
    return run_jobs(jobs, folder, stop=stop, say=said.append), said


def test_results_are_kept_and_jobs_are_done_once(tmp_path: Path, stop: StopRequest) -> None:
    three = [square(number) for number in range(3)]
    expected = {f"squares/{number}": {"square": number**2} for number in range(3)}
    results, said = run(three[:2], tmp_path, stop)
    assert said == ["1 of 2: squares/0: square 0", "2 of 2: squares/1: square 1"]
    results, said = run(three, tmp_path, stop)
    assert results == expected
    assert said == ["2 of 3 jobs are done already", "3 of 3: squares/2: square 4"]
    assert all(len((tmp_path / name / "done-by").read_text().splitlines()) == 1 for name in expected)


def work_for(folder: Path, pause_s: float) -> None:
    jobs_module.PATIENCE_S = 0.05
    with StopRequest() as stop:
        run([square(number, pause_s=pause_s) for number in range(6)], folder, stop)


def test_workers_share_the_jobs_and_all_see_all_results(tmp_path: Path, stop: StopRequest) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work_for, args=(tmp_path, 0.1)) for _ in range(3)]
    for worker in workers:
        worker.start()
    results, _ = run([square(number, pause_s=0.1) for number in range(6)], tmp_path, stop)
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert [results[f"squares/{number}"]["square"] for number in range(6)] == [0, 1, 4, 9, 16, 25]
    done_by = [(tmp_path / f"squares/{number}" / "done-by").read_text().split() for number in range(6)]
    assert all(len(workers_of_job) == 1 for workers_of_job in done_by)
    assert len({worker for (worker,) in done_by}) > 1


def test_the_job_of_a_killed_worker_is_done_by_another(tmp_path: Path, stop: StopRequest) -> None:
    worker = multiprocessing.get_context("fork").Process(target=work_for, args=(tmp_path, 60.0))
    worker.start()
    begun = tmp_path / "squares/0/done-by"
    while not begun.exists() or not begun.read_text():
        time.sleep(0.01)
    threading.Timer(0.3, lambda: os.kill(worker.pid or 0, signal.SIGKILL)).start()
    results, _ = run([square(0)], tmp_path, stop)
    worker.join()
    assert results == {"squares/0": {"square": 0}}
    assert len(begun.read_text().split()) == 2


def test_a_result_of_other_settings_is_refused(tmp_path: Path, stop: StopRequest) -> None:
    run([square(3)], tmp_path, stop)
    other = Job("squares/3", {"number": 4}, square(4).work)
    told = r"squares/3: was begun with other settings \(number; number was 3 and is 4\); remove that folder to do"
    with pytest.raises(ConfigError, match=told):
        run([other], tmp_path, stop)


def test_a_job_that_was_begun_under_other_settings_does_not_go_on(tmp_path: Path, stop: StopRequest) -> None:
    def fail(place: Workplace) -> Result:
        raise CommandError("no", 1)

    with pytest.raises(CommandError):
        run([Job("job", {"duration": 4000}, fail)], tmp_path, stop)
    with pytest.raises(ConfigError, match=r"job: was begun with other settings \(duration; duration was 4000 and is 5"):
        run([Job("job", {"duration": 5}, lambda place: {})], tmp_path, stop)
    assert run([Job("job", {"duration": 4000}, lambda place: {"done": 1})], tmp_path, stop)[0]["job"] == {"done": 1}


def begin_and_wait(folder: Path) -> None:
    # A bench of minutes stands for any long command.
    words = ("data", "bench", str(CONFIG), *overrides(folder / "digits", folder / "run"), "--seconds", "250")
    with StopRequest() as stop:
        run([Job("job", {}, lambda place: {"said": place.vitscale(*words)})], folder, stop)


def test_the_command_of_a_killed_worker_keeps_its_job(tmp_path: Path, stop: StopRequest) -> None:
    write_digits(tmp_path / "digits")
    worker = multiprocessing.get_context("fork").Process(target=begin_and_wait, args=(tmp_path,))
    worker.start()
    while not (commands := psutil.Process(worker.pid).children()):
        time.sleep(0.01)
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    alive: list[bool] = []

    def look(place: Workplace) -> Result:
        alive.append(psutil.pid_exists(commands[0].pid) and commands[0].status() != psutil.STATUS_ZOMBIE)
        return {}

    threading.Timer(1.0, commands[0].kill).start()
    run([Job("job", {}, look)], tmp_path, stop)
    assert alive == [False], "another worker begins when the command that was left is over"


def command(name: str, *arguments: str) -> Job:
    return Job(name, {}, lambda place: {"said": place.vitscale(*arguments)})


def test_commands_are_run_and_logged(tmp_path: Path, stop: StopRequest) -> None:
    from vitscale import __version__

    results, _ = run([command("version", "--version")], tmp_path, stop)
    assert results["version"]["said"].strip() == __version__
    assert (tmp_path / "version/log.txt").read_text() == f"$ vitscale --version\n{__version__}\n"
    record = json.loads((tmp_path / "version/result.json").read_text())
    assert record["seconds"] > 0


def test_a_failing_command_is_told_after_all_others_are_done(tmp_path: Path, stop: StopRequest) -> None:
    bad = command("bad", "train", "no-such-file.yaml")
    with pytest.raises(CommandError) as caught:
        run([bad, square(2)], tmp_path, stop)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("1 of 2 jobs failed: bad. The first: 'vitscale train no-such-file.yaml' left")
    assert "no-such-file.yaml: no such file" in str(caught.value)
    assert (tmp_path / "squares/2/result.json").exists()
    # It is tried again by the next start.
    assert not (tmp_path / "bad/result.json").exists()


def test_a_stop_request_ends_the_command_and_the_work(tmp_path: Path, stop: StopRequest) -> None:
    digits = write_digits(tmp_path / "digits")
    long = command("long", "data", "bench", str(CONFIG), *overrides(digits, tmp_path / "run"), "--seconds", "250")
    threading.Timer(2.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    start = time.monotonic()
    with pytest.raises(Interrupted, match="stopped on SIGTERM; the same command goes on with what is left"):
        run([long, square(1)], tmp_path / "jobs", stop)
    assert time.monotonic() - start < 60
    assert not (tmp_path / "jobs/squares/1").exists()


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path, stop: StopRequest) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"folder: cannot write to .*file/squares/1: Not a directory; choose another"):
        run([square(1)], tmp_path / "file", stop)
