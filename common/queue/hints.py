"""Celery's way to the queue's server, on which nothing counts of a message but that it came.

Whoever can write to the queue could otherwise give a task time limits that kill a training, callbacks, an id that
steers a terminal, or a form on which Celery ends: all of that would be read before the task is.
"""

from __future__ import annotations

import base64
import json
import logging
import uuid
from typing import Any

from celery.app.amqp import AMQP
from kombu import Connection
from kombu.transport import redis

from .app import WAKE_TASK

log = logging.getLogger("loractl.worker")

_NO_JSON = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What kombu's reading of a message raises on what is none, of which it makes dates and numbers too."""


class Transport(redis.Transport):
    """Redis as a transport of hints: what lies in a list is thrown away, and a wake-up of our own is delivered."""

    def _deliver(self, message: Any, queue: str) -> None:
        super()._deliver(_wake_up(queue), queue)

    def on_readable(self, fileno: int) -> None:
        try:
            super().on_readable(fileno)
        except _NO_JSON as error:  # it is off the list already
            log.warning("something on the queue is no message and is thrown away: %s", type(error).__name__)


class HintConnection(Connection):
    """A connection whose transport is ours, whatever form of Redis the URL names."""

    def get_transport_cls(self) -> type[Transport]:
        return Transport


class Amqp(AMQP):
    """What Celery calls the part of an app that connects."""

    Connection = HintConnection


def _wake_up(queue: str) -> dict[str, Any]:
    """A message as Celery itself would write it."""
    name = uuid.uuid4().hex
    return {
        "body": base64.b64encode(json.dumps([[0], {}, {}]).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": WAKE_TASK, "id": name},
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": name,
            "delivery_info": {"exchange": "loractl", "routing_key": queue},
        },
    }
