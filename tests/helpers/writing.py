"""Small image folders, their plans, what was written of them, and commands that write in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from vitscale_shards.place import LocalPlace
from vitscale_shards.planning.plan import Plan
from vitscale_shards.planning.planner import make_plans
from vitscale_shards.planning.settings import PlanSettings
from vitscale_shards.rows import Row
from vitscale_shards.sources import SourceSpec
from vitscale_shards.sources.folder import ImageFolder
from vitscale_shards.writing.writer import Tally, write_set

Identity = dict[str, tuple[int, int]]
BAD = b"\xff\xd8broken"


def make_images(folder: Path, number: int = 40) -> ImageFolder:
    """Images of many sizes in four classes; every third is a JPEG, the others are PNG."""
    for i in range(number):
        path = folder / f"class{i % 4}" / f"{i}.{'png' if i % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5 + i % 50, 7), (i % 256, 2 * i % 256, 3 * i % 256)).save(path)
    return ImageFolder(folder)


def spec_of(source: ImageFolder, own: str | None = None) -> SourceSpec:
    """How other processes open a folder; ``own`` is a class of :mod:`tests.helpers.own_sources`."""
    source_class = None if own is None else f"tests.helpers.own_sources:{own}"
    return SourceSpec((str(source.folder),), source_class=source_class).absolute()


def plan_of(source: ImageFolder, out: Path, per_shard: int = 10, own: str | None = None) -> Plan:
    """A plan of one set, in ``out/train``."""
    settings = PlanSettings(samples_per_shard=per_shard)
    (plan,) = make_plans(source, spec_of(source, own).to_json(), settings, LocalPlace(out))
    return plan


def all_rows(plan: Plan) -> list[Row]:
    """The rows of all shards, in order."""
    return [row for shard in range(plan.num_shards) for row in plan.rows(shard)]


def spoil(source: ImageFolder, rows: list[Row]) -> list[Row]:
    """Put bytes that are no image in the place of some images; their sizes stay, so that no plan is out of date."""
    for row in rows:
        (source.folder / row.path).write_bytes(BAD.ljust(row.num_bytes, b"\0"))
    return rows


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of every file below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def identity(folder: Path) -> Identity:
    """What changes when a tar is written again, by its name."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


def recorded(folder: Path) -> Identity:
    """The same of the shards that have a record, which promises that they are finished."""
    names = {path.name.removesuffix(".json") for path in folder.glob(".progress/*.tar.json")}
    return {name: what for name, what in identity(folder).items() if name in names}


def samples_of(tar: Path) -> dict[str, dict[str, bytes]]:
    """Members of every sample by key and extension, as ``tarfile`` reads them."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as file:
        for info in file:
            key, _, extension = info.name.partition(".")
            member = file.extractfile(info)
            assert member is not None
            samples.setdefault(key, {})[extension] = member.read()
    return samples


def lines(path: Path) -> list[dict[str, str]]:
    """Content of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def start_writing(out: Path, *, workers: int, max_failures: int = 0) -> subprocess.Popen[str]:
    """Write the plan in ``out/train`` from a process of its own, in a process group of its own."""
    arguments = [str(out), str(workers), str(max_failures)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.write_command", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children(pid: int) -> list[psutil.Process]:
    """The living workers of a process. What watches over multiprocessing's resources for it is none."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children():
            with suppress(psutil.NoSuchProcess):  # a zombie has no command line
                if "spawn_main" in " ".join(process.cmdline()):
                    found.append(process)
    return found


def wait_for(condition: Callable[[], bool], *, at_most_s: float = 60) -> None:
    """Look until it is so."""
    end = time.monotonic() + at_most_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


class Killed(BaseException):
    """Stands for the end of the process at a chosen point."""


class Counting(ImageFolder):
    """Remembers how often it read an image."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: Counter[str] = Counter()

    def read(self, row: Row) -> bytes:
        self.reads[row.path] += 1
        return super().read(row)


def write_until(plan: Plan, source: ImageFolder, stop: Callable[[Tally], bool], max_failures: int = 0) -> None:
    """Kill the writer when it tells something."""

    def tell(tally: Tally) -> None:
        if stop(tally):
            raise Killed

    with pytest.raises(Killed):
        write_set(plan, source, max_failures=max_failures, tell=tell)


def write_and_stop(plan: Plan, source: ImageFolder, images: int, max_failures: int = 0) -> None:
    """Kill the writer after so many images."""
    write_until(plan, source, lambda tally: tally.finished + tally.current == images, max_failures)


def resize(disk: Path, *, room: int) -> None:
    """Leave so many bytes of room on a disk in memory."""
    status = os.statvfs(disk)
    size = (status.f_blocks - status.f_bfree) * status.f_frsize + room
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
