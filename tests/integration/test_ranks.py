"""`vitscale train --nproc 2`: stopping, failing, being killed. Real processes and the real command."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from tests.helpers.command import train
from tests.helpers.faults import Fault
from tests.helpers.runs import checkpoint_of, finish, metrics, overrides, start_training, wait_until
from vitscale.data.manifest import read_idx, read_manifest

pytestmark = pytest.mark.timeout(180)
# A failed rank takes the others down within this time, also on a busy machine.
SECONDS = 20


# One rank waits before the step, the other one within its collective operations.
STOPS = [
    (signal.SIGTERM, 0, 2),
    pytest.param(signal.SIGINT, 1, 5, marks=pytest.mark.slow),
    pytest.param(signal.SIGUSR2, 0, 8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("number", "rank", "step"), STOPS)
def test_each_stop_signal_commits_and_the_same_command_continues(
    digits: Path, tmp_path: Path, number: signal.Signals, rank: int, step: int
) -> None:
    run = tmp_path / "run"
    arguments = overrides(digits, run)
    hold = Fault(tmp_path / "hold", "hold", rank=rank, step=step)
    launcher = start_training(arguments, **hold.env)
    hold.wait(launcher)
    launcher.send_signal(number)
    errors = finish(launcher, expect=75)
    message = f"vitscale: stopped at step {step + 1} of 12 on {number.name}; a checkpoint is committed"
    assert errors.count(message) == 1, errors
    assert "Traceback" not in errors
    checkpoint = checkpoint_of(run)
    assert checkpoint.step == step + 1
    assert len(checkpoint.records) == 2
    errors = train(arguments)
    assert f"continuing from the checkpoint of step {step + 1}" in errors
    assert [record["step"] for record in metrics(run)] == list(range(1, 13))


def test_a_stop_while_the_ranks_start_is_a_stop(digits: Path, tmp_path: Path) -> None:
    launcher = start_training(overrides(digits, tmp_path / "run"))
    assert wait_until(lambda: len(psutil.Process(launcher.pid).children()) == 2)
    launcher.send_signal(signal.SIGTERM)
    errors = finish(launcher, expect=75, timeout_s=SECONDS)
    assert errors == "vitscale: stopped on SIGTERM, there was nothing to save; start the same command again\n"


def test_a_stop_before_the_ranks_are_started_is_not_forgotten(digits: Path, tmp_path: Path) -> None:
    launcher = start_training(overrides(digits, tmp_path / "run"))
    assert wait_until(lambda: _catches(launcher.pid, signal.SIGUSR2), every_s=0.0005)
    launcher.send_signal(signal.SIGUSR2)
    assert "stopped on SIGUSR2" in finish(launcher, expect=75, timeout_s=SECONDS)


def test_an_exception_of_one_rank_stands_alone_and_ends_the_run(digits: Path, tmp_path: Path) -> None:
    crash = Fault(tmp_path / "fault", "raise", rank=1, step=3)
    # With stage 3 the victim is mostly within DeepSpeed's own collective operations.
    errors = finish(start_training(overrides(digits, tmp_path / "run", "engine.zero_stage=3"), **crash.env), expect=1)
    assert crash.seconds_ago() < SECONDS
    ours = errors[errors.index("vitscale: ") :]
    assert ours.startswith("vitscale: rank 1 failed\nTraceback (most recent call last):\n")
    assert "\nRuntimeError: planted fault\n" in ours
    assert errors.count("Traceback") == errors.count("vitscale: ") == 1


def test_an_error_of_one_rank_is_one_message(digits: Path, tmp_path: Path) -> None:
    arguments = overrides(_one_label_outside_the_head(digits, tmp_path / "shards"), tmp_path / "run")
    arguments += ["data.eval=null", "duration={epochs: 2}", "model.num_classes=9"]
    errors = finish(start_training(arguments), expect=1)
    assert errors.count("vitscale: ") == 1
    message = errors[errors.index("vitscale: ") :]
    assert message.startswith("vitscale: error: train-000000.tar: sample ")
    assert "has label 9, but the head has 9 outputs (0 to 8); set model.num_classes" in message
    assert "Traceback" not in errors


def test_a_killed_rank_ends_the_run(digits: Path, tmp_path: Path) -> None:
    death = Fault(tmp_path / "fault", "kill", rank=1, step=3)
    errors = finish(start_training(overrides(digits, tmp_path / "run"), **death.env), expect=128 + signal.SIGKILL)
    assert death.seconds_ago() < SECONDS
    assert errors.endswith("vitscale: rank 1 was killed by SIGKILL; the other ranks were stopped\n")
    assert errors.count("vitscale: ") == 1
    assert "Traceback" not in errors


def test_a_killed_launcher_leaves_no_ranks(digits: Path, tmp_path: Path) -> None:
    hold = Fault(tmp_path / "fault", "hold", rank=0, step=3)
    launcher = start_training(overrides(digits, tmp_path / "run"), **hold.env)
    hold.wait(launcher)
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    assert not psutil.wait_procs(ranks, timeout=SECONDS)[1]


def test_ranks_that_cannot_share_the_batch_are_told_which_numbers_can(digits: Path, tmp_path: Path) -> None:
    arguments = overrides(digits, tmp_path / "run", "global_batch_size=36")
    errors = train(arguments, expect=1)
    assert errors.count("vitscale: ") == 1, errors
    assert "makes 9 micro-batches, which 2 ranks cannot share evenly; world sizes that fit: 1, 3, 9;" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_an_impossible_number_of_ranks_is_refused(digits: Path, tmp_path: Path) -> None:
    errors = finish(start_training(overrides(digits, tmp_path / "run"), nproc=0), expect=1)
    assert errors.startswith("vitscale: error: --nproc is 0; allowed is 1 ")


def test_a_config_error_comes_once_and_before_any_rank(digits: Path, tmp_path: Path) -> None:
    errors = finish(start_training(overrides(digits, tmp_path / "run", "optim.lr=fast")), expect=2)
    assert errors.startswith("vitscale: error: ")
    assert errors.count("must be a number, got 'fast'") == 1
    assert "Traceback" not in errors


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler of the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def _one_label_outside_the_head(digits: Path, out: Path) -> Path:
    """A training set of one shard and labels 0 to 8, but for a single 9 that its index does not tell of."""
    source, target = digits / "train", out / "train"
    target.mkdir(parents=True)
    shard = read_manifest(source).shards[0]
    content = bytearray((source / shard.name).read_bytes())
    members = [m for sample in read_idx(source / shard.idx_name) for m in sample if m.extension == "cls"]
    nines = [m.offset for m in members if content[m.offset] == ord("9")]
    for offset in nines[1:]:
        content[offset] = ord("0")
    (target / shard.name).write_bytes(content)
    (target / shard.idx_name).write_bytes((source / shard.idx_name).read_bytes())
    index = json.loads((source / "index.json").read_text())
    index["shardlist"] = index["shardlist"][:1]
    index["vitscale"] |= {"classes": None, "num_samples": shard.num_samples}
    (target / "index.json").write_text(json.dumps(index))
    return out
