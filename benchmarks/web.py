"""How long a page of `loractl web` takes with many jobs, on SQLite (a file) and PostgreSQL.

    .venv/bin/python -m benchmarks.web [jobs ...]

Each page is asked for again and again through the application itself; nothing travels over a network. Prints the median
and the worst time in ms; the processor time of this process, which has SQLite's part in it, and of PostgreSQL's own
processes (on a busy machine the times beside them tell of its other work); how many statements it asks; and the page's
size before and after gzip. One in 50 of the jobs waits, and 64 run on 16 cards of four boxes; half a percent has
failed; a half belongs to sweeps of a hundred. The pages are drawn for each look: what is kept for a moment for all who
look is not used.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import gzip
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, event, text
from starlette.testclient import TestClient

from loractl.common.artifacts import ArtifactStore
from loractl.common.job.method import Need, permitted_methods
from loractl.common.job.spec import JobSpec
from loractl.common.memory.fit import MemoryPlan
from loractl.common.store.records import NodeState, Submission
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.web import metrics, site
from loractl.scheduler.web.guard import Access
from loractl.scheduler.web.pages.shelf import ReportShelf
from loractl.scheduler.web.site import make_site

from .claim import postgresql, sqlite

LOOKS = 5
SIZES = (100, 10_000, 100_000)
USERS = ("ada", "mara", "wei", "priya", "lena", "jonas")
CARDS = tuple(f"{host}:{n}" for host in ("heron", "osprey", "kestrel", "egret") for n in range(4))


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one look at a page took."""

    wall_ms: float
    own_ms: float  # processor time of this process
    server_ms: float  # of PostgreSQL's


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or list(SIZES)
    site.FRESH_S = metrics.FRESH_S = -1.0
    head = f"{'median':>8}{'worst':>7}{'CPU':>6}{'+ db':>6}{'asked':>7}{'KB':>7}{'gzip':>6}"
    print(f"{'':<12}{'jobs':>8}  {'page':<28}{head}")
    for name, opened in (("SQLite", sqlite), ("PostgreSQL", postgresql)):
        for jobs in sizes:
            with opened() as engine:
                measure(name, engine, jobs)


def measure(database: str, engine: Engine, jobs: int) -> None:
    """Print the times of each page."""
    upgrade(engine)
    store = Store(engine)
    fill(store, engine, jobs)
    shelf = ReportShelf(store, lambda: ArtifactStore(Path(tempfile.mkdtemp()).as_uri()))
    app = make_site(store, shelf, Access(token=None, names=frozenset({"localhost"})))
    client = TestClient(app, base_url="http://localhost")
    asked, server = [0], postmaster_of(engine)
    event.listen(engine, "before_cursor_execute", lambda *_: asked.__setitem__(0, asked[0] + 1))
    for what, address in pages_of(store, jobs).items():
        answer = client.get(address)
        assert answer.status_code == 200, (address, answer.text)
        asked[0] = 0
        looks = [look_at(lambda: client.get(address).content, server) for _ in range(LOOKS)]  # noqa: B023  called at once
        own, other = (statistics.median(getattr(look, name) for look in looks) for name in ("own_ms", "server_ms"))
        wall = [look.wall_ms for look in looks]
        size, packed = len(answer.content) / 1000, len(gzip.compress(answer.content, 5)) / 1000
        print(
            f"{database:<12}{jobs:>8}  {what:<28}{statistics.median(wall):>8.0f}{max(wall):>7.0f}{own:>6.0f}"
            f"{other:>6.0f}{asked[0] / LOOKS:>7.0f}{size:>7.1f}{packed:>6.1f}",
            flush=True,
        )


def pages_of(store: Store, jobs: int) -> dict[str, str]:
    """What is looked at, by a name for it."""
    running, half = min(store.cards.fleet().running), max(2, jobs // 2)
    sweep = max(1, jobs // 200 - 2)
    return {
        "lab": "/", "lab, one owner": "/?user=ada", "lab, a label": "/?label=team=vision", "jobs": "/jobs",
        "jobs, far back": f"/jobs?after={half}", "jobs, failed": "/jobs?status=failed",
        "jobs, failed, far back": f"/jobs?status=failed&after={half}", "jobs, succeeded": "/jobs?status=succeeded",
        "jobs of a user": "/jobs?user=wei", "jobs of a user, far back": f"/jobs?user=wei&after={half}",
        "jobs of one who has few": "/jobs?user=rosa", "jobs of a user, failed": "/jobs?user=wei&status=failed",
        "jobs of few, failed": "/jobs?user=rosa&status=failed", "jobs of a name": "/jobs?name=job-7",
        "jobs of nobody": "/jobs?name=nobody", "jobs with a label": "/jobs?label=team=nlp",
        "jobs with a rare label": "/jobs?label=team=vision", "jobs with no such label": "/jobs?label=team=nobody",
        "a label and a user of few": "/jobs?label=team=nlp&user=rosa", "a running job": f"/jobs/{running}",
        "an ended job": f"/jobs/{half}", "sweeps": "/sweeps", "a sweep": f"/sweeps/{sweep}", "adapters": "/adapters",
        "adapters, far back": f"/adapters?after={half}", "metrics": "/metrics",
    }  # fmt: skip


def look_at(look: Callable[[], bytes], postmaster: int | None) -> Look:
    """One look."""
    server, start, own = _server_s(postmaster), time.perf_counter(), time.process_time()
    look()
    wall, busy = time.perf_counter() - start, time.process_time() - own
    return Look(wall_ms=1000 * wall, own_ms=1000 * busy, server_ms=1000 * (_server_s(postmaster) - server))


def postmaster_of(engine: Engine) -> int | None:
    """The process of the server that the engine is connected to; None for SQLite."""
    if engine.dialect.name == "sqlite":
        return None
    with engine.connect() as connection:
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    return _parent(Path(f"/proc/{pid}"))


def _parent(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])


def _server_s(postmaster: int | None) -> float:
    """Processor seconds of a server's processes so far."""
    total = 0.0
    for process in Path("/proc").glob("[0-9]*") if postmaster is not None else ():
        with contextlib.suppress(OSError):  # it has ended
            if _parent(process) == postmaster:
                total += int((process / "schedstat").read_text().split()[0]) / 1e9
    return total


def fill(store: Store, engine: Engine, jobs: int) -> None:
    """Jobs in every state: one is submitted and copied in the database, whose rows are as wide as real ones."""
    for card in CARDS:
        host = card.partition(":")[0]
        store.cards.see(
            NodeState(node=card, host=host, gpu=card, device_name="a card", kind="nvml", total=80 * GIB, max_jobs=4)
        )
    spec = JobSpec.model_validate(
        {"name": "job-0", "base_model": "org/model", "dataset": {"path": "org/data"}, "labels": {"team": "nlp"}}
    )
    need = Need(lora=18 * GIB, qlora=9 * GIB)
    methods = permitted_methods(spec.method)
    plan = MemoryPlan(need=need, planned=need)
    first = store.jobs.submit(Submission(spec=spec, user="ada", data={}, plan=plan, methods=methods))
    names = " ".join(f"WHEN {n} THEN '{user}'" for n, user in enumerate(USERS))
    cards = " ".join(f"WHEN {n} THEN '{card}'" for n, card in enumerate(CARDS))
    running, waiting = min(64, jobs // 4), max(5, jobs // 50)
    at = store.now() - dt.timedelta(hours=5)
    values: dict[str, object] = {"first": first, "ended": jobs - running - waiting, "at": at}
    values |= {"last": jobs - waiting, "kept": 18 * GIB}
    if engine.dialect.name == "sqlite":
        values["at"] = str(values["at"])[:26]
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL statement_timeout = 0"))
        columns = [c for c in connection.execute(text("SELECT * FROM jobs")).keys() if c != "job_id"]  # noqa: SIM118
        listed = ", ".join(f'"{name}"' for name in columns)
        for start in range(0, jobs - 1, 500):
            series = SERIES.format(count=min(500, jobs - 1 - start))
            copied = f"INSERT INTO jobs ({listed}) {series} SELECT {listed} FROM jobs, n WHERE job_id = :first"
            connection.execute(text(copied), values)
        for statement in FILLED:
            past = PAST[engine.dialect.name]
            filled = statement.format(
                names=names, cards=cards, users=len(USERS), count=len(CARDS), steps=STEPS, past=past
            )
            connection.execute(text(filled), values)
    if engine.dialect.name == "postgresql":  # as autovacuum leaves it: the updates above have written each row again
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SET statement_timeout = 0"))
            connection.execute(text("VACUUM FULL"))
            connection.execute(text("VACUUM ANALYZE"))


SERIES = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})"
PAST = {  # the jobs of a hundred days
    "sqlite": "strftime('%Y-%m-%d %H\\:%M\\:%f000', :at, '-' || (job_id % 100) || ' days')",
    "postgresql": ":at - (job_id % 100) * interval '1 day'",
}
STEPS = SERIES.format(count=300)
FILLED = (
    """UPDATE jobs SET "user" = CASE job_id % {users} {names} END, name = 'job-' || (job_id % 500)""",
    """UPDATE jobs SET queue_key = replace(queue_key, '|ada', '|' || "user")""",
    """UPDATE jobs SET status = CASE WHEN job_id % 200 = 7 THEN 'failed' ELSE 'succeeded' END,
        reason = CASE WHEN job_id % 200 = 7 THEN 'bad_data' ELSE 'ok' END, message = 'better, loss 4.49 -> 0.25',
        started_at = {past}, ended_at = {past}, attempt = 1, method = 'lora', node = 'heron:0', loss = 0.5
        WHERE job_id <= :ended""",
    """UPDATE jobs SET "user" = 'rosa' WHERE job_id IN (3, 57, 1207)""",
    """UPDATE jobs SET labels = '{{"team": "vision"}}' WHERE job_id % 1000 = 11""",
    """DELETE FROM job_labels""",
    """INSERT INTO job_labels (job_id, key, value)
        SELECT job_id, 'team', CASE WHEN job_id % 1000 = 11 THEN 'vision' ELSE 'nlp' END FROM jobs""",
    """UPDATE jobs SET sweep_id = job_id / 200 + 1 WHERE job_id % 200 < 100""",
    """INSERT INTO sweeps (sweep_id, name, "user", settings, created_at)
        SELECT sweep_id, 'sweep-' || sweep_id, 'wei', '{{"varied": {{"lora.r": "8,16"}}}}', min(submitted_at)
        FROM jobs WHERE sweep_id IS NOT NULL GROUP BY sweep_id""",
    """INSERT INTO metrics (job_id, attempt, step, name, value)
        {steps} SELECT job_id, 1, i * 10, 'eval_loss', 2.0 / i FROM jobs, n
        WHERE sweep_id > (SELECT max(sweep_id) - 10 FROM jobs) AND i <= 30""",
    """INSERT INTO metrics (job_id, attempt, step, name, value)
        {steps} SELECT job_id, 1, i * 3, 'loss', 2.0 / i FROM jobs, n
        WHERE sweep_id > (SELECT max(sweep_id) - 30 FROM jobs) AND status = 'succeeded' AND i <= 100""",
    """INSERT INTO metrics (job_id, attempt, step, name, value)
        SELECT job_id, 1, 900, 'held_out_loss', 0.5 FROM jobs WHERE sweep_id IS NOT NULL AND status = 'succeeded'""",
    """INSERT INTO outbox (message_id, event, channel, "user", job_id, kind, subject, text, at, due_at, tries,
        settled_at, outcome) SELECT 'msg_' || job_id, 'job:' || job_id, 'ops', 'ada', job_id, 'job.failed', 'x', 'x',
        {past}, {past}, 1, {past}, 'sent' FROM jobs WHERE status = 'failed'""",
    """INSERT INTO attempts
        (job_id, attempt, token, node, gpu, method, vram_planned, vram_process, started_at, ended_at, reason)
        SELECT job_id, 1, 'x', node, 'x', 'lora', 1, 1, started_at, ended_at, reason FROM jobs
        WHERE job_id <= :ended""",
    """INSERT INTO adapters (job_id, attempt, name, base_model, method, uri, size, sha256, created_at)
        SELECT job_id, 1, name, base_model, 'lora', 'file:///a', 1000, 'x', ended_at FROM jobs
        WHERE job_id <= :ended AND status = 'succeeded'""",
    """UPDATE jobs SET status = 'running', stage = 'training', attempt = 1, method = 'lora', step = 300, loss = 0.7,
        node = CASE job_id % {count} {cards} END, vram_reserved = :kept, total_steps = 900, started_at = submitted_at,
        eta_seconds = 600 WHERE job_id > :ended AND job_id <= :last""",
    """INSERT INTO metrics (job_id, attempt, step, name, value)
        {steps} SELECT job_id, 1, i, 'loss', 2.0 / i FROM jobs, n WHERE status = 'running'""",
)


if __name__ == "__main__":
    main()
