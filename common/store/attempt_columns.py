"""The columns of a job's row that are an attempt's: which its beginning, its end and a person's retry clear.

Every nullable column of the job that an attempt writes and that its successor must not see stands in one of the groups.
"""

from __future__ import annotations

from typing import Any

RIGHT = ("token", "lease_expires_at", "vram_reserved", "stage", "preempted_by")
"""What makes an attempt the job's running one."""

EXPECTED = ("eta_seconds", "eta_spread_seconds")
"""When it ends. Nothing expects that of an attempt that has ended."""

REACHED = ("step", "total_steps", "loss", "tokens_per_second")
"""How far it came. A person reads it until the next attempt begins."""

VERDICT = ("reason", "message", "not_before")
"""How the last attempt ended, and how long the next one waits for it."""

LIFE = {"cancel_requested": False, "held": False, "retries_used": 0, "ended_at": None}
"""What only a person's retry takes back."""


def begun() -> dict[str, Any]:
    """What an attempt that begins clears, before it writes its right."""
    return dict.fromkeys((*EXPECTED, *REACHED, *VERDICT))


def ended() -> dict[str, Any]:
    """What an attempt that ends clears, before it writes its verdict."""
    return dict.fromkeys((*RIGHT, *EXPECTED))


def retried() -> dict[str, Any]:
    """What a person's retry clears. RIGHT and EXPECTED are not in it: every end has cleared them.

    PostgreSQL's role that submits may write no other columns (docs/deploy.md).
    """
    return {**dict.fromkeys((*REACHED, *VERDICT)), **LIFE}
