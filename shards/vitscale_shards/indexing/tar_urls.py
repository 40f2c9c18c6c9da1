"""Which tars a user means: a folder, a pattern of tars in one folder, or the same under a URL."""

from __future__ import annotations

import math
import re
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

from braceexpand import braceexpand

from vitscale.errors import DataError
from vitscale_shards.place import Place
from vitscale_shards.remote import RemotePlace, open_place
from vitscale_shards.sources.archive import check_not_named_compressed

MAX_TARS = 1_000_000
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_WILDCARDS = re.compile(r"[*?\[]")


def find_tars(url: str) -> tuple[Place, list[str]]:
    """The folder of the tars, and their names in order.

    Args:
        url: a folder, or one tar or a pattern of tars in it: ``/data/set``, ``/data/set/train-{000..099}.tar``,
            ``/data/set/*.tar``, ``https://HOST/set/{00..31}.tar``, ``s3://BUCKET/set``.

    Raises:
        DataError: there are none, they lie in several folders, or they are not named like tars.
    """
    if Path(url).is_dir():
        place, patterns = _place(url), ["*.tar"]
    else:
        place, patterns = _split(url)
    listed = _list(place) if any(map(_WILDCARDS.search, patterns)) else []
    for name in listed:
        check_not_named_compressed(name, place.url)
    names = [name for pattern in patterns for name in _matching(pattern, listed)]
    if not names:
        found = f"{len(listed)} other files" if listed else "no file at all"
        raise DataError(
            f"{url}: no tar was found ({found}); give a folder of *.tar files, or a pattern such as "
            f"{place.url}/train-{{000..099}}.tar, which needs no listing"
        )
    for name in names:
        check_not_named_compressed(name, place.url)
        if not name.endswith(".tar") or name.startswith("."):
            raise DataError(f"{url}: {name!r} is not named like a tar; name tars NAME.tar, or give their folder")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{url}: names {twice[0]} twice; name every tar once")
    return place, names


def _split(url: str) -> tuple[Place, list[str]]:
    """The folder, and the patterns of names in it that braces stand for."""
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(url)) > MAX_TARS:
        raise DataError(f"{url}: stands for more than {MAX_TARS} tars; name fewer")
    try:
        expanded = list(braceexpand(url))
    except ValueError as error:
        raise DataError(f"{url}: {error}; write braces as in train-{{000..099}}.tar") from error
    if len(expanded) == 1 and not url.endswith(".tar") and not _WILDCARDS.search(url):
        return _place(url), ["*.tar"]  # a folder
    folders = {one.rpartition("/")[0] for one in expanded}
    if len(folders) > 1:
        one, other = sorted(folders)[:2]
        raise DataError(f"{url}: lies in several folders ({one}, {other}); a shard set is one folder: index each alone")
    (folder,) = folders
    if _WILDCARDS.search(folder):
        raise DataError(f"{url}: has a wildcard in the name of a folder; a shard set is one folder: name it")
    place = _place(folder or ("/" if url.startswith("/") else "."))
    return place, [one.rpartition("/")[2] for one in expanded]


def _place(folder: str) -> Place:
    if folder.startswith(("http://", "https://")):
        return RemotePlace(folder)
    return open_place(folder)


def _list(place: Place) -> list[str]:
    try:
        return place.names()
    except OSError as error:
        raise DataError(f"{place.url}: cannot be listed ({error.strerror or error}); check the address") from error


def _matching(pattern: str, listed: list[str]) -> list[str]:
    """A name itself, or the names that a pattern stands for."""
    if not _WILDCARDS.search(pattern):
        return [pattern]
    return [name for name in listed if fnmatchcase(name, pattern) and not name.startswith(".")]
