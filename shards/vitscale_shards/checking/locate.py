"""Find which byte of a damaged tar is wrong, by holding it against what the plan gives."""

from __future__ import annotations

from dataclasses import replace
from typing import BinaryIO

from vitscale.errors import DataError
from vitscale_shards.checking.faults import SetFault
from vitscale_shards.planning.plan import Plan
from vitscale_shards.sources import SourceSpec
from vitscale_shards.tar import BLOCK, key_of
from vitscale_shards.writing.compose import ImageOf, compose, from_source


def locate(plan: Plan, faults: list[SetFault]) -> list[SetFault]:
    """The same faults, those of a checksum with the place of the first wrong byte and its sample.

    They stay as they are if the source is not at hand, or no longer what it was.
    """
    if not any(_is_unplaced(fault) for fault in faults):
        return faults
    try:
        source = SourceSpec.from_json(plan.head.source).open()
    except DataError:
        return faults
    image_of = from_source(source, plan.head.treatment)
    numbers = {plan.shard_name(shard): shard for shard in range(plan.num_shards)}
    return [
        _placed(plan, numbers[fault.file], image_of, fault) if _is_unplaced(fault) and fault.file in numbers else fault
        for fault in faults
    ]


def _placed(plan: Plan, shard: int, image_of: ImageOf, fault: SetFault) -> SetFault:
    with plan.place.open(fault.file) as file:
        comparison = _Comparison(file)
        stream = compose(
            comparison, plan.rows(shard), image_of, multi_label=plan.head.multi_label, failed=lambda row, reason: None
        )
    first = comparison.first_difference
    if first is None:
        return fault
    message = f"{fault.message.partition(';')[0]}; byte {first} is the first wrong one"
    member = next((m for members in stream.members for m in members if m.offset + m.size > first), None)
    if member is None:
        return replace(fault, offset=first, message=f"{message}, behind the last member")
    part = (
        "content of" if first >= member.offset else "header of" if first >= member.offset - BLOCK else "padding before"
    )
    return replace(fault, offset=first, key=key_of(member.name), message=f"{message}, in the {part} {member.name}")


def _is_unplaced(fault: SetFault) -> bool:
    return fault.kind == "checksum" and fault.offset is None


class _Comparison:
    """A file to write to that compares with another one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offset = 0
        self.first_difference: int | None = None

    def write(self, data: bytes) -> int:
        there = self._file.read(len(data))
        if there != data and self.first_difference is None:
            pairs = zip(there.ljust(len(data), b"\0"), data, strict=True)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(there))
            self.first_difference = self._offset + first
        self._offset += len(data)
        return len(data)
