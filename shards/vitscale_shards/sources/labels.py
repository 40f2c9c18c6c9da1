"""Labels as tables give them, names or numbers, one or several per image, and what they become in a shard set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vitscale.errors import DataError
from vitscale_shards.sources.folder import check_classes_known

MAX_CLASSES = 1_000_000  # more different labels than this are a column of something else
SEPARATOR = "|"
Label = str | int
Split = Callable[[object], Sequence[Label]]
_PLAIN = (str, int)  # exact types: True is an int too, and no label
_COUNTING = re.compile(r"0|[1-9][0-9]*")
_OTHER_NUMBER = re.compile(r"[+-][0-9]+|[+-]?[0-9]*\.[0-9]+|[+-]?[0-9]+\.")
_CURE_NUMBER = "mend these rows or take them out (-1 often stands for an unknown label)"


class CellError(ValueError):
    """A cell of a table cannot be used; the message is the reason."""


def split_text(cell: object) -> Sequence[Label]:
    """Labels in a cell of a text table: separated by ``|``, without the spaces around them; none if it is empty.

    Raises:
        CellError: nothing before, between or after separators.
    """
    labels = [label.strip() for label in str(cell).split(SEPARATOR)]
    if labels == [""]:
        return ()
    if "" in labels:
        raise CellError(f"labels {cell!r} have nothing on one side of a {SEPARATOR!r}; put a label there or remove it")
    return labels


def split_value(cell: object) -> Sequence[Label]:
    """Labels in a typed value: a string or an integer, or a list of these.

    Raises:
        CellError: anything else, such as a missing value.
    """
    labels: list[Label] = cell if isinstance(cell, list) else [cell]  # type: ignore[list-item]
    for label in labels:
        if label.__class__ not in _PLAIN or label == "":
            raise CellError(
                f"label {label!r} is neither a name nor a whole number; mend the row or take it out "
                f"(an image without labels has an empty list)"
            )
    return labels


@dataclass(frozen=True)
class Labels:
    """What the labels of a table mean."""

    classes: tuple[str, ...] | None
    """Names by number, or None if the table has numbers only."""

    multi_label: bool
    split: Split
    numbers: Mapping[Label, tuple[int]]
    """Every label of the table, as a tuple of its number alone."""

    def of(self, cell: object) -> tuple[int, ...]:
        """Numbers of the labels in a cell, each once.

        Raises:
            CellError: it holds a label that was not there when the table was looked through.
        """
        try:
            if cell.__class__ in _PLAIN and (known := self.numbers.get(cell)):
                return known
            return tuple(dict.fromkeys(self.numbers[label][0] for label in self.split(cell)))
        except KeyError:
            raise CellError(
                f"label {cell!r} was not there a moment ago; leave the source as it is while it is sharded"
            ) from None


class LabelSurvey:
    """The different labels of one or more tables, each with the place where it was met first.

    Memory grows with the number of classes, not of rows.
    """

    def __init__(self, split: Split, *, of: str, column: str) -> None:
        """Begin with nothing.

        Args:
            of: what the tables are called in messages.
        """
        self._split = split
        self._of = of
        self._column = column
        self._first: dict[Label, str] = {}
        self._unlabelled = ""
        self._several = False

    def add(self, cells: Iterable[tuple[int, object]], where: Callable[[int], str]) -> None:
        """Look through a column.

        Args:
            cells: numbers of the rows, and their cells.
            where: makes of a row's number what a user reads.

        Raises:
            DataError: a cell holds no valid label, or there are too many different ones.
        """
        first = self._first
        for place, cell in cells:
            if cell.__class__ in _PLAIN and cell in first:
                continue
            try:
                labels = self._split(cell)
                for label in labels:
                    if label not in first:
                        _check_encodable(label)
                        first[label] = where(place)
            except CellError as error:
                raise DataError(f"{where(place)}: {error}") from None
            if len(labels) > 1 or isinstance(cell, list):
                self._several = True
            elif not labels:
                self._unlabelled = self._unlabelled or where(place)
            if len(first) > MAX_CLASSES:
                raise DataError(
                    f"{self._of}: more than {MAX_CLASSES} different labels in column {self._column!r}; that many are "
                    f"allowed: name the column that holds the labels with --label-column"
                )

    def labels(self, classes: Sequence[str] | None = None, number_names: Sequence[str] | None = None) -> Labels:
        """What the labels mean, now that all are known.

        Args:
            classes: names in the order of their numbers, from the user.
            number_names: names of the numbers in the table, from the table itself; ``classes`` orders them anew.

        Raises:
            DataError: no label at all, unknown class, number out of range, names and numbers mixed, or an image
                without a label where no image has several.
        """
        if not self._first:
            raise DataError(
                f"{self._of}: no label in column {self._column!r}; at least one row with a label is needed: fill the "
                f"table or name the column with --label-column"
            )
        if self._unlabelled and not self._several:
            raise DataError(
                f"{self._unlabelled}: no label; one per image is needed where no image has several: "
                f"give it one or take the row out"
            )
        if not self._are_numbers(_positions(classes or ())):
            names = tuple(sorted(map(str, self._first))) if classes is None else tuple(classes)
            return self._named(names, {label: str(label) for label in self._first})
        known = classes if number_names is None else number_names
        limit = MAX_CLASSES if known is None else len(known)
        numbers = {label: self._number(label, limit) for label in self._first}
        if number_names is not None:
            named = {label: number_names[number] for label, number in numbers.items()}
            return self._named(tuple(number_names if classes is None else classes), named)
        found = {label: (number,) for label, number in numbers.items()}
        return Labels(None if classes is None else tuple(classes), self._several, self._split, found)

    def _named(self, classes: tuple[str, ...], names: Mapping[Label, str]) -> Labels:
        positions = _positions(classes)
        unknown = {name: label for label, name in names.items() if name not in positions}
        if unknown:
            check_classes_known(names.values(), positions, of=self._first[unknown[min(unknown)]])
        found = {label: (positions[name],) for label, name in names.items()}
        return Labels(classes, self._several, self._split, found)

    def _are_numbers(self, order: Mapping[str, int]) -> bool:
        """Whether the labels are numbers, not names. In text, a list of classes that has one of them decides."""
        if self._split is not split_text:
            integers, others = _parted(self._first, lambda label: isinstance(label, int))
            self._check_not_mixed(integers, others)
            return bool(integers)
        if any(label in order for label in self._first):
            return False
        counting, others = _parted(self._first, lambda label: _COUNTING.fullmatch(str(label)))
        odd, names = _parted(others, lambda label: _OTHER_NUMBER.fullmatch(str(label)))
        if odd and not names:
            raise DataError(
                f"{self._first[odd[0]]}: label {odd[0]!r}; whole numbers from 0 are allowed: {_CURE_NUMBER}"
            )
        if odd or not all(re.fullmatch("[0-9]+", str(name)) for name in names):  # 007 and 100 are both names
            self._check_not_mixed([*counting, *odd], names)
        return bool(counting) and not names

    def _check_not_mixed(self, numbers: Sequence[Label], names: Sequence[Label]) -> None:
        if numbers and names:
            raise DataError(
                f"{self._first[names[0]]}: label {names[0]!r} is a name, but {numbers[0]!r} is a number "
                f"({self._first[numbers[0]]}); all names or all numbers are allowed: mend one of them, or make all "
                f"of them text and list them with --classes FILE"
            )

    def _number(self, label: Label, limit: int) -> int:
        text = str(label)
        if len(text) > 9 or not 0 <= int(text) < limit:
            raise DataError(
                f"{self._first[label]}: label {text[:40]}; whole numbers from 0 to {limit - 1} are allowed: "
                f"{_CURE_NUMBER}"
            )
        return int(text)


def _check_encodable(label: Label) -> None:
    try:
        str(label).encode()
    except UnicodeEncodeError:
        raise CellError(f"label {label!r} is no valid text; mend the row") from None


def _positions(classes: Sequence[str]) -> dict[str, int]:
    positions: dict[str, int] = {}
    for name in classes:
        if name in positions:
            raise DataError(f"class {name!r} is twice in the list of classes; once is allowed: remove one")
        positions[name] = len(positions)
    return positions


def _parted(labels: Iterable[Label], belongs: Callable[[Label], object]) -> tuple[list[Label], list[Label]]:
    parts: tuple[list[Label], list[Label]] = ([], [])
    for label in labels:
        parts[0 if belongs(label) else 1].append(label)
    return parts
