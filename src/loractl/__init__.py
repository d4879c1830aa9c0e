"""Queue LoRA and QLoRA fine-tunes on a lab's GPU boxes. From Python: `lab = loractl.connect()`, docs/jobs.md."""

from __future__ import annotations

TYPE_CHECKING = False  # typing is slow to import, and until the command line begins, a Ctrl-C is a traceback
if TYPE_CHECKING:
    from loractl.scheduler.python.lab import Lab

__version__ = "0.6.0"


def connect() -> Lab:
    """The lab that LORACTL_* and config.toml name; without any, the one of this machine.

    Raises loractl.common.errors.LoractlError: a sentence, and a hint with the next step.
    """
    from loractl.scheduler.python.lab import Lab

    return Lab()
