"""The ``vitscale`` command as a user meets it: exit status, stdout, stderr."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

from tests.helpers.distributed import forkserver, free_port
from tests.helpers.runs import CONFIG, environment


class Outcome(NamedTuple):
    code: int | None
    out: str
    errors: str


def vitscale(*arguments: object, timeout_s: float = 120, **env: str) -> Outcome:
    """Run the command's entry point in a process of its own, forked from one that has the heavy imports done."""
    return _run([env], arguments, timeout_s)


def vitscale_on_ranks(world_size: int, *arguments: object, timeout_s: float = 120, **env: str) -> Outcome:
    """The same on several ranks that meet through torchrun's variables. They must end alike; what they print is one."""
    return _run(_ranks(world_size, env), arguments, timeout_s)


def train(arguments: Sequence[str], *, nproc: int = 2, expect: int = 0, **env: str) -> str:
    """Train on such ranks with the debug configuration, and give what they say. They do not import everything anew,
    as those do that the command's own launcher starts."""
    outcome = vitscale_on_ranks(nproc, "train", CONFIG, *arguments, **env)
    assert outcome.code == expect, outcome.errors
    return outcome.errors


@contextmanager
def training(arguments: Sequence[str], *, nproc: int = 2, **env: str) -> Iterator[list[ForkServerProcess]]:
    """The same ranks at work; they are killed at the end of the block, all at once."""
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(_ranks(nproc, env), ("train", CONFIG, *arguments), Path(folder))
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _ranks(world_size: int, env: Mapping[str, str]) -> list[dict[str, str]]:
    common = {**env, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def _run(environments: Sequence[Mapping[str, str]], arguments: Sequence[object], timeout_s: float) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(environments, arguments, Path(folder))
        for process in processes:
            process.join(timeout=timeout_s)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        errors = (Path(folder) / "errors").read_text()
        assert len(set(codes)) == 1, f"exit codes {codes}\n{errors}"
        return Outcome(codes[0], (Path(folder) / "out").read_text(), errors)


def _start(
    environments: Sequence[Mapping[str, str]], arguments: Sequence[object], folder: Path
) -> list[ForkServerProcess]:
    context = forkserver()
    words = [str(argument) for argument in arguments]
    out, errors = folder / "out", folder / "errors"
    processes = [context.Process(target=_main, args=(words, out, errors, dict(env))) for env in environments]
    for process in processes:
        process.start()
    return processes


def vitscale_launched(nproc: int, *arguments: object, timeout_s: float = 120) -> Outcome:
    """Run the command with ``--nproc``: the launcher and its ranks as separate programs."""
    command = [sys.executable, "-m", "vitscale", *map(str, arguments), "--nproc", str(nproc)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def _main(arguments: list[str], out: Path, errors: Path, env: dict[str, str]) -> None:
    for descriptor, path in ((1, out), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(env)
    sys.argv = ["vitscale", *arguments]
    code = 70
    try:
        from vitscale.cli import main

        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
