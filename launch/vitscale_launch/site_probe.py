"""Looks around on a node of the cluster and prints one line of JSON: ``python -m vitscale_launch.site_probe``."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

# In front of the line, for modules and shell profiles may print something, too.
MARK = "vitscale-probe "


def probe(folder: Path, scratch: Path | None, health_command: str | None, health_timeout_s: float) -> dict[str, object]:
    """What this node is like."""
    return {
        "host": socket.gethostname(),
        "unix_s": time.time(),
        "interfaces": sorted(psutil.net_if_addrs()),
        "gpus": _count_gpus(),
        "cpus": len(os.sched_getaffinity(0)),
        "folder": _write_problem(folder),
        "scratch": None if scratch is None else _write_problem(scratch),
        "health": None if health_command is None else _run_health(health_command, health_timeout_s),
    }


def _count_gpus() -> int | None:
    """GPUs that nvidia-smi lists; None if it is not there."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def _write_problem(folder: Path) -> str:
    """Why a folder cannot be written; empty if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _run_health(command: str, timeout_s: float) -> str:
    """Why the site's own check fails; empty if it passes."""
    try:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return f"took longer than {timeout_s:g} s"
    last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it printed nothing"]
    return "" if done.returncode == 0 else f"left with {done.returncode}: {last[0]}"


def main() -> None:
    """Read what to look at from the first argument, JSON, and print what was found."""
    asked = json.loads(sys.argv[1])
    found = probe(
        Path(asked["folder"]),
        Path(asked["scratch"]) if asked["scratch"] else None,
        asked["health_command"],
        asked["health_timeout_s"],
    )
    sys.stdout.write(f"{MARK}{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
