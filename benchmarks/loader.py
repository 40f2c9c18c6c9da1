"""How fast the loader is: against the decoder alone and against other public loaders, on the same JPEGs, in one run.

    OMP_NUM_THREADS=1 python benchmarks/loader.py [SHARDSET] [--image-size 224] [--workers 1 2] > RESULTS.md

SHARDSET is a folder with index.json and JPEGs in its tars; photographs are made without one. Each measurement runs in
a process of its own, and different loaders take turns, so that a busy moment of the machine hits all of them. Loaders
that are not installed are left out. They are no dependency of vitscale; to see all rows:

    pip install -c constraints.txt spdl-core spdl-io mosaicml-streaming nvidia-dali-cuda120 litdata megatron-energon
    pip uninstall torchvision

mosaicml-streaming brings a torchvision that does not load beside a CPU-only torch and is not needed. spdl-io needs
FFmpeg's shared libraries (of FFmpeg 4 to 9) on the system or on LD_LIBRARY_PATH. Prints Markdown to the standard output
and what it is at to the standard error; results that are worth keeping go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from peers.contest import Contestant, Settings
from peers.dali import DALI
from peers.energon import ENERGON
from peers.images import write_images
from peers.lit_data import LITDATA
from peers.measurement import Failure, Measured, Work, in_own_process, measure
from peers.mosaic_streaming import STREAMING
from peers.ours import BARE_THREADS, LIMIT, LOADER, LOADER_IN_ONE_PROCESS, LOADER_IN_RANK
from peers.spdl_pipeline import SPDL, SPDL_OUR_PIXELS
from peers.torch_folder import FOLDER, FOLDER_OUR_PIXELS
from peers.web_dataset import WEBDATASET, WEBDATASET_OUR_PIXELS

CONTESTANTS = (
    LIMIT,
    BARE_THREADS,
    LOADER,
    LOADER_IN_ONE_PROCESS,
    LOADER_IN_RANK,
    WEBDATASET_OUR_PIXELS,
    FOLDER_OUR_PIXELS,
    SPDL_OUR_PIXELS,
    WEBDATASET,
    FOLDER,
    STREAMING,
    LITDATA,
    ENERGON,
    SPDL,
    DALI,
)
BESIDE_TRAINING = (LOADER, LOADER_IN_ONE_PROCESS, LOADER_IN_RANK, WEBDATASET_OUR_PIXELS, SPDL_OUR_PIXELS)
PREPARE_TIMEOUT_S = 3600.0
START_TIMEOUT_S = 120.0
VERSIONS = ("torch", "pillow", "numpy", "simplejpeg", "opencv-python-headless")

Case = tuple[Contestant, int, Work]
"""Who, with how many workers, beside which work."""
Results = dict[Case, list[Measured | Failure]]
"""By case, one result for each round."""
WORKS: tuple[Work, ...] = ("matrix products", "pure Python")


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    contestants = [c for c in CONTESTANTS if c is LIMIT or any(part in c.name for part in arguments.only)]
    with tempfile.TemporaryDirectory(prefix="loader-benchmark-", dir=arguments.scratch) as folder:
        root = Path(folder)
        sizes = write_images(root, arguments.shards, arguments.images)
        absent = prepare(contestants, root)
        present = [contestant for contestant in contestants if contestant not in absent]
        alone: list[Case] = [(c, workers, "nothing") for workers in arguments.workers for c in present]
        beside: list[Case] = [
            (c, workers, work)
            for workers in arguments.workers
            for work in WORKS
            for c in present
            if c in BESIDE_TRAINING
        ]
        results = measure_in_turns(alone, root, arguments)
        print_header(arguments, sizes)
        print_rates(alone, results, absent)
        results |= measure_in_turns(beside, root, arguments)
        print_beside_training(beside, results)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shards", nargs="?", type=Path, help="a shard set of JPEGs; photographs are made if omitted")
    parser.add_argument("--image-size", type=int, default=224, help="side of the crops in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=4096, help="size of the set; the given images are repeated")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="threads or processes of a loader")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of loaders")
    parser.add_argument("--scratch", type=Path, help="folder for the images in the formats of all loaders")
    return parser.parse_args()


def prepare(contestants: Iterable[Contestant], root: Path) -> dict[Contestant, str]:
    """Bring the images into everyone's format. Returns the loaders that cannot take part, and why."""
    absent = {}
    for contestant in contestants:
        missing = [name for name in contestant.packages if version(name) is None]
        if missing:
            absent[contestant] = "not installed"
        elif contestant.prepare is not None:
            say(f"preparing {contestant.name}")
            failure = in_own_process(contestant.prepare, root, timeout_s=PREPARE_TIMEOUT_S)
            if isinstance(failure, Failure):
                absent[contestant] = " ".join(failure.reason.split())[:120]
    return absent


def measure_in_turns(cases: list[Case], root: Path, arguments: argparse.Namespace) -> Results:
    """All cases, one after the other, as often as asked for."""
    results: Results = {case: [] for case in cases}
    for number in range(arguments.repeats):
        for contestant, workers, work in cases:
            settings = Settings(arguments.image_size, arguments.batch_size, workers)
            result = in_own_process(
                measure,
                contestant,
                root,
                settings,
                arguments.seconds,
                work,
                timeout_s=arguments.seconds + START_TIMEOUT_S,
            )
            say(f"round {number + 1}: {contestant.name}, {workers}, beside {work}: {result}")
            results[contestant, workers, work].append(result)
    return results


def print_header(arguments: argparse.Namespace, sizes: list[int]) -> None:
    """The machine, the versions and the images."""
    packages = dict.fromkeys([*VERSIONS, *(name for contestant in CONTESTANTS for name in contestant.packages)])
    versions = [f"{name} {found}" for name in packages if (found := version(name)) is not None]
    print(f"{os.cpu_count()} x {processor()}, Python {platform.python_version()}, {', '.join(versions)}\n")
    print(
        f"{len(sizes)} JPEGs of {sum(sizes) / len(sizes) / 1e3:.1f} KB on average, crops of {arguments.image_size} px "
        f"in batches of {arguments.batch_size}; {arguments.repeats} repeats of {arguments.seconds:g} s, medians\n"
    )


def print_rates(cases: list[Case], results: Results, absent: dict[Contestant, str]) -> None:
    """The comparison."""
    print("| workers | loader | images/s | min | max | of the limit | images/core-second | first batch | pixels |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    for case in cases:
        contestant, workers, _ = case
        who = f"| {workers} {contestant.workers} | {contestant.name} |"
        good = successes(results[case])
        if isinstance(good, Failure):
            print(f"{who} {good.reason} |" + " |" * 6)
            continue
        rates = [result.rate for result in good]
        print(
            f"{who} {statistics.median(rates):,.0f} | {min(rates):,.0f} | {max(rates):,.0f} | "
            f"{ratio(good, results[LIMIT, workers, 'nothing']):.2f} | "
            f"{statistics.median(result.rate_per_core for result in good):,.0f} | "
            f"{statistics.median(result.first_s for result in good):.2f} s | {contestant.pixels} |"
        )
    for contestant, reason in absent.items():
        print(f"| | {contestant.name} | {reason} |" + " |" * 6)
    print("\nThe limit is the bare decoder in as many processes, in the same round.\n")


def print_beside_training(cases: list[Case], results: Results) -> None:
    """What a busy main thread does to a loader, and a loader to it."""
    print("| workers | loader | the main thread is busy with | images/s | of its rate alone | speed of that work |")
    print("|---|---|---|---:|---:|---:|")
    for case in cases:
        contestant, workers, work = case
        who = f"| {workers} {contestant.workers} | {contestant.name} | {work} |"
        good = successes(results[case])
        if isinstance(good, Failure):
            print(f"{who} {good.reason} | | |")
            continue
        print(
            f"{who} {statistics.median(result.rate for result in good):,.0f} | "
            f"{ratio(good, results[contestant, workers, 'nothing']):.2f} | "
            f"{statistics.median(result.work_share for result in good):.2f} |"
        )


def successes(results: list[Measured | Failure]) -> list[Measured] | Failure:
    """All results of a case, or the first failure among them, in one line."""
    for result in results:
        if isinstance(result, Failure):
            return Failure(" ".join(result.reason.split())[:120])
    return [result for result in results if isinstance(result, Measured)]


def ratio(mine: list[Measured], other: list[Measured | Failure]) -> float:
    """Median over the rounds of the rate over that of another one in the same round."""
    pairs = [(m.rate, o.rate) for m, o in zip(mine, other, strict=True) if isinstance(o, Measured)]
    return statistics.median(m / o for m, o in pairs) if pairs else float("nan")


def version(distribution: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Its name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def say(text: str) -> None:
    """Tell what is done now."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
