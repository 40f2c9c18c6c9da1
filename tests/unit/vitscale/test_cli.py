"""What the command itself does: help, version, commands of the siblings, exit statuses of mistakes in its options."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command import vitscale
from tests.helpers.runs import environment
from vitscale import __version__
from vitscale.config.loader import parse_section
from vitscale.config.schema import TrainConfig


def test_without_arguments_it_shows_its_commands() -> None:
    outcome = vitscale()
    shown = outcome.out + outcome.errors
    assert "Usage: vitscale" in shown
    for command in ("train", "evaluate", "fewshot", "config", "shards", "launch", "checkpoint", "data"):
        assert f" {command} " in shown
    assert "Traceback" not in shown


def test_the_real_program_prints_its_version() -> None:
    command = [sys.executable, "-m", "vitscale", "--version"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{__version__}\n", "")


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "fewshot", "config", "shards", "launch", "checkpoint", "data"]
)
def test_every_command_has_help(command: str) -> None:
    outcome = vitscale(command, "--help")
    assert outcome.code == 0
    assert f"Usage: vitscale {command}" in outcome.out
    assert outcome.errors == ""


def test_config_prints_the_reference_which_loads_once_filled_in() -> None:
    outcome = vitscale("config")
    assert (outcome.code, outcome.errors) == (0, "")
    required = ["run=a", "duration={steps: 1}", "global_batch_size=8", "micro_batch_size=4", "data.train=b"]
    required += ["data.image_size=8", "model.num_classes=2", "optim.lr=0.1"]
    assert parse_section(TrainConfig, outcome.out, "reference", required).optim.lr == 0.1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["train", "a.yaml", "--nprocs", "2"], "No such option: --nprocs"),
        (["train", "a.yaml", "--nproc", "two"], "--nproc"),
        (["evaluate", "run", "--batch-size", "0"], "--batch-size"),
        (["fewshot", "run", "--train", "a"], "Missing option '--test'"),
        (["fewshot", "run", "--train", "a", "--test", "b", "--ridge", "-1"], "--ridge"),
    ],
)
def test_mistakes_in_options_are_named(arguments: list[str], named: str) -> None:
    outcome = vitscale(*arguments)
    assert outcome.code == 2
    # It stands in a box that may break lines.
    assert named in " ".join(outcome.errors.replace("│", " ").split())
    assert "Traceback" not in outcome.errors


def test_the_command_starts_without_torch() -> None:
    code = "import sys, vitscale.cli; vitscale.cli._join_commands(); print([m for m in sys.modules if m == 'torch'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", done.stderr


def test_results_are_one_line_of_json_on_stdout(tmp_path: Path, digits: Path) -> None:
    from tests.helpers.runs import CONFIG, overrides

    run = tmp_path / "run"
    trained = vitscale("train", CONFIG, *overrides(digits, run, "duration={steps: 1}"))
    assert (trained.code, trained.out) == (0, ""), trained.errors
    outcome = vitscale("evaluate", run)
    assert (outcome.code, outcome.errors) == (0, "")
    result = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1
    assert (result["step"], result["images"], result["data"]) == (1, 370, str(digits / "val"))
    assert 0 <= result["top1"] <= result["top5"] <= 1
