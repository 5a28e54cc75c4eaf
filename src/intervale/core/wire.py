"""JSON as it goes over a wire. orjson, because a picture of half a megabyte in a text costs json a millisecond, each way."""

from __future__ import annotations

import json
from typing import Any

import orjson


def to_json(value: Any) -> bytes:
    """UTF-8 JSON without spaces. Half a surrogate pair, which UTF-8 cannot hold, becomes '?'."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def from_json(data: bytes | str) -> Any:
    """The value. Raises: ValueError when it is not JSON."""
    return orjson.loads(data)
