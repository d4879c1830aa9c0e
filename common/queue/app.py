"""The Celery app: wake-up messages, one queue a VRAM class. A message is a hint; the database decides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loractl.common.errors import ServiceUnreachable
from loractl.common.placement.rule import VRAM_CLASSES, queue_name
from loractl.common.settings import Settings, redacted

from .valkey import broker_url

WAKE_TASK = "loractl.wake"

TRANSPORT_OPTIONS = {
    "socket_timeout": 5,  # a half-open connection otherwise wedges the node for minutes
    "socket_connect_timeout": 2,
    "health_check_interval": 10,
    "queue_order_strategy": "priority",
}


def make_app(url: str) -> Any:
    """A Celery app with the options under which nothing stalls or runs twice (measured: docs/architecture.md)."""
    from celery import Celery
    from kombu import Exchange, Queue

    app = Celery("loractl", broker=url, amqp="loractl.common.queue.hints:Amqp", set_as_current=False)
    exchange = Exchange("loractl", type="direct")
    app.conf.update(
        task_queues=[Queue(queue_name(c), exchange, routing_key=queue_name(c)) for c in VRAM_CLASSES],
        task_default_exchange="loractl",
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        # Early ack: with acks_late, a task longer than the visibility timeout is started again and again.
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,  # a busy node must not hoard a message that another could use
        worker_cancel_long_running_tasks_on_connection_loss=False,  # trainings outlive the broker
        worker_send_task_events=False,
        worker_enable_remote_control=False,  # nobody may steer a node through Redis
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=TRANSPORT_OPTIONS,
    )
    return app


def card_queue(node: str) -> str:
    """The queue of one card alone."""
    return f"card.{node}"


def wake(settings: Settings, size_class: int) -> None:
    """Tell nodes that a job of this class waits. Raises ServiceUnreachable when the queue is away."""
    _send(settings, [(size_class, queue_name(size_class))])


def wake_cards(settings: Settings, nodes: Iterable[str]) -> None:
    """Tell these cards to look for a job. Raises ServiceUnreachable when the queue is away."""
    _send(settings, [(0, card_queue(node)) for node in nodes])


def _send(settings: Settings, messages: list[tuple[int, str]]) -> None:
    from kombu.exceptions import KombuError
    from redis.exceptions import RedisError

    url = broker_url(settings)
    app = make_app(url)
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=3)
            for size_class, queue in messages:
                app.send_task(WAKE_TASK, (size_class,), queue=queue, retry=False, connection=connection)
    except (OSError, KombuError, RedisError) as error:
        raise ServiceUnreachable(
            "the queue", redacted(url), "LORACTL_REDIS_URL", str(error) or type(error).__name__
        ) from error
