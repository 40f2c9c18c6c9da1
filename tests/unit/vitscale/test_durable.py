"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitscale.durable import publish_text, published, sync_folder


def test_text_replaces_text(tmp_path: Path) -> None:
    publish_text(tmp_path / "a", "long text\n")
    publish_text(tmp_path / "a", "short\n")
    sync_folder(tmp_path)
    assert (tmp_path / "a").read_text() == "short\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_leaves_the_former_file_and_nothing_else(tmp_path: Path) -> None:
    publish_text(tmp_path / "a", "before")

    def write_half() -> None:
        with published(tmp_path / "a") as file:
            file.write(b"half of")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_name_is_not_taken_before_the_end(tmp_path: Path) -> None:
    with published(tmp_path / "a") as file:
        file.write(b"text")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"text"
