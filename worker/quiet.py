"""What the training stack prints that sounds like a problem and is none."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Call it before a model is loaded."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # bitsandbytes says that an optional kernel package is missing; peft calls a name that transformers will drop in v6
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
