"""The queues' lengths: hints beyond what cards could need are thrown away, so that nobody can bury nodes in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loractl.common.errors import ServiceUnreachable
from loractl.common.settings import Settings

from .hints import TRANSPORT_OPTIONS, HintConnection
from .sender import reachable
from .valkey import broker_url

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
