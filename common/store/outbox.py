"""The outbox's table: messages to people, written in the transaction of what happened."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from .columns import Characters, Prose
from .tables import Base, Timestamp


class OutboxMessage(Base):
    """One message to one channel. It is unique by event and channel: an event reported twice is one message."""

    __tablename__ = "outbox"
    __table_args__ = (
        Index("ux_outbox_event", "event", "channel", unique=True),
        Index(
            "ix_outbox_due",
            "due_at",
            postgresql_where=text("settled_at IS NULL"),
            sqlite_where=text("settled_at IS NULL"),
        ),
        Index("ix_outbox_at", "at"),
    )

    message_id: Mapped[str] = mapped_column(Characters(40), primary_key=True)
    event: Mapped[str]
    channel: Mapped[str] = mapped_column(Characters(64))  # a name of somebody's config.toml, or me, or lab
    user: Mapped[str]
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.job_id", ondelete="CASCADE"), index=True)
    kind: Mapped[str] = mapped_column(Characters(32))
    subject: Mapped[str] = mapped_column(Prose())
    text: Mapped[str] = mapped_column(Prose())
    at: Mapped[Timestamp]
    due_at: Mapped[Timestamp]  # of the next try; while one runs, the end of its lease
    token: Mapped[str | None] = mapped_column(Characters(32))  # of the sender that has the lease
    tries: Mapped[int] = mapped_column(default=0, server_default="0")
    settled_at: Mapped[Timestamp | None]  # sent, passed on to channels, or given up
    outcome: Mapped[str | None] = mapped_column(Prose())  # of the last try
