"""Says after a run how many inputs each target was given."""

from __future__ import annotations

from typing import Any

from .counting import INPUTS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if INPUTS:
        shown = ", ".join(f"{target} {count:,}" for target, count in sorted(INPUTS.items()))
        terminalreporter.write_line(f"fuzzed inputs: {sum(INPUTS.values()):,} ({shown})")
