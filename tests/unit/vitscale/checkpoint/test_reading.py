"""Tensors out of the files of any ranks: the right elements, out of verified bytes, and of no more than are needed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.vitscale.checkpoint.small_state import RANK_0, RANK_1, blocks_of, write_checkpoint
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import (
    MASTER,
    Checkpoint,
    DamagedCheckpointError,
    FileRecord,
    Layout,
    manifest_text,
    rank_file,
    read_manifest,
    step_name,
)
from vitscale.checkpoint.reading import Wanted, read_parameters, read_wanted, verify_files
from vitscale.errors import CheckpointError

STEP = 5
Whole = dict[tuple[str, str], Tensor]


class Watched(LocalFolder):
    """Notes which blocks are read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[tuple[str, int]] = []

    def read(self, name: str, file: str, start: int, length: int) -> bytes:
        self.reads.append((file, start))
        return super().read(name, file, start, length)


def random(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@contextmanager
def written(whole: Whole, layouts: dict[str, Layout], *, block_bytes: int) -> Iterator[tuple[Watched, Checkpoint]]:
    """A checkpoint in a folder that is gone afterwards."""
    with TemporaryDirectory() as parent, blocks_of(block_bytes):
        folder = Watched(Path(parent) / "checkpoints")
        write_checkpoint(folder, STEP, whole, layouts)
        yield folder, read_manifest(folder, step_name(STEP))


@st.composite
def states(draw: st.DrawFn) -> tuple[Whole, dict[str, Layout]]:
    """Tensors and layouts, either as ZeRO 1 and 2 spread them (one after the other) or each by itself."""
    numels = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    kinds = draw(st.sampled_from([(MASTER,), (MASTER, "exp_avg")]))
    together, offset, layouts = draw(st.booleans()), 0, {}
    size = draw(st.integers(4, 80))
    for index, numel in enumerate(numels):
        layouts[f"p{index}"] = Layout(offset, size) if together else Layout(0, draw(st.integers(4, 80)))
        offset += numel
    names = [(f"p{index}", kind, numel) for index, numel in enumerate(numels) for kind in kinds]
    return {(name, kind): random(numel, seed) for seed, (name, kind, numel) in enumerate(names)}, layouts


@settings(max_examples=60, deadline=None)
@given(states(), st.sampled_from([16, 100, 1 << 12]), st.data())
def test_any_ranges_of_any_layout_are_what_was_saved(
    state: tuple[Whole, dict[str, Layout]], block_bytes: int, data: st.DataObject
) -> None:
    whole, layouts = state
    windows = []
    for name, kind in data.draw(st.lists(st.sampled_from(sorted(whole)), max_size=6)):
        start = data.draw(st.integers(0, whole[name, kind].numel() - 1))
        windows.append((name, kind, start, data.draw(st.integers(start + 1, whole[name, kind].numel()))))
    with written(whole, layouts, block_bytes=block_bytes) as (folder, checkpoint):
        wanted = [Wanted(name, kind, start, torch.full((end - start,), -7.0)) for name, kind, start, end in windows]
        read_wanted(checkpoint, iter(wanted))
        for (name, kind, start, end), want in zip(windows, wanted, strict=True):
            assert torch.equal(want.values, whole[name, kind][start:end])
        assert set(folder.reads) == _needed(folder, checkpoint, windows, block_bytes)


@settings(max_examples=30, deadline=None)
@given(states(), st.sampled_from([16, 100, 1 << 12]))
def test_whole_parameters_take_one_pass(state: tuple[Whole, dict[str, Layout]], block_bytes: int) -> None:
    whole, layouts = state
    with written(whole, layouts, block_bytes=block_bytes) as (folder, checkpoint):
        for kind in {kind for _, kind in whole}:
            folder.reads.clear()
            read = read_parameters(checkpoint, kind)
            assert read.keys() == layouts.keys()
            assert all(torch.equal(values, whole[name, kind]) for name, values in read.items())
            assert len(folder.reads) == len(set(folder.reads))


def _needed(
    folder: Watched, checkpoint: Checkpoint, windows: list[tuple[str, str, int, int]], block_bytes: int
) -> set[tuple[str, int]]:
    """The header's blocks of each file that holds some of the windows, and those of the elements, one by one."""
    needed: set[tuple[str, int]] = set()
    for name, kind, start, end in windows:
        layout = checkpoint.layout(name)
        for element in range(start, end):
            rank = (layout.offset + element) // layout.size
            header, places = _header(folder.path / checkpoint.name / rank_file(rank))
            first = max(0, rank * layout.size - layout.offset)
            at = header + places[f"{name}|{kind}|{first}"] + 4 * (element - first)
            for byte in (*range(0, header), *range(at, at + 4)):
                needed.add((rank_file(rank), byte // block_bytes * block_bytes))
    return needed


def _header(path: Path) -> tuple[int, dict[str, int]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    return 8 + length, {key: entry["data_offsets"][0] for key, entry in entries.items()}


# Two ranks with one half of each of two tensors, in files of a few hundred bytes.
TWO: dict[str, Layout] = {"a": Layout(0, 20), "b": Layout(0, 20)}


def two(seed: int = 0) -> Whole:
    return {(name, MASTER): random(40, seed + number) for number, name in enumerate(TWO)}


def test_a_changed_byte_is_found_wherever_it_is() -> None:
    with written(two(), TWO, block_bytes=64) as (folder, checkpoint):
        for file in (RANK_0, RANK_1):
            path = folder.path / checkpoint.name / file
            data = path.read_bytes()
            assert len(data) > 4 * 64
            for place in range(len(data)):
                path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
                message = f"^{file} has other content from byte {place // 64 * 64} on$"
                with pytest.raises(DamagedCheckpointError, match=message):
                    read_parameters(checkpoint)
                with pytest.raises(DamagedCheckpointError, match=message):
                    list(verify_files(checkpoint, checkpoint.records))
            path.write_bytes(data)
        assert read_parameters(checkpoint).keys() == TWO.keys()


def test_what_is_not_needed_is_not_read() -> None:
    """Another rank's file, and other parts of this one, may be gone or changed."""
    with written(two(), TWO, block_bytes=64) as (folder, checkpoint):
        path = folder.path / checkpoint.name
        (path / RANK_1).unlink()
        os.truncate(path / RANK_0, (path / RANK_0).stat().st_size - 32)
        part = torch.empty(20)
        read_wanted(checkpoint, [Wanted("a", MASTER, 0, part)])
        assert torch.equal(part, two()["a", MASTER][:20])
        with pytest.raises(CheckpointError, match=rf"{RANK_1}: this rank cannot read it: No such file"):
            read_wanted(checkpoint, [Wanted("a", MASTER, 0, torch.empty(21))])
        with pytest.raises(DamagedCheckpointError, match=rf"^{RANK_0} has other content"):
            read_wanted(checkpoint, [Wanted("b", MASTER, 0, torch.empty(20))])


def test_all_of_every_file_is_compared_on_demand() -> None:
    with written(two(), TWO, block_bytes=64) as (folder, checkpoint):
        sizes = {record.name: record.size for record in checkpoint.records}
        read = dict.fromkeys(sizes, 0)
        for record, num_bytes in verify_files(checkpoint, checkpoint.records):
            read[record.name] += num_bytes
        assert read == sizes
        assert len(folder.reads) == sum(len(record.crc32) for record in checkpoint.records)


def test_a_file_that_was_cut_or_replaced_after_it_was_opened_is_found() -> None:
    with (
        written(two(), TWO, block_bytes=64) as (folder, checkpoint),
        written(two(seed=9), TWO, block_bytes=64) as (other_folder, other),
    ):
        path, older = folder.path / checkpoint.name, other_folder.path / other.name
        kept = {file: (path / file).read_bytes() for file in (RANK_0, RANK_1)}

        def assert_found() -> None:
            with pytest.raises(DamagedCheckpointError, match=r"has other content from byte \d+ on$"):
                read_parameters(checkpoint)
            for file, data in kept.items():
                (path / file).write_bytes(data)
            read_parameters(checkpoint)

        for length in (0, 1, 64, len(kept[RANK_1]) - 1):
            os.truncate(path / RANK_1, length)
            assert_found()
        (path / RANK_0).write_bytes(kept[RANK_1])
        (path / RANK_1).write_bytes(kept[RANK_0])
        assert_found()
        shutil.copy(older / RANK_0, path / RANK_0)
        assert_found()


def test_a_layout_that_the_files_do_not_have_is_damage() -> None:
    """The manifest guards itself, so this is a mistake of whoever wrote it; no wrong element is given."""
    with written(two(), TWO, block_bytes=64) as (_, checkpoint):
        for layout, element, message in (
            (Layout(0, 21), 20, rf"^{RANK_0} does not hold all of a\|master\|0$"),
            (Layout(1, 20), 19, rf"^{RANK_1} does not hold all of a\|master\|19$"),
            (Layout(0, 10), 39, r"^rank-00003.safetensors is not among its files$"),
        ):
            checkpoint.content["parameters"]["a"] |= layout._asdict()
            with pytest.raises(DamagedCheckpointError, match=message):
                read_wanted(checkpoint, [Wanted("a", MASTER, element, torch.empty(1))])
        with pytest.raises(DamagedCheckpointError, match=rf"^{RANK_0} does not hold all of b\|exp_avg\|0$"):
            read_wanted(checkpoint, [Wanted("b", "exp_avg", 0, torch.empty(1))])


@pytest.mark.parametrize(
    "header",
    [
        b"",
        (2**63).to_bytes(8, "little"),
        (56).to_bytes(8, "little") + b"[" * 56,
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        (22).to_bytes(8, "little") + b'{"a|master|0":{"x":1}}',
        (24).to_bytes(8, "little") + b"{}",
        (20).to_bytes(8, "little") + b'{"a|master|0":"abc"}',
    ],
)
def test_a_file_without_a_readable_header_is_damage(header: bytes) -> None:
    with written(two(), TWO, block_bytes=64) as (folder, checkpoint):
        _replace(folder, checkpoint, header)
        with pytest.raises(DamagedCheckpointError, match=rf"^{RANK_0} (has no readable header|ends before byte)"):
            read_parameters(read_manifest(folder, checkpoint.name))


@pytest.mark.parametrize("end", [240, 1 << 40])
@pytest.mark.parametrize("padding", [0, 100])
def test_a_header_that_promises_more_than_there_is_is_damage(end: int, padding: int) -> None:
    entry = b'{"a|master|0":{"data_offsets":[%d,%d]}}' % (end - 80, end)
    text = entry.ljust(56)
    with written(two(), TWO, block_bytes=64) as (folder, checkpoint):
        _replace(folder, checkpoint, len(text).to_bytes(8, "little") + text + bytes(64 + padding))
        with pytest.raises(DamagedCheckpointError, match=rf"^{RANK_0} ends before byte"):
            read_wanted(read_manifest(folder, checkpoint.name), [Wanted("a", MASTER, 0, torch.empty(20))])


def _replace(folder: Watched, checkpoint: Checkpoint, data: bytes) -> None:
    """Publish the checkpoint anew with another content of rank 0's file, and checksums that fit it."""
    (folder.path / checkpoint.name / RANK_0).write_bytes(data)
    crcs = tuple(zlib.crc32(data[start : start + 64]) for start in range(0, len(data), 64))
    records = [FileRecord(RANK_0, len(data), crcs), *checkpoint.records[1:]]
    (folder.path / checkpoint.name / "manifest.json").write_bytes(manifest_text(checkpoint.content, records))


@pytest.mark.parametrize(
    ("number", "lost"), [(errno.EIO, True), (errno.EACCES, False), (errno.ESTALE, False), (errno.ENOENT, False)]
)
def test_out_of_reach_is_not_damage(number: int, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that lost the content is; a mount or permission that a person can mend is not."""

    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    with written(two(), TWO, block_bytes=64) as (folder, checkpoint):
        monkeypatch.setattr(folder, "read", fail)
        with pytest.raises(CheckpointError) as raised:
            read_parameters(checkpoint)
        assert isinstance(raised.value, DamagedCheckpointError) == lost
        if lost:
            assert str(raised.value) == f"{RANK_0} cannot be read (Input/output error)"
        else:
            assert str(raised.value) == (
                f"{checkpoint.shown}/{RANK_0}: this rank cannot read it: {os.strerror(number)}; no checkpoint was "
                f"changed: mend the permissions or the mount of the run folder, which all ranks share, then start the "
                f"same command"
            )


def test_files_of_more_than_one_real_block(tmp_path: Path) -> None:
    numel = (9 << 20) // 4
    whole = {("w", MASTER): random(numel, 1)}
    folder = Watched(tmp_path / "checkpoints")
    write_checkpoint(folder, STEP, whole, {"w": Layout(0, numel)})
    checkpoint = read_manifest(folder, step_name(STEP))
    assert len(checkpoint.records[0].crc32) == 3
    assert torch.equal(read_parameters(checkpoint)["w"], whole["w", MASTER])
    folder.reads.clear()
    part = torch.empty(2)
    read_wanted(checkpoint, [Wanted("w", MASTER, numel - 2, part)])
    assert torch.equal(part, whole["w", MASTER][-2:])
    assert folder.reads == [(RANK_0, 0), (RANK_0, 8 << 20)]
