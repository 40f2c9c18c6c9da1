"""The ranks of one node as children of one task: where a site starts a task for each node, and on a single machine."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitscale.durable import publish_text
from vitscale.errors import ConfigError, LaunchError, VitscaleError
from vitscale.train.signals import STOP_SIGNALS
from vitscale_launch.environment import ERRORS
from vitscale_launch.failures import STOPPED_ON_REQUEST

_FOR_EVER = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ENOEXEC}
# After the first failure: for the others to see it themselves, and then to obey SIGTERM.
NOTICE_S, TERM_S = 5.0, 10.0
# After the first rank has left in peace: they leave together, but for what the last of them must still write.
LEAVE_S = 300.0


def run_ranks(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Run the command once with each environment and wait. Stop signals are passed on to all.

    If one fails, the others are taken down; what the rank that was killed by a signal cannot tell itself is written
    for it.

    Returns:
        The exit code of the first that failed, else 75 if one stopped on request, else 0. 128 + n: killed by signal n.

    Raises:
        ConfigError: there is no such command.
        LaunchError: it cannot be started.
    """
    # They stay blocked in the ranks, too, until those are ready for them: none is lost meanwhile.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGCHLD})
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for environment in environments:
            ranks.append(_start(command, environment))
        return _watch(ranks, environments)
    finally:
        _end(ranks, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cannot_start(word: str, error: OSError) -> VitscaleError:
    """The error of a command that this node does not start. If a second try cannot help, it is of the configuration."""
    kind = ConfigError if error.errno in _FOR_EVER else LaunchError
    return kind(f"{word} cannot be started on {_host()}: {error.strerror}; see that it is there on every node")


def write_error(folder: Path, rank: int, kind: str, message: str, exit_code: int) -> None:
    """Tell why a rank failed that cannot tell it itself, as :mod:`vitscale.ranks` does."""
    record = {
        "rank": rank,
        "host": _host(),
        "kind": kind,
        "message": message,
        "traceback": None,
        "exit_code": exit_code,
        "unix_s": time.time(),
        "is_victim": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    publish_text(folder / f"rank-{rank:05}.json", json.dumps(record))


def _host() -> str:
    """This node as SLURM calls it, so that it can be left out of the next attempt."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(list(command), env=dict(environment), stdin=subprocess.DEVNULL)
    except OSError as error:
        raise cannot_start(command[0], error) from error


def _watch(ranks: list[subprocess.Popen[bytes]], environments: Sequence[Mapping[str, str]]) -> int:
    """Wait for all ranks, and see to it that none stays when one has gone."""
    code, running, deadlines = 0, dict(enumerate(ranks)), _Deadlines()
    while running:
        received = signal.sigtimedwait({*STOP_SIGNALS, signal.SIGCHLD}, 0.5)
        if received is not None and received.si_signo in STOP_SIGNALS:
            for rank in running.values():
                rank.send_signal(received.si_signo)
        for number, rank in list(running.items()):
            if (status := rank.poll()) is None:
                continue
            del running[number]
            failed = status not in (0, STOPPED_ON_REQUEST)
            if failed and code in (0, STOPPED_ON_REQUEST):
                code = status if status > 0 else 128 - status
                if status < 0:
                    _tell_of_death(environments[number], -status)
            elif not failed:
                code = code or status
            deadlines.someone_left(failed=failed)
        if (number_ := deadlines.due()) is not None:
            _end(list(running.values()), number_)
    return code


class _Deadlines:
    """When those that stay are asked, and when they are made, to go."""

    def __init__(self) -> None:
        self._term_at = self._kill_at = float("inf")

    def someone_left(self, *, failed: bool) -> None:
        """The first failure counts, or the first who leaves."""
        at = time.monotonic() + (NOTICE_S if failed else LEAVE_S)
        self._term_at = min(self._term_at, at)

    def due(self) -> signal.Signals | None:
        """The signal that is to be sent now, if any."""
        now = time.monotonic()
        if now >= self._kill_at:
            return signal.SIGKILL
        if now >= self._term_at:
            self._term_at, self._kill_at = float("inf"), now + TERM_S
            return signal.SIGTERM
        return None


def _end(ranks: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)
            if number == signal.SIGKILL:
                rank.wait()


def _tell_of_death(environment: Mapping[str, str], number: int) -> None:
    name, rank = signal.Signals(number).name, int(environment["RANK"])
    sys.stderr.write(f"vitscale: rank {rank} was killed by {name}; the other ranks of the node are stopped\n")
    if folder := environment.get(ERRORS):
        write_error(Path(folder), rank, "Killed", f"killed by {name}", 128 + number)
