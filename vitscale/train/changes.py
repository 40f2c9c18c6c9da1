"""What may change between two attempts of a run, and what a change then means. Own design.

Every key of the configuration is in one of four groups. A change of a *free* key leaves the sequence of global batches
and updates as it was. One of a *noted* key changes what is to come, in a way that people want of a run. One of a
*forced* key makes another experiment of what is to come, so it is refused unless the user names the key. After one of a
*never* key, going on would be wrong whatever the user says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any

from vitscale.errors import ConfigError

if TYPE_CHECKING:
    from vitscale.config.reference import KeyChange


class Resume(StrEnum):
    """What to do about the checkpoints of an earlier attempt."""

    AUTO = "auto"
    MUST = "must"
    NEVER = "never"


@dataclass(frozen=True)
class ResumePolicy:
    """What the user allows when a run is started again."""

    resume: Resume = Resume.AUTO
    """Whether there must be, or must not be, a checkpoint to continue from."""
    allow_change: tuple[str, ...] = ()
    """Keys and sections of forced changes that are meant."""


AUTO = ResumePolicy()


class Group(Enum):
    """What a change of a key needs."""

    FREE = "free"
    NOTED = "noted"
    FORCED = "forced"
    NEVER = "never"


LR = "the learning rate changes from step {step} on; steps already made stay as they are"
SAME_LR = "this comes to the same learning rates"
RULE = "the optimizer's rule changes from step {step} on; its moments stay"
ORDER = "the order of samples changes from step {step} on: of the epoch under way, some images come twice, others never"
CONTENT = "the training images change from step {step} on; epochs count as if all steps before had been made on these"
CROPS = "training images are cropped otherwise from step {step} on"
NOISE = "the model is regularised otherwise from step {step} on"
ARITHMETIC = "the weights were trained with another arithmetic, and go on with this one from step {step} on"
SHAPES = "the shapes of the weights depend on it; take another run folder"

# What a change means, by group and by key; a section stands for all its keys.
GROUPS: dict[Group, dict[str, str]] = {
    Group.FREE: dict.fromkeys(
        (
            "run",
            "micro_batch_size",
            "data.train",  # the place; its content is identified by a digest
            "data.eval",
            "data.eval_resize",
            "data.eval_crop_share",
            "data.workers",
            "data.processes",
            "data.prefetch_batches",
            "data.read_ahead_batches",
            "data.storage",
            "data.max_bad_samples",
            "data.max_bad_share",
            "model.activation_checkpointing",
            "model.attention",
            "engine.zero_stage",
            "engine.timeout_s",
            "engine.max_skipped_steps",
            "checkpoint",
            "evaluation",
            "log",
        ),
        "",
    ),
    Group.NOTED: {
        "duration": LR,
        "schedule": LR,
        "optim.ema_decay": "weights are averaged otherwise from step {step} on; one that is not saved yet begins "
        "with the weights of that step",
    },
    Group.FORCED: {
        "seed": f"{ORDER}; crops and dropout masks change too, the weights stay",
        "data.window": ORDER,
        "data.lanes": ORDER,
        "data.crop": CROPS,
        "data.crop_from": CROPS,
        "data.crop_area": CROPS,
        "data.crop_aspect": CROPS,
        "data.flip": "training images are mirrored otherwise from step {step} on",
        "data.max_image_pixels": "other images count as unreadable from step {step} on",
        "model.dropout": NOISE,
        "model.stochastic_depth": NOISE,
        "model.gelu": ARITHMETIC,
        "model.layer_norm_eps": ARITHMETIC,
        "model.head_bias": "no effect: it is an initial value, and the weights stay",
        "init": "no effect: the run has begun with other weights, and goes on with its own",
        "optim.lr": LR,
        "optim.betas": RULE,
        "optim.momentum": RULE,
        "optim.eps": RULE,
        "optim.weight_decay": RULE,
        "optim.head_weight_decay": RULE,
        "optim.grad_clip_norm": RULE,
        "loss": "another objective is minimised from step {step} on",
        "engine.precision": "rounding changes from step {step} on; master weights and moments are fp32 in both",
    },
    Group.NEVER: {
        "global_batch_size": "the place in the data is the step times the global batch, so samples would be skipped or "
        "repeated and the lanes cut anew; change micro_batch_size or the number of ranks instead",
        "optim.kind": "what the optimizer keeps beside the weights is of another kind; take another run folder",
        "data.image_size": "the position embedding belongs to one grid of patches; take another run folder",
        "model.variant": SHAPES,
        "model.num_classes": SHAPES,
        "model.head": SHAPES,
        "model.depth": SHAPES,
        "model.embed_dim": SHAPES,
        "model.mlp_dim": SHAPES,
        "model.pool": SHAPES,
        "model.registers": SHAPES,
        "model.position": SHAPES,
        "model.position_at": SHAPES,
        "model.attention_span": SHAPES,
        "model.block": SHAPES,
        "model.qk_norm": SHAPES,
        "model.qkv_bias": SHAPES,
        "model.representation_layer": SHAPES,
        "model.num_heads": "the weights keep their shapes, but would be cut into other heads than they were trained "
        "in; take another run folder",
    },
}


@dataclass(frozen=True)
class Change:
    """Something that differs from the last attempt."""

    key: str
    shown: str
    """Key, old and new value, without secrets."""
    group: Group
    meaning: str = ""

    def __str__(self) -> str:
        return f"{self.shown}: {self.meaning}" if self.meaning else self.shown

    def announcement(self) -> str:
        """The line that a user is told."""
        forced = self.group is Group.FORCED
        return f"{'FORCED by --allow-change' if forced else 'changed since the last attempt'}: {self}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the record of an attempt."""
        return {"key": self.key, "change": self.shown, "forced": self.group is Group.FORCED}


def covers(name: str, key: str) -> bool:
    """Whether a name is that of the key or of a section that holds it."""
    return key == name or key.startswith(name + ".")


def judge(change: KeyChange, shown: str, *, step: int, same_lr: bool) -> Change:
    """Put a changed key into its group.

    Args:
        change: of the key.
        shown: the change as it may be shown.
        step: finished steps of the run.
        same_lr: whether the learning rate of every step is that of the attempt that saved the checkpoint.
    """
    group, meaning = next(
        (group, meaning) for group, keys in GROUPS.items() for name, meaning in keys.items() if covers(name, change.key)
    )
    if meaning == LR and same_lr:
        meaning = SAME_LR
    return Change(change.key, shown, group, meaning.format(step=step))


def changed_content(old: str, new: str, *, step: int) -> Change:
    """Other training data than those of the checkpoint, told by their digests."""
    shown = f"data.train: content {old[:12]} -> {new[:12]}"
    return Change("data.train", shown, Group.FORCED, CONTENT.format(step=step))


def changed_world_size(old: int, new: int) -> Change:
    """Another number of ranks."""
    meaning = "the same global batches, summed in another order and with other dropout masks"
    return Change("world_size", f"world_size: {old} -> {new}", Group.NOTED, meaning)


def refuse(run: str, changes: Sequence[Change], allowed: Sequence[str], *, forced_before: Iterable[str]) -> None:
    """See that each change is allowed and that each allowance is needed.

    Args:
        run: the run folder, for messages.
        changes: since the last attempt.
        allowed: keys and sections whose forced changes are meant.
        forced_before: keys that earlier attempts were forced to change: the same command must go on.

    Raises:
        ConfigError: names what is refused, or what is not needed.
    """
    never = [change for change in changes if change.group is Group.NEVER]
    forced = [change for change in changes if change.group is Group.FORCED]
    if not never:
        _check_needed(changes, allowed, [*(change.key for change in forced), *forced_before])
    refused = [*never, *(c for c in forced if not any(covers(name, c.key) for name in allowed))]
    if not refused:
        return
    verdicts = {Group.NEVER: "cannot change", Group.FORCED: "would mean"}
    listed = "\n".join(f"  {change.shown}\n    {verdicts[change.group]}: {change.meaning}" for change in refused)
    keys = " ".join(f"--allow-change {change.key}" for change in refused)
    meant = "" if never else f", or, if this is meant, add {keys}"
    raise ConfigError(
        f"run: {run} belongs to a run with another configuration:\n{listed}\n"
        f"going on would not continue that run; take these values back, remove the folder to start anew, or choose "
        f"another one with run=...{meant}"
    )


def _check_needed(changes: Sequence[Change], allowed: Sequence[str], needing: Sequence[str]) -> None:
    for name in allowed:
        if any(covers(name, key) for key in needing):
            continue
        changed = ", ".join(dict.fromkeys(change.key for change in changes)) or "nothing"
        needed = ", ".join(dict.fromkeys(change.key for change in changes if change.group is Group.FORCED)) or "nothing"
        raise ConfigError(
            f"--allow-change {name}: no such key has changed and needs it; changed since the last attempt: {changed}; "
            f"of this, --allow-change is for: {needed}; leave {name} out"
        )
