"""Names and manifests of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.vitscale.checkpoint.small_state import (
    RANK_0,
    RANK_1,
    SHAPES,
    SIZE,
    blocks_of,
    content_of,
    layouts_on,
    values_of,
    write_checkpoint,
)
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import (
    MASTER,
    DamagedCheckpointError,
    Layout,
    fragment_key,
    rank_file,
    read_manifest,
    step_name,
    step_of,
)


@given(st.integers(0, 10**15))
def test_the_name_gives_the_step_back(step: int) -> None:
    assert step_of(step_name(step)) == step


@pytest.mark.parametrize(
    "name", ["step-90", "step-000000090.copy", "step-000000090 (1)", "damaged-step-000000090", ".staging-x", "latest"]
)
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert step_of(name) is None


def test_names_of_files_and_fragments() -> None:
    assert (RANK_0, rank_file(123456)) == ("rank-00000.safetensors", "rank-123456.safetensors")
    assert fragment_key("blocks.0.attn.qkv.weight", "exp_avg", 12) == "blocks.0.attn.qkv.weight|exp_avg|12"


def _write(path: Path, world_size: int) -> LocalFolder:
    folder = LocalFolder(path / "checkpoints")
    write_checkpoint(folder, 7, {(name, MASTER): values_of(7, name) for name in SHAPES}, layouts_on(world_size))
    return folder


def test_a_manifest_tells_what_was_written(tmp_path: Path) -> None:
    folder = _write(tmp_path, 2)
    checkpoint = read_manifest(folder, step_name(7))
    assert (checkpoint.step, checkpoint.content["note"]) == (7, "kept")
    assert checkpoint.shown == f"{tmp_path}/checkpoints/step-000000007"
    assert checkpoint.shapes == {"w": [600], "b": [37]}
    assert {name: checkpoint.layout(name) for name in SHAPES} == {"w": Layout(0, 319), "b": Layout(600, 319)}
    assert [record.name for record in checkpoint.records] == [RANK_0, RANK_1]
    for record in checkpoint.records:
        assert record.size == (tmp_path / "checkpoints" / checkpoint.name / record.name).stat().st_size
        assert len(record.crc32) == 1
    manifest = json.loads((tmp_path / "checkpoints" / checkpoint.name / "manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"], manifest["block_bytes"]) == (
        "vitscale-checkpoint",
        2,
        4 << 20,
    )


def test_the_manifest_does_not_grow_with_fragments(tmp_path: Path) -> None:
    """Two numbers per parameter, whatever the number of ranks."""
    _write(tmp_path / "one", 1)
    _write(tmp_path / "many", 8)
    one, many = (
        json.loads((tmp_path / each / "checkpoints" / step_name(7) / "manifest.json").read_text())
        for each in ("one", "many")
    )
    assert one["parameters"].keys() == many["parameters"].keys() == SHAPES.keys()
    assert all(entry.keys() == {"shape", "offset", "size"} for entry in many["parameters"].values())
    assert (len(one["files"]), len(many["files"])) == (1, 8)


def test_every_byte_of_the_manifest_is_guarded(tmp_path: Path) -> None:
    """No changed byte gives another content: it is found, or it was white space."""
    folder = _write(tmp_path, 1)
    path = tmp_path / "checkpoints" / step_name(7) / "manifest.json"
    data = path.read_bytes()
    before = read_manifest(folder, step_name(7))
    found = 0
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            assert read_manifest(folder, step_name(7)) == before
        except DamagedCheckpointError:
            found += 1
    assert found > 0.6 * len(data)


def test_blocks_of_another_size_are_refused(tmp_path: Path) -> None:
    with blocks_of(64):
        folder = _write(tmp_path, 1)
        assert len(read_manifest(folder, step_name(7)).records[0].crc32) == -(-SIZE // 64)
    with pytest.raises(DamagedCheckpointError, match="its blocks have another size"):
        read_manifest(folder, step_name(7))


def test_content_is_kept_apart_from_the_manifests_own_keys(tmp_path: Path) -> None:
    content = read_manifest(_write(tmp_path, 1), step_name(7)).content
    assert content == content_of(7, layouts_on(1), {"w": [600], "b": [37]})
