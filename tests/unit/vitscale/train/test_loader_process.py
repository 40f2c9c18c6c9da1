"""Processes that load for a rank give what its own threads would give, and none outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import CONFIG, TINY, environment
from tests.helpers.shardset import folder_of, image_bytes, make_shardset, spoil_image
from vitscale.config.loader import load_config
from vitscale.config.schema import DataConfig
from vitscale.data.loader import Batch
from vitscale.data.manifest import Manifest
from vitscale.data.shard_set import open_training_data
from vitscale.errors import DataError
from vitscale.plan import RunPlan
from vitscale.train.batches import loader_processes, train_batches
from vitscale.train.counters import load_counters

ALWAYS = ("data.max_bad_share=1", "data.workers=3")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    manifest = make_shardset(tmp_path_factory.mktemp("set"), [30, 50, 20])
    for number in (3, 41, 42):
        spoil_image(manifest, number)
    return manifest


def batches(manifest: Manifest, *overrides: str, first_step: int = 0) -> Iterator[Batch]:
    config = load_config(CONFIG, [*TINY, *ALWAYS, f"data.train={folder_of(manifest)}", *overrides])
    train_set = open_training_data(config.data, global_batch_size=config.global_batch_size)
    plan = RunPlan.create(config, 2, train_set)
    return train_batches(config, plan, train_set, rank=1, ranks_of_node=[1], first_step=first_step, pin_memory=False)


def assert_same(some: Sequence[Batch], others: Sequence[Batch]) -> None:
    assert len(some) == len(others) > 0
    for batch, other in zip(some, others, strict=True):
        assert torch.equal(batch.images, other.images)
        assert batch.images.stride() == other.images.stride()
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.mask, other.mask)
        assert (batch.keys, batch.sample_ids) == (other.keys, other.sample_ids)
        assert (batch.quarantined, batch.digest) == (other.quarantined, other.digest)


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [(1, ("data.read_ahead_batches=0",)), (3, ("data.prefetch_batches=1",))],
)
def test_processes_change_nothing(damaged: Manifest, processes: int, overrides: tuple[str, ...]) -> None:
    expected = list(batches(damaged, "data.processes=0", first_step=3))
    assert any(batch.quarantined for batch in expected)
    # All are held at once: no batch may lie in memory that a later one uses too.
    assert_same(list(batches(damaged, f"data.processes={processes}", *overrides, first_step=3)), expected)


def test_several_labels(tmp_path: Path) -> None:
    def parts(number: int) -> dict[str, bytes]:
        labels = list(range(number % 3))
        return {"png": image_bytes(number), "json": f'{{"labels": {labels}}}'.encode()}

    manifest = make_shardset(tmp_path, [40], parts=parts, multi_label=True)
    loss = ("loss.kind=sigmoid", "data.eval=null")
    found = list(batches(manifest, "data.processes=3", *loss))
    assert {batch.labels.shape[1] for batch in found} == {1, 2}
    assert_same(found, list(batches(manifest, "data.processes=0", *loss)))


@pytest.mark.parametrize(
    ("workers", "asked", "micro_batch", "expected"),
    [
        (2, None, 64, 2),
        (16, None, 64, 16),
        (16, None, 3, 3),
        (2, 0, 64, 0),
        (2, 9, 64, 2),
        (3, 2, 64, 2),
    ],
)
def test_number_of_processes(workers: int, asked: int | None, micro_batch: int, expected: int) -> None:
    data = DataConfig(train="unused", image_size=8, workers=workers, processes=asked)
    assert loader_processes(data, micro_batch) == expected


def test_their_errors_are_raised_here(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path, [40], classes=None)
    with pytest.raises(DataError, match=r"has label \d, but the head has 2 outputs"):
        list(batches(manifest, "data.processes=2", "model.num_classes=2"))


def children() -> list[int]:
    """Living ones of this process."""
    command = ["ps", "-ww", "-o", "pid=,stat=,args=", "--ppid", str(os.getpid())]
    rows = [line.split(maxsplit=2) for line in subprocess.check_output(command, text=True).splitlines()]
    return [int(pid) for pid, state, args in rows if not state.startswith("Z") and "loader_process" in args]


def test_a_killed_process_is_an_error(damaged: Manifest) -> None:
    loading = batches(damaged, "data.processes=2", "duration={steps: 100000}")
    next(loading)
    first, _ = children()
    os.kill(first, signal.SIGKILL)
    with pytest.raises(DataError, match=r"died of SIGKILL; if the node ran out of memory.*lower data.workers"):
        list(loading)
    assert children() == []


def test_only_the_rank_heeds_signals(damaged: Manifest) -> None:
    loading = batches(damaged, "data.processes=2")
    found = [next(loading)]
    for child in children():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.kill(child, number)
    assert_same([*found, *loading], list(batches(damaged, "data.processes=0")))


def test_a_closed_loader_leaves_no_process(damaged: Manifest) -> None:
    loading = batches(damaged, "data.processes=2", "duration={steps: 100000}")
    list(islice(loading, 3))
    assert len(children()) == 2
    loading.close()  # type: ignore[attr-defined]
    assert children() == []


_RANK = """
import sys
from tests.unit.vitscale.train import test_loader_process as here
from vitscale.data.manifest import read_manifest
from pathlib import Path
loading = here.batches(read_manifest(Path(sys.argv[1])), "data.processes=2", "duration={steps: 100000}")
next(loading)
print(*here.children(), flush=True)
for batch in loading:
    pass
"""


def test_none_outlives_a_killed_rank(damaged: Manifest) -> None:
    command = [sys.executable, "-c", _RANK, str(folder_of(damaged))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as rank:
        assert rank.stdout is not None
        loaders = [int(pid) for pid in rank.stdout.readline().split()]
        assert len(loaders) == 2
        rank.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in loaders):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_their_work_is_counted(damaged: Manifest) -> None:
    before = load_counters()
    list(batches(damaged, "data.processes=2", "duration={steps: 60}"))
    # Starting two interpreters with torch alone takes longer than all that this process does meanwhile.
    own = time.process_time()
    assert load_counters().since(before).cpu_s > 1.0
    assert load_counters().cpu_s > own
