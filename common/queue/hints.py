"""Hints: messages that tell a node to look for a job. What a message says is ignored.

Otherwise anyone who can write to the queue could give a task time limits that kill a training, callbacks, an id that
steers a terminal, or a form that ends Celery. All of that would be read before the task runs. So what comes out of the
queue is thrown away, and our own hint is delivered in its place. Hints beyond what cards could need are thrown away,
too.

Nodes wait for the hint, so nothing slow may come between a command's commit and its hint: the command opens its
connection before. Hints are sent by kombu alone, since Celery takes as long again to import.
"""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from base64 import b64encode
from collections.abc import Iterable, Iterator
from typing import Any

from kombu import Connection
from kombu.exceptions import KombuError
from kombu.transport import redis
from redis.exceptions import AuthenticationError, RedisError

from loractl.common.errors import ServiceRefused, ServiceUnreachable
from loractl.common.settings import Settings, redacted

from .valkey import broker_url, embedded_runs

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


class HintSender:
    """Wakes nodes. A queue that was away when it was opened is reported at the first hint."""

    def __init__(self, url: str, producer: Any | None, away: ServiceUnreachable | None) -> None:
        """`producer`: None where nobody listens."""
        self._url = url
        self._producer = producer
        self._away = away

    def wake(self, size_classes: Iterable[int]) -> None:
        """Tell nodes that jobs of these classes wait. Raises ServiceUnreachable when the queue is away."""
        self._send((size_class, queue_name(size_class)) for size_class in size_classes)

    def wake_cards(self, nodes: Iterable[str]) -> None:
        """Tell these cards to look for a job. Raises ServiceUnreachable when the queue is away."""
        self._send((0, card_queue(node)) for node in nodes)

    def _send(self, hints: Iterable[tuple[int, str]]) -> None:
        if self._away is not None:
            raise self._away
        if self._producer is None:
            return
        with reachable(self._url):
            for size_class, queue in hints:
                self._producer.publish([[size_class], {}, {}], routing_key=queue, headers=wake_headers())


@contextlib.contextmanager
def open_sender(settings: Settings) -> Iterator[HintSender]:
    """Connect to the queue. If it is away, only the first hint says so. An embedded queue is not started: where it does
    not run, no worker listens. Raises UsageError."""
    if settings.redis_url is None and not embedded_runs(settings):
        yield HintSender("", None, None)
        return
    with contextlib.ExitStack() as held:
        url, producer, away = "", None, None
        try:
            url = broker_url(settings, start=False)
            with reachable(url):
                connection = held.enter_context(HintConnection(url, transport_options=TRANSPORT_OPTIONS))
                connection.ensure_connection(max_retries=1, interval_start=0, timeout=3)
                channel = connection.default_channel
                channel.client.ping()  # kombu closes what it has connected with: the hint would connect again
                producer = connection.Producer(channel, serializer="json")
        except ServiceUnreachable as error:
            away = error
        yield HintSender(url, producer, away)


def queue_away(settings: Settings) -> ServiceUnreachable | None:
    """Why the queue does not answer; None if it does, and for the queue that a worker here starts."""
    if settings.redis_url is None:
        return None
    try:
        with open_sender(settings) as sender:
            sender.wake(())
    except ServiceUnreachable as error:
        return error
    return None


def wake_cards(settings: Settings, nodes: Iterable[str]) -> None:
    """Tell these cards to look for a job. Raises ServiceUnreachable when the queue is away."""
    with open_sender(settings) as sender:
        sender.wake_cards(nodes)


@contextlib.contextmanager
def reachable(url: str) -> Iterator[None]:
    """Turn what the queue's libraries raise into ServiceUnreachable with a sentence."""
    try:
        yield
    except (OSError, KombuError, RedisError) as error:
        why = str(error).rstrip(".") or type(error).__name__
        refused = isinstance(error, AuthenticationError) or isinstance(error.__cause__, AuthenticationError)
        kind = ServiceRefused if refused else ServiceUnreachable
        raise kind("the queue", redacted(url), "LORACTL_REDIS_URL", why) from error


MOST_HINTS = 256
"""Messages that a queue keeps. Each makes a node look once at all rows, and nodes also look by themselves: a queue
needs no more than the cards that could start a job at one moment."""


class HintQueues:
    """Looks at queues over one connection of its own, made when it is first needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection: Any = None

    def trim(self, queues: Iterable[str]) -> int:
        """Throw away what a queue holds beyond MOST_HINTS; returns how many messages. Raises ServiceUnreachable."""
        url = broker_url(self._settings, start=False)
        try:
            with reachable(url):
                return self._trim(url, queues)
        except ServiceUnreachable:
            self.close()
            raise

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _trim(self, url: str, queues: Iterable[str]) -> int:
        if self._connection is None:
            self._connection = HintConnection(url, transport_options=TRANSPORT_OPTIONS)
        self._connection.ensure_connection(max_retries=1, interval_start=0, timeout=3)
        channel = self._connection.default_channel
        # a queue has a list for each of kombu's priorities, and the writer chooses one
        lists = [channel._q_for_pri(queue, priority) for queue in queues for priority in channel.priority_steps]
        with channel.client.pipeline(transaction=False) as pipe:
            for name in lists:
                pipe.llen(name)
            lengths = pipe.execute(raise_on_error=False)  # somebody may have put something other than a list there
        long = {n: size for n, size in zip(lists, lengths, strict=True) if isinstance(size, int) and size > MOST_HINTS}
        for name in long:
            channel.client.ltrim(name, 0, MOST_HINTS - 1)
        return sum(long.values()) - MOST_HINTS * len(long)
