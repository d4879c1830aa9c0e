"""What people call an adapter: its job's number, the job's name for the newest of that name, or name:tag."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, exists, select
from sqlalchemy.orm import Session

from loractl.common.errors import AdapterNotFound, UsageError

from ..tables import Adapter, Job, Tag

LATEST = "latest"
"""The tag that nobody sets: the newest adapter of a name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An adapter as a person names it. Either a job's number, or a name and a tag."""

    job_id: int | None = None
    name: str | None = None
    tag: str = LATEST

    def __str__(self) -> str:
        return str(self.job_id) if self.job_id is not None else f"{self.name}:{self.tag}"


def parse_reference(text: str) -> Reference:
    """Read 12, support, support:latest or support:prod. Raises UsageError."""
    if re.fullmatch(r"[1-9]\d{0,17}", text, re.ASCII):
        return Reference(job_id=int(text))
    name, colon, tag = text.partition(":")
    if not _NAME.fullmatch(name) or (colon and not _NAME.fullmatch(tag)):
        raise UsageError(f"{text!r} names no adapter", "name it by its job (12), its name (support) or name:tag")
    return Reference(name=name, tag=tag or LATEST)


def check_tag(tag: str) -> None:
    """Raises UsageError for what can't be set as a tag."""
    if tag == LATEST:
        raise UsageError("latest is always the newest adapter of a name and can't be set", "choose another tag")
    if not _NAME.fullmatch(tag):
        raise UsageError(f"{tag!r} is no tag", "letters, digits, '.', '_' and '-' only, at most 63")


def find_adapter(session: Session, reference: Reference) -> Adapter:
    """Raises AdapterNotFound, JobNotFound is the caller's to tell apart."""
    found = session.scalars(_matching(reference).limit(1)).first()
    if found is None:
        raise AdapterNotFound(str(reference))
    return found


def _matching(reference: Reference) -> Select[Adapter]:
    if reference.job_id is not None:
        return select(Adapter).where(Adapter.job_id == reference.job_id)
    named = select(Adapter).where(Adapter.name == reference.name)
    if reference.tag == LATEST:
        return named.order_by(Adapter.created_at.desc(), Adapter.job_id.desc())
    return named.join(Tag, Tag.job_id == Adapter.job_id).where(Tag.name == reference.name, Tag.tag == reference.tag)


def set_tag(session: Session, adapter: Adapter, tag: str, user: str, now: dt.datetime) -> int | None:
    """Move a tag to an adapter; returns the job that had it, None when it is new."""
    row = session.get(Tag, (adapter.name, tag), with_for_update=True)
    if row is None:
        session.add(Tag(name=adapter.name, tag=tag, job_id=adapter.job_id, user=user, at=now))
        return None
    before, row.job_id, row.user, row.at = row.job_id, adapter.job_id, user, now
    return before


def drop_tag(session: Session, name: str, tag: str) -> int:
    """Forget a tag; returns the job that had it. Raises AdapterNotFound."""
    row = session.get(Tag, (name, tag), with_for_update=True)
    if row is None:
        raise AdapterNotFound(f"{name}:{tag}")
    session.delete(row)
    return row.job_id


def read_tags(session: Session) -> dict[int, list[str]]:
    """The tags of each tagged job, and latest for the newest adapter of each name."""
    found: dict[int, list[str]] = {}
    newest: dict[str, Adapter] = {}
    for adapter in session.scalars(select(Adapter).order_by(Adapter.created_at, Adapter.job_id)):
        newest[adapter.name] = adapter
    for adapter in newest.values():
        found.setdefault(adapter.job_id, []).append(LATEST)
    for tag in session.scalars(select(Tag).order_by(Tag.tag)):
        found.setdefault(tag.job_id, []).append(tag.tag)
    return found


def set_by_hand(tags: Mapping[int, list[str]], job_id: int) -> list[str]:
    """The tags of a job that a person has set."""
    return [tag for tag in tags.get(job_id, []) if tag != LATEST]


def is_tagged() -> ColumnElement[bool]:
    """Whether somebody has tagged a job's adapter: then its files are kept."""
    return exists().where(Tag.job_id == Job.job_id)
