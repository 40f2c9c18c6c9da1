"""A store on one rank, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.vitscale.checkpoint.small_state import store_in
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.store import CheckpointStore
from vitscale.distributed import Ranks, connect
from vitscale.topology import Topology


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with connect(Topology(), timeout_s=60) as connected:
        yield connected


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "run" / "checkpoints")


@pytest.fixture
def store(folder: LocalFolder, ranks: Ranks) -> CheckpointStore:
    """One that keeps the newest three."""
    return store_in(folder, ranks, Retention(last=3))
