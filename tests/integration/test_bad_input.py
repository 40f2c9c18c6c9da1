"""Every mistake that a user makes gives one message that says what is wrong, what was allowed and what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.command import Outcome, vitscale, vitscale_on_ranks
from tests.helpers.runs import CONFIG, checkpoints_of, finish, metrics, overrides, start_training, wait_until
from tests.helpers.shardset import folder_of, make_shardset

CONFIG_ERROR, OTHER_ERROR = 2, 1
TWO_STEPS = ("duration={steps: 2}", "checkpoint.every={steps: 1}", "data.eval=null")


def assert_one_message(outcome: Outcome, code: int, *parts: object) -> None:
    """The right exit status, nothing on stdout, and one error with all ``parts`` in it."""
    assert outcome.code == code, outcome.errors
    assert outcome.out == ""
    assert "Traceback" not in outcome.errors
    assert outcome.errors.count("vitscale: error: ") == 1, outcome.errors
    message = outcome.errors.partition("vitscale: error: ")[2]
    for part in parts:
        assert str(part) in message, message


def train(digits: Path, run: Path, *more: str) -> Outcome:
    return vitscale("train", CONFIG, *overrides(digits, run, *more))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("trained") / "run"
    outcome = train(digits, run, *TWO_STEPS)
    assert outcome.code == 0, outcome.errors
    assert f"the run is finished: step 2, 32 images seen; see {run}\n" in outcome.errors
    return run


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=1", ("optim.lrr: unknown key", "did you mean 'lr'")),
        ("micro_batch_size=four", ("micro_batch_size: must be an integer", "got 'four'")),
        ("optim.lr=-1", ("optim.lr: must be greater than 0", "got -1")),
        ("optim.lr", ("not an override; write key.path=value",)),
        ("global_batch_size=15", ("global_batch_size (15) must be a multiple of micro_batch_size (4)",)),
        ("duration={percent: 10}", ("duration: percent is a share of the whole run",)),
        ("engine.zero_stage=0", ("zero_stage 0 is refused", "non-finite gradients", "use 1, 2 or 3")),
        ("loss={kind: sigmoid, label_smoothing: 0.1}", ("label_smoothing is for the softmax loss", "0.1", "sigmoid")),
        ("data.image_size=2", ("data.image_size 2x2 is smaller than one patch of ViT-mu/4", "at least 4")),
        ("data.image_size=10", ("data.image_size 10x10 cannot be cut", "multiples of 4", "[8, 8] or [12, 12]")),
        ("model.variant=ViT-Base/4", ("model.variant 'ViT-Base/4' is not known", "did you mean 'ViT-B/4'")),
        ("model.num_heads=3", ("model.embed_dim 16 is not divisible by model.num_heads 3", "2 or 4")),
        ("duration={examples: 3}", ("duration: 3 examples comes to no step at 16 images per step",)),
    ],
)
def test_a_value_that_cannot_be(digits: Path, run: Path, override: str, parts: tuple[str, ...]) -> None:
    assert_one_message(train(digits, run, override), CONFIG_ERROR, *parts)
    assert not run.exists()


def test_several_mistakes_are_told_at_once(digits: Path, run: Path) -> None:
    outcome = train(digits, run, "optim.lrr=1", "seed=x", "data.windw=3")
    assert_one_message(outcome, CONFIG_ERROR, "optim.lrr", "seed: must be an integer", "data.windw")


def test_a_configuration_file_that_is_not_there_or_not_yaml(tmp_path: Path) -> None:
    assert_one_message(vitscale("train", tmp_path / "no.yaml"), CONFIG_ERROR, "no.yaml: no such file", "check the path")
    assert_one_message(vitscale("train", tmp_path), CONFIG_ERROR, "is a folder; name the YAML file in it")
    (tmp_path / "bad.yaml").write_text("seed: 1\nrun: [a\n")
    assert_one_message(vitscale("train", tmp_path / "bad.yaml"), CONFIG_ERROR, "bad.yaml:")


def test_a_shard_set_that_is_missing_empty_or_elsewhere(digits: Path, run: Path, tmp_path: Path) -> None:
    outcome = train(digits, run, f"data.train={tmp_path / 'none'}")
    assert_one_message(outcome, OTHER_ERROR, tmp_path / "none", "no such shard set", "vitscale shards write")

    (tmp_path / "empty").mkdir()
    outcome = train(digits, run, f"data.train={tmp_path / 'empty'}")
    assert_one_message(outcome, OTHER_ERROR, "holds no index.json", "vitscale shards write")

    outcome = train(digits, run, f"data.train={digits}")
    assert_one_message(outcome, OTHER_ERROR, f"{digits}: holds no index.json", f"did you mean {digits / 'train'}?")

    outcome = train(digits, run, f"data.eval={tmp_path / 'none'}")
    assert_one_message(outcome, OTHER_ERROR, tmp_path / "none", "no such shard set")
    assert not run.exists()


def test_an_index_that_does_not_match_the_tars(digits: Path, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(digits / "train", copy)
    tar = min(copy.glob("*.tar"))
    size = tar.stat().st_size
    os.truncate(tar, size - 512)
    outcome = train(digits, run, f"data.train={copy}")
    assert_one_message(outcome, OTHER_ERROR, f"{tar.name} has {size - 512} bytes where the index says {size}")

    tar.unlink()
    assert_one_message(train(digits, run, f"data.train={copy}"), OTHER_ERROR, f"{tar.name} is missing")
    (copy / "index.json").write_text("{]")
    assert_one_message(
        train(digits, run, f"data.train={copy}"), OTHER_ERROR, "not a shard index", "write the shard set"
    )
    (copy / "index.json").write_text(json.dumps({"shardlist": []}))
    assert_one_message(train(digits, run, f"data.train={copy}"), OTHER_ERROR, "the shard set is empty")


def test_a_head_with_too_few_outputs(digits: Path, run: Path) -> None:
    outcome = train(digits, run, "model.num_classes=5", "data.eval=null")
    assert_one_message(outcome, CONFIG_ERROR, "has 10 classes", "model.num_classes is 5", "set model.num_classes=10")


def test_a_label_outside_the_head(digits: Path, run: Path, tmp_path: Path) -> None:
    """Without names of classes in the index, only the sample itself tells."""
    manifest = make_shardset(tmp_path / "set", [40], classes=None)
    outcome = train(digits, run, f"data.train={folder_of(manifest)}", "data.eval=null", "model.num_classes=5")
    assert_one_message(outcome, OTHER_ERROR, "has label", "the head has 5 outputs (0 to 4)", "set model.num_classes")


def test_several_labels_with_a_softmax_loss(digits: Path, run: Path, tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path / "set", [40], multi_label=True)
    outcome = train(digits, run, f"data.train={folder_of(manifest)}", "data.eval=null")
    assert_one_message(outcome, CONFIG_ERROR, "images have several labels", "set loss.kind=sigmoid")


def test_more_classes_to_evaluate_on_than_the_head_has(digits: Path, run: Path, trained: Path, tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path / "set", [20], classes=11)
    for outcome in (
        train(digits, run, f"data.eval={folder_of(manifest)}"),
        vitscale("evaluate", trained, "--data", folder_of(manifest)),
    ):
        assert_one_message(outcome, OTHER_ERROR, "has 11 classes", "the model's head has 10 outputs")


def test_a_held_out_set_whose_labels_mean_something_else(
    digits: Path, run: Path, trained: Path, tmp_path: Path
) -> None:
    other = make_shardset(tmp_path / "set", [20]).location
    for outcome in (train(digits, run, f"data.eval={other}"), vitscale("evaluate", trained, "--data", other)):
        assert_one_message(outcome, OTHER_ERROR, f"{other}: label 0 is 'class 0', but '0' in the training set", "write")
    assert not run.exists()
    outcome = vitscale("fewshot", trained, "--train", digits / "train", "--test", other)
    assert_one_message(outcome, OTHER_ERROR, f"label 0 is 'class 0', but '0' in {digits / 'train'}")


def test_a_held_out_set_without_a_readable_image(digits: Path, trained: Path, tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path / "set", [3], parts=lambda n: {"png": b"no image", "cls": b"1"}, classes=None)
    outcome = vitscale_on_ranks(2, "evaluate", trained, "--data", folder_of(manifest))
    assert_one_message(outcome, OTHER_ERROR, "none of 3 images can be read", "write the shard set again")
    for sets in ((digits / "train", folder_of(manifest)), (folder_of(manifest), digits / "train")):
        outcome = vitscale("fewshot", trained, "--train", sets[0], "--test", sets[1], "--shots", "1")
        assert_one_message(outcome, OTHER_ERROR, f"{folder_of(manifest)}: none of 3 images can be read")


def test_a_number_of_ranks_that_does_not_fit(digits: Path, run: Path) -> None:
    outcome = vitscale_on_ranks(3, "train", CONFIG, *overrides(digits, run))
    fitting = "world sizes that fit: 1, 2, 4; start one of these"
    assert_one_message(outcome, OTHER_ERROR, "makes 4 micro-batches, which 3 ranks cannot share evenly", fitting)
    assert not run.exists()


def test_ranks_that_cannot_be_started(digits: Path, run: Path) -> None:
    arguments = ("train", CONFIG, *overrides(digits, run))
    assert_one_message(vitscale(*arguments, "--nproc", "0"), OTHER_ERROR, "--nproc is 0; allowed is 1 or more")
    assert_one_message(
        vitscale(*arguments, RANK="0"), OTHER_ERROR, "WORLD_SIZE is not set", "--nproc, torchrun or srun"
    )
    outcome = vitscale(*arguments, RANK="x", WORLD_SIZE="1", LOCAL_RANK="0")
    assert_one_message(outcome, OTHER_ERROR, "RANK is 'x'; a whole number is needed")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        outcome = vitscale(
            *arguments, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    assert_one_message(outcome, OTHER_ERROR, f"at 127.0.0.1:{port}", "address already in use", "set MASTER_ADDR and")
    assert not run.exists()


def test_ranks_within_ranks_are_refused(digits: Path, run: Path) -> None:
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_NODES": "2"}
    task |= {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for environment in (task, torchrun):
        outcome = vitscale("train", CONFIG, *overrides(digits, run), "--nproc", "2", **environment)
        said = "--nproc starts ranks, but torchrun or srun has started 4 already; omit --nproc"
        assert_one_message(outcome, OTHER_ERROR, said)
    assert not run.exists()


def test_the_run_folder_of_another_run(digits: Path, trained: Path) -> None:
    before = sorted(path.name for path in trained.iterdir())
    outcome = train(digits, trained, *TWO_STEPS, "seed=1")
    assert_one_message(
        outcome, CONFIG_ERROR, f"{trained} belongs to a run with another configuration", "seed: 0 -> 1", "run=..."
    )
    assert "optim" not in outcome.errors, "only what differs is shown"
    assert sorted(path.name for path in trained.iterdir()) == before


def test_a_second_start_of_a_run_is_refused_and_the_first_goes_on(digits: Path, run: Path) -> None:
    arguments = overrides(digits, run, "duration={steps: 120}", "checkpoint.every={steps: 40}", "data.eval=null")
    first = start_training(arguments, nproc=None)
    try:
        assert wait_until(lambda: len(metrics(run)) >= 3 or first.poll() is not None)
        # Held in the middle of a step, however long the second one takes.
        first.send_signal(signal.SIGSTOP)
        assert wait_until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        # The first command of a process waits for the imports of the one that it is forked from.
        vitscale("--help")
        start = time.monotonic()
        second = vitscale("train", CONFIG, *arguments)
        assert time.monotonic() - start < 20
        lock = f"run: {run} is being trained by another attempt (attempt 1 on {socket.gethostname()} since "
        assert_one_message(second, OTHER_ERROR, lock, "wait for it, stop it, or choose another folder with run=...")
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    finally:
        first.send_signal(signal.SIGCONT)
    errors = finish(first)
    assert f"the run is finished: step 120, 1,920 images seen; see {run}\n" in errors
    assert [record["step"] for record in metrics(run)] == list(range(1, 121))
    assert {record["attempt"] for record in metrics(run)} == {1}
    assert checkpoints_of(run) == ["step-000000120", "step-000000080", "step-000000040"]
    assert len((run / "attempts.jsonl").read_text().splitlines()) == 1


def test_a_finished_run_that_is_started_again_says_so(digits: Path, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    outcome = train(digits, run, *TWO_STEPS)
    assert (outcome.code, outcome.out) == (0, "")
    said = f"the run was finished before; nothing was left to do: step 2, 32 images seen; see {run}\n"
    assert outcome.errors.endswith(said)
    assert "the run is finished" not in outcome.errors
    touched = {path.name for path, content in before.items() if path.read_bytes() != content}
    written = {"attempts.jsonl", "config.yaml", "rank-00000.json"}
    assert touched == written, "the copy has another path, one more attempt, and a sign of life of it"


def test_a_run_folder_that_cannot_be_written(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = train(digits, tmp_path / "file" / "run")
    assert_one_message(outcome, CONFIG_ERROR, "run: cannot write to", "Not a directory", "another folder with run=...")


def test_evaluate_what_is_no_run_or_has_no_checkpoint(trained: Path, digits: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert_one_message(vitscale("evaluate", folder), OTHER_ERROR, f"{folder}: not a run folder", "'vitscale train'")
    outcome = vitscale_on_ranks(2, "evaluate", tmp_path)
    assert_one_message(outcome, OTHER_ERROR, f"{tmp_path}: not a run folder")
    shutil.copy(trained / "config.yaml", tmp_path)
    outcome = vitscale("evaluate", tmp_path, "--data", digits / "val")
    assert_one_message(outcome, OTHER_ERROR, "holds no checkpoint; train first")


def test_evaluate_what_the_run_does_not_have(trained: Path, digits: Path, tmp_path: Path) -> None:
    assert_one_message(vitscale("evaluate", trained), CONFIG_ERROR, "the run has no data.eval", "--data")
    outcome = vitscale("evaluate", trained, "--data", digits / "val", "--step", "7")
    assert_one_message(outcome, OTHER_ERROR, "no checkpoint of step 7; there are: 2, 1")
    outcome = vitscale("evaluate", trained, "--data", digits)
    assert_one_message(outcome, OTHER_ERROR, f"did you mean {digits / 'train'}?")


def test_evaluation_takes_overrides_of_how_data_is_read_and_no_others(trained: Path, digits: Path) -> None:
    pipe = f"pipe:cat {digits / 'val'}/{{name}}"
    few = ("fewshot", trained, "--train", digits / "train", "--test", pipe, "--shots", "1", "--seeds", "1")
    for arguments in (("evaluate", trained, "--data", pipe), few):
        assert_one_message(vitscale(*arguments), OTHER_ERROR, "data.storage.allow_pipe=true")
        outcome = vitscale(*arguments, "data.storage.allow_pipe=true", "data.workers=1")
        assert (outcome.code, json.loads(outcome.out)["step"]) == (0, 2), outcome.errors
        outcome = vitscale(*arguments, "data.storage.allow_pipe=true", "model.depth=3")
        assert_one_message(outcome, CONFIG_ERROR, "model.depth: is what the run was trained with", "data.storage.*")
    assert_one_message(vitscale("evaluate", trained, "data.workers=0"), CONFIG_ERROR, "data.workers", "greater than 0")


def test_fewshot_with_what_it_cannot_use(trained: Path, digits: Path, tmp_path: Path) -> None:
    sets = ("--train", digits / "train", "--test", digits / "val")
    for junk in ("x", "0", "1,,5", "-1", "1.5"):
        outcome = vitscale("fewshot", trained, *sets, "--shots", junk)
        assert_one_message(outcome, CONFIG_ERROR, f"--shots is {junk!r}", "positive whole numbers separated by commas")
    outcome = vitscale_on_ranks(2, "fewshot", trained, *sets, "--shots", "x")
    assert_one_message(outcome, CONFIG_ERROR, "--shots is 'x'")
    outcome = vitscale("fewshot", trained, *sets, "--shots", "5,500")
    assert_one_message(outcome, OTHER_ERROR, "images, but 500 shots are needed; ask for fewer with --shots")
    outcome = vitscale("fewshot", trained, "--train", digits / "train", "--test", tmp_path / "none")
    assert_one_message(outcome, OTHER_ERROR, tmp_path / "none", "no such shard set")


def test_a_damaged_checkpoint_is_named(trained: Path, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for checkpoint in (run / "checkpoints").glob("step-*"):
        file = next(checkpoint.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    outcome = vitscale("evaluate", run, "--data", digits / "val")
    assert_one_message(outcome, OTHER_ERROR, "no complete checkpoint", "step-000000002", "has other content")
