"""Commands that judge a model: its head's accuracy, its frozen representation, its numbers against other programs'."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from vitscale.checkpoint.choices import Weights
from vitscale.checkpoint_cli import WeightsOption
from vitscale.command_line import (
    BatchSize,
    ImageSize,
    MaxUnreadable,
    ModelFile,
    ModelLocation,
    Nproc,
    ReadingOverrides,
    Resize,
    Step,
    echo_json,
    on_ranks,
    parse_image_size,
)
from vitscale.errors import ConfigError, VitscaleError, on_every_rank
from vitscale.evaluation.choices import CacheChoice, ModelChoice, Reading, parse_counts, parse_numbers, parse_ridge
from vitscale.weights.choices import ResizeMode

if TYPE_CHECKING:
    from vitscale.config.evaluators import FeatureEvaluator
    from vitscale.topology import Topology

T = TypeVar("T")

TrainSet = Annotated[str, typer.Option("--train", help="Shard set to learn from, folder or URL, or a part of it.")]
TestSet = Annotated[str, typer.Option("--test", help="Shard set that is classified, with the same classes.")]
CacheFolder = Annotated[
    Path | None, typer.Option("--cache", help="Folder where features are kept; default: 'features' in the run folder.")
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither take features that are kept, nor keep any.")]


def evaluate(
    model: ModelLocation,
    overrides: ReadingOverrides = None,
    data: Annotated[str | None, typer.Option(help="Shard set, folder or URL; default: the run's data.eval.")] = None,
    step: Step = None,
    weights: WeightsOption = Weights.RAW,
    model_file: ModelFile = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    confusion: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the confusion matrix; its numbers go beside it.")
    ] = None,
    batch_size: BatchSize = 64,
    max_unreadable: MaxUnreadable = None,
    nproc: Nproc = None,
) -> None:
    """Accuracy of a model's head: top-1, top-5 and calibration; on images with several labels, the share of hits and
    mean average precision. Prints one line of JSON."""

    def work(topology: Topology) -> None:
        from vitscale.evaluation.commands import evaluate_model

        choice = _agreed(lambda: _model(model, overrides, step, weights, model_file, image_size, resize))
        reading = Reading(batch_size, max_unreadable)
        echo_json(evaluate_model(choice, data, reading=reading, confusion=confusion, topology=topology))

    on_ranks(nproc, work)


def fewshot(
    model: ModelLocation,
    train_data: TrainSet,
    test_data: TestSet,
    overrides: ReadingOverrides = None,
    shots: Annotated[str, typer.Option(help="Images per class, several with commas.")] = "1,5,10,25",
    seeds: Annotated[int, typer.Option(help="Draws to average over.", min=1)] = 3,
    ridge: Annotated[
        str,
        typer.Option(
            help="Strength of the ridge penalty. Of several with commas, or of 'grid' (2^-10 to 2^18), the best on "
            "training images that were not drawn is taken, and a table tells them all."
        ),
    ] = "1024",
    step: Step = None,
    weights: WeightsOption = Weights.RAW,
    model_file: ModelFile = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    batch_size: BatchSize = 64,
    max_unreadable: MaxUnreadable = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    nproc: Nproc = None,
) -> None:
    """Few-shot linear accuracy of a representation (ridge regression in closed form). Prints one line of JSON."""

    def evaluator() -> FeatureEvaluator:
        from vitscale.config.evaluators import FewshotEvaluator

        return FewshotEvaluator(
            train=train_data,
            test=test_data,
            shots=parse_counts(shots, "--shots", "1,5,10"),
            seeds=seeds,
            ridge=parse_ridge(ridge),
        )

    def ask() -> ModelChoice:
        return _model(model, overrides, step, weights, model_file, image_size, resize)

    _judge(nproc, ask, evaluator, Reading(batch_size, max_unreadable), CacheChoice(cache, not no_cache))


def knn(
    model: ModelLocation,
    train_data: TrainSet,
    test_data: TestSet,
    overrides: ReadingOverrides = None,
    k: Annotated[str, typer.Option("--k", help="Numbers of neighbours, several with commas.")] = "10,20",
    temperature: Annotated[float, typer.Option(help="What similarities are divided by.", min=1e-6)] = 0.07,
    step: Step = None,
    weights: WeightsOption = Weights.RAW,
    model_file: ModelFile = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    batch_size: BatchSize = 64,
    max_unreadable: MaxUnreadable = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    nproc: Nproc = None,
) -> None:
    """Nearest-neighbour accuracy of a representation (weighted votes by cosine similarity). Prints one line of JSON."""

    def evaluator() -> FeatureEvaluator:
        from vitscale.config.evaluators import KnnEvaluator

        return KnnEvaluator(
            train=train_data, test=test_data, k=parse_counts(k, "--k", "10,20"), temperature=temperature
        )

    def ask() -> ModelChoice:
        return _model(model, overrides, step, weights, model_file, image_size, resize)

    _judge(nproc, ask, evaluator, Reading(batch_size, max_unreadable), CacheChoice(cache, not no_cache))


def probe(
    model: ModelLocation,
    train_data: TrainSet,
    test_data: TestSet,
    overrides: ReadingOverrides = None,
    lr: Annotated[
        str, typer.Option(help="Learning rates with commas; the best on a held-out part of the training set is taken.")
    ] = "0.001,0.003,0.01,0.03,0.1,0.3",
    epochs: Annotated[int, typer.Option(help="Passes over the training set.", min=1)] = 30,
    adamw: Annotated[bool, typer.Option("--adamw", help="AdamW instead of SGD with momentum 0.9.")] = False,
    weight_decay: Annotated[float, typer.Option(help="Of the kernel.", min=0)] = 0.0,
    held_out: Annotated[float, typer.Option(help="Share on which the learning rate is chosen.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the held-out part and of the order.", min=0)] = 0,
    step: Step = None,
    weights: WeightsOption = Weights.RAW,
    model_file: ModelFile = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    batch_size: BatchSize = 64,
    max_unreadable: MaxUnreadable = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    nproc: Nproc = None,
) -> None:
    """Accuracy of a linear classifier that is trained on a frozen representation. Prints one line of JSON."""

    def evaluator() -> FeatureEvaluator:
        from vitscale.config.evaluators import ProbeEvaluator

        if not 0 < held_out < 1:
            raise ConfigError(f"--held-out is {held_out:g}; a share between 0 and 1 is needed, as in 0.1")
        return ProbeEvaluator(
            train=train_data,
            test=test_data,
            optimizer="adamw" if adamw else "sgd",
            lr=parse_numbers(lr, "--lr", "0.01,0.1"),
            epochs=epochs,
            weight_decay=weight_decay,
            held_out=held_out,
            seed=seed,
        )

    def ask() -> ModelChoice:
        return _model(model, overrides, step, weights, model_file, image_size, resize)

    _judge(nproc, ask, evaluator, Reading(batch_size, max_unreadable), CacheChoice(cache, not no_cache))


def forward(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="File of weights, or a Hugging Face folder.")],
    model: Annotated[Path, typer.Option(metavar="MODEL.yaml", help="Keys of a configuration's model section.")],
    input: Annotated[Path, typer.Option(metavar="IMAGES.npy", help="float32 [n, height, width, 3], normalised.")],
    output: Annotated[Path, typer.Option(metavar="LOGITS.npy", help="File to write, float32 [n, classes].")],
    resize: Annotated[
        ResizeMode | None, typer.Option(help="How embeddings of another size are resized; without it they are refused.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 64,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Logits of an array of images in fp32, to compare a model with another implementation of it."""
    from vitscale.evaluation.array import forward_array

    loaded = forward_array(
        weights, model, input, output, resize=resize, batch_size=batch_size, force=force, advance=_echo_progress
    )
    for line in loaded.description:
        typer.echo(line)
    typer.echo(f"logits -> {output}")


def _judge(
    nproc: int | None,
    ask: Callable[[], ModelChoice],
    evaluator: Callable[[], FeatureEvaluator],
    reading: Reading,
    cache: CacheChoice,
) -> None:
    def work(topology: Topology) -> None:
        from vitscale.evaluation.commands import judge_features

        choice, settings = _agreed(lambda: (ask(), evaluator()))
        result = judge_features(choice, settings, reading=reading, cache=cache, topology=topology)
        for line in _ridge_table(result or {}):
            typer.echo(line, err=True)
        echo_json(result)

    on_ranks(nproc, work)


def _agreed(make: Callable[[], T]) -> T:
    """What the options say; a mistake in them is the same on all ranks."""
    try:
        return make()
    except VitscaleError as error:
        raise on_every_rank(error) from error


def _model(
    location: Path,
    overrides: list[str] | None,
    step: int | None,
    weights: Weights,
    model: Path | None,
    image_size: str | None,
    resize: ResizeMode | None,
) -> ModelChoice:
    return ModelChoice(location, step, weights, model, tuple(overrides or ()), parse_image_size(image_size), resize)


def _ridge_table(result: dict[str, Any]) -> list[str]:
    """Test accuracy by penalty and number of shots, if there were several penalties."""
    tables = {name.removesuffix("_by_ridge"): table for name, table in result.items() if name.endswith("_by_ridge")}
    if not tables:
        return []
    lines = ["test accuracy [%] by ridge penalty; * was chosen on training images that were not drawn"]
    lines.append("".join(f"{name:>12}" for name in ("ridge", *tables)))
    for ridge in next(iter(tables.values())):
        chosen = {name: f"{result[f'{name}_ridge']:g}" == ridge for name in tables}
        cells = [f"{100 * table[ridge]:.2f}{'*' if chosen[name] else ' '}" for name, table in tables.items()]
        lines.append("".join(f"{cell:>12}" for cell in (f"{ridge} ", *cells)))
    return lines


def _echo_progress(done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        typer.echo(f"{done:,} of {total:,} images", err=True)
