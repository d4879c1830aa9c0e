"""Messages on their way: leased to one sender at a time, tried again, settled, forgotten."""

from __future__ import annotations

import datetime as dt
import random
import uuid
from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, Select, delete, func, or_, select, update

from loractl.common.channels import LAB, ME, Channel, channels_of
from loractl.common.store.tables import OutboxMessage

from ...records import ChannelTraffic, Delivery, StuckMessages
from ...transaction import Transaction
from .notices import News, write

TRIES = 8
"""Tries of a message: the first comes at once, the last about three hours later."""

FIRST_PAUSE_S, MOST_PAUSE_S = 10.0, 3600.0
"""The pause after the first failure, and the longest; each is four times the one before."""

PATIENCE_S = 24 * 3600.0
"""A message that no process has taken by then is given up: no configuration names its channel."""

KEPT_S = 7 * 24 * 3600.0
"""How long settled messages are kept: they keep the same event from being reported twice."""

LATE_S = 300.0
"""A message that has been due for this long and was never tried is in nobody's hands."""

SENT, GAVE_UP = "sent", "gave up"
"""What the outcome of a settled message is, or begins with."""

_AT_ONCE = 50


def is_due(tx: Transaction, channels: Sequence[Channel]) -> bool:
    mine = select(OutboxMessage.message_id).where(_concerns(channels)).where(*_open(tx.now())).limit(1)
    return tx.session.scalar(mine) is not None


def lease(tx: Transaction, channels: Sequence[Channel], lease_s: float) -> OutboxMessage | None:
    _pass_on(tx, channels)
    names = [channel.name for channel in channels]
    due = select(OutboxMessage).where(OutboxMessage.channel.in_(names))
    row = tx.session.scalars(_taken(due, tx.now(), 1)).first()
    if row is None:
        return None
    if row.tries >= TRIES:  # its senders were killed at each of them
        _settle(tx, row, f"{GAVE_UP} after {row.tries} tries", told=True)
        return None
    row.token, row.tries = uuid.uuid4().hex, row.tries + 1
    row.due_at = tx.now() + dt.timedelta(seconds=lease_s)
    return row


def settle(tx: Transaction, message: OutboxMessage, delivery: Delivery) -> bool:
    """Write what became of a try to send: sent, due again later, or given up. False when the lease was lost."""
    own = (OutboxMessage.message_id == message.message_id, OutboxMessage.token == message.token)
    row = tx.session.scalars(select(OutboxMessage).where(*own).with_for_update()).first()
    if row is None or row.settled_at is not None:
        return False
    if delivery.sent:
        _settle(tx, row, SENT)
        if delivery.why:
            _tell(tx, row, f"{SENT}, but {delivery.why}")
    elif not delivery.again or row.tries >= TRIES:
        _settle(tx, row, f"{GAVE_UP} after {row.tries} tries: {delivery.why}", told=True)
    else:
        row.token, row.outcome = None, delivery.why
        row.due_at = tx.now() + dt.timedelta(seconds=_pause_s(row.tries, delivery.after_s))
    return True


def tidy(tx: Transaction, now: dt.datetime) -> None:
    """Give up what no process takes, and forget what was settled long ago."""
    old = select(OutboxMessage).where(OutboxMessage.at < now - dt.timedelta(seconds=PATIENCE_S))
    for row in tx.session.scalars(_taken(old, now, _AT_ONCE)):
        _settle(tx, row, f"{GAVE_UP}: no worker's config.toml names this channel", told=True)
    over = OutboxMessage.at < now - dt.timedelta(seconds=KEPT_S)
    tx.session.execute(delete(OutboxMessage).where(over, OutboxMessage.settled_at.is_not(None)))


def read_stuck(tx: Transaction) -> list[StuckMessages]:
    """Messages that wait too long or were given up, by channel.

    Those to the lab are left out: every event is written there, and nobody must have such a channel.
    """
    now, named = tx.now(), OutboxMessage.channel != LAB
    late = OutboxMessage.due_at <= now - dt.timedelta(seconds=LATE_S)
    columns = (OutboxMessage.channel, func.count(), func.min(OutboxMessage.at))
    waits = select(*columns).where(OutboxMessage.settled_at.is_(None), OutboxMessage.tries == 0, late, named)
    lately = OutboxMessage.settled_at > now - dt.timedelta(seconds=PATIENCE_S)
    over = (lately, OutboxMessage.outcome.startswith(GAVE_UP), named)
    ended = (func.max(OutboxMessage.settled_at), func.max(OutboxMessage.outcome))
    gone = select(OutboxMessage.channel, func.count(), *ended).where(*over)
    channel = OutboxMessage.channel
    waiting = tx.session.execute(waits.group_by(channel).order_by(channel))
    given_up = tx.session.execute(gone.group_by(channel).order_by(channel))
    return [
        *(StuckMessages(channel=name, count=count, at=at, outcome=None) for name, count, at in waiting),
        *(StuckMessages(channel=name, count=count, at=at, outcome=said) for name, count, at, said in given_up if at),
    ]


def read_traffic(tx: Transaction) -> list[ChannelTraffic]:
    """What waits and was sent lately, by channel. Messages to the lab are left out: nobody must have such a channel."""
    now = tx.now()
    waits = OutboxMessage.settled_at.is_(None) & or_(OutboxMessage.due_at <= now, OutboxMessage.tries > 0)
    lately = OutboxMessage.settled_at > now - dt.timedelta(seconds=PATIENCE_S)
    alive = OutboxMessage.at > now - dt.timedelta(seconds=2 * PATIENCE_S)  # an older one is settled, and not lately
    counts = (
        func.count().filter(waits),
        func.min(OutboxMessage.at).filter(waits),
        func.count().filter(lately, OutboxMessage.outcome == SENT),
        func.count().filter(lately, OutboxMessage.outcome.startswith(GAVE_UP)),
    )
    by_channel = select(OutboxMessage.channel, *counts).where(alive, OutboxMessage.channel != LAB)
    rows = tx.session.execute(by_channel.group_by(OutboxMessage.channel).order_by(OutboxMessage.channel))
    return [
        ChannelTraffic(channel=channel, waiting=waiting, oldest=oldest, sent=sent, given_up=gone)
        for channel, waiting, oldest, sent, gone in rows
    ]


def _pass_on(tx: Transaction, channels: Sequence[Channel]) -> None:
    """Turn messages to `me` and to the lab into messages to the channels that these words mean here."""
    words = select(OutboxMessage).where(OutboxMessage.channel.in_((ME, LAB)), _concerns(channels))
    for row in tx.session.scalars(_taken(words, tx.now(), _AT_ONCE)):
        of_lab = tuple(channel.name for channel in channels if channel.lab)
        names = of_lab if row.channel == LAB else channels_of(channels, row.user)
        same = {name: getattr(row, name) for name in ("event", "kind", "job_id", "user", "subject")}
        write(tx, names, News(**same, advice=row.text))
        _settle(tx, row, "passed on")


def _concerns(channels: Sequence[Channel]) -> ColumnElement[bool]:
    users: Collection[str] = {user for channel in channels for user in channel.users}
    mine = OutboxMessage.channel.in_([channel.name for channel in channels])
    me = (OutboxMessage.channel == ME) & OutboxMessage.user.in_(users)
    if any(channel.lab for channel in channels):
        return or_(mine, me, OutboxMessage.channel == LAB)
    return or_(mine, me)


def _open(now: dt.datetime) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return (OutboxMessage.settled_at.is_(None), OutboxMessage.due_at <= now)


def _taken(query: Select[OutboxMessage], now: dt.datetime, most: int) -> Select[OutboxMessage]:
    oldest = query.where(*_open(now)).order_by(OutboxMessage.due_at, OutboxMessage.message_id)
    return oldest.limit(most).with_for_update(skip_locked=True)


def _settle(tx: Transaction, row: OutboxMessage, outcome: str, *, told: bool = False) -> None:
    """Settle a message for good. `told`: in its job's history, too."""
    own = OutboxMessage.message_id == row.message_id
    tx.session.execute(update(OutboxMessage).where(own).values(settled_at=tx.now(), outcome=outcome, token=None))
    if told:
        _tell(tx, row, outcome)


def _tell(tx: Transaction, row: OutboxMessage, what: str) -> None:
    """Write into the history of the message's job."""
    if row.job_id is not None:
        tx.tell(row.job_id, None, "notify", f"message {row.message_id} to channel {row.channel}: {what}")


def _pause_s(tries: int, asked_s: float | None) -> float:
    own = min(MOST_PAUSE_S, FIRST_PAUSE_S * 4.0 ** (tries - 1)) * random.uniform(0.8, 1.2)  # noqa: S311  spreads tries
    return own if asked_s is None else max(own, min(MOST_PAUSE_S, asked_s))
