"""The console script: it starts the command line, and ends on a Ctrl-C even during the imports."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in loractl's __init__
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; until that can handle a Ctrl-C itself, end as it would."""
    try:
        from loractl.scheduler.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)  # ExitCode.INTERRUPTED, whose module may be what was interrupted
    run()
