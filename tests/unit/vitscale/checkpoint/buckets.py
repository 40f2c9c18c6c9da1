"""A bucket with checkpoints, seen by a client that is not the one under test."""

from __future__ import annotations

from typing import Any

import botocore.session

from tests.helpers.s3 import S3Server
from tests.unit.vitscale.checkpoint.small_state import RANK_0
from vitscale.checkpoint.format import step_name

PREFIX = "runs/one"
MANIFEST = "manifest.json"


class Bucket:
    """A new bucket."""

    def __init__(self, server: S3Server) -> None:
        self.url = server.bucket()
        self.name = self.url.removeprefix("s3://")
        self.client: Any = botocore.session.get_session().create_client("s3")

    def keys(self) -> set[str]:
        """All keys, without the prefix."""
        found = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        return {entry["Key"].removeprefix(f"{PREFIX}/") for entry in found}

    def get(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.name, Key=f"{PREFIX}/{key}")["Body"].read()
        return data

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"{PREFIX}/{key}", Body=data)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=f"{PREFIX}/{key}")

    def etag(self, key: str) -> str:
        return str(self.client.head_object(Bucket=self.name, Key=f"{PREFIX}/{key}")["ETag"])

    def uploads(self) -> list[str]:
        """Keys of uploads that are not completed."""
        return [upload["Key"] for upload in self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])]


def keys_of(*steps: int) -> set[str]:
    return {f"{step_name(step)}/{file}" for step in steps for file in (MANIFEST, RANK_0)}


def flip(bucket: Bucket, key: str) -> None:
    data = bytearray(bucket.get(key))
    data[len(data) // 2] ^= 1
    bucket.put(key, bytes(data))
