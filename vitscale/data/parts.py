"""Parts of a shard set: ``path/train[:98%]`` names the first 98 % of it, ``path/train[98%:]`` the rest,
``path/train[:1000][:80%]`` a part of a part. No torch.

The two bounds, from and to, are numbers of samples or percentages; a percentage comes to the number below it. What lies
between them is a stretch of one list of all samples: sample k of a tar that holds n stands at (k + 1/2) / n, and the
list goes by where they stand, of equals by the order of the tars. So

- parts that meet at a bound share no sample, and together they hold what one part from end to end holds;
- a part holds every part whose bounds lie within its own;
- a part takes the same share of each tar, give or take a sample, and the samples of a tar that it takes are neighbours:
  they are read as those of a whole set are.

(The list is that of the seats in Webster's apportionment. Rounding the share of each tar would give other numbers than
asked for, rounding a running sum of them would give parts that lack samples of smaller ones.)
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from vitscale.data.manifest import Manifest, ShardInfo
from vitscale.data.storage.drivers import is_path
from vitscale.errors import DataError

# At the end of a location. What follows "//" is the host of a URL.
_PART = re.compile(r"(?<!//)\[([^\[\]]*[:%][^\[\]]*)\]$")
_BOUND = re.compile(r"(?P<number>[0-9]{1,18}(?:\.[0-9]{1,18})?)(?P<percent>%?)")
# Places are compared as whole numbers; fine enough to tell those of two tars with fewer than 2^31 samples apart.
_PLACE_BITS = 64


def split_part(location: str) -> tuple[str, str | None]:
    """Split a location into that of a set, or of a part of one, and the part of it that is asked for; None for all.

    Raises:
        DataError: nothing stands before the part.
    """
    match = _PART.search(location)
    if match is None:
        return location, None
    if match.start() == 0:
        raise DataError(f"{location}: a part of nothing; write the folder or URL of the shard set before it")
    return location[: match.start()], match[0]


def take_part(manifest: Manifest, part: str) -> Manifest:
    """A part of a shard set, or of a part of one; that itself, if the part is all of it.

    Args:
        manifest: of the set.
        part: ``[FROM:TO]``; each a number of samples or a percentage of them, or nothing for the ends of the set.

    Raises:
        DataError: it is no such part, holds no sample, or the set was written in the order of a source.
    """
    shown = manifest.shown + part
    first, stop = _bounds(part, manifest.num_samples, shown)
    if stop - first == manifest.num_samples:
        return manifest
    if manifest.order == "source":
        raise DataError(
            f"{shown}: the set was written in the order of its source (--order source), which may be sorted, and a "
            f"part of a sorted set lacks classes; write it shuffled, or write the part with --subset"
        )
    sizes = [shard.num_samples for shard in manifest.shards]
    stretches = zip(manifest.shards, counts_among_first(sizes, first), counts_among_first(sizes, stop), strict=True)
    shards = tuple(_stretch(shard, begin, end) for shard, begin, end in stretches if begin < end)
    return replace(manifest, shards=shards, part=manifest.part + part)


def check_disjoint(train: Manifest, test: Manifest) -> None:
    """See that no image of a test set is learnt from, as far as the indexes tell: tars of one content, or of one name
    in one place, hold the same images.

    Args:
        train: what is learnt from.
        test: what it is judged by.

    Raises:
        DataError: tells how many images of ``test`` are among those of ``train``.
    """
    learnt = defaultdict[tuple[str, ...], list[tuple[int, int]]](list)
    for shard, identities in _identified(train):
        for identity in identities:
            learnt[identity].append((shard.first_sample, shard.first_sample + shard.num_samples))
    shared = 0
    for shard, identities in _identified(test):
        shared += _covered(shard, [stretch for identity in identities for stretch in learnt.get(identity, ())])
    if shared:
        raise DataError(
            f"{test.shown}: {shared} of its {test.num_samples} images are learnt from, as they are in {train.shown}, "
            f"too, so the result would say nothing about new images; name a set that shares none, or parts that do "
            f"not overlap, as SET[:80%] to learn from and SET[80%:] to test"
        )


def _identified(manifest: Manifest) -> Iterator[tuple[ShardInfo, list[tuple[str, ...]]]]:
    """Each tar with what it is known by: two that have one of these in common are the same."""
    folder = str(Path(manifest.tars).resolve()) if is_path(manifest.tars) else manifest.tars.rstrip("/")
    for shard in manifest.shards:
        yield shard, [(folder, shard.name)] + ([] if shard.sha256 is None else [(shard.sha256,)])


def _covered(shard: ShardInfo, stretches: Sequence[tuple[int, int]]) -> int:
    """Samples of a tar's stretch that lie in one of others, which may overlap."""
    counted, position, stop = 0, shard.first_sample, shard.first_sample + shard.num_samples
    for start, end in sorted(stretches):
        inside = range(max(start, position), min(end, stop))
        counted += len(inside)
        position = max(position, inside.stop)
    return counted


def _bounds(part: str, total: int, shown: str) -> tuple[int, int]:
    """The first sample of a part and the one after its last, in the list of all.

    Args:
        part: as in :func:`take_part`.
        total: samples of the whole set.
        shown: stands for the part in messages.

    Raises:
        DataError: it is no such part, or holds no sample.
    """
    first_text, colon, stop_text = part[1:-1].partition(":")
    if not colon:
        raise DataError(f"{shown}: a part is written [FROM:TO], as in [:98%], [98%:] or [500:1000]; there is no ':'")
    first, stop = _position(first_text, 0, total, shown), _position(stop_text, total, total, shown)
    if first >= stop:
        raise DataError(f"{shown}: goes from sample {first} to sample {stop} of {total}, so it holds none; widen it")
    return first, stop


def counts_among_first(sizes: Sequence[int], number: int) -> list[int]:
    """How many samples of each tar are among the first ``number`` of the list of all: the first ones of that tar.

    Args:
        sizes: samples of every tar.
        number: at most all of them.
    """
    total, tars = sum(sizes), len(sizes)
    # At t = (number - tars / 2) / total and before it stand floor(n t + 1/2) samples of a tar with n. In all tars
    # together these are not more than asked for, and at most one for each tar is missing.
    twice = 2 * number - tars
    counts = [max(0, (size * twice + total) // (2 * total)) for size in sizes]
    following = [(_place(count, size), tar) for tar, (count, size) in enumerate(zip(counts, sizes, strict=True))]
    heapq.heapify(following)
    for _ in range(number - sum(counts)):
        tar = following[0][1]
        counts[tar] += 1
        heapq.heapreplace(following, (_place(counts[tar], sizes[tar]), tar))
    return counts


def _place(sample: int, size: int) -> int:
    return ((2 * sample + 1) << _PLACE_BITS) // size


def _stretch(shard: ShardInfo, begin: int, end: int) -> ShardInfo:
    if end - begin == shard.num_samples:
        return shard
    first = shard.first_sample + begin
    return replace(shard, num_samples=end - begin, first_sample=first, tar_samples=shard.num_in_tar)


def _position(text: str, default: int, total: int, shown: str) -> int:
    if not text:
        return default
    match = _BOUND.fullmatch(text)
    if match is None or ("." in text and not match["percent"]):
        raise DataError(
            f"{shown}: {text!r} is no bound of a part; a number of samples (500) or a percentage (98%) is, and nothing "
            f"stands for the end of the set"
        )
    value = Fraction(match["number"])
    if match["percent"]:
        value *= Fraction(total, 100)
    if value > total:
        raise DataError(f"{shown}: {text} is more than all {total} samples of the set; give at most {total} or 100%")
    return int(value)
