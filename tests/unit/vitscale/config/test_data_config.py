"""Where the data lies, as users write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.runs import CONFIG
from vitscale.config.loader import load_config
from vitscale.config.reference import dump_config
from vitscale.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data/train", "data/train"),
        ("s3://bucket/set", "s3://bucket/set"),
        ("{s3://bucket/set: 3, /b/c: 0.5}", {"s3://bucket/set": 3.0, "/b/c": 0.5}),
        ("{'pipe:ssh store cat /a/{name}': 1}", {"pipe:ssh store cat /a/{name}": 1.0}),
    ],
)
def test_sets_and_mixtures_survive_the_run_folder(text: str, expected: object, tmp_path: Path) -> None:
    config = load_config(CONFIG, [f"data.train={text}"])
    assert config.data.train == expected
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.train={}", "data.train"),
        ("data.train={a: 0}", "data.train"),
        ("data.train={a: .inf}", "data.train"),
        ("data.train=[a, b]", "data.train"),
        ("data.storage.cache_gb=0", "data.storage.cache_gb"),
        ("data.storage.total_timeout_s=600", "together must be below engine.timeout_s (600)"),
    ],
)
def test_wrong_places_are_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, [override])
    assert text in str(caught.value)


def test_lanes_are_for_a_single_set() -> None:
    with pytest.raises(ConfigError, match=r"lanes \(8\) is for a single set; leave it out with a mixture"):
        load_config(CONFIG, ["data.train={a: 1, b: 1}", "data.lanes=8"])
