"""Why an attempt can't go on: a sentence for people with a reason for the job's row."""

from __future__ import annotations

from loractl.common.errors import LoractlError
from loractl.common.job.status import Reason


class TrainingFailed(LoractlError):
    """The attempt can't go on. The job's row will show the reason."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason
