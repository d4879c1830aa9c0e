"""The columns of a job's row that belong to an attempt, in groups: its start, its end and a retry clear some of them.

A nullable column that an attempt writes and the next attempt must not see belongs in one of the groups.
"""

from __future__ import annotations

from typing import Any

RIGHT = ("token", "lease_expires_at", "vram_reserved", "stage", "preempted_by")
"""Their values say which attempt runs."""

EXPECTED = ("eta_seconds", "eta_spread_seconds", "evaluated", "to_evaluate")
"""When it will end, and how far its evaluation is. An ended attempt has no expected end."""

REACHED = ("step", "total_steps", "loss", "tokens_per_second")
"""How far it came. A person reads it until the next attempt begins."""

VERDICT = ("reason", "message", "not_before")
"""How the last attempt ended, and how long the next one waits for it."""

LIFE = {
    "cancel_requested": False, "held": False, "held_too": False, "retries_used": 0, "lab_failures": 0, "lab_step": None,
    "avoids": None, "ended_at": None,
}  # fmt: skip
"""Cleared by a person's retry alone."""


def begun() -> dict[str, Any]:
    """Cleared when an attempt begins, before it writes its own values."""
    return dict.fromkeys((*EXPECTED, *REACHED, *VERDICT))


def ended() -> dict[str, Any]:
    """Cleared when an attempt ends, before it writes how."""
    return dict.fromkeys((*RIGHT, *EXPECTED))


def retried() -> dict[str, Any]:
    """Cleared by a person's retry. RIGHT and EXPECTED are not in it: every end has cleared them.

    PostgreSQL's role that submits may write no other columns (docs/deploy.md).
    """
    return {**dict.fromkeys((*REACHED, *VERDICT)), **LIFE}
