"""Several datasets as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import zip_longest

from vitscale.errors import DataError
from vitscale_shards.rows import Row, Source, image_key


class Merged:
    """Sources one after the other; a label means the same class in all of them.

    ``Row.path`` is ``<number of the source>:<path in it>``.
    """

    def __init__(self, sources: Sequence[Source], *, prefix_keys: bool = False) -> None:
        """Put sources together.

        Args:
            prefix_keys: put the number of the source and ``_`` before each key, so that two sources may have the same.

        Raises:
            DataError: there is none.
        """
        if not sources:
            raise DataError("no source to merge; at least one is needed: name a folder, a table or a file")
        self._sources = tuple(sources)
        self._prefix_keys = prefix_keys
        self.name = "+".join(source.name for source in sources)

    @cached_property
    def classes(self) -> tuple[str, ...] | None:
        """The classes of all sources.

        Raises:
            DataError: two sources have different ones.
        """
        first = self._sources[0].classes
        for number, source in enumerate(self._sources[1:], 2):
            if source.classes != first:
                raise DataError(
                    f"source 1 ({self._sources[0].name}) and source {number} ({source.name}) do not have the same "
                    f"classes: {_difference(first, source.classes)}; the same in the same order are needed: list them "
                    f"all with --classes FILE"
                )
        return first

    @property
    def multi_label(self) -> bool:
        """Whether an image of any source has any number of labels."""
        return any(source.multi_label for source in self._sources)

    @property
    def ignored(self) -> Counter[str]:
        """What all sources left aside."""
        return sum((source.ignored for source in self._sources), Counter())

    def rows(self) -> Iterator[Row]:
        """The rows of the first source, then those of the second, ...

        Raises:
            DataError: the classes differ, or a source is at fault.
        """
        _ = self.classes
        for number, source in enumerate(self._sources):
            for key, labels, path, num_bytes in source.rows():
                new_key = image_key(f"{number}_{key}") if self._prefix_keys else key
                yield Row(new_key, labels, f"{number}:{path}", num_bytes)

    def read(self, row: Row) -> bytes:
        """The image's bytes, from its source.

        Raises:
            BadImageError: it cannot be read.
        """
        number, _, path = row.path.partition(":")
        return self._sources[int(number)].read(row._replace(path=path))


def _difference(classes: tuple[str, ...] | None, others: tuple[str, ...] | None) -> str:
    if classes is None or others is None:
        return f"{'only the second' if classes is None else 'only the first'} has names for its numbers"
    pairs = enumerate(zip_longest(classes, others))
    label, names = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
    mine, theirs = ("missing" if name is None else repr(name) for name in names)
    return f"class {label} is {mine} in one ({len(classes)} classes), {theirs} in the other ({len(others)} classes)"
