"""The training stack's messages: silenced if they sound like a problem but are none, else logged as one line, once."""

from __future__ import annotations

import logging
import os
import re
import warnings
from typing import TextIO

from loractl.worker.protocol.log_lines import log_line

BAR_INTERVAL_S = 10
"""Seconds between two lines of a progress bar in the job's log."""


def quieten() -> None:
    """Call it before importing anything that draws progress bars, and before loading a model."""
    # in a log each step of a bar is a separate line: ten a second by default
    os.environ.setdefault("TQDM_MININTERVAL", str(BAR_INTERVAL_S))
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # peft calls a name that transformers will drop in v6
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
    # transformers offers its own launcher if it sees a process group
    logging.getLogger("transformers.training_args").addFilter(lambda said: "parallel_mode" not in said.getMessage())


def tell_once() -> None:
    """Log each warning of a library as one line of the job's log, once. Call it after `quieten`."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    handler = logging.StreamHandler()
    handler.setFormatter(_LogLine())
    handler.addFilter(_Once())
    logging.getLogger().handlers[:] = [handler]
    warnings.showwarning = _show_warning


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class _LogLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said = f"{record.name.partition('.')[0]}: {_COLOURS.sub('', record.getMessage())}"
        failed = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return log_line(record.levelname.lower(), said).rstrip("\n") + failed


MOST_KNOWN = 1000
"""Messages remembered; a library that never repeats itself must not fill the memory."""


class _Once(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._known: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        new = said not in self._known
        if new and len(self._known) < MOST_KNOWN:
            self._known.add(said)
        return new


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """What Python calls for a warning: the place in a library's source does not help a reader."""
    logging.getLogger("python").warning("%s (%s)", message, category.__name__)
