"""Which image goes where: the planner against a brute-force one of a few lines, and what users rely on."""

import hashlib
import tempfile
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from math import ceil, nextafter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.helpers.plans import ORDERS, SPEC, SPLIT, Listed, hash_of, hold, keys, members, named, plan, rows, shards
from vitscale.errors import DataError
from vitscale_shards.place import LocalPlace
from vitscale_shards.planning.plan import PLAN_NAME
from vitscale_shards.planning.planner import make_plans
from vitscale_shards.planning.settings import PlanSettings, parse_split, parse_subset
from vitscale_shards.rows import Row
from vitscale_shards.tar import sample_bytes

# The same once more, one row at a time, in plain Python. Plans must never change between versions.


def side_of(row: Row, options: PlanSettings, listed: dict[str, str]) -> str | None:
    shares = parse_split(options.split)
    sides = sorted({*shares, *(name for name, _ in options.lists)})
    end = Fraction(0)
    for name in sorted(shares):
        end += shares[name]
        if Fraction(hash_of(row.key), 1 << 64) < end:
            side = name
            break
    side = listed.get(row.path, listed.get(row.key, side))
    share = parse_subset(options.subset, sides).get(side, Fraction(1))
    return side if Fraction(hash_of(f"subset:{row.key}"), 1 << 64) < share else None


def stratified(members: list[Row], seed: int) -> list[Row]:
    sizes = Counter((row.labels or (-1,))[0] for row in members)
    seen: Counter[int] = Counter()
    places = {}
    for row in members:
        label = (row.labels or (-1,))[0]
        place = (seen[label] + hash_of(f"{seed}:class {label}") / (1 << 64)) / sizes[label]
        places[row.key] = int(min(place, nextafter(1, 0)) * (1 << 64)), row.key
        seen[label] += 1
    return sorted(members, key=lambda row: places[row.key])


def halves_swapped(row: Row, seed: int) -> tuple[int, int]:
    return divmod(hash_of(f"{seed}:{row.key}"), 1 << 32)[::-1]


def by_hand(listed: Listed, options: PlanSettings, lists: dict[str, str]) -> dict[str, list[list[Row]]]:
    plans = {}
    sides = {*parse_split(options.split), *lists.values()}
    for name in sides:
        ours = [row for row in listed.listed if side_of(row, options, lists) == name]
        shuffled = sorted(ours, key=lambda row: (hash_of(f"{options.seed}:{row.key}"), row.key))
        ordered = {"shuffled": shuffled, "stratified": stratified(shuffled, options.seed), "source": ours}[
            options.order
        ]
        by_bytes = options.bytes_per_shard is not None
        weights = [sample_bytes(row.num_bytes) if by_bytes else 1 for row in ordered]
        count = ceil(sum(weights) / (options.bytes_per_shard or options.samples_per_shard or 10_000))
        cut: dict[int, list[Row]] = {}
        passed = 0
        for row, weight in zip(ordered, weights, strict=True):
            passed += weight
            shard = next(k for k in range(count) if passed <= sum(weights) * (k + 1) // count)
            cut.setdefault(shard, []).append(row)
        plans[name] = [cut[shard] for shard in sorted(cut)]
        if options.order == "stratified":
            plans[name] = [sorted(part, key=lambda row: halves_swapped(row, options.seed)) for part in plans[name]]
    return plans


LABELS = {False: st.tuples(st.integers(0, 2)), True: st.lists(st.integers(0, 2), max_size=3, unique=True).map(tuple)}


@st.composite
def sources(draw: st.DrawFn) -> Listed:
    multi_label = draw(st.booleans())
    parts = st.tuples(
        st.from_regex("[A-Za-z0-9_-]{1,5}", fullmatch=True),
        LABELS[multi_label],
        st.text(max_size=3),
        st.integers(1, 3000),
    )
    listed = draw(st.lists(parts, min_size=1, max_size=60, unique_by=lambda part: part[0]))
    return Listed(
        [Row(key, labels, f"{key}/{path}", size) for key, labels, path, size in listed], multi_label=multi_label
    )


@settings(deadline=None, max_examples=50)
@given(
    sources(),
    st.sampled_from(["train=1", SPLIT, "c=1/3,a=1/3,b=1/3"]),
    st.sampled_from(["", "50%", "a=30%"]),
    st.one_of(
        st.builds(lambda n: {"samples_per_shard": n}, st.integers(1, 70)),
        st.builds(lambda n: {"bytes_per_shard": n}, st.integers(1, 70_000)),
    ),
    st.sampled_from(ORDERS),
    st.integers(),
    st.sampled_from([(1 << 16, 1_000_000), (1, 5), (7, 0)]),
)
def test_plans_are_what_one_makes_by_hand(
    source: Listed, split: str, subset: str, size: dict[str, Any], order: Any, seed: int, limits: tuple[int, int]
) -> None:
    if subset == "a=30%" and not split.startswith("c"):
        subset = ""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        hold(patch, rows_at_a_time=limits[0], rows_in_memory=limits[1])
        listed, lists = Path(folder, "list.txt"), {}
        listed.write_text(source.listed[0].key)
        lists[source.listed[0].key] = "listed"
        options = PlanSettings(
            split=split, subset=subset, order=order, seed=seed, lists=(("listed", str(listed)),), **size
        )
        right = by_hand(source, options, lists)
        try:
            plans = make_plans(source, SPEC, options, LocalPlace(Path(folder, "out")))
        except DataError as error:
            empty = str(error).split("'")[1]
            assert not right[empty]
            return
        assert {made.head.split: shards(made) for made in plans} == right


@pytest.mark.parametrize("size", [{"samples_per_shard": 13}, {"bytes_per_shard": 40_000}])
@pytest.mark.parametrize("order", ORDERS)
def test_larger_plans_are_what_one_makes_by_hand(tmp_path: Path, order: Any, size: dict[str, int]) -> None:
    options = PlanSettings(split=SPLIT, order=order, seed=3, subset="train=90%", **size)  # type: ignore[arg-type]
    plans = make_plans(Listed(rows(500)), SPEC, options, LocalPlace(tmp_path))
    assert {made.head.split: shards(made) for made in plans} == by_hand(Listed(rows(500)), options, {})


def test_the_plan_is_the_same_on_every_machine(tmp_path: Path) -> None:
    """Sides and orders must never change between versions, so they are spelled out here once more."""

    def fraction(text: str) -> float:
        return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64

    names = [f"k{i}" for i in range(100)]
    val = [key for key in names if fraction(key) >= 0.7]
    assert keys(plan(tmp_path / "a", rows(100), split=SPLIT, seed=5)["val"]) == sorted(
        val, key=lambda key: fraction(f"5:{key}")
    )
    assert keys(plan(tmp_path / "b", rows(10), split=SPLIT)["val"]) == ["k7", "k9", "k0"]


# What users rely on.


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 300), st.integers(1, 50), st.integers(), st.sampled_from(ORDERS))
def test_every_row_stands_in_one_place_and_shards_are_even(count: int, per_shard: int, seed: int, order: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = plan(Path(folder), rows(count), samples_per_shard=per_shard, seed=seed, order=order)["train"]
        assert sorted(members(made)) == sorted(rows(count))
        sizes = [len(shard) for shard in shards(made)]
        assert len(sizes) == made.num_shards == -(-count // per_shard)
        assert max(sizes) <= per_shard
        assert max(sizes) - min(sizes) <= 1
        assert [made.shard_size(shard) for shard in range(made.num_shards)] == sizes


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=60), st.integers(1, 300_000), st.sampled_from(ORDERS))
@example([10, 10, 99_000, 10, 10], 20_000, "shuffled")
def test_shards_are_about_even_by_bytes(sizes: list[int], per_shard: int, order: str) -> None:
    listed = [Row(f"k{i}", (0,), f"{i}", size) for i, size in enumerate(sizes)]
    with tempfile.TemporaryDirectory() as folder:
        made = plan(Path(folder), listed, bytes_per_shard=per_shard, order=order)["train"]
        assert sorted(members(made)) == sorted(listed)
        total, largest = sum(map(sample_bytes, sizes)), max(map(sample_bytes, sizes))
        wanted = ceil(total / per_shard)
        taken = [sum(sample_bytes(row.num_bytes) for row in shard) for shard in shards(made)]
        assert len(taken) <= wanted
        assert all(0 < size < total / wanted + 1 + largest for size in taken)
        if largest <= total / wanted:
            assert len(taken) == wanted


@settings(deadline=None, max_examples=15)
@given(st.integers(60, 200), st.integers(1, 100), st.integers(), st.randoms(use_true_random=False))
def test_a_sample_keeps_its_side(count: int, more: int, seed: int, random: Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        before = plan(Path(folder, "a"), rows(count), split=SPLIT)
        grown = rows(count + more)
        random.shuffle(grown)
        after = plan(Path(folder, "b"), grown, split="val=0.3,train=0.7", seed=seed, order="stratified")
        for name in ("train", "val"):
            assert set(keys(before[name])) <= set(keys(after[name]))
        assert sorted(keys(after["train"]) + keys(after["val"])) == sorted(row.key for row in grown)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 200), st.randoms(use_true_random=False), st.sampled_from(["shuffled", "stratified"]))
def test_the_order_of_the_rows_plays_no_part(count: int, random: Random, order: str) -> None:
    mixed = rows(count)
    random.shuffle(mixed)
    with tempfile.TemporaryDirectory() as folder:
        first = plan(Path(folder, "a"), rows(count), samples_per_shard=9, order=order)["train"]
        second = plan(Path(folder, "b"), mixed, samples_per_shard=9, order=order)["train"]
        assert first.head == second.head
        assert Path(folder, "a/train", PLAN_NAME).read_bytes() == Path(folder, "b/train", PLAN_NAME).read_bytes()


def test_shares_are_kept_and_the_seed_shuffles(tmp_path: Path) -> None:
    many = rows(10_000)
    first, second = (plan(tmp_path / str(seed), many, split=SPLIT, seed=seed) for seed in (0, 1))
    assert first["val"].num_samples / 10_000 == pytest.approx(0.3, abs=0.015)
    assert keys(first["train"]) != keys(second["train"])
    assert sorted(keys(first["train"])) == sorted(keys(second["train"]))
    assert {row.labels for row in first["train"].rows(0)} == {(0,), (1,), (2,)}


def test_a_share_too_small_for_any_image_is_told_not_a_failure(tmp_path: Path) -> None:
    """Its range of hashes would begin behind the last one."""
    tiny = Fraction(1, 1 << 70)
    with pytest.raises(DataError, match="split 'val' gets none of 50 images"):
        plan(tmp_path, rows(50), split=f"train={1 - tiny},val={tiny}")


def test_subsets_lie_in_larger_ones_and_leave_other_splits_alone(tmp_path: Path) -> None:
    many = rows(10_000)
    found = {
        subset: plan(tmp_path / str(i), many, split=SPLIT, subset=subset, seed=i)
        for i, subset in enumerate(["", "10%", "1%", "train=10%"])
    }
    for name in ("train", "val"):
        whole, tenth, hundredth = (set(keys(found[subset][name])) for subset in ("", "10%", "1%"))
        assert hundredth < tenth < whole
        assert len(tenth) / len(whole) == pytest.approx(0.1, abs=0.02)
        assert len(hundredth) / len(whole) == pytest.approx(0.01, abs=0.006)
    assert set(keys(found["train=10%"]["train"])) == set(keys(found["10%"]["train"]))
    assert set(keys(found["train=10%"]["val"])) == set(keys(found[""]["val"]))
    # A subset is no split in disguise: it takes its share of every stretch of the hashes of sides.
    sides = sorted(int(hash_of(key) / 0.7 / (1 << 64) * 4) for key in keys(found["10%"]["train"]))
    assert min(Counter(sides).values()) > 120


# Stratified.


@st.composite
def unbalanced(draw: st.DrawFn) -> Listed:
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=8))
    labels = [(label, *([0] if label and draw(st.booleans()) else [])) for label in range(len(sizes))]
    without = draw(st.integers(0, 20))
    listed = [
        Row(f"{label[0]}-{i}", label, "p", 9) for label, size in zip(labels, sizes, strict=True) for i in range(size)
    ]
    listed += [Row(f"none-{i}", (), "p", 9) for i in range(without)]
    return Listed(listed, classes=None, multi_label=True)


@settings(deadline=None, max_examples=25)
@given(unbalanced(), st.integers(1, 60), st.integers())
def test_every_class_is_spread_evenly_over_stratified_shards(source: Listed, per_shard: int, seed: int) -> None:
    """With C classes and N images, the count of a class of n images is off by less than 1 + n C / N.

    Of each class, the images stand evenly, so that those before any place are less than one off, and the places of two
    cuts are off by less than C / N together, C being the sum of these errors over all classes.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = plan(Path(folder), source, samples_per_shard=per_shard, seed=seed, order="stratified")["train"]
        sizes = Counter((row.labels or (-1,))[0] for row in source.listed)
        total = len(source.listed)
        for shard in shards(made):
            here = Counter((row.labels or (-1,))[0] for row in shard)
            for label, size in sizes.items():
                assert abs(here[label] - size * len(shard) / total) < 1 + size * len(sizes) / total + 1e-9


def test_balanced_classes_are_less_than_two_off(tmp_path: Path) -> None:
    listed = [Row(f"k{i}", (i % 100,), "p", 9) for i in range(10_000)]
    source = Listed(listed, classes=tuple(map(str, range(100))))
    for order, right in (("stratified", True), ("shuffled", False)):
        made = plan(tmp_path / order, source, samples_per_shard=500, order=order)["train"]
        off = [
            abs(Counter(row.labels[0] for row in shard)[label] - 5) for shard in shards(made) for label in range(100)
        ]
        assert (max(off) < 2) is right


def test_stratified_shards_are_shuffled_within(tmp_path: Path) -> None:
    """Although the hashes of a class's images in a shard are close to each other, and the closer the more shards."""
    made = plan(tmp_path, rows(3000), samples_per_shard=30, order="stratified")["train"]
    changes = first_half = 0
    for shard in shards(made):
        labels = [row.labels[0] for row in shard]
        changes += sum(first != second for first, second in pairwise(labels))
        first_half += labels[:15].count(labels[0])
    # By chance, 20 of 29 neighbours differ; among the first 15 are one and 9 of the other 29, times 14.
    assert changes / made.num_shards == pytest.approx(20, abs=1)
    assert first_half / made.num_shards == pytest.approx(1 + 14 * 9 / 29, abs=0.6)


# Lists.


def test_images_are_listed_for_a_split_by_key_or_path(tmp_path: Path) -> None:
    test, val = named(tmp_path, "test", "k3", "c/4.jpg"), named(tmp_path, "val", "c/5.jpg")
    without = plan(tmp_path / "without", rows(40), split=SPLIT)
    plans = plan(tmp_path / "out", rows(40), split=SPLIT, lists=(("test", test), ("val", val)))
    assert set(keys(plans["test"])) == {"k3", "k4"}
    assert set(keys(plans["val"])) == {*keys(without["val"]), "k5"} - {"k3", "k4"}
    assert set(keys(plans["train"])) == set(keys(without["train"])) - {"k3", "k4", "k5"}
    assert plans["val"].head.splits == ("test", "train", "val")


def test_listed_images_are_left_out(tmp_path: Path) -> None:
    exclude = (named(tmp_path, "a", "k3", "c/4.jpg"), named(tmp_path, "b", "k3", "c/3.jpg", "k0"))
    made = plan(tmp_path / "out", rows(9), exclude=exclude)["train"]
    assert set(keys(made)) == {"k1", "k2", "k5", "k6", "k7", "k8"}


@pytest.mark.parametrize("listed", ["k3", "c/3.jpg"])
@pytest.mark.parametrize("excluded", ["k3", "c/3.jpg"])
def test_what_is_to_be_left_out_is_in_no_listed_split(tmp_path: Path, listed: str, excluded: str) -> None:
    val, bad = named(tmp_path, "val", listed, "k4"), named(tmp_path, "bad", excluded)
    plans = plan(tmp_path / "out", rows(9), lists=(("val", val),), exclude=(bad,))
    assert keys(plans["val"]) == ["k4"]
    assert "k3" not in keys(plans["train"])


@pytest.mark.parametrize("second", ["k3", "c/3.jpg"])
@pytest.mark.parametrize("first", ["k3", "c/3.jpg"])
def test_an_image_listed_for_two_splits_is_told(tmp_path: Path, first: str, second: str) -> None:
    lists = (("val", named(tmp_path, "a", first)), ("test", named(tmp_path, "b", second)))
    with pytest.raises(DataError, match=r"is on the lists of the splits '(val|test)' and '(val|test)'"):
        plan(tmp_path / "out", rows(9), lists=lists)


@pytest.mark.parametrize("option", ["lists", "exclude"])
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["k3", "k99", "c/98.jpg"], "2 lines are neither key nor path of an image of the source, such as 'c/98.jpg'"),
        (None, "cannot be read as a list of keys or paths"),
    ],
)
def test_lists_that_do_not_fit_are_told(tmp_path: Path, option: str, lines: list[str] | None, message: str) -> None:
    file = str(tmp_path / "missing") if lines is None else named(tmp_path, "list", *lines)
    values: dict[str, Any] = {"exclude": (file,)} if option == "exclude" else {"lists": (("val", file),)}
    with pytest.raises(DataError, match=message) as caught:
        plan(tmp_path / "out", rows(9), **values)
    assert str(caught.value).startswith(file)
    assert not list((tmp_path / "out").iterdir())


def test_a_list_for_a_split_is_not_empty_and_one_of_what_to_leave_out_may_be(tmp_path: Path) -> None:
    """De-duplication may find nothing."""
    file = named(tmp_path, "list")
    with pytest.raises(DataError, match="list: holds no keys or paths; one per line is needed"):
        plan(tmp_path / "out", rows(9), lists=(("val", file),))
    assert plan(tmp_path / "out", rows(9), exclude=(file,))["train"].num_samples == 9


# Equal keys.


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("limits", [(1 << 16, 1_000_000), (4, 10)], ids=["in memory", "spilled"])
def test_two_rows_with_one_key_are_refused(
    tmp_path: Path, order: str, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, rows_at_a_time=limits[0], rows_in_memory=limits[1])
    listed = [*rows(100), Row("k3", (0,), "other/3.png")]
    with pytest.raises(DataError, match=r"c/3\.jpg and other/3\.png both get the key 'k3'") as caught:
        plan(tmp_path, listed, order=order, split=SPLIT)
    assert "rename one of them" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_image_twice_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    for place in (0, 50, 99):
        with pytest.raises(DataError, match=f"c/{place}.jpg and c/{place}.jpg both get the key 'k{place}'"):
            plan(tmp_path, [*rows(100), rows(100)[place]])


def test_one_of_two_with_the_same_key_may_be_excluded(tmp_path: Path) -> None:
    other = Row("k3", (0,), "other/3.png", 7)
    made = plan(tmp_path / "out", [*rows(9), other], exclude=(named(tmp_path, "bad", "other/3.png"),))["train"]
    assert sorted(members(made)) == sorted(rows(9))
