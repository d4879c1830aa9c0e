"""The thread of a node that sends what is due on the channels of its box, one message at a time.

A message is sent at least once: if a sender dies between sending and recording that, its lease ends, and the message
goes out again with the same id.
"""

from __future__ import annotations

import logging
import threading
import time

from loractl.common.channels import Channel
from loractl.common.errors import SchemaMismatch, ServiceUnreachable
from loractl.common.settings import Settings
from loractl.common.store.database import REFUSALS, outage, told_by
from loractl.common.store.records import Delivery
from loractl.common.store.store import Store
from loractl.common.store.tables import OutboxMessage
from loractl.worker.clock import SYSTEM, NodeClock

from .sending import DEADLINE_S, http_message, post, run_program, send_mail

log = logging.getLogger("loractl.worker")

LOOK_S = 2.0
"""How often a node looks for due messages."""

LEASE_S = 90.0
"""How long a message belongs to one sender: longer than a try takes, name lookup and every address of the receiver
included."""

STOP_S = 5.0
"""How long a stopping node waits for a try; a message that is cut off goes out again elsewhere."""


class Messenger:
    """Looks and sends until it is stopped. Without channels it does nothing."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        lease_s: float = LEASE_S,
        look_s: float = LOOK_S,
        clock: NodeClock = SYSTEM,
    ) -> None:
        self._store = store
        self._channels = {channel.name: channel for channel in settings.channels if not channel.missing}
        self._missing = {channel.name: channel.missing for channel in settings.channels if channel.missing}
        self._lease_s, self._look_s, self._clock = lease_s, look_s, clock
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        for name, variable in self._missing.items():
            log.warning("channel %s gets no messages from here: %s is not set", name, variable)
        if self._channels:
            self._thread = self._clock.start(self._run, "messenger")

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._clock.join(self._thread, STOP_S)

    def send_due(self) -> bool:
        """Try the oldest due message; False if there is none."""
        due = self._store.outbox.lease(tuple(self._channels.values()), self._lease_s)
        if due is None:
            return False
        delivery = deliver(self._channels[due.channel], due)
        if delivery.why:
            log.warning("message %s to channel %s, try %s: %s", due.message_id, due.channel, due.tries, delivery.why)
        self._store.outbox.settle(due, delivery)
        return True

    def _run(self) -> None:
        while not self._stopped.is_set():
            if not self._tried():
                self._clock.wait(self._stopped, self._look_s)

    def _tried(self) -> bool:
        """Whether a message was tried, so that the next one follows at once. No failure here ends the node."""
        try:
            return self.send_due()
        except (ServiceUnreachable, SchemaMismatch) as error:
            log.debug("%s", error.sentence)  # the monitor says so, too
        except REFUSALS as error:
            if outage(error) is None:
                log.exception("messages: the database refuses it: %s", told_by(error))
        except Exception:
            # a thread that ended silently would send nothing until the node restarts
            log.exception("a message could not be sent")
        return False


def deliver(channel: Channel, due: OutboxMessage, deadline_s: float = DEADLINE_S) -> Delivery:
    """One try on a channel, in bounded time."""
    if channel.kind == "mail":
        return send_mail(channel, due, deadline_s)
    if channel.kind == "command":
        return run_program(channel, due, deadline_s)
    return post(http_message(channel, due, time.time()), deadline_s)
