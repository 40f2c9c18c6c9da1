"""``vitscale export``: a model for programs that know nothing of vitscale."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitscale.checkpoint.choices import Weights
from vitscale.checkpoint_cli import WeightsOption
from vitscale.topology import Topology


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Run folder, or file of weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.pt2", help="File to write.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint of a run; the newest by default.")] = None,
    weights: WeightsOption = Weights.RAW,
    model_file: Annotated[
        Path | None,
        typer.Option("--model", metavar="MODEL.yaml", help="Keys of the model section, for a file that does not tell."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a model as a program of torch.export, which runs without vitscale: uint8 pixels to logits.

    Weights alone are written by 'vitscale checkpoint export' and 'vitscale weights convert'.
    """
    import json

    from vitscale.distributed import connect
    from vitscale.evaluation.pretrained import open_pretrained
    from vitscale.evaluation.program import export_program

    with connect(Topology(), timeout_s=600) as ranks:
        pretrained = open_pretrained(model, ranks, step=step, weights=weights, model=model_file)
        description = export_program(pretrained, out, force=force)
    typer.echo(json.dumps({**description, "file": str(out)}))
