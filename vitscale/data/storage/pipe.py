"""Shards that a shell command of the user's writes to its standard output, such as ``ssh store cat /shards/{name}``."""

from __future__ import annotations

import errno
import os
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from vitscale.data.storage.drivers import without_secrets
from vitscale.data.storage.transfer import Transfer
from vitscale.errors import DataError

# What a pipe of Linux holds.
BUFFER_BYTES = 64 << 10
_PLACE = "{name}"
_LONGEST_COMPLAINT = 300


class Pipe:
    """Runs the command anew for each read, for the whole file up to the end of the range: it wants a cache.

    Args:
        command: what ``/bin/sh`` is to run, with ``{name}`` for the name of a file. It has to end with an exit status
            other than 0 if it fails; of several commands in a row, the shell tells that of the last one.

    Raises:
        DataError: ``{name}`` does not stand in the command.
    """

    def __init__(self, command: str) -> None:
        if _PLACE not in command:
            text = f"pipe:{without_secrets(command)}"
            raise DataError(f"{text}: says nowhere which file is wanted; write {_PLACE} in its place")
        self._command = command

    def __call__(self, name: str, transfer: Transfer, deadline: float) -> None:
        """Add what is missing of a range.

        Raises:
            DataError: the name is one that a shell could take for more than a name.
            TimeoutError: the deadline passed.
            OSError: the command failed before it had written the range; with the last line of its complaints.
        """
        command = self._command.replace(_PLACE, _checked(name))
        with tempfile.TemporaryFile() as complaints, _running(command, complaints) as process:
            before = transfer.position
            for piece in _output(process, deadline):
                transfer.add(piece[before : _stop(transfer, before)])
                before = max(0, before - len(piece))
                if transfer.complete:
                    return
            try:
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from error
            if status:
                raise OSError(errno.EIO, f"the command ended with status {status}{_last_line(complaints)}")
            transfer.ended = True


def _stop(transfer: Transfer, before: int) -> int | None:
    """Where the range ends in a piece whose first ``before`` bytes lie before it."""
    return None if transfer.missing is None else before + transfer.missing


def _checked(name: str) -> str:
    """The name, if it means nothing but itself to any shell: a command such as ssh hands it to a second one."""
    if shlex.quote(name) != name or name.startswith("-"):
        raise DataError(
            f"{name!r}: a shell could take this file name for more than a name; rename the file, or read the set by "
            f"other means than pipe: (letters, digits and _ . , : = + @ % / - are safe, but not - in front)"
        )
    return name


@contextmanager
def _running(command: str, complaints: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A shell with the command, which ends with this block, and all that it has started."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=complaints,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            # While nobody has waited for the shell, its number cannot belong to anything else.
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _output(process: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
    """What it writes, as it comes."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        piece = os.read(descriptor, BUFFER_BYTES)
        if not piece:
            return
        yield piece


def _last_line(complaints: IO[bytes]) -> str:
    size = complaints.seek(0, os.SEEK_END)
    complaints.seek(max(0, size - 4096))
    lines = complaints.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    text = "".join(c for c in without_secrets(last) if c.isprintable())
    return f": {text[:_LONGEST_COMPLAINT]}" if text else ""
