"""Quotas for the users of a trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loractl.common.errors import UsageError
from loractl.common.placement.shares import Allowance, parse_quota, window_name
from loractl.common.text import slip_of

LIKE = "like --quota ada=100h/week, or --quota ada=20h/day:soft; also /month"

SOFT = ":soft"


def parse_quotas(texts: Sequence[str], users: Iterable[str]) -> dict[str, Allowance]:
    """Quotas of "ada=100h/week" and "bob=20h/day:soft", by user. Raises UsageError, also for a user that is not one of
    these."""
    known, quotas = sorted(set(users)), dict[str, Allowance]()
    for text in texts:
        user, equals, hours = text.rpartition("=")
        if not equals:
            raise UsageError(f"--quota {text[:60]} names no user", LIKE)
        if user not in known:
            close = slip_of(user, known)
            hint = f"did you mean {close}?" if close else f"its users: {', '.join(known[:10])}"
            raise UsageError(f"--quota {text[:60]}: the trace has no user {user[:40]!r}", hint)
        if user in quotas:
            raise UsageError(f"--quota: {user} has two quotas", "give one for each user")
        try:
            card_hours, window_s = parse_quota(hours.removesuffix(SOFT))
        except ValueError as error:
            raise UsageError(f"--quota {text[:60]}: {hours[:40]!r} {error}", LIKE) from None
        soft = hours.endswith(SOFT)
        quotas[user] = Allowance(card_hours=card_hours, window_s=window_s, soft=soft, used=0.0, below_at=None)
    return quotas


def quota_text(quota: Allowance) -> str:
    """The quota as `loractl quota` lists it: 100 a week, soft."""
    return f"{quota.card_hours:g} a {window_name(quota.window_s)}{', soft' if quota.soft else ''}"
