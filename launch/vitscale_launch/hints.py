"""Commands that a user is told to type."""

from __future__ import annotations

import shlex


def launch_command(*words: object) -> str:
    """``vitscale launch ...`` for a shell, with quotes where a path needs them."""
    return shlex.join(["vitscale", "launch", *map(str, words)])
