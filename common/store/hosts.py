"""The hosts' table: trainers that keep their loaded base, from the moment that others may join them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import false
from sqlalchemy.orm import Mapped, mapped_column

from loractl.common.job.method import Method
from loractl.common.placement.pack_rule import PassLaw

from .columns import Characters, Json, Prose, Words, is_number
from .tables import Base, Bytes, Timestamp


def _is_law(value: Any) -> bool:
    law = PassLaw.from_json(value, quantised=False)
    return all(map(is_number, (law.fixed, law.token, law.member, law.load)))


class TrainerHost(Base):
    """A trainer with a base. The row stays until the node has seen the process end: until then its bytes are held.

    While the attempt that it names runs, that attempt's reservation holds the base, too. Others that run in it name it
    in their own rows, and reserve their own parts alone.
    """

    __tablename__ = "hosts"

    host: Mapped[str] = mapped_column(Characters(32), primary_key=True)  # the mark in the process's environment
    node: Mapped[str] = mapped_column(index=True)
    key: Mapped[str] = mapped_column(Characters(64))  # of what decides how the base is loaded
    base_model: Mapped[str] = mapped_column(Prose())
    method: Mapped[Method] = mapped_column(Words(Method, 8))
    bytes: Mapped[Bytes]
    job_id: Mapped[int]  # of the last attempt that had the whole of it
    attempt: Mapped[int]
    leaving: Mapped[bool] = mapped_column(default=False)  # nothing joins it any more
    since: Mapped[Timestamp]  # when it last began to wait, or a job joined it
    open: Mapped[bool] = mapped_column(default=False, server_default=false())  # others may train alongside its jobs
    spoilt: Mapped[str | None] = mapped_column(Prose())  # why it ends with its last job; null: it does not
    # of its passes, see pack_rule.py
    law: Mapped[dict[str, Any] | None] = mapped_column(Json(_is_law, null=True, none_as_null=True))
