"""An open way to the queue: what a command imports and connects to is ready before its row is committed.

Nodes wait for the hint, so that nothing slow stands between the commit and the hint.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from kombu import Connection, Producer
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from loractl.common.errors import ServiceUnreachable
from loractl.common.placement.rule import queue_name
from loractl.common.settings import Settings, redacted

from .app import TRANSPORT_OPTIONS, WAKE_TASK
from .valkey import broker_url


class Bell:
    """Wakes nodes. A queue that was away when it was opened is reported at the first ring."""

    def __init__(self, url: str, producer: Any, away: ServiceUnreachable | None) -> None:
        self._url = url
        self._producer = producer
        self._away = away

    def ring(self, size_classes: Iterable[int]) -> None:
        """Tell nodes that jobs of these classes wait. Raises ServiceUnreachable when the queue is away."""
        if self._away is not None:
            raise self._away
        with _reachable(self._url):
            for size_class in size_classes:
                headers = {"task": WAKE_TASK, "id": uuid.uuid4().hex}
                self._producer.publish([[size_class], {}, {}], routing_key=queue_name(size_class), headers=headers)


@contextlib.contextmanager
def open_bell(settings: Settings) -> Iterator[Bell]:
    """Connect to the queue; one that is away stops nobody before the first ring. Raises UsageError."""
    with contextlib.ExitStack() as held:
        url, producer, away = "", None, None
        try:
            url = broker_url(settings)
            with _reachable(url):
                connection = held.enter_context(Connection(url, transport_options=TRANSPORT_OPTIONS))
                connection.ensure_connection(max_retries=1, interval_start=0, timeout=3)
                channel = connection.default_channel
                channel.client.ping()  # kombu closes what it has connected with: the hint would connect again
                producer = Producer(channel, serializer="json")
        except ServiceUnreachable as error:
            away = error
        yield Bell(url, producer, away)


@contextlib.contextmanager
def _reachable(url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, KombuError, RedisError) as error:
        why = str(error) or type(error).__name__
        raise ServiceUnreachable("the queue", redacted(url), "LORACTL_REDIS_URL", why) from error
