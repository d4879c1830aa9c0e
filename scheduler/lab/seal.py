"""Addresses and keys under a key that is used once: what lies in the database tells nothing, nor do its dumps and logs.

A stream of SHAKE-256 keyed by 32 random bytes, and an HMAC over what it hides (encrypt, then authenticate). Python has
no cipher of its own; a key that seals one text needs no more than this.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

_TAG = 32


def seal(key: bytes, text: str) -> str:
    """The text under a key of 32 bytes that has sealed nothing else."""
    hidden = _masked(key, text.encode())
    return base64.b64encode(_tag(key, hidden) + hidden).decode()


def unseal(key: bytes, sealed: str) -> str:
    """The text. Raises ValueError when another key has sealed it, or it was changed."""
    raw = base64.b64decode(sealed)
    if not hmac.compare_digest(raw[:_TAG], _tag(key, raw[_TAG:])):
        raise ValueError("sealed by another key, or changed")
    return _masked(key, raw[_TAG:]).decode()


def _masked(key: bytes, data: bytes) -> bytes:
    stream = hashlib.shake_256(b"loractl stream" + key).digest(len(data))
    return bytes(a ^ b for a, b in zip(data, stream, strict=True))


def _tag(key: bytes, hidden: bytes) -> bytes:
    return hmac.digest(hashlib.sha256(b"loractl tag" + key).digest(), hidden, "sha256")
