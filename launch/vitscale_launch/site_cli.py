"""``vitscale launch site``: profiles of clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitscale_launch.hints import launch_command

app = typer.Typer(no_args_is_help=True, help="Write and try the profile of a cluster.")


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Name of the profile, or the path of the YAML file to write.")],
    partition: Annotated[str | None, typer.Option(help="Partition of the jobs; the default one if not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a profile from what SLURM reports on this cluster."""
    from vitscale_launch.site import user_sites
    from vitscale_launch.site_init import draft_site, write_draft

    is_path = "/" in name or name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else user_sites() / f"{name}.yaml"
    draft = draft_site(partition)
    write_draft(draft, path, force=force)
    typer.echo(f"{draft.text()}\n-> {path}\n   now: {launch_command('site', 'check', name)}")


@app.command()
def check(
    site: Annotated[str, typer.Argument(help="Profile: a name, or the path of a YAML file.")],
    folder: Annotated[Path, typer.Option(help="Where runs will lie; the nodes must be able to write there.")] = Path(),
    nodes: Annotated[int, typer.Option(help="Nodes of a job.", min=1)] = 1,
    wait: Annotated[int, typer.Option(help="Seconds for which a node is waited for; 0 looks at none.", min=0)] = 60,
) -> None:
    """Say what is missing for jobs on a site. Leaves with 1 if anything is."""
    from vitscale_launch.site import load_site
    from vitscale_launch.site_check import check_site

    complete = True
    for finding in check_site(load_site(site), folder, nodes=nodes, wait_s=wait or None):
        typer.echo(f"{finding.state:<8} {finding.what:<14} {finding.text}")
        complete &= finding.state != "missing"
    if not complete:
        raise typer.Exit(1)


@app.command()
def keys() -> None:
    """Print every key of a profile with its default and what it means, as YAML."""
    from vitscale.config.reference import reference_yaml
    from vitscale_launch.site import Site

    typer.echo(reference_yaml(Site), nl=False)
