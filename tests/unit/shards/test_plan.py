"""The plan is pure: properties over arbitrary rows and settings."""

import hashlib
from fractions import Fraction
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.errors import DataError
from vitscale_shards.plan import SplitPlan, make_plan, parse_split
from vitscale_shards.sources import Row

SPLIT = "train=0.7,val=0.3"


def rows(count: int, start: int = 0) -> list[Row]:
    return [Row(f"k{i}", i % 3, f"c/{i}.jpg") for i in range(start, start + count)]


def plan(members: list[Row], split: str = "train=1", per_shard: int = 7, seed: int = 0) -> dict[str, SplitPlan]:
    plans = make_plan(members, source="s", classes=["a", "b", "c"], split=split, samples_per_shard=per_shard, seed=seed)
    return {p.split: p for p in plans}


def keys(split: SplitPlan) -> list[str]:
    return [row.key for shard in split.shards for row in shard.rows]


@given(st.integers(1, 300), st.integers(1, 50), st.integers())
def test_every_row_stands_in_one_place_and_shards_are_even(count: int, per_shard: int, seed: int) -> None:
    shards = plan(rows(count), per_shard=per_shard, seed=seed)["train"].shards
    assert sorted(row for shard in shards for row in shard.rows) == sorted(rows(count))
    sizes = [len(shard.rows) for shard in shards]
    assert len(sizes) == -(-count // per_shard)
    assert max(sizes) <= per_shard
    assert max(sizes) - min(sizes) <= 1
    assert [shard.name for shard in shards] == [f"train-{i:06d}.tar" for i in range(len(shards))]


@given(st.integers(60, 200), st.integers(1, 100), st.integers(), st.randoms(use_true_random=False))
def test_a_sample_keeps_its_side(count: int, more: int, seed: int, random: Random) -> None:
    before = plan(rows(count), SPLIT)
    grown = rows(count + more)
    random.shuffle(grown)
    after = plan(grown, "val=0.3,train=0.7", seed=seed)
    for name in ("train", "val"):
        assert set(keys(before[name])) <= set(keys(after[name]))
    assert sorted(keys(after["train"]) + keys(after["val"])) == sorted(row.key for row in grown)


@given(st.integers(2, 200), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_plays_no_part(count: int, random: Random) -> None:
    mixed = rows(count)
    random.shuffle(mixed)
    assert plan(mixed) == plan(rows(count))
    assert plan(mixed)["train"].digest == plan(rows(count))["train"].digest


def test_shares_are_kept_and_the_seed_shuffles() -> None:
    many = rows(20_000)
    assert plan(many, SPLIT)["val"].num_samples / 20_000 == pytest.approx(0.3, abs=0.01)
    first, second = (keys(plan(many, seed=seed)["train"]) for seed in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    labels = [row.label for row in plan(many)["train"].shards[0].rows]
    assert set(labels) == {0, 1, 2}


@pytest.mark.parametrize("change", [{"key": "other"}, {"label": 2}, {"path": "other"}])
def test_the_digest_tells_rows_apart(change: dict[str, Any]) -> None:
    members = rows(20)
    members[3] = members[3]._replace(**change)
    assert plan(members)["train"].digest != plan(rows(20))["train"].digest


@pytest.mark.parametrize("change", [{"per_shard": 5}, {"seed": 1}])
def test_the_digest_tells_settings_apart(change: dict[str, Any]) -> None:
    assert plan(rows(20), **change)["train"].digest != plan(rows(20))["train"].digest


def test_the_plan_is_the_same_on_every_machine() -> None:
    """Sides and orders must never change between versions, so they are spelled out here once more."""

    def fraction(text: str) -> float:
        return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64

    names = [f"k{i}" for i in range(100)]
    val = [key for key in names if fraction(key) >= 0.7]
    assert keys(plan(rows(100), SPLIT, seed=5)["val"]) == sorted(val, key=lambda key: fraction(f"5:{key}"))
    assert keys(plan(rows(10), SPLIT)["val"]) == ["k7", "k9", "k0"]


def test_two_rows_with_one_key_are_refused() -> None:
    with pytest.raises(DataError, match=r"c/3\.jpg and other/3\.png both get the key 'k3'") as caught:
        plan([*rows(9), Row("k3", 0, "other/3.png")])
    assert "rename" in str(caught.value)


def test_a_split_without_images_is_refused() -> None:
    with pytest.raises(DataError, match="split 'val' gets none of 3 images"):
        plan(rows(3), "train=0.999999,val=0.000001")


def test_an_empty_shard_size_is_refused() -> None:
    with pytest.raises(DataError, match="samples per shard: 0"):
        plan(rows(3), per_shard=0)


def test_shares_are_exact() -> None:
    assert parse_split("a=0.1, b=0.2,c=0.7") == {
        "a": Fraction(1, 10),
        "b": Fraction(1, 5),
        "c": Fraction(7, 10),
    }
    assert parse_split("a=1/3,b=2/3") == {"a": Fraction(1, 3), "b": Fraction(2, 3)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train=0.8,val=0.1", "sum to 0.9; they must sum to exactly 1"),
        ("train=0.8,train=0.2", "stands twice"),
        ("train=1,val=0", "must be above 0"),
        ("train=2,val=-1", "must be above 0"),
        ("train", "share '' of train"),
        ("train=most", "share 'most'"),
        ("train=1/0", "share '1/0'"),
        ("train=nan", "share 'nan'"),
        ("../up=1", "'../up' is no name"),
        (".hidden=1", "is no name"),
        ("", "'' is no name"),
    ],
)
def test_wrong_splits_are_told(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_split(text)
