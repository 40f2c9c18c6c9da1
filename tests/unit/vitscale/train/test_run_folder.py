"""Whose run folder it is, which attempt this is, and which records survive a resume."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vitscale.train.run_folder as run_folder
from tests.helpers.runs import CONFIG, TINY, environment
from tests.helpers.shardset import as_mixture
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import FileRecord, manifest_text, step_name, step_of
from vitscale.checkpoint.store import checkpoint_names
from vitscale.config.loader import load_config
from vitscale.config.schema import TrainConfig
from vitscale.data.manifest import Manifest, ShardInfo
from vitscale.errors import CheckpointError, ConfigError, LaunchError
from vitscale.plan import RunPlan
from vitscale.train.changes import AUTO, Resume, ResumePolicy
from vitscale.train.records import StepRecords
from vitscale.train.run_folder import Continuation, RunLock, check_policy, check_run, record_attempt

DATA = "a" * 64


def config_of(run: Path, *overrides: str) -> TrainConfig:
    return load_config(CONFIG, [*TINY, f"run={run}", *overrides])


def plan_of(config: TrainConfig, *, world_size: int = 1, samples: int = 1427) -> RunPlan:
    manifest = Manifest("data", (ShardInfo("a.tar", samples, 10_000),))
    return RunPlan.create(config, world_size, as_mixture(manifest, slots=config.global_batch_size))


def start(
    config: TrainConfig,
    *allow_change: str,
    resume: Resume = Resume.AUTO,
    data: str = DATA,
    world_size: int = 1,
    samples: int = 1427,
    restored_step: int | None = None,
) -> tuple[int, list[str], Continuation]:
    """Open the run as training does; gives the attempt, what was said and what was found."""
    said: list[str] = []
    lock = RunLock(config.run)
    lock.take()
    try:
        plan = plan_of(config, world_size=world_size, samples=samples)
        found = check_run(config, plan, data, ResumePolicy(resume, allow_change), say=said.append)
        return record_attempt(config, plan, found, restored_step), said, found
    finally:
        # The end of a process frees its lock; here, the frames of a caught error would hold it.
        del lock


def enter(config: TrainConfig, *, world_size: int = 1) -> tuple[int, list[str]]:
    """The same, of which the attempt and what was said are enough."""
    return start(config, world_size=world_size)[:2]


def commit(run: Path, step: int, *, data: str = DATA) -> Path:
    """A complete checkpoint, as far as the run folder looks into it."""
    folder, name, file = LocalFolder(run / "checkpoints"), step_name(step), "rank-00000.safetensors"
    folder.stage(name)
    folder.write(name, file, [memoryview(b"1")])
    folder.publish(name, manifest_text({"step": step, "data_digest": data}, [FileRecord(file, 1, (0,))]))
    return folder.path / name


def compares(found: Continuation, run: Path) -> bool:
    """Whether the learning rate is compared with that of the newest checkpoint."""
    return step_of(checkpoint_names(LocalFolder(run / "checkpoints"))[0]) in found.same_lr_steps


def attempts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def absolute(config: TrainConfig) -> TrainConfig:
    """What is kept of a configuration whose checkpoints lie in the run folder."""
    assert config.data.eval is not None
    assert isinstance(config.data.train, str)
    here = str(Path.cwd())
    data = dataclasses.replace(config.data, train=f"{here}/{config.data.train}", eval=f"{here}/{config.data.eval}")
    return dataclasses.replace(config, run=Path.cwd() / config.run, data=data)


def test_a_fresh_folder_gets_configuration_and_plan(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    config = config_of(run)
    assert enter(config) == (1, [])
    assert load_config(run / "config.yaml") == absolute(config)
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["total_steps"], plan["gradient_accumulation_steps"]) == (12, 4)
    assert sorted(path.name for path in run.iterdir()) == [".lock", "attempts.jsonl", "config.yaml", "plan.json"]


def test_attempts_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    for number, world_size in enumerate((1, 2, 4), start=1):
        assert enter(config_of(tmp_path), world_size=world_size)[0] == number
    assert [(r["attempt"], r["world_size"], r["slurm_job_id"]) for r in attempts(tmp_path)] == [
        (1, 1, "77"),
        (2, 2, "77"),
        (3, 4, "77"),
    ]


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("optim.lr=2e-3", "optim.lr: 0.001 -> 0.002"),
        ("global_batch_size=32", "global_batch_size: 16 -> 32"),
        ("data.window=4", "data.window: 8 -> 4"),
        ("data.flip=true", "data.flip: false -> true"),
        ("model.dropout=0.2", "model.dropout: 0.1 -> 0.2"),
        ("engine.precision=bf16", "engine.precision: fp32 -> bf16"),
        ("loss.label_smoothing=0.1", "loss.label_smoothing: 0.0 -> 0.1"),
    ],
)
def test_a_change_of_the_run_is_refused_and_shown(tmp_path: Path, override: str, shown: str) -> None:
    enter(config_of(tmp_path))
    commit(tmp_path, 4)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        enter(config_of(tmp_path, override, "data.workers=3"))
    message = str(caught.value)
    assert f"run: {tmp_path} belongs to a run with another configuration" in message
    assert [line.strip() for line in message.splitlines() if "->" in line] == [shown]
    assert "run=..." in message
    # Nothing was touched, and the right configuration still goes on as the next attempt.
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert enter(config_of(tmp_path))[0] == 2


def test_the_check_writes_nothing(tmp_path: Path) -> None:
    enter(config_of(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    said: list[str] = []
    config = config_of(tmp_path, "data.workers=3")
    check_run(config, plan_of(config), DATA, say=said.append)
    assert said == ["changed since the last attempt: data.workers: 1 -> 3"]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_passwords_and_signatures_are_not_said(tmp_path: Path) -> None:
    first = "data.train=https://ann:hush-1@host/a?sig=hush-2"
    enter(config_of(tmp_path, first))
    second = 'data.train={"https://ann:hush-3@host/a?sig=hush-4": 1, "https://host": 2}'
    _, said = enter(config_of(tmp_path, second))
    assert said == [
        'changed since the last attempt: data.train: "https://host/a" -> {"https://host/a": 1.0, "https://host": 2.0} '
        "(passwords and queries left out)"
    ]


def test_passwords_and_signatures_are_not_recorded(tmp_path: Path) -> None:
    enter(config_of(tmp_path, "data.train=https://ann:hush-1@host/a?sig=hush-2"))
    commit(tmp_path, 4)
    enter(config_of(tmp_path, "data.train=https://ann:hush-3@host/a?sig=hush-4"))
    shown = 'data.train: "https://host/a" -> "https://host/a" (passwords and queries left out)'
    assert attempts(tmp_path)[1]["changed"] == [{"key": "data.train", "change": shown, "forced": False}]
    assert "hush" not in (tmp_path / "attempts.jsonl").read_text()


@pytest.mark.parametrize(
    "train", ["https://ann:hush@host/a", "https://host/a?sig=hush", '{"https://host/a?k=hush": 1}']
)
def test_a_configuration_with_a_password_is_for_its_owner_only(tmp_path: Path, train: str) -> None:
    path = tmp_path / "config.yaml"
    enter(config_of(tmp_path))
    usual = path.stat().st_mode & 0o777
    assert usual == (tmp_path / "plan.json").stat().st_mode & 0o777
    assert usual & 0o044
    enter(config_of(tmp_path, f"data.train={train}"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert "hush" in path.read_text()
    enter(config_of(tmp_path, "data.train=https://host/a"))
    assert path.stat().st_mode & 0o777 == usual


def test_a_run_without_a_checkpoint_may_start_anew_otherwise(tmp_path: Path) -> None:
    enter(config_of(tmp_path))
    number, said = enter(config_of(tmp_path, "seed=1"))
    assert number == 2
    assert said == ["changed since the last attempt: seed: 0 -> 1"]
    assert "seed: 1" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("micro_batch_size=8", "micro_batch_size"),
        ("data.workers=3", "data.workers"),
        ("data.train=elsewhere", "data.train"),
        ("data.max_bad_share=0.5", "data.max_bad_share"),
        ("engine.zero_stage=3", "engine.zero_stage"),
        ("engine.timeout_s=400", "engine.timeout_s"),
        ("engine.max_skipped_steps=9", "engine.max_skipped_steps"),
        ("data.eval=elsewhere", "data.eval"),
        ("data.eval_crop_share=0.9", "data.eval_crop_share"),
        ("data.prefetch_batches=9", "data.prefetch_batches"),
        ("data.max_bad_samples=9", "data.max_bad_samples"),
        ("checkpoint.keep=9", "checkpoint.keep"),
        ("checkpoint.every={steps: 2}", "checkpoint.every"),
        ("evaluation.every={steps: 5}", "evaluation.every"),
        ("log.every={steps: 5}", "log.every"),
        ("model.activation_checkpointing=true", "model.activation_checkpointing"),
    ],
)
def test_a_change_of_how_it_is_run_is_said_and_kept(tmp_path: Path, override: str, key: str) -> None:
    enter(config_of(tmp_path))
    commit(tmp_path, 4)
    changed = config_of(tmp_path, override)
    attempt, said = enter(changed)
    assert attempt == 2
    assert len(said) == 1
    assert said[0].startswith(f"changed since the last attempt: {key}: ")
    assert load_config(tmp_path / "config.yaml") == absolute(changed)


def test_a_moved_run_folder_is_still_the_run(tmp_path: Path) -> None:
    enter(config_of(tmp_path / "here"))
    commit(tmp_path / "here", 4)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = f"changed since the last attempt: run: {tmp_path / 'here'} -> {tmp_path / 'there'}"
    assert enter(config_of(tmp_path / "there")) == (2, [moved])


def test_paths_are_kept_and_compared_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    assert enter(config_of(Path("run"), "data.train=a", "data.eval=b")) == (1, [])
    kept = load_config(tmp_path / "run" / "config.yaml")
    assert (kept.run, kept.data.train, kept.data.eval) == (tmp_path / "run", str(tmp_path / "a"), str(tmp_path / "b"))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    monkeypatch.chdir(tmp_path / "deep")
    same = config_of(tmp_path / "run", f"data.train={tmp_path / 'a'}", f"data.eval={tmp_path / 'b'}")
    assert enter(same) == (2, [])
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    # The same words mean another folder from here.
    assert enter(config_of(tmp_path / "run", "data.train=a", "data.eval=null")) == (
        3,
        [
            f"changed since the last attempt: data.train: {tmp_path / 'a'} -> {tmp_path / 'deep' / 'a'}",
            f"changed since the last attempt: data.eval: {tmp_path / 'b'} -> null",
        ],
    )


def test_the_folder_of_the_checkpoints_is_kept_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    enter(config_of(Path("run"), "checkpoint.folder=kept/here"))
    assert load_config(tmp_path / "run" / "config.yaml").checkpoint.folder == str(tmp_path / "kept" / "here")


def test_a_longer_run_is_noted_and_its_learning_rate_not_compared(tmp_path: Path) -> None:
    start(config_of(tmp_path))
    commit(tmp_path, 4)
    longer = config_of(tmp_path, "duration={steps: 20}")
    _, said, found = start(longer, restored_step=4)
    assert said == [
        "changed since the last attempt: duration: {steps: 12} -> {steps: 20}: the learning rate changes from step 4 "
        "on; steps already made stay as they are"
    ]
    assert not compares(found, tmp_path)
    # It was killed before it saved: the checkpoint is still of the shorter run.
    assert start(longer, restored_step=4)[1:] == ([], dataclasses.replace(found, changes=()))
    # Now it has saved.
    commit(tmp_path, 8)
    assert compares(start(longer, restored_step=8)[2], tmp_path)
    # The newest one was damaged, so that the old one counts again.
    (tmp_path / "checkpoints" / "step-000000008").rename(tmp_path / "checkpoints" / "damaged-step-000000008")
    assert not compares(start(longer, restored_step=4)[2], tmp_path)
    assert [record["restored_step"] for record in attempts(tmp_path)] == [None, 4, 4, 8, 4]


def test_a_change_that_was_taken_back_before_a_checkpoint_is_none(tmp_path: Path) -> None:
    start(config_of(tmp_path))
    commit(tmp_path, 4)
    start(config_of(tmp_path, "schedule.final_lr=1e-5"), restored_step=4)
    _, said, found = start(config_of(tmp_path), restored_step=4)
    assert said == [
        "changed since the last attempt: schedule.final_lr: 1e-05 -> 0.0: this comes to the same learning rates"
    ]
    assert compares(found, tmp_path)


@pytest.mark.parametrize(
    ("override", "same_lr"),
    [
        ("duration={examples: 192}", True),
        ("duration={steps: 13}", False),
        ("schedule.warmup={steps: 3}", True),
        ("schedule.warmup={steps: 4}", False),
        ("schedule.decay=linear", False),
        ("schedule.final_lr=1e-5", False),
        ("optim.lr=2e-3", False),
        ("optim.betas=[0.8, 0.9]", True),
        ("data.workers=3", True),
    ],
)
def test_the_learning_rate_is_compared_unless_it_was_changed(tmp_path: Path, override: str, same_lr: bool) -> None:
    enter(config_of(tmp_path))
    commit(tmp_path, 4)
    allowed = [override.partition("=")[0]] if override.startswith("optim") else []
    assert compares(start(config_of(tmp_path, override), *allowed)[2], tmp_path) == same_lr


def test_a_run_cannot_become_shorter_than_it_is(tmp_path: Path) -> None:
    enter(config_of(tmp_path))
    commit(tmp_path, 8)
    with pytest.raises(ConfigError) as caught:
        enter(config_of(tmp_path, "duration={steps: 7}"))
    assert str(caught.value) == (
        f"duration: 7 steps comes to 7 steps, but the run in {tmp_path} has made 8 already; give 8 steps or more, or "
        f"choose another folder with run=..."
    )
    assert start(config_of(tmp_path, "duration={steps: 8}"))[0] == 2


def test_another_number_of_ranks_is_noted_and_recorded(tmp_path: Path) -> None:
    enter(config_of(tmp_path), world_size=2)
    commit(tmp_path, 4)
    said = "world_size: 2 -> 4: the same global batches, summed in another order and with other dropout masks"
    assert enter(config_of(tmp_path), world_size=4) == (2, [f"changed since the last attempt: {said}"])
    changed = {"key": "world_size", "change": "world_size: 2 -> 4", "forced": False}
    assert attempts(tmp_path)[1]["changed"] == [changed]
    assert enter(config_of(tmp_path), world_size=4) == (3, [])


def test_a_forced_change_is_said_loudly_recorded_and_stays_in_the_command(tmp_path: Path) -> None:
    enter(config_of(tmp_path))
    commit(tmp_path, 4)
    forced = config_of(tmp_path, "optim.betas=[0.8, 0.9]", "log.every={steps: 2}")
    _, said, found = start(forced, "optim", restored_step=4)
    assert said[0].startswith("FORCED by --allow-change: optim.betas: [0.9, 0.999] -> [0.8, 0.9]: the optimizer's rule")
    assert "from step 4 on" in said[0]
    assert [change["key"] for change in attempts(tmp_path)[1]["changed"] if change["forced"]] == ["optim.betas"]
    assert [change["key"] for change in attempts(tmp_path)[1]["changed"]] == ["optim.betas", "log.every"]
    assert not found.free_data
    # A job that is put back into the queue gives the same command.
    assert start(forced, "optim", restored_step=4)[:2] == (3, [])
    with pytest.raises(ConfigError, match="--allow-change seed: no such key has changed and needs it"):
        start(forced, "seed", restored_step=4)


def test_what_cannot_change_cannot_be_forced(tmp_path: Path) -> None:
    enter(config_of(tmp_path))
    commit(tmp_path, 4)
    for override in ("global_batch_size=32", "model.depth=3", "model.num_heads=4", "data.image_size=16"):
        key = override.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"  {key}: .*\n    cannot change: ") as caught:
            start(config_of(tmp_path, override), key)
        assert "--allow-change" not in str(caught.value)


def test_another_content_of_the_data_is_refused_unless_forced(tmp_path: Path) -> None:
    enter(config_of(tmp_path))
    checkpoint, other = commit(tmp_path, 4), "b" * 64
    with pytest.raises(CheckpointError) as caught:
        start(config_of(tmp_path), data=other)
    assert str(caught.value).startswith(f"{checkpoint}: was trained on other data: another content of the shards, or")
    assert str(caught.value).endswith("or, if this is meant, add --allow-change data.train")
    _, said, found = start(config_of(tmp_path), "data.train", data=other, restored_step=4)
    assert said == [
        "FORCED by --allow-change: data.train: content aaaaaaaaaaaa -> bbbbbbbbbbbb: the training images change from "
        "step 4 on; epochs count as if all steps before had been made on these"
    ]
    assert found.free_data
    # Killed before it saved; with and without the option, the checkpoint is that of the former images.
    for allowed in (["data.train"], []):
        _, said, found = start(config_of(tmp_path), *allowed, data=other, restored_step=4)
        assert (said, found.free_data) == ([], True)
    with pytest.raises(CheckpointError, match="was trained on other data"):
        start(config_of(tmp_path), data="c" * 64)
    commit(tmp_path, 8, data=other)
    # An older checkpoint, of the former images, may have to stand in for this one.
    assert start(config_of(tmp_path), "data.train", data=other, restored_step=8)[2].free_data
    with pytest.raises(CheckpointError, match="was trained on other data"):
        start(config_of(tmp_path), restored_step=8)


def test_data_of_another_size_that_are_forced_change_the_learning_rate_too(tmp_path: Path) -> None:
    config = config_of(tmp_path, "duration={epochs: 2}")
    start(config)
    commit(tmp_path, 4)
    assert not compares(start(config, "data.train", data="b" * 64, samples=3000)[2], tmp_path)


def test_an_allowance_of_a_run_without_a_checkpoint_is_not_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="changed since the last attempt: nothing; of this"):
        start(config_of(tmp_path), "seed")
    enter(config_of(tmp_path))
    with pytest.raises(ConfigError, match=r"changed since the last attempt: seed; of this, .* is for: nothing"):
        start(config_of(tmp_path, "seed=1"), "seed")


def test_a_checkpoint_whose_manifest_is_damaged_still_makes_the_run(tmp_path: Path) -> None:
    enter(config_of(tmp_path))
    (commit(tmp_path, 4) / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="from step 4 on"):
        enter(config_of(tmp_path, "seed=1"))
    # An older one that is whole is the one that would be loaded.
    commit(tmp_path, 2)
    with pytest.raises(ConfigError, match="from step 2 on"):
        enter(config_of(tmp_path, "seed=1"))


def test_a_checkpoint_that_must_be_there_or_must_not(tmp_path: Path) -> None:
    run, config = tmp_path / "run", config_of(tmp_path / "run")
    must, never = ResumePolicy(Resume.MUST), ResumePolicy(Resume.NEVER)
    with pytest.raises(ConfigError) as caught:
        check_policy(config, must)
    assert str(caught.value) == (
        f"--resume must: there is no checkpoint in {run / 'checkpoints'}; check run=... and checkpoint.folder, or "
        f"leave --resume out to begin a run there"
    )
    assert not run.exists()
    for policy in (never, AUTO):
        check_policy(config, policy)
    assert start(config, resume=Resume.NEVER)[0] == 1
    commit(run, 4)
    commit(run, 8)
    with pytest.raises(ConfigError) as caught:
        start(config, resume=Resume.NEVER)
    assert str(caught.value) == (
        f"--resume never: {run / 'checkpoints'} holds 2 checkpoints, the newest being step-000000008; choose another "
        f"folder with run=..., or leave --resume out to continue that run"
    )
    assert start(config, resume=Resume.MUST, restored_step=8)[0] == 2
    elsewhere = config_of(run, f"checkpoint.folder={tmp_path / 'kept'}")
    with pytest.raises(ConfigError, match=re.escape(f"no checkpoint in {tmp_path / 'kept'}; check run=...")):
        check_policy(elsewhere, must)
    check_policy(elsewhere, never)


def test_damage_that_is_found_late_does_not_start_anew_what_must_continue(tmp_path: Path) -> None:
    enter(config_of(tmp_path))
    commit(tmp_path, 4)
    before = (tmp_path / "attempts.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"--resume must: no checkpoint in .*/checkpoints is complete, and the"):
        start(config_of(tmp_path), resume=Resume.MUST, restored_step=None)
    assert (tmp_path / "attempts.jsonl").read_bytes() == before


def test_a_run_that_another_attempt_trains_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.2)
    for _ in range(2):
        enter(config_of(tmp_path))
    hold = "import sys; from pathlib import Path; from vitscale.train.run_folder import RunLock\n"
    hold += "lock = RunLock(Path(sys.argv[1])); lock.take(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"}
        with pytest.raises(LaunchError) as caught:
            RunLock(tmp_path).take()
        assert re.fullmatch(
            re.escape(f"run: {tmp_path} is being trained by another attempt (attempt 2 on {socket.gethostname()} since")
            + r" \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\); wait for it, stop it, or choose another folder with run=\.\.\.",
            str(caught.value),
        )
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"} == before
        process.kill()
        process.wait()
        RunLock(tmp_path).take()


def test_an_attempt_that_has_not_signed_yet_keeps_others_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.0)
    lock = RunLock(tmp_path)
    lock.take()
    with pytest.raises(LaunchError, match=r"is being trained by another attempt \(which has only just begun\); wait"):
        RunLock(tmp_path).take()


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"run: cannot write to .*Not a directory; choose another folder"):
        enter(config_of(file / "run"))
    with pytest.raises(ConfigError, match=r"run: cannot write to .*File exists; choose another folder"):
        enter(config_of(file))


def test_a_folder_that_fills_up_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ConfigError, match=r"run: cannot write to .*No space left on device; choose another folder"):
        enter(config_of(tmp_path))


def records_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_records(path: Path, steps: list[int], *, restored_step: int) -> None:
    records = StepRecords(path, restored_step=restored_step)
    for step in steps:
        records.append({"step": step, "loss": step / 3})
    records.close()


def test_undone_records_move_aside_and_twice_is_once(tmp_path: Path) -> None:
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.rolled_back.jsonl"
    write_records(path, [1, 2, 3, 4, 5], restored_step=0)
    assert not aside.exists()
    for _ in range(2):
        records = StepRecords(path, restored_step=3)
        assert [r["step"] for r in records.records] == [1, 2, 3]
        records.close()
        assert [r["step"] for r in records_in(path)] == [1, 2, 3]
        assert [r["step"] for r in records_in(aside)] == [4, 5]
    write_records(path, [4, 5, 6], restored_step=3)
    write_records(path, [6], restored_step=5)
    assert [r["step"] for r in records_in(path)] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records_in(aside)] == [4, 5, 6]
    assert records_in(path)[1] == {"step": 2, "loss": 2 / 3}


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "\0\0\0\0", "[3]", '{"loss": 1.0}\n'])
def test_a_torn_last_line_is_dropped_and_never_glued_to_the_next(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_records(path, [1, 2], restored_step=0)
    with path.open("a") as file:
        file.write(torn)
    write_records(path, [3, 4], restored_step=2)
    assert [r["step"] for r in records_in(path)] == [1, 2, 3, 4]


def test_a_whole_last_record_without_its_line_break_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_records(path, [1, 2], restored_step=0)
    path.write_text(path.read_text().rstrip("\n"))
    write_records(path, [3], restored_step=2)
    assert [r["step"] for r in records_in(path)] == [1, 2, 3]
    assert not (tmp_path / "metrics.rolled_back.jsonl").exists()


def test_bytes_that_are_no_text_do_not_stop_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_records(path, [1], restored_step=0)
    with path.open("ab") as file:
        file.write(b"\xff\xfe\x80")
    write_records(path, [2], restored_step=1)
    assert [r["step"] for r in records_in(path)] == [1, 2]


def test_an_untouched_file_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_records(path, [1, 2], restored_step=0)
    inode = path.stat().st_ino
    write_records(path, [3], restored_step=2)
    assert path.stat().st_ino == inode


def test_records_are_on_the_disk_after_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    records = StepRecords(path, restored_step=0)
    records.append({"step": 1})
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    records.sync()
    assert synced == [(path, '{"step": 1}\n')]
    records.close()


def test_numbers_that_are_not_finite_are_null_as_json_has_none(tmp_path: Path) -> None:
    records = StepRecords(tmp_path / "metrics.jsonl", restored_step=0)
    records.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5, "mfu": None})
    records.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.5, "mfu": null}\n'


def test_an_older_checkpoint_is_judged_by_its_own_attempt(tmp_path: Path) -> None:
    start(config_of(tmp_path))
    commit(tmp_path, 4)
    longer = config_of(tmp_path, "duration={steps: 20}")
    start(longer, restored_step=4)
    commit(tmp_path, 8)
    # Step 8 may turn out to be damaged only when it is read.
    assert start(longer, restored_step=8)[2].same_lr_steps == {8}


def test_data_that_were_forced_once_may_differ_in_an_older_checkpoint(tmp_path: Path) -> None:
    start(config_of(tmp_path))
    commit(tmp_path, 4)
    start(config_of(tmp_path), "data.train", data="b" * 64, restored_step=4)
    commit(tmp_path, 8, data="b" * 64)
    assert start(config_of(tmp_path), data="b" * 64, restored_step=8)[2].free_data
    # Nobody has allowed anything else.
    with pytest.raises(CheckpointError, match="was trained on other data"):
        start(config_of(tmp_path), data="c" * 64)


def test_checkpoints_that_lie_elsewhere_are_not_forgotten(tmp_path: Path) -> None:
    enter(config_of(tmp_path))
    commit(tmp_path, 4)
    with pytest.raises(ConfigError, match=r"checkpoint\.folder: the checkpoints of this run, the newest .* lie in"):
        enter(config_of(tmp_path, f"checkpoint.folder={tmp_path / 'elsewhere'}"))
    assert attempts(tmp_path)[-1]["attempt"] == 1


def test_records_wait_for_room_on_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    records = StepRecords(path, restored_step=0)
    records.append({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        for step in (2, 3):
            records.append({"step": step})
        with pytest.raises(OSError, match="File too large"):
            records.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert caplog.text.count("cannot be written yet: File too large; its records are kept") == 1
    records.append({"step": 4})
    records.sync()
    assert [record["step"] for record in records_in(path)] == [1, 2, 3, 4]
