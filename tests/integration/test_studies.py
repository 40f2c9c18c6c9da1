"""Transfer suites and data-scaling studies, with the real commands on handwritten digits."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.command import vitscale
from tests.helpers.runs import CONFIG, TINY, environment, overrides, write_digits
from vitscale.config.loader import load_config, load_section
from vitscale.studies.fine_tuning import as_overrides
from vitscale.studies.scaling import Point, StudyConfig, StudySets, _job

KEYS = dict(line.split("=", 1) for line in TINY)
FINE_TUNING = {
    "duration": {"steps": 6},
    "schedule.warmup": {"steps": 2},
    "global_batch_size": 16,
    "micro_batch_size": 4,
    "engine.precision": "fp32",
    "data.window": 8,
    "data.processes": 0,
    "checkpoint.every": {"steps": 3},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("studies") / "digits")


@pytest.fixture(scope="module")
def run(digits: Path) -> Path:
    run = digits.parent / "pre-trained"
    outcome = vitscale("train", CONFIG, *overrides(digits, run))
    assert outcome.code == 0, outcome.errors
    return run


def write_suite(out: Path, digits: Path, **changes: Any) -> Path:
    dataset = {
        "train": f"{digits}/train[:400]",
        "test": {"digits": f"{digits}/val[:100]", "others": f"{digits}/val[100:]"},
        "learning_rates": [0.01, 0.03],
        "group": "all",
    }
    suite = {
        "folder": str(out / "suite"),
        "image_size": 16,
        "seeds": 2,
        "datasets": {"digits": dataset},
        "overrides": FINE_TUNING,
        **changes,
    }
    path = out / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    return path


def test_a_suite_without_a_choice(tmp_path: Path, digits: Path, run: Path) -> None:
    dataset = {"train": f"{digits}/train[:400]", "test": f"{digits}/val[:100]", "learning_rates": [0.01]}
    outcome = vitscale("transfer", write_suite(tmp_path, digits, datasets={"digits": dataset}, seeds=1), run)
    assert outcome.code == 0, outcome.errors
    job = tmp_path / "suite/jobs/pre-trained/digits/seed-0"
    told = json.loads((job / "output.txt").read_text().splitlines()[-1])
    results = json.loads((tmp_path / "suite/results.json").read_text())
    assert results["scores"] == {"pre-trained/digits": {"digits": [100 * told["top1"]]}}
    config = yaml.safe_load((job / "run/config.yaml").read_text())
    assert config["init"]["path"] == str(run)
    assert config["data"]["image_size"] == 16
    assert config["optim"]["kind"] == "sgd"
    assert "1 of 1: pre-trained/digits/seed-0: digits " in outcome.out


@pytest.mark.slow
def test_a_suite_chooses_learning_rates_and_goes_on_with_what_is_left(tmp_path: Path, digits: Path, run: Path) -> None:
    suite = write_suite(tmp_path, digits)
    outcome = vitscale("transfer", suite, run, timeout_s=280)
    assert outcome.code == 0, outcome.errors
    jobs = tmp_path / "suite/jobs/pre-trained/digits"
    search = {rate: json.loads((jobs / f"lr-{rate}/result.json").read_text()) for rate in ("0.01", "0.03")}
    # 40 of 400 images are held out (the recipe's 10 %), and no test image is among them.
    settings = json.loads((jobs / "lr-0.01/settings.json").read_text())
    assert settings["tests"] == {"held-out": f"{digits}/train[:400][360:]"}
    assert settings["train"] == f"{digits}/train[:400][:360]"
    results = json.loads((tmp_path / "suite/results.json").read_text())
    best = max(search, key=lambda rate: search[rate]["result"]["held-out"])
    assert results["learning_rates"] == {"pre-trained/digits": float(best)}
    assert not (jobs / "lr-0.01/run/checkpoints").exists()
    listed = vitscale("launch", "list", jobs)
    assert "lr-0.01" in listed.out, listed.errors
    assert "failed" not in listed.out
    assert (jobs / "seed-0/run/checkpoints/latest").exists()
    rows = list(csv.reader((tmp_path / "suite/table.csv").open()))
    assert [row[0] for row in rows] == ["", "digits", "others", "all (2 datasets)", "pre-training, device-days"]
    told = json.loads(vitscale("evaluate", jobs / "seed-1/run", "--data", f"{digits}/val[:100]").out)
    assert results["scores"]["pre-trained/digits"]["digits"][1] == pytest.approx(100 * told["top1"])

    # A second start does nothing again; a third seed is one more job.
    before = (jobs / "seed-0/result.json").stat().st_mtime_ns
    outcome = vitscale("transfer", suite, run, "--set", "seeds=3")
    assert outcome.code == 0, outcome.errors
    assert "2 of 3 jobs are done already" in outcome.out
    assert (jobs / "seed-0/result.json").stat().st_mtime_ns == before
    assert len(json.loads((tmp_path / "suite/results.json").read_text())["scores"]["pre-trained/digits"]["digits"]) == 3


@pytest.mark.slow
def test_a_stopped_suite_goes_on(tmp_path: Path, digits: Path, run: Path) -> None:
    suite = write_suite(tmp_path, digits, overrides={**FINE_TUNING, "duration": {"steps": 2000}})
    command = [sys.executable, "-m", "vitscale", "transfer", str(suite), str(run)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "suite/jobs/pre-trained/digits/lr-0.01/run/metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "vitscale: stopped on" in errors
    saved = (metrics.parent / "checkpoints/latest").read_text().strip()
    assert saved.startswith("step-")


def test_what_is_held_out_of_a_part_lies_in_it(digits: Path, tmp_path: Path) -> None:
    part = f"{digits}/train[:50%]"
    study = load_section(StudyConfig, write_study(tmp_path, digits, finetune=None))
    base = load_config(study.base, as_overrides(study.overrides, {"data.train": part}))
    sets = StudySets(part, 642, {}, None)
    job = _job(
        dataclasses.replace(study, overrides={**study.overrides, "data.train": part}),
        sets,
        Point("wider", 25.0, 0, 160),
        None,
    )
    assert base.data.train == part
    assert job.settings["data.train"] == f"{part}[:160]"
    assert job.settings["data.eval"] == f"{part}[642:]"


def write_study(out: Path, digits: Path, **changes: Any) -> Path:
    study = {
        "folder": str(out / "study"),
        "base": str(CONFIG),
        "models": {"ViT mu": {}, "wider": {"model.embed_dim": 24}},
        "parts": [25.0, 100.0],
        "held_out": 10.0,
        "fewshot": {"train": f"{digits}/train", "test": f"{digits}/val", "shots": 5, "draws": 1},
        "finetune": {
            "train": f"{digits}/train[:200]",
            "test": f"{digits}/val",
            "lr": 0.01,
            "image_size": 16,
            "overrides": FINE_TUNING,
        },
        "overrides": {
            **{key: yaml.safe_load(value) for key, value in KEYS.items()},
            "data.train": f"{digits}/train",
            "evaluation.every": {"steps": 4},
        },
        **changes,
    }
    path = out / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


@pytest.mark.slow
def test_a_study_of_nested_parts(tmp_path: Path, digits: Path) -> None:
    outcome = vitscale("study", write_study(tmp_path, digits), timeout_s=280)
    assert outcome.code == 0, outcome.errors
    rows = json.loads((tmp_path / "study/results.json").read_text())
    # 1,427 of 1,797 images are for training, a tenth of which is held out.
    available = rows[-1]["num_samples"]
    assert [(row["model"], row["num_samples"]) for row in rows] == [
        ("ViT mu", round(available / 4)),
        ("ViT mu", available),
        ("wider", round(available / 4)),
        ("wider", available),
    ]
    for row in rows:
        job = tmp_path / "study/jobs" / row["model"].replace(" ", "-") / f"{row['percent']:g}-percent/seed-0"
        config = yaml.safe_load((job / "pre-training/config.yaml").read_text())
        # All parts begin at the first image, so the smaller lies in the larger, and none reaches what is held out.
        assert config["data"]["train"].endswith(f"train[:{row['num_samples']}]")
        assert config["data"]["eval"].endswith(f"train[{available}:]")
        assert config["checkpoint"]["keep_best"] == 1
        assert 0 <= row["fewshot"] <= 100
        assert 0 <= row["finetuned"] <= 100
        assert row["examples"] == 12 * 16
        assert row["step"] in (4, 8, 12)
    assert rows[0]["flops"] < rows[2]["flops"]
    assert (tmp_path / "study/figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(csv.reader((tmp_path / "study/table.csv").open()))) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datasets": {}}, "datasets is empty; name at least one"),
        ({"recipe": "bit"}, "recipe: must be 'vit' or 'bit_hyperrule', got 'bit'"),
        ({"overrides": {"optim.lrr": 1}}, "optim.lrr"),
        ({"folder": "/proc/no"}, "folder: cannot write to /proc/no"),
        ({"image_size": 18}, "18"),
    ],
)
def test_mistakes_in_a_suite_are_one_error(
    tmp_path: Path, digits: Path, run: Path, changes: dict[str, Any], message: str
) -> None:
    outcome = vitscale("transfer", write_suite(tmp_path, digits, **changes), run)
    assert outcome.code in (1, 2)
    assert message in outcome.errors
    assert "Traceback" not in outcome.errors


def test_sets_are_looked_at_before_anything_is_trained(tmp_path: Path, digits: Path, run: Path) -> None:
    dataset = {"train": f"{digits}/train[:50%]", "test": f"{digits}/nope", "learning_rates": [0.01]}
    outcome = vitscale("transfer", write_suite(tmp_path, digits, datasets={"digits": dataset}), run)
    assert outcome.code == 1
    assert "nope: no such shard set" in outcome.errors
    dataset["test"] = f"{digits}/train[40%:]"
    outcome = vitscale("transfer", write_suite(tmp_path, digits, datasets={"digits": dataset}), run)
    assert outcome.code == 1
    assert "images are learnt from" in outcome.errors
    finetune = {"train": f"{digits}/train", "test": f"{digits}/train[:5]", "lr": 1.0, "image_size": 16}
    study = write_study(tmp_path, digits, finetune=finetune)
    outcome = vitscale("study", study)
    assert outcome.code == 1
    assert "5 of its 5 images are learnt from" in outcome.errors
    assert not (tmp_path / "study").exists()
    assert not (tmp_path / "suite").exists()


def test_a_study_of_a_mixture_or_without_classes_is_refused(tmp_path: Path, digits: Path) -> None:
    mixture = {f"{digits}/train": 0.5, f"{digits}/val": 0.5}
    study = write_study(tmp_path, digits)
    outcome = vitscale("study", study, "--set", f"overrides={json.dumps({'data.train': mixture})}")
    assert outcome.code == 2
    assert "data.train is a mixture, of which there are no parts" in outcome.errors
