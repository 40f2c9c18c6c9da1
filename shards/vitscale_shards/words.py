"""Lines that the commands say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vitscale.data.manifest import Manifest
    from vitscale_shards.planning.plan import Plan


def count(number: int, what: str) -> str:
    """``1 shard``, ``2,000 shards``."""
    if number == 1:
        return f"1 {what}"
    return f"{number:,} {what}{'es' if what.endswith('s') else 's'}"


def warn(text: str) -> None:
    """Say something that is no result."""
    typer.echo(text, err=True)


def summary(plan: Plan, *, was_complete: bool = False) -> str:
    """One line about a complete set."""
    from vitscale_shards.checking.whole_set import read_index
    from vitscale_shards.writing.records import FAILURES_NAME, read_failures

    place, manifest = plan.place, read_index(plan.place)
    text = (
        f"{manifest.split}: {manifest.num_samples:,} samples, {count(len(manifest.shards), 'shard')}, "
        f"{manifest.num_bytes / 1e6:,.1f} MB, {_classes(manifest)} -> {place.url}"
    )
    if was_complete:
        text += " (was complete already; nothing written, file contents were not compared)"
    if failures := read_failures(place):
        text += (
            f"; {count(len(failures), 'bad image')} left out, see {place.url}/{FAILURES_NAME}; "
            f"'vitscale shards retry {place.url}' tries only these again"
        )
    return text


def _classes(manifest: Manifest) -> str:
    return "labels without names" if manifest.classes is None else count(len(manifest.classes), "class")
