"""Pre-train, then fine-tune at another resolution with a new head: real commands on digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.command import Outcome, vitscale, vitscale_on_ranks
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import CONFIG, checkpoint_of, checkpoints_of, overrides, trajectory
from tests.helpers.stopping import train_and_stop
from vitscale.checkpoint.format import AVERAGE, BUFFER, MASTER, MOMENTUM
from vitscale.checkpoint.reading import read_parameters
from vitscale.weights.choices import ResizeMode
from vitscale.weights.resize import resize_position_embedding

pytestmark = pytest.mark.timeout(180)

# A hidden layer that a fine-tuning drops; an average that differs from the weights.
PRE = ("model.pool=token", "model.representation_layer=true", "optim.ema_decay=0.5", "data.eval=null")
RESIZED = 16


def fine_tuning(digits: Path, pre: Path, run: Path, *more: str) -> list[str]:
    """Overrides of a run that begins with another's weights."""
    return overrides(
        digits,
        run,
        f"init.path={pre}",
        "init.resize=bilinear_align_corners",
        f"data.image_size={RESIZED}",
        "model.pool=token",
        "model.representation_layer=false",
        "optim={kind: sgd, lr: 0.03, weight_decay: 0}",
        *more,
    )


@pytest.fixture(scope="module")
def pre(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pre") / "run"
    done = vitscale("train", CONFIG, *overrides(digits, run, *PRE, "duration={steps: 6}", "optim.lr=1e-2"))
    assert done.code == 0, done.errors
    return run


def state(run: Path, step: int | None = None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by name and kind."""
    checkpoint = checkpoint_of(run, step)
    return {
        f"{name}|{kind}": values
        for kind in checkpoint.content["digests"].keys() - {BUFFER}
        for name, values in read_parameters(checkpoint, kind).items()
    }


def assert_same(run: Path, reference: Path) -> None:
    left, right = state(run), state(reference)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def attempts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def train(*arguments: str) -> Outcome:
    return vitscale("train", CONFIG, *arguments)


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "fp32"), pytest.param(2, "bf16", marks=pytest.mark.slow), (3, "bf16")]
)
def test_a_run_begins_with_exactly_the_other_runs_weights(
    digits: Path, pre: Path, tmp_path: Path, weights: str, stage: int, precision: str
) -> None:
    """The first update has learning rate 0, so that the checkpoint after it tells what the run began with."""
    run = tmp_path / "run"
    more = [f"init.weights={weights}", f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    more += ["duration={steps: 1}", "schedule.warmup={steps: 1}", "model.num_classes=12", "optim.ema_decay=0.9"]
    done = vitscale_on_ranks(2, "train", CONFIG, *fine_tuning(digits, pre, run, *more, "data.eval=null"))
    assert done.code == 0, done.errors
    kind = MASTER if weights == "raw" else AVERAGE
    before, after = read_parameters(checkpoint_of(pre), kind), read_parameters(checkpoint_of(run), MASTER)
    assert before.keys() - after.keys() == {"pre_logits.fc.weight", "pre_logits.fc.bias"}
    assert after.keys() <= before.keys()
    expected = before | {"head.weight": torch.zeros(12, 16), "head.bias": torch.zeros(12)}
    mode = ResizeMode.BILINEAR_ALIGN_CORNERS
    expected["pos_embed"] = resize_position_embedding(before["pos_embed"], (2, 2), (4, 4), mode)
    assert [name for name, values in after.items() if not torch.equal(values, expected[name])] == []
    averages = read_parameters(checkpoint_of(run), AVERAGE)
    assert all(torch.equal(averages[name], values) for name, values in after.items())
    assert "pos_embed was resized from 2x2 to 4x4 (bilinear_align_corners)" in done.errors
    assert done.errors.count("starting from the weights of") == 1
    (attempt,) = attempts(run)
    assert attempt["initial_weights"]["path"].endswith("/checkpoints/step-000000006")
    assert attempt["initial_weights"]["weights"] == weights


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_fine_tuning_resumes_bit_identically_without_what_it_began_with(
    digits: Path, pre: Path, tmp_path: Path, stage: int
) -> None:
    gone = shutil.copytree(pre, tmp_path / "pre")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [f"engine.zero_stage={stage}", "evaluation.every={steps: 5}", "optim.ema_decay=0.9"]
    common += ["schedule={decay: steps, milestones: [0.5, 0.75], warmup: {steps: 2}}"]
    run_ranks(train_and_stop, 2, fine_tuning(digits, gone, whole, *common), None)
    run_ranks(train_and_stop, 2, fine_tuning(digits, gone, parts, *common), 6)
    shutil.rmtree(gone)
    run_ranks(train_and_stop, 2, fine_tuning(digits, gone, parts, *common), None)
    assert trajectory(parts) == trajectory(whole)
    assert_same(parts, whole)
    assert state(whole).keys() >= {f"head.weight|{kind}" for kind in (MASTER, AVERAGE, *MOMENTUM)}
    first, second = attempts(parts)
    assert first["initial_weights"] == attempts(whole)[0]["initial_weights"] != None  # noqa: E711
    assert (second["restored_step"], second["initial_weights"]) == (6, None)


@pytest.mark.slow
def test_a_fine_tuning_is_elastic(digits: Path, pre: Path, tmp_path: Path) -> None:
    """Other ranks, stages and micro-batches in the middle of it: the same batches, the same losses but for rounding."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    plain = ["model.dropout=0", "model.stochastic_depth=0", "optim.ema_decay=0.9"]
    run_ranks(train_and_stop, 2, fine_tuning(digits, pre, whole, *plain), None)
    run_ranks(train_and_stop, 2, fine_tuning(digits, pre, parts, *plain, "engine.zero_stage=3"), 5)
    run_ranks(train_and_stop, 1, fine_tuning(digits, pre, parts, *plain, "micro_batch_size=16"), 9)
    run_ranks(train_and_stop, 4, fine_tuning(digits, pre, parts, *plain, "engine.zero_stage=2"), None)
    for ours, theirs in zip(trajectory(parts), trajectory(whole), strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], rel=2e-5)
    left, right = state(parts), state(whole)
    assert left.keys() == right.keys()
    for name in right:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=2e-5, msg=name)


def test_a_file_does_as_well_as_the_run_that_it_is_from(digits: Path, pre: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.npz"
    exported = vitscale("checkpoint", "export", pre, file, "--format", "npz")
    assert exported.code == 0, exported.errors
    for name, path in (("run", pre), ("file", file)):
        done = train(*fine_tuning(digits, path, tmp_path / name, "duration={steps: 3}", "data.eval=null"))
        assert done.code == 0, done.errors
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "file")
    assert_same(tmp_path / "run", tmp_path / "file")
    records = [attempts(tmp_path / name)[0]["initial_weights"] for name in ("run", "file")]
    assert records[0]["digest"] == records[1]["digest"]
    assert records[1]["path"] == str(file)


def test_a_run_whose_checkpoints_are_all_damaged_begins_again_with_the_same_weights(
    digits: Path, pre: Path, tmp_path: Path
) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    arguments = ["duration={steps: 4}", "data.eval=null", "optim.ema_decay=0.9"]
    for folder in (run, fresh):
        done = train(*fine_tuning(digits, pre, folder, *arguments))
        assert done.code == 0, done.errors
    for name in checkpoints_of(run):
        (file,) = (run / "checkpoints" / name).glob("rank-*.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    again = train(*fine_tuning(digits, pre, run, *arguments))
    assert again.code == 0, again.errors
    assert "starting from the weights of" in again.errors
    assert trajectory(run) == trajectory(fresh)
    assert_same(run, fresh)


def test_a_head_that_is_kept_goes_on_with_its_classes(digits: Path, pre: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    keep = ["init.head=keep", "init.pre_logits=keep", "model.representation_layer=true", "data.image_size=8"]
    more = ["duration={steps: 1}", "schedule.warmup={steps: 1}", "init.resize=null", "data.eval=null"]
    done = train(*fine_tuning(digits, pre, run, *keep, *more))
    assert done.code == 0, done.errors
    before, after = read_parameters(checkpoint_of(pre)), read_parameters(checkpoint_of(run))
    assert before.keys() == after.keys()
    assert before["head.weight"].any()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


# What the debug configuration says of a ViT, taken back for families that have no use for it.
BARE = [f"model.{key}=null" for key in ("depth", "embed_dim", "num_heads", "mlp_dim")]
BARE += ["model.dropout=0", "model.stochastic_depth=0", "model.pool=token", "model.representation_layer=true"]
T2T = [*BARE, "model.variant=T2T-ViT-7", "model.depth=2", "model.embed_dim=64", "model.num_heads=2"]
FAMILIES = {
    "bit": ([*BARE, "model.variant=BiT-R26x1"], []),
    "efficientnet": ([*BARE, "model.variant=EfficientNet-nano"], []),
    "hybrid": (["model.variant=R26+ViT-mu/16"], ["pos_embed"]),
    "t2t": (T2T, ["pos_embed"]),
    "map": (["model.pool=map"], ["pos_embed"]),
    "registers": (["model.pool=token", "model.registers=2"], ["pos_embed"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on_at_another_resolution(digits: Path, tmp_path: Path, family: str) -> None:
    """All tensors arrive, running statistics among them, but for the head and what belongs to the grid."""
    model, of_the_grid = FAMILIES[family]
    plain = ["duration={steps: 1}", "schedule.warmup={steps: 1}", "data.eval=null", *model]
    before, after = tmp_path / "before", tmp_path / "after"
    done = train(*overrides(digits, before, *plain, "data.image_size=32", "optim.lr=1"))
    assert done.code == 0, done.errors
    changes = ["data.image_size=64", f"init.path={before}", "init.resize=bicubic", "model.num_classes=11"]
    # No update, so the checkpoint after it tells what the run began with.
    done = train(*overrides(digits, after, *plain, *changes))
    assert done.code == 0, done.errors
    left, right = read_parameters(checkpoint_of(before)), read_parameters(checkpoint_of(after))
    statistics = [name for name in left if "running_" in name or "num_batches" in name]
    assert bool(statistics) == (family == "efficientnet")
    # As many batches in both steps, so the counters tell that the statistics went on.
    assert all(torch.equal(right[name], 2 * left[name]) for name in statistics if "num_batches" in name)
    differ = [name for name in right if not torch.equal(right[name], left[name])] if left.keys() == right.keys() else []
    assert not right["head.weight"].any()
    assert set(differ) - set(statistics) <= {"head.weight", "head.bias", *of_the_grid}
    assert {"head.weight", *of_the_grid} <= set(differ)


REFUSALS = [
    (
        ["init.resize=null"],
        1,
        "pos_embed is 2x2, image size 16 needs 4x4: take init.resize=bilinear_align_corners or b",
    ),
    (
        ["init.head=keep", "model.num_classes=12"],
        2,
        "is for 10 classes and model.num_classes is 12; set init.head=new for a new one, or model.num_classes=10",
    ),
    (["model.representation_layer=true"], 2, "but the model has one; set model.representation_layer=false (ViT paper"),
    (
        ["init.pre_logits=keep"],
        2,
        "but the model has none; set model.representation_layer=true, or init.pre_logits=drop",
    ),
    (["model.gelu=erf"], 2, "another arithmetic than the configuration's model.gelu erf; set model.gelu=tanh"),
    (["model.pool=gap"], 1, "the file has a class token: set model.pool token"),
    (["model.num_heads=4"], 1, "its tensors are cut into 2 heads, the model's into 4; set model.num_heads to 2"),
    (["model.depth=3"], 1, "missing: blocks.2.norm1.weight [16]"),
    (["init.path=/no/such/run"], 2, "init.path: /no/such/run does not exist; give the folder of a run, a file of"),
    (["init.path=/"], 2, "init.path: / is neither a run (no config.yaml) nor a Hugging Face folder (no config.json)"),
    (["init.step=5"], 1, "no checkpoint of step 5; there are: 6, 4"),
    (
        ["model={variant: BiT-R50x1, num_classes: 10}"],
        1,
        "holds weights of the family vit, but model.variant is 'BiT-R5",
    ),
]


@pytest.mark.parametrize(("changes", "code", "text"), REFUSALS)
def test_weights_that_do_not_fit_are_refused_once_and_leave_no_folder(
    digits: Path, pre: Path, tmp_path: Path, changes: list[str], code: int, text: str
) -> None:
    run = tmp_path / "run"
    arguments = fine_tuning(digits, pre, run, *changes)
    if changes[0].startswith("model={"):
        arguments = [word for word in arguments if not word.startswith("model.")]
    refused = train(*arguments)
    assert (refused.code, refused.errors.count("vitscale: error: ")) == (code, 1), refused.errors
    assert text in refused.errors
    assert "Traceback" not in refused.errors
    assert "weights convert" not in refused.errors
    assert "--" not in refused.errors
    assert not run.exists()


def test_a_refusal_is_told_once_by_several_ranks(digits: Path, pre: Path, tmp_path: Path) -> None:
    refused = vitscale_on_ranks(2, "train", CONFIG, *fine_tuning(digits, pre, tmp_path / "run", "init.resize=null"))
    assert (refused.code, refused.errors.count("vitscale: error: ")) == (1, 1), refused.errors


def test_a_run_cannot_begin_with_itself_or_with_an_average_that_is_not_there(digits: Path, tmp_path: Path) -> None:
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert train(*overrides(digits, plain, "duration={steps: 1}", "schedule.warmup={steps: 1}")).code == 0
    same = ["model.pool=gap", "model.representation_layer=false"]
    itself = train(*fine_tuning(digits, run, run, *same))
    assert itself.code == 2
    assert "is this run itself, which goes on by itself" in itself.errors
    average = train(*fine_tuning(digits, plain, run, *same, "init.weights=ema"))
    assert average.code == 2
    assert "holds no averaged weights" in average.errors
    assert "set init.weights=raw" in average.errors
    assert not run.exists()


def test_other_initial_weights_are_no_reason_to_begin_anew(digits: Path, pre: Path, tmp_path: Path) -> None:
    run, more = tmp_path / "run", ["duration={steps: 2}", "data.eval=null", "schedule.warmup={steps: 1}"]
    assert train(*fine_tuning(digits, pre, run, *more)).code == 0
    refused = train(*fine_tuning(digits, pre, run, *more, "init.weights=ema"))
    assert refused.code == 2
    assert "init.weights: raw -> ema" in refused.errors
    assert "no effect: the run has begun with other weights, and goes on with its own" in refused.errors
    kind = train(*fine_tuning(digits, pre, run, *more, "optim={kind: adamw, lr: 0.03, weight_decay: 0}"))
    assert "optim.kind: sgd -> adamw\n    cannot change: what the optimizer keeps" in kind.errors
