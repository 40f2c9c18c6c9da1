"""The wheel, installed in a clean environment and used from another folder."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers.runs import REPOSITORY, overrides


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of an environment that has the wheel, and this one's dependencies but not its editable install."""
    folder = tmp_path_factory.mktemp("wheel")
    # Through the sdist, so that a file missing from it is noticed.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY],
        check=True,
        capture_output=True,
    )
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    # Paths added by a .pth file come last and have their own .pth files ignored: the wheel is what is imported.
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


def _run(command: list[str | Path], folder: Path) -> str:
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_shards_trains_and_evaluates(installed: Path, tmp_path: Path) -> None:
    vitscale = installed / "vitscale"
    where = _run([installed / "python", "-c", "import vitscale_shards; print(vitscale_shards.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "global_batch_size" in _run([vitscale, "config"], tmp_path)
    _run([vitscale, "shards", "write", "digits", "digits", "--split", "train=0.8,val=0.2"], tmp_path)
    config = REPOSITORY / "configs" / "debug" / "digits.yaml"
    settings = overrides(Path("digits"), Path("run"), "duration={steps: 4}", "global_batch_size=8")
    plan = _run([vitscale, "launch", "plan", config, *settings, "--ranks-per-node", "2"], tmp_path)
    assert "2 ranks" in plan
    _run([vitscale, "train", config, *settings], tmp_path)
    result = json.loads(_run([vitscale, "evaluate", "run"], tmp_path))
    assert result["step"] == 4
    assert result["images"] == 370
