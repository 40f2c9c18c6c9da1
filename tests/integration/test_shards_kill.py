"""Workers and whole commands that are killed at random moments leave, in the end, what one undisturbed command does.

``VITSCALE_TEST_DATA=FOLDER`` lets the slow tests use a folder with ``cifar10.tar.gz`` (``cifar10/train/CLASS/*``) and
``photos.tar`` (``CLASS_name.JPEG``).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.runs import environment
from tests.helpers.writing import Identity, children, content, identity, recorded, wait_for

WORKERS = 3


def generated(folder: Path) -> None:
    """150 photos of coarse noise in five classes."""
    for i in range(150):
        path = folder / f"class{i % 5}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((512, 384)).save(path, quality=90)


def cifar10(folder: Path) -> None:
    shutil.unpack_archive(real("cifar10.tar.gz"), folder.parent / "unpacked")
    (folder.parent / "unpacked" / "cifar10" / "train").rename(folder)


def photos(folder: Path) -> None:
    with tarfile.open(real("photos.tar")) as tar:
        for info in tar:
            path = folder / info.name.partition("_")[0] / info.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(info).read())  # type: ignore[union-attr]


def real(name: str) -> Path:
    folder = os.environ.get("VITSCALE_TEST_DATA")
    if folder is None or not (Path(folder) / name).is_file():
        pytest.skip(f"VITSCALE_TEST_DATA names no folder with {name}")
    return Path(folder) / name


DATA = [
    pytest.param(generated, ["--samples-per-shard", "5", "--resize-short", "128"], id="generated"),
    pytest.param(cifar10, ["--samples-per-shard", "500", "--check", "decode"], id="cifar10", marks=pytest.mark.slow),
    pytest.param(photos, ["--samples-per-shard", "10", "--check", "decode"], id="photos", marks=pytest.mark.slow),
]


def shards(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "vitscale", "shards", *map(str, arguments)]


def run(*arguments: str | Path) -> str:
    """Run a command that must succeed. What it said on both streams."""
    done = subprocess.run(shards(*arguments), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def start(out: Path) -> subprocess.Popen[str]:
    """Follow a plan with several workers."""
    return subprocess.Popen(
        shards("write", out, "--workers", str(WORKERS)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_records(out: Path, process: subprocess.Popen[str], number: int) -> Identity:
    """Wait until so many shards are finished. Those that are."""
    folder = out / "train"
    wait_for(lambda: len(list(folder.glob(".progress/*.tar.json"))) >= number or process.poll() is not None)
    finished = recorded(folder)
    assert len(finished) >= number, f"it ended too early: {process.communicate()}"
    return finished


def digests(out: Path) -> list[tuple[str, str]]:
    index = json.loads((out / "train" / "index.json").read_text())
    return [(shard["url"], shard["sha256"]) for shard in index["shardlist"]]


class Sets:
    """A source, and the set that an undisturbed worker makes of it."""

    def __init__(self, make: Callable[[Path], None], options: list[str], tmp_path: Path) -> None:
        self.source, self.whole, self.out = (tmp_path / name for name in ("source", "whole", "out"))
        make(self.source)
        run("write", self.source, self.whole, *options)
        run("plan", self.source, self.out, *options)

    def two_moments(self, chance: random.Random) -> list[int]:
        """Numbers of finished shards, somewhere in the first two thirds of the work."""
        return sorted(chance.sample(range(1, 2 * len(digests(self.whole)) // 3), 2))

    def assert_same(self) -> None:
        assert digests(self.out) == digests(self.whole)
        assert content(self.out) == content(self.whole)
        assert "nothing wrong" in run("verify", self.out, "--level", "pixels", "--workers", "2")


@pytest.mark.parametrize(("make", "options"), DATA)
def test_two_of_three_workers_are_killed_at_random(
    make: Callable[[Path], None], options: list[str], tmp_path: Path
) -> None:
    sets, chance = Sets(make, options, tmp_path), random.Random(0)
    finished: Identity = {}
    with start(sets.out) as process:
        for number in sets.two_moments(chance):
            finished.update(wait_for_records(sets.out, process, number))
            time.sleep(chance.random() * 0.01)
            chance.choice(children(process.pid)).kill()
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors.count("ended with exit code -9; the others take over its shard") == 2
    sets.assert_same()
    assert finished.items() <= identity(sets.out / "train").items()


@pytest.mark.parametrize(("make", "options"), DATA)
def test_everything_is_killed_at_random_and_goes_on(
    make: Callable[[Path], None], options: list[str], tmp_path: Path
) -> None:
    sets, chance = Sets(make, options, tmp_path), random.Random(0)
    finished: Identity = {}
    for number in sets.two_moments(chance):
        with start(sets.out) as process:
            finished.update(wait_for_records(sets.out, process, number))
            time.sleep(chance.random() * 0.01)
            os.killpg(process.pid, signal.SIGKILL)
    with start(sets.out) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    sets.assert_same()
    assert finished.items() <= identity(sets.out / "train").items()
