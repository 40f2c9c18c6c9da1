"""Work of rank 0 in pieces: its result and its errors reach every rank, and a stop ends it everywhere."""

from __future__ import annotations

import pytest

from tests.helpers.distributed import run_ranks
from vitscale.errors import DataError
from vitscale.evaluation.pieces import Pieces, on_main_in_pieces
from vitscale.topology import Topology


def _work(topology: Topology) -> None:
    from vitscale.distributed import connect

    started: list[str] = []

    def three(error: bool = False) -> Pieces[str]:
        started.append("three")
        for _ in range(3):
            yield
        if error:
            raise DataError("too small")
        return "done"

    def asked(limit: int) -> bool:
        questions.append(1)
        return len(questions) == limit

    with connect(topology, timeout_s=60) as ranks:
        questions: list[int] = []
        assert on_main_in_pieces(three, ranks) == ("done",)
        assert started == (["three"] if ranks.is_main else [])
        assert on_main_in_pieces(three, ranks, is_stopping=lambda: asked(4)) == ("done",)
        assert len(questions) == 3, "not after the last piece, when the result is there"
        questions = []
        assert on_main_in_pieces(three, ranks, is_stopping=lambda: asked(2)) is None
        with pytest.raises(DataError, match="too small") as caught:
            on_main_in_pieces(lambda: three(error=True), ranks)
        assert caught.value.agreed


@pytest.mark.parametrize("world_size", [1, 2])
def test_pieces(world_size: int) -> None:
    run_ranks(_work, world_size)
