"""The same command under torchrun."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.faults import Fault
from tests.helpers.runs import CONFIG, checkpoint_of, environment, finish, metrics, overrides

pytestmark = pytest.mark.timeout(120)


def _torchrun(arguments: list[str], **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR2", "-m", "vitscale", "train", str(CONFIG), *arguments]
    return subprocess.Popen(command, env=environment(**env), stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_ranks_of_torchrun_find_each_other_stop_and_continue(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = overrides(digits, run)
    hold = Fault(tmp_path / "fault", "hold", rank=1, step=5)
    torchrun = _torchrun(arguments, **hold.env)
    hold.wait(torchrun)
    torchrun.send_signal(signal.SIGUSR2)
    _, errors = torchrun.communicate(timeout=60)
    # torchrun has an exit status of its own for this.
    assert torchrun.returncode == 1
    assert "stopped at step 6 of 12 on SIGUSR2; a checkpoint is committed" in errors
    assert checkpoint_of(run).step == 6
    assert "continuing from the checkpoint of step 6" in finish(_torchrun(arguments))
    assert [record["step"] for record in metrics(run)] == list(range(1, 13))
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["world_size"] for attempt in attempts] == [2, 2]
