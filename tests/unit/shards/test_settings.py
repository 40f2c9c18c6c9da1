"""Splits, subsets and lists as users write them, and what is told of those that make no sense."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.errors import DataError
from vitscale_shards.images import Treatment
from vitscale_shards.planning.settings import (
    HASH_RANGE,
    PlanSettings,
    parse_split,
    parse_subset,
    read_list,
    upper_limits,
)

TENTH, FIFTH = Fraction(1, 10), Fraction(1, 5)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("a=0.1, b=0.2,c=0.7", {"a": TENTH, "b": FIFTH, "c": Fraction(7, 10)}),
        ("a=1/3,b=2/3", {"a": Fraction(1, 3), "b": Fraction(2, 3)}),
        ("a=10%,b=20%,c=70%", {"a": TENTH, "b": FIFTH, "c": Fraction(7, 10)}),
        ("a=12.5 % , b=0.875", {"a": Fraction(1, 8), "b": Fraction(7, 8)}),
        ("train=1", {"train": Fraction(1)}),
    ],
)
def test_shares_are_exact(text: str, shares: dict[str, Fraction]) -> None:
    assert parse_split(text) == shares


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train=0.8,val=0.1", "sum to 0.9; they must sum to exactly 1"),
        ("train=0.8,train=0.2", "'train' is no name or stands twice"),
        ("train=1,val=0", "share 0 of val; a share must be above 0: leave val out"),
        ("train=2,val=-1", "must be above 0"),
        ("train", "share '' of train; write a number such as 0.8, 4/5 or 80%"),
        ("train=most", "share 'most'"),
        ("train=%", "share '%'"),
        ("train=1/0", "share '1/0'"),
        ("train=nan", "share 'nan'"),
        ("../up=1", "'../up' is no name"),
        (".hidden=1", "is no name"),
        ("a/b=1", "is no name"),
        (f"{'x' * 65}=1", "is no name"),
        ("", "'' is no name"),
    ],
)
def test_wrong_splits_are_told(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_split(text)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("", {}),
        ("10%", {"train": TENTH, "val": TENTH}),
        ("0.1", {"train": TENTH, "val": TENTH}),
        ("train=1/10", {"train": TENTH}),
        ("val=20%,train=10%", {"train": TENTH, "val": FIFTH}),
        ("100%", {"train": Fraction(1), "val": Fraction(1)}),
    ],
)
def test_subsets_are_of_all_splits_or_of_those_named(text: str, shares: dict[str, Fraction]) -> None:
    assert parse_subset(text, ["train", "val"]) == shares


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test=0.1", "no split is called 'test'; there are train, val"),
        ("110%", "share 1.1 of train; at most 1"),
        ("train=10", "share 10 of train; at most 1"),
        ("0", "must be above 0"),
        ("ten", "share 'ten'"),
        ("train=0.1,train=0.2", "stands twice"),
    ],
)
def test_wrong_subsets_are_told(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_subset(text, ["train", "val"])


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 1 << 70), min_size=1))
def test_the_ranges_of_the_splits_fill_all_hashes(weights: dict[str, int]) -> None:
    shares = {name: Fraction(weight, sum(weights.values())) for name, weight in weights.items()}
    limits = upper_limits(shares)
    assert limits[-1] == HASH_RANGE
    for name, start, end in zip(sorted(shares), [0, *limits], limits, strict=False):
        assert abs((end - start) - shares[name] * HASH_RANGE) <= 1
    assert upper_limits(dict(reversed(shares.items()))) == limits


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples_per_shard": 0}, "samples per shard: 0; at least 1 is needed"),
        ({"bytes_per_shard": -5}, "bytes per shard: -5; at least 1 is needed"),
        ({"samples_per_shard": 5, "bytes_per_shard": 5}, "both are given; give one of them"),
        ({"order": "sorted"}, "order: 'sorted'; shuffled, stratified, source are allowed"),
        ({"lists": (("../up", "a.txt"),)}, "list a.txt of split '../up'"),
        ({"lists": (("a/b", "a.txt"),)}, "list a.txt of split 'a/b'"),
    ],
)
def test_settings_that_make_no_sense_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        PlanSettings(**values)


def test_settings_are_written_as_they_are_read() -> None:
    settings = PlanSettings(
        lists=(("val", "val.txt"),), exclude=("bad.txt",), subset="10%", treatment=Treatment(resize_short=256)
    )
    content = settings.to_json()
    assert content["lists"] == [["val", "val.txt"]]
    assert content["exclude"] == ["bad.txt"]
    assert Treatment(**content["treatment"]) == settings.treatment


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\nb\n\n  \nc", ["a", "b", "c"]),
        (b"a\r\nb c\r\n", ["a", "b c"]),
        (b"\xef\xbb\xbfa\nb\n", ["a", "b"]),
        ("\u00e9\u2028x\ny\x0cz\n".encode(), ["\u00e9\u2028x", "y\x0cz"]),
    ],
    ids=["empty lines", "windows", "byte order mark", "odd characters"],
)
def test_lists_have_one_name_per_line(tmp_path: Path, content: bytes, lines: list[str]) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    assert read_list(tmp_path / "list.txt", "keys") == lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as a list of keys .*No such file"),
        (b"", "holds no keys; one per line is needed"),
        (b"\n \n", "holds no keys"),
        (b"\xff\xfea\n", "cannot be read as a list of keys .*utf-8"),
    ],
    ids=["missing", "empty", "blank", "binary"],
)
def test_files_that_are_no_lists_are_told(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_list(tmp_path / "list.txt", "keys")
    assert str(caught.value).startswith(str(tmp_path / "list.txt"))
