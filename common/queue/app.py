"""The Celery app of a node: one queue a VRAM class. A message is a hint; the database decides."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.app.amqp import AMQP
from kombu import Exchange, Queue

from loractl.common.placement.lines import VRAM_CLASSES

from .hints import EXCHANGE, TRANSPORT_OPTIONS, HintConnection, queue_name


def make_app(url: str) -> Any:
    """A Celery app with options that keep hints from stalling or running twice (measured: docs/node.md)."""
    app = Celery("loractl", broker=url, amqp=HintAmqp, set_as_current=False)
    exchange = Exchange(EXCHANGE, type="direct")
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
        worker_enable_remote_control=False,  # no one may steer a node through Redis
        worker_hijack_root_logger=False,
        # Else what can't be logged, since standard error is closed, is logged and fails, a thousand times a line.
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # A server that answers with an error (no replicas, a full disk) counts as away, and is no reason to end.
        broker_channel_error_retry=True,
        broker_transport_options=TRANSPORT_OPTIONS,
    )
    return app


class HintAmqp(AMQP):
    """What Celery calls the part of an app that connects."""

    Connection = HintConnection
