"""A safetensors file by its header, without torch: others may have written it, or truncated it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

LARGEST_HEADER = 100_000_000
"""Bytes that safetensors allows for a header."""


def tensor_file_fault(file: Path) -> str | None:
    """Why nothing can load it, after its name: "is not a safetensors file: ..."; None where its header and size fit.

    Raises OSError.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        try:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > LARGEST_HEADER:
                raise ValueError("it does not begin as one; is it a pointer of Git LFS?")
            header = json.loads(opened.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            told = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        except (ValueError, RecursionError, struct.error, AttributeError, KeyError, TypeError, IndexError) as error:
            return f"is not a safetensors file: {error}"
    return None if size == told else f"has {size} bytes, and {told} by its header: it was cut off"
