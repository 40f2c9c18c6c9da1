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

from vitscale.config.bounds import NonNegative, Positive
from vitscale.config.loader import load_config
from vitscale.config.schema import TrainConfig
from vitscale.config.section import section
from vitscale.data.manifest import Manifest
from vitscale.data.shard_set import open_shard_set
from vitscale.durable import publish_text
from vitscale.errors import ConfigError
from vitscale.studies.compute import best_step, compute_of
from vitscale.studies.fine_tuning import Keys, Training, as_overrides, compose, ranks_option, score
from vitscale.studies.jobs import Job, Result, Workplace, run_jobs
from vitscale.studies.models import fine_tuned_model
from vitscale.studies.tables import Score, Table
from vitscale.studies.transfer import accuracy
from vitscale.train.recipes import recipe
from vitscale.train.signals import StopRequest
from vitscale.weights.expected import family_of

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
    if not isinstance(base.data.train, str):
        raise ConfigError(
            f"{study.base}: data.train is a mixture, of which there are no parts; name a single shard set"
        )
    whole = open_shard_set(base.data.train, base.data.storage)
    size = whole.num_samples
    available = size - max(1, round(size * study.held_out / 100))
    points = [
        Point(model, percent, seed, max(1, round(available * percent / 100)))
        for model in study.models
        for percent in sorted(study.parts)
        for seed in study.seeds
    ]
    jobs = [_job(study, whole, available, point, nproc) for point in points]
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


def _job(study: StudyConfig, whole: Manifest, available: int, point: Point, nproc: int | None) -> Job:
    folder, train = study.folder / "jobs" / point.name, whole.location
    keys = {
        "run": str(folder / "pre-training"),
        "seed": point.seed,
        "data.train": f"{train}[:{point.num_samples}]",
        "data.eval": f"{train}[{available}:]",
        **({"checkpoint.keep_best": 1} if study.select == "best" else {}),
    }
    overrides = {**study.overrides, **study.models[point.model]}
    config = load_config(study.base, as_overrides(overrides, keys))
    if study.select == "best" and config.evaluation.every is None:
        raise ConfigError(
            f"{study.base}: evaluation.every is null, so there is no best checkpoint; set it, or select=last"
        )
    settings = {
        "data": whole.digest,
        "base": study.base.read_text(encoding="utf-8"),
        "overrides": overrides,
        **{key: value for key, value in keys.items() if key != "run"},
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
        if study.finetune is not None:
            result["finetuned"] = _fine_tune(study.finetune, config, step, place, nproc)
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


def _fine_tune(
    finetune: FineTuneConfig, config: TrainConfig, step: int | None, place: Workplace, nproc: int | None
) -> float:
    manifest = open_shard_set(finetune.train, config.data.storage)
    if manifest.classes is None:
        raise ConfigError(f"finetune.train: {manifest.shown} names no classes; write the set with their names")
    found = recipe(finetune.recipe, num_examples=manifest.num_samples, image_size=finetune.image_size)
    family = family_of(config.model, config.data.image_hw)
    ema = {} if config.optim.ema_decay is None else {"weights": "ema"}
    keys = {
        "run": str(place.folder / "fine-tuning"),
        "seed": config.seed,
        **found.keys,
        "optim.lr": finetune.lr,
        "data.train": finetune.train,
        "model": fine_tuned_model(config.model, family, num_classes=len(manifest.classes)),
        "init": {
            "path": str(config.run),
            "step": step,
            "resize": finetune.resize,
            "head": "new",
            "pre_logits": "drop",
            **ema,
        },
    }
    training = Training(compose(keys, finetune.overrides, origin=f"fine-tuning of {config.run}"), nproc)
    training.run(place)
    return accuracy(score(place, training, finetune.test))


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
