"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests run several ranks on few cores; more threads per rank would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.helpers.runs import write_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard sets ``train`` and ``val`` of scikit-learn's digits."""
    return write_digits(tmp_path_factory.mktemp("digits"))
