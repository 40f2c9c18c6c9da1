"""Pairs and times for people."""

from __future__ import annotations

import time
from collections.abc import Sequence

import typer


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and their values, one below the other."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        typer.echo(f"{name:<{width}}  {value}")


def duration(seconds: float) -> str:
    """``3 h 02 min``."""
    whole = max(0, round(seconds))
    for unit, size, lesser, lesser_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // lesser_size:02} {lesser}"
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"


def clock(unix_s: float) -> str:
    """Local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
