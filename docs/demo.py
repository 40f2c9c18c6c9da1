"""The main path, as a walk-through: shard real images, train, be killed, resume, prove it, evaluate.

Runs the same commands that a user would type, on scikit-learn's handwritten digits. Output goes to demo-out/.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
OUT = Path("demo-out")
DIGITS = OUT / "digits"
RUN = OUT / "run"
CONFIG = os.path.relpath(REPOSITORY / "configs" / "debug" / "digits.yaml")
TRAIN = ["train", CONFIG, "--nproc", "2", f"run={RUN}", f"data.train={DIGITS}/train", f"data.eval={DIGITS}/val"]
# What must be the same when a step is done again: which samples in which order, and what came of it.
COMPARED = ("batch_digest", "loss", "loss_max", "grad_norm", "lr")

console = Console(highlight=False)


def main() -> int:
    """Run the demo; 0 if every step did what it promises."""
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)

    headline("1. Shard 1,797 real images of handwritten digits into tar files")
    vitscale("shards", "write", "digits", str(DIGITS), "--split", "train=0.8,val=0.2", "--samples-per-shard", "256")

    headline("2. Pre-train a small ViT on 2 ranks with ZeRO-2, and kill it with SIGKILL half-way")
    killed_at = train_and_kill()
    console.print(
        f"killed at step {killed_at}; newest checkpoint: {(RUN / 'checkpoints' / 'latest').read_text().strip()}"
    )

    headline("3. The same command again")
    vitscale(*TRAIN)
    repeated = compare_repeated_steps()

    headline("4. Evaluate the checkpoint")
    accuracy = json.loads(vitscale("evaluate", str(RUN)))
    fewshot = json.loads(
        vitscale("fewshot", str(RUN), "--train", f"{DIGITS}/train", "--test", f"{DIGITS}/val", "--shots", "5")
    )

    table = Table(title="vitscale demo", show_header=False)
    rows = [
        ("killed at step", str(killed_at)),
        ("resumed from", f"step {repeated['resumed_from']}"),
        ("steps done twice, same samples and same losses", f"{repeated['same']} of {repeated['total']} recorded"),
        ("held-out top-1", f"{accuracy['top1']:.4f} on {accuracy['images']} images"),
        ("held-out 5-shot", f"{fewshot['5-shot']:.4f}"),
        ("time", f"{time.monotonic() - started:.0f} s"),
        ("run folder", str(RUN)),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if repeated["total"] == 0 or repeated["same"] < repeated["total"]:
        console.print("the resumed run did NOT repeat the killed one", style="red")
        return 1
    return 0


def headline(text: str) -> None:
    """Announce a part."""
    console.print(f"\n{text}", style="bold")


def vitscale(*arguments: str) -> str:
    """Run a command as a user would, show it, and give its standard output."""
    console.print(f"$ vitscale {' '.join(arguments)}", style="cyan", soft_wrap=True)
    result = subprocess.run(
        [sys.executable, "-m", "vitscale", *arguments], check=False, stdout=subprocess.PIPE, text=True
    )
    sys.stdout.write(result.stdout)
    if result.returncode:
        raise SystemExit(result.returncode)
    return result.stdout


def train_and_kill() -> int:
    """Start training, and SIGKILL the launcher and both ranks once half of the steps are recorded."""
    console.print(f"$ vitscale {' '.join(TRAIN)}", style="cyan", soft_wrap=True)
    process = subprocess.Popen([sys.executable, "-m", "vitscale", *TRAIN], start_new_session=True)
    try:
        while process.poll() is None:
            done = records("metrics.jsonl")
            if done and done[-1]["step"] >= 0.55 * total_steps():
                return int(done[-1]["step"])
            time.sleep(0.05)
        raise SystemExit("training ended before it could be killed")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def compare_repeated_steps() -> dict[str, int]:
    """Steps after the checkpoint were done twice: before the kill and after the resume. Compare their records."""
    undone = records("metrics.rolled_back.jsonl")
    redone = {record["step"]: record for record in records("metrics.jsonl")}
    same = sum(all(record[key] == redone[record["step"]][key] for key in COMPARED) for record in undone)
    resumed_from = max((step for step in redone if redone[step]["attempt"] == 1), default=0)
    return {"total": len(undone), "same": same, "resumed_from": resumed_from}


def total_steps() -> int:
    """Length of the run."""
    return int(json.loads((RUN / "plan.json").read_text())["total_steps"])


def records(name: str) -> list[dict[str, Any]]:
    """Training records of a JSON-lines file of the run, without a torn last line."""
    path = RUN / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for line in lines if line.endswith("}") and "loss" in (record := json.loads(line))]


if __name__ == "__main__":
    raise SystemExit(main())
