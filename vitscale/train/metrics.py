"""What a run records: metrics.jsonl and quarantine.jsonl."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import astuple, dataclass
from types import TracebackType
from typing import Any

from vitscale.checkpoint.state import TrainState
from vitscale.config.duration import is_due
from vitscale.config.schema import TrainConfig
from vitscale.data.loader import Quarantined
from vitscale.data.stages import StageSeconds
from vitscale.distributed import Ranks
from vitscale.plan import RunPlan
from vitscale.train.counters import load_counters
from vitscale.train.engine import StepResult
from vitscale.train.hardware import peak_flops
from vitscale.train.records import StepRecords
from vitscale.train.screen import Screen

# Share of the time below which nobody asks what the model waits for.
NOTICEABLE_WAIT = 0.02


@dataclass(frozen=True)
class Traffic:
    """Numbers of remote reads, of one rank or of several: those of :func:`load_counters`, summed over hosts."""

    hosts: float = 0
    """That were asked since the process started."""
    requests: float = 0
    retries: float = 0
    timeouts: float = 0
    errors: float = 0
    bytes: float = 0
    caches: float = 0
    """That are open."""
    hits: float = 0
    misses: float = 0

    @classmethod
    def of_rank(cls) -> Traffic:
        """Since this process started, with the processes that load for it."""
        counters = load_counters()
        hosts, cache = counters.hosts.values(), counters.cache
        return cls(
            hosts=len(hosts),
            requests=sum(host.requests for host in hosts),
            retries=sum(host.retries for host in hosts),
            timeouts=sum(host.timeouts for host in hosts),
            errors=sum(host.failures for host in hosts),
            bytes=sum(host.bytes for host in hosts),
            caches=cache is not None,
            hits=cache.hits if cache else 0,
            misses=cache.misses if cache else 0,
        )

    def since(self, earlier: Traffic) -> Traffic:
        """What was added to an earlier state."""
        counted = (now - then for now, then in zip(astuple(self), astuple(earlier), strict=True))
        return dataclasses.replace(Traffic(*counted), hosts=self.hosts, caches=self.caches)

    def to_json(self) -> dict[str, Any]:
        """Entries of a record; none if nothing is read remotely."""
        entries: dict[str, Any] = {}
        if self.hosts or self.caches:
            counts = {name: int(getattr(self, name)) for name in ("requests", "retries", "timeouts", "errors")}
            entries["storage"] = {**counts, "mb": round(self.bytes / 1e6, 3)}
        if self.caches:
            entries["cache"] = {"hits": int(self.hits), "misses": int(self.misses)}
        return entries


class MetricLog:
    """Records and shows a run. Rank 0 writes; :meth:`step` is collective at the steps that are recorded."""

    def __init__(self, config: TrainConfig, plan: RunPlan, ranks: Ranks, state: TrainState, attempt: int) -> None:
        self._plan, self._ranks, self._attempt, self._run = plan, ranks, attempt, config.run
        self._started_at = state.step
        self._threads = config.data.workers
        # The table is of bf16; fp32 runs on other units.
        self._peak_flops = peak_flops(ranks.device) if config.engine.precision == "bf16" else None
        self._stalled_s = 0.0
        self._restart_window(state)
        self._recorded_traffic = Traffic.of_rank()
        self._metrics = self._quarantine = None
        self._scores: dict[int, float] = {}
        self._screen: Screen | None = None
        if ranks.is_main:
            self._metrics = StepRecords(config.run / "metrics.jsonl", restored_step=state.step)
            self._scores = {r["step"]: r["eval_top1"] for r in self._metrics.records if "eval_top1" in r}
            self._quarantine = StepRecords(config.run / "quarantine.jsonl", restored_step=state.step)
            self._screen = Screen(plan.total_steps)

    def __enter__(self) -> MetricLog:
        if self._screen:
            self._screen.start(self._started_at)
        self._window_start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in (self._metrics, self._quarantine, self._screen):
            if part:
                part.close()

    def start(self, *, resumed: bool, initial: str | None = None) -> None:
        """Say what is about to happen; ``initial`` is where the first weights come from, if they are not random."""
        for name, value in self._plan.describe():
            self.say(f"{name:<12} {value}")
        if resumed:
            self.say(f"attempt {self._attempt}: continuing from the checkpoint of step {self._started_at}")
        elif initial is not None:
            self.say(f"attempt {self._attempt}: starting from the weights of {initial}")
        else:
            self.say(f"attempt {self._attempt}: starting from scratch")

    def sync(self) -> None:
        """Wait until all records are on the disk: a checkpoint must not outlive the records of its steps."""
        for records in (self._metrics, self._quarantine):
            if records:
                records.sync()

    def finish(self, state: TrainState) -> None:
        """Say that the run is complete."""
        work = "was finished before; nothing was left to do" if state.step == self._started_at else "is finished"
        self.say(f"the run {work}: step {state.step}, {state.examples_seen:,} images seen; see {self._run}")

    def say(self, text: str) -> None:
        """Show a line on rank 0."""
        if self._screen:
            self._screen.line(text)

    def stall(self, seconds: float) -> None:
        """Note that a save kept training waiting; the next record has the sum."""
        self._stalled_s += seconds

    def scores(self) -> dict[int, float]:
        """Top-1 by step of all evaluations of the run, on rank 0."""
        return dict(self._scores)

    def was_evaluated(self, step: int, *, mark: str) -> bool:
        """Whether an earlier attempt recorded an evaluation after ``step``, which has the key ``mark``. The same answer
        on every rank."""
        return self._ranks.on_main(
            lambda: any(r["step"] == step and mark in r for r in self._metrics.records)  # type: ignore[union-attr]
        )

    def quarantine(self, step: int, faults: list[Quarantined]) -> None:
        """Record the bad samples of a step from all ranks. Collective; called only when there are any."""
        everyone = [fault for of_rank in self._ranks.gather(faults) for fault in of_rank]
        if self._quarantine:
            for fault in sorted(everyone, key=lambda f: f.position):
                self._quarantine.append({"step": step, **dataclasses.asdict(fault), "attempt": self._attempt})

    def step(self, state: TrainState, result: StepResult, *, lr: float, digest: int) -> None:
        """Note a finished step; record it when it is due."""
        self._waited_s += result.data_wait_s
        self._stages += result.stages
        if self._screen:
            self._screen.advance(state.step)
        if not (is_due(state.step, self._plan.log_every) or state.step in (1, self._plan.total_steps)):
            return
        seconds = max(time.perf_counter() - self._window_start, 1e-9)
        traffic = Traffic.of_rank()
        stages, new_traffic = astuple(self._stages), astuple(traffic.since(self._recorded_traffic))
        rows = self._ranks.gather_floats([float(result.loss), self._waited_s / seconds, *stages, *new_traffic])
        self._recorded_traffic = traffic
        losses = [row[0] for row in rows]
        # All ranks wait for the slowest one.
        slowest = max(rows, key=lambda row: row[1])
        wait_share, stage_seconds = slowest[1], slowest[2 : 2 + len(stages)]
        bound_by = StageSeconds(*stage_seconds).binding(threads=self._threads)
        traffic_of_all = Traffic(*map(sum, zip(*(row[2 + len(stages) :] for row in rows), strict=True)))
        rate = (state.examples_seen - self._window_examples) / seconds
        record = {
            "step": state.step,
            "examples_seen": state.examples_seen,
            "epoch": round(state.examples_seen / self._plan.num_samples, 4),
            "loss": sum(losses) / len(losses),
            "loss_max": max(losses),
            "grad_norm": result.grad_norm,
            "applied": result.applied,
            "lr": lr,
            "batch_digest": f"{digest % 2**64:016x}",
            "images_per_s": round(rate, 2),
            "data_wait_share": round(wait_share, 4),
            "data_bound_by": bound_by if wait_share >= NOTICEABLE_WAIT else None,
            "mfu": self._mfu(rate),
            "quarantined": state.quarantined,
            **({"checkpoint_stall_s": round(self._stalled_s, 4)} if self._stalled_s else {}),
            **traffic_of_all.to_json(),
            "attempt": self._attempt,
            "unix_s": round(time.time(), 3),
        }
        self._restart_window(state)
        self._stalled_s = 0.0
        if self._metrics and self._screen:
            self._metrics.append(record)
            self._screen.step(record)

    def evaluation(self, state: TrainState, name: str | None, results: dict[str, Any], seconds: float) -> None:
        """Record an evaluation after ``state.step``: of data.eval, or one of evaluation.evaluators under its name."""
        prefix = "eval_" if name is None else f"{name}/"
        if self._metrics:
            shown = {f"{prefix}{key}": value for key, value in results.items()}
            self._metrics.append({"step": state.step, **shown, "attempt": self._attempt, "seconds": round(seconds, 2)})
            if name is None:
                self._scores[state.step] = results["top1"]
        if name is None:
            top1, top5, images = results["top1"], results["top5"], results["images"]
            self.say(f"step {state.step}: held-out top-1 {top1:.4f}, top-5 {top5:.4f} on {images:,} images")
        else:
            told = [f"{key} {value:.4f}" for key, value in results.items() if isinstance(value, float)]
            self.say(f"step {state.step}: {name}: {results.get('error') or ', '.join(told)}")
        self._restart_window(state)

    def _restart_window(self, state: TrainState) -> None:
        self._window_start, self._window_examples = time.perf_counter(), state.examples_seen
        self._waited_s, self._stages = 0.0, StageSeconds()

    def _mfu(self, images_per_s: float) -> float | None:
        """Model FLOPs utilisation, recomputation not counted; ``None`` where the device's peak is not known."""
        if self._peak_flops is None:
            return None
        needed = images_per_s * 3 * self._plan.forward_flops
        return round(needed / (self._peak_flops * self._plan.world_size), 4)
