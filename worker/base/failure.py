"""Why an attempt can't go on: a sentence for people with a reason for the job's row."""

from __future__ import annotations

import errno

from loractl.common.errors import LoractlError
from loractl.common.job.status import Reason
from loractl.common.text import without_passwords
from loractl.worker.protocol.exit_reason import card_error

NO_COMPILER = ("No working C++ compiler found", "Failed to find C compiler")
"""What torch says on a processor, and Triton on a card (torch/_inductor/exc.py, triton/runtime/build.py)."""


class TrainingFailed(LoractlError):
    """The attempt can't go on. The job's row will show the reason.

    `withdrawn`: the folder of the broken checkpoint that is the cause; the attempt goes on without it.
    """

    def __init__(self, reason: Reason, sentence: str, *, withdrawn: str | None = None) -> None:
        super().__init__(sentence)
        self.reason, self.withdrawn = reason, withdrawn


def explain(error: Exception, *, own_limit: bool) -> tuple[Reason, str]:
    """The reason and the sentence for an error not caught closer to its cause.

    `own_limit`: this process's RAM is limited, so it ran out of that and not of the box's RAM.
    """
    from .gauge import in_a_sentence, is_card_full, is_out_of_memory  # torch, which the trainer loads late

    lines = [line for line in str(error).splitlines() if line.strip()]
    first, text = (lines[0] if lines else "no message"), str(error)
    if is_card_full(error) or (own_limit and is_out_of_memory(error)):
        return Reason.OUT_OF_MEMORY, in_a_sentence(error)
    if is_out_of_memory(error):
        return Reason.HOST_OUT_OF_MEMORY, "the box does not have enough RAM for this job"
    # torch and safetensors wrap the operating system's error in their own
    wrapped = any(words in text for words in ("No space left on device", "os error 28", "PytorchStreamWriter failed"))
    if wrapped or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return Reason.DISK_FULL, f"no space is left for {getattr(error, 'filename', None) or 'the job’s files'}"
    if any(words in text for words in NO_COMPILER):
        return Reason.BAD_SPEC, (
            "training.torch_compile needs a compiler, which this box does not have: leave the option out, or have g++ "
            "installed there"
        )
    if (said := card_error(text)) is not None:
        return said
    return Reason.TRAINER_ERROR, without_passwords(f"{type(error).__name__}: {first}")
