"""Master weights and optimizer moments as fragments of logical tensors, whatever ZeRO stage and world size.

This is the only file that reads private attributes of DeepSpeed's optimizers (tested with 0.19.8).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitscale.checkpoint.format import AVERAGE, BUFFER, MASTER, MOMENTS, MOMENTUM, Layout


class _Range(NamedTuple):
    """``numel`` elements of a flattened parameter from ``start`` lie at ``offset`` of a flat partition."""

    name: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class _Partition:
    """One flat fp32 partition of this rank, its optimizer state, and which parameters lie where in it."""

    flat: Tensor
    state: dict[str, Any]
    ranges: list[_Range]


@dataclass(frozen=True)
class Fragment:
    """A view of one range of one logical tensor on this rank."""

    name: str
    kind: str
    start: int
    values: Tensor


def _partitions(engine: Any) -> Iterator[_Partition]:
    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    states = zero.optimizer.state
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO 3
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            ranges = []
            for parameter in parameters:
                _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                start = zero._get_param_partition_rank(parameter) * size
                # The last ranks may hold padding only.
                numel = max(0, min(size, parameter.ds_numel - start))
                ranges.append(_Range(names[id(parameter)], start, numel, offset))
            yield _Partition(flat, states[flat], ranges)
        return
    flats, groups = _flat_groups(zero)
    for flat, parameters in zip(flats, groups, strict=True):
        ranges = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                ranges.append(_Range(names[id(parameter)], low.start, low.numel, high.start))
        yield _Partition(flat, states[flat], ranges)


def _flat_groups(zero: Any) -> tuple[Any, Any]:
    """Of ZeRO 1 and 2, this rank's partition of each group, and the parameters of each."""
    # With bf16 and fp32 accumulation, stage 1 is another class with other names for the same.
    flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
    return flats, getattr(zero, "bit16_groups", None) or zero.bf16_groups


def parameter_shapes(engine: Any) -> dict[str, list[int]]:
    """Logical shape of every parameter."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
    }


def layouts(engine: Any) -> dict[str, Layout]:
    """How the elements of every parameter are spread over ranks. The same on every rank."""
    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO 3: each parameter by itself
        return {
            names[id(parameter)]: Layout(0, zero.grad_position[zero.get_param_id(parameter)][2])
            for group in zero.fp16_groups
            for parameter in group
        }
    # ZeRO 1 and 2: the parameters of a group, one after the other.
    found = {}
    flats, groups = _flat_groups(zero)
    for flat, parameters in zip(flats, groups, strict=True):
        offset = 0
        for parameter in parameters:
            found[names[id(parameter)]] = Layout(offset, flat.numel())
            offset += parameter.numel()
    return found


def masters(engine: Any) -> list[Tensor]:
    """The flat fp32 partitions of this rank: what the optimizer updates. Views, not copies."""
    return [partition.flat for partition in _partitions(engine)]


def fragments(engine: Any, averages: Sequence[Tensor] | None = None) -> Iterator[Fragment]:
    """This rank's fragments: master weights always, moments once the optimizer has made a step.

    Args:
        engine: of DeepSpeed.
        averages: of the partitions that :func:`masters` gives, if they are kept.
    """
    for number, partition in enumerate(_partitions(engine)):
        kinds = {MASTER: partition.flat}
        kinds |= {kind: partition.state[kind] for kind in moment_kinds(engine) if kind in partition.state}
        if averages is not None:
            kinds[AVERAGE] = averages[number]
        for name, start, numel, offset in partition.ranges:
            if numel:
                for kind, flat in kinds.items():
                    yield Fragment(name, kind, start, flat.detach()[offset : offset + numel])


def persistent_buffers(engine: Any) -> dict[str, Tensor]:
    """What a state dict holds besides parameters: running statistics and the like, whole and alike on every rank."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in engine.module.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def buffer_fragments(buffers: dict[str, Tensor]) -> list[Fragment]:
    """Buffers as fragments in fp32: copies, unless they are fp32 and contiguous."""
    return [Fragment(name, BUFFER, 0, buffer.detach().float().reshape(-1)) for name, buffer in buffers.items()]


def moment_kinds(engine: Any) -> tuple[str, ...]:
    """What the optimizer keeps beside the weights: AdamW's two moments, or SGD's momentum."""
    return MOMENTUM if isinstance(engine.optimizer.optimizer, torch.optim.SGD) else MOMENTS


def optimizer_steps(engine: Any) -> int:
    """Updates that the optimizer has applied; AdamW's bias correction depends on it."""
    return max((int(p.state["step"]) for p in _partitions(engine) if "step" in p.state), default=0)


def prepare_moments(engine: Any, *, steps: int) -> None:
    """Give a fresh engine the moments that are read next.

    Args:
        engine: of DeepSpeed.
        steps: updates that the optimizer had applied; 0 means that there are no moments yet.
    """
    for partition in _partitions(engine):
        partition.state.clear()
        if steps:
            for kind in moment_kinds(engine):
                partition.state[kind] = torch.zeros_like(partition.flat)
            # A tensor of its own for each partition: AdamW counts in place.
            partition.state["step"] = torch.tensor(float(steps))


@torch.no_grad()
def set_masters(engine: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replace this rank's master weights.

    Args:
        engine: of DeepSpeed. What its model computes with stays, until :func:`push_masters`.
        tensors: whole parameters with their names, which need not live on; those that are not among them stay. Other
            names are passed over.
    """
    parts = defaultdict(list)
    for partition in _partitions(engine):
        for name, start, numel, offset in partition.ranges:
            parts[name].append((partition.flat[offset : offset + numel], start))
    for name, values in tensors:
        for part, start in parts[name]:
            part.copy_(values.flatten()[start : start + part.numel()])


def pull_masters(engine: Any) -> None:
    """Take the master weights back from the parameters that the model computes with: those of a fresh engine, which
    DeepSpeed makes from these, after a load that came to nothing."""
    for master, working in _with_working_copies(engine):
        master.copy_(working)


def working_copies_differ(engine: Any) -> bool:
    """Whether some of this rank's master weights, rounded, are not what the model computes with."""
    return any(not torch.equal(master.to(working.dtype), working) for master, working in _with_working_copies(engine))


def _with_working_copies(engine: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Each range of this rank's master weights, and the same elements of what the model computes with. The padding
    between ranges is left out: it may be anything, even NaN."""
    zero = engine.optimizer
    in_partitions = getattr(zero, "fp16_partitioned_groups_flat", None)  # ZeRO 3
    parameters = dict(engine.module.named_parameters())
    for number, partition in enumerate(_partitions(engine)):
        for name, start, numel, offset in partition.ranges:
            if in_partitions is not None:
                working = in_partitions[number][offset : offset + numel]
            else:
                working = parameters[name].detach().flatten()[start : start + numel]
            yield partition.flat.detach()[offset : offset + numel], working


def push_masters(engine: Any) -> None:
    """Copy changed master weights into the parameters that the model computes with. Collective."""
    zero = engine.optimizer
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero.checkpoint_event_prologue()
    groups = zip(
        zero.fp32_partitioned_groups_flat,
        zero.fp16_partitioned_groups_flat,
        zero.fp16_partitioned_groups,
        strict=True,
    )
    for master, working, parameters in groups:
        working.data.copy_(master.data)
        for parameter, part in zip(parameters, zero.unflatten(working, parameters), strict=True):
            parameter.data = part.data
    zero.checkpoint_event_epilogue()
