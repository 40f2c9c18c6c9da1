"""Datasets of the kinds that users have. Each module has one class with ``rows()`` and ``read(row)``."""

from vitscale_shards.sources.opening import SourceSpec

__all__ = ["SourceSpec"]
