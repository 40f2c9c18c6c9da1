"""Global batches against a plain reading of the same positions, for every way to share them out."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.hanging import hanging
from tests.helpers.runs import wait_until
from tests.helpers.shardset import (
    NUM_CLASSES,
    folder_of,
    image_bytes,
    key_of,
    lose_shard,
    make_shardset,
    overwrite,
    parts_of,
    place_of,
    read_tars,
    spoil_image,
)
from vitscale.config.schema import DataConfig
from vitscale.data.loader import AUGMENTATION, Batch, BatchLoader, Quarantined, evaluation_recipe, train_recipe
from vitscale.data.manifest import Manifest, read_idx
from vitscale.data.order import SampleOrder, hash64, train_positions
from vitscale.data.shard_set import ShardSource, open_source
from vitscale.data.stages import StageClock
from vitscale.data.storage.files import LocalFiles, StorageSilentError
from vitscale.data.stream import RawSample, ShardStream
from vitscale.data.transforms import evaluation_crop, train_crop
from vitscale.distributed import Ranks
from vitscale.errors import DataError
from vitscale.evaluation.accuracy import evaluation_batches
from vitscale.topology import Topology

SIZES = [7, 1, 13, 8]
NUM_SAMPLES = sum(SIZES)
GLOBAL_BATCH = 8
SEED = 5
SPLITS = [(w, m) for w in (1, 2, 4, 8) for m in (1, 2, 4, 8) if GLOBAL_BATCH % (w * m) == 0]


@dataclass(frozen=True)
class Run:
    """A training run's way through a shard set."""

    manifest: Manifest
    world_size: int = 1
    micro_batch_size: int = GLOBAL_BATCH
    lanes: int = 4
    window: int = 3
    workers: int = 2
    prefetch: int = 2
    read_ahead: int = 2
    seed: int = SEED
    num_classes: int | None = NUM_CLASSES
    labels_per_sample: int | None = 1
    max_image_pixels: int = 10_000
    pin_memory: bool = False

    @property
    def config(self) -> DataConfig:
        return DataConfig(
            train=self.manifest.location,
            image_size=(6, 8),
            max_image_pixels=self.max_image_pixels,
            workers=self.workers,
            prefetch_batches=self.prefetch,
            read_ahead_batches=self.read_ahead,
        )

    @property
    def order(self) -> SampleOrder:
        sizes = [shard.num_samples for shard in self.manifest.shards]
        return SampleOrder(sizes, seed=self.seed, lanes=self.lanes, window=self.window)

    @property
    def sources(self) -> list[ShardSource]:
        return [open_source(self.manifest)]

    @property
    def loader(self) -> BatchLoader:
        return BatchLoader(
            ShardStream(self.sources, self.order),
            train_recipe(self.config, self.seed),
            image_hw=self.config.image_hw,
            num_classes=self.num_classes,
            labels_per_sample=self.labels_per_sample,
            data=self.config,
            pin_memory=self.pin_memory,
        )

    def micro_batches(self, rank: int, first_step: int = 0, steps: int = 10**6) -> Iterator[Batch]:
        return self.loader.batches(
            train_positions(
                step,
                micro_step,
                rank=rank,
                world_size=self.world_size,
                micro_batch_size=self.micro_batch_size,
                global_batch_size=GLOBAL_BATCH,
            )
            for step in range(first_step, first_step + steps)
            for micro_step in range(GLOBAL_BATCH // (self.world_size * self.micro_batch_size))
        )

    def global_batches(self, steps: int, first_step: int = 0) -> list[Batch]:
        """What all ranks together deliver in each step."""
        by_rank = [list(self.micro_batches(rank, first_step, steps)) for rank in range(self.world_size)]
        micro_batches = [batch for together in zip(*by_rank, strict=True) for batch in together]
        per_step = GLOBAL_BATCH // self.micro_batch_size
        return [joined(micro_batches[i : i + per_step]) for i in range(0, len(micro_batches), per_step)]


def joined(batches: list[Batch]) -> Batch:
    widest = max(batch.labels.shape[1] for batch in batches)
    padded = [torch.nn.functional.pad(b.labels, (0, widest - b.labels.shape[1]), value=-1) for b in batches]
    return Batch(
        images=torch.cat([batch.images for batch in batches]),
        labels=torch.cat(padded),
        mask=torch.cat([batch.mask for batch in batches]),
        keys=[key for batch in batches for key in batch.keys],
        sample_ids=[n for batch in batches for n in batch.sample_ids],
        quarantined=[fault for batch in batches for fault in batch.quarantined],
        digest=sum(batch.digest for batch in batches),
    )


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        assert one.keys == other.keys
        assert one.sample_ids == other.sample_ids
        assert one.quarantined == other.quarantined
        assert one.digest == other.digest
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)
        assert one.mask.all()


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shardset(tmp_path_factory.mktemp("intact") / "train", SIZES)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """One shard is cut, images and labels are broken here and there; ``BAD`` are the samples."""
    manifest = make_shardset(tmp_path_factory.mktemp("damaged") / "train", SIZES)
    for number in (2, 8, 9, 10, 11, 12, 17):
        spoil_image(manifest, number)
    overwrite(manifest, 14, "cls", b"x")
    path, place = place_of(manifest, 28)
    os.truncate(path, read_idx(path.with_suffix(".idx"))[place][0].offset + 100)
    return manifest


BAD = {2, 8, 9, 10, 11, 12, 14, 17, 28}


def plain_batches(run: Run, steps: int, bad: set[int] = frozenset()) -> list[tuple[list[str], Tensor, Tensor]]:  # type: ignore[assignment]
    """Keys, pixels and labels of the positions one by one, read with ``tarfile``."""
    samples, order = read_tars(run.manifest), run.order
    starts = np.cumsum([0, *(shard.num_samples for shard in run.manifest.shards)]).tolist()
    result = []
    for step in range(steps):
        keys, images, labels = [], [], []
        for position in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH):
            place = order.locate(position)
            for candidate in (place, *order.substitutes(place)):
                ref = order.window(candidate.window)[candidate.offset]
                number = starts[ref.shard] + ref.sample
                if number not in bad:
                    break
            key, parts = samples[number]
            data = next(data for extension, data in parts.items() if extension != "cls")
            randomness = hash64(run.seed, AUGMENTATION, position // order.num_samples, number)
            keys.append(key)
            images.append(np.zeros((*run.config.image_hw, 3), np.uint8))
            train_crop(data, run.config, randomness, images[-1])
            labels.append([int(parts["cls"])])
        result.append((keys, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)))
    return result


STEPS = 10  # two epochs and three quarters


@pytest.mark.parametrize(("world_size", "micro_batch_size"), SPLITS)
def test_global_batches_are_those_of_a_plain_reading(intact: Manifest, world_size: int, micro_batch_size: int) -> None:
    run = Run(intact, world_size, micro_batch_size)
    batches = run.global_batches(STEPS)
    for batch, (keys, images, labels) in zip(batches, plain_batches(run, STEPS), strict=True):
        assert batch.keys == keys
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)
        assert batch.quarantined == []
    assert_same(batches, Run(intact).global_batches(STEPS))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(SPLITS), st.sampled_from([1, 2, 4, 8]), st.integers(1, 12), st.integers(1, 5), st.integers(1, 6))
def test_global_batches_do_not_depend_on_who_loads_them(
    damaged: Manifest, split: tuple[int, int], lanes: int, window: int, workers: int, prefetch: int
) -> None:
    alone = Run(damaged, lanes=lanes, window=window, workers=1, prefetch=1)
    shared = replace(alone, world_size=split[0], micro_batch_size=split[1], workers=workers, prefetch=prefetch)
    assert_same(shared.global_batches(STEPS), alone.global_batches(STEPS))


@pytest.mark.parametrize("first_step", range(STEPS))
def test_a_resumed_run_gives_the_rest_of_the_uninterrupted_one(damaged: Manifest, first_step: int) -> None:
    expected = Run(damaged).global_batches(STEPS)
    resumed = Run(damaged, world_size=4, micro_batch_size=1, workers=1, prefetch=5)
    assert_same(resumed.global_batches(STEPS - first_step, first_step), expected[first_step:])


def test_each_epoch_has_every_sample_once(intact: Manifest) -> None:
    batches = Run(intact, world_size=2, micro_batch_size=2).global_batches(2 * NUM_SAMPLES)
    drawn = [n for batch in batches for n in batch.sample_ids]
    for epoch in range(len(drawn) // NUM_SAMPLES):
        assert sorted(drawn[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES]) == list(range(NUM_SAMPLES))


def test_digests_tell_batches_apart(intact: Manifest) -> None:
    digests = [batch.digest for batch in Run(intact).global_batches(50)]
    assert len(set(digests)) == 50
    assert max(digests) < 2**48 * GLOBAL_BATCH
    other = [batch.digest for batch in Run(intact, seed=SEED + 1).global_batches(50)]
    assert not set(digests) & set(other)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), SPLITS)
def test_bad_samples_are_replaced_and_recorded_once(damaged: Manifest, world_size: int, micro_batch_size: int) -> None:
    run = Run(damaged, world_size, micro_batch_size, window=5)
    intact_copy = replace(run, manifest=make_shardset(folder_of(damaged).parent / "copy", SIZES))
    batches = run.global_batches(STEPS)
    expected = plain_batches(intact_copy, STEPS, BAD)
    for batch, (keys, images, labels) in zip(batches, expected, strict=True):
        assert batch.keys == keys
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)

    drawn = [key for batch in batches for key in batch.keys]
    recorded = [fault for batch in batches for fault in batch.quarantined]
    in_whole_epochs = [f for f in recorded if f.position < 2 * NUM_SAMPLES]
    assert Counter(f.key for f in in_whole_epochs) == {key_of(n): 2 for n in BAD}
    assert len({f.position for f in recorded}) == len(recorded)
    for fault in recorded:
        assert fault.substitute == drawn[fault.position]
        assert fault.shard == place_of(damaged, int(fault.key[-5:]))[0].name
    reasons = {f.key: f.reason for f in recorded}
    assert reasons[key_of(2)].startswith("cannot decode the image: none of JPEG, ")
    assert reasons[key_of(14)].startswith("unreadable label: ")
    assert reasons[key_of(28)].startswith("the tar ends within sample_00028.")


def test_augmentation_belongs_to_seed_epoch_and_sample(intact: Manifest) -> None:
    def pixels(**changes: Any) -> dict[tuple[int, int], bytes]:
        """Of every epoch and sample."""
        batches = Run(intact, **changes).global_batches(3 * NUM_SAMPLES // GLOBAL_BATCH)
        samples = [(n, image) for batch in batches for n, image in zip(batch.sample_ids, batch.images, strict=True)]
        return {(i // NUM_SAMPLES, n): image.numpy().tobytes() for i, (n, image) in enumerate(samples)}

    drawn = pixels()
    for epoch in (0, 1):
        same = sum(drawn[epoch, n] == drawn[epoch + 1, n] for n in range(NUM_SAMPLES) if (epoch + 1, n) in drawn)
        assert same == 0
    # Another order, the same crops.
    assert pixels(lanes=8, window=5).items() >= {k: v for k, v in drawn.items() if k[0] < 2}.items()
    other = pixels(seed=SEED + 1)
    assert not any(drawn[key] == other[key] for key in drawn.keys() & other.keys())


def test_a_label_outside_the_head(intact: Manifest) -> None:
    before = threads()
    with pytest.raises(DataError) as caught:
        Run(intact, num_classes=9).global_batches(STEPS)
    message = str(caught.value)
    assert "has label 9, but the head has 9 outputs (0 to 8); set model.num_classes" in message
    assert message.startswith("train-00000")
    assert wait_until(lambda: threads() <= before, timeout_s=10)


def test_without_a_head_labels_are_free(intact: Manifest) -> None:
    (batch,) = Run(intact, num_classes=None).global_batches(1)
    assert batch.labels.shape == (GLOBAL_BATCH, 1)


def test_several_labels(tmp_path: Path) -> None:
    def parts(n: int) -> dict[str, bytes]:
        return {"png": image_bytes(n), "json": str({"labels": [*range(n % 4)]}).replace("'", '"').encode()}

    manifest = make_shardset(tmp_path, [40], parts=parts, multi_label=True)
    batches = Run(manifest, labels_per_sample=None).global_batches(5)
    assert sorted(n for batch in batches for n in batch.sample_ids) == list(range(40))
    for batch in batches:
        for n, row in zip(batch.sample_ids, batch.labels.tolist(), strict=True):
            assert [label for label in row if label != -1] == list(range(n % 4))
        assert batch.labels.shape[1] == max(1, *(n % 4 for n in batch.sample_ids))
    # A loss that takes one label has no use for the others.
    one_label = Run(manifest, labels_per_sample=1).global_batches(5)
    assert {n % 4 for batch in one_label for n in batch.sample_ids} == {1}
    reasons = {f.reason for batch in one_label for f in batch.quarantined}
    assert reasons == {f"{n} labels; this loss needs 1 per image" for n in (0, 2, 3)}


def assert_plain(run: Run, intact: Manifest, bad: set[int]) -> list[Batch]:
    """The run's batches, after a comparison with a plain reading of an intact copy of the set."""
    batches = run.global_batches(STEPS)
    for batch, (keys, images, labels) in zip(
        batches, plain_batches(replace(run, manifest=intact), STEPS, bad), strict=True
    ):
        assert batch.keys == keys
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)
        assert bad.isdisjoint(batch.sample_ids)
    return batches


@pytest.mark.parametrize("how", ["missing", "zeroed"])
@pytest.mark.parametrize("shard", range(len(SIZES)))
def test_a_lost_shard_is_survived(intact: Manifest, tmp_path: Path, shard: int, how: str) -> None:
    manifest = make_shardset(tmp_path, SIZES)
    bad = lose_shard(manifest, shard, how)
    alone = Run(manifest)
    expected = assert_plain(alone, intact, bad)
    for world_size, micro_batch_size in SPLITS:
        shared = replace(alone, world_size=world_size, micro_batch_size=micro_batch_size, prefetch=1)
        assert_same(shared.global_batches(STEPS), expected)

    drawn = [key for batch in expected for key in batch.keys]
    recorded = [fault for batch in expected for fault in batch.quarantined]
    counts = Counter(fault.key for fault in recorded if fault.position < 2 * NUM_SAMPLES)
    assert counts == {key_of(n): 2 for n in bad}
    for fault in recorded:
        assert fault.substitute == drawn[fault.position]
        assert fault.shard == manifest.shards[shard].name
        assert fault.reason.startswith({"missing": "cannot read the shard: ", "zeroed": "the tar has no member "}[how])
    # No good sample makes up for the whole shard alone.
    if len(bad) > 1:
        assert len({fault.substitute for fault in recorded}) > len(bad) / 2


@pytest.mark.parametrize("bad", [{0}, {4}, {7}, {0, 1, 2, 3, 4, 5, 6}])
def test_a_bad_sample_alone_in_its_lane_is_survived(tmp_path: Path, bad: set[int]) -> None:
    sizes = [5, 3]
    copy = make_shardset(tmp_path / "copy", sizes)
    manifest = make_shardset(tmp_path / "train", sizes)
    for number in bad:
        spoil_image(manifest, number)
    run = Run(manifest, lanes=8)
    assert {len(run.order.window(run.order.locate(p).window)) for p in range(8)} == {1}
    expected = assert_plain(run, copy, bad)
    assert sum(len(batch.quarantined) for batch in expected) == STEPS * len(bad)
    for world_size, micro_batch_size in SPLITS:
        assert_same(Run(manifest, world_size, micro_batch_size, lanes=8).global_batches(STEPS), expected)


@pytest.mark.parametrize(("sizes", "bad"), [([2], {1}), ([3], {0}), ([2, 1], {0, 1}), ([1, 4, 1], {2, 5})])
@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_a_global_batch_larger_than_the_set_survives_bad_samples(
    tmp_path: Path, sizes: list[int], bad: set[int], lanes: int
) -> None:
    assert sum(sizes) < GLOBAL_BATCH
    copy = make_shardset(tmp_path / "copy", sizes)
    manifest = make_shardset(tmp_path / "train", sizes)
    for number in bad:
        spoil_image(manifest, number)
    expected = assert_plain(Run(manifest, lanes=lanes), copy, bad)
    epochs = STEPS * GLOBAL_BATCH // sum(sizes)
    recorded = [fault for batch in expected for fault in batch.quarantined]
    assert Counter(f.key for f in recorded if f.position < epochs * sum(sizes)) == {key_of(n): epochs for n in bad}
    for world_size, micro_batch_size in SPLITS:
        assert_same(Run(manifest, world_size, micro_batch_size, lanes=lanes).global_batches(STEPS), expected)


def only_good(folder: Path, num_samples: int, good: int | None) -> Manifest:
    return make_shardset(
        folder,
        [num_samples],
        parts=lambda n: parts_of(n) if n == good else {"png": b"broken", "cls": b"0"},
    )


@pytest.mark.parametrize("place", ["first of the window", "last of the window", "first far", "last far"])
def test_the_whole_list_of_substitutes_is_tried(tmp_path: Path, place: str) -> None:
    """The only good sample of the set is at one place of the list, and at no earlier one."""
    total, position = 5000, 3300
    order = SampleOrder([total], seed=SEED, lanes=4, window=9)
    here = order.locate(position)
    tried = [order.window(p.window)[p.offset].sample for p in (here, *order.substitutes(here))]
    assert len(tried) == 1 + 8 + 64
    at = {"first of the window": 1, "last of the window": 8, "first far": 9, "last far": 72}[place]
    assert tried[at] not in tried[:at]
    manifest = only_good(tmp_path, total, tried[at])
    (batch,) = Run(manifest, window=9).loader.batches([[position]])
    assert batch.keys == [key_of(tried[at])]
    (fault,) = batch.quarantined
    assert (fault.position, fault.key, fault.substitute) == (position, key_of(tried[0]), key_of(tried[at]))


def test_a_good_sample_that_is_on_no_list_is_of_no_use(tmp_path: Path) -> None:
    total, position = 5000, 3300
    order = SampleOrder([total], seed=SEED, lanes=4, window=9)
    here = order.locate(position)
    tried = [order.window(p.window)[p.offset].sample for p in (here, *order.substitutes(here))]
    manifest = only_good(tmp_path, total, next(n for n in range(total) if n not in tried))
    with pytest.raises(DataError, match="nor any of 72 samples tried in its place can be used"):
        next(Run(manifest, window=9).loader.batches([[position]]))


@pytest.mark.parametrize(("world_size", "micro_batch_size"), SPLITS)
@pytest.mark.parametrize(("total", "lanes", "first_step"), [(66, 1, 0), (66, 1, 2), (1, 8, 0), (200, 8, 7)])
def test_a_set_without_any_good_sample_is_an_error(
    tmp_path: Path, total: int, lanes: int, first_step: int, world_size: int, micro_batch_size: int
) -> None:
    before, start = threads(), time.perf_counter()
    run = Run(only_good(tmp_path, total, None), world_size, micro_batch_size, lanes=lanes, window=16)
    order = run.order
    here = order.locate(first_step * GLOBAL_BATCH)
    tried = [order.window(p.window)[p.offset].sample for p in (here, *order.substitutes(here))]
    with pytest.raises(DataError) as caught:
        run.global_batches(9, first_step)
    reason = r"\(cannot decode the image: none of JPEG, [^)]*\)"
    assert re.fullmatch(
        rf"train-000000\.tar: neither {key_of(tried[0])} {reason} nor any of {len(tried) - 1} samples tried in its "
        rf"place can be used, the last being {key_of(tried[-1])} of train-000000\.tar {reason}; mend the shard set",
        str(caught.value),
    )
    assert wait_until(lambda: threads() <= before, timeout_s=10)
    assert time.perf_counter() - start < 10


def test_a_set_without_any_tar_is_an_error(tmp_path: Path) -> None:
    before = threads()
    manifest = make_shardset(tmp_path, SIZES)
    for shard in range(len(SIZES)):
        lose_shard(manifest, shard, "missing")
    with pytest.raises(DataError, match=r"\(cannot read the shard: No such file.*\) nor any of \d+ samples tried"):
        Run(manifest, world_size=2, micro_batch_size=2).global_batches(STEPS)
    assert wait_until(lambda: threads() <= before, timeout_s=10)


@pytest.mark.parametrize("pin_memory", [False, True])
def test_images_and_labels_are_pinned_and_nothing_else(
    intact: Manifest, monkeypatch: pytest.MonkeyPatch, pin_memory: bool
) -> None:
    """Without an accelerator nothing can be pinned: what is asked for is recorded instead."""
    pinned: set[int] = set()
    made: list[Tensor] = []

    def recorded(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
            made.append(make(*args, **options))
            if pin_memory:
                pinned.add(made[-1].data_ptr())
            return made[-1]

        return wrapper

    monkeypatch.setattr(torch, "empty", recorded(torch.empty))
    monkeypatch.setattr(torch, "tensor", recorded(torch.tensor))
    batches = list(Run(intact, pin_memory=pin_memory).micro_batches(0, steps=3))
    expected = {tensor.data_ptr() for batch in batches for tensor in (batch.images, batch.labels)}
    assert pinned == (expected if pin_memory else set())
    assert len(expected) == 6
    monkeypatch.undo()
    assert_same(batches, list(Run(intact).micro_batches(0, steps=3)))


@pytest.mark.parametrize("damage", ["missing", "length", "line"])
def test_a_broken_member_index_makes_its_samples_bad_for_every_world_size(tmp_path: Path, damage: str) -> None:
    manifest = make_shardset(tmp_path, SIZES)
    idx = tmp_path / manifest.shards[2].idx_name
    if damage == "missing":
        idx.unlink()
    else:
        lines = idx.read_text().splitlines()[1:]
        lines = lines[:5] if damage == "length" else ["jpg" for _ in lines]
        idx.write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n")
    expected = Run(manifest).global_batches(STEPS)
    faults = [fault for batch in expected for fault in batch.quarantined]
    assert {fault.shard for fault in faults} == {manifest.shards[2].name}
    assert all("the member index" in fault.reason and fault.substitute for fault in faults)
    assert_same(Run(manifest, world_size=2, micro_batch_size=4, workers=3).global_batches(STEPS), expected)


def test_an_error_of_reading_threads_arrives_and_leaves_no_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_shardset(tmp_path, SIZES)
    before = threads()
    source = ShardSource(manifest, *[LocalFiles(tmp_path, timeout_s=0.2)] * 2)
    monkeypatch.setattr(Run, "sources", property(lambda _: [source]))
    names = [*(shard.name for shard in manifest.shards), "index.json"]
    with (
        hanging(*(tmp_path / name for name in names)),
        pytest.raises(StorageSilentError, match=r"has not answered for 0\.2 s; see that it is mounted"),
    ):
        Run(manifest).global_batches(STEPS)
    assert wait_until(lambda: threads() <= before, timeout_s=10)


def test_a_shard_that_hangs_is_substituted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_shardset(tmp_path, SIZES)
    source = ShardSource(manifest, *[LocalFiles(tmp_path, timeout_s=0.2)] * 2)
    monkeypatch.setattr(Run, "sources", property(lambda _: [source]))
    with hanging(tmp_path / manifest.shards[2].name):
        expected = Run(manifest).global_batches(2)
        assert_same(Run(manifest, world_size=4, micro_batch_size=2).global_batches(2), expected)
    faults = [fault for batch in expected for fault in batch.quarantined]
    assert faults
    assert {fault.reason for fault in faults} == {"cannot read the shard: no answer for 0.2 s"}


def test_batches_before_a_broken_one_are_delivered(tmp_path: Path) -> None:
    """Reading ahead must not bring an error forward."""
    manifest = make_shardset(tmp_path, SIZES, parts=lambda n: {"png": image_bytes(n), "cls": b"1"})
    victim = Run(manifest).global_batches(3)[2].sample_ids[4]
    overwrite(manifest, victim, "cls", b"9")
    for prefetch in (1, 2, 6):
        batches = Run(manifest, num_classes=9, prefetch=prefetch).micro_batches(0)
        assert len(list(islice(batches, 2))) == 2
        with pytest.raises(DataError, match=f"{key_of(victim)} has label 9"):
            next(batches)


@pytest.mark.parametrize("delivered", [0, 1, 5])
@pytest.mark.parametrize("workers", [1, 4])
def test_an_abandoned_loader_leaves_no_threads(intact: Manifest, delivered: int, workers: int) -> None:
    before = threads()
    batches = Run(intact, workers=workers, prefetch=6).micro_batches(0)
    assert len(list(islice(batches, delivered))) == delivered
    del batches
    assert wait_until(lambda: threads() <= before, timeout_s=10)


def test_an_exhausted_loader_leaves_no_threads(intact: Manifest) -> None:
    before = threads()
    assert len(list(Run(intact).micro_batches(0, steps=3))) == 3
    assert wait_until(lambda: threads() <= before, timeout_s=10)


def test_an_error_of_the_caller_leaves_no_threads(intact: Manifest) -> None:
    def positions() -> Iterator[list[int | None]]:
        yield [0, 1]
        raise KeyError("mine")

    before = threads()
    with pytest.raises(KeyError, match="mine"):
        list(Run(intact, prefetch=4).loader.batches(positions()))
    assert wait_until(lambda: threads() <= before, timeout_s=10)


def test_memory_does_not_grow_with_the_epochs(tmp_path: Path) -> None:
    """From epoch to epoch a rank's slots move to other lanes; windows of lanes it has left must be let go."""
    manifest = make_shardset(tmp_path, [83], parts=lambda n: {"png": image_bytes(0, hw=(2, 2)), "cls": b"1"})
    run = Run(manifest, world_size=8, micro_batch_size=1, lanes=8, window=8, prefetch=1, read_ahead=0)
    # This rank walks one lane at a time: its newest window, and those that two batches of one still need.
    most = (1 + 2) * run.window
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if type(thing) is RawSample}
    for i, _ in enumerate(run.micro_batches(0, steps=130)):
        if i > 80 and i % 3 == 0:
            alive = sum(type(thing) is RawSample and id(thing) not in before for thing in gc.get_objects())
            assert alive <= most, f"step {i}: {alive} samples"


def test_a_decompression_bomb_is_quarantined(tmp_path: Path) -> None:
    manifest = make_shardset(
        tmp_path,
        [24],
        parts=lambda n: {"png": image_bytes(n, hw=(40, 30) if n == 5 else (10, 10)), "cls": b"1"},
    )
    batches = Run(manifest, max_image_pixels=1000).global_batches(3)
    (fault,) = [fault for batch in batches for fault in batch.quarantined]
    assert fault.key == key_of(5)
    assert fault.reason == "image of 30 x 40 pixels; at most 1000 pixels are decoded"
    assert 5 not in {n for batch in batches for n in batch.sample_ids}


def evaluated(manifest: Manifest, world_size: int, batch_size: int, workers: int = 2) -> list[list[Batch]]:
    """Batches of an evaluation, by rank."""
    data = DataConfig(train=Path("none"), image_size=(6, 8), workers=workers)
    return [
        list(
            evaluation_batches(
                manifest,
                data,
                num_classes=NUM_CLASSES,
                batch_size=batch_size,
                ranks=Ranks(Topology(rank=rank, world_size=world_size), torch.device("cpu"), None),
            )
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 4, 29, 64])
def test_evaluation_counts_each_sample_once(intact: Manifest, world_size: int, batch_size: int) -> None:
    by_rank = evaluated(intact, world_size, batch_size)
    assert len({len(batches) for batches in by_rank}) == 1
    data = DataConfig(train=Path("none"), image_size=(6, 8))
    samples = read_tars(intact)
    counted = []
    for batch in (batch for batches in by_rank for batch in batches):
        assert batch.images.shape == (batch_size, 3, 6, 8)
        assert batch.quarantined == []
        for slot in range(batch_size):
            if not batch.mask[slot]:
                assert (batch.keys[slot], batch.sample_ids[slot], batch.labels[slot].tolist()) == ("", -1, [-1])
                assert not batch.images[slot].any()
                continue
            key, parts = samples[batch.sample_ids[slot]]
            image = next(data for extension, data in parts.items() if extension != "cls")
            pixels = np.zeros((*data.image_hw, 3), np.uint8)
            evaluation_crop(image, data, pixels)
            assert batch.keys[slot] == key
            assert batch.labels[slot].tolist() == [int(parts["cls"])]
            np.testing.assert_array_equal(batch.images[slot].numpy(), pixels.transpose(2, 0, 1))
            counted.append(batch.sample_ids[slot])
    assert sorted(counted) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_masks_bad_samples(damaged: Manifest, world_size: int) -> None:
    batches = [batch for batches in evaluated(damaged, world_size, 4) for batch in batches]
    counted = [n for batch in batches for n in batch.sample_ids if n >= 0]
    assert sorted(counted) == sorted(set(range(NUM_SAMPLES)) - BAD)
    assert sum(int(batch.mask.sum()) for batch in batches) == NUM_SAMPLES - len(BAD)
    faults = [fault for batch in batches for fault in batch.quarantined]
    assert sorted(fault.position for fault in faults) == sorted(BAD)
    assert all(isinstance(fault, Quarantined) and fault.substitute is None for fault in faults)


def test_evaluation_of_a_set_without_any_good_sample(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path, [80], parts=lambda _: {"png": b"broken", "cls": b"0"})
    (batches,) = evaluated(manifest, 1, 16)
    assert [int(batch.mask.sum()) for batch in batches] == [0] * 5
    assert sum(len(batch.quarantined) for batch in batches) == 80


def test_evaluation_recipe_ignores_the_place(intact: Manifest) -> None:
    run = Run(intact)
    place = run.order.locate(3)
    sample = ShardStream([open_source(intact)], run.order).read_window(place.window)[place.offset]
    assert isinstance(sample, RawSample)
    recipe = evaluation_recipe(run.config)
    here, there = (np.zeros((*run.config.image_hw, 3), np.uint8) for _ in range(2))
    recipe(sample, place, here, StageClock())
    recipe(sample, run.order.locate(20), there, StageClock())
    assert here.any()
    np.testing.assert_array_equal(here, there)
