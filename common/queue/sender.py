"""An open connection to the queue, so that a command imports and connects before it commits its row.

Nodes wait for the hint, so nothing slow may come between the commit and the hint. Hints are sent by kombu alone, since
Celery takes as long again to import.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from loractl.common.errors import ServiceUnreachable
from loractl.common.settings import Settings, redacted

from .hints import TRANSPORT_OPTIONS, HintConnection, card_queue, queue_name, wake_headers
from .valkey import broker_url, embedded_runs


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


def queue_away(settings: Settings) -> str | None:
    """A sentence if the queue does not answer; None if it does, and for the queue that a worker here starts."""
    if settings.redis_url is None:
        return None
    try:
        with open_sender(settings) as sender:
            sender.wake(())
    except ServiceUnreachable as error:
        return error.sentence
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
        why = str(error) or type(error).__name__
        raise ServiceUnreachable("the queue", redacted(url), "LORACTL_REDIS_URL", why) from error
