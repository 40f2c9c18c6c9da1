"""How many of the allocated nodes are used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.errors import LaunchError
from vitscale_launch.allocation import choose_nodes


@given(
    allocated=st.integers(1, 40),
    low=st.integers(1, 40),
    more=st.integers(0, 40),
    ranks=st.integers(1, 9),
    batches=st.none() | st.integers(1, 600),
)
def test_it_is_the_largest_number_that_fits(
    allocated: int, low: int, more: int, ranks: int, batches: int | None
) -> None:
    names = tuple(f"n{number}" for number in range(allocated))
    fitting = [
        count
        for count in range(low, min(allocated, low + more) + 1)
        if batches is None or batches % (count * ranks) == 0
    ]
    options = {"nodes_min": low, "nodes_max": low + more, "ranks_per_node": ranks, "micro_batches": batches}
    if not fitting:
        with pytest.raises(LaunchError, match="submit"):
            choose_nodes(names, **options)  # type: ignore[arg-type]
        return
    chosen = choose_nodes(names, **options)  # type: ignore[arg-type]
    assert len(chosen.nodes) == fitting[-1]
    assert chosen.nodes + chosen.spared == names
    assert chosen.ranks == fitting[-1] * ranks


def test_the_numbers_that_fit_are_named() -> None:
    with pytest.raises(LaunchError, match=r"12 micro-batches .* 4 ranks on each of 2 to 2 nodes; .* fit: 1, 3; submit"):
        choose_nodes(("a", "b", "c"), nodes_min=2, nodes_max=2, ranks_per_node=4, micro_batches=12)
