"""Small values for the tests of delivery."""

from __future__ import annotations

import base64
from typing import Any

from loractl.common.store.tables import OutboxMessage

from ...factories import NOON

WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()


def due(**changed: Any) -> OutboxMessage:
    return OutboxMessage(
        **{
            "message_id": "msg_7", "channel": "ops", "token": "t", "kind": "job.succeeded",
            "subject": "triage-r32: better, loss 4.49 -> 0.25", "text": "Job 7 of ada.", "job_id": 7, "at": NOON,
            "tries": 1, **changed,
        }
    )  # fmt: skip
