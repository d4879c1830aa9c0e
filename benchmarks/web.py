"""How long a page of loractl web takes with 100, 10,000 and 100,000 jobs, on SQLite (a file) and on PostgreSQL.

    .venv/bin/python -m benchmarks.web [jobs ...]

Prints for each page of five looks the median and the worst in milliseconds, the median of the processor time that the
server itself took (on a busy machine the others tell of its other work), and the page's size before gzip. One in
50 of the jobs waits, and 64 run on 16 cards of four boxes; half a percent has failed. The pages are drawn anew for each
look: what is kept for a moment for all who look is not used.
"""

from __future__ import annotations

import datetime as dt
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from loractl.common.artifacts import ArtifactStore
from loractl.common.job.need import Need, permitted_methods
from loractl.common.job.spec import JobSpec
from loractl.common.store.records import NodeState, Submission
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.answers.lab.shelf import ReportShelf
from loractl.scheduler.web import metrics, site
from loractl.scheduler.web.access import Access
from loractl.scheduler.web.site import make_site

from .claim import postgresql, sqlite

LOOKS = 5
SIZES = (100, 10_000, 100_000)
USERS = ("ada", "mara", "wei", "priya", "lena", "jonas")
CARDS = tuple(f"{host}:{n}" for host in ("heron", "osprey", "kestrel", "egret") for n in range(4))


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or list(SIZES)
    site.FRESH_S = metrics.FRESH_S = -1.0
    print(f"{'':<12}{'jobs':>8}  {'page':<26}{'median ms':>10}{'worst ms':>10}{'CPU ms':>8}{'KB':>7}")
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
    running = store.fleet().running
    pages = {
        "lab": "/", "lab, one owner": "/?user=ada",
        "jobs": "/jobs", "jobs, far back": f"/jobs?after={max(2, jobs // 2)}", "jobs, failed": "/jobs?status=failed",
        "jobs of a user": "/jobs?user=wei", "jobs of a name": "/jobs?name=job-7", "jobs of nobody": "/jobs?name=nobody",
        "jobs with a label": "/jobs?label=team=nlp", "a running job": f"/jobs/{min(running)}", "sweeps": "/sweeps",
        "adapters": "/adapters", "metrics": "/metrics",
    }  # fmt: skip
    for what, address in pages.items():
        took, busy, size = timed(lambda address=address: client.get(address).content)  # type: ignore[misc]
        print(
            f"{database:<12}{jobs:>8}  {what:<26}{statistics.median(took):>10.0f}{max(took):>10.0f}"
            f"{statistics.median(busy):>8.0f}{size / 1000:>7.1f}",
            flush=True,
        )


def timed(look: Callable[[], bytes]) -> tuple[list[float], list[float], int]:
    """Milliseconds of each look after the first, those of the processor, and the bytes of the page before gzip."""
    size = len(look())
    took, busy = [], []
    for _ in range(LOOKS):
        start, began = time.perf_counter(), time.process_time()
        look()
        took.append(1000 * (time.perf_counter() - start))
        busy.append(1000 * (time.process_time() - began))
    return took, busy, size


def fill(store: Store, engine: Engine, jobs: int) -> None:
    """Jobs in every state: one is submitted and copied in the database, whose rows are as wide as real ones."""
    for card in CARDS:
        host = card.partition(":")[0]
        store.see_node(
            NodeState(node=card, host=host, gpu=card, device_name="a card", kind="nvml", total=80 * GIB, max_jobs=4)
        )
    spec = JobSpec.model_validate(
        {"name": "job-0", "base_model": "org/model", "dataset": {"path": "org/data"}, "labels": {"team": "nlp"}}
    )
    need = Need(lora=18 * GIB, qlora=9 * GIB)
    methods = permitted_methods(spec.method)
    first = store.submit(Submission(spec=spec, user="ada", data={}, need=need, planned=need, methods=methods))
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
    if engine.dialect.name == "postgresql":  # as autovacuum leaves it: the updates above have written each row anew
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SET statement_timeout = 0"))
            connection.execute(text("VACUUM FULL"))
            connection.execute(text("VACUUM ANALYZE"))


SERIES = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})"
PAST = {  # the jobs of a hundred days
    "sqlite": "strftime('%Y-%m-%d %H\\:%M\\:%f', :at, '-' || (job_id % 100) || ' days')",
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
