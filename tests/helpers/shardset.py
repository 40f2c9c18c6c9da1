"""Shard sets of tiny images for tests, written with ``tarfile`` and :mod:`vitscale.data.manifest` alone."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitscale.data.manifest import INDEX_NAME, Manifest, Member, ShardInfo, format_idx, read_idx
from vitscale.data.mixing import Mixture, Part

NUM_CLASSES = 10
Parts = dict[str, bytes]


def image_bytes(number: int, *, hw: tuple[int, int] = (12, 12), kind: str = "png") -> bytes:
    """Random pixels that differ for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*hw, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"png": "PNG", "jpg": "JPEG"}[kind])
    return buffer.getvalue()


def parts_of(number: int) -> Parts:
    """Members of a sample: every third image is a JPEG, the label is the number modulo the classes."""
    kind = "jpg" if number % 3 == 0 else "png"
    return {kind: image_bytes(number, kind=kind), "cls": str(number % NUM_CLASSES).encode()}


def key_of(number: int) -> str:
    """Key of the sample with this number in the set."""
    return f"sample_{number:05d}"


def folder_of(manifest: Manifest) -> Path:
    """The folder of a set on this machine."""
    return Path(manifest.location)


def as_mixture(manifest: Manifest, *, slots: int) -> Mixture:
    """What a run on this one set is trained on."""
    return Mixture((Part(manifest, slots),))


def make_shardset(
    folder: Path,
    shard_sizes: Sequence[int],
    *,
    parts: Callable[[int], Parts] = parts_of,
    key: Callable[[int], str] = key_of,
    classes: int | None = NUM_CLASSES,
    multi_label: bool = False,
    sha256: bool = False,
    plan: str | None = None,
) -> Manifest:
    """Write a shard set; the sample with number n (counted through the set) has the members ``parts(n)``."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, number = [], 0
    for shard, size in enumerate(shard_sizes):
        name = f"train-{shard:06d}.tar"
        samples = []
        with tarfile.open(folder / name, "w") as tar:
            for n in range(number, number + size):
                samples.append([_add(tar, f"{key(n)}.{extension}", data) for extension, data in parts(n).items()])
        number += size
        (folder / name).with_suffix(".idx").write_text(format_idx(samples))
        content = (folder / name).read_bytes()
        shards.append(ShardInfo(name, size, len(content), hashlib.sha256(content).hexdigest() if sha256 else None))
    names = None if classes is None else tuple(f"class {n}" for n in range(classes))
    manifest = Manifest(str(folder), tuple(shards), names, multi_label, plan=plan)
    (folder / INDEX_NAME).write_text(json.dumps(manifest.to_json()))
    return manifest


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    extension = name.rpartition("/")[2].partition(".")[2]
    padding = -len(data) % tarfile.BLOCKSIZE
    return Member(extension, tar.offset - len(data) - padding, len(data), name)


def place_of(manifest: Manifest, number: int) -> tuple[Path, int]:
    """The tar of a sample and its place in there."""
    for shard in manifest.shards:
        if number < shard.num_samples:
            return folder_of(manifest) / shard.name, number
        number -= shard.num_samples
    raise IndexError(number)


def overwrite(manifest: Manifest, number: int, extension: str, data: bytes, *, at: int = 0) -> None:
    """Put bytes over the content of a member, in place: sizes and offsets stay as they are."""
    path, place = place_of(manifest, number)
    (member,) = (m for m in read_idx(path.with_suffix(".idx"))[place] if m.extension == extension)
    assert at + len(data) <= member.size
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, data, member.offset + at)
    os.close(descriptor)


def spoil_image(manifest: Manifest, number: int) -> None:
    """Make the image of a sample written by :func:`parts_of` unreadable."""
    overwrite(manifest, number, "jpg" if number % 3 == 0 else "png", b"no image at all")


def lose_shard(manifest: Manifest, shard: int, how: str) -> set[int]:
    """Make one tar ``"missing"`` or ``"zeroed"``, its index untouched. Numbers of its samples in the set."""
    path = folder_of(manifest) / manifest.shards[shard].name
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes(path.stat().st_size))
    first = sum(info.num_samples for info in manifest.shards[:shard])
    return set(range(first, first + manifest.shards[shard].num_samples))


def read_tars(manifest: Manifest) -> list[tuple[str, Parts]]:
    """Key and members of every sample, as ``tarfile`` reads them."""
    samples: dict[str, Parts] = {}
    for shard in manifest.shards:
        with tarfile.open(folder_of(manifest) / shard.name) as tar:
            for info in tar:
                folder, slash, base = info.name.rpartition("/")
                key, _, extension = base.partition(".")
                content = tar.extractfile(info)
                assert content is not None
                samples.setdefault(folder + slash + key, {})[extension] = content.read()
    return list(samples.items())
