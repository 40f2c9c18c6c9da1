"""``python -m tests.helpers.write_command OUT WORKERS MAX_FAILURES``: write the plan in OUT/train, as the command does.

Each report of progress is a line ``done total``; an error is one line on stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vitscale.errors import VitscaleError
from vitscale_shards.place import LocalPlace
from vitscale_shards.planning.plan import Plan
from vitscale_shards.sources import SourceSpec
from vitscale_shards.writing.workers import write_sets


def report(split: str, done: int, total: int) -> None:
    print(done, total, flush=True)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    plan = Plan(LocalPlace(Path(sys.argv[1]) / "train"))
    spec = SourceSpec.from_json(plan.head.source)
    workers, max_failures = map(int, sys.argv[2:])
    try:
        write_sets([plan], spec, workers=workers, max_failures=max_failures, report=report, warn=warn)
    except VitscaleError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
