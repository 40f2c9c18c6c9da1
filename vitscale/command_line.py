"""What the modules of commands share: ranks to work on, options that name a model, results on standard output.

Light: nothing here imports torch before a command runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscale.errors import ConfigError
from vitscale.weights.choices import ResizeMode

if TYPE_CHECKING:
    from vitscale.topology import Topology

Nproc = Annotated[int | None, typer.Option(help="Start this many ranks on this machine. Under torchrun or srun, omit.")]
ModelLocation = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Run folder, file of weights, or a Hugging Face folder.")
]
Step = Annotated[int | None, typer.Option(help="Checkpoint of a run to take; the newest by default.")]
ModelFile = Annotated[
    Path | None,
    typer.Option("--model", metavar="MODEL.yaml", help="Model of a file of weights, if it does not tell it."),
]
ImageSize = Annotated[
    str | None, typer.Option(metavar="PIXELS", help="384, or 384x512 (height x width); default: as the model.")
]
Resize = Annotated[
    ResizeMode | None, typer.Option(help="How embeddings of another size are resized; without it they are refused.")
]
BatchSize = Annotated[int, typer.Option(help="Images per forward pass on one rank.", min=1)]
MaxUnreadable = Annotated[
    int | None, typer.Option(help="Unreadable images of a set that are fine; default: one in a hundred.", min=0)
]
ReadingOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes of how data is read: data.storage.cache=null data.storage.allow_pipe=true data.workers=8 ..., "
        "also data.prefetch_batches and data.read_ahead_batches; default: as the run. Of a file of weights, any key "
        "of data."
    ),
]
ReadingSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="How images are read: data.workers=8, data.storage.cache=null ...; of a file of weights, also how they "
        "are cropped: data.eval_crop_share=1 ...; may be repeated.",
    ),
]


def on_ranks(
    nproc: int | None, work: Callable[[Topology], None], *, check: Callable[[], object] = lambda: None
) -> None:
    """Be the launcher of ``nproc`` ranks, or be one rank and do the work.

    The launcher calls ``check`` first, so that mistakes are told before any rank is started.
    """
    from vitscale.ranks import is_started_by_launcher, run_rank, start_ranks

    if nproc is not None and not is_started_by_launcher():
        check()
        raise typer.Exit(start_ranks(nproc, sys.argv[1:]))
    run_rank(work)


def echo_json(result: Mapping[str, object] | None) -> None:
    """Print a result on one line; ranks other than 0 have none."""
    import json

    if result is not None:
        typer.echo(json.dumps(result))


def parse_image_size(text: str | None) -> tuple[int, int] | None:
    """``"384"`` or ``"384x512"`` to height and width in pixels.

    Raises:
        ConfigError: it is neither.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text)
    if match is None:
        raise ConfigError(f"--image-size is {text!r}; pixels are needed, as 384 or as height x width in 384x512")
    return int(match[1]), int(match[2] or match[1])
