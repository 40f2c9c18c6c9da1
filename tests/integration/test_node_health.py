"""What nodes measure of themselves and of each other: real processes, and the real command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.distributed import free_port
from tests.helpers.runs import environment
from vitscale_launch.health import DONE, read_report, run_check

pytestmark = pytest.mark.timeout(180)


def check_nodes(folder: Path, count: int, *more: str, timeout_s: float = 100, **env: str) -> dict[str, str]:
    """Several "nodes" of this machine, started by a shell as srun would."""
    words = [sys.executable, "-m", "vitscale_launch.health_node", str(folder / "reports"), str(folder), *more]
    shell = "".join(f'RANK={rank} SLURMD_NODENAME=n{rank} "$@" & ' for rank in range(count)) + "wait"
    place = {"WORLD_SIZE": str(count), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    names = [f"n{rank}" for rank in range(count)]
    return run_check(
        ["bash", "-c", shell, "-", *words], names, folder / "reports", timeout_s, {**environment(**env), **place}
    )


def test_two_nodes_measure_each_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # What is slow on a busy machine is not the question here.
    bad = check_nodes(tmp_path, 2, "--command=exit 0")
    assert not any("GPU" in text or "left with" in text or "end of" in text for text in bad.values()), bad
    first, second = read_report(tmp_path / "reports", "n0"), read_report(tmp_path / "reports", "n1")
    assert first is not None
    assert second is not None
    assert first.stage == second.stage == DONE
    assert first.tflops[0] > 0
    assert (first.write_mb_per_s or 0) > 0
    assert abs(second.skew_s or 0) < 2
    assert (second.reduce_gb_per_s or 0) > 0
    assert first.links_gb_per_s.keys() == {"n1"}
    assert json.loads((tmp_path / "reports" / "verdict.json").read_text())["nodes"] == ["n0", "n1"]
    assert "n1" in capfd.readouterr().err
    assert not list(tmp_path.glob(".health-*"))


def test_missing_gpus_and_a_failing_command_are_told(tmp_path: Path) -> None:
    # No CUDA here, or none that is shown.
    bad = check_nodes(tmp_path, 1, "--gpus=2", "--command=echo worn out; exit 3", CUDA_VISIBLE_DEVICES="")
    assert bad == {"n0": "torch finds 0 GPUs instead of 2; health_command left with 3: worn out"}


def test_the_command_checks_this_machine(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "vitscale", "launch", "health", "--folder", str(tmp_path)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "all 1 nodes are good\n"), done.stderr
    assert "product" in done.stderr
    assert not list(tmp_path.iterdir())
