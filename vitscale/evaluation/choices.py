"""What may be asked of an evaluation. No torch here: commands are made of these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitscale.checkpoint.choices import Weights
from vitscale.errors import ConfigError
from vitscale.weights.choices import ResizeMode

# Of the older protocol (Scenic, uncertainty-baselines): every other one of 2^-10 ... 2^19.
RIDGE_GRID = tuple(2.0**power for power in range(-10, 20, 2))


@dataclass(frozen=True)
class ModelChoice:
    """A model to be judged, see :func:`vitscale.evaluation.pretrained.open_pretrained`."""

    location: Path
    """A run folder, a file of weights, or a Hugging Face folder."""
    step: int | None = None
    """Checkpoint of a run; None is the newest."""
    weights: Weights = Weights.RAW
    """Of a run, the plain ones or their average."""
    model: Path | None = None
    """Of a file, a YAML file with the keys of a configuration's model section, where the file does not tell."""
    overrides: tuple[str, ...] = ()
    """``data.key=value``: of a run only how the bytes are read."""
    image_hw: tuple[int, int] | None = None
    """Height and width in pixels, instead of the model's."""
    resize: ResizeMode | None = None
    """How position and patch embeddings of another size are resized; None refuses that."""


@dataclass(frozen=True)
class Reading:
    """How a set is gone through."""

    batch_size: int = 64
    """Images per forward pass on one rank."""
    max_unreadable: int | None = None
    """Images that may be unreadable; None is one in a hundred, or one."""


@dataclass(frozen=True)
class CacheChoice:
    """Where features are kept."""

    folder: Path | None = None
    """None is the folder ``features`` of the run; those of a file of weights are then not kept."""
    enabled: bool = True

    def folder_of(self, model: ModelChoice, *, is_run: bool) -> Path | None:
        """The folder for a model, or ``None`` to keep nothing."""
        if not self.enabled:
            return None
        return self.folder or (model.location / "features" if is_run else None)


def parse_counts(text: str, option: str, example: str) -> tuple[int, ...]:
    """``"1,5,10"`` to ``(1, 5, 10)``.

    Raises:
        ConfigError: not a list of positive whole numbers.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(
            f"{option} is {text!r}; positive whole numbers separated by commas are needed, as in {example}"
        )
    return tuple(int(word) for word in words)


def parse_numbers(text: str, option: str, example: str, *, zero: bool = False) -> tuple[float, ...]:
    """``"0.1,3e-2"`` to ``(0.1, 0.03)``.

    Raises:
        ConfigError: not a list of positive numbers, or with ``zero`` of numbers that are not negative.
    """
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all((number > 0 or (zero and number == 0)) and number < float("inf") for number in numbers):
        kind = "numbers from 0 on" if zero else "positive numbers"
        raise ConfigError(f"{option} is {text!r}; {kind} separated by commas are needed, as in {example}")
    return numbers


def parse_ridge(text: str) -> tuple[float, ...]:
    """Penalties of ridge regression: numbers, or ``grid``.

    Raises:
        ConfigError: neither.
    """
    return (
        RIDGE_GRID if text == "grid" else parse_numbers(text, "--ridge", "1024 or in 0.1,10,1000 (or grid)", zero=True)
    )
