"""How much pre-training data a model needs: the experiment of the ViT paper, section 4.3 and figures 3 and 4.

Every model is pre-trained on nested parts of one shard set with the same settings, each with several seeds; the
checkpoint with the best held-out accuracy (early stopping) is judged by few-shot accuracy and, if asked for, by
fine-tuned accuracy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vitscale.checkpoint.choices import Weights
from vitscale.config.bounds import NonNegative, Positive
from vitscale.config.evaluators import FewshotEvaluator
from vitscale.config.loader import load_config
from vitscale.config.schema import StorageConfig, TrainConfig
from vitscale.config.section import section
from vitscale.data.manifest import Manifest
from vitscale.data.parts import check_disjoint
from vitscale.data.shard_set import open_shard_set
from vitscale.durable import publish_text
from vitscale.errors import ConfigError
from vitscale.evaluation.accuracy import open_labelled_set
from vitscale.evaluation.evaluators import open_feature_sets
from vitscale.models.shapes import resolve_shape
from vitscale.plan import accumulation_steps
from vitscale.studies.compute import best_step, compute_of
from vitscale.studies.fine_tuning import (
    CHOSEN,
    Keys,
    Training,
    as_overrides,
    fine_tuning_config,
    ranks_option,
    refuse_chosen,
)
from vitscale.studies.jobs import Job, Result, Workplace, run_jobs
from vitscale.studies.models import fine_tuned_model, init_keys
from vitscale.studies.tables import Score, Table
from vitscale.train.recipes import recipe
from vitscale.train.signals import StopRequest
from vitscale.weights.expected import family_of

OF_STUDY = {
    "run": "each has a folder of its own",
    "seed": "set seeds",
    "data.eval": "it is the end of the training data, see held_out",
    "checkpoint.folder": "each has a folder of its own",
    "checkpoint.keep_best": "see select",
}
"""Keys that a pre-training gets from the study."""

Percent = Annotated[float, Field(gt=0, le=100)]


@section
class FewshotConfig:
    """Few-shot linear accuracy of the frozen representation."""

    train: str
    """Shard set that the shots are drawn from."""
    test: str
    """Shard set that is classified."""
    shots: Positive = 5
    """Images per class; figure 4 of the ViT paper has 5."""
    draws: Positive = 3
    """To average over."""


@section
class FineTuneConfig:
    """Fine-tuned accuracy."""

    train: str
    """Shard set to fine-tune on."""
    test: str
    """Shard set that the result is measured on."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate, the same for all models and parts."""
    recipe: Literal["vit", "bit_hyperrule"] = "vit"
    """As in a transfer suite."""
    image_size: Positive
    """Pixels of a side in fine-tuning."""
    resize: Literal["bilinear_align_corners", "bicubic", "bicubic_antialias"] = "bilinear_align_corners"
    """How position embeddings are resized to the larger grid."""
    overrides: Keys = field(default_factory=dict)
    """Dotted keys of the training configuration and their values (duration: {steps: 500})."""

    def __post_init__(self) -> None:
        refuse_chosen(self.overrides, CHOSEN, "finetune.overrides")


@section
class StudyConfig:
    """Models, parts of a shard set, seeds, and how the outcome is judged."""

    folder: Path
    """Where runs, results, the table and the figure go. The same command goes on with what is there."""
    base: Path
    """Training configuration that all share; its data.train is what is taken parts of."""
    models: dict[str, Keys]
    """By name in the figure, dotted keys of the training configuration and their values (model.variant: BiT-R50x1)."""
    parts: tuple[Percent, ...] = (1.0, 10.0, 100.0)
    """Percent of the training data, without what is held out. A smaller part lies within a larger one."""
    seeds: tuple[NonNegative, ...] = (0,)
    """Each is a training of its own, of which mean and standard deviation are told."""
    held_out: Annotated[float, Field(gt=0, lt=50)] = 2.0
    """Percent of the training data, its end, that the checkpoint is chosen on; the same for all parts."""
    select: Literal["best", "last"] = "best"
    """Which checkpoint is judged: of the best held-out accuracy, as in the paper, or the last."""
    fewshot: FewshotConfig
    finetune: FineTuneConfig | None = None
    overrides: Keys = field(default_factory=dict)
    """Dotted keys of the training configuration of every pre-training, and their values."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models is empty; name at least one, with the keys that make it")
        for name, values in (("parts", self.parts), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must name at least one value, each once, got {list(values)}")
        refuse_chosen(self.overrides, OF_STUDY, "overrides")
        for name, keys in self.models.items():
            refuse_chosen(keys, {**OF_STUDY, "data.train": "all models learn from the same images"}, f"models.{name}")
        folders = [_folder_name(name) for name in self.models]
        if len(set(folders)) < len(folders) or not all(folders):
            raise ValueError(f"models: the names become folders ({', '.join(folders)}), which must differ; rename one")


@dataclass(frozen=True)
class Point:
    """One pre-training of the study."""

    model: str
    percent: float
    seed: int
    num_samples: int
    """Images that are pre-trained on."""

    @property
    def name(self) -> str:
        """Folder of its job."""
        return f"{_folder_name(self.model)}/{self.percent:g}-percent/seed-{self.seed}"


def run_study(
    study: StudyConfig,
    *,
    nproc: int | None,
    stop: StopRequest,
    say: Callable[[str], None],
) -> Table:
    """Do all that is left of a study, draw its figure and tell its table. Any number of processes may do the same.

    Raises:
        VitscaleError: as :func:`vitscale.studies.jobs.run_jobs`, or data or configuration cannot be used.
    """
    base = load_config(study.base, as_overrides(study.overrides))
    train, storage = base.data.train, base.data.storage
    if not isinstance(train, str):
        raise ConfigError(
            f"{study.base}: data.train is a mixture, of which there are no parts; name a single shard set"
        )
    whole = open_shard_set(train, storage)
    available = whole.num_samples - max(1, round(whole.num_samples * study.held_out / 100))
    points = [
        Point(model, percent, seed, max(1, round(available * percent / 100)))
        for model in study.models
        for percent in sorted(study.parts)
        for seed in study.seeds
    ]
    tuning = None if study.finetune is None else open_shard_set(study.finetune.train, storage)
    sets = StudySets(train, available, _look_at_sets(study, whole, tuning, storage), tuning)
    jobs = [_job(study, sets, point, nproc) for point in points]
    results = run_jobs(jobs, study.folder / "jobs", stop=stop, say=say)
    by_point = {point: results[point.name] for point in points}
    table = _table(study, by_point)
    table.write(study.folder, "table")
    rows = [{**vars(point), **result} for point, result in by_point.items()]
    publish_text(study.folder / "results.json", json.dumps(rows, indent=1) + "\n")
    from vitscale.studies.figure import draw_scaling

    draw_scaling(study.folder / "figure.png", curves(study, by_point), shots=study.fewshot.shots)
    return table


def curves(study: StudyConfig, results: Mapping[Point, Result]) -> dict[str, dict[str, list[tuple[int, Score]]]]:
    """By measure and model, the scores by the number of pre-training images, the smallest first."""
    found: dict[str, dict[str, list[tuple[int, Score]]]] = {}
    for measure in _measures(study):
        found[measure] = {}
        for model in study.models:
            groups: dict[int, list[float]] = {}
            for point, result in results.items():
                if point.model == model:
                    groups.setdefault(point.num_samples, []).append(result[measure])
            found[measure][model] = [(size, Score(tuple(values))) for size, values in sorted(groups.items())]
    return found


def _measures(study: StudyConfig) -> tuple[str, ...]:
    return ("fewshot",) if study.finetune is None else ("fewshot", "finetuned")


@dataclass(frozen=True)
class StudySets:
    """The shard sets of a study, which were looked at."""

    train: str
    """What is taken parts of."""
    available: int
    """Images of it that are not held out."""
    digests: Mapping[str, str]
    """Of all sets, by what they are for: results of other content are other results."""
    fine_tuning: Manifest | None


def _look_at_sets(
    study: StudyConfig, whole: Manifest, tuning: Manifest | None, storage: StorageConfig
) -> dict[str, str]:
    """Digests of all sets, which fit each other."""
    fewshot = FewshotEvaluator(train=study.fewshot.train, test=study.fewshot.test)
    shots, test = open_feature_sets(fewshot, storage)
    digests = {"pre-training": whole.digest, "few-shot": shots.digest, "few-shot test": test.digest}
    check_disjoint(whole, test)
    if study.finetune is not None and tuning is not None:
        if tuning.classes is None:
            raise ConfigError(f"finetune.train: {tuning.shown} names no classes; write the set with their names")
        test = open_labelled_set(study.finetune.test, storage, len(tuning.classes), tuning.classes)
        for learned in (whole, tuning):
            check_disjoint(learned, test)
        digests |= {"fine-tuning": tuning.digest, "fine-tuning test": test.digest}
    return digests


def _job(study: StudyConfig, sets: StudySets, point: Point, nproc: int | None) -> Job:
    folder = study.folder / "jobs" / point.name
    keys = {
        "run": str(folder / "pre-training"),
        "seed": point.seed,
        "data.train": f"{sets.train}[:{point.num_samples}]",
        "data.eval": f"{sets.train}[{sets.available}:]",
        **({"checkpoint.keep_best": 1} if study.select == "best" else {}),
    }
    overrides = {**study.overrides, **study.models[point.model]}
    config = load_config(study.base, as_overrides(overrides, keys))
    resolve_shape(config.model, config.data.image_hw)
    accumulation_steps(config, nproc or 1)
    if study.select == "best" and config.evaluation.every is None:
        raise ConfigError(
            f"{study.base}: evaluation.every is null, so there is no best checkpoint; set it, or select=last"
        )
    # With the step that is chosen later, it is this one again.
    _fine_tuning(study, sets, config, None, nproc)
    settings = {
        "base": study.base.read_text(encoding="utf-8"),
        "overrides": overrides,
        **{key: value for key, value in keys.items() if key != "run"},
        "data": dict(sets.digests),
        "select": study.select,
        "fewshot": vars(study.fewshot),
        "finetune": study.finetune and vars(study.finetune),
    }

    def work(place: Workplace) -> Result:
        training = Training(config, nproc)
        training.run(place)
        step = best_step(config.run) if study.select == "best" else None
        compute = compute_of(config.run)
        result: Result = {
            "step": step,
            "fewshot": _fewshot(study.fewshot, config, step, place, nproc),
            "examples": compute.examples,
            "flops": compute.flops,
            "device_days": compute.device_days,
        }
        if (fine_tuning := _fine_tuning(study, sets, config, step, nproc)) and study.finetune is not None:
            fine_tuning.run(place)
            result["finetuned"] = fine_tuning.accuracy(place, study.finetune.test)
        return result

    return Job(point.name, settings, work)


def _fewshot(
    fewshot: FewshotConfig, config: TrainConfig, step: int | None, place: Workplace, nproc: int | None
) -> float:
    told = place.vitscale(
        "fewshot", str(config.run), "--train", fewshot.train, "--test", fewshot.test,
        "--shots", str(fewshot.shots), "--seeds", str(fewshot.draws), *_checkpoint_options(config, step),
        *ranks_option(nproc),
    )  # fmt: skip
    return 100.0 * float(json.loads(told.splitlines()[-1])[f"{fewshot.shots}-shot"])


def _fine_tuning(
    study: StudyConfig, sets: StudySets, config: TrainConfig, step: int | None, nproc: int | None
) -> Training | None:
    """Of a pre-trained model, from its checkpoint of ``step``; None if the study does without."""
    finetune, manifest = study.finetune, sets.fine_tuning
    if finetune is None or manifest is None or manifest.classes is None:
        return None
    family = family_of(config.model, config.data.image_hw)
    weights = Weights.RAW if config.optim.ema_decay is None else Weights.EMA
    found = fine_tuning_config(
        recipe(finetune.recipe, num_examples=manifest.num_samples, image_size=finetune.image_size),
        run=config.run.with_name("fine-tuning"),
        seed=config.seed,
        lr=finetune.lr,
        train=finetune.train,
        model=fine_tuned_model(config.model, family, num_classes=len(manifest.classes)),
        init=init_keys(config.run, step=step, weights=weights, resize=finetune.resize),
        overrides=finetune.overrides,
        nproc=nproc,
        origin=f"fine-tuning of {config.run}",
    )
    return Training(found, nproc)


def _checkpoint_options(config: TrainConfig, step: int | None) -> Sequence[str]:
    options = [] if step is None else ["--step", str(step)]
    return options if config.optim.ema_decay is None else [*options, "--weights", "ema"]


def _table(study: StudyConfig, results: Mapping[Point, Result]) -> Table:
    """A row for each model and part."""
    shots = study.fewshot.shots
    columns = ["model", "images", "share", f"{shots}-shot", *(["fine-tuned"] if study.finetune else [])]
    rows = []
    for model in study.models:
        for percent in sorted(study.parts):
            group = {p: r for p, r in results.items() if (p.model, p.percent) == (model, percent)}
            point, outcomes = next(iter(group)), list(group.values())
            mean = {key: sum(o[key] for o in outcomes) / len(outcomes) for key in ("examples", "flops", "device_days")}
            scores = (str(Score(tuple(o[measure] for o in outcomes))) for measure in _measures(study))
            epochs = mean["examples"] / point.num_samples
            rows.append(
                (model, f"{point.num_samples:,}", f"{percent:g} %", *scores, f"{epochs:.4g}", f"{mean['flops']:.3g}",
                 f"{mean['device_days'] * 24:.3g}")
            )  # fmt: skip
    plural = "" if len(study.seeds) == 1 else f", mean ± standard deviation of {len(study.seeds)} seeds"
    chosen = "with the best held-out accuracy" if study.select == "best" else "of the last step"
    return Table(
        f"Accuracy in percent by pre-training data{plural}",
        (*columns, "epochs", "FLOPs", "device-hours"),
        tuple(rows),
        (
            f"Judged is the checkpoint {chosen}. FLOPs are those of pre-training, three forward passes per image; "
            f"device-hours those of its steps.",
        ),
    )


def _folder_name(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", model).strip("-.")
