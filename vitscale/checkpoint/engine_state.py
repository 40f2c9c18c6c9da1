"""The training state of a run on its way into a checkpoint store and back."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitscale import __version__
from vitscale.checkpoint.digest import MODULUS, add_digest
from vitscale.checkpoint.format import AVERAGE, BUFFER, MOMENTS, MOMENTUM, Checkpoint, other_data
from vitscale.checkpoint.fragments import (
    Fragment,
    buffer_fragments,
    fragments,
    layouts,
    masters,
    moment_kinds,
    optimizer_steps,
    parameter_shapes,
    persistent_buffers,
    prepare_moments,
    pull_masters,
    push_masters,
    set_masters,
    working_copies_differ,
)
from vitscale.checkpoint.reading import Wanted, read_wanted
from vitscale.checkpoint.snapshot import Snapshot
from vitscale.checkpoint.state import TrainState
from vitscale.checkpoint.store import CheckpointStore
from vitscale.distributed import Ranks
from vitscale.errors import CheckpointError, on_every_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """What a run's checkpoints must have in common."""

    data_digest: str
    """Of the training data."""
    classes: Sequence[str] | None
    """Names of the head's outputs, for whoever evaluates a checkpoint."""
    config: str = ""
    """The configuration as YAML, without passwords: for people, nothing depends on it."""
    free_data: bool = False
    """Whether another data digest is accepted, since the user said so."""


class Checkpoints:
    """Saves and restores a DeepSpeed engine. Methods are collective, but for :meth:`pending`.

    Args:
        store: where the checkpoints lie.
        engine: the DeepSpeed engine. It is read between two steps only.
        ranks: that share it.
        identity: of the run.
        averages: this rank's partitions of the averaged weights, if the run keeps them.
        tolerated_failures: saves in a row that may fail before the error is raised.
    """

    def __init__(
        self,
        store: CheckpointStore,
        engine: Any,
        ranks: Ranks,
        identity: Identity,
        *,
        averages: Sequence[Tensor] | None = None,
        tolerated_failures: int = 0,
    ) -> None:
        self._store, self._engine, self._ranks, self._identity = store, engine, ranks, identity
        self._averages, self._tolerated_failures = averages, tolerated_failures
        self._failures = 0
        self._touched = False
        self._snapshot = Snapshot(pin_memory=ranks.device.type == "cuda")
        self.before_commit: Callable[[], None] = lambda: None
        """Called by rank 0 in the background: what must be on the disk before a checkpoint is. May raise OSError."""
        self._buffers = persistent_buffers(engine)
        self._first_buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        self._saved: int | None = None
        """The step that was saved last."""

    def save(self, state: TrainState, *, next_lr: float, scores: Mapping[int, float], must: bool = False) -> float:
        """Take a snapshot and start to write it; one that is still in flight is waited for.

        Args:
            state: the integers that go with the engine.
            next_lr: learning rate of the step that comes next, compared after a restore.
            scores: of evaluated steps, for the retention of the best.
            must: wait until it is complete, and tolerate no failure.

        Returns:
            Seconds for which training was kept waiting.

        Raises:
            CheckpointError: some rank could not write this one or the one before, more often than is tolerated.
        """
        start = time.perf_counter()
        if state.step != self._saved:
            self._tolerate(self._store.wait, must=must)
            shapes, layout = parameter_shapes(self._engine), layouts(self._engine)
            content = {
                "step": state.step,
                "state": state.to_json(),
                "optimizer_steps": optimizer_steps(self._engine),
                "next_lr": next_lr,
                "parameters": {name: {"shape": shape, **layout[name]._asdict()} for name, shape in shapes.items()},
                "buffers": {
                    name: {"shape": list(buffer.shape), "offset": 0, "size": buffer.numel()}
                    for name, buffer in self._buffers.items()
                },
                "data_digest": self._identity.data_digest,
                "classes": None if self._identity.classes is None else list(self._identity.classes),
                "world_size": self._engine.world_size,
                "zero_stage": self._engine.zero_optimization_stage(),
                "config": self._identity.config,
                "vitscale_version": __version__,
                "created_unix_s": int(time.time()),
            }
            self._snapshot.take(self._fragments())
            self._saved = state.step
            self._tolerate(lambda: self._store.begin(content, self._snapshot, scores, self.before_commit), must=must)
        if must:
            self._tolerate(self._store.wait, must=True)
        return time.perf_counter() - start

    def wait(self, *, say: Callable[[str], None]) -> None:
        """Wait for a save in flight, before an error ends the run. That it failed is only said."""
        try:
            self._store.wait()
        except CheckpointError as error:
            say(f"besides, the checkpoint in flight was not saved: {error}")

    def pending(self) -> int:
        """As of :class:`CheckpointStore`."""
        return self._store.pending()

    def advance(self, pending: int) -> None:
        """Take a save in flight further; ``pending`` is summed over ranks.

        Raises:
            CheckpointError: some rank could not write it, and that is not tolerated.
        """
        self._tolerate(lambda: self._store.advance(pending))

    def restore(self, *, lr_of: Callable[[int], float | None] | None) -> TrainState | None:
        """Load the newest complete checkpoint into a fresh engine, or give ``None`` if there is none.

        Afterwards, weights and moments are digested where they lie and compared with what was saved.

        Args:
            lr_of: gives the learning rate of a step, which must be that of the run that saved, or None if it need not.

        Raises:
            CheckpointError: the checkpoint is of another model or of other training data, cannot be read, or is not
                what the engine holds after it was loaded.
        """
        checkpoint = self._store.restore(self._load)
        if checkpoint is None:
            if self._touched:
                self._forget()
            return None
        push_masters(self._engine)
        self._prove(checkpoint)
        state = TrainState.from_json(checkpoint.content["state"])
        lr = lr_of(state.step) if lr_of else None
        # Other processors may differ in the last bit of a cosine.
        if lr is not None and not math.isclose(lr, checkpoint.content["next_lr"], rel_tol=1e-9):
            raise on_every_rank(
                CheckpointError(
                    f"{checkpoint.shown}: would go on with learning rate {lr:g}, but was to go on with "
                    f"{checkpoint.content['next_lr']:g}; take the changed configuration back"
                )
            )
        self._saved = state.step
        return state

    def begin_with(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Let the engine, which has made no step, begin with other weights; averages begin with the same.

        Args:
            tensors: whole parameters and buffers with their names, fp32; those that are not among them keep their
                values. One is held at a time.
        """

        def with_buffers_taken() -> Iterator[tuple[str, Tensor]]:
            for name, values in tensors:
                if name in self._buffers:
                    self._buffers[name].copy_(values)
                yield name, values

        set_masters(self._engine, with_buffers_taken())
        push_masters(self._engine)
        self._begin_averages()

    def _fragments(self) -> list[Fragment]:
        """What this rank saves. Buffers are rank 0's."""
        mine = list(fragments(self._engine, self._averages))
        return mine + buffer_fragments(self._buffers) if self._ranks.is_main else mine

    def _forget(self) -> None:
        """Undo what was loaded from checkpoints that turned out to be damaged."""
        prepare_moments(self._engine, steps=0)
        pull_masters(self._engine)
        for name, buffer in self._buffers.items():
            buffer.copy_(self._first_buffers[name])
        self._begin_averages()

    def _begin_averages(self) -> None:
        if self._averages is not None:
            for average, master in zip(self._averages, masters(self._engine), strict=True):
                average.copy_(master)

    def _load(self, checkpoint: Checkpoint) -> None:
        self._check_fits(checkpoint)
        self._touched = True
        prepare_moments(self._engine, steps=int(checkpoint.content["optimizer_steps"]))
        has_average = AVERAGE in checkpoint.content["digests"]
        wanted = [
            Wanted(fragment.name, fragment.kind, fragment.start, fragment.values)
            for fragment in fragments(self._engine, self._averages if has_average else None)
        ]
        buffers = buffer_fragments({name: torch.empty_like(buffer) for name, buffer in self._buffers.items()})
        wanted += [Wanted(buffer.name, BUFFER, 0, buffer.values) for buffer in buffers]
        read_wanted(checkpoint, wanted)
        for read in buffers:
            held = self._buffers[read.name]
            held.copy_(read.values.view(held.shape))
        if not has_average:
            self._begin_averages()

    def _prove(self, checkpoint: Checkpoint) -> None:
        """Compare what the engine holds with what was saved."""
        saved = checkpoint.digests
        held = dict.fromkeys(saved, 0)
        for fragment in self._fragments():
            if fragment.kind in held:
                add_digest(held, fragment.name, fragment.kind, fragment.start, fragment.values)
        kinds = sorted(saved)
        sums = self._ranks.sum_ints([*(held[kind] for kind in kinds), working_copies_differ(self._engine)])
        wrong = [kind for kind, total in zip(kinds, sums, strict=False) if total % MODULUS != saved[kind]]
        if AVERAGE in wrong and self._averages is None:
            wrong.remove(AVERAGE)
        if sums[-1]:
            wrong.append("weights of the model")
        if (steps := optimizer_steps(self._engine)) != checkpoint.content["optimizer_steps"]:
            wrong.append(f"updates of the optimizer ({steps}, not {checkpoint.content['optimizer_steps']})")
        if wrong:
            raise on_every_rank(
                CheckpointError(
                    f"{checkpoint.shown}: was loaded, but then the engine's {', '.join(wrong)} are not what was saved; "
                    f"this is a fault of vitscale or of DeepSpeed's version (tested with 0.19.8), not of the checkpoint"
                )
            )

    def _check_fits(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.shapes | checkpoint.buffers
        shapes = parameter_shapes(self._engine) | {name: list(each.shape) for name, each in self._buffers.items()}
        different = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
        if different:
            shown = "; ".join(
                f"{n}: saved {saved.get(n, 'absent')}, model {shapes.get(n, 'absent')}" for n in different[:5]
            )
            raise CheckpointError(
                f"{checkpoint.shown}: {len(different)} tensors do not fit the model ({shown}); "
                f"use the model's configuration of that run, or another run folder"
            )
        moments = {kind for kind in (*MOMENTS, *MOMENTUM) if kind in checkpoint.content["digests"]}
        if moments and moments != set(moment_kinds(self._engine)):
            raise CheckpointError(
                f"{checkpoint.shown}: holds an optimizer's {' and '.join(sorted(moments))}, but that of optim.kind "
                f"keeps {' and '.join(moment_kinds(self._engine))}; take the kind of that run, or another run folder"
            )
        if checkpoint.content["data_digest"] != self._identity.data_digest and not self._identity.free_data:
            raise other_data(checkpoint)

    def _tolerate(self, act: Callable[[], str | None], *, must: bool = False) -> None:
        """Do something that may find that a save has failed; alike on all ranks."""
        try:
            committed = act()
        except CheckpointError as error:
            self._saved = None
            self._failures += 1
            if must or self._failures > self._tolerated_failures:
                raise
            if self._ranks.is_main:
                logger.warning(
                    "a checkpoint was not saved (%d of %d failures in a row that checkpoint.tolerate_failures allows): "
                    "%s",
                    self._failures,
                    self._tolerated_failures,
                    error,
                )
        else:
            if committed:
                self._failures = 0
