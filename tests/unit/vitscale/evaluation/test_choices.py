"""What options may say, as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitscale.command_line import parse_image_size
from vitscale.errors import ConfigError
from vitscale.evaluation.choices import CacheChoice, ModelChoice, parse_counts, parse_numbers, parse_ridge


def test_counts() -> None:
    assert parse_counts("5", "--shots", "1,5") == (5,)
    assert parse_counts("1, 5,10", "--shots", "1,5") == (1, 5, 10)
    for text in ("", "0", "-1", "1,,2", "1.5", "one", "1;2"):
        with pytest.raises(ConfigError, match=r"--k is .*; positive whole numbers separated by commas are needed"):
            parse_counts(text, "--k", "10,20")


def test_numbers() -> None:
    assert parse_numbers("0.1,3e-2, 1", "--lr", "0.1") == (0.1, 0.03, 1.0)
    assert parse_numbers("0,1", "--ridge", "1", zero=True) == (0.0, 1.0)
    for text in ("", "0", "-1", "1,,2", "nan", "inf", "one"):
        with pytest.raises(
            ConfigError, match=r"--lr is .*; positive numbers separated by commas are needed, as in 0.1"
        ):
            parse_numbers(text, "--lr", "0.1")


def test_ridge() -> None:
    assert parse_ridge("1024") == (1024.0,)
    assert parse_ridge("grid") == tuple(2.0**power for power in range(-10, 19, 2))
    with pytest.raises(ConfigError, match="--ridge is 'gird'"):
        parse_ridge("gird")


def test_image_size() -> None:
    assert parse_image_size(None) is None
    assert parse_image_size("384") == (384, 384)
    assert parse_image_size("384x512") == (384, 512)
    for text in ("", "0", "384x", "x384", "384x0", "-1", "384 x 512", "3.5"):
        with pytest.raises(ConfigError, match=r"--image-size is .*; pixels are needed, as 384 or as height x width"):
            parse_image_size(text)


def test_features_are_kept_beside_a_run_or_where_it_is_said() -> None:
    run = ModelChoice(Path("/runs/a"))
    assert CacheChoice().folder_of(run, is_run=True) == Path("/runs/a/features")
    assert CacheChoice().folder_of(run, is_run=False) is None
    assert CacheChoice(Path("/c")).folder_of(run, is_run=False) == Path("/c")
    assert CacheChoice(Path("/c"), enabled=False).folder_of(run, is_run=True) is None
