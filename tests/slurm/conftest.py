"""A cluster for all tests of a process, and a clean one for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.jobs import Lab
from tests.helpers.slurm import SlurmCluster, require_slurm, slurm_cluster


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[SlurmCluster]:
    """Two nodes."""
    require_slurm()
    with slurm_cluster(num_nodes=2) as running:
        yield running


@pytest.fixture
def cluster(shared_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster, with all nodes and no job of another test."""
    shared_cluster.clear()
    yield shared_cluster
    shared_cluster.clear()


@pytest.fixture
def lab(cluster: SlurmCluster, digits: Path, tmp_path: Path) -> Lab:
    """The cluster, and a folder for runs."""
    return Lab(cluster, digits, tmp_path)
