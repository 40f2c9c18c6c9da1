"""``vitscale export``: a model for programs that know nothing of vitscale."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscale.checkpoint.choices import Weights
from vitscale.checkpoint_cli import WeightsOption
from vitscale.command_line import ModelFile, ModelLocation, Step, echo_json, on_ranks
from vitscale.evaluation.choices import ModelChoice

if TYPE_CHECKING:
    from vitscale.topology import Topology


def export(
    model: ModelLocation,
    out: Annotated[Path, typer.Argument(metavar="OUT.pt2", help="File to write.")],
    step: Step = None,
    weights: WeightsOption = Weights.RAW,
    model_file: ModelFile = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a model as a program of torch.export, which runs without vitscale: uint8 pixels to logits.

    Weights alone are written by 'vitscale checkpoint export' and 'vitscale weights convert'.
    """

    def work(topology: Topology) -> None:
        from vitscale.evaluation.one_process import one_process
        from vitscale.evaluation.pretrained import open_pretrained
        from vitscale.evaluation.program import export_program

        with one_process(topology, "export") as ranks:
            pretrained = open_pretrained(ModelChoice(model, step, weights, model_file), ranks)
            description = export_program(pretrained, out, force=force)
        echo_json({**description, "file": str(out)})

    on_ranks(None, work)
