"""The queue key: a text that says all that the rule looks at in a waiting job but its age."""

from __future__ import annotations

import json
from collections.abc import Mapping

from .sizes import size_step


def queue_key(priority: int, least: int | None, requires: Mapping[str, str], user: str) -> str:
    """The line in which a job waits: jobs with one key differ in nothing that the rule looks at but their age.

    Sorts by priority, the highest first, then by the size's step, so that one index answers what could fit.
    """
    labels = json.dumps(requires, sort_keys=True, ensure_ascii=True) if requires else ""
    return f"{10_000 - priority:05d}|{size_step(least):03d}|{labels}|{user}"


def queue_key_range(priority: int, first_step: int, last_step: int) -> tuple[str, str]:
    """Between what two texts, the first one included, the keys of these steps stand."""
    level = f"{10_000 - priority:05d}"
    return f"{level}|{first_step:03d}|", f"{level}|{last_step:03d}}}"  # } is the next character after the separator
