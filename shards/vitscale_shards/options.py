"""The options that ``vitscale shards plan`` and ``write`` share: of the source, and of the plan."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from vitscale.errors import DataError

if TYPE_CHECKING:
    from vitscale_shards.planning.settings import PlanSettings
    from vitscale_shards.sources import SourceSpec

QUALITY = 95
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class SourceOptions:
    """How a source is to be understood."""

    classes: Annotated[Path | None, typer.Option(help="File with class names in the order of their labels.")] = None
    labels: Annotated[
        Path | None, typer.Option(help="Ground truth of ImageNet's validation tar: its devkit, or a text file.")
    ] = None
    root: Annotated[
        Path | None, typer.Option(help="Folder that a table's paths start at.  [default: the table's own]")
    ] = None
    path_column: Annotated[str | None, typer.Option(help="Column of a table with the paths, or the images.")] = None
    label_column: Annotated[str | None, typer.Option(help="Column of a table with the labels.")] = None
    prefix_keys: Annotated[
        bool, typer.Option("--prefix-keys", help="Put the source's or tar's name in front of the keys.")
    ] = False
    source_class: Annotated[str | None, typer.Option(help="MODULE:CLASS of a source of your own.")] = None

    def spec(self, locations: list[str]) -> SourceSpec:
        """The source that is meant."""
        from vitscale_shards.sources import SourceSpec

        return SourceSpec(
            locations=tuple(locations),
            classes=_text(self.classes),
            labels=_text(self.labels),
            root=_text(self.root),
            path_column=self.path_column,
            label_column=self.label_column,
            prefix_keys=self.prefix_keys,
            source_class=self.source_class,
        ).absolute()


@dataclass(frozen=True)
class PlanOptions:
    """Which image goes where, and how."""

    split: Annotated[str, typer.Option(help="Shares of the images: train=0.8,val=0.2.")] = "train=1"
    split_list: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: images whose keys or paths are in FILE go to split NAME.")
    ] = None
    subset: Annotated[
        str, typer.Option(help="Share to keep: 10%, or train=10%. Smaller subsets lie within larger ones.")
    ] = ""
    exclude: Annotated[list[Path] | None, typer.Option(help="File with the keys or paths of images to leave out.")] = (
        None
    )
    samples_per_shard: Annotated[int | None, typer.Option(min=1, help="Most samples in a tar.  [default: 10000]")] = (
        None
    )
    bytes_per_shard: Annotated[
        str, typer.Option(help="About how large a tar is to be, such as 1GB; instead of a number of samples.")
    ] = ""
    order: Annotated[
        Literal["shuffled", "stratified", "source"],
        typer.Option(help="Stratified: every class is spread evenly, too. Source: as it is listed, not shuffled."),
    ] = "shuffled"
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0
    check: Annotated[
        Literal["header", "decode"], typer.Option(help="How far to look into every image before it is written.")
    ] = "header"
    resize_short: Annotated[
        int | None, typer.Option(min=1, help="Shrink larger images to this shorter side, in pixels, as JPEG.")
    ] = None
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of the JPEGs of --resize-short.")] = QUALITY

    def settings(self) -> PlanSettings:
        """The plan's settings.

        Raises:
            DataError: an option does not say what it should.
        """
        from vitscale_shards.images import Treatment
        from vitscale_shards.planning.settings import PlanSettings

        if self.resize_short is None and self.quality != QUALITY:
            raise DataError(f"quality {self.quality}: images are copied as they are; give --resize-short PX too")
        return PlanSettings(
            split=self.split,
            lists=tuple(_named_list(text) for text in self.split_list or ()),
            subset=self.subset,
            exclude=tuple(str(path) for path in self.exclude or ()),
            samples_per_shard=self.samples_per_shard,
            bytes_per_shard=_bytes(self.bytes_per_shard) if self.bytes_per_shard else None,
            order=self.order,
            seed=self.seed,
            treatment=Treatment(self.check, self.resize_short, self.quality),
        )


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command whose parameters include dataclasses of options one parameter for each of their fields.

    Typer reads a command's options from its signature, and would otherwise need them written out in each command.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters, groups = [], {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if kind not in (SourceOptions, PlanOptions):
            parameters.append(parameter.replace(annotation=kind))
            continue
        groups[parameter.name] = kind
        kinds = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            assert field.default is not MISSING
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name]
                )
            )

    @functools.wraps(command)
    def run(**values: Any) -> None:
        made = {
            name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        command(**values, **made)

    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _named_list(text: str) -> tuple[str, str]:
    from vitscale_shards.planning.settings import SPLIT_NAME

    name, _, file = text.partition("=")
    if not SPLIT_NAME.fullmatch(name) or not file:
        raise DataError(f"split list {text!r}: write NAME=FILE, such as val=val_keys.txt")
    return name, file


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise DataError(f"bytes per shard: {text!r}; write a number of bytes, such as 500000000, 500MB, 1GB or 1GiB")
    return round(float(match[1]) * _UNITS[match[2].upper()])
