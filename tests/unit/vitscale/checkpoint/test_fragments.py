"""Fragments of real engines: what is read from DeepSpeed's private attributes, and that no element is lost.

The first tests name one attribute each, so that a change in DeepSpeed fails there and says which. What they compare
with, DeepSpeed's public ``safe_get_full_*`` functions, tells whole tensors without telling where they lie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import vitscale.train.engine as engine_module
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import CONFIG
from vitscale.checkpoint.fragments import (
    MASTER,
    MOMENTS,
    FragmentReader,
    fragments,
    optimizer_steps,
    parameter_shapes,
    push_masters,
    read_fragments,
    read_parameters,
    write_fragments,
)
from vitscale.config.loader import load_config
from vitscale.config.schema import TrainConfig
from vitscale.distributed import Ranks, connect
from vitscale.errors import CheckpointError
from vitscale.plan import RunPlan
from vitscale.topology import Topology

CASES = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
WRITERS = 2
STEPS = 3
MICRO_BATCH = 2
KINDS = (MASTER, *MOMENTS)
Whole = dict[str, Tensor]


class Odd(nn.Module):
    """Sizes that no number of ranks divides, and a parameter too small for two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.last = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        scaled: Tensor = self.last(torch.tanh(self.first(images))) * self.scale
        return scaled


SHAPES = {name: list(parameter.shape) for name, parameter in Odd().named_parameters()}


def build(stage: int, precision: str, ranks: Ranks, seed: int) -> Any:
    """An engine as the program builds it."""
    config = load_config(CONFIG, [f"engine.zero_stage={stage}", f"engine.precision={precision}"])
    global_batch_size = MICRO_BATCH * ranks.world_size
    plan: Any = SimpleNamespace(
        global_batch_size=global_batch_size, micro_batch_size=MICRO_BATCH, gradient_accumulation_steps=1
    )
    torch.manual_seed(seed)
    real_settings = engine_module.deepspeed_config

    def settings(config: TrainConfig, plan: RunPlan) -> dict[str, Any]:
        """DeepSpeed would keep parameters this small whole in stage 3."""
        changed = real_settings(config, plan)
        if stage == 3:
            changed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return changed

    engine_module.deepspeed_config = settings
    try:
        return engine_module.build_engine(Odd(), config, plan, ranks)
    finally:
        engine_module.deepspeed_config = real_settings


def make_steps(engine: Any) -> None:
    torch.manual_seed(engine.global_rank)
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    for _ in range(STEPS):
        engine.backward(engine(torch.randn(MICRO_BATCH, 7, dtype=dtype)).float().square().mean())
        engine.step()


def whole_state(engine: Any) -> Whole:
    """Master weights and moments as DeepSpeed's public functions tell them. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() < 3:
        # DeepSpeed does this itself within the first step, but then the moments of later groups are not there yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    state = {}
    for name, parameter in engine.module.named_parameters():
        state[f"{name}|{MASTER}"] = safe_get_full_fp32_param(parameter).clone().view(SHAPES[name])
        for kind in MOMENTS:
            state[f"{name}|{kind}"] = safe_get_full_optimizer_state(parameter, kind).clone().view(SHAPES[name])
    return state


def working_parameters(engine: Any) -> Whole:
    """What the model computes with. Collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def case_folder(root: Path, stage: int, precision: str) -> Path:
    return root / f"zero{stage}-{precision}"


def fragment_files(folder: Path, world_size: int = WRITERS) -> list[Path]:
    return [folder / f"rank-{rank}.safetensors" for rank in range(world_size)]


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
    "world_size": lambda e, _: e.world_size == WRITERS,
}
LINKED: dict[str, Check] = {
    "_hp_mapping": mapping_locates_fragments,
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


def _look(topology: Topology, root: Path) -> None:
    with connect(topology, timeout_s=60) as ranks:
        for stage, precision in CASES:
            engine = build(stage, precision, ranks, seed=0)
            make_steps(engine)
            whole = whole_state(engine)
            faults = {name: fault_of(check, engine, whole) for name, check in checks(stage, precision).items()}
            folder = case_folder(root, stage, precision)
            folder.mkdir(exist_ok=True)
            (folder / f"faults-{topology.rank}.json").write_text(json.dumps(faults))


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each stage and precision: each rank's faults of private attributes."""
    root = tmp_path_factory.mktemp("looked")
    run_ranks(_look, WRITERS, root)
    return root


ATTRIBUTES = [(stage, precision, name) for stage, precision in CASES for name in checks(stage, precision)]


@pytest.mark.parametrize(("stage", "precision", "name"), ATTRIBUTES)
def test_deepspeed_attribute(stage: int, precision: str, name: str, looked: Path) -> None:
    for rank in range(WRITERS):
        fault = json.loads((case_folder(looked, stage, precision) / f"faults-{rank}.json").read_text())[name]
        assert fault is None, (
            f"DeepSpeed's {name} (ZeRO {stage}, {precision}, rank {rank}): {fault}; fragments.py reads it"
        )


def _save(topology: Topology, root: Path) -> None:
    with connect(topology, timeout_s=60) as ranks:
        for seed, (stage, precision) in enumerate(CASES):
            engine = build(stage, precision, ranks, seed)
            folder = case_folder(root, stage, precision)
            folder.mkdir(exist_ok=True)
            path = fragment_files(folder)[topology.rank]
            assert optimizer_steps(engine) == 0
            write_fragments(engine, path.with_suffix(".first"))
            make_steps(engine)
            whole = whole_state(engine)
            if topology.rank == 0:
                torch.save(whole, folder / "whole.pt")
            assert optimizer_steps(engine) == STEPS
            assert parameter_shapes(engine) == SHAPES
            write_fragments(engine, path)
            with pytest.raises(CheckpointError, match=r"cannot write the checkpoint: .*No such file.*; free space or"):
                write_fragments(engine, folder / "absent" / "file")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each stage and precision: fragments of two ranks before and after some steps, and whole tensors."""
    root = tmp_path_factory.mktemp("saved")
    run_ranks(_save, WRITERS, root)
    return root


def pieces(files: list[Path]) -> Iterator[tuple[str, str, int, int]]:
    for path in files:
        with safe_open(path, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a mapping)
                name, kind, start = key.split("|")
                (numel,) = handle.get_slice(key).get_shape()
                yield name, kind, int(start), numel


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_the_files_hold_every_element_once(stage: int, precision: str, saved: Path) -> None:
    files = fragment_files(case_folder(saved, stage, precision))
    assert_tiled(files, KINDS)
    assert_tiled([path.with_suffix(".first") for path in files], (MASTER,))


def assert_tiled(files: list[Path], kinds: tuple[str, ...]) -> None:
    found = sorted(pieces(files))
    assert {(name, kind) for name, kind, _, _ in found} == {(name, kind) for name in SHAPES for kind in kinds}
    for name, shape in SHAPES.items():
        for kind in kinds:
            end = 0
            for piece in found:
                if piece[:2] == (name, kind):
                    assert piece[2] == end, piece
                    end += piece[3]
            assert end == torch.Size(shape).numel()


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_files_give_the_whole_tensors(stage: int, precision: str, saved: Path) -> None:
    folder = case_folder(saved, stage, precision)
    whole = torch.load(folder / "whole.pt")
    with FragmentReader(fragment_files(folder)) as reader:
        for name, shape in SHAPES.items():
            for kind in KINDS:
                assert reader.has(name, kind)
                read = torch.full(shape, torch.nan)
                reader.read(name, kind, 0, read.view(-1))
                assert torch.equal(read, whole[f"{name}|{kind}"])
        part = torch.empty(9)
        reader.read("first.weight", MASTER, 13, part)
        assert torch.equal(part, whole[f"first.weight|{MASTER}"].flatten()[13:22])
    parameters = read_parameters(fragment_files(folder), SHAPES)
    assert all(torch.equal(parameters[name], whole[f"{name}|{MASTER}"]) for name in SHAPES)


def _load(topology: Topology, root: Path, out: Path, shift: int) -> None:
    """Each saved state into the engine ``shift`` cases further on."""
    with connect(topology, timeout_s=60) as ranks:
        for index, (stage, precision) in enumerate(CASES):
            folder = case_folder(root, stage, precision)
            whole = torch.load(folder / "whole.pt")
            engine = build(*CASES[(index + shift) % len(CASES)], ranks, seed=99)
            read_fragments(engine, fragment_files(folder), steps=STEPS)
            push_masters(engine)
            read = whole_state(engine)
            assert [name for name in whole if not torch.equal(read[name], whole[name])] == []
            assert optimizer_steps(engine) == STEPS
            for name, parameter in working_parameters(engine).items():
                assert torch.equal(parameter, whole[f"{name}|{MASTER}"].to(parameter.dtype)), name
            again = case_folder(out, stage, precision)
            again.mkdir(exist_ok=True)
            write_fragments(engine, fragment_files(again, topology.world_size)[topology.rank])
            # Steps count apart: one counter for all groups would be advanced by each of them.
            make_steps(engine)
            assert {int(state["step"]) for state in engine.optimizer.optimizer.state.values()} == {2 * STEPS}


# Another stage in the same precision; another stage and the other precision.
@pytest.mark.parametrize(("world_size", "shift"), [(1, 2), (3, 3)])
def test_another_stage_precision_and_world_size_reads_the_same_bits(
    world_size: int, shift: int, saved: Path, tmp_path: Path
) -> None:
    run_ranks(_load, world_size, saved, tmp_path, shift)
    for stage, precision in CASES:
        assert_tiled(fragment_files(case_folder(tmp_path, stage, precision), world_size), KINDS)


def _load_before_the_first_step(topology: Topology, root: Path) -> None:
    with connect(topology, timeout_s=60) as ranks:
        for stage, precision in CASES:
            files = [p.with_suffix(".first") for p in fragment_files(case_folder(root, stage, precision))]
            engine = build(stage, precision, ranks, seed=99)
            read_fragments(engine, files, steps=0)
            push_masters(engine)
            assert optimizer_steps(engine) == 0
            assert {fragment.kind for fragment in fragments(engine)} == {MASTER}
            masters = read_parameters(files, SHAPES)
            for name, parameter in working_parameters(engine).items():
                assert torch.equal(parameter, masters[name].to(parameter.dtype)), name
            with pytest.raises(CheckpointError, match=rf"holds 0 of \d+ elements of \S+ \({MOMENTS[0]}\) from 0; the"):
                read_fragments(engine, files, steps=1)


def test_a_state_without_moments(saved: Path) -> None:
    run_ranks(_load_before_the_first_step, 1, saved)


def test_the_reader_says_what_is_missing(tmp_path: Path) -> None:
    files = fragment_files(tmp_path)
    for start, path in zip((0, 6), files, strict=True):
        save_file({f"w|{MASTER}|{start}": torch.arange(4.0)}, path)
    with FragmentReader(files) as reader:
        assert reader.has("w", MASTER)
        assert not reader.has("w", MOMENTS[0])
        out = torch.zeros(2)
        reader.read("w", MASTER, 7, out)
        assert out.tolist() == [1, 2]
        for start, numel, held in ((0, 10, 8), (4, 2, 0), (9, 2, 1)):
            message = (
                rf"^{tmp_path}: holds {held} of {numel} elements of w \(master\) from {start}; the checkpoint is dam"
            )
            with pytest.raises(CheckpointError, match=message):
                reader.read("w", MASTER, start, torch.zeros(numel))
    with pytest.raises(CheckpointError, match=r"holds 8 of 10 elements of w \(master\) from 0;"):
        read_parameters(files, {"w": [2, 5]})


def test_files_are_let_go_also_when_one_cannot_be_read(tmp_path: Path) -> None:
    good, bad, absent = fragment_files(tmp_path, 3)
    save_file({f"w|{MASTER}|0": torch.arange(4.0)}, good)
    bad.write_bytes(b"nothing of the kind")

    def is_mapped() -> bool:
        return str(good) in Path("/proc/self/maps").read_text()

    for other in (bad, absent):
        with pytest.raises(CheckpointError, match=f"^{other}: cannot be read") as raised, FragmentReader([good, other]):
            pass
        del raised
        assert not is_mapped()
    with FragmentReader([good]):
        assert is_mapped()
    assert not is_mapped()
