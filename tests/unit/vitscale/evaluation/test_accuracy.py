"""Top-1 and top-5 against counting by hand, and the same whatever the number of ranks and the batch size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.distributed import run_ranks
from tests.helpers.runs import CONFIG, overrides
from tests.helpers.shardset import folder_of, key_of, make_shardset, spoil_image
from vitscale.config.loader import load_config
from vitscale.data.loader import Batch, Quarantined
from vitscale.data.order import evaluation_positions
from vitscale.data.shard_set import open_evaluation_set
from vitscale.errors import DataError
from vitscale.evaluation.unreadable import check_readable
from vitscale.topology import Topology

IMAGES = 83
BAD = {0, 17, 82}
FAULT = Quarantined(position=0, key="k", shard="s", reason="r", substitute=None)


def table(classes: int) -> tuple[Tensor, list[int]]:
    """Logits and labels of every image."""
    generator = torch.Generator().manual_seed(classes)
    return torch.randn(IMAGES, classes, generator=generator), torch.randint(
        classes, (IMAGES,), generator=generator
    ).tolist()


def expected(classes: int) -> tuple[int, int, int, int]:
    """Images, right ones, right among the best five, unreadable ones: sorted by hand."""
    logits, labels = table(classes)
    right = top5 = 0
    for image in set(range(IMAGES)) - BAD:
        row = logits[image].tolist()
        best = sorted(range(classes), key=lambda k: -row[k])
        right += best[0] == labels[image]
        top5 += labels[image] in best[:5]
    return IMAGES - len(BAD), right, top5, len(BAD)


def batches_of(topology: Topology, classes: int, batch_size: int) -> Iterator[Batch]:
    """Batches as the loader makes them; the image says which row of the table is meant."""
    labels = table(classes)[1]
    positions = evaluation_positions(IMAGES, rank=topology.rank, world_size=topology.world_size, batch_size=batch_size)
    for row in positions:
        good = [p is not None and p not in BAD for p in row]
        pairs = list(zip(row, good, strict=True))
        yield Batch(
            images=torch.tensor([p or 0 for p in row], dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2),
            labels=torch.tensor([[labels[p] if ok and p is not None else -1] for p, ok in pairs]),
            mask=torch.tensor(good),
            keys=[""] * len(row),
            sample_ids=[-1 if p is None else p for p in row],
            quarantined=[FAULT for p in row if p in BAD],
        )


def _counts(topology: Topology, cases: list[tuple[int, int]]) -> None:
    from vitscale.distributed import connect
    from vitscale.evaluation.accuracy import evaluate_accuracy

    with connect(topology, timeout_s=60) as ranks:
        for classes, batch_size in cases:
            logits = table(classes)[0]
            accuracy = evaluate_accuracy(
                lambda images, logits=logits: logits[images[:, 0, 0, 0].long()],  # type: ignore[misc]
                batches_of(topology, classes, batch_size),
                num_classes=classes,
                ranks=ranks,
            )
            assert accuracy is not None
            found = (accuracy.images, accuracy.correct, accuracy.correct_top5, accuracy.unreadable)
            assert found == expected(classes), (classes, batch_size, found)
            assert accuracy.top1 == accuracy.correct / 80
            assert accuracy.to_json() == {
                "top1": accuracy.top1,
                "top5": accuracy.top5,
                "calibration_error": accuracy.calibration_error,
                "images": 80,
                "unreadable": 3,
            }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_counts_are_exact(world_size: int) -> None:
    # 5 and fewer classes have no worse than a top-5 of 1; with 83 images per batch some ranks have padding only.
    run_ranks(_counts, world_size, [(classes, batch) for classes in (1, 2, 3, 5, 6, 30) for batch in (1, 8, 83)])


def test_the_expectation_is_neither_trivial_nor_impossible() -> None:
    images, right, top5, _ = expected(30)
    assert 0 < right < top5 < images
    assert expected(5)[2] == expected(1)[1] == images


def _gives_up(topology: Topology) -> None:
    from vitscale.distributed import connect
    from vitscale.evaluation.accuracy import evaluate_accuracy

    asked = []

    def is_stopping() -> bool:
        asked.append(True)
        return len(asked) == 3

    with connect(topology, timeout_s=60) as ranks:
        logits = table(6)[0]
        batches = batches_of(topology, 6, 8)
        found = evaluate_accuracy(
            lambda images: logits[: len(images)], batches, num_classes=6, ranks=ranks, is_stopping=is_stopping
        )
        assert found is None
        assert len(asked) == 3


def test_a_stop_gives_up() -> None:
    run_ranks(_gives_up, 1)


def _nothing_to_read(topology: Topology) -> None:
    from vitscale.distributed import connect
    from vitscale.evaluation.accuracy import evaluate_accuracy

    bad = Batch(
        images=torch.zeros(2, 3, 2, 2, dtype=torch.uint8),
        labels=torch.tensor([[-1], [-1]]),
        mask=torch.tensor([False, False]),
        keys=["", ""],
        sample_ids=[-1, -1],
        quarantined=[FAULT, FAULT],
    )
    with connect(topology, timeout_s=60) as ranks:
        with pytest.raises(DataError) as caught:
            evaluate_accuracy(lambda images: torch.zeros(len(images), 6), iter([bad]), num_classes=6, ranks=ranks)
        assert str(caught.value).startswith(f"none of {2 * ranks.world_size} images can be read; write the shard set")
        assert caught.value.agreed


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_readable_image_is_an_error_of_all_ranks_and_no_accuracy(world_size: int) -> None:
    run_ranks(_nothing_to_read, world_size)


def _reads_set(topology: Topology, arguments: list[str], folder: Path) -> None:
    """A real set with two bad images: counts and features, both in terms of samples."""
    import numpy as np

    from vitscale.data.manifest import read_manifest
    from vitscale.distributed import connect
    from vitscale.evaluation.accuracy import evaluate_accuracy, evaluation_batches
    from vitscale.evaluation.features import extract_features

    config, manifest = load_config(CONFIG, arguments), read_manifest(folder)
    good = [n for n in range(23) if n not in (4, 22)]
    with connect(topology, timeout_s=60) as ranks:
        for batch_size in (3, 64):

            def batches(batch_size: int = batch_size) -> Iterator[Batch]:
                return evaluation_batches(manifest, config.data, num_classes=10, batch_size=batch_size, ranks=ranks)

            # The mean of an image tells images apart; the labels follow from the number.
            features = extract_features(lambda images: images.float().mean(dim=(2, 3)), batches(), ranks=ranks)
            assert features is not None
            if ranks.is_main:
                assert features.labels.tolist() == [n % 10 for n in good]
                assert features.values.shape == (21, 3)
                assert features.values.dtype == np.float32
                assert [text.partition(" (")[0] for text in features.unreadable] == [
                    f"train-000000.tar: {key_of(4)}",
                    f"train-000002.tar: {key_of(22)}",
                ]
                reference = folder / "features.npy"
                if not reference.exists():
                    np.save(reference, features.values)
                np.testing.assert_array_equal(features.values, np.load(reference))
            else:
                assert len(features.values) == len(features.labels) == 0

            accuracy = evaluate_accuracy(
                lambda images: torch.eye(10)[3].expand(len(images), -1), batches(), num_classes=10, ranks=ranks
            )
            assert accuracy is not None
            assert (accuracy.images, accuracy.correct, accuracy.unreadable) == (21, 2, 2)


def test_a_real_set_counts_the_same_and_in_the_same_order_on_any_number_of_ranks(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path / "set", [9, 1, 13])
    for number in (4, 22):
        spoil_image(manifest, number)
    arguments = overrides(tmp_path, tmp_path / "run")
    for world_size in (1, 2, 3):
        run_ranks(_reads_set, world_size, arguments, folder_of(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multi_label": True}, "images have several labels; accuracy and few-shot need one per image: name a single"),
        ({"classes": 11}, "has 11 classes, but the model's head has 10 outputs; evaluate on a set with the classes of"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path}: {message}"):
        open_evaluation_set(make_shardset(tmp_path, [2], **changes).location, num_classes=10)


def test_a_set_without_class_names_or_with_fewer_classes_is_taken(tmp_path: Path) -> None:
    names = [f"class {n}" for n in range(10)]
    for number, classes in enumerate((None, 3, 10)):
        manifest = make_shardset(tmp_path / str(number), [2], classes=classes)
        assert open_evaluation_set(manifest.location, num_classes=10) == manifest
        assert open_evaluation_set(manifest.location, num_classes=10, classes=names) == manifest
    # Without a head there is no number of classes to compare with.
    assert open_evaluation_set(make_shardset(tmp_path / "many", [2], classes=11).location).num_samples == 2


def test_a_set_with_files_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such shard set"):
        open_evaluation_set(str(tmp_path / "none"), num_classes=10)
    manifest = make_shardset(tmp_path / "torn", [2])
    (folder_of(manifest) / manifest.shards[0].name).unlink()
    with pytest.raises(DataError, match=r"train-000000.tar is missing"):
        open_evaluation_set(manifest.location, num_classes=10)


def test_labels_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path, [2], classes=3)
    # In the same number of classes, and where either side has more of them.
    for names in (["class 0", "class 2", "class 1"], ["class 0", "class 2"], ["class 0", "class 2", "x", "y"]):
        with pytest.raises(DataError) as caught:
            open_evaluation_set(str(tmp_path), num_classes=10, classes=names, of="the shots")
        assert str(caught.value).startswith(f"{tmp_path}: label 1 is 'class 1', but 'class 2' in the shots; write both")
    with pytest.raises(DataError, match="but 'x' in the training set"):
        open_evaluation_set(str(tmp_path), classes=["x"])
    assert open_evaluation_set(str(tmp_path), classes=None) == manifest


def _gives_up_features(topology: Topology) -> None:
    from vitscale.distributed import connect
    from vitscale.evaluation.features import extract_features

    with connect(topology, timeout_s=60) as ranks:
        asked: list[int] = []
        found = extract_features(
            lambda images: images.float().mean(dim=(2, 3)),
            batches_of(topology, 6, 8),
            ranks=ranks,
            is_stopping=lambda: asked.append(1) or len(asked) == 2,  # type: ignore[func-returns-value]
        )
        assert (found, len(asked)) == (None, 2)


def test_a_stop_gives_up_features() -> None:
    run_ranks(_gives_up_features, 2)


def test_too_many_unreadable_images_are_named_counted_and_refused() -> None:
    bad = tuple(f"train-000000.tar: {key_of(n)} (broken)" for n in range(5))
    for few in (bad[:1], bad[:2]):
        check_readable("set", 250, few)
    check_readable("set", 3, bad[:1])
    check_readable("set", 250, bad, at_most=5)
    for at_most, allowed in ((None, 2), (4, 4), (0, 0)):
        with pytest.raises(DataError) as caught:
            check_readable("set", 250, bad, at_most=at_most)
        assert str(caught.value) == (
            f"set: 5 of 250 images cannot be read, of which {allowed} are allowed: {'; '.join(bad[:3])}, and 2 "
            f"more; mend them, or allow them with --max-unreadable 5"
        )
        assert caught.value.agreed
