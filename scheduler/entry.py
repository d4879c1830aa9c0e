"""The console script: the command line, which a Ctrl-C may end while it is still imported."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; before it can answer a Ctrl-C itself, end as it would."""
    try:
        from loractl.scheduler.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)  # ExitCode.INTERRUPTED, whose module may be what was interrupted
    run()
