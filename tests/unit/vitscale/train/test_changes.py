"""Which key may change on a resume, what is said of it, and which allowances are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import get_type_hints

import pytest

from vitscale.config.duration import Duration
from vitscale.config.reference import KeyChange
from vitscale.config.schema import TrainConfig
from vitscale.errors import ConfigError
from vitscale.train.changes import GROUPS, Change, Group, changed_content, changed_world_size, covers, judge, refuse


def keys_of(section: type, prefix: str = "") -> Iterator[str]:
    """All keys of a configuration; a duration is one."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint is not Duration:
            yield from keys_of(hint, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


KEYS = list(keys_of(TrainConfig))
NAMES = [(group, name) for group, names in GROUPS.items() for name in names]


def judged(key: str, *, same_lr: bool = False) -> Change:
    return judge(KeyChange(key, 1, 2), f"{key}: 1 -> 2", step=7, same_lr=same_lr)


def refusal(changes: list[Change], *allowed: str, before: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        refuse("/runs/a", changes, allowed, forced_before=before)
    return str(caught.value)


def test_the_keys_of_the_schema_are_listed() -> None:
    assert {"seed", "duration", "data.storage.cache", "optim.lr", "checkpoint.every", "log.every"} <= set(KEYS)
    assert "data" not in KEYS
    assert "duration.steps" not in KEYS


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_in_exactly_one_group(key: str) -> None:
    assert len([name for _, name in NAMES if covers(name, key)]) == 1


@pytest.mark.parametrize(("group", "name"), NAMES)
def test_every_name_is_that_of_a_key_or_section_and_every_meaning_is_told(group: Group, name: str) -> None:
    covered = [key for key in KEYS if covers(name, key)]
    assert covered
    for key in covered:
        change = judged(key)
        assert change.group is group
        assert bool(change.meaning) == (group is not Group.FREE)
        assert "{" not in change.meaning


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("run", Group.FREE),
        ("data.processes", Group.FREE),
        ("data.storage.cache_gb", Group.FREE),
        ("checkpoint.keep_best", Group.FREE),
        ("duration", Group.NOTED),
        ("schedule.warmup", Group.NOTED),
        ("schedule.final_lr", Group.NOTED),
        ("optim.ema_decay", Group.NOTED),
        ("seed", Group.FORCED),
        ("data.lanes", Group.FORCED),
        ("data.flip", Group.FORCED),
        ("optim.lr", Group.FORCED),
        ("optim.betas", Group.FORCED),
        ("loss.label_smoothing", Group.FORCED),
        ("engine.precision", Group.FORCED),
        ("model.dropout", Group.FORCED),
        ("model.stochastic_depth", Group.FORCED),
        ("global_batch_size", Group.NEVER),
        ("data.image_size", Group.NEVER),
        ("model.depth", Group.NEVER),
        ("model.num_heads", Group.NEVER),
    ],
)
def test_keys_are_in_the_group_that_is_meant(key: str, group: Group) -> None:
    assert judged(key).group is group


def test_a_name_covers_itself_and_what_is_in_it_alone() -> None:
    assert covers("data.train", "data.train")
    assert covers("data", "data.train")
    assert not covers("data.train", "data")
    assert not covers("data.tr", "data.train")
    assert not covers("", "data.train")


def test_what_is_said_of_a_change() -> None:
    free, noted, forced = judged("log.every"), judged("duration"), judged("data.flip")
    assert free.announcement() == "changed since the last attempt: log.every: 1 -> 2"
    assert noted.announcement() == (
        "changed since the last attempt: duration: 1 -> 2: the learning rate changes from step 7 on; steps already "
        "made stay as they are"
    )
    assert forced.announcement() == (
        "FORCED by --allow-change: data.flip: 1 -> 2: training images are mirrored otherwise from step 7 on"
    )


@pytest.mark.parametrize("key", ["duration", "schedule.warmup", "schedule.decay"])
def test_other_words_for_the_same_learning_rates_are_no_change_of_them(key: str) -> None:
    assert judged(key, same_lr=True).meaning == "this comes to the same learning rates"
    assert judged("optim.ema_decay", same_lr=True).meaning == judged("optim.ema_decay").meaning


def test_what_is_recorded_of_a_change() -> None:
    assert judged("seed").to_json() == {"key": "seed", "change": "seed: 1 -> 2", "forced": True}
    assert judged("duration").to_json() == {"key": "duration", "change": "duration: 1 -> 2", "forced": False}


def test_changes_that_are_no_keys() -> None:
    ranks, content = changed_world_size(2, 4), changed_content("a" * 64, "b" * 64, step=9)
    assert (ranks.group, ranks.shown) == (Group.NOTED, "world_size: 2 -> 4")
    assert (content.group, content.key) == (Group.FORCED, "data.train")
    assert content.shown == "data.train: content aaaaaaaaaaaa -> bbbbbbbbbbbb"
    assert "from step 9 on" in content.meaning


def test_free_and_noted_changes_pass() -> None:
    changes = [judged("log.every"), judged("duration"), changed_world_size(1, 2)]
    refuse("/runs/a", changes, (), forced_before=())
    refuse("/runs/a", [], (), forced_before=())


def test_a_forced_change_is_refused_with_its_meaning_and_its_cure() -> None:
    assert refusal([judged("log.every"), judged("data.flip"), judged("loss.kind")]) == (
        "run: /runs/a belongs to a run with another configuration:\n"
        "  data.flip: 1 -> 2\n"
        "    would mean: training images are mirrored otherwise from step 7 on\n"
        "  loss.kind: 1 -> 2\n"
        "    would mean: another objective is minimised from step 7 on\n"
        "going on would not continue that run; take these values back, remove the folder to start anew, or choose "
        "another one with run=..., or, if this is meant, add --allow-change data.flip --allow-change loss.kind"
    )


@pytest.mark.parametrize("allowed", [("optim.lr", "optim.eps"), ("optim",), ("optim", "optim.lr")])
def test_a_forced_change_passes_by_its_key_or_its_section(allowed: tuple[str, ...]) -> None:
    refuse("/runs/a", [judged("optim.lr"), judged("optim.eps"), judged("duration")], allowed, forced_before=())


def test_what_is_not_named_stays_refused() -> None:
    message = refusal([judged("optim.lr"), judged("optim.eps")], "optim.lr")
    assert [line for line in message.splitlines() if "->" in line] == ["  optim.eps: 1 -> 2"]
    assert message.endswith("add --allow-change optim.eps")


@pytest.mark.parametrize("allowed", [(), ("global_batch_size",), ("model",), ("nonsense",)])
def test_what_cannot_change_is_refused_whatever_is_allowed(allowed: tuple[str, ...]) -> None:
    message = refusal([judged("global_batch_size"), judged("model.depth")], *allowed)
    assert "  global_batch_size: 1 -> 2\n    cannot change: the place in the data is the step times" in message
    assert "  model.depth: 1 -> 2\n    cannot change: the shapes of the weights depend on it" in message
    assert "--allow-change" not in message


@pytest.mark.parametrize(
    ("changes", "allowed", "changed", "needed"),
    [
        ([], "seed", "nothing", "nothing"),
        (["optim.lr", "log.every"], "lr", "optim.lr, log.every", "optim.lr"),
        (["optim.lr"], "optim.l", "optim.lr", "optim.lr"),
        (["duration"], "duration", "duration", "nothing"),
        (["data.workers"], "data", "data.workers", "nothing"),
    ],
)
def test_an_allowance_that_nothing_needs_is_refused(
    changes: list[str], allowed: str, changed: str, needed: str
) -> None:
    assert refusal([judged(key) for key in changes], allowed) == (
        f"--allow-change {allowed}: no such key has changed and needs it; changed since the last attempt: {changed}; "
        f"of this, --allow-change is for: {needed}; leave {allowed} out"
    )


def test_an_allowance_that_an_earlier_attempt_needed_stays_in_the_command() -> None:
    refuse("/runs/a", [], ("optim.lr",), forced_before=["optim.lr"])
    refuse("/runs/a", [judged("log.every")], ("optim",), forced_before=["optim.lr"])
    assert "--allow-change seed: no such key" in refusal([], "seed", before=("optim.lr",))
