"""Images that the user named in files: those of a split, and those to leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vitscale.errors import DataError
from vitscale_shards.planning.settings import PlanSettings, read_list

EXCLUDED = -1


class Lists:
    """Images that the user named, by key or path: those of a split, and those to leave out."""

    def __init__(self, settings: PlanSettings, splits: list[str]) -> None:
        """Read the files.

        Args:
            splits: their names, by number.

        Raises:
            DataError: a file cannot be read, holds nothing, or two say different things of one image.
        """
        self._splits = splits
        self._targets: dict[str, int] = {}
        self._missing: dict[str, set[str]] = {}
        files = [(splits.index(name), file) for name, file in settings.lists]
        for target, file in [*files, *((EXCLUDED, file) for file in settings.exclude)]:
            lines = set(read_list(Path(file), "keys or paths", may_be_empty=target == EXCLUDED))
            self._missing[file] = lines
            for line in lines:
                self._targets[line] = self._one_of(target, self._targets.get(line, target), line)

    def apply(self, side: np.ndarray[Any, Any], keys: list[str], paths: pa.ChunkedArray) -> None:
        """Set the side of the rows that are on a list.

        Raises:
            DataError: an image is on the lists of two splits.
        """
        if not self._targets:
            return
        targets = self._targets
        for place, (key, path) in enumerate(zip(keys, paths.to_pylist(), strict=True)):
            if key not in targets and path not in targets:
                continue
            by_key = targets.get(key, targets.get(path, EXCLUDED))
            side[place] = self._one_of(by_key, targets.get(path, by_key), path)
            for missing in self._missing.values():
                missing.difference_update((key, path))

    def _one_of(self, first: int, second: int, name: str) -> int:
        """Where an image goes that is listed for one place and for another: what is to be left out is left out."""
        if EXCLUDED in (first, second):
            return EXCLUDED
        if first != second:
            raise DataError(
                f"{name}: is on the lists of the splits {self._splits[first]!r} and {self._splits[second]!r}; an image "
                f"is in one split: take it off one of the lists"
            )
        return first

    def check_all_found(self) -> None:
        """See that nothing is listed in vain.

        Raises:
            DataError: names the first line that no image has.
        """
        for file, missing in self._missing.items():
            if missing:
                raise DataError(
                    f"{file}: {len(missing)} lines are neither key nor path of an image of the source, such as "
                    f"{min(missing)!r}; take them out, or look at the plan for how keys are spelled"
                )
