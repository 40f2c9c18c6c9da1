"""Opening shard sets from folders, servers and object storage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.bad_http import BadServer
from tests.helpers.s3 import S3Server, upload
from tests.helpers.shardset import folder_of, make_shardset
from vitscale.config.schema import DataConfig, StorageConfig
from vitscale.data import shard_set
from vitscale.data.manifest import Manifest
from vitscale.data.order import SequentialOrder, WindowId
from vitscale.data.shard_set import open_shard_set, open_source, open_training_data
from vitscale.data.storage.transfer import host_counters
from vitscale.data.stream import Fault, RawSample, ShardStream
from vitscale.errors import DataError

SIZES = [7, 1, 20, 3, 12]
QUICK = StorageConfig(request_timeout_s=0.3, total_timeout_s=0.6)


@pytest.fixture
def local(tmp_path: Path) -> Manifest:
    return make_shardset(tmp_path / "train", SIZES, sha256=True)


@pytest.fixture
def server(local: Manifest) -> Iterator[BadServer]:
    served = BadServer()
    served.files = {path.name: path.read_bytes() for path in folder_of(local).iterdir()}
    yield served
    served.stop()


def everything(manifest: Manifest, storage: StorageConfig = QUICK) -> list[RawSample | Fault]:
    order = SequentialOrder([shard.num_samples for shard in manifest.shards], window=8)
    stream = ShardStream([open_source(manifest, storage)], order)
    return [sample for n in range(-(-manifest.num_samples // 8)) for sample in stream.read_window(WindowId(0, 0, n))]


def requests() -> int:
    return sum(counters.requests for counters in host_counters().values())


def refusal(location: str, storage: StorageConfig = QUICK) -> str:
    with pytest.raises(DataError) as caught:
        open_shard_set(location, storage)
    return str(caught.value)


def test_the_same_samples_from_everywhere(local: Manifest, server: BadServer, s3: S3Server) -> None:
    expected = everything(local)
    assert all(isinstance(sample, RawSample) for sample in expected)
    folder = folder_of(local)
    locations = [f"file://{folder}", server.url, f"{server.url}/", upload(s3, folder)]
    for location in locations:
        manifest = open_shard_set(location, replace(QUICK, total_timeout_s=20, request_timeout_s=10))
        assert replace(manifest, location=local.location) == local
        assert everything(manifest) == expected
    piped = StorageConfig(allow_pipe=True)
    assert everything(open_shard_set(f"pipe:cat {folder}/{{name}}", piped), piped) == expected


def test_tars_that_lie_elsewhere_than_the_index(local: Manifest, server: BadServer, tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    for shard in local.shards:
        shutil.copy(folder_of(local) / shard.idx_name, index)
    (index / "index.json").write_text(json.dumps(replace(local, base_url=server.url).to_json()))
    server.files = {name: data for name, data in server.files.items() if name.endswith(".tar")}
    manifest = open_shard_set(str(index), QUICK)
    assert everything(manifest) == everything(local)


@pytest.mark.parametrize("kind", ["http", "pipe"])
def test_a_cache_answers_what_was_read_before(local: Manifest, server: BadServer, tmp_path: Path, kind: str) -> None:
    marks = tmp_path / "marks"
    location = server.url if kind == "http" else f"pipe:echo >> {marks}; cat {folder_of(local)}/{{name}}"
    storage = StorageConfig(cache=tmp_path / "cache", allow_pipe=True)
    manifest = open_shard_set(location, storage)
    first = everything(manifest, storage)
    assert first == everything(local)
    asked = requests()
    # As another process would see it.
    shard_set._node_cache.cache_clear()
    assert everything(manifest, storage) == first
    assert requests() == asked
    if kind == "pipe":
        assert len(marks.read_text().splitlines()) == 1 + 2 * len(SIZES)


def test_a_mixture_of_places(local: Manifest, server: BadServer, tmp_path: Path) -> None:
    other = make_shardset(tmp_path / "other", [4, 4])
    data = DataConfig(train={other.location: 3.0, server.url: 1.0}, image_size=8, storage=QUICK)
    mixture = open_training_data(data, global_batch_size=8)
    assert {part.manifest.location: part.slots for part in mixture.parts} == {other.location: 6, server.url: 2}


def test_a_set_that_is_not_there(server: BadServer) -> None:
    server.files = {"else": b""}
    assert refusal(server.url) == (
        f"{server.url}: holds no index.json, so it is not a shard set; give the folder that holds it, or make one with "
        f"'vitscale shards index {server.url}'"
    )


def test_an_index_of_something_else(server: BadServer) -> None:
    server.files["index.json"] = b"\xff"
    assert refusal(server.url).startswith(f"{server.url}/index.json: not a shard index (UnicodeDecodeError")


def test_files_of_a_server_that_differ_from_the_index(local: Manifest, server: BadServer) -> None:
    name = local.shards[2].name
    server.files[name] += b"more"
    size = local.shards[2].num_bytes
    assert f"{name} has {size + 4} bytes where the index says {size}; the index and the tars" in refusal(server.url)
    del server.files[name]
    assert f"{server.url}: {name} is missing; the index and the tars must come from one writing" in refusal(server.url)


def test_of_a_large_remote_set_a_few_spread_tars_are_looked_at(
    local: Manifest, server: BadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_set, "REMOTE_CHECKS", 2)
    del server.files[local.shards[1].name]
    assert open_shard_set(server.url, QUICK).num_samples == sum(SIZES)
    assert {request.name for request in server.requests if request.name.endswith(".tar")} == {
        local.shards[0].name,
        local.shards[2].name,
    }
