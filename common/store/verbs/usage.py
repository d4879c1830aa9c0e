"""Usage: how much of the cards was used, and quotas of it."""

from __future__ import annotations

from ..queries import spent, usage
from .verb import Subject, reads, writes


class UsageVerbs(Subject):
    """Verbs about usage."""

    since = reads(spent.read_spent)
    card_hours = reads(spent.read_card_hours)
    allowances = reads(spent.read_allowances)
    past = reads(spent.read_past)
    set_quota = writes(usage.set_quota)
    remove_quota = writes(usage.remove_quota)
