"""The form of files of tensors, for those who write them one tensor after another: checkpoints and exports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def safetensors_header(entries: Mapping[str, Any]) -> bytes:
    """Its length in 8 bytes, and JSON that is padded with spaces so that data are aligned."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text
