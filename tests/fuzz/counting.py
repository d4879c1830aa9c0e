"""How many inputs each target was given, and how long a property runs.

FUZZ_EXAMPLES=20000 pytest tests/fuzz is the longest run; 80 inputs a target fit into `make test`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings

from loractl.common.errors import ExitCode, LoractlError

Answer = TypeVar("Answer")

INPUTS: Counter[str] = Counter()
"""Target -> inputs so far; the terminal summary prints it."""

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "80"))

CPU_SECONDS = 20.0
"""No input of at most 256 KiB may keep a processor busy for longer, on a slow machine."""

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=EXAMPLES <= 200,  # the short run must not fail by chance; the long one looks for something new
    print_blob=True,
)


def answered(target: str, act: Callable[[], Answer]) -> Answer | None:
    """What `act` returns; None when it was refused by an error for people. Everything else is a defect."""
    INPUTS[target] += 1
    began = time.process_time()
    try:
        return act()
    except LoractlError as error:
        refused(error)
        return None
    finally:
        took = time.process_time() - began
        assert took < CPU_SECONDS, f"{took:.0f} s"


def refused(error: LoractlError) -> None:
    """The error has a sentence that can be printed, and a documented exit code."""
    assert error.exit_code in set(ExitCode)
    assert error.sentence.strip()
    parts: list[Any] = [error.sentence, error.hint, *getattr(error, "problems", ())]
    for part in parts:
        str(part).encode("utf-8", "backslashreplace")  # as stderr prints it
