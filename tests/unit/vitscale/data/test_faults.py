"""Faults of a storage, seen from the batches: the same substitutes for every world size, or one error; never a hang."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers import bad_http
from tests.helpers.bad_http import BadServer, Handler, bad_server, ranged
from tests.helpers.shardset import folder_of, make_shardset
from vitscale.config.schema import DataConfig, StorageConfig
from vitscale.data.loader import Batch, BatchLoader, train_recipe
from vitscale.data.manifest import Manifest, read_idx
from vitscale.data.order import SampleOrder, train_positions
from vitscale.data.shard_set import open_source
from vitscale.data.storage import transfer
from vitscale.data.storage.files import StorageSilentError
from vitscale.data.stream import ShardStream

SIZES = [7, 1, 20, 3, 12]
STEPS, GLOBAL_BATCH = 10, 8  # almost two epochs
QUICK = StorageConfig(request_timeout_s=0.2, total_timeout_s=0.5, connections=16)
Spoil = Callable[[BadServer, Manifest], None]


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(transfer, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr("vitscale.data.storage.files.SHORT_LOOK_S", 0.05)
    return make_shardset(tmp_path / "train", SIZES)


@pytest.fixture
def server(local: Manifest) -> Iterator[BadServer]:
    with bad_server() as running:
        running.files = {path.name: path.read_bytes() for path in folder_of(local).iterdir()}
        yield running


def global_batches(
    manifest: Manifest, *, world_size: int = 1, storage: StorageConfig = QUICK, steps: int = STEPS
) -> list[Batch]:
    """Of each step, the batches of all ranks put together."""
    data = DataConfig(train="unused", image_size=(6, 8), storage=storage, read_ahead_batches=3)
    order = SampleOrder([shard.num_samples for shard in manifest.shards], seed=3, lanes=4, window=3)

    def of_rank(rank: int) -> list[Batch]:
        loader = BatchLoader(
            ShardStream([open_source(manifest, storage)], order),
            train_recipe(data, seed=3),
            image_hw=(6, 8),
            num_classes=10,
            labels_per_sample=1,
            data=data,
            pin_memory=False,
        )
        per_rank = GLOBAL_BATCH // world_size
        return list(
            loader.batches(
                train_positions(
                    step, 0, rank=rank, world_size=world_size, micro_batch_size=per_rank, global_batch_size=GLOBAL_BATCH
                )
                for step in range(steps)
            )
        )

    by_rank = [of_rank(rank) for rank in range(world_size)]
    return [
        Batch(
            images=torch.cat([batch.images for batch in together]),
            labels=torch.cat([batch.labels for batch in together]),
            mask=torch.cat([batch.mask for batch in together]),
            keys=[key for batch in together for key in batch.keys],
            sample_ids=[number for batch in together for number in batch.sample_ids],
            quarantined=[fault for batch in together for fault in batch.quarantined],
        )
        for together in zip(*by_rank, strict=True)
    ]


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.quarantined == other.quarantined


def fail_every_third(server: BadServer, _manifest: Manifest) -> None:
    server.rule = lambda number: bad_http.cut(700) if number % 3 == 2 else ranged


def fail_now_and_then(server: BadServer, _manifest: Manifest) -> None:
    server.rule = lambda number: bad_http.status((500, 502, 503, 504)[number % 4]) if number % 2 else ranged


def hang_now_and_then(server: BadServer, _manifest: Manifest) -> None:
    server.rule = lambda number: bad_http.silent if number % 7 == 3 else ranged


def without_ranges(server: BadServer, _manifest: Manifest) -> None:
    server.rule = lambda _: bad_http.whole


@pytest.mark.parametrize("spoil", [fail_every_third, fail_now_and_then, hang_now_and_then, without_ranges])
def test_faults_that_pass_change_nothing(server: BadServer, local: Manifest, spoil: Spoil) -> None:
    spoil(server, local)
    remote = replace(local, location=server.url)
    batches = global_batches(remote, storage=replace(QUICK, total_timeout_s=30))
    assert_same(batches, global_batches(local))
    assert not any(batch.quarantined for batch in batches)


def vanish(server: BadServer, manifest: Manifest) -> None:
    del server.files[manifest.shards[2].name]


def vanish_with_index(server: BadServer, manifest: Manifest) -> None:
    del server.files[manifest.shards[2].name], server.files[manifest.shards[2].idx_name]


def cut_short(server: BadServer, manifest: Manifest) -> None:
    server.files[manifest.shards[2].name] = server.files[manifest.shards[2].name][:9000]


def flip_bytes(server: BadServer, manifest: Manifest) -> None:
    name = manifest.shards[2].name
    data = bytearray(server.files[name])
    for members in read_idx(folder_of(manifest) / manifest.shards[2].idx_name)[::3]:
        image = next(member for member in members if member.extension in ("png", "jpg"))
        for at in range(image.offset, image.offset + 8):
            data[at] ^= 0xFF
    server.files[name] = bytes(data)


def lose_labels(server: BadServer, manifest: Manifest) -> None:
    name = manifest.shards[2].name
    data = bytearray(server.files[name])
    for members in read_idx(folder_of(manifest) / manifest.shards[2].idx_name)[::4]:
        label = next(member for member in members if member.extension == "cls")
        data[label.offset : label.offset + label.size] = b"?" * label.size
    server.files[name] = bytes(data)


def of_file(name: str, answer: bad_http.Answer) -> Callable[[int], bad_http.Answer]:
    """Answer requests for one file like this, and all others as it should be."""

    def chosen(handler: Handler, data: bytes | None) -> None:
        (answer if handler.path.endswith(name) else ranged)(handler, data)

    return lambda _: chosen


def always_500(server: BadServer, manifest: Manifest) -> None:
    server.rule = of_file(manifest.shards[2].name, bad_http.status(500))


def never_answer(server: BadServer, manifest: Manifest) -> None:
    server.rule = of_file(manifest.shards[2].name, bad_http.silent)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (vanish, "cannot read the shard: the server answered 404 Not Found"),
        (vanish_with_index, "cannot read the member index train-000002.idx: the server answered 404 Not Found"),
        (cut_short, "the tar ends within "),
        (flip_bytes, "cannot decode the image: "),
        (lose_labels, "unreadable label: "),
        (always_500, "cannot read the shard: given up after "),
        (never_answer, "cannot read the shard: given up after "),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_faults_of_a_shard_have_the_same_substitutes_everywhere(
    server: BadServer, local: Manifest, tmp_path: Path, spoil: Spoil, reason: str, cached: bool
) -> None:
    spoil(server, local)
    remote = replace(local, location=server.url)
    storages = [replace(QUICK, cache=tmp_path / f"cache-{n}" if cached else None) for n in range(2)]
    steps = 2 if "given up" in reason else STEPS
    alone = global_batches(remote, storage=storages[0], steps=steps)
    assert_same_but_for_times(global_batches(remote, world_size=4, storage=storages[1], steps=steps), alone)
    faults = [fault for batch in alone for fault in batch.quarantined]
    assert faults
    for fault in faults:
        assert fault.reason.startswith(reason)
        assert fault.shard == local.shards[2].name
        assert fault.substitute is not None
    # Where nothing is wrong, nothing moved.
    bad = {fault.position for fault in faults}
    drawn, expected = (
        [key for batch in batches for key in batch.keys] for batches in (alone, global_batches(local, steps=steps))
    )
    assert [key for n, key in enumerate(drawn) if n not in bad] == [k for n, k in enumerate(expected) if n not in bad]


def assert_same_but_for_times(ours: list[Batch], theirs: list[Batch]) -> None:
    """Reasons may tell how long was waited."""

    def without_times(batch: Batch) -> Batch:
        return replace(
            batch, quarantined=[replace(fault, reason=fault.reason.split(" after ")[0]) for fault in batch.quarantined]
        )

    assert_same([without_times(batch) for batch in ours], [without_times(batch) for batch in theirs])


@pytest.mark.parametrize("answer", [bad_http.status(503), bad_http.silent, None], ids=["503", "silent", "gone"])
def test_a_storage_that_fails_as_a_whole_is_one_error(
    server: BadServer, local: Manifest, answer: bad_http.Answer | None
) -> None:
    if answer is None:
        server.stop()
    else:
        failing = answer
        server.rule = lambda _: failing
    with pytest.raises(StorageSilentError, match=r"no file could be read for .*; then give the same command again"):
        global_batches(replace(local, location=server.url))
