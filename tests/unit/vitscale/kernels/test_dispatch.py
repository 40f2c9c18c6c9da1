"""Which kernel ``auto`` takes on a GPU. No GPU is needed: shapes and the table decide."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitscale.kernels import dispatch
from vitscale.kernels.attention import _kernel, attention, attention_varlen
from vitscale.kernels.dispatch import architecture, choose, read_table


def row(tokens: int, ratio: float, **others: Any) -> dict[str, Any]:
    return {"arch": "sm_90", "head_dim": 64, "tokens": tokens, "direction": "both", "ratio": ratio} | others


def test_nothing_measured_is_the_librarys() -> None:
    assert choose("sm_90", 64, 197, "both", {}) == "sdpa"


def test_what_was_measured_decides_for_its_shape_only() -> None:
    table = read_table([row(197, 1.5), row(197, 0.9, head_dim=80), row(197, 0.9, direction="forward")])
    assert choose("sm_90", 64, 197, "both", table) == "triton"
    assert choose("sm_90", 80, 197, "both", table) == "sdpa"
    assert choose("sm_90", 72, 197, "both", table) == "sdpa"
    assert choose("sm_90", 64, 197, "forward", table) == "sdpa"
    assert choose("sm_80", 64, 197, "both", table) == "sdpa"


def test_a_shape_measured_twice_must_be_won_twice() -> None:
    assert choose("sm_90", 64, 197, "both", read_table([row(197, 1.5), row(197, 0.99)])) == "sdpa"
    assert choose("sm_90", 64, 197, "both", read_table([row(197, 0.99), row(197, 1.5)])) == "sdpa"
    assert choose("sm_90", 64, 197, "both", read_table([row(197, 1.0), row(197, 1.5)])) == "triton"


@given(points=st.dictionaries(st.integers(1, 12), st.sampled_from([0.5, 1.5]), max_size=6), tokens=st.integers(0, 13))
def test_between_two_measured_numbers_both_must_be_won(points: dict[int, float], tokens: int) -> None:
    below = [points[n] for n in sorted(points) if n <= tokens]
    above = [points[n] for n in sorted(points) if n >= tokens]
    wins = bool(below and above) and below[-1] >= 1 and above[0] >= 1
    rows = [row(n, ratio) for n, ratio in reversed(points.items())]
    assert choose("sm_90", 64, tokens, "both", read_table(rows)) == ("triton" if wins else "sdpa")


def test_the_committed_table_can_be_read() -> None:
    rows = json.loads(dispatch.MEASURED.read_text())["measurements"]
    for measured in rows:
        assert measured["direction"] in ("forward", "backward", "both")
        assert measured["arch"].startswith("sm_")
        assert measured["ratio"] > 0
        assert measured["best_library"]
    assert sum(len(points) for points in read_table(rows).values()) <= len(rows)


class Calls(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Tensors without memory on a GPU of compute capability 9.0, for which wins up to 257 tokens are recorded."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    dispatch._architecture.cache_clear()
    rows = [row(tokens, 1.5) for tokens in (65, 257)]
    rows += [row(65, 1.5, direction="forward"), row(257, 0.5, direction="forward")]
    monkeypatch.setattr(dispatch, "_TABLE", read_table(rows))
    return FakeTensorMode()


@pytest.mark.parametrize(
    ("tokens", "width", "dtype", "learns", "fused"),
    [
        (197, 64, torch.bfloat16, True, True),
        (197, 64, torch.float16, True, True),
        (197, 64, torch.bfloat16, False, False),
        (65, 64, torch.bfloat16, False, True),
        (577, 64, torch.bfloat16, True, False),
        (197, 80, torch.bfloat16, True, False),
        (197, 64, torch.float32, True, False),
        (197, 64, torch.float64, True, False),
        (197, 136, torch.bfloat16, True, False),
    ],
)
def test_auto_follows_the_table_on_a_gpu(
    hopper: FakeTensorMode, tokens: int, width: int, dtype: torch.dtype, learns: bool, fused: bool
) -> None:
    with hopper:
        qkv = torch.empty(2, tokens, 3, 2, width, dtype=dtype, device="cuda")
        # Not called: without its drivers torch cannot record a gradient on a GPU.
        with torch.inference_mode(not learns):
            assert _kernel(qkv, "auto") == ("triton" if fused else "sdpa")
        if learns:  # as in the first pass of a checkpoint that runs it again with gradients
            with torch.no_grad():
                assert _kernel(qkv, "auto") == ("triton" if fused else "sdpa")


def test_packed_sequences_are_fused_and_not_read(hopper: FakeTensorMode) -> None:
    with hopper, Calls() as calls:
        qkv = torch.empty(150, 3, 2, 64, dtype=torch.bfloat16, device="cuda")
        starts = torch.empty(4, dtype=torch.int32, device="cuda")
        attention_varlen(qkv, starts, max_seqlen=1000)
    assert "vitscale.attention.default" in calls.names
    assert not {name for name in calls.names if "_local_scalar_dense" in name or "_to_copy" in name}


def test_fp64_is_refused_under_triton_on_a_gpu(hopper: FakeTensorMode) -> None:
    with hopper:
        qkv = torch.empty(2, 197, 3, 2, 64, dtype=torch.float64, device="cuda")
        with pytest.raises(
            ValueError, match="float64; on a GPU the triton backend takes bfloat16, float16 and float32"
        ):
            attention(qkv, backend="triton")


def test_the_choice_compiles_into_one_graph(hopper: FakeTensorMode) -> None:
    def chosen(x: torch.Tensor) -> torch.Tensor:
        arch = dispatch.architecture(torch.device("cuda", 0))
        return x + (1 if choose(arch, 64, x.shape[0], "both") == "triton" else 0)

    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(chosen, fullgraph=True, backend="eager", dynamic=dynamic)
        assert [int(compiled(torch.zeros(n))[0]) for n in (64, 65, 197, 257, 258)] == [0, 1, 1, 1, 0]


def test_the_architecture_is_marked_as_torch_marks_constants() -> None:
    def marked() -> None: ...

    torch.compiler.assume_constant_result(marked)
    assert vars(architecture) == vars(marked) != {}
