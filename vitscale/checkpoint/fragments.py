"""Master weights and optimizer moments as fragments of logical tensors, whatever ZeRO stage and world size.

A *fragment* is a contiguous range of one flattened parameter, or of one of its moments, that one rank owns.
Each rank writes its own fragments to one safetensors file; together the files hold every element once. A reader
opens the files and copies the ranges it needs, so a state saved on W ranks loads on any other number and stage.

This is the only file that reads private attributes of DeepSpeed's optimizers (tested with 0.19.8).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitscale.errors import CheckpointError

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


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

    @property
    def key(self) -> str:
        """Name within the safetensors file."""
        return f"{self.name}|{self.kind}|{self.start}"


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
    # ZeRO 1 and 2; with bf16 and fp32 accumulation stage 1 is another class with other names for the same.
    flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
    groups = getattr(zero, "bit16_groups", None) or zero.bf16_groups
    for flat, parameters in zip(flats, groups, strict=True):
        ranges = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                ranges.append(_Range(names[id(parameter)], low.start, low.numel, high.start))
        yield _Partition(flat, states[flat], ranges)


def parameter_shapes(engine: Any) -> dict[str, list[int]]:
    """Logical shape of every parameter."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
    }


def fragments(engine: Any) -> Iterator[Fragment]:
    """This rank's fragments: master weights always, moments once the optimizer has made a step."""
    for partition in _partitions(engine):
        kinds = {MASTER: partition.flat}
        kinds |= {kind: partition.state[kind] for kind in MOMENTS if kind in partition.state}
        for name, start, numel, offset in partition.ranges:
            if numel:
                for kind, flat in kinds.items():
                    yield Fragment(name, kind, start, flat.detach()[offset : offset + numel])


def optimizer_steps(engine: Any) -> int:
    """Updates that the optimizer has applied; its bias correction depends on it."""
    return max((int(p.state["step"]) for p in _partitions(engine) if "step" in p.state), default=0)


def write_fragments(engine: Any, path: Path) -> None:
    """Write this rank's fragments to ``path``.

    Raises:
        CheckpointError: the file cannot be written.
    """
    copies = {f.key: f.values.to("cpu", copy=True) for f in fragments(engine)}
    try:
        save_file(copies, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot write the checkpoint: {error}; free space or mend the disk") from error


class FragmentReader:
    """Logical tensors over the fragment files of one checkpoint. A context manager."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._stack = ExitStack()
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}

    def __enter__(self) -> FragmentReader:
        with ExitStack() as opened:
            for path in self._files:
                self._index(opened.enter_context(_open(path)))
            self._stack = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _index(self, handle: Any) -> None:
        for key in handle.keys():  # noqa: SIM118 (not a mapping)
            name, kind, start = key.split("|")
            (numel,) = handle.get_slice(key).get_shape()
            self._pieces.setdefault((name, kind), []).append((int(start), numel, handle, key))

    def has(self, name: str, kind: str) -> bool:
        """Whether the checkpoint holds this logical tensor."""
        return (name, kind) in self._pieces

    def read(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Copy ``out.numel()`` elements from ``start`` of a flattened logical tensor into ``out`` (1-D).

        Raises:
            CheckpointError: some of these elements are in no file.
        """
        end, copied = start + out.numel(), 0
        for piece_start, numel, handle, key in self._pieces.get((name, kind), []):
            low, high = max(start, piece_start), min(end, piece_start + numel)
            if low < high:
                values = handle.get_slice(key)[low - piece_start : high - piece_start]
                out[low - start : high - start].copy_(values)
                copied += high - low
        if copied != out.numel():
            raise CheckpointError(
                f"{self._files[0].parent}: holds {copied} of {out.numel()} elements of {name} ({kind}) from {start}; "
                f"the checkpoint is damaged: remove its folder to go on from an older one"
            )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); remove its folder to go on from an older one"
        ) from error


def read_fragments(engine: Any, files: list[Path], *, steps: int) -> None:
    """Fill a fresh engine's master weights and moments. :func:`push_masters` has to follow.

    Args:
        steps: updates that the optimizer had applied; 0 means that there are no moments yet.

    Raises:
        CheckpointError: the files do not hold what this rank needs.
    """
    with FragmentReader(files) as reader, torch.no_grad():
        for partition in _partitions(engine):
            if steps:
                for kind in MOMENTS:
                    partition.state[kind] = torch.zeros_like(partition.flat)
                # A tensor of its own for each partition: AdamW counts in place.
                partition.state["step"] = torch.tensor(float(steps))
        for fragment in fragments(engine):
            reader.read(fragment.name, fragment.kind, fragment.start, fragment.values)


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


def read_parameters(files: list[Path], shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Whole fp32 parameters, without DeepSpeed and without other ranks."""
    state = {}
    with FragmentReader(files) as reader:
        for name, shape in shapes.items():
            parameter = torch.empty(shape)
            reader.read(name, MASTER, 0, parameter.view(-1))
            state[name] = parameter
    return state
