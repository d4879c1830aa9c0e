"""A lab of before an attempt was a process of its own, upgraded: its jobs lose nothing, and its plan learns nothing."""

from __future__ import annotations

from collections.abc import Callable

from alembic import command
from sqlalchemy import Column, Engine, MetaData, Table, text

from loractl.common.job.method import Need
from loractl.common.job.status import Reason, Status
from loractl.common.memory.correction import accuracy, learned
from loractl.common.store import shapes
from loractl.common.store.checks import bring, checks_of
from loractl.common.store.columns import Characters, Flag, Json, UtcDateTime
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, Progress, StoredCheckpoint
from loractl.common.store.schema import alembic_config, migrating, upgrade
from loractl.common.store.store import Store
from loractl.common.units import GIB

from ...factories import RESULT, Clock, node_state, submission

BEFORE = "0040"
NEED = Need(lora=10 * GIB, qlora=None)


def opened(url: str) -> tuple[Engine, Store, Clock]:
    engine, clock = make_engine(url), Clock()
    store = Store(engine, clock)
    see(store)
    return engine, store, clock


def see(store: Store) -> None:
    store.cards.see(node_state("box:0", total=80 * GIB, max_jobs=8))


def started(store: Store, **keys: object) -> Claim:
    store.jobs.submit(submission(lora=10, qlora=None, method="lora", need_key="key", family="llama", **keys))
    see(store)
    claim = store.attempts.claim("box:0")
    assert isinstance(claim, Claim)
    return claim


BOUNDED = Table(
    "attempts", MetaData(), Column("host", Characters(32)), Column("inside", Flag()),
    Column("promised_at", UtcDateTime()), Column("joined", Flag()), Column("shared", Flag()),
)  # fmt: skip
HOSTS = Table("hosts", MetaData(), Column("law", Json(shapes.fields(form=shapes.text), null=True)))


def upgraded(engine: Engine, as_before: Callable[[Engine], None]) -> None:
    """Bring the tables to their form and bounds of before, write what was possible then, and upgrade them."""
    with migrating(engine) as connection, alembic_config(connection) as config:
        command.downgrade(config, BEFORE)
        for table in (BOUNDED, HOSTS):
            bring(connection, table, checks_of(table, engine.dialect.name))
    as_before(engine)
    upgrade(engine)
    with engine.connect() as connection:
        of_hosts = "pg_proc WHERE proname" if engine.dialect.name == "postgresql" else "sqlite_master WHERE name"
        assert connection.execute(text(f"SELECT count(*) FROM {of_hosts} LIKE '%hosts%'")).scalar() == 0


def test_what_was_measured_of_several_jobs_in_one_trainer_teaches_nothing(upgraded_url: str) -> None:
    engine, store, clock = opened(upgraded_url)
    for peak in (8.0, 8.5, 9.0):
        store.attempts.finish(started(store), Reason.OK, "done", Progress(vram_process=int(peak * GIB)), RESULT)
        clock.forward(60)
    alone = store.attempts.measured()
    together = [started(store) for _ in range(3)]
    peaks = Progress(vram_process=70 * GIB, vram_peak=69 * GIB, vram_allocated=68 * GIB)
    for claim in together[:2]:
        store.attempts.finish(claim, Reason.OK, "done", peaks, RESULT)
    store.attempts.finish(together[2], Reason.OUT_OF_MEMORY, "out of memory", peaks)
    assert learned(NEED, "key", store.attempts.measured()) != learned(NEED, "key", alone), "if they were alone"

    def as_before(engine: Engine) -> None:
        with engine.begin() as connection:
            marked = "UPDATE attempts SET host = 'mark', shared = :yes WHERE job_id >= :first"
            connection.execute(text(marked), {"yes": True, "first": together[0].job_id})

    upgraded(engine, as_before)
    measured = store.attempts.measured()
    assert (measured, store.attempts.measured("key", "llama")) == (alone, alone)
    assert accuracy(measured) == accuracy(alone) and learned(NEED, "key", measured) == learned(NEED, "key", alone)
    (row,) = store.attempts.of_job(together[0].job_id)
    assert (row.vram_process, row.vram_peak, row.vram_allocated) == (None, None, None)
    engine.dispose()


def test_jobs_that_shared_a_trainer_at_the_upgrade_go_on_from_their_checkpoints(upgraded_url: str) -> None:
    """One had the whole of the trainer, one its own part, and one had ended and was not out of it yet."""
    engine, store, clock = opened(upgraded_url)
    claims = [started(store, preemptible=n == 0) for n in range(3)]
    first, second, third = claims
    for claim in claims:
        store.attempts.keep_checkpoint(claim, StoredCheckpoint(step=40, prefix=f"jobs/{claim.job_id}/c"))
    store.attempts.finish(third, Reason.DRAINED, "drained", Progress())
    waiting = store.jobs.submit(submission(lora=75, qlora=None, method="lora"))

    def as_before(engine: Engine) -> None:
        same = "SET host = 'mark', shared = :yes, base_bytes = :base"
        row = (
            "INSERT INTO hosts (host, node, key, base_model, method, bytes, job_id, attempt, leaving, since, open)"
            " VALUES ('mark', 'box:0', 'k', 'org/model', 'lora', :base, :first, 1, :no, :now, :yes)"
        )
        given = {"yes": True, "no": False, "base": 5 * GIB, "now": clock.now.replace(tzinfo=None)}
        with engine.begin() as connection:
            for statement, more in (
                (f"UPDATE attempts {same} WHERE job_id = :first", {"first": first.job_id}),
                (f"UPDATE attempts {same}, joined = :yes WHERE job_id = :second", {"second": second.job_id}),
                (
                    f"UPDATE attempts {same}, joined = :yes, inside = :yes WHERE job_id = :third",
                    {"third": third.job_id},
                ),
                (row, {"first": first.job_id}),
            ):
                connection.execute(text(statement), {**given, **more})

    upgraded(engine, as_before)
    see(store)
    assert [store.jobs.get(claim.job_id).status for claim in claims] == [Status.RUNNING] * 2 + [Status.QUEUED]
    begun = store.cards.arrive(node_state("box:0"))
    assert begun.given_back == (first.job_id, second.job_id), "the worker of this version begins"
    for claim in claims:
        row = store.jobs.get(claim.job_id)
        assert (row.status, row.held, row.has_checkpoint) == (Status.QUEUED, False, True)
    clock.forward(3600)
    see(store)
    again = [store.attempts.claim("box:0") for _ in claims]
    assert [(c.job_id, c.checkpoint and c.checkpoint.step) for c in again if isinstance(c, Claim)] == [
        (claim.job_id, 40) for claim in claims
    ]
    assert store.jobs.get(waiting).status is Status.QUEUED
    engine.dispose()
