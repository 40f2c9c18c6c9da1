"""``vitscale launch``: what a run needs from a cluster, checked before anything is queued."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitscale_launch import health_cli, site_cli, status_cli, submit_cli

app = typer.Typer(no_args_is_help=True, help="Prepare and check runs for a cluster.")


@app.callback()
def _group() -> None:
    """Keep this a group of commands."""


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changed values: optim.lr=3e-4 ...")] = None,
    nodes: Annotated[int, typer.Option(help="Nodes of the job.", min=1)] = 1,
    ranks_per_node: Annotated[int, typer.Option(help="Ranks on each node, one per GPU.", min=1)] = 1,
) -> None:
    """Show what a run would do on that many ranks, or why it cannot start. Needs no GPU and no torch."""
    from vitscale_launch.preflight import check_run

    for name, value in check_run(config, overrides or [], world_size=nodes * ranks_per_node):
        typer.echo(f"{name:<12} {value}")


submit_cli.register(app)
health_cli.register(app)
status_cli.register(app)
app.add_typer(site_cli.app, name="site")
