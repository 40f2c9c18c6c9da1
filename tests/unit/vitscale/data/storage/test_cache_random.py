"""Whatever is done to a node's cache, in whatever order: reads give the origin's bytes, and the bound holds."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.helpers.cached import RecordedFiles, bytes_on_disk, write_tars
from vitscale.data.storage import eviction
from vitscale.data.storage.cache import CachedFiles
from vitscale.data.storage.node_cache import NodeCache
from vitscale.data.storage.pieces import PIECE_BYTES

TARS = 4
LONGEST = 5 * PIECE_BYTES
numbers = st.integers(0, TARS - 1)
places = st.floats(0, 1, exclude_max=True)


class Cache(RuleBasedStateMachine):
    """Reads, new processes, wrong bytes on the disk, files that vanish or are cut, and orders that change."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())

    @initialize(sizes=st.lists(st.integers(1, LONGEST), min_size=TARS, max_size=TARS), in_parts=st.booleans())
    def begin(self, sizes: list[int], in_parts: bool) -> None:
        self.shards = write_tars(self.folder / "set", sizes)
        self.content = [(self.folder / "set" / shard.name).read_bytes() for shard in self.shards]
        self.origin = RecordedFiles(self.folder / "set")
        self.in_parts, self.uses, self.said = in_parts, np.zeros(TARS), list[str]()
        self.start_process(10 * PIECE_BYTES, True)

    @rule(max_bytes=st.integers(PIECE_BYTES, TARS * LONGEST), ordered=st.booleans())
    def start_process(self, max_bytes: int, ordered: bool) -> None:
        # What is in the cache already stays until room is needed.
        self.max_bytes = max(max_bytes, bytes_on_disk(self.folder / "cache"))
        self.cache = NodeCache(self.folder / "cache", self.max_bytes, warn=self.said.append)
        read_in_parts = self.origin.read_in_parts if self.in_parts else None
        next_uses = (lambda: self.uses) if ordered else None
        self.files = CachedFiles(self.origin, self.shards, self.cache, next_uses, read_in_parts=read_in_parts)

    @rule(number=numbers, start=places, length=st.integers(0, LONGEST))
    def read(self, number: int, start: float, length: int) -> None:
        first = int(start * self.shards[number].num_bytes)
        found = self.files.read(self.shards[number].name, first, length)
        assert found == self.content[number][first : first + length]

    @rule(number=numbers)
    def read_index(self, number: int) -> None:
        name = self.shards[number].idx_name
        assert self.files.read_all(name) == (self.folder / "set" / name).read_bytes()

    @rule(uses=st.lists(st.sampled_from([0.0, 1.0, 2.0, float("inf")]), min_size=TARS, max_size=TARS))
    def walk_on(self, uses: list[float]) -> None:
        self.uses = np.array(uses)

    @rule(which=places, place=places, length=st.integers(1, 10_000), byte=st.integers(0, 255))
    def damage(self, which: float, place: float, length: int, byte: int) -> None:
        for path in self.some_file(which):
            with path.open("r+b") as file:
                file.seek(int(place * path.stat().st_size))
                file.write(bytes([byte]) * length)

    @rule(which=places, place=places)
    def cut(self, which: float, place: float) -> None:
        for path in self.some_file(which):
            with path.open("r+b") as file:
                file.truncate(int(place * path.stat().st_size))

    @rule(which=places)
    def delete(self, which: float) -> None:
        for path in self.some_file(which):
            path.unlink()

    @rule()
    def delete_all(self) -> None:
        self.cache.comparisons.finish()
        shutil.rmtree(self.folder / "cache", ignore_errors=True)

    @invariant()
    def the_bound_holds(self) -> None:
        if hasattr(self, "cache"):
            # Damage may fill holes, a hundred kilobytes or so at a time; what was accounted is within the bound.
            assert bytes_on_disk(self.folder / "cache") <= self.max_bytes + 40 * 16_384

    @invariant()
    def nothing_is_blamed_on_the_origin(self) -> None:
        if hasattr(self, "cache"):
            assert not [text for text in self.said if "SHA-256" in text or "fails" in text]

    def some_file(self, which: float) -> list[Path]:
        self.cache.comparisons.finish()
        paths = sorted(path for path in self.folder.glob("cache/**/*") if path.is_file())
        return paths[int(which * len(paths)) :][:1]

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.comparisons.finish()
        shutil.rmtree(self.folder)


def test_random_lives_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "JUST_READ_S", 0.0)
    monkeypatch.setattr(eviction, "FULL_S", 0.0)
    run_state_machine_as_test(
        Cache,
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
