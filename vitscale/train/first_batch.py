"""The wait for the first batch, which may take minutes where data come from far away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import chain

from vitscale.data.loader import Batch
from vitscale.distributed import Ranks

# Between two questions whether all ranks have theirs.
POLL_S = 0.1


def when_loaded(batches: Iterator[Batch], poll: Callable[[], None], ranks: Ranks) -> Iterator[Batch]:
    """The same batches, once every rank has its first. Collective.

    Args:
        batches: of this rank, at least one.
        poll: collective; called again and again meanwhile, so that it may give up the wait by raising an error.
        ranks: who takes part.
    """
    loaded: list[Batch] = []
    failed: list[BaseException] = []

    def load() -> None:
        try:
            loaded.append(next(batches))
        except BaseException as error:
            failed.append(error)

    # If the wait is given up, nobody waits for the thread: the process ends.
    thread = threading.Thread(target=load, name="first-batch", daemon=True)
    thread.start()
    while True:
        poll()
        thread.join(POLL_S)
        if failed:
            raise failed[0]
        if ranks.sum_ints([bool(loaded)])[0] == ranks.world_size:
            return chain(loaded, batches)
