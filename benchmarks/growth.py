"""How much a job that has ended takes in the database, on SQLite (a file) and on PostgreSQL.

    .venv/bin/python -m benchmarks.growth [jobs]

Prints KB a job: the rows of a job with one attempt and its history, then what 100 values of single steps add, which
a run of 300 steps logs, and what 20 KB of log lines add, which gc takes.
"""

from __future__ import annotations

import sys

from sqlalchemy import Engine, text

from loractl.common.job.method import Method, Need
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason, Stage
from loractl.common.memory.fit import MemoryPlan
from loractl.common.store.records import Claim, NodeState, Progress, StoredResult, Submission
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.units import GIB

from .claim import postgresql, sqlite

JOBS = 200
NOTES = ("data: 900 rows, 100 held out", "base: org/model, 135 M parameters", "result stored and read back")
POINTS = tuple((step, name, 1.25) for step in range(10, 301, 10) for name in ("loss", "learning_rate", "grad_norm"))
FORMS = {
    "the job's own rows": Progress(),
    "100 values of steps": Progress(metrics=(*POINTS, *((step, "eval_loss", 1.5) for step in range(30, 301, 30)))),
    "20 KB of log": Progress(log="a line of the log, as long as such lines are\n" * 450),
}


def main() -> None:
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else JOBS
    for name, opened in (("SQLite", sqlite), ("PostgreSQL", postgresql)):
        own = 0.0
        for what, progress in FORMS.items():
            with opened() as engine:
                each = measure(engine, jobs, progress) / 1000
            own = own or each
            print(
                f"{name:<12}{what:<22}{each if progress is FORMS[next(iter(FORMS))] else each - own:>7.1f} KB",
                flush=True,
            )


def measure(engine: Engine, jobs: int, progress: Progress) -> float:
    """Bytes that a job adds."""
    upgrade(engine)
    store = Store(engine)
    store.cards.see(NodeState(node="a:0", host="a", gpu="GPU", device_name="a card", kind="nvml", total=80 * GIB))
    _run(store, progress)
    before = _size(engine)
    for _ in range(jobs):
        _run(store, progress)
    return (_size(engine) - before) / jobs


def _run(store: Store, progress: Progress) -> None:
    spec = JobSpec.model_validate({"name": "bench", "base_model": "org/model", "dataset": {"path": "org/data"}})
    need = Need(lora=4 * GIB, qlora=2 * GIB)
    plan = MemoryPlan(need=need, planned=need)
    store.jobs.submit(Submission(spec=spec, user="ada", data={}, plan=plan, methods=(Method.LORA, Method.QLORA)))
    claim = store.attempts.claim("a:0")
    assert isinstance(claim, Claim)
    for stage in Stage:
        store.attempts.beat(claim, Progress(stage=stage, events=tuple(("note", note) for note in NOTES)))
    store.attempts.beat(claim, progress)
    stored = StoredResult(
        adapter_uri="s3://a", report_uri="s3://r", adapter_size=10**6, adapter_sha256="0" * 64, manifest_sha256="1" * 64
    )
    store.attempts.finish(claim, Reason.OK, "better, loss 4.49 -> 0.76", Progress(), stored)


def _size(engine: Engine) -> int:
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            pages = connection.scalar(
                text("SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()")
            )
            return int(pages or 0)
        return int(connection.scalar(text("SELECT pg_database_size(current_database())")) or 0)


if __name__ == "__main__":
    main()
