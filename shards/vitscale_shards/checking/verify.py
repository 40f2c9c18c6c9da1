"""Find everything that is wrong with a shard set. Nothing is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

from vitscale.data.manifest import INDEX_NAME, Manifest, ShardInfo
from vitscale_shards.checking.faults import FaultKind, SetFault, format_fault
from vitscale_shards.checking.inspect_shard import Findings, Inspection, Rules, inspect_shard
from vitscale_shards.checking.keys import find_repeated
from vitscale_shards.checking.samples import group_samples, read_parts
from vitscale_shards.checking.survey import ShardSurvey, survey_shard, unanswered
from vitscale_shards.checking.whole_set import find_stale, look_around, without_index
from vitscale_shards.parallel import in_order
from vitscale_shards.place import Place
from vitscale_shards.tar import walk

__all__ = ["LEVELS", "FaultKind", "Level", "SetFault", "format_fault", "verify_set"]

Level = Literal["sizes", "checksums", "headers", "pixels"]
LEVELS: tuple[Level, ...] = ("sizes", "checksums", "headers", "pixels")
MAX_REPEATED_KEYS = 100


def verify_set(
    place: Place,
    *,
    level: Level = "headers",
    workers: int = 1,
    plan: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Iterator[SetFault]:
    """Faults of the set at ``place``: those of the whole set first, then those of each tar as it has been read.

    Each level includes those before it:

    - ``sizes``: the index is readable and adds up; every tar and ``.idx`` is there and of the right size; nothing else
      is there. No tar is read.
    - ``checksums``: the SHA-256 of every tar, and whether tars were exchanged.
    - ``headers``: the structure of every tar; its ``.idx`` line by line; keys, labels, members and the image headers of
      every sample; keys are unique in the set (8 bytes of memory per sample).
    - ``pixels``: every image is decoded in full, as for training.

    A tar is read once, from its beginning to its end, whatever the level. One of the wrong size is not looked into.

    Args:
        workers: processes that share the tars.
        plan: digest of the plan that lies with the set, if one does; an index of another plan is stale.
        on_progress: is told bytes read and bytes to read after each tar.
        on_note: is told what a person should know although it is no fault, in one line.

    Raises:
        DataError: there is no such folder, its tars lie elsewhere, or the storage does not answer.
    """
    view = look_around(place, plan)
    look = partial(survey_shard, place)
    surveys = list(in_order(look, view.shards, workers))
    stale, useless = find_stale(view, surveys)
    if stale is not None:
        yield stale
    if useless:
        view = without_index(view, surveys)
        surveys = list(in_order(look, view.shards, workers))
    yield from view.faults
    yield from _quick_faults(surveys, view.manifest, level)
    if level != "sizes":
        infos = dict(view.shards)
        present = [(survey, infos[survey.name]) for survey in surveys if survey.num_bytes is not None]
        yield from _verify_contents(place, level, workers, view.manifest, present, on_progress, on_note)


def _quick_faults(surveys: list[ShardSurvey], manifest: Manifest | None, level: Level) -> Iterator[SetFault]:
    """What is known before a tar is read, but for what reading it shows better."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for shard in () if manifest is None else manifest.shards:
        by_size[shard.num_bytes].append(shard.name)
    for survey in surveys:
        if survey.num_bytes is None:
            yield SetFault("missing", survey.name, None, None, f"missing; {INDEX_NAME} lists it")
        if survey.size_fault is not None and level == "sizes":
            yield _named(survey.size_fault, survey.num_bytes, by_size.get(survey.num_bytes or 0, []))
        walked = level in ("headers", "pixels") and survey.size_fault is None
        if survey.idx_fault is not None and not (walked and survey.num_in_idx is not None):
            yield survey.idx_fault


def _named(fault: SetFault, num_bytes: int | None, others: list[str]) -> SetFault:
    """A fault of size, with a hint if just one tar of the set should have that size."""
    if len(others) != 1:
        return fault
    return replace(
        fault, offset=None, key=None, message=f"has {num_bytes} bytes, as {others[0]} should; not its own size"
    )


def _verify_contents(
    place: Place,
    level: Level,
    workers: int,
    manifest: Manifest | None,
    shards: list[tuple[ShardSurvey, ShardInfo | None]],
    on_progress: Callable[[int, int], None],
    on_note: Callable[[str], None],
) -> Iterator[SetFault]:
    """Faults of the tars that are there."""
    digests = {} if manifest is None else {s.sha256: s.name for s in manifest.shards if s.sha256 is not None}
    rules = _rules(manifest)
    tasks = [
        Inspection(
            survey.name,
            digest=bool(digests) and info is not None,
            samples=level != "checksums" and survey.size_fault is None,
            pixels=level == "pixels",
            idx=survey.num_in_idx is not None,
            rules=rules,
        )
        for survey, info in shards
    ]
    done, total = 0, sum(survey.num_bytes or 0 for survey, _ in shards)
    in_place: list[Findings] = []
    different = 0
    for findings, (survey, info) in zip(in_order(partial(inspect_shard, place), tasks, workers), shards, strict=True):
        faults = findings.faults if info is None else _judge(findings, survey, info, digests)
        yield from faults
        kinds = {fault.kind for fault in faults}
        different += "checksum" in kinds
        if "swapped" not in kinds:
            in_place.append(replace(findings, faults=[]))
        done += survey.num_bytes or 0
        on_progress(done, total)
    yield from _repeated_keys(place, in_place, on_note, strict=rules.ours)
    _note_checksums([info for _, info in shards if info is not None], different, on_note)


def _rules(manifest: Manifest | None) -> Rules:
    if manifest is None:
        return Rules()
    num_classes = None if manifest.classes is None else len(manifest.classes)
    return Rules(num_classes, manifest.multi_label, ours=manifest.plan is not None)


def _judge(findings: Findings, survey: ShardSurvey, info: ShardInfo, digests: dict[str, str]) -> list[SetFault]:
    """Faults of a tar in the light of what the index says of it; the first one names what the others follow from."""
    sha256, name = findings.sha256, findings.name
    size_faults = [] if survey.size_fault is None else [survey.size_fault]
    if sha256 is not None and sha256 != info.sha256:
        if sha256 in digests:
            return [SetFault("swapped", name, None, None, f"holds the content of {digests[sha256]}")]
        if info.sha256 is not None and not size_faults:
            return [_checksum_fault(findings, info.sha256), *findings.faults]
    index_faults = []
    if sha256 is not None and sha256 == info.sha256 and size_faults:
        size_faults = []
        index_faults.append(
            f"says {info.num_bytes} bytes of {name}, which has {survey.num_bytes} and the right checksum"
        )
    if findings.num_samples not in (None, info.num_samples):
        index_faults.append(f"says {info.num_samples} samples of {name}, which has {findings.num_samples}")
    return [
        *size_faults,
        *(SetFault("index", INDEX_NAME, None, None, reason) for reason in index_faults),
        *findings.faults,
    ]


def _checksum_fault(findings: Findings, right: str) -> SetFault:
    message = f"the sha256 is {findings.sha256:.12}... where {INDEX_NAME} says {right:.12}..."
    if not findings.faults:
        message += "; which bytes differ cannot be told from it"
    return SetFault("checksum", findings.name, None, None, message)


def _repeated_keys(
    place: Place, shards: list[Findings], on_note: Callable[[str], None], *, strict: bool
) -> Iterator[SetFault]:
    """Keys that several tars have. Within a tar they were found already."""
    groups, count = find_repeated([shard.keys for shard in shards], limit=MAX_REPEATED_KEYS)
    if not strict:
        if count:
            on_note(f"about {count} keys occur more than once in the set; training does not mind")
        return
    wanted: dict[int, set[int]] = defaultdict(set)
    for shard, sample in (spot for group in groups for spot in group):
        wanted[shard].add(sample)
    found = {shard: _keys_at(place, shards[shard].name, samples) for shard, samples in wanted.items()}
    for group in groups:
        tars: dict[str, list[int]] = defaultdict(list)  # of each key; equal hashes are not always equal keys
        for shard, sample in group:
            key, offset = found[shard][sample]
            if tars[key] and shard not in tars[key]:
                reason = f"{shards[tars[key][0]].name} has a sample of this key, too; keys are unique in a set"
                yield SetFault("sample", shards[shard].name, offset, key, reason)
            tars[key].append(shard)
    if count > len(groups):
        reason = f"about {count - len(groups)} more keys occur more than once in the set"
        yield SetFault("sample", shards[groups[-1][-1][0]].name, None, None, reason)


def _keys_at(place: Place, name: str, samples: set[int]) -> dict[int, tuple[str, int]]:
    """Key, and offset of the first member, of some samples of a tar by their positions."""
    found = {}
    try:
        with place.open(name) as file:
            for sample, (key, parts) in enumerate(group_samples(read_parts(file, walk(file), frozenset()))):
                if sample in samples:
                    found[sample] = key, parts[0].member.offset
                if len(found) == len(samples):
                    break
    except OSError as error:
        raise unanswered(place, name, error) from error
    return found


def _note_checksums(shards: list[ShardInfo], different: int, on_note: Callable[[str], None]) -> None:
    unknown = sum(shard.sha256 is None for shard in shards)
    if unknown:
        on_note(f"{INDEX_NAME} has no sha256 of {unknown} of {len(shards)} tars: their checksums were not compared")
    if different > 1 and 2 * different > len(shards):
        on_note(
            f"{different} of {len(shards)} tars have other checksums than {INDEX_NAME} says: it may be stale itself"
        )
