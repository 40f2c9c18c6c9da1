"""A shard set seen as a whole: its index, the files in its folder, and whether they belong together."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass

from vitscale.data.manifest import INDEX_NAME, Manifest, ShardInfo, parse_manifest
from vitscale.errors import DataError
from vitscale_shards.checking.faults import SetFault
from vitscale_shards.checking.survey import ShardSurvey, idx_name_of
from vitscale_shards.place import Place
from vitscale_shards.planning.plan import PLAN_NAME
from vitscale_shards.writing.records import FAILURES_NAME, PROGRESS

INDEXING = ".indexing"
"""Folder in which ``vitscale shards index`` keeps what it has done so far."""

_OWN_FILES = frozenset({INDEX_NAME, PLAN_NAME, FAILURES_NAME})
_NUMBERED = re.compile(r"(.*?)[0-9]+\.tar")


def read_index(place: Place) -> Manifest:
    """Read ``index.json``.

    Raises:
        DataError: it is missing, not readable, or contradicts itself.
    """
    where = f"{place.url}/{INDEX_NAME}"
    try:
        text = place.read_text(INDEX_NAME)
    except FileNotFoundError:
        raise DataError(
            f"{where}: missing; a shard set has one, which is written last: was the writing ended?"
        ) from None
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not a shard index ({error!r}); write the shard set again") from error
    manifest = parse_manifest(text, place.url)
    twice = [name for name, count in Counter(shard.name for shard in manifest.shards).items() if count > 1]
    if twice:
        raise DataError(f"{where}: lists {twice[0]} twice; every tar stands there once: write the shard set again")
    stated = json.loads(text).get("vitscale", {}).get("num_samples", manifest.num_samples)
    if stated != manifest.num_samples:
        raise DataError(
            f"{where}: says {stated} samples in all, but its shards have {manifest.num_samples}; both must agree: "
            f"write the shard set again"
        )
    return manifest


def beside_index(manifest: Manifest, place: Place) -> Manifest:
    """The manifest itself.

    Raises:
        DataError: its tars lie elsewhere.
    """
    if manifest.base_url is not None:
        raise DataError(
            f"{place.url}: its tars lie in {manifest.base_url}, but only tars beside the index are read: copy or link "
            f"them into {place.url}"
        )
    return manifest


@dataclass(frozen=True)
class SetView:
    """What is there, and what should be there."""

    manifest: Manifest | None
    """None if there is no index that could be relied upon."""

    shards: list[tuple[str, ShardInfo | None]]
    """Tars to look at, with what the index says of them."""

    unlisted: list[str]
    """Those that the index does not list although they have an ``.idx`` and names like the others."""

    faults: list[SetFault]
    """Of the index, and files that do not belong."""


def look_around(place: Place, plan: str | None) -> SetView:
    """List the folder and read the index.

    Args:
        plan: digest of the plan in the folder, if there is one.

    Raises:
        DataError: there is no such folder, it cannot be listed, or the tars lie elsewhere.
    """
    try:
        files, folders = place.names(), place.folders()
    except OSError as error:
        raise DataError(f"{place.url}: cannot be listed ({error.strerror or error}); check its permissions") from error
    if not files and not folders:
        raise DataError(f"{place.url}: no such shard set; a folder with {INDEX_NAME} and *.tar files is needed")
    manifest, faults = _read_checked_index(place, plan)
    unlisted = _unlisted(files, manifest)
    known = {} if manifest is None else {shard.name: shard for shard in manifest.shards}
    shards = [*known.items(), *((name, None) for name in unlisted)]
    strict = manifest is None or manifest.plan is not None
    return SetView(manifest, shards, unlisted, faults + _strangers(files, folders, [s[0] for s in shards], strict))


def _read_checked_index(place: Place, plan: str | None) -> tuple[Manifest | None, list[SetFault]]:
    try:
        manifest = read_index(place)
    except DataError as error:
        return None, [SetFault("index", INDEX_NAME, None, None, str(error).removeprefix(f"{place.url}/{INDEX_NAME}: "))]
    beside_index(manifest, place)
    if plan is None or manifest.plan in (None, plan):
        return manifest, []
    reason = f"stale: of plan {manifest.plan:.12}, while the folder's {PLAN_NAME} is plan {plan:.12}"
    return None, [SetFault("index", INDEX_NAME, None, None, reason)]


def _unlisted(files: list[str], manifest: Manifest | None) -> list[str]:
    """Tars that look like shards of the set but are not in its index. Without an index, all tars."""
    tars = [name for name in files if name.endswith(".tar") and not name.startswith(".")]
    if manifest is None:
        return tars
    listed = {shard.name for shard in manifest.shards}
    prefixes = {match[1] for name in listed if (match := _NUMBERED.fullmatch(name))}
    alike = [name for name in tars if (match := _NUMBERED.fullmatch(name)) and match[1] in prefixes]
    present = set(files)
    none_left = not listed & present
    candidates = tars if none_left else alike
    return [name for name in candidates if name not in listed and idx_name_of(name) in present]


def _strangers(files: list[str], folders: list[str], shards: list[str], strict: bool) -> list[SetFault]:
    """Leftovers, and in a set of our own making what does not belong there."""
    own = _OWN_FILES.union(shards, map(idx_name_of, shards))
    faults = []
    for name in files:
        if name.startswith("."):
            if name.endswith(".tmp"):
                reason = "what a writer left that died, unless one is at work now; safe to remove then"
                faults.append(SetFault("leftover", name, None, None, reason))
        elif strict and name not in own:
            faults.append(SetFault("foreign", name, None, None, "does not belong to the set; move it elsewhere"))
    for name in folders:
        if name in (PROGRESS, INDEXING):
            how = "the same command again" if name == PROGRESS else "'vitscale shards index' again, with --overwrite"
            reason = f"the record of an unfinished writing: give {how} to finish it"
            faults.append(SetFault("leftover", name, None, None, reason))
        elif strict and not name.startswith("."):
            faults.append(SetFault("foreign", name, None, None, "a folder, which does not belong; move it elsewhere"))
    return faults


def find_stale(view: SetView, surveys: list[ShardSurvey]) -> tuple[SetFault | None, bool]:
    """Whether tars and their ``.idx`` agree with one another but not with the index.

    That must hold for most of the tars, or there must be tars that the index does not list; a single tar is more likely
    to be wrong itself.

    Returns:
        The fault, if so, and whether nothing that the index says can be relied upon.
    """
    if view.manifest is None:
        return None, False
    infos = {shard.name: shard for shard in view.manifest.shards}
    sizes = {(shard.num_bytes, shard.num_samples) for shard in view.manifest.shards}
    changed = [
        survey
        for survey in surveys
        if survey.size_fault is not None
        and survey.fits_idx
        and (survey.num_bytes, survey.num_in_idx) not in sizes  # else it is rather another tar of the set
    ]
    reasons = []
    if mostly_changed := 2 * len(changed) > len(infos):
        first = changed[0]
        reasons.append(
            f"{len(changed)} of {len(infos)} tars have another size than it says, though they fit their own .idx "
            f"({first.name}: {first.num_bytes} bytes, not {infos[first.name].num_bytes})"
        )
    if view.unlisted:
        more = "" if len(view.unlisted) == 1 else f" to {view.unlisted[-1]}"
        reasons.append(f"tars that it does not list lie here: {len(view.unlisted)} ({view.unlisted[0]}{more})")
    if not reasons:
        return None, False
    if all_gone := all(survey.num_bytes is None for survey in surveys if survey.name in infos):
        reasons.append(f"none of the {len(infos)} that it lists lies here")
    return SetFault("index", INDEX_NAME, None, None, f"stale: {'; '.join(reasons)}"), mostly_changed or all_gone


def without_index(view: SetView, surveys: list[ShardSurvey]) -> SetView:
    """The same set, judged by its tars alone."""
    present: list[tuple[str, ShardInfo | None]] = [(s.name, None) for s in surveys if s.num_bytes is not None]
    return SetView(None, present, [], view.faults)
