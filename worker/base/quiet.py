"""Silences messages of the training stack that sound like problems but aren't."""

from __future__ import annotations

import logging
import os
import warnings

BAR_INTERVAL_S = 10
"""Seconds between two lines of a progress bar in the job's log."""


def quieten() -> None:
    """Call it before anything is imported that draws progress bars, and before a model is loaded."""
    # in a log each step of a bar is a line of its own: ten a second by default
    os.environ.setdefault("TQDM_MININTERVAL", str(BAR_INTERVAL_S))
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # bitsandbytes says that an optional kernel package is missing; peft calls a name that transformers will drop in v6
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
