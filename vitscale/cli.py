"""The ``vitscale`` command. Sub-commands of sibling packages join it through the entry points "vitscale.commands"."""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscale import __version__
from vitscale.checkpoint_cli import app as checkpoint_app
from vitscale.command_line import Nproc, on_ranks
from vitscale.errors import ConfigError, Interrupted, VitscaleError, on_every_rank
from vitscale.evaluation_cli import evaluate, fewshot, forward, knn, probe
from vitscale.inspection_cli import inspect
from vitscale.predict_cli import predict
from vitscale.program_cli import export
from vitscale.studies_cli import study, transfer
from vitscale.topology import Topology
from vitscale.train.changes import Resume, ResumePolicy
from vitscale.weights_cli import app as weights_app

if TYPE_CHECKING:
    from vitscale.config.schema import TrainConfig

COMMAND_GROUP = "vitscale.commands"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distributed pre-training of Vision Transformers.",
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file, see configs/ and 'vitscale config'.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changed values: optim.lr=3e-4 data.workers=8 ...")]


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Nproc = None,
    resume: Annotated[
        Resume,
        typer.Option(
            help="auto: continue if there is a checkpoint, else begin; must: an error if there is none; "
            "never: an error if there is one."
        ),
    ] = Resume.AUTO,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Key or section whose change is meant, although what follows is then another experiment; may be "
            "repeated.",
        ),
    ] = None,
) -> None:
    """Train a model, or continue the run that lies in its run folder."""
    from vitscale.config.loader import load_config
    from vitscale.models.shapes import resolve_shape

    def load() -> TrainConfig:
        loaded = load_config(config, overrides or [])
        try:
            resolve_shape(loaded.model, loaded.data.image_hw)
        except ConfigError as error:
            raise ConfigError(f"{config}: {error}") from error
        return loaded

    def work(topology: Topology) -> None:
        from vitscale.train.signals import StopRequest

        # Before the imports that take seconds: a signal that arrives meanwhile is not to be missed.
        with StopRequest() as stop:
            from vitscale.train.loop import train as run_training

            try:
                loaded = load()
            except ConfigError as error:
                raise on_every_rank(error) from error
            run_training(loaded, topology, stop, ResumePolicy(resume, tuple(allow_change or ())))

    on_ranks(nproc, work, check=load)


for judging in (evaluate, fewshot, knn, probe, forward):
    app.command()(judging)
app.command()(inspect)
app.command()(predict)
app.command()(transfer)
app.command()(study)
app.command()(export)

data_app = typer.Typer(no_args_is_help=True, help="Look at the data of a run.")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(weights_app, name="weights")


@data_app.command()
def bench(
    config: ConfigFile,
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(help="Length of the measurement.", min=0.1)] = 20.0,
    world_size: Annotated[
        int, typer.Option(help="Ranks of the run; the loader of one of them is measured.", min=1)
    ] = 1,
    gpu_images_per_s: Annotated[
        list[float] | None, typer.Option(help="Images that one GPU takes per second; may be repeated.", min=1)
    ] = None,
) -> None:
    """Images per second of a run's loader on this machine, what limits it, and the cores that a GPU needs. No GPU."""
    from vitscale.config.loader import load_config
    from vitscale.train.loader_bench import bench_loader

    report = bench_loader(load_config(config, overrides or []), world_size=world_size, seconds=seconds, say=typer.echo)
    for line in report.describe(gpu_images_per_s or [250, 500, 1000, 2000, 4000]):
        typer.echo(line)


@app.command()
def config() -> None:
    """Print every configuration key with its default and what it means, as YAML."""
    from vitscale.config.reference import reference_yaml
    from vitscale.config.schema import TrainConfig

    typer.echo(reference_yaml(TrainConfig), nl=False)


def _join_commands() -> None:
    for point in entry_points(group=COMMAND_GROUP):
        app.add_typer(point.load(), name=point.name)


def main() -> None:
    """Entry point: errors that a user can mend are one message on stderr and an exit status, never a traceback."""
    # DeepSpeed calls collectives by names that newer torch deprecates; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    _join_commands()
    try:
        app()
    except VitscaleError as error:
        kind = "" if isinstance(error, Interrupted) else "error: "
        typer.echo(f"vitscale: {kind}{error}", err=True)
        raise SystemExit(error.exit_code) from error
