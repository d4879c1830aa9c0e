"""The condition of messages: the channels of this machine, and what could not be sent anywhere."""

from __future__ import annotations

from collections.abc import Iterator

from loractl.common.settings import Settings
from loractl.common.store.database import one_look
from loractl.common.store.store import Store

from .condition import Condition, broken, fine, warning


def see_messages(settings: Settings) -> Iterator[Condition]:
    """Messages that no worker takes, and those given up in the last day."""
    if (fault := settings.channels_fault) is not None:
        yield broken("messages", fault.sentence, fault.hint)
    with one_look(settings) as engine:
        stuck = Store(engine).outbox.stuck()
    for pile in stuck:
        several = f"{pile.count} message{'s' * (pile.count != 1)} to channel {pile.channel}"
        if pile.outcome is None:
            hint = "a GPU box must have the channel in its config.toml, and its worker be started since then"
            yield warning(
                "messages", f"{several}, due since {pile.at:%Y-%m-%d %H:%M} UTC: no worker has that channel", hint
            )
        else:
            yield warning("messages", f"{several}, the last at {pile.at:%Y-%m-%d %H:%M} UTC: {pile.outcome}")
    for channel in settings.channels:
        if channel.missing:
            yield warning("messages", f"channel {channel.name}: {channel.missing} is not set here")
    if not stuck and fault is None:
        names = ", ".join(channel.name for channel in settings.channels)
        here = f"channels of this machine: {names}" if names else "this machine has no channels"
        yield fine("messages", f"none is stuck; {here}")
