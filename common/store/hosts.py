"""The hosts' table: trainers that keep the base that they have loaded, from their first job's end to their own."""

from __future__ import annotations

from sqlalchemy import String, Text
from sqlalchemy.orm import Mapped, mapped_column

from .tables import Base, Bytes, Timestamp


class TrainerHost(Base):
    """A trainer with a base. The row stays until the node has seen the process end: until then its bytes are held.

    While the attempt that it names runs, that attempt's reservation holds the base, too.
    """

    __tablename__ = "hosts"

    host: Mapped[str] = mapped_column(String(32), primary_key=True)  # the mark in the process's environment
    node: Mapped[str] = mapped_column(index=True)
    key: Mapped[str] = mapped_column(String(64))  # of what decides how the base is loaded
    base_model: Mapped[str] = mapped_column(Text)
    method: Mapped[str] = mapped_column(String(8))
    bytes: Mapped[Bytes]
    job_id: Mapped[int]  # of the last attempt in it
    attempt: Mapped[int]
    leaving: Mapped[bool] = mapped_column(default=False)  # nothing joins it any more
    since: Mapped[Timestamp]  # when it last began to wait, or a job joined it
