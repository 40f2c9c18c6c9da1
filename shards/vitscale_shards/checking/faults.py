"""What can be wrong with a shard set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FaultKind = Literal["missing", "size", "checksum", "swapped", "tar", "index", "idx", "sample", "foreign", "leftover"]


@dataclass(frozen=True)
class SetFault:
    """One thing that is wrong with a shard set.

    Kinds:

    - ``missing``: a tar of the index is not there.
    - ``size``: a tar has another size than the index says, mostly because it is cut off.
    - ``checksum``: a tar's SHA-256 is not the one in the index.
    - ``swapped``: a tar holds what another tar of the set should hold.
    - ``tar``: the structure of a tar is damaged, or the storage cannot read it.
    - ``index``: ``index.json`` is missing, unreadable, contradicts itself, or is of another writing than the tars.
    - ``idx``: an ``.idx`` is missing or is not what its tar holds.
    - ``sample``: a sample's key, members, label or image.
    - ``foreign``: a file or folder that does not belong to the set.
    - ``leftover``: what a writer left that died or is still at work.
    """

    kind: FaultKind
    file: str
    """Name of the file in the set's folder."""

    offset: int | None
    """Where in that file, in bytes. For a member of a tar: where its content starts."""

    key: str | None
    """Key of the sample."""

    message: str


def format_fault(fault: SetFault) -> str:
    """One line for a person to read. Names come from tars, so they are escaped."""
    line = fault.file
    if fault.offset is not None:
        line += f" at byte {fault.offset}"
    if fault.key is not None:
        line += f", sample {fault.key}"
    return printable(f"{line}: {fault.message}")


def printable(text: str) -> str:
    """The text with everything escaped that is not to be shown, such as line ends and a terminal's commands."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
