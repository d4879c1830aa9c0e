"""The database's tables. The rows are the truth about every job; messages on the queue are hints.

Annotations are values here, not texts: SQLAlchemy would evaluate the text of each column, a fifth of the import's time.
"""

import datetime as dt
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from sqlalchemy import (
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TextClause,
    bindparam,
    exists,
    false,
    or_,
    select,
    text,
)
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, column_property, mapped_column

from loractl.common.job.method import Method, Parallel
from loractl.common.job.names import LATEST
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.memory.context import CONTEXT_BYTES, context_excess
from loractl.common.placement.duration import UNKNOWN_S, Basis
from loractl.common.store import columns
from loractl.common.units import KIB, LARGEST, LAST_NUMBER, MIB

from . import shapes
from .columns import MOST_SECONDS, Characters, Flag, Json, LineKey, Prose, Real, RowNumber, UtcDateTime, Whole, Words
from .shapes import MOST_BYTES, list_of, object_of, optional, whole

Timestamp = Annotated[dt.datetime, mapped_column(UtcDateTime())]
Bytes = Annotated[int, mapped_column(columns.Bytes())]
Key = Annotated[int, mapped_column(RowNumber(), primary_key=True, autoincrement=True)]
JobKey = Annotated[int, mapped_column(RowNumber(), ForeignKey("jobs.job_id", ondelete="CASCADE"))]
Number = Annotated[int, mapped_column(Whole(), primary_key=True, autoincrement=False)]
Seconds = Annotated[float, mapped_column(Real(-MOST_SECONDS, MOST_SECONDS))]
Labels = Annotated[dict[str, str], mapped_column(Json(shapes.labels))]


class Base(DeclarativeBase):
    type_annotation_map = {str: Characters(255), int: Whole(), float: Real(), bool: Flag()}  # noqa: RUF012  SQLAlchemy's own form

    def as_json(self, *names: str) -> dict[str, Any]:
        """These of its columns, or all, under their own names; times as text."""
        values = {name: getattr(self, name) for name in names or self.__table__.columns.keys()}
        return {name: at.isoformat() if isinstance(at, dt.datetime) else at for name, at in values.items()}


MOST_ATTEMPTS = 2**30
"""Of a job: the next one has a number, too."""

_DATA_SET = shapes.fields(
    ("uri", "sha256"),
    uri=shapes.text, sha256=shapes.text, rows=whole(), bytes=shapes.size, tokens=shapes.number(0, MOST_BYTES),
)  # fmt: skip
_PROGRAM = shapes.fields(pid=whole(), user=shapes.text, name=shapes.text, bytes=shapes.size)
_PIECE = shapes.fields(
    micro_batch=whole(1), accumulation=whole(1), eval_batch=whole(1),
    gradient_checkpointing=shapes.either(shapes.flag, shapes.word(("half",))),
)  # fmt: skip
_CHECKPOINT = shapes.fields(("step", "prefix"), step=whole(), prefix=shapes.text, manifest_sha256=shapes.text)
_WAY = shapes.fields(
    ("cards", "parallel", "lora", "qlora"),
    cards=whole(1), parallel=shapes.word(tuple(Parallel)), lora=shapes.size, qlora=shapes.size,
)  # fmt: skip
_WAYS = shapes.fields(("alone", "ways"), alone=shapes.flag, ways=list_of(_WAY))
_FORM = shapes.fields(
    ("micro_batch", "bytes", "planned"),
    micro_batch=whole(1), bytes=whole(1, MOST_BYTES), planned=whole(1, MOST_BYTES), half=shapes.flag,
)  # fmt: skip
_ROOMY = shapes.fields(lora=list_of(_FORM), qlora=list_of(_FORM))
_MOST_TOKENS = 1e30  # a product with a number of steps is still a number
_EXTENT = shapes.fields(
    ("steps", "step_tokens", "closing_tokens", "parameters"),
    steps=whole(1, MOST_BYTES), step_tokens=shapes.number(1, _MOST_TOKENS),
    closing_tokens=shapes.number(0, _MOST_TOKENS),
    parameters=optional(whole(0, MOST_BYTES)),
)  # fmt: skip
_FORECAST = shapes.fields(
    ("device", "method", "seconds", "basis"),
    device=shapes.text, method=shapes.text, seconds=shapes.number(0, MOST_SECONDS), basis=shapes.text,
)  # fmt: skip
_VARIED = shapes.fields(varied=shapes.labels, trials=whole(), seed=whole())
_AVOIDED = object_of(shapes.fields(("reason", "until"), reason=shapes.text, until=shapes.moment))
_SHOWED = shapes.fields(bf16=shapes.flag, capability=shapes.text, context=shapes.size, context_after=shapes.size)

_MOST_AFTER = 1000
"""Jobs after which one may start, as `Predecessors` in common/job/sections.py: a statement names them all."""

_DRAWN = whole(1, LAST_NUMBER)
_BEGUN = shapes.fields(job=shapes.either(_DRAWN, shapes.text), sweep=_DRAWN)
_SPEC = shapes.fields(
    after=list_of(shapes.either(_DRAWN, shapes.text), most=_MOST_AFTER), after_any=shapes.flag,
    lora=shapes.fields(init_from=shapes.either(shapes.text, _BEGUN)), lora_patience=shapes.number(0, MOST_SECONDS),
    max_retries=whole(), notify=list_of(shapes.text), task_type=shapes.text, revision=shapes.text,
    resources=shapes.fields(
        max_vram=whole(0, LAST_NUMBER), time_limit=shapes.number(0, MOST_SECONDS), node_labels=shapes.labels
    ),
)  # fmt: skip
"""What is read of a spec that is no `JobSpec` yet. The rest is for the claim: this version may not understand it."""

WAITS = text("status = 'queued'")
"""Of a job. Literal: a partial index is only used where the planner sees its condition, not a parameter."""

WHERE, FIRST = "where", "first"

PAUSED = "(held OR not_before IS NOT NULL)"
"""Of a waiting job that is held or waits out a pause, if that is not over. Literal, as WAITS."""

FREE = "status = 'queued' AND NOT held AND awaits IS NULL"
"""Of a job that nothing keeps waiting but a pause, or the lack of a card."""

READY = f"{FREE} AND (not_before IS NULL OR not_before <= :now)"
"""Of a job that a claim may take, whatever it needs: `fleet.is_ready` in SQL."""


def ready_at(now: dt.datetime) -> TextClause:
    """READY as a condition."""
    return text(READY).bindparams(bindparam("now", now, type_=UtcDateTime()))


def _where(name: str, condition: str, *columns: str, **note: str) -> Index:
    """A partial index. Its condition is kept as a note: as an option of a dialect it would load all of PostgreSQL's."""
    return Index(name, *columns, info={WHERE: condition, **note})


def conditioned(dialect: str) -> MetaData:
    """The tables as a database has them, with the conditions of partial indexes as the options that Alembic reads."""
    made = MetaData()
    for table in Base.metadata.sorted_tables:
        copy = table.to_metadata(made)
        conditions = {index.name: index.info for index in table.indexes if WHERE in index.info}
        for index in [index for index in copy.indexes if index.name in conditions]:
            copy.indexes.remove(index)
            note = conditions[index.name]
            first = [copy.c[note[FIRST]]] if FIRST in note and dialect == "sqlite" else []
            Index(index.name, *first, *index.columns, **{f"{dialect}_where": text(note[WHERE])})  # type: ignore[arg-type]
    return made


def _where_queued(name: str, *columns: str, also: str = "") -> Index:
    """An index over waiting jobs alone: ended jobs, which are nearly all, cost it nothing.

    On SQLite it begins with the status, though that is always the same: else SQLite takes the index on status alone and
    reads every waiting job. PostgreSQL knows that the index implies the status, and so does not look for it. Before its
    version 18 it would go through the whole index to a column that is not the first.
    """
    return _where(name, f"status = 'queued'{also}", *columns, **{FIRST: "status"})


def after_of(spec: Mapping[str, Any]) -> list[int]:
    """The numbers of the jobs that a stored spec's job starts after; a name is that of a stored adapter."""
    return [one for one in spec.get("after") or () if isinstance(one, int)]


def sweep_of(spec: Mapping[str, Any]) -> int | None:
    """The sweep from whose best member a stored spec's job begins, if it is one."""
    begun = (spec.get("lora") or {}).get("init_from")
    return begun.get("sweep") if isinstance(begun, dict) else None


class Job(Base):
    """One submitted job: what was asked, and how far it is."""

    __tablename__ = "jobs"
    __table_args__ = (
        _where_queued("ix_jobs_line", "user", "queue_key", "work_left_s", "job_id", also=FREE.removeprefix(str(WAITS))),
        _where_queued("ix_jobs_line_age", "user", "queue_key", "job_id", also=FREE.removeprefix(str(WAITS))),
        _where_queued("ix_jobs_line_user", "priority", "user", "job_id"),
        _where_queued("ix_jobs_order", "priority", "job_id"),
        _where_queued("ix_jobs_class", "vram_class"),
        _where_queued("ix_jobs_plan", "base_model", "engine", "job_id"),
        # of few jobs, so that the others cost them nothing
        _where_queued("ix_jobs_patience", "lora_until", also=" AND lora_until IS NOT NULL"),
        _where_queued("ix_jobs_paused", "held", "not_before", also=f" AND {PAUSED}"),
        _where_queued("ix_jobs_awaits", "awaits", "job_id", also=" AND awaits IS NOT NULL"),
        _where_queued("ix_jobs_gangs", "job_id", also=" AND gangs IS NOT NULL"),
        Index("ix_jobs_sweep", "sweep_id", "status", "ended_at"),
        Index("ix_jobs_name", "name", "job_id"),
        Index("ix_jobs_user", "user", "job_id"),
        Index("ix_jobs_status", "status", "job_id"),
        _where("ix_jobs_ended", "ended_at IS NOT NULL", "ended_at", "status", "reason", "sweep_id", "job_id"),
        _where("ix_jobs_need_key", "attempt > 0", "need_key", "job_id"),
        _where("ix_jobs_ran", "attempt > 0", "base_model", "job_id"),
        _where("ix_jobs_family", "ended_at IS NOT NULL", "family", "job_id"),
        {"sqlite_autoincrement": True},  # a number is never given twice, also after a delete
    )

    job_id: Mapped[Key]
    name: Mapped[str]
    user: Mapped[str]
    labels: Mapped[Labels]
    spec: Mapped[dict[str, Any]] = mapped_column(Json(_SPEC, most=MIB))
    base_model: Mapped[str] = mapped_column(Prose())
    # stored data sets: {"path": {"uri", "sha256", "rows"}, "more.0": ..., "eval_path": ...}
    data: Mapped[dict[str, Any]] = mapped_column(Json(object_of(_DATA_SET), most=MIB))
    priority: Mapped[int] = mapped_column(Whole(-LARGEST - 1))
    vram_lora: Mapped[Bytes | None]  # predicted peak by method; null: can't be planned on the client
    vram_qlora: Mapped[Bytes | None]
    vram_needed: Mapped[Bytes | None]  # the least that a permitted method needs; null: not known yet
    vram_class: Mapped[int]  # GiB; the queue that wakes nodes for it
    # bytes by method as predicted, before what was learned from measured peaks
    planned: Mapped[dict[str, Any]] = mapped_column(Json(object_of(shapes.size)))
    # its line, with its user: priority, what it asks of a card, required labels; bytewise order in every database
    queue_key: Mapped[str] = mapped_column(LineKey().with_variant(Text(collation="C"), "postgresql"))
    methods: Mapped[list[str]] = mapped_column(  # permitted ones, the preferred first
        Json(list_of(shapes.word((Method.LORA, Method.QLORA))), [])
    )
    lora_until: Mapped[Timestamp | None]  # until then it waits for a card that holds LoRA; null: it does not
    need_key: Mapped[str | None] = mapped_column(Characters(64))  # jobs with the same one need the same memory
    family: Mapped[str | None] = mapped_column(Characters(64))  # the base's model_type; null: not known on the client
    engine: Mapped[int] = mapped_column(server_default="1")  # whose steps it was planned for: see ENGINE
    # how several cards may divide it: {"alone": may one have it, "ways": [{"cards", "parallel", bytes by method}]}
    gangs: Mapped[dict[str, Any] | None] = mapped_column(  # null: one card is to have it
        Json(_WAYS, null=True, none_as_null=True)
    )
    # what it is to compute, whatever it runs on; null: its rows were not counted
    extent: Mapped[dict[str, Any] | None] = mapped_column(Json(_EXTENT, null=True, none_as_null=True))
    # seconds left by model of card and method, and what each rests on; unknown ones are left out
    forecasts: Mapped[list[dict[str, Any]] | None] = mapped_column(
        Json(list_of(_FORECAST), [], null=True, none_as_null=True)
    )
    # the least of them by the method that it prefers; an hour: nothing is known
    work_left_s: Mapped[float] = mapped_column(Real(0, MOST_SECONDS), default=UNKNOWN_S, server_default="3600")
    # from an attempt's start to its first stored checkpoint; null: not measured
    checkpoint_s: Mapped[Seconds | None]
    # what it may have beyond its need, to train without recomputing: {method: [{"micro_batch", "bytes", "planned"}]}
    roomy: Mapped[dict[str, Any] | None] = mapped_column(Json(_ROOMY, null=True, none_as_null=True))
    # the newest one in the artifact store: step, prefix
    checkpoint: Mapped[dict[str, Any] | None] = mapped_column(Json(_CHECKPOINT, null=True))
    begun_bf16: Mapped[bool | None]  # the card that trained it takes bfloat16; null: not known, or the job says in what
    result_host: Mapped[str | None]  # the box that holds a finished result which is not stored yet
    result_until: Mapped[Timestamp | None]  # until then only that box may take the job
    # what out-of-memory has changed: micro-batch, accumulation, ...
    adjustment: Mapped[dict[str, Any] | None] = mapped_column(Json(_PIECE, null=True))

    status: Mapped[Status] = mapped_column(Words(Status))
    reason: Mapped[Reason | None] = mapped_column(Words(Reason))
    message: Mapped[str | None] = mapped_column(Prose())  # why, in one sentence
    stage: Mapped[Stage | None] = mapped_column(Words(Stage))
    preemptible: Mapped[bool] = mapped_column(default=False)  # gives way to a job of higher priority
    yields: Mapped[bool] = mapped_column(default=False, server_default=false())  # gives way to a much shorter job
    # how often it was asked to stop for another job
    stops: Mapped[int] = mapped_column(Whole(0, LARGEST), default=0, server_default="0")
    preempted_by: Mapped[int | None] = mapped_column(RowNumber())  # the job that this running one gives way to
    version: Mapped[str | None] = mapped_column(Characters(32))  # of the loractl that wrote the spec
    held: Mapped[bool] = mapped_column(default=False)  # by a person or the lab
    awaits: Mapped[int | None] = mapped_column(RowNumber())  # the first job of its `after` that is not over
    ancestor: Mapped[int | None] = mapped_column(RowNumber())  # the best member of a sweep that it begins from
    not_before: Mapped[Timestamp | None]  # backoff
    attempt: Mapped[int] = mapped_column(Whole(0, MOST_ATTEMPTS), default=0)
    retries_used: Mapped[int] = mapped_column(Whole(0, LARGEST - 1), default=0)
    # in a row, without a further checkpoint
    lab_failures: Mapped[int] = mapped_column(Whole(0, LARGEST - 1), default=0, server_default="0")
    lab_step: Mapped[int | None]  # the step that a next attempt could go on from when the last of them happened
    # cards and boxes that failed it: {name: {"reason", "until"}}
    avoids: Mapped[dict[str, Any] | None] = mapped_column(Json(_AVOIDED, null=True, none_as_null=True))

    token: Mapped[str | None] = mapped_column(Characters(32))  # of the attempt that holds the lease
    vram_reserved: Mapped[Bytes | None]  # of its card, while it runs
    lease_expires_at: Mapped[Timestamp | None]
    node: Mapped[str | None]
    gpu: Mapped[str | None]
    method: Mapped[str | None] = mapped_column(Characters(8))
    step: Mapped[int | None]
    total_steps: Mapped[int | None]
    loss: Mapped[float | None]
    tokens_per_second: Mapped[float | None] = mapped_column(Real(0))
    eta_seconds: Mapped[Seconds | None]
    eta_spread_seconds: Mapped[Seconds | None]  # half width of the range in which it ends, about 19 times in 20
    evaluated: Mapped[int | None]  # rows and answers of base and tuned together, while it evaluates
    to_evaluate: Mapped[int | None]

    submitted_at: Mapped[Timestamp]
    started_at: Mapped[Timestamp | None]
    ended_at: Mapped[Timestamp | None]
    adapter_uri: Mapped[str | None] = mapped_column(Prose())
    report_uri: Mapped[str | None] = mapped_column(Prose())
    manifest_sha256: Mapped[str | None] = mapped_column(Characters(64))  # of its result; null: of an earlier version
    sweep_id: Mapped[int | None] = mapped_column(RowNumber())  # the sweep that it belongs to

    if TYPE_CHECKING:
        cancel_requested: Mapped[bool]  # ASKED_TO_STOP

    @hybrid_property
    def waits_from(self) -> dt.datetime:
        """From when its wait counts, in every figure; a column in queries. The order reads the same of its rows
        (`fleet.waiting_of`, `queries/lines.py`)."""
        return self.submitted_at

    @property
    def after(self) -> list[int]:
        """The jobs that it starts after."""
        return after_of(self.spec)

    @property
    def after_any(self) -> bool:
        """Whether any end of those jobs will do."""
        return self.spec.get("after_any") is True

    @property
    def is_blocked(self) -> bool:
        """Whether another job alone keeps it from starting: neither a person nor the lab holds it."""
        return self.awaits is not None and not self.held

    @property
    def has_checkpoint(self) -> bool:
        """Whether the next attempt can go on from one in the artifact store."""
        return self.checkpoint is not None


class Sweep(Base):
    """Jobs of one job file with different settings, submitted together."""

    __tablename__ = "sweeps"
    __table_args__ = ({"sqlite_autoincrement": True},)

    sweep_id: Mapped[Key]
    name: Mapped[str]
    user: Mapped[str]
    # varied: text as it was given, by key; trials and seed where points were drawn
    settings: Mapped[dict[str, Any]] = mapped_column(Json(_VARIED))
    rungs: Mapped[list[float] | None] = mapped_column(  # shares; null: no loser is stopped
        Json(list_of(shapes.number(0, 1)), [], null=True, none_as_null=True)
    )
    created_at: Mapped[Timestamp]


class Attempt(Base):
    """One run of a job on one device."""

    __tablename__ = "attempts"
    __table_args__ = (
        Index("ix_attempts_started", "started_at"),
        Index("ix_attempts_ended", "ended_at"),
    )

    job_id: Mapped[JobKey] = mapped_column(primary_key=True)
    attempt: Mapped[Number]
    token: Mapped[str] = mapped_column(Characters(32))
    node: Mapped[str]
    gpu: Mapped[str]
    method: Mapped[str] = mapped_column(Characters(8))
    engine: Mapped[int] = mapped_column(server_default="1")  # whose steps it took: see ENGINE
    vram_planned: Mapped[Bytes | None]
    vram_reserved: Mapped[Bytes | None]
    roomy: Mapped[bool | None]  # it was given the room to do without recomputing; null: an earlier version's
    vram_peak: Mapped[Bytes | None]  # reserved by CUDA's allocator; on a CPU the process's resident set
    vram_allocated: Mapped[Bytes | None]  # of it, by tensors
    vram_process: Mapped[Bytes | None]  # of the device, by the whole process, context included
    device_name: Mapped[str | None]
    device_kind: Mapped[str | None] = mapped_column(Characters(8))
    started_at: Mapped[Timestamp]
    ended_at: Mapped[Timestamp | None]
    reason: Mapped[Reason | None] = mapped_column(Words(Reason))
    message: Mapped[str | None] = mapped_column(Prose())
    resumed_from_step: Mapped[int | None]
    base_bytes: Mapped[Bytes | None]  # of the device, by the loaded base alone
    seconds_predicted: Mapped[Seconds | None]  # of this attempt, as it started; null: nothing was known
    predicted_by: Mapped[Basis | None] = mapped_column(Words(Basis))  # what that rests on
    prepared_s: Mapped[Seconds | None]  # from its start to its first step
    trained_s: Mapped[Seconds | None]  # in its steps, with what was measured between them
    trained_steps: Mapped[int | None]
    # other jobs on its card in these steps, on average; null: an older worker's
    neighbours: Mapped[float | None] = mapped_column(Real(0))
    lease_expires_at: Mapped[Timestamp | None]  # holds the lease while somebody's transaction has the job's row locked


def peak_of(attempt: Any) -> int:
    """Bytes measured of an attempt's process; 0: none, or on a simulated card.

    Where NVML does not show the process (in a container, in WSL), the allocator's peak and a CUDA context.
    """
    if attempt.device_kind == "sim":
        return 0
    context = CONTEXT_BYTES if attempt.device_kind == "nvml" and attempt.vram_peak else 0
    return attempt.vram_process or (attempt.vram_peak or 0) + context


class AttemptShare(Base):
    """What an attempt on several cards has of one of them."""

    __tablename__ = "shares"
    job_id: Mapped[JobKey] = mapped_column(primary_key=True)
    attempt: Mapped[Number]
    rank: Mapped[Number]  # 0: the node that claimed it
    node: Mapped[str]
    bytes: Mapped[Bytes]


ON_SEVERAL_CARDS = exists().where(AttemptShare.job_id == Attempt.job_id, AttemptShare.attempt == Attempt.attempt)
"""Whether an attempt has several cards."""


class LabFailure(Base):
    """A failure of the lab's on a card that has ended no attempt well since."""

    __tablename__ = "lab_failures"

    job_id: Mapped[JobKey] = mapped_column(primary_key=True)
    attempt: Mapped[Number]
    node: Mapped[str]
    reason: Mapped[Reason] = mapped_column(Words(Reason))
    user: Mapped[str]
    sweep_id: Mapped[int | None]
    at: Mapped[Timestamp]
    message: Mapped[str] = mapped_column(Prose())


OF_PEOPLE = "attempt IS NULL AND kind IN ('cancel', 'cancelled', 'held', 'retry', 'edited')"
"""Of a line of a history: it says what a person did to the job. The words must be exactly these, for the index."""


class Event(Base):
    """One line of a job's history; never changed."""

    __tablename__ = "events"
    __table_args__ = (_where("ix_events_of_people", OF_PEOPLE, "at"),)

    event_id: Mapped[Key]
    job_id: Mapped[JobKey] = mapped_column(index=True)
    attempt: Mapped[int | None]
    at: Mapped[Timestamp]
    kind: Mapped[str] = mapped_column(Characters(32))
    text: Mapped[str] = mapped_column(Prose())


class Node(Base):
    """One device that a worker serves, as it was last seen."""

    __tablename__ = "nodes"

    node: Mapped[str] = mapped_column(primary_key=True)  # host:index
    host: Mapped[str]
    gpu: Mapped[str]  # UUID
    device_name: Mapped[str]
    kind: Mapped[str] = mapped_column(Characters(8))  # nvml, cpu, sim
    total: Mapped[Bytes]
    free: Mapped[Bytes]  # what a new job may take
    # other people's processes: pid, user, name, bytes
    outside: Mapped[list[dict[str, Any]]] = mapped_column(Json(list_of(_PROGRAM), []))
    outside_bytes: Mapped[Bytes]  # held by programs that are not ours, now or a short while ago
    used: Mapped[dict[str, Any]] = mapped_column(Json(object_of(whole(0, MOST_BYTES))))  # bytes measured now, by job
    margin: Mapped[Bytes]  # what the box's owner keeps free
    max_jobs: Mapped[int]
    user_limit: Mapped[int | None] = mapped_column(Whole(1))  # running jobs a user may have
    keeps_jobs: Mapped[bool] = mapped_column(default=False, server_default=false())  # none yields to a shorter one
    labels: Mapped[Labels]
    load: Mapped[int | None]  # percent
    temperature: Mapped[int | None] = mapped_column(Whole(-LARGEST))  # °C
    versions: Mapped[Labels]
    draining: Mapped[bool] = mapped_column(default=False)
    gangs: Mapped[bool] = mapped_column(default=False, server_default=false())  # its worker serves several cards a job
    fault: Mapped[str | None] = mapped_column(Prose())  # why nothing can run on it, with the next step
    # what it showed; null: no test
    self_test: Mapped[dict[str, Any] | None] = mapped_column(Json(_SHOWED, null=True, none_as_null=True))
    instance: Mapped[str | None] = mapped_column(Characters(64))  # of the box: two boxes may call themselves the same
    machine: Mapped[str | None] = mapped_column(Characters(64))  # a home may be copied to another machine
    boot: Mapped[str | None] = mapped_column(Characters(64))  # a whole machine may be copied
    until: Mapped[Timestamp | None]  # when its worker stops by itself; null: it stays
    window_s: Mapped[Seconds | None]  # from its worker's start until then
    seen_at: Mapped[Timestamp]

    @property
    def kept_free(self) -> int:
        """Its owner's margin, and what the contexts of as many jobs as it takes need beyond their plans."""
        return self.margin + self.max_jobs * context_excess(self.self_test)

    @property
    def usable(self) -> int:
        """What our jobs could ever take of it."""
        return self.total - self.kept_free


class CardContention(Base):
    """How much jobs on one card slow each other, as it was measured on a model of card."""

    __tablename__ = "contentions"

    device_name: Mapped[str] = mapped_column(primary_key=True)
    contention: Mapped[float] = mapped_column(Real(0))  # see `duration.CONTENTION`


LEASES = "leases"
"""The round in which leases are ended."""


class FleetRound(Base):
    """What one node at a time does for the whole fleet, and when it was last done."""

    __tablename__ = "fleet_rounds"

    name: Mapped[str] = mapped_column(primary_key=True)
    at: Mapped[Timestamp]
    settled_at: Mapped[Timestamp]  # until then no lease is ended: living workers had no database for a while


class Lock(Base):
    """A lock by name: the transaction that holds it has locked the row. A login that submits can't lock one."""

    __tablename__ = "locks"

    name: Mapped[str] = mapped_column(String(300), primary_key=True)


class Wish(Base):
    """A request to cancel a running job. The job's heartbeats read it; its end deletes it."""

    __tablename__ = "wishes"

    job_id: Mapped[JobKey] = mapped_column(primary_key=True)
    user: Mapped[str] = mapped_column(primary_key=True)
    at: Mapped[Timestamp]


ASKED_TO_STOP = exists().where(Wish.job_id == Job.job_id).correlate_except(Wish).label("cancel_requested")
"""Whether somebody has asked a running job to stop."""

Job.cancel_requested = column_property(ASKED_TO_STOP.element)

_Other = aliased(Job)
GIVES_WAY_TO = (
    select(_Other.job_id)
    .where(_Other.job_id == Job.preempted_by, or_(Job.preemptible, Job.yields), text(FREE))
    .correlate(Job)
    .scalar_subquery()
)
"""The job that a running one is to give way to, while that one waits and a person lets this one yield."""


class DrainOrder(Base):
    """A person's wish that a box, or one card of it, takes no more jobs."""

    __tablename__ = "drains"

    target: Mapped[str] = mapped_column(primary_key=True)  # a host, or host:index
    user: Mapped[str]
    reason: Mapped[str] = mapped_column(Prose())
    until: Mapped[Timestamp | None]
    now: Mapped[bool]  # running jobs are requeued after a checkpoint


class Use(Base):
    """What a user has had of the cards, for fair share."""

    __tablename__ = "uses"

    user: Mapped[str] = mapped_column(primary_key=True)
    gib_hours: Mapped[float]  # as of `at`; older use counts less (HALF_LIFE_S)
    at: Mapped[Timestamp]


class Usage(Base):
    """What the attempts that have ended had of a card in one hour; no row is deleted, so it outlives the jobs."""

    __tablename__ = "usage"
    __table_args__ = (Index("ix_usage_user", "user", "hour"),)

    hour: Mapped[Timestamp] = mapped_column(primary_key=True)  # its start
    user: Mapped[str] = mapped_column(primary_key=True)
    node: Mapped[str] = mapped_column(primary_key=True)
    label_set: Mapped[str] = mapped_column(Characters(16), primary_key=True)  # of LabelSet; "": no labels
    card_hours: Mapped[float] = mapped_column(Real(0))  # a part of a card counts as its bytes of the card's
    gib_hours: Mapped[float] = mapped_column(Real(0))
    lost_hours: Mapped[float] = mapped_column(Real(0))  # of the card hours, for steps that no checkpoint has kept
    waited_hours: Mapped[float] = mapped_column(Real(0))  # of attempts that began in this hour, on their first card
    jobs: Mapped[int]  # that ended in this hour, where the first card of their last attempt was


class LabelSet(Base):
    """The labels of jobs, once for all that have the same."""

    __tablename__ = "label_sets"

    label_set: Mapped[str] = mapped_column(Characters(16), primary_key=True)  # of its sha256
    labels: Mapped[Labels]


class Quota(Base):
    """How many card hours a user may have within some time, and how many that is now."""

    __tablename__ = "quotas"

    user: Mapped[str] = mapped_column(primary_key=True)
    card_hours: Mapped[float] = mapped_column(Real(0))
    window_s: Mapped[int]
    soft: Mapped[bool]  # beyond it the user's jobs go last; else they wait
    used: Mapped[float] = mapped_column(Real(0), default=0.0)  # by attempts that have ended, as of the fleet's round
    below_at: Mapped[Timestamp | None]  # when that alone is below the quota; null: it is now


class LabSetting(Base):
    """What the lab's owner has decided for everybody, or what is true of the lab as a whole."""

    __tablename__ = "lab_settings"

    name: Mapped[str] = mapped_column(Characters(64), primary_key=True)
    value: Mapped[str] = mapped_column(Prose())


class Quarantined(Base):
    """A value that its column may not hold, as it was when the tables were brought to the columns' bounds."""

    __tablename__ = "quarantine"

    quarantine_id: Mapped[Key]
    table_name: Mapped[str] = mapped_column(Characters(64))
    row_key: Mapped[str] = mapped_column(Prose())  # of the row, as JSON
    column_name: Mapped[str] = mapped_column(Characters(64))  # *: the whole row, as JSON, whose key could not stay
    value: Mapped[str] = mapped_column(Prose(2**30))
    at: Mapped[Timestamp]


FINAL = "(name = 'held_out_loss' OR substr(name, 1, 5) = 'rung_')"
"""What a member of a sweep is compared by. The words must be exactly these, so that a planner recognises the index."""


class MetricPoint(Base):
    """One measured value at one step of an attempt."""

    __tablename__ = "metrics"
    __table_args__ = (_where("ix_metrics_final", FINAL, "job_id", "name"),)

    job_id: Mapped[JobKey] = mapped_column(primary_key=True)
    attempt: Mapped[Number]
    step: Mapped[Number]
    name: Mapped[str] = mapped_column(Characters(64), primary_key=True)
    value: Mapped[float]


class LogChunk(Base):
    """Lines of a running attempt's log; the whole log is an artifact at the end."""

    __tablename__ = "log_chunks"

    chunk_id: Mapped[Key]
    job_id: Mapped[JobKey] = mapped_column(index=True)
    attempt: Mapped[int]
    text: Mapped[str] = mapped_column(Prose(MIB))


class Adapter(Base):
    """A stored adapter of a job that succeeded."""

    __tablename__ = "adapters"
    __table_args__ = (Index("ix_adapters_newest", "name", "created_at", "job_id"),)

    job_id: Mapped[JobKey] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    name: Mapped[str]
    base_model: Mapped[str] = mapped_column(Prose())
    method: Mapped[str] = mapped_column(Characters(8))
    uri: Mapped[str] = mapped_column(Prose())
    size: Mapped[Bytes]
    sha256: Mapped[str] = mapped_column(Characters(64))
    created_at: Mapped[Timestamp]


class Tag(Base):
    """A name that a person gave to an adapter among those of one job name, like prod; it moves with them."""

    __tablename__ = "tags"

    name: Mapped[str] = mapped_column(primary_key=True)  # of the jobs
    tag: Mapped[str] = mapped_column(Characters(64, LATEST), primary_key=True)  # latest moves by itself
    job_id: Mapped[JobKey] = mapped_column(index=True)


class FinalLook(Base):
    """A record that somebody was shown what a job measured on its final rows; never changed."""

    __tablename__ = "looks"
    look_id: Mapped[Key]
    job_id: Mapped[JobKey]
    sweep_id: Mapped[int | None] = mapped_column(RowNumber())  # whose winner the job was
    rows_sha256: Mapped[str] = mapped_column(Characters(64))
    user: Mapped[str]
    at: Mapped[Timestamp]


class JobLabel(Base):
    """A copy of a label in a job's row, so that the jobs that have it are found without reading the others."""

    __tablename__ = "job_labels"
    __table_args__ = (Index("ix_job_labels_jobs", "key", "value", "job_id"),)

    job_id: Mapped[JobKey] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(Characters(64), primary_key=True)
    value: Mapped[str] = mapped_column(Characters(256))


class OutboxMessage(Base):
    """One message to one channel. It is unique by event and channel: an event reported twice is one message."""

    __tablename__ = "outbox"
    __table_args__ = (
        Index("ux_outbox_event", "event", "channel", unique=True),
        _where("ix_outbox_due", "settled_at IS NULL", "due_at"),
        Index("ix_outbox_at", "at"),
    )

    message_id: Mapped[str] = mapped_column(Characters(40), primary_key=True)
    event: Mapped[str]
    channel: Mapped[str] = mapped_column(Characters(64))  # a name of somebody's config.toml, or me, or lab
    user: Mapped[str]
    job_id: Mapped[int | None] = mapped_column(RowNumber(), ForeignKey("jobs.job_id", ondelete="CASCADE"), index=True)
    kind: Mapped[str] = mapped_column(Characters(32))
    subject: Mapped[str] = mapped_column(Prose())
    text: Mapped[str] = mapped_column(Prose(64 * KIB))
    at: Mapped[Timestamp]
    due_at: Mapped[Timestamp]  # of the next try; while one runs, the end of its lease
    token: Mapped[str | None] = mapped_column(Characters(32))  # of the sender that has the lease
    tries: Mapped[int] = mapped_column(default=0, server_default="0")
    settled_at: Mapped[Timestamp | None]  # sent, passed on to channels, or given up
    outcome: Mapped[str | None] = mapped_column(Prose())  # of the last try


class KeptFile(Base):
    """A file in a box's cache that later jobs there may use. A file without a row is never read."""

    __tablename__ = "kept_files"
    __table_args__ = (Index("ix_kept_files_host", "host", "at"),)

    key: Mapped[str] = mapped_column(Characters(64), primary_key=True)  # a hash of the box and of all that decides it
    host: Mapped[str]
    sha256: Mapped[str] = mapped_column(Characters(64))
    job_id: Mapped[JobKey]  # that wrote it
    at: Mapped[Timestamp]
