"""The text that SLURM's commands print: blocks of ``Key=value``, times, durations, numbers."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import pairwise

# Values that may hold blanks. Each is the last one of its line in what scontrol prints.
_FREE_TEXT = {
    "AdminComment",
    "Command",
    "Comment",
    "Extra",
    "JobName",
    "OS",
    "Reason",
    "StdErr",
    "StdIn",
    "StdOut",
    "SystemComment",
    "WorkDir",
}
_KEY = re.compile(r"(?:^|\s)([A-Z][\w/:]*)=")
_NOTHING = {"", "(null)", "N/A", "None", "Unknown"}


def records(text: str) -> Iterator[dict[str, str]]:
    """What scontrol prints about several things: blocks of ``Key=value`` with an empty line in between."""
    for block in re.split(r"\n\s*\n", text):
        record: dict[str, str] = {}
        for line in block.splitlines():
            for key, value in _pairs(line):
                record.setdefault(key, value)
        if record:
            yield record


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    for match, after in pairwise([*_KEY.finditer(line), None]):
        assert match is not None
        key = match[1]
        # "JobState=FAILED Reason=NonZeroExitCode Dependency=(null)": of a job it is one word, in the middle.
        if key in _FREE_TEXT and not (key == "Reason" and "JobState=" in line):
            yield key, line[match.end() :].strip()
            return
        yield key, line[match.end() : after.start() if after else None].strip()


def word(value: str) -> str:
    """A value, or nothing for the words that SLURM has for it."""
    return "" if value in _NOTHING else value


def number(text: str) -> int:
    """The first number: of ``1-1``, ``4000M`` and the like."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0


def exit_code(text: str) -> int | None:
    """SLURM writes ``code:signal``."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        return None
    return 128 + int(match[2]) if int(match[2]) else int(match[1])


def unix_s(text: str) -> int | None:
    """SLURM prints local time without a zone."""
    try:
        return int(time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S")))
    except ValueError:
        return None


def seconds(duration: str) -> int | None:
    """Seconds of ``[days-]hours:minutes:seconds``, as SLURM prints durations; None if it has no end or is not known."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", duration)
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
