"""What a backup holds, in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a database holds."""

    revision: str
    jobs: int
    newest: int  # number of the newest job; 0 if there is none
    last_event: str  # time of the newest history line, in UTC as the database writes it; "" if there is none

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names."""
        return dict(vars(self))
