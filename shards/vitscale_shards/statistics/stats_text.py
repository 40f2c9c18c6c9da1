"""The numbers of a shard set as text for a terminal, with histograms."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from vitscale_shards.checking.faults import printable
from vitscale_shards.statistics.shuffle_quality import ShuffleQuality
from vitscale_shards.statistics.stats import QUANTILES, ImageStats, SetStats

Bar = tuple[str, int]
BAR_CHARS = 40
MAX_NAME_CHARS = 24
MAX_CLASS_BARS = 20
NUM_EXTREMES = 5  # largest and smallest classes shown of many
_EIGHTHS = " ▏▎▍▌▋▊▉"


def format_stats(stats: SetStats) -> str:
    """A page about a set: shards, labels, images, shuffling; warnings come last."""
    parts = [_head(stats), _labels(stats), _images(stats.images), _shuffle(stats.shuffle)]
    return "\n\n".join([*parts, *(f"WARNING: {warning}" for warning in stats_warnings(stats))])


def stats_warnings(stats: SetStats) -> list[str]:
    """What about a set would harm a training, one line each."""
    warnings = []
    shuffle = stats.shuffle
    if shuffle is not None and (shuffle.is_sorted or shuffle.is_clumped):
        how = "sorted" if shuffle.is_sorted else "not well shuffled"
        warnings.append(
            f"the labels are {how}: {shuffle.window} neighbouring samples have {shuffle.quality:.0%} of the classes "
            f"that they would have by chance; shuffle the set with 'vitscale shards write {stats.url} OUT'"
        )
    unused = stats.labels.unused
    if unused:
        named = [stats.classes[label] if stats.classes else str(label) for label in unused[:3]]
        more = ", ..." if len(unused) > 3 else ""
        warnings.append(f"{len(unused)} of {stats.labels.num_classes} classes have no image: {', '.join(named)}{more}")
    if stats.images.num_bad:
        warnings.append(
            f"{stats.images.num_bad} of {stats.images.num_images} images have no readable header; "
            f"'vitscale shards verify' names them"
        )
    return warnings


def _head(stats: SetStats) -> str:
    samples, size = stats.shard_samples, stats.shard_bytes
    return "\n".join(
        [
            f"{stats.url}  (split {stats.split or '-'}, from {stats.source or '-'})",
            f"  {stats.num_samples:,} samples in {stats.num_shards:,} shards, {_bytes(stats.num_bytes)}",
            f"  per shard  samples {samples.min:,.0f} to {samples.max:,.0f}, mean {samples.mean:,.1f}; "
            f"size {_bytes(size.min)} to {_bytes(size.max)}, mean {_bytes(size.mean)}",
        ]
    )


def _labels(stats: SetStats) -> str:
    labels = stats.labels
    of = "" if labels.num_classes is None else f" of {labels.num_classes:,}"
    lines = [f"Labels: {labels.num_labels:,}, of {len(labels.counts):,}{of} classes"]
    if stats.multi_label:
        mean = labels.num_labels / stats.num_samples
        lines.append(f"  {mean:.2f} per image; {labels.num_unlabelled:,} images have none")
    classes = sorted(labels.counts) if labels.num_classes is None else list(range(labels.num_classes))
    if len(classes) <= MAX_CLASS_BARS:
        return "\n".join(lines + _bars([(_class_name(stats, label), labels.counts.get(label, 0)) for label in classes]))
    ordered = sorted(classes, key=lambda label: (-labels.counts.get(label, 0), label))
    rows = [(_class_name(stats, label), labels.counts.get(label, 0)) for label in ordered]
    lines += _bars([*rows[:NUM_EXTREMES], None, *rows[-NUM_EXTREMES:]])
    steps = [digit * 10**power for power in range(12) for digit in (1, 2, 5)]
    buckets = _buckets([count for _, count in rows], steps)
    return "\n".join([*lines, "  Number of classes by their images", *_bars(buckets)])


def _class_name(stats: SetStats, label: int) -> str:
    if stats.classes is None:
        return str(label)
    name = printable(stats.classes[label])
    return f"{label} {name if len(name) <= MAX_NAME_CHARS else name[: MAX_NAME_CHARS - 3] + '...'}"


def _images(images: ImageStats) -> str:
    kinds = ", ".join(f"{kind} {count / images.num_images:.1%}" for kind, count in images.formats.items())
    lines = [f"Images: {images.num_images:,} looked at, evenly spread; {kinds or 'none readable'}"]
    if not images.short_sides_px:
        return lines[0]
    lines.append("  " + " " * 10 + "".join(f"{name:>10}" for name in QUANTILES))
    for title, values in (
        ("width px", images.widths_px),
        ("height px", images.heights_px),
        ("bytes", images.num_bytes),
    ):
        lines.append(f"  {title:<10}" + "".join(f"{values[name]:>10,}" for name in QUANTILES))
    buckets = _buckets(images.short_sides_px, [2**power for power in range(20)])
    return "\n".join([*lines, "  Number of images by their shorter side in px", *_bars(buckets)])


def _shuffle(shuffle: ShuffleQuality | None) -> str:
    if shuffle is None:
        return "Shuffling: nothing to measure in one sample"
    chance = "" if shuffle.neighbours is None else f"; neighbours are alike {shuffle.neighbours:.2f} times as often"
    return (
        f"Shuffling: quality {shuffle.quality:.3f} +- {shuffle.standard_error:.3f} where chance gives 1 and sorting "
        f"almost 0, in {shuffle.num_windows:,} windows of {shuffle.window:,} samples{chance}"
    )


def _buckets(values: Sequence[int], steps: Sequence[int]) -> list[Bar | None]:
    """How many values lie between neighbouring steps; empty buckets only between others. 0 has a bucket of its own."""
    counts = Counter(bisect_right(steps, value) for value in values)
    bars: list[Bar | None] = []
    for bucket in range(min(counts), max(counts) + 1):
        low, high = (0 if bucket == 0 else steps[bucket - 1]), steps[bucket] - 1
        bars.append((f"{low:,}" if low == high else f"{low:,} - {high:,}", counts[bucket]))
    return bars


def _bars(rows: Sequence[Bar | None]) -> list[str]:
    """A line per row with a bar as long as its number; None stands for rows left out."""
    bars = [row for row in rows if row is not None]
    title_chars = max(len(title) for title, _ in bars)
    number_chars = max(len(f"{number:,}") for _, number in bars)
    largest = max(1, *(number for _, number in bars))
    lines = []
    for row in rows:
        if row is None:
            lines.append("  ...")
        else:
            title, number = row
            lines.append(f"  {title:<{title_chars}}  {number:>{number_chars},}  {_bar(number / largest)}".rstrip())
    return lines


def _bar(share: float) -> str:
    whole, eighths = divmod(round(share * BAR_CHARS * 8), 8)
    return "█" * whole + _EIGHTHS[eighths].strip()


def _bytes(number: float) -> str:
    """In powers of 1000, as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"
