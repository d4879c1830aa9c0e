"""Stored results: the adapter that a person means, its tags, and the looks at what was measured on final rows."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ColumnElement, Select, String, case, cast, delete, exists, func, select
from sqlalchemy.orm import Session, aliased

from loractl.common.errors import AdapterNotFound, WrongState
from loractl.common.job.names import LATEST, Reference
from loractl.common.job.status import Status

from ..columns import part_of
from ..records import Page
from ..tables import (
    Adapter,
    FinalLook,
    Job,
    Tag,
)
from ..transaction import Transaction
from .jobs import read_job
from .lab_settings import refuse_stranger


def read_adapter(tx: Transaction, reference: Reference) -> Adapter:
    """The stored adapter that a person means. Raises JobNotFound, AdapterNotFound; WrongState if its job has none."""
    if reference.job_id is not None:
        read_job(tx, reference.job_id)
    return _find(tx.session, reference)


def tag(tx: Transaction, reference: Reference, tag: str, user: str) -> tuple[Adapter, int | None]:
    """Let name:tag mean this adapter; returns it, and the job of the adapter that the tag named before."""
    adapter = _find(tx.session, reference)
    before = _tagged(tx, adapter.name, tag)
    if not _set_tag(tx, (adapter.name, tag), adapter.job_id, before, user):
        raise WrongState(f"{adapter.name}:{tag} has changed meanwhile; try again")
    return adapter, before


def untag(tx: Transaction, reference: Reference, user: str) -> int:
    """Forget a tag; returns the job that had it. Raises AdapterNotFound."""
    name = reference.name or ""
    before = _tagged(tx, name, reference.tag)
    if before is None:
        raise AdapterNotFound(f"{name}:{reference.tag}")
    if not _set_tag(tx, (name, reference.tag), None, before, user):
        raise WrongState(f"{name}:{reference.tag} has changed meanwhile; try again")
    return before


def _tagged(tx: Transaction, name: str, tag: str) -> int | None:
    return tx.session.scalar(select(Tag.job_id).where(Tag.name == name, Tag.tag == tag))


def _find(session: Session, reference: Reference) -> Adapter:
    """Raises AdapterNotFound, also for a job that is not there, WrongState while the job has none."""
    adapter = session.scalars(_matching(reference).limit(1)).first()
    if adapter is not None:
        return adapter
    job = None if reference.job_id is None else session.get(Job, reference.job_id)
    if job is None:
        raise AdapterNotFound(str(reference))
    gone = job.status is Status.SUCCEEDED
    what = "no longer has a result: it was removed" if gone else f"has no adapter: it {job.status.in_words}"
    raise WrongState(f"job {job.job_id} {what}", f"loractl status {job.job_id} shows its state")


def _matching(reference: Reference) -> Select[Adapter]:
    if reference.job_id is not None:
        return select(Adapter).where(Adapter.job_id == reference.job_id)
    named = select(Adapter).where(Adapter.name == reference.name)
    if reference.tag == LATEST:
        return named.order_by(Adapter.created_at.desc(), Adapter.job_id.desc())
    return named.join(Tag, Tag.job_id == Adapter.job_id).where(Tag.name == reference.name, Tag.tag == reference.tag)


def _set_tag(tx: Transaction, key: tuple[str, str], job_id: int | None, before: int | None, user: str) -> bool:
    """Give a tag, (name, tag), to a job's adapter, or to none, while the job that has it is `before`; False if it no
    longer is. PostgreSQL's loractl_tag does the same."""
    name, tag = key
    if tx.has_functions:
        return bool(tx.session.scalar(select(func.loractl_tag(name, tag, job_id, before, user))))
    for one in {job_id, before} - {None}:
        refuse_stranger(tx, one or 0, "tag", user)
    if job_id is None:
        tx.session.execute(delete(Tag).where(Tag.name == name, Tag.tag == tag))
        tx.tell(before or 0, None, "untagged", f"lost the tag {name}:{tag} by {user}")
        return True
    tx.session.merge(Tag(name=name, tag=tag, job_id=job_id))
    if before != job_id:
        moved = "" if before is None else f", which job {before} had"
        tx.tell(job_id, None, "tagged", f"tagged {name}:{tag}{moved} by {user}")
    return True


def every() -> Select[Adapter]:
    """All stored adapters, by their job's number."""
    return select(Adapter).order_by(Adapter.job_id)


def newest_adapters(page: Page) -> Select[Adapter]:
    """The page's adapters, the newest job first, and one more where there is one."""
    query = select(Adapter).order_by(Adapter.job_id.desc()).limit(page.limit + 1)
    return query if page.after is None else query.where(Adapter.job_id < page.after)


def read_tags(tx: Transaction, job_ids: Collection[int] | None = None) -> dict[int, list[str]]:
    """The tags of each job's adapter, or of these jobs; the newest of a name has latest."""
    newest, given = select(Adapter.job_id).where(_is_newest()), select(Tag).order_by(Tag.tag)
    if job_ids is not None:
        newest, given = newest.where(Adapter.job_id.in_(job_ids)), given.where(Tag.job_id.in_(job_ids))
    tags = {job_id: [LATEST] for job_id in tx.session.scalars(newest)}
    for tag in tx.session.scalars(given):
        tags.setdefault(tag.job_id, []).append(tag.tag)
    return tags


def _is_newest() -> ColumnElement[bool]:
    """Whether an adapter is the newest of its name."""
    other = aliased(Adapter)
    of_name = select(other.job_id).where(other.name == Adapter.name).correlate(Adapter)
    newest = of_name.order_by(other.created_at.desc(), other.job_id.desc()).limit(1)
    return Adapter.job_id == newest.scalar_subquery()


def _init_from(job: type[Job]) -> ColumnElement[str]:
    """The number of the job whose adapter it begins from, as text; of a sweep's best once that is known. An edit may
    have named another adapter, or another sweep, since the best was chosen."""
    begun = part_of(job.spec, "lora", "init_from")
    chosen = case((job.awaits.is_(None), cast(job.ancestor, String)))
    return case((begun.startswith("{"), chosen), else_=begun)


def read_ancestors(tx: Transaction, job_ids: Collection[int]) -> dict[int, int]:
    """The job whose adapter each of these was begun from; those of a fresh adapter are left out."""
    begun = select(Job.job_id, _init_from(Job)).where(Job.job_id.in_(job_ids), _init_from(Job).is_not(None))
    return {job_id: int(ancestor) for job_id, ancestor in tx.session.execute(begun) if ancestor.isdecimal()}


def read_descendants(tx: Transaction, job_id: int) -> list[int]:
    """The jobs that wait or run and begin from this one's adapter."""
    begun = select(Job.job_id).where(_is_open(Job), _init_from(Job) == str(job_id))
    return list(tx.session.scalars(begun.order_by(Job.job_id)))


def _is_open(job: type[Job]) -> ColumnElement[bool]:
    return job.status.in_(tuple(status for status in Status if not status.is_terminal))


def is_begun_from() -> ColumnElement[bool]:
    """Whether a job that waits or runs begins from a job's adapter: then its files are kept."""
    other = aliased(Job)
    named = select(_init_from(other)).where(_is_open(other), _init_from(other).is_not(None))
    return cast(Job.job_id, String).in_(named.scalar_subquery())


def is_tagged() -> ColumnElement[bool]:
    """Whether somebody has tagged a job's adapter: then its files are kept."""
    return exists().where(Tag.job_id == Job.job_id)


def look(tx: Transaction, job_id: int, rows_sha256: str, user: str) -> int:
    """Write one down; returns its number. Raises JobNotFound."""
    sweep_id = read_job(tx, job_id).sweep_id
    if tx.has_functions:
        look_id: int = tx.session.scalars(select(func.loractl_look(job_id, rows_sha256, user, tx.now()))).one()
        return look_id
    mine = FinalLook(job_id=job_id, sweep_id=sweep_id, rows_sha256=rows_sha256, user=user, at=tx.now())
    tx.session.add(mine)
    tx.session.flush()
    return mine.look_id


def looks(rows_sha256: str) -> Select[FinalLook]:
    """All looks at what was measured on these final rows, in their order."""
    return select(FinalLook).where(FinalLook.rows_sha256 == rows_sha256).order_by(FinalLook.look_id)
