"""What ``vitscale checkpoint`` tells, changes and refuses to change, on real checkpoints of a small model."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers.command import vitscale
from tests.helpers.runs import environment
from tests.helpers.s3 import S3Server
from tests.unit.vitscale.checkpoint.small_state import latest, names
from tests.unit.vitscale.checkpoint.vit_run import (
    BATCH,
    IMAGES,
    change_byte,
    make_run,
    publish_vit,
    save_into,
    save_vit,
)
from vitscale.checkpoint.commands import (
    choose,
    find_place,
    list_entries,
    not_trained,
    remove,
    roll_back,
    superfluous,
    verify_steps,
)
from vitscale.checkpoint.description import description, entry_json, entry_row, shown_age, shown_bytes
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import FileRecord, manifest_text, step_name
from vitscale.checkpoint.objects import ObjectFolder
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.store import CheckpointStore
from vitscale.config.schema import TrainConfig
from vitscale.distributed import Ranks
from vitscale.durable import Lock
from vitscale.errors import CheckpointError

STEPS = (10, 20, 30, 40, 50)
RANK_0 = "rank-00000.safetensors"


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return make_run(tmp_path / "run")


@pytest.fixture
def saved(config: TrainConfig, ranks: Ranks) -> LocalFolder:
    """Checkpoints of steps 10 to 50."""
    return save_vit(config, ranks, *STEPS)


def steps_in(folder: LocalFolder) -> list[int]:
    return [entry.step for entry in list_entries(folder) if entry.state == "complete"]


def faults(folder: LocalFolder, step: int | None = None, *, every: bool = False) -> dict[str, str]:
    return dict(verify_steps(folder, step, every=every, advance=lambda *_: None))


@contextmanager
def training(run: Path) -> Iterator[None]:
    """What a start of the run does first."""
    lock = Lock(run / ".lock")
    assert lock.take()
    yield
    lock.release()


def mess_up(folder: LocalFolder) -> None:
    """Of the five: 50 is short of a byte, 40 was set aside as damaged, 30 is being written, 20 was rolled back."""
    file = folder.path / step_name(50) / RANK_0
    os.truncate(file, file.stat().st_size - 1)
    for step, prefix in ((40, "damaged-"), (30, ".staging-"), (20, "rolled-back-")):
        (folder.path / step_name(step)).rename(folder.path / f"{prefix}{step_name(step)}")
    shutil.copytree(folder.path / step_name(10), folder.path / "my-copy")


def test_list_names_everything_that_is_or_was_a_checkpoint(saved: LocalFolder) -> None:
    size = (saved.path / step_name(10) / RANK_0).stat().st_size
    mess_up(saved)
    listed = [(e.step, e.name, e.state, e.latest) for e in list_entries(saved)]
    assert listed == [
        (50, "step-000000050", "damaged", False),
        (40, "damaged-step-000000040", "set aside", False),
        (30, ".staging-step-000000030", "staged", False),
        (20, "rolled-back-step-000000020", "set aside", False),
        (10, "step-000000010", "complete", True),
    ]
    entries = {entry.step: entry for entry in list_entries(saved)}
    assert entries[50].fault == f"{RANK_0} has {size - 1} of {size} bytes"
    assert entries[10].size_bytes == size
    # The manifest counts where nothing says what should be there.
    left = entries[30].size_bytes
    assert left is not None
    assert left > size


def test_list_tells_of_another_format(saved: LocalFolder) -> None:
    manifest = saved.path / step_name(50) / "manifest.json"
    checkpoint = choose(saved, 50)
    text = manifest_text({**checkpoint.content, "format_version": 99}, list(checkpoint.records))
    manifest.write_bytes(text)
    newest, *_ = list_entries(saved)
    assert (newest.state, newest.latest) == ("unreadable", False)
    assert "has format vitscale-checkpoint version 99" in newest.fault
    # What may only need another vitscale is not passed over in silence.
    for act in (lambda: choose(saved, None), lambda: faults(saved)):
        with pytest.raises(CheckpointError, match="version 99"):
            act()


def test_list_knows_the_epoch_from_the_plan(saved: LocalFolder, config: TrainConfig) -> None:
    outcome = vitscale("checkpoint", "list", config.run, "--json")
    assert (outcome.code, outcome.errors) == (0, "")
    newest, *others = json.loads(outcome.out)
    assert newest == {
        "step": 50,
        "name": "step-000000050",
        "state": "complete",
        "fault": None,
        "latest": True,
        "examples_seen": 50 * BATCH,
        "epoch": 50 * BATCH / IMAGES,
        "world_size": 1,
        "zero_stage": 2,
        "size_bytes": (saved.path / step_name(50) / RANK_0).stat().st_size,
        "created_unix_s": 1_700_000_000,
    }
    assert [other["step"] for other in others] == [40, 30, 20, 10]
    (config.run / "plan.json").unlink()
    assert json.loads(vitscale("checkpoint", "list", config.run, "--json").out)[0]["epoch"] is None


def test_the_real_program_prints_lines(saved: LocalFolder, config: TrainConfig) -> None:
    mess_up(saved)
    command = [sys.executable, "-m", "vitscale", "checkpoint", "list", str(config.run)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    heads, *rows = done.stdout.splitlines()
    assert heads.split() == ["step", "examples", "epoch", "ranks", "ZeRO", "size", "age", "state"]
    assert [row.split()[0] for row in rows] == ["50", "40", "30", "20", "10"]
    assert rows[0].endswith("bytes)")
    assert rows[1].endswith("set aside: damaged-step-000000040")
    assert rows[4].endswith("complete, latest")
    assert done.stderr == ""


def test_a_row_shows_a_dash_for_what_is_not_known(saved: LocalFolder) -> None:
    mess_up(saved)
    staged = next(entry for entry in list_entries(saved) if entry.state == "staged")
    row = entry_row(entry_json(staged, IMAGES))
    assert row[:5] == ["30", "-", "-", "-", "-"]
    assert row[6] == "-"


def test_looking_takes_no_torch(saved: LocalFolder, config: TrainConfig) -> None:
    for words in (["list"], ["show"], ["prune", "--keep", "2", "--yes"]):
        code = f"import sys\nsys.argv = ['vitscale', 'checkpoint', {words[0]!r}, {str(config.run)!r}, *{words[1:]}]\n"
        code += "from vitscale.cli import main\ntry:\n    main()\nexcept SystemExit as leaving:\n"
        code += "    assert not leaving.code, leaving.code\nassert 'torch' not in sys.modules\nprint('light')"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
        )
        assert done.stdout.endswith("light\n"), done.stderr
    assert steps_in(saved) == [50, 40]


def test_show_tells_all_of_a_manifest(saved: LocalFolder, config: TrainConfig) -> None:
    outcome = vitscale("checkpoint", "show", config.run, "20")
    assert (outcome.code, outcome.errors) == (0, "")
    checkpoint = choose(saved, 20)
    parameters = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    text = " ".join(outcome.out.split())
    for part in (
        f"checkpoint {checkpoint.shown}",
        "step 20",
        f"examples seen {20 * BATCH}",
        f"epoch {20 * BATCH / IMAGES:.4f}",
        f"parameters {parameters:,} in {len(checkpoint.shapes)} tensors",
        "classes 10 (digit 0, digit 1, digit 2, ...)",
        "world size 1",
        "zero stage 2",
        "next lr 0.001",
        f"data digest {'d' * 64}",
        *(f"digest of {kind} {digest}" for kind, digest in checkpoint.content["digests"].items()),
    ):
        assert part in text
    newest = json.loads(vitscale("checkpoint", "show", config.run, "--json").out)
    assert (newest["step"], newest["files"][0]["name"]) == (50, RANK_0)
    assert newest["parameters"] == choose(saved, 50).content["parameters"]


def test_show_takes_the_newest_complete_one_and_says_what_it_passes_over(
    saved: LocalFolder, caplog: pytest.LogCaptureFixture
) -> None:
    mess_up(saved)
    assert choose(saved, None).step == 10
    assert "checkpoint step-000000050 is damaged" in caplog.text
    assert description(choose(saved, None), None)["step"] == "10"
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 50 \(step-000000050: "):
        choose(saved, 50)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there are: 50, 10$"):
        choose(saved, 7)
    shutil.rmtree(saved.path / step_name(10))
    with pytest.raises(CheckpointError, match=r"no complete checkpoint \(step-000000050: "):
        choose(saved, None)
    shutil.rmtree(saved.path / step_name(50))
    with pytest.raises(CheckpointError, match="holds no checkpoint; train first"):
        choose(saved, None)


@pytest.mark.parametrize("place", ["header", "middle", "last byte"])
def test_verify_finds_any_changed_byte(saved: LocalFolder, config: TrainConfig, place: str) -> None:
    assert faults(saved, 30) == {step_name(30): ""}
    file = saved.path / step_name(30) / RANK_0
    size = file.stat().st_size
    change_byte(file, {"header": 20, "middle": size // 2, "last byte": size - 1}[place])
    assert faults(saved, 30) == {step_name(30): f"{RANK_0} has other content from byte 0 on"}
    outcome = vitscale("checkpoint", "verify", config.run, "--all")
    assert outcome.code == 1
    assert outcome.out.splitlines() == [
        "step-000000050: OK",
        "step-000000040: OK",
        f"step-000000030: DAMAGED: {RANK_0} has other content from byte 0 on",
        "step-000000020: OK",
        "step-000000010: OK",
    ]
    assert vitscale("checkpoint", "verify", config.run) == (0, "step-000000050: OK\n", "")


def test_verify_tells_what_is_missing(saved: LocalFolder) -> None:
    (saved.path / step_name(50) / RANK_0).unlink()
    assert faults(saved) == {step_name(50): f"{RANK_0} is missing"}
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 11; there are: 50, 40, 30, 20, 10$"):
        faults(saved, 11)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        faults(LocalFolder(saved.path / "nowhere"))


def test_verify_compares_the_digest_of_each_kind(saved: LocalFolder) -> None:
    checkpoint = choose(saved, 50)
    digests = {**checkpoint.content["digests"], "exp_avg": "0" * 16}
    text = manifest_text({**checkpoint.content, "digests": digests}, list(checkpoint.records))
    (saved.path / step_name(50) / "manifest.json").write_bytes(text)
    assert faults(saved) == {step_name(50): "its files are unchanged, but the digest of exp_avg is another one"}


@pytest.mark.parametrize(("part", "world_size"), [(1000, 8), (2500, 5)])
def test_verify_reads_every_byte_of_every_rank(config: TrainConfig, part: int, world_size: int) -> None:
    folder = publish_vit(config, 10, part=part, world_size=world_size)
    reads: list[tuple[int, int]] = []
    assert dict(verify_steps(folder, None, every=False, advance=lambda _, *at: reads.append(at))) == {step_name(10): ""}
    sizes = [file.stat().st_size for file in sorted((folder.path / step_name(10)).glob("rank-*"))]
    # The last ranks own nothing; their files are headers.
    assert len(sizes) == world_size
    assert sizes[-1] < 100
    assert reads[-1] == (sum(sizes), sum(sizes))
    for rank, size in enumerate(sizes):
        file = folder.path / step_name(10) / f"rank-{rank:05d}.safetensors"
        for offset in (9, size - 1):
            change_byte(file, offset)
            assert faults(folder) == {step_name(10): f"{file.name} has other content from byte 0 on"}
            change_byte(file, offset)
    assert faults(folder) == {step_name(10): ""}


def test_verify_and_a_step_do_not_go_together(config: TrainConfig) -> None:
    outcome = vitscale("checkpoint", "verify", config.run, "10", "--all")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.errors == "vitscale: error: step 10 and --all were given; give one of them\n"


def test_prune_keeps_by_the_rules_of_training(saved: LocalFolder) -> None:
    def doomed(keep: int, keep_every: int | None = None) -> list[int]:
        return [entry.step for entry in superfluous(saved, keep=keep, keep_every=keep_every)]

    assert (doomed(2), doomed(3), doomed(5)) == ([10, 20, 30], [10, 20], [])
    assert doomed(2, 20) == [10, 30]
    assert doomed(0) == [10, 20, 30]
    # What is damaged is no predecessor to fall back on.
    mess_up(saved)
    assert doomed(2) == []


def test_prune_says_what_it_removes_and_how_much(saved: LocalFolder, config: TrainConfig) -> None:
    size = shown_bytes(choose(saved, 10).records[0].size)
    lines = [f"step-0000000{step}: {size}" for step in (10, 20, 30)]
    before = names(saved.path)
    dry = vitscale("checkpoint", "prune", config.run, "--keep", 2, "--dry-run")
    assert (dry.code, dry.out.splitlines()[:3]) == (0, lines)
    assert dry.out.splitlines()[3].startswith("would remove 3, ")
    unasked = vitscale("checkpoint", "prune", config.run, "--keep", 2)
    assert unasked.code == 1
    assert "nothing was removed, since nobody is there to be asked; add --yes" in unasked.errors
    assert names(saved.path) == before
    done = vitscale("checkpoint", "prune", config.run, "--keep", 2, "--yes")
    assert (done.code, done.errors) == (0, "")
    assert done.out.splitlines()[3].startswith("removed 3, ")
    assert names(saved.path) == {"latest", "step-000000040", "step-000000050"}
    assert latest(saved.path) == "step-000000050"
    again = vitscale("checkpoint", "prune", config.run, "--keep", 2, "--yes")
    assert again == (0, "nothing to remove\n", "")
    assert vitscale("checkpoint", "prune", config.run, "--keep", 1, "--yes").code == 2


def test_prune_tells_of_what_it_cannot_remove(saved: LocalFolder) -> None:
    doomed = superfluous(saved, keep=4, keep_every=None)
    (saved.path / f".staging-{step_name(10)}").write_text("in the way")
    with pytest.raises(CheckpointError, match="step-000000010 could not be removed; mend the permissions"):
        remove(saved, doomed)
    assert steps_in(saved) == list(reversed(STEPS))


def test_rollback_makes_an_earlier_one_the_newest(saved: LocalFolder, config: TrainConfig, ranks: Ranks) -> None:
    # A newer one that is damaged must not be taken either.
    change_byte(saved.path / step_name(50) / RANK_0, 500)
    outcome = vitscale("checkpoint", "rollback", config.run, 30)
    assert (outcome.code, outcome.errors) == (0, "")
    assert outcome.out.splitlines() == [
        "set aside: rolled-back-step-000000050",
        "set aside: rolled-back-step-000000040",
        "the next start goes on from step 30, and moves the records of later steps from metrics.jsonl to "
        "metrics.rolled_back.jsonl",
    ]
    assert latest(saved.path) == step_name(30)
    assert steps_in(saved) == [30, 20, 10]
    restored = CheckpointStore(saved, ranks, Retention(last=3)).restore(lambda checkpoint: None)
    assert restored is not None
    assert restored.step == 30
    # The start that has swept up leaves them where they are.
    assert (saved.path / "rolled-back-step-000000040" / RANK_0).is_file()
    # Once more, after training went on.
    save_vit(config, ranks, 40)
    assert roll_back(saved, 20, lambda *_: None) == ["rolled-back-step-000000040", "rolled-back-step-000000030"]
    assert (latest(saved.path), steps_in(saved)) == (step_name(20), [20, 10])


def test_rollback_refuses_a_step_that_is_damaged_or_absent(saved: LocalFolder) -> None:
    change_byte(saved.path / step_name(30) / RANK_0, 500)
    (saved.path / step_name(20) / RANK_0).unlink()
    before = names(saved.path)
    for step, problem in (
        (30, rf"step-000000030: is damaged \({RANK_0} has other content from byte 0 on\); nothing was changed"),
        (20, rf"no complete checkpoint of step 20 \(step-000000020: {RANK_0} is missing\)"),
        (35, r"no checkpoint of step 35; there are: 50, 40, 30, 20, 10$"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            roll_back(saved, step, lambda *_: None)
    assert names(saved.path) == before
    assert latest(saved.path) == step_name(50)


@pytest.mark.parametrize("words", [("prune", "--keep", "2", "--yes"), ("rollback", "10")])
def test_what_changes_a_run_waits_for_its_training(saved: LocalFolder, config: TrainConfig, words: tuple[str]) -> None:
    command = ["checkpoint", words[0], str(config.run), *words[1:]]
    inner = ["checkpoint", words[0], str(config.run / "checkpoints"), *words[1:]]
    with training(config.run):
        for given in (command, inner):
            outcome = vitscale(*given)
            assert (outcome.code, outcome.out) == (1, "")
            assert f"is being trained, and {words[0]} would change its checkpoints meanwhile" in outcome.errors
        assert vitscale("checkpoint", "prune", config.run, "--keep", 2, "--dry-run").code == 0
    assert steps_in(saved) == list(reversed(STEPS))
    assert vitscale(*command).code == 0


def test_what_changes_a_run_needs_to_know_the_run(saved: LocalFolder, config: TrainConfig) -> None:
    (config.run / "config.yaml").unlink()
    for given in (config.run, saved.path):
        place = find_place(str(given))
        assert (place.folder.location, place.run) == (str(saved.path), None)
        assert [entry.step for entry in list_entries(place.folder)] == [50, 40, 30, 20, 10]
        with (
            pytest.raises(CheckpointError, match=r"prune needs the run folder \(with config.yaml\)"),
            not_trained(place, "prune"),
        ):
            pass


def test_the_run_may_have_its_checkpoints_elsewhere(tmp_path: Path, ranks: Ranks) -> None:
    config = make_run(tmp_path / "run", f"checkpoint.folder={tmp_path / 'elsewhere'}")
    save_into(LocalFolder(tmp_path / "elsewhere"), config, ranks, 10)
    place = find_place(str(config.run))
    assert (place.folder.location, place.run) == (str(tmp_path / "elsewhere"), config.run)
    assert [entry.step for entry in list_entries(place.folder)] == [10]


def on_terminal(*words: object, typed: str = "", stdout: int | None = None) -> tuple[int, str, str]:
    """Exit status, what the terminal shows that stdin and stderr are, and what goes to stdout if that is a pipe."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "vitscale", "checkpoint", *map(str, words)]
    process = subprocess.Popen(
        command, env=environment(TERM="xterm"), stdin=theirs, stderr=theirs, stdout=stdout or theirs, text=True
    )
    os.close(theirs)
    os.write(ours, typed.encode())
    out, _ = process.communicate(timeout=60)
    shown = b""
    # The end of the other side reads as an error.
    with suppress(OSError):
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    return process.returncode, shown.decode(), out or ""


def test_on_a_terminal_there_are_a_table_a_bar_and_a_question(saved: LocalFolder, config: TrainConfig) -> None:
    code, shown, _ = on_terminal("list", config.run)
    assert code == 0
    assert "│ 50   │ 800" in shown
    # Results go where they are sent, the bar to the terminal.
    code, shown, out = on_terminal("verify", config.run, stdout=subprocess.PIPE)
    assert (code, out) == (0, "step-000000050: OK\n")
    assert "OK" not in shown
    assert "━" in shown
    for typed, left in (("n\n", [50, 40, 30, 20, 10]), ("y\n", [50, 40])):
        code, shown, _ = on_terminal("prune", config.run, "--keep", 2, typed=typed)
        assert "Remove 3 checkpoints, " in shown
        assert code == (typed == "n\n")
        assert steps_in(saved) == left


def test_checkpoints_on_object_storage_are_treated_alike(tmp_path: Path, ranks: Ranks, s3: S3Server) -> None:
    url = f"{s3.bucket()}/runs/one"
    config = make_run(tmp_path / "run", f"checkpoint.folder={url}")
    folder = ObjectFolder(url)
    save_into(folder, config, ranks, *STEPS)
    # Without a run folder one may look, and no more.
    listed = json.loads(vitscale("checkpoint", "list", url, "--json", **s3.environment).out)
    assert [(each["step"], each["latest"]) for each in listed] == [
        (50, True),
        *((step, False) for step in (40, 30, 20, 10)),
    ]
    assert vitscale("checkpoint", "verify", url, 40, **s3.environment) == (0, "step-000000040: OK\n", "")
    refused = vitscale("checkpoint", "rollback", url, 40, **s3.environment)
    assert refused.code == 1
    assert refused.errors.startswith(f"vitscale: error: {url}: rollback needs the run folder")

    assert vitscale("checkpoint", "prune", config.run, "--keep", 3, "--yes", **s3.environment).code == 0
    outcome = vitscale("checkpoint", "rollback", config.run, 40, **s3.environment)
    assert outcome.code == 0, outcome.errors
    assert outcome.out.startswith("set aside: step-000000050/rolled-back-manifest.json\n")
    assert [entry.step for entry in list_entries(folder)] == [40, 30]
    restored = CheckpointStore(folder, ranks, Retention(last=3)).restore(lambda checkpoint: None)
    assert restored is not None
    assert restored.step == 40


def test_a_place_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder; give a run folder"):
        find_place(str(tmp_path / "nowhere"))
    assert list_entries(find_place(str(tmp_path)).folder) == []
    outcome = vitscale("checkpoint", "list", tmp_path)
    assert (outcome.code, outcome.out) == (0, f"{tmp_path}: holds no checkpoint\n")


def test_records_of_a_damaged_manifest_are_no_traceback(saved: LocalFolder) -> None:
    (saved.path / step_name(50) / "manifest.json").write_bytes(
        manifest_text({"step": 50}, [FileRecord("../escape", 3, (1,))])
    )
    newest, *_ = list_entries(saved)
    assert (newest.state, newest.fault) == ("damaged", "../escape is missing")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-3, "0 s"), (59, "59 s"), (61, "1 min"), (7300, "2 h"), (200_000, "2 d")]
)
def test_ages_are_round(seconds: float, shown: str) -> None:
    assert shown_age(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (1 << 41, "2,048.0 GiB")],
)
def test_sizes_are_round(number: int, shown: str) -> None:
    assert shown_bytes(number) == shown
