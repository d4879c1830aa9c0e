"""A queue key taken apart again: the priority, size step, required labels and user of the jobs under it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from loractl.common.placement.rule import Openings, size_step


@dataclass(frozen=True, kw_only=True)
class QueueKey:
    """What `queue_key` of the placement rule put together."""

    text: str
    level: str
    step: int
    requires: frozenset[tuple[str, str]]
    user: str

    @classmethod
    def parse(cls, text: str) -> QueueKey:
        level, step, rest = text.split("|", 2)
        labels, end = json.JSONDecoder().raw_decode(rest) if rest.startswith("{") else ({}, 0)
        return cls(text=text, level=level, step=int(step), requires=frozenset(labels.items()), user=rest[end + 1 :])

    def may_fit(self, openings: Openings) -> bool:
        """False when no job under this key can be admitted; the steps are rounded down."""
        if not any(self.requires <= labels for labels in openings.labels):
            return False
        if self.step == 0:
            return openings.unknown
        low, high = openings.processor
        return self.step <= size_step(openings.gpu) or size_step(low) <= self.step <= size_step(high)

    def all_fit(self, openings: Openings) -> bool:
        """True only when every job under this key is admitted, given that some may be."""
        return self.step == 0 or self.step < size_step(openings.gpu)
