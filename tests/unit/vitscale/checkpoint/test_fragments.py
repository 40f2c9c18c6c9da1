"""Fragments of real engines: what is read from DeepSpeed's private attributes, and that no element is lost.

The first tests name one attribute each, so that a change in DeepSpeed fails there and says which. What they compare
with, DeepSpeed's public ``safe_get_full_*`` functions, tells whole tensors without telling where they lie.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.distributed import run_ranks
from tests.unit.vitscale.checkpoint.engines import CASES, SHAPES, STEPS, Whole, build, make_steps, whole_state
from vitscale.checkpoint.format import AVERAGE, MASTER, MOMENTS, Layout
from vitscale.checkpoint.fragments import (
    Fragment,
    fragments,
    layouts,
    optimizer_steps,
    parameter_shapes,
    prepare_moments,
    pull_masters,
    push_masters,
    working_copies_differ,
)
from vitscale.checkpoint.fragments import masters as flat_masters
from vitscale.distributed import Ranks, connect
from vitscale.topology import Topology

WORLD_SIZES = (2, 3)
KINDS = (MASTER, *MOMENTS)


# One check for each private attribute. Each is local: `whole` was gathered before.

Check = Callable[[Any, Whole], bool]


def masters(zero: Any) -> list[Tensor]:
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return list(getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition)


def is_flat_fp32(tensors: Any) -> bool:
    # Two parameter groups: with and without weight decay.
    return len(tensors) == 2 and all(t.dtype == torch.float32 and t.ndim == 1 for t in tensors)


def holds_each_parameter_once(engine: Any, groups: Any) -> bool:
    ours = sorted(id(parameter) for parameter in engine.module.parameters())
    return sorted(id(parameter) for group in groups for parameter in group) == ours


def names_of(engine: Any) -> dict[int, str]:
    return {id(parameter): name for name, parameter in engine.module.named_parameters()}


def same(left: Tensor, right: Tensor) -> bool:
    """Equal, where the padding of the last rank may be anything."""
    return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def state_is_by_flat_master(engine: Any, whole: Whole) -> bool:
    states = [engine.optimizer.optimizer.state[flat] for flat in masters(engine.optimizer)]
    shapes_fit = all(
        state[kind].shape == flat.shape
        for state, flat in zip(states, masters(engine.optimizer), strict=True)
        for kind in MOMENTS
    )
    return shapes_fit and all(int(state["step"]) == STEPS for state in states)


def mapping_locates_fragments(engine: Any, whole: Whole) -> bool:
    zero, names = engine.optimizer, names_of(engine)
    groups = getattr(zero, "bit16_groups", None) or zero.bf16_groups
    located = 0
    for flat, group in zip(masters(zero), groups, strict=True):
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                theirs = whole[f"{names[id(parameter)]}|{MASTER}"].flatten()[low.start : low.start + low.numel]
                located += low.numel
                if not torch.equal(flat[high.start : high.start + low.numel], theirs):
                    return False
    return located > 0


def group_is_cut_into_equal_parts(engine: Any, whole: Whole) -> bool:
    """Parameters lie one after the other in the order of the group, and only the end is padded."""
    zero, names = engine.optimizer, names_of(engine)
    groups = getattr(zero, "bit16_groups", None) or zero.bf16_groups
    for flat, group in zip(masters(zero), groups, strict=True):
        together = torch.cat([whole[f"{names[id(parameter)]}|{MASTER}"].flatten() for parameter in group])
        start = engine.global_rank * flat.numel()
        mine = together[start : start + flat.numel()]
        if not torch.equal(flat[: len(mine)], mine) or flat.numel() * engine.world_size < together.numel():
            return False
    return True


def grad_position_locates_fragments(engine: Any, whole: Whole) -> bool:
    zero = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = engine.global_rank * size
        theirs = whole[f"{name}|{MASTER}"].flatten()[start : start + size]
        if not torch.equal(masters(zero)[group][offset : offset + len(theirs)], theirs):
            return False
    return True


def working_partitions_are_masters(engine: Any, whole: Whole) -> bool:
    zero = engine.optimizer
    pairs = zip(zero.fp16_partitioned_groups_flat, masters(zero), strict=True)
    return all(same(working, master.to(working.dtype)) for working, master in pairs)


def partitions_lie_in_working_flat(engine: Any, whole: Whole) -> bool:
    zero = engine.optimizer
    for flat, parts in zip(zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True):
        if not same(torch.cat([part.flatten() for part in parts]), flat):
            return False
    return True


def unflatten_gives_views(engine: Any, whole: Whole) -> bool:
    zero = engine.optimizer
    for flat, parts in zip(zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True):
        views = zero.unflatten(flat, parts)
        if not all(same(view.flatten(), part.flatten()) for view, part in zip(views, parts, strict=True)):
            return False
        if views[0].untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
            return False
    return True


def param_ids_differ(engine: Any, whole: Whole) -> bool:
    zero = engine.optimizer
    ids = {zero.get_param_id(parameter) for parameter in engine.module.parameters()}
    return ids == set(zero.grad_position) and len(ids) == len(SHAPES)


EVERY_STAGE: dict[str, Check] = {
    "optimizer.state": state_is_by_flat_master,
    "param_groups": lambda e, _: len(e.optimizer.param_groups) == 2,
    "zero_optimization_stage": lambda e, _: e.zero_optimization_stage() in (1, 2, 3),
    "world_size": lambda e, _: e.world_size in WORLD_SIZES,
}
LINKED: dict[str, Check] = {
    "_hp_mapping": mapping_locates_fragments,
    "order within a group": group_is_cut_into_equal_parts,
    "update_lp_params": lambda e, _: callable(e.optimizer.update_lp_params),
    "no fp32_partitioned_groups_flat": lambda e, _: not hasattr(e.optimizer, "fp32_partitioned_groups_flat"),
}
ZERO_1_2: dict[str, Check] = {
    "single_partition_of_fp32_groups": lambda e, _: is_flat_fp32(e.optimizer.single_partition_of_fp32_groups),
    "bit16_groups": lambda e, _: holds_each_parameter_once(e, e.optimizer.bit16_groups),
}
BF16_WITH_FP32_ACCUMULATION: dict[str, Check] = {
    "fp32_groups_flat_partition": lambda e, _: is_flat_fp32(e.optimizer.fp32_groups_flat_partition),
    "bf16_groups": lambda e, _: holds_each_parameter_once(e, e.optimizer.bf16_groups),
}
ZERO_3: dict[str, Check] = {
    "fp32_partitioned_groups_flat": lambda e, _: is_flat_fp32(e.optimizer.fp32_partitioned_groups_flat),
    "fp16_groups": lambda e, _: holds_each_parameter_once(e, e.optimizer.fp16_groups),
    "get_param_id": param_ids_differ,
    "grad_position": grad_position_locates_fragments,
    "_get_param_partition_rank": lambda e, _: (
        {e.optimizer._get_param_partition_rank(p) for p in e.module.parameters()} == {e.global_rank}
    ),
    "ds_shape": lambda e, _: {n: list(p.ds_shape) for n, p in e.module.named_parameters()} == SHAPES,
    "ds_numel": lambda e, whole: all(
        p.ds_numel == whole[f"{n}|{MASTER}"].numel() for n, p in e.module.named_parameters()
    ),
    "fp16_partitioned_groups_flat": working_partitions_are_masters,
    "fp16_partitioned_groups": partitions_lie_in_working_flat,
    "unflatten": unflatten_gives_views,
    "checkpoint_event_prologue": lambda e, _: callable(e.optimizer.checkpoint_event_prologue),
    "checkpoint_event_epilogue": lambda e, _: callable(e.optimizer.checkpoint_event_epilogue),
}


def checks(stage: int, precision: str) -> dict[str, Check]:
    if stage == 3:
        return EVERY_STAGE | ZERO_3
    names = BF16_WITH_FP32_ACCUMULATION if (stage, precision) == (1, "bf16") else ZERO_1_2
    return EVERY_STAGE | LINKED | names


def fault_of(check: Check, engine: Any, whole: Whole) -> str | None:
    try:
        return None if check(engine, whole) else "has another meaning"
    except Exception as error:
        return repr(error)


def facts(engine: Any, ranks: Ranks) -> dict[str, Any]:
    """What this rank's fragments are, as plain data."""
    averages = [flat * 2 for flat in flat_masters(engine)]
    found = list(fragments(engine, averages))
    assert {fragment.kind for fragment in found} == {*KINDS, AVERAGE}
    assert all(fragment.values.is_contiguous() and fragment.values.ndim == 1 for fragment in found)
    masters_of = {(f.name, f.start): f.values for f in found if f.kind == MASTER}
    assert all(torch.equal(f.values, masters_of[f.name, f.start] * 2) for f in found if f.kind == AVERAGE)
    return {
        "layouts": layouts(engine),
        "fragments": [(f.name, f.kind, f.start, f.values.numel()) for f in found],
        "steps": optimizer_steps(engine),
        "shapes": parameter_shapes(engine),
    }


def differ(engine: Any, ranks: Ranks) -> list[bool]:
    return ranks.gather(working_copies_differ(engine))


def assert_working_copies_are_watched(engine: Any, ranks: Ranks) -> None:
    """A difference is found by the rank that owns the element, and pushing ends it."""
    nobody = [False] * ranks.world_size
    assert differ(engine, ranks) == nobody
    for planted in range(ranks.world_size):
        expected = [rank == planted for rank in range(ranks.world_size)]
        mine = [fragment for fragment in fragments(engine) if fragment.kind == MASTER]
        owns = ranks.gather(bool(mine))
        if not owns[planted]:
            continue
        if ranks.topology.rank == planted:
            mine[-1].values[-1] += 1
        assert differ(engine, ranks) == expected
        push_masters(engine)
        assert differ(engine, ranks) == nobody
        if ranks.topology.rank == planted:
            change_working_copy(engine, mine[0])
        assert differ(engine, ranks) == expected
        pull_masters(engine)
        assert differ(engine, ranks) == nobody


def change_working_copy(engine: Any, fragment: Fragment) -> None:
    """As if one element had not been copied from the master weights."""
    parameter = dict(engine.module.named_parameters())[fragment.name]
    with torch.no_grad():
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor[0] += 1
        else:
            parameter.view(-1)[fragment.start] += 1


def assert_padding_does_not_matter(engine: Any, ranks: Ranks) -> None:
    """The last rank's partition may end with whatever was in memory, even with NaN."""
    owned = [torch.zeros_like(flat, dtype=torch.bool) for flat in flat_masters(engine)]
    for fragment in fragments(engine):
        if fragment.kind == MASTER:
            (flat,) = [
                number
                for number, flat in enumerate(flat_masters(engine))
                if flat.untyped_storage().data_ptr() == fragment.values.untyped_storage().data_ptr()
            ]
            offset = fragment.values.storage_offset() - flat_masters(engine)[flat].storage_offset()
            owned[flat][offset : offset + fragment.values.numel()] = True
    for flat, mask in zip(flat_masters(engine), owned, strict=True):
        flat.data[~mask] = torch.nan
    push_masters(engine)
    assert differ(engine, ranks) == [False] * ranks.world_size
    assert all(torch.isfinite(fragment.values).all() for fragment in fragments(engine))


def _look(topology: Topology, root: Path) -> None:
    with connect(topology, timeout_s=60) as ranks:
        for stage, precision in CASES:
            engine = build(stage, precision, ranks, seed=0)
            assert optimizer_steps(engine) == 0
            assert {fragment.kind for fragment in fragments(engine)} <= {MASTER}
            make_steps(engine)
            whole = whole_state(engine)
            faults = {name: fault_of(check, engine, whole) for name, check in checks(stage, precision).items()}
            (root / f"{stage}-{precision}-{topology.rank}.json").write_text(
                json.dumps(facts(engine, ranks) | {"faults": faults})
            )
            for fragment in fragments(engine):
                theirs = whole[f"{fragment.name}|{fragment.kind}"].flatten()[fragment.start :]
                assert torch.equal(fragment.values, theirs[: fragment.values.numel()])
            assert_working_copies_are_watched(engine, ranks)
            assert_padding_does_not_matter(engine, ranks)
            assert_moments_are_prepared(engine)


def assert_moments_are_prepared(engine: Any) -> None:
    prepare_moments(engine, steps=7)
    assert optimizer_steps(engine) == 7
    assert not any(fragment.values.any() for fragment in fragments(engine) if fragment.kind in MOMENTS)
    counters = [state["step"] for state in engine.optimizer.optimizer.state.values() if "step" in state]
    # One counter for all groups would be advanced by each of them.
    assert len({counter.data_ptr() for counter in counters}) == len(counters) == 2
    prepare_moments(engine, steps=0)
    assert optimizer_steps(engine) == 0
    assert {fragment.kind for fragment in fragments(engine)} <= {MASTER}


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each number of ranks a folder; in it, for each stage, precision and rank, what was found."""
    root = tmp_path_factory.mktemp("looked")
    for world_size in WORLD_SIZES:
        (root / str(world_size)).mkdir()
        run_ranks(_look, world_size, root / str(world_size))
    return root


def found(looked: Path, world_size: int, stage: int, precision: str) -> list[dict[str, Any]]:
    return [
        json.loads((looked / str(world_size) / f"{stage}-{precision}-{rank}.json").read_text())
        for rank in range(world_size)
    ]


ATTRIBUTES = [(stage, precision, name) for stage, precision in CASES for name in checks(stage, precision)]


@pytest.mark.parametrize(("stage", "precision", "name"), ATTRIBUTES)
def test_deepspeed_attribute(stage: int, precision: str, name: str, looked: Path) -> None:
    for world_size in WORLD_SIZES:
        for rank, each in enumerate(found(looked, world_size, stage, precision)):
            fault = each["faults"][name]
            assert fault is None, (
                f"DeepSpeed's {name} (ZeRO {stage}, {precision}, rank {rank} of {world_size}): {fault}; "
                f"fragments.py reads it"
            )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_layouts_tell_who_owns_what(stage: int, precision: str, world_size: int, looked: Path) -> None:
    """Element by element: the rank that the two numbers give is the one that has it, and no other has it."""
    ranks = found(looked, world_size, stage, precision)
    told = ranks[0]["layouts"]
    assert told.keys() == SHAPES.keys()
    assert all(each["layouts"] == told for each in ranks)
    assert all((each["steps"], each["shapes"]) == (STEPS, SHAPES) for each in ranks)
    expected = {
        (name, kind, element): (layout.offset + element) // layout.size
        for name, layout in ((name, Layout(*told[name])) for name in SHAPES)
        for kind in (*KINDS, AVERAGE)
        for element in range(torch.Size(SHAPES[name]).numel())
    }
    owners = [
        ((name, kind, element), rank)
        for rank, each in enumerate(ranks)
        for name, kind, start, numel in each["fragments"]
        for element in range(start, start + numel)
    ]
    assert len(owners) == len(expected)
    assert dict(owners) == expected
