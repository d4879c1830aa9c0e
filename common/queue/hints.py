"""Hints: messages that tell a node to look for a job. What a message says is ignored.

Otherwise anyone who can write to the queue could give a task time limits that kill a training, callbacks, an id that
steers a terminal, or a form that ends Celery. All of that would be read before the task runs. So what comes out of
the queue is thrown away, and our own hint is delivered in its place.
"""

from __future__ import annotations

import json
import logging
import uuid
from base64 import b64encode
from typing import Any

from kombu import Connection
from kombu.transport import redis

WAKE_TASK = "loractl.wake"

EXCHANGE = "loractl"

TRANSPORT_OPTIONS = {
    "socket_timeout": 5,  # a half-open connection otherwise wedges the node for minutes
    "socket_connect_timeout": 2,
    "health_check_interval": 10,
    "queue_order_strategy": "priority",
}

log = logging.getLogger("loractl.worker")

_NOT_JSON = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What kombu raises when it reads something that is not a message. It also parses dates and numbers in it."""


def queue_name(size_class: int) -> str:
    """The queue of a class, like vram.24."""
    return f"vram.{size_class}"


def card_queue(node: str) -> str:
    """The queue of a single card."""
    return f"card.{node}"


class Transport(redis.Transport):
    """Redis as a transport of hints."""

    def _deliver(self, message: Any, queue: str) -> None:
        super()._deliver(_hint(queue), queue)

    def on_readable(self, fileno: int) -> None:
        try:
            super().on_readable(fileno)
        except _NOT_JSON as error:  # it is off the list already
            log.warning("something on the queue is not a message and is discarded: %s", type(error).__name__)


class HintConnection(Connection):
    """A connection with our transport, for every form of Redis that the URL may name."""

    def get_transport_cls(self) -> type[Transport]:
        return Transport


def wake_headers() -> dict[str, str]:
    """What makes a message Celery's task: its name, and a number of its own."""
    return {"task": WAKE_TASK, "id": uuid.uuid4().hex}


def _hint(queue: str) -> dict[str, Any]:
    """A message in the form in which Celery writes it to the queue."""
    headers = wake_headers()
    return {
        "body": b64encode(json.dumps([[0], {}, {}]).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": headers,
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": headers["id"],
            "delivery_info": {"exchange": EXCHANGE, "routing_key": queue},
        },
    }
