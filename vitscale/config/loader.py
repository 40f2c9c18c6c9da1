"""Loads a configuration: YAML plus ``key.path=value`` overrides become frozen sections, or one ConfigError.

The error holds every mistake at once, one line each: ``file:line: key.path: problem``. Own design.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from vitscale.config.document import Document
from vitscale.config.explanation import explain
from vitscale.config.schema import TrainConfig
from vitscale.errors import ConfigError

T = TypeVar("T")
MAX_FILE_BYTES = 200_000


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load a training configuration. ``overrides`` are ``key.path=value``; of two for one key the later wins.

    Raises:
        ConfigError: with every mistake in the file and in the overrides.
    """
    return load_section(TrainConfig, path, overrides)


def load_section(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Load any class made by :func:`vitscale.config.section.section`, as :func:`load_config` does."""
    return parse_section(cls, _read_text(path), str(path), overrides)


def parse_section(cls: type[T], text: str, source: str, overrides: Sequence[str] = ()) -> T:
    """Like :func:`load_section`, on text in memory; ``source`` stands for the file name in messages."""
    document = Document(text, source, overrides)
    try:
        config = TypeAdapter(cls).validate_json(json.dumps(document.data))
    except ValidationError as error:
        explain(cls, document, error.errors(include_url=False))
    if document.problems:
        raise ConfigError("\n".join(text for _, text in sorted(document.problems, key=lambda problem: problem[0])))
    return config


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (searched from {Path.cwd()}); check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name the YAML file in it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check the file") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes, so no configuration; check the path")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
