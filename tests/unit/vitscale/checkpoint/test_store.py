"""The store on one rank and on two: what becomes visible, what is refused, what survives which fault."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import vitscale.checkpoint.store as store_module
from tests.helpers.distributed import run_ranks
from vitscale.checkpoint.store import Checkpoint, CheckpointStore, open_checkpoint, step_name, step_names
from vitscale.distributed import Ranks, connect
from vitscale.errors import CheckpointError
from vitscale.topology import Topology

RANK_0 = "rank-00000.safetensors"
SIZE = 4096


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with connect(Topology(), timeout_s=60) as connected:
        yield connected


@pytest.fixture
def store(ranks: Ranks, tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints", ranks, keep=3)


def content_of(step: int, rank: int = 0) -> bytes:
    return hashlib.shake_256(f"{step} {rank}".encode()).digest(SIZE)


def commit(store: CheckpointStore, *steps: int, rank: int = 0) -> None:
    for step in steps:
        store.commit({"step": step, "note": "kept"}, lambda path, step=step: write(path, content_of(step, rank)))


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def latest(folder: Path) -> str:
    return (folder / "latest").read_text().removesuffix("\n")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def taken(checkpoint: Checkpoint | None) -> int | None:
    return checkpoint.step if checkpoint else None


def test_commit_makes_a_complete_checkpoint(store: CheckpointStore) -> None:
    commit(store, 10)
    folder = store.folder / "step-000000010"
    assert names(store.folder) == {folder.name, "latest"}
    assert names(folder) == {"manifest.json", RANK_0}
    assert latest(store.folder) == folder.name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"], manifest["step"]) == ("vitscale-checkpoint", 1, 10)
    data = content_of(10)
    assert manifest["files"] == [{"name": RANK_0, "size": SIZE, "sha256": hashlib.sha256(data).hexdigest()}]
    checkpoint = store.newest()
    assert checkpoint == open_checkpoint(store.folder)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.content["note"]) == (10, "kept")
    assert [path.read_bytes() for path in checkpoint.files] == [data]


def test_files_are_as_readable_as_their_folder(store: CheckpointStore) -> None:
    def write_private(path: Path) -> None:
        path.write_bytes(b"x")
        path.chmod(0o600)

    before = os.umask(0o027)
    try:
        folder = store.commit({"step": 1}, write_private)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {
        RANK_0: "0o640",
        "manifest.json": "0o640",
    }


def test_no_checkpoint_is_none(store: CheckpointStore) -> None:
    assert store.newest() is None
    store.folder.mkdir(parents=True)
    assert store.newest() is None
    assert names(store.folder) == set()


def test_staging_is_invisible_and_left_overs_are_removed(store: CheckpointStore) -> None:
    commit(store, 10)
    left_over = store.folder / ".staging-step-000000020"
    shutil.copytree(store.folder / "step-000000010", left_over)
    assert taken(store.newest()) == 10
    assert open_checkpoint(store.folder).step == 10
    assert step_names(store.folder) == ["step-000000010"]
    commit(store, 30)
    assert names(store.folder) == {"step-000000010", "step-000000030", "latest"}


def test_a_left_over_that_cannot_be_removed_is_no_reason_to_stop(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    commit(store, 10, 20, 30)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    commit(store, 40)
    assert latest(store.folder) == "step-000000040"
    assert step_names(store.folder) == [step_name(step) for step in (40, 30, 20)]
    assert "step-000000010 cannot be removed yet: Directory not empty" in caplog.text
    commit(store, 50)
    monkeypatch.undo()
    commit(store, 60)
    assert names(store.folder) == {*(step_name(step) for step in (60, 50, 40)), "latest"}


def test_prune_keeps_the_newest(store: CheckpointStore) -> None:
    commit(store, *range(10, 100, 10))
    assert step_names(store.folder) == [step_name(step) for step in (90, 80, 70)]
    assert latest(store.folder) == "step-000000090"


def test_names_are_ordered_as_numbers(store: CheckpointStore) -> None:
    commit(store, 999_999_999, 1_000_000_000)
    assert taken(store.newest()) == 1_000_000_000


def test_copies_beside_the_checkpoints_are_left_alone(store: CheckpointStore) -> None:
    commit(store, 10, 20)
    copies = {"step-000000020.copy", "step-90", "step-000000030 (1)"}
    for copy in copies:
        shutil.copytree(store.folder / "step-000000010", store.folder / copy)
    (store.folder / "step-000000099").write_text("a file")
    assert taken(store.newest()) == 20
    commit(store, 40, 50)
    assert copies < names(store.folder)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 90; there are: 50, 40, 20$"):
        open_checkpoint(store.folder, 90)


def test_a_commit_out_of_order_keeps_latest_and_what_it_names(ranks: Ranks, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ranks, keep=2)
    commit(store, 20, 30, 10)
    assert latest(store.folder) in step_names(store.folder)


def test_commit_of_a_step_that_exists_changes_nothing(store: CheckpointStore) -> None:
    commit(store, 10)
    before = (store.folder / "step-000000010" / "manifest.json").stat()

    def never(_: Path) -> None:
        raise AssertionError

    assert store.commit({"step": 10}, never) == store.folder / "step-000000010"
    assert (store.folder / "step-000000010" / "manifest.json").stat() == before


def cut_short(folder: Path) -> None:
    os.truncate(folder / RANK_0, SIZE - 1)


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / RANK_0).read_bytes())
    data[SIZE // 2] ^= 1
    (folder / RANK_0).write_bytes(data)


def delete_file(folder: Path) -> None:
    (folder / RANK_0).unlink()


def swap_file(folder: Path) -> None:
    shutil.copy(folder.with_name("step-000000010") / RANK_0, folder / RANK_0)


def folder_for_file(folder: Path) -> None:
    delete_file(folder)
    (folder / RANK_0).mkdir()


def delete_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def folder_for_manifest(folder: Path) -> None:
    delete_manifest(folder)
    (folder / "manifest.json").mkdir()


def manifest_text(text: str | bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "manifest.json").write_bytes(text.encode() if isinstance(text, str) else text)

    return damage


def manifest_of_another_step(folder: Path) -> None:
    shutil.copy(folder.with_name("step-000000010") / "manifest.json", folder / "manifest.json")


def edit_manifest(folder: Path, *, sign: bool, **changes: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    if sign:
        del manifest["manifest_sha256"]
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        manifest["manifest_sha256"] = digest
    path.write_text(json.dumps(manifest))


def change_of_the_state(folder: Path) -> None:
    edit_manifest(folder, sign=False, note="kepu")


def files_of_manifest(*files: Any) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, sign=True, files=list(files))


def escape(name: str) -> Callable[[Path], None]:
    """The right file with the right digest, but outside the checkpoint."""

    def damage(folder: Path) -> None:
        shutil.copy(folder / RANK_0, folder.parent / "outside")
        digest = hashlib.sha256(content_of(30)).hexdigest()
        place = name.format(folder=folder)
        files_of_manifest({"name": place, "size": SIZE, "sha256": digest})(folder)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut_short, f"{RANK_0} has 4095 of 4096 bytes"),
    "flipped byte": (flip_a_byte, f"{RANK_0} has other content"),
    "swapped file": (swap_file, f"{RANK_0} has other content"),
    "deleted file": (delete_file, f"{RANK_0} is missing"),
    "folder for file": (folder_for_file, f"{RANK_0} is missing"),
    "deleted manifest": (delete_manifest, "manifest.json cannot be read (No such file or directory)"),
    "folder for manifest": (folder_for_manifest, "manifest.json cannot be read (Is a directory)"),
    "empty manifest": (manifest_text(""), "unreadable manifest (JSONDecodeError"),
    "binary manifest": (manifest_text(bytes(range(128, 256))), "unreadable manifest (UnicodeDecodeError"),
    "nested manifest": (manifest_text("[" * 200_000), "unreadable manifest (RecursionError"),
    "list for manifest": (manifest_text("[]"), "unreadable manifest (TypeError"),
    "number for manifest": (manifest_text("1"), "unreadable manifest (AttributeError"),
    "other manifest": (manifest_text("{}"), "unreadable manifest (KeyError"),
    "changed state": (change_of_the_state, "its manifest was changed"),
    "another step": (manifest_of_another_step, "its manifest is of step 10"),
    "no files": (files_of_manifest(), "its manifest names no files"),
    "endless file": (
        files_of_manifest({"name": RANK_0, "size": float("inf"), "sha256": ""}),
        "unreadable manifest (Ov",
    ),
    "number for a name": (files_of_manifest({"name": 5, "size": 1, "sha256": ""}), "5 is missing"),
    "path above": (escape("../outside"), "../outside is missing"),
    "path through itself": (escape("../step-000000030/" + RANK_0), f"../step-000000030/{RANK_0} is missing"),
    "absolute path": (escape("{folder}/" + RANK_0), f"{RANK_0} is missing"),
    "the folder above": (files_of_manifest({"name": "..", "size": 4096, "sha256": ""}), ".. is missing"),
    "no name": (files_of_manifest({"name": "", "size": 4096, "sha256": ""}), " is missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_newest_skips_what_is_damaged(
    kind: str, store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit(store, 10, 20, 30)
    damage, said = DAMAGES[kind]
    damage(store.folder / "step-000000030")
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(store.folder, 30)
    assert said in str(raised.value)
    assert open_checkpoint(store.folder).step == 20
    caplog.clear()

    assert taken(store.newest()) == 20
    assert latest(store.folder) == "step-000000020"
    moved = {"step-000000010", "step-000000020", "damaged-step-000000030", "latest"}
    assert names(store.folder) - {"outside"} == moved
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("checkpoint step-000000030 is damaged (")
    assert said in line
    assert line.endswith("; moved to damaged-step-000000030")

    caplog.clear()
    assert taken(store.newest()) == 20
    assert not caplog.records
    commit(store, 30)
    assert taken(store.newest()) == 30


def test_every_damaged_checkpoint_is_moved_aside(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        commit(store, 10, 20)
        flip_a_byte(store.folder / "step-000000010")
        delete_file(store.folder / "step-000000020")
        caplog.clear()
        assert store.newest() is None
        assert names(store.folder) == {"damaged-step-000000010", "damaged-step-000000020"}
        assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
            f"none of the 2 checkpoints in {store.folder} is complete",
            "checkpoint step-000000020 is damaged",
            "checkpoint step-000000010 is damaged",
        ]
    commit(store, 10)
    assert latest(store.folder) == "step-000000010"


@pytest.mark.parametrize("content", [b"step-000000010\n", b"", b"\xff\xfe", None])
def test_latest_is_mended(content: bytes | None, store: CheckpointStore) -> None:
    commit(store, 10, 20)
    pointer = store.folder / "latest"
    if content is None:
        pointer.unlink()
    else:
        pointer.write_bytes(content)
    assert taken(store.newest()) == 20
    assert latest(store.folder) == "step-000000020"


def test_another_format_version_is_not_damage(store: CheckpointStore) -> None:
    commit(store, 10, 20)
    edit_manifest(store.folder / "step-000000020", sign=True, format_version=2)
    before = names(store.folder)
    with pytest.raises(
        CheckpointError, match=r"has format vitscale-checkpoint version 2; this vitscale reads .* 1: use"
    ):
        store.newest()
    assert names(store.folder) == before


@pytest.mark.parametrize(("number", "moved"), [(errno.EIO, True), (errno.EACCES, False), (errno.ESTALE, False)])
def test_a_file_out_of_reach_is_not_damage(
    number: int, moved: bool, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that lost the content is; a mount or permission that a person can mend is not."""
    commit(store, 10, 20)
    real, before = store_module._sha256, names(store.folder)

    def fail(path: Path) -> str:
        if path.parent.name == "step-000000020":
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(store_module, "_sha256", fail)
    if moved:
        assert taken(store.newest()) == 10
    else:
        with pytest.raises(CheckpointError, match=r"this rank cannot read it: .*; no checkpoint was changed"):
            store.newest()
        assert names(store.folder) == before


def test_a_checkpoints_folder_that_cannot_be_read_is_an_error(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken for empty, the run would start anew."""
    commit(store, 10)

    def refuse(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    for ask in (store.newest, lambda: open_checkpoint(store.folder)):
        with pytest.raises(CheckpointError, match="cannot be read: Permission denied; mend"):
            ask()


def test_open_checkpoint_says_what_there_is(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoints: holds no checkpoint; train first$"):
        open_checkpoint(store.folder)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; there are: none$"):
        open_checkpoint(store.folder, 5)
    commit(store, 10, 20)
    assert open_checkpoint(store.folder).step == 20
    assert open_checkpoint(store.folder, 10).step == 10
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; there are: 20, 10$"):
        open_checkpoint(store.folder, 5)
    cut_short(store.folder / "step-000000010")
    flip_a_byte(store.folder / "step-000000020")
    message = (
        rf"no complete checkpoint \(step-000000020: {RANK_0} has other content; "
        rf"step-000000010: {RANK_0} has 4095 of 4096 bytes\); train again or restore a copy$"
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(store.folder)
    assert step_names(store.folder) == ["step-000000020", "step-000000010"]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond ``size`` fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("part", "limit"), [("fragments", SIZE // 2), ("manifest", SIZE)])
def test_a_full_disk_leaves_the_old_checkpoints(part: str, limit: int, store: CheckpointStore) -> None:
    commit(store, 10, 20)
    before = names(store.folder)
    large = {"step": 30, "note": "" if part == "fragments" else SIZE * "x"}
    with (
        file_size_limit(limit),
        pytest.raises(CheckpointError, match=r"cannot (write|commit): File too large; .*free space or mend the disk"),
    ):
        store.commit(large, lambda path: write(path, content_of(30)))
    assert names(store.folder) == before
    assert latest(store.folder) == "step-000000020"
    commit(store, 30)
    assert taken(store.newest()) == 30


def test_a_run_folder_that_cannot_be_written_is_an_error(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    store = CheckpointStore(tmp_path / "run" / "checkpoints", ranks, keep=2)
    with pytest.raises(CheckpointError, match=r"cannot create: .*; check the run folder"):
        commit(store, 10)


def test_folders_are_synced_where_the_file_system_can(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and folder reaches the disk before the rename that makes it count."""
    events: list[str] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def place(path: object) -> str:
        return str(path).removeprefix(str(store.folder.parent)).removeprefix("/")

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"sync {place(path)}")
        real_fsync(descriptor)
        if path.is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {place(a)}"), real_rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"rename {place(a)}"), real_replace(a, b)))
    commit(store, 10)
    staging = "checkpoints/.staging-step-000000010"
    assert events == [
        "sync ",
        f"sync {staging}/{RANK_0}",
        f"sync {staging}/.manifest.json.tmp",
        f"rename {staging}/.manifest.json.tmp",
        f"sync {staging}",
        f"rename {staging}",
        "sync checkpoints",
        "sync checkpoints/.latest.tmp",
        "rename checkpoints/.latest.tmp",
        "sync checkpoints",
    ]


@contextmanager
def two_ranks(topology: Topology, folder: Path) -> Iterator[tuple[CheckpointStore, list[str]]]:
    """A store and the list that its log lines on this rank go to."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(store_module.__name__).addHandler(handler)
    with connect(topology, timeout_s=60) as ranks:
        yield CheckpointStore(folder, ranks, keep=4), lines


def _ranks_agree(topology: Topology, folder: Path) -> None:
    rank = topology.rank
    with two_ranks(topology, folder) as (store, lines):
        commit(store, 10, 20, 30, rank=rank)
        checkpoint = store.newest()
        assert checkpoint is not None
        assert [path.name for path in checkpoint.files] == [RANK_0, "rank-00001.safetensors"]
        assert [path.read_bytes() for path in checkpoint.files] == [content_of(30, 0), content_of(30, 1)]
        store._ranks.barrier()
        # Each rank compares the digest of one file.
        for step, file in ((30, "rank-00001.safetensors"), (20, RANK_0)):
            if rank == 0:
                (folder / step_name(step) / file).write_bytes(bytes(SIZE))
            lines.clear()
            assert taken(store.newest()) == step - 10
            assert latest(folder) == step_name(step - 10)
            moved = f"checkpoint {step_name(step)} is damaged ({file} has other content); moved to damaged-"
            assert [line.startswith(moved) for line in lines] == ([True] if rank == 0 else [])


def test_ranks_agree_whoever_finds_the_fault(tmp_path: Path) -> None:
    run_ranks(_ranks_agree, 2, tmp_path / "checkpoints")
    assert names(tmp_path / "checkpoints") == {
        "step-000000010",
        "damaged-step-000000020",
        "damaged-step-000000030",
        "latest",
    }


def _failures_of_rank_1(topology: Topology, folder: Path) -> None:
    rank = topology.rank
    with two_ranks(topology, folder) as (store, _):
        commit(store, 10, 20, rank=rank)
        before = names(folder)
        store._ranks.barrier()

        def broken_write(path: Path) -> None:
            path.write_bytes(content_of(30, rank))
            if rank == 1:
                raise CheckpointError("rank 1 has no space")

        def broken_disk(path: Path) -> None:
            path.write_bytes(content_of(30, rank))
            if rank == 1:
                raise OSError(errno.EIO, "planted")

        for fault, text in (
            (broken_write, "^rank 1 has no space$"),
            (broken_disk, "rank-00001.* cannot write: planted"),
        ):
            with pytest.raises(CheckpointError, match=text) as raised:
                store.commit({"step": 30}, fault)
            assert raised.value.agreed
            store._ranks.barrier()
            assert names(folder) == before
            store._ranks.barrier()

        checkpoint = store.newest()
        assert checkpoint is not None
        assert checkpoint.step == 20

        def broken_read(files: list[Path]) -> None:
            assert len(files) == 2
            if rank == 1:
                raise CheckpointError("rank 1 misses a range")

        with pytest.raises(CheckpointError, match="rank 1 misses a range") as raised:
            store.read(checkpoint, broken_read)
        assert raised.value.agreed
        _without_the_shared_folder(store, rank, before)
        commit(store, 30, rank=rank)
        assert taken(store.newest()) == 30


def _without_the_shared_folder(store: CheckpointStore, rank: int, before: set[str]) -> None:
    """Rank 1 sees none of rank 0's files."""
    real_digest, real_is_dir = store_module._sha256, Path.is_dir

    def missing(path: Path) -> str:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    if rank == 1:
        store_module._sha256 = missing
        Path.is_dir = lambda path: False  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"rank-00001.*: this rank cannot read it: No such file"):
        store.newest()
    with pytest.raises(
        CheckpointError, match="this rank does not see it; the run folder must be on a file system that"
    ):
        commit(store, 30)
    store_module._sha256, Path.is_dir = real_digest, real_is_dir  # type: ignore[method-assign]
    store._ranks.barrier()
    assert names(store.folder) == before
    store._ranks.barrier()


def test_a_failure_of_one_rank_is_the_error_of_all(tmp_path: Path) -> None:
    run_ranks(_failures_of_rank_1, 2, tmp_path / "checkpoints")
    assert step_names(tmp_path / "checkpoints") == [step_name(step) for step in (30, 20, 10)]


WRITES = ("open", "write", "fsync", "rename", "replace", "mkdir", "chmod", "unlink", "rmdir")


class _Death:
    """Kills this process at the n-th of the calls that change the disk, before it or after it."""

    def __init__(self, point: int, *, after: bool) -> None:
        self._left, self._after = point, after

    def plant(self) -> None:
        for name in WRITES:
            setattr(os, name, self._deadly(getattr(os, name)))
        read_or_write, deadly = io.open, self._deadly(io.open)

        def open_file(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            chosen = deadly if "w" in mode else read_or_write
            return chosen(file, mode, *arguments, **keywords)

        io.open = open_file  # type: ignore[assignment]

    def _deadly(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            self._left -= 1
            if self._left == -1 and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*arguments, **keywords)
            finally:
                if self._left == -1:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapper


def _in_child(function: Callable[[], None]) -> int:
    """Exit status of a forked process."""
    child = os.fork()
    if not child:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _store_in_child(folder: Path) -> CheckpointStore:
    # Not left in an orderly way: the process ends right after.
    return CheckpointStore(folder, connect(Topology(), timeout_s=60).__enter__(), keep=2)


def _write_in_halves(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, data[: SIZE // 2])
    os.write(descriptor, data[SIZE // 2 :])
    os.close(descriptor)


def _commit_and_die(folder: Path, point: int, after: bool) -> None:
    store = _store_in_child(folder)
    _Death(point, after=after).plant()
    for step in (20, 30):
        store.commit({"step": step}, lambda path, step=step: _write_in_halves(path, content_of(step)))


def _look_and_go_on(folder: Path, progress: Path) -> None:
    pointed = open_checkpoint(folder, int(latest(folder).removeprefix("step-")))
    for name in step_names(folder):
        open_checkpoint(folder, int(name.removeprefix("step-")))
    store = _store_in_child(folder)
    checkpoint = store.newest()
    assert checkpoint is not None
    assert checkpoint.step in {10, 20, 30}
    assert pointed.step in {10, 20, 30}
    assert pointed.step <= checkpoint.step
    assert checkpoint.step >= int(progress.read_text())
    progress.write_text(str(checkpoint.step))
    assert [path.read_bytes() for path in checkpoint.files] == [content_of(checkpoint.step)]
    commit(store, 40)
    assert latest(folder) == "step-000000040"
    assert names(folder) - {".latest"} == {step_name(checkpoint.step), "step-000000040", "latest"} | (
        set(step_names(folder))
    )
    assert len(step_names(folder)) == 2


def _die_at_every_write(topology: Topology, tmp_path: Path, after: bool) -> None:
    first, folder, progress = tmp_path / "first", tmp_path / "checkpoints", tmp_path / "progress"
    progress.write_text("10")
    assert _in_child(lambda: commit(_store_in_child(first), 10)) == 0
    for point in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(first, folder)
        status = _in_child(lambda point=point: _commit_and_die(folder, point, after))
        assert status in (0, -signal.SIGKILL), (point, status)
        assert _in_child(lambda: _look_and_go_on(folder, progress)) == 0, (point, after)
        if status == 0:
            break
    # Fewer would mean that the calls are not seen any more.
    assert point >= 35
    assert progress.read_text() == "30"
    print(f"killed {'after' if after else 'before'} each of {point} writes")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_death_at_any_write_leaves_the_old_or_the_new_checkpoint(after: bool, tmp_path: Path) -> None:
    run_ranks(_die_at_every_write, 1, tmp_path, after)
