"""Images of an evaluation that cannot be read: named, counted and bounded."""

from __future__ import annotations

from collections.abc import Sequence

from vitscale.data.loader import Quarantined
from vitscale.distributed import Ranks
from vitscale.errors import DataError, on_every_rank

# Of a set, up to which its results say something of it.
MAX_UNREADABLE_SHARE = 0.01
NAMED = 3


def gather_unreadable(ranks: Ranks, mine: list[Quarantined]) -> tuple[str, ...]:
    """Shard, key and reason for each unreadable image of all ranks, in the order of the set. Collective.

    Returns:
        The same on every rank.
    """
    faults = sorted((fault for of_rank in ranks.gather(mine) for fault in of_rank), key=lambda fault: fault.position)
    return tuple(f"{fault.shard}: {fault.key} ({fault.reason})" for fault in faults)


def check_readable(shown: str, num_images: int, unreadable: Sequence[str], *, at_most: int | None = None) -> None:
    """Refuse images of which too many cannot be read. The same on all ranks, which see the same.

    Args:
        shown: stands for the images in messages.
        num_images: all of them.
        unreadable: those that cannot be read.
        at_most: so many are fine; by default one, or one in a hundred.

    Raises:
        DataError: names the first ones, and how many there are.
    """
    allowed = max(1, int(MAX_UNREADABLE_SHARE * num_images)) if at_most is None else at_most
    if len(unreadable) == num_images:
        raise on_every_rank(
            DataError(
                f"{shown}: none of {num_images} images can be read ({unreadable[0]}); write the shard set again, or "
                f"name other images"
            )
        )
    if len(unreadable) > allowed:
        more = f", and {len(unreadable) - NAMED} more" if len(unreadable) > NAMED else ""
        raise on_every_rank(
            DataError(
                f"{shown}: {len(unreadable)} of {num_images} images cannot be read, of which {allowed} are allowed: "
                f"{'; '.join(unreadable[:NAMED])}{more}; mend them, or allow them with --max-unreadable "
                f"{len(unreadable)}"
            )
        )
