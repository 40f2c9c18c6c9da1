"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests run several ranks on few cores; more threads per rank would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.helpers.runs import write_digits
from tests.helpers.s3 import S3Server, s3_server


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard sets ``train`` and ``val`` of scikit-learn's digits."""
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 API on loopback, to which the environment of this process and of its children leads."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
