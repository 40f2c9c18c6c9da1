"""Images of an evaluation that cannot be read: named, counted and bounded."""

from __future__ import annotations

from vitscale.data.loader import Quarantined
from vitscale.data.manifest import Manifest
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


def check_readable(manifest: Manifest, unreadable: tuple[str, ...], *, at_most: int | None = None) -> None:
    """Refuse a set of which too many images cannot be read. The same on all ranks, which see the same.

    Args:
        manifest: the set.
        unreadable: its images that cannot be read.
        at_most: so many are fine; by default one, or one in a hundred.

    Raises:
        DataError: names the first ones, and how many there are.
    """
    allowed = max(1, int(MAX_UNREADABLE_SHARE * manifest.num_samples)) if at_most is None else at_most
    if len(unreadable) == manifest.num_samples:
        raise on_every_rank(
            DataError(
                f"{manifest.shown}: none of {manifest.num_samples} images can be read ({unreadable[0]}); write the "
                f"shard set again and evaluate anew"
            )
        )
    if len(unreadable) > allowed:
        more = f", and {len(unreadable) - NAMED} more" if len(unreadable) > NAMED else ""
        raise on_every_rank(
            DataError(
                f"{manifest.shown}: {len(unreadable)} of {manifest.num_samples} images cannot be read, of which "
                f"{allowed} are allowed: {'; '.join(unreadable[:NAMED])}{more}; mend the shard set, or allow them "
                f"with --max-unreadable {len(unreadable)}"
            )
        )
