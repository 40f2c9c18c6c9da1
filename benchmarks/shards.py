"""How fast datasets become shard sets, against the copy of the same bytes and a plain loop, in one run on one disk.

    python benchmarks/shards.py IMAGES [--folder SCRATCH] [--copies 40] [--repeats 3] [--no-encode]

IMAGES is a folder of images, with or without folders of classes. Prints seconds and ratios; results that are worth
keeping go to benchmarks/results with the command, the versions and the machine.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import PIL
import pyarrow
import webdataset
from PIL import Image

from vitscale.data.decode import decode_image
from vitscale_shards.images import MAX_PIXELS

SHARD = 2_000
SHORT_PX = 256
QUALITY = 95


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--folder", type=Path, help="where to work; decides which disk is measured")
    parser.add_argument(
        "--copies", type=int, default=40, help="copies of the images, each its own class, to be sharded"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-encode", action="store_true", help="leave out what decodes and encodes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        source = Path(scratch) / "source"
        spread(arguments.images, source, arguments.copies)
        measure(source, Path(scratch), arguments.repeats, encode=not arguments.no_encode)


def measure(source: Path, scratch: Path, repeats: int, *, encode: bool) -> None:
    """Interleave the contestants, so that a busy moment of the machine hits all of them."""
    out = scratch / "out"
    contestants: dict[str, Callable[[], None]] = {
        "cp -r and sync": lambda: copy(source, out),
        "webdataset.ShardWriter loop and sync": lambda: plain_loop(source, out),
        "shards write, 1 worker": lambda: write(source, out),
        "shards write, 2 workers": lambda: write(source, out, "--workers", "2"),
    }
    if encode:
        contestants["bare decode, resize, encode, 1 core"] = lambda: bare_encode(source)
        contestants["shards write --resize-short, 1 worker"] = lambda: write(
            source, out, "--resize-short", str(SHORT_PX)
        )
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            shutil.rmtree(out, ignore_errors=True)
            subprocess.run(["sync"], check=True)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    report(source, seconds)


def report(source: Path, seconds: dict[str, list[float]]) -> None:
    """A table, and the ratios that matter."""
    files = [path for path in source.rglob("*") if path.is_file()]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    print(f"Python {platform.python_version()}, Pillow {PIL.__version__}, pyarrow {pyarrow.__version__}, ", end="")
    print(f"webdataset {webdataset.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    print(f"{len(files)} files, {megabytes:.0f} MB\n")
    print("| what | s, median | min | max | images/s | MB/s |\n|---|---|---|---|---|---|")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        rates = f"{len(files) / median[name]:.0f} | {megabytes / median[name]:.0f}"
        print(f"| {name} | {median[name]:.2f} | {min(values):.2f} | {max(values):.2f} | {rates} |")
    copied, looped, one, two, *encoding = median.values()
    print(f"\nspeed of 1 worker over that of cp -r and sync: {copied / one:.2f}")
    print(f"speed of 2 workers over that of the plain loop: {looped / two:.2f}")
    if encoding:
        bare, encoded = encoding
        print(f"time of --resize-short over that of the bare decoder and encoder: {encoded / bare:.2f}")


def spread(images: Path, source: Path, copies: int) -> None:
    """Lay copies of the images out as classes."""
    files = [path for path in images.rglob("*") if path.is_file()]
    for number in range(copies):
        for place, path in enumerate(files):
            target = source / f"class{number:03d}" / f"{place:06d}{path.suffix.lower()}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    subprocess.run(["sync"], check=True)


def copy(source: Path, out: Path) -> None:
    """What any copy costs."""
    subprocess.run(["cp", "-r", source, out], check=True)
    subprocess.run(["sync"], check=True)


def plain_loop(source: Path, out: Path) -> None:
    """What the documentation of webdataset shows, in a process of its own as its rivals are; files as they come."""
    subprocess.run([sys.executable, __file__, "plain-loop", source, out], check=True)
    subprocess.run(["sync"], check=True)


def run_plain_loop(source: Path, out: Path) -> None:
    """The loop itself."""
    out.mkdir()
    with webdataset.ShardWriter(f"{out}/train-%06d.tar", maxcount=SHARD, verbose=0) as sink:
        for label, folder in enumerate(sorted(source.iterdir())):
            for path in sorted(folder.iterdir()):
                sample = {"__key__": f"{folder.name}__{path.stem}", "cls": label, path.suffix[1:]: path.read_bytes()}
                sink.write(sample)


def write(source: Path, out: Path, *options: str) -> None:
    """The command: list, plan, shuffle, check, write, sync, index."""
    command = [sys.executable, "-m", "vitscale", "shards", "write", source, out, "--samples-per-shard", str(SHARD)]
    subprocess.run([*command, *options], check=True, capture_output=True)


def bare_encode(source: Path) -> None:
    """Decode, shrink and encode every image, and do nothing else."""
    for path in source.rglob("*"):
        if path.is_file():
            image = decode_image(path.read_bytes(), max_pixels=MAX_PIXELS)
            scale = SHORT_PX / min(image.size)
            if scale < 1:
                size = (round(image.width * scale), round(image.height * scale))
                image.resize(size, Image.Resampling.BICUBIC).save(io.BytesIO(), "JPEG", quality=QUALITY)


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain-loop"]:
        run_plain_loop(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
