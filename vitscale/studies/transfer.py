"""Transfer of pre-trained models to a suite of datasets, judged as in the ViT paper (section 4.1, tables 2 and 4).

For each model and dataset, the learning rate is chosen on a held-out part of the training set; then the whole training
set is used, several times with other seeds, and the test sets decide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vitscale.config.bounds import Positive
from vitscale.config.section import section
from vitscale.data.manifest import Manifest
from vitscale.data.parts import check_disjoint
from vitscale.data.shard_set import open_shard_set
from vitscale.durable import publish_text
from vitscale.errors import ConfigError
from vitscale.evaluation.accuracy import open_labelled_set
from vitscale.studies.fine_tuning import (
    CHOSEN,
    Keys,
    Training,
    diverged,
    fine_tuning_config,
    refuse_chosen,
    storage_of,
)
from vitscale.studies.jobs import CommandError, Job, Result, Workplace, run_jobs
from vitscale.studies.models import StartingPoint
from vitscale.studies.tables import Score, Table
from vitscale.train.recipes import Recipe, recipe
from vitscale.train.signals import StopRequest

TABLE = "table"


@section
class DatasetConfig:
    """A dataset to transfer to."""

    train: str
    """Shard set to fine-tune on, folder or URL; a part of it may be named, as in SET[:1000]."""
    test: str | dict[str, str]
    """Shard set that the result is measured on. Or several by name (ImageNet: ..., ReaL: ...), a row each."""
    num_classes: Positive | None = None
    """By default as many as the training set names."""
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """To choose from; by default the recipe's. With a single one, nothing is held out and nothing is chosen."""
    held_out: Annotated[float, Field(gt=0, lt=100)] | None = None
    """Percent of the training set, its end, that the learning rate is chosen on; by default the recipe's."""
    image_size: Positive | None = None
    """Pixels of a side, instead of the suite's: 128 for small images in BiT-HyperRule."""
    group: str | None = None
    """Datasets of one group also get a row with their mean (VTAB)."""
    overrides: Keys = field(default_factory=dict)
    """Dotted keys of the training configuration and their values (data.flip: false), over those of the suite."""


@section
class SuiteConfig:
    """Datasets, and how models are fine-tuned on them."""

    folder: Path
    """Where runs, results and the table go. The same command goes on with what is there."""
    recipe: Literal["vit", "bit_hyperrule"] = "vit"
    """Steps, learning rates and crops by dataset: ViT paper, table 4, or BiT-HyperRule (arXiv 1912.11370)."""
    image_size: Positive = 384
    """Pixels of a side in fine-tuning."""
    seeds: Positive = 3
    """Fine-tunings with the chosen learning rate, of which mean and standard deviation are told."""
    resize: Literal["bilinear_align_corners", "bicubic", "bicubic_antialias"] = "bilinear_align_corners"
    """How position embeddings are resized to the larger grid."""
    datasets: dict[str, DatasetConfig]
    overrides: Keys = field(default_factory=dict)
    """Dotted keys of the training configuration of every fine-tuning, and their values (micro_batch_size: 64)."""

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("datasets is empty; name at least one, with its train and test")
        for name in self.datasets:
            if not name.strip() or "/" in name or name.startswith("."):
                raise ValueError(
                    f"datasets: {name!r} becomes the name of a folder; take one without '/' and dots in front"
                )
        refuse_chosen(self.overrides, CHOSEN, "overrides")
        for name, dataset in self.datasets.items():
            refuse_chosen(dataset.overrides, CHOSEN, f"datasets.{name}.overrides")
        rows = [row for name, dataset in self.datasets.items() for row in tests_of(name, dataset)]
        rows += sorted({dataset.group for dataset in self.datasets.values() if dataset.group})
        if twice := sorted({row for row in rows if rows.count(row) > 1}):
            raise ValueError(
                f"datasets: {twice[0]!r} names two rows of the table (datasets, tests and groups); rename one of them"
            )


def tests_of(name: str, dataset: DatasetConfig) -> dict[str, str]:
    """Test sets by row of the table."""
    return {name: dataset.test} if isinstance(dataset.test, str) else dataset.test


@dataclass(frozen=True)
class Task:
    """One model on one dataset."""

    suite: SuiteConfig
    dataset: str
    model: StartingPoint
    recipe: Recipe
    num_classes: int
    train_size: int
    """Images of the training set."""
    digests: Mapping[str, str]
    """Of the shard sets, by location: results of other content are other results."""
    nproc: int | None

    @property
    def section(self) -> DatasetConfig:
        """The dataset's."""
        return self.suite.datasets[self.dataset]

    @property
    def name(self) -> str:
        """Folder of its jobs."""
        return f"{self.model.name}/{self.dataset}"

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """To choose from."""
        return self.section.learning_rates or self.recipe.learning_rates

    @property
    def tests(self) -> dict[str, str]:
        """Test sets by row of the table."""
        return tests_of(self.dataset, self.section)

    def parts(self) -> tuple[str, str]:
        """The training set without its held-out part, and that part."""
        share = self.section.held_out or self.recipe.held_out_percent
        kept = max(1, self.train_size - max(1, round(self.train_size * share / 100)))
        return f"{self.section.train}[:{kept}]", f"{self.section.train}[{kept}:]"

    def search(self) -> list[Job]:
        """The jobs that the learning rate is chosen by; none where there is no choice."""
        if len(self.learning_rates) == 1:
            return []
        train, held_out = self.parts()
        return [self._job(f"lr-{lr:g}", lr, 0, train, {"held-out": held_out}, keep=False) for lr in self.learning_rates]

    def choose(self, results: Mapping[str, Result]) -> float:
        """The learning rate with the highest accuracy on the held-out part, the lower one of equals.

        Raises:
            ConfigError: training diverged with each of them.
        """
        scores = {
            lr: results[f"{self.name}/lr-{lr:g}"]["held-out"] if len(self.learning_rates) > 1 else 0.0
            for lr in sorted(self.learning_rates)
        }
        best = max(scores, key=lambda lr: -math.inf if scores[lr] is None else scores[lr])
        if scores[best] is None:
            raise ConfigError(
                f"{self.name}: training diverged with every learning rate ({', '.join(f'{lr:g}' for lr in scores)}); "
                f"give lower ones in datasets.{self.dataset}.learning_rates"
            )
        return best

    def final(self, lr: float) -> list[Job]:
        """The jobs whose scores are told."""
        return [
            self._job(f"seed-{seed}", lr, seed, self.section.train, self.tests, keep=True)
            for seed in range(self.suite.seeds)
        ]

    def _job(self, name: str, lr: float, seed: int, train: str, tests: dict[str, str], *, keep: bool) -> Job:
        model = self.model.model_keys(num_classes=self.num_classes)
        overrides = {**self.suite.overrides, **self.section.overrides}
        config = fine_tuning_config(
            self.recipe,
            run=self.suite.folder / "jobs" / self.name / name / "run",
            seed=seed,
            lr=lr,
            train=train,
            model=model,
            init=self.model.init_keys(resize=self.suite.resize),
            overrides=overrides,
            nproc=self.nproc,
            origin=f"fine-tuning on {self.dataset}",
        )
        settings = {
            "recipe": dict(self.recipe.keys),
            "overrides": overrides,
            "model": model,
            "weights": self.model.digest,
            "resize": self.suite.resize,
            "lr": lr,
            "seed": seed,
            "train": train,
            "tests": tests,
            "data": dict(self.digests),
        }
        training = Training(config, self.nproc)

        def work(place: Workplace) -> Result:
            try:
                training.run(place)
            except CommandError as error:
                if diverged(error):
                    return dict.fromkeys(tests)
                raise
            result: Result = {row: training.accuracy(place, test) for row, test in tests.items()}
            if not keep:
                training.remove_checkpoints()
            return result

        return Job(f"{self.name}/{name}", settings, work)


def run_suite(
    suite: SuiteConfig,
    models: Sequence[StartingPoint],
    *,
    nproc: int | None,
    stop: StopRequest,
    say: Callable[[str], None],
) -> Table:
    """Do all that is left of a suite, and tell the table. Any number of processes may do the same at a time.

    Raises:
        VitscaleError: as :func:`vitscale.studies.jobs.run_jobs`, or a dataset cannot be used.
    """
    tasks = [_task(suite, name, model, nproc) for model in models for name in suite.datasets]
    jobs = suite.folder / "jobs"
    searches = [job for task in tasks for job in task.search()]
    if searches:
        say(f"{len(searches)} fine-tunings choose learning rates")
    found = run_jobs(searches, jobs, stop=stop, say=say)
    chosen = {task.name: task.choose(found) for task in tasks}
    finals = [job for task in tasks for job in task.final(chosen[task.name])]
    say(f"{len(finals)} fine-tunings with the chosen learning rates")
    results = run_jobs(finals, jobs, stop=stop, say=say)
    table = _table(suite, tasks, chosen, results)
    table.write(suite.folder, TABLE)
    scores = {
        task.name: {
            row: [results[f"{task.name}/seed-{seed}"][row] for seed in range(suite.seeds)] for row in task.tests
        }
        for task in tasks
    }
    publish_text(
        suite.folder / "results.json", json.dumps({"learning_rates": chosen, "scores": scores}, indent=1) + "\n"
    )
    return table


def _task(suite: SuiteConfig, name: str, model: StartingPoint, nproc: int | None) -> Task:
    """Look at all that the jobs of a dataset need, so that nothing is found out after hours."""
    dataset = suite.datasets[name]
    storage = storage_of(suite.overrides, dataset.overrides)
    manifest = open_shard_set(dataset.train, storage)
    num_classes = _num_classes(name, dataset, manifest)
    digests = {dataset.train: manifest.digest}
    for location in tests_of(name, dataset).values():
        test = open_labelled_set(location, storage, num_classes, manifest.classes)
        check_disjoint(manifest, test)
        digests[location] = test.digest
    found = recipe(suite.recipe, num_examples=manifest.num_samples, image_size=dataset.image_size or suite.image_size)
    return Task(suite, name, model, found, num_classes, manifest.num_samples, digests, nproc)


def _num_classes(name: str, dataset: DatasetConfig, manifest: Manifest) -> int:
    if dataset.num_classes is not None:
        return dataset.num_classes
    if manifest.classes is None:
        raise ConfigError(
            f"datasets.{name}: {manifest.shown} names no classes; say how many there are with "
            f"datasets.{name}.num_classes"
        )
    return len(manifest.classes)


def _table(
    suite: SuiteConfig, tasks: Sequence[Task], chosen: Mapping[str, float], results: Mapping[str, Result]
) -> Table:
    """Datasets down, models across, as in table 2 of the ViT paper."""
    models = list(dict.fromkeys(task.model.name for task in tasks))
    scores = {
        (row, task.model.name): Score(tuple(results[f"{task.name}/seed-{seed}"][row] for seed in range(suite.seeds)))
        for task in tasks
        for row in task.tests
    }
    rows = list(dict.fromkeys(row for row, _ in scores))
    lines = [(row, *(str(scores[row, model]) for model in models)) for row in rows]
    for group in dict.fromkeys(d.group for d in suite.datasets.values() if d.group):
        members = [row for task in tasks if task.section.group == group for row in task.tests]
        members = list(dict.fromkeys(members))
        means = [mean_over([scores[member, model] for member in members]) for model in models]
        lines.append((f"{group} ({len(members)} datasets)", *map(str, means)))
    if any(task.model.device_days is not None for task in tasks):
        lines.append(("pre-training, device-days", *(_days(tasks, model) for model in models)))
    rates = "; ".join(f"{name}: {lr:g}" for name, lr in chosen.items())
    plural = "" if suite.seeds == 1 else f", mean ± standard deviation of {suite.seeds} fine-tunings"
    return Table(
        f"Transfer, top-1 in percent{plural}",
        ("", *models),
        tuple(lines),
        (f"Recipe {suite.recipe}. Learning rates: {rates}.",),
    )


def mean_over(scores: Sequence[Score]) -> Score:
    """The mean of several datasets, repetition by repetition; one without all of them is none."""
    rows = zip(*(score.values for score in scores), strict=True)
    return Score(tuple(None if None in row else sum(v for v in row if v is not None) / len(row) for row in rows))


def _days(tasks: Sequence[Task], model: str) -> str:
    days = next(task.model.device_days for task in tasks if task.model.name == model)
    return "unknown" if days is None else f"{days:.3g}"
