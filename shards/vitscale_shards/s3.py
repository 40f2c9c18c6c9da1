"""What s3fs has to be told: little memory for an upload, and an end to every request."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import ReadTimeoutError

from vitscale.data.storage.drivers import s3_options

# An upload holds so many parts of this size in memory at a time; s3fs by itself would hold 500 MiB.
PART_BYTES = 8 << 20
PARTS_AT_A_TIME = 4
# The most that S3 puts together: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MAX_PARTS = 10_000
# For one part, with all that go at the same time: half a MiB per second.
UPLOAD_PATIENCE_S = 60.0


class Session(AIOHTTPSession):  # type: ignore[misc]
    """Requests with a body end too.

    botocore has them ask for leave to send it ("Expect: 100-continue"), and aiohttp has no timeout while it waits for
    the answer: a store that stalls there would stop a worker for ever.
    """

    async def send(self, request: Any) -> Any:
        """Send a request; botocore and s3fs repeat it after a timeout."""
        if "Expect" not in request.headers:
            return await super().send(request)
        try:
            return await asyncio.wait_for(super().send(request), UPLOAD_PATIENCE_S)
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url=request.url, error=error) from error


def driver_options() -> dict[str, Any]:
    """Arguments of s3fs's constructor."""
    return s3_options(http_session_cls=Session)


def upload_options(size: int) -> dict[str, int]:
    """Arguments of its ``put_file``."""
    return {"chunksize": max(PART_BYTES, math.ceil(size / MAX_PARTS)), "max_concurrency": PARTS_AT_A_TIME}
