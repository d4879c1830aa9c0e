"""How long the answers of commands take where many jobs wait and as many have ended, on SQLite (a file) and PostgreSQL.

    .venv/bin/python -m benchmarks.commands [waiting ...] [--on sqlite]

What `loractl status` and `loractl why` of the first and of a job in the middle ask and draw, the rows of a submit, and
the pages of the lab and of a waiting job, each again and again in this process: without the start of Python, which
every command pays for. 20 people's jobs as in benchmarks.claim; all cards but one are full. Prints the median in
ms, and of it this process's CPU time, which has SQLite's part in it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine, text

from loractl.common.artifacts import ArtifactStore
from loractl.common.job.method import Method, Need
from loractl.common.memory.fit import MemoryPlan
from loractl.common.store.records import Choice, Page, Submission
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.status.overview import overview
from loractl.scheduler.status.overview_text import overview_text
from loractl.scheduler.web.pages.markup import render
from loractl.scheduler.web.pages.pages import Asked, Drawn, Pages
from loractl.scheduler.web.pages.shelf import ReportShelf
from loractl.scheduler.why.answer import why
from loractl.scheduler.why.text import why_text

from .claim import CARDS, DATABASES, MIXES, ROWS, SPEC, card, fill

LOOKS = 15


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("waiting", nargs="*", type=int, default=ROWS)
    parser.add_argument("--on", nargs="+", choices=DATABASES, default=list(DATABASES))
    asked = parser.parse_args()
    print(f"{'':<12}{'waiting':>8}  {'':<24}{'p50 ms':>8}{'CPU ms':>8}")
    for database in asked.on:
        for waiting in asked.waiting:
            with DATABASES[database]() as engine:
                upgrade(engine)
                store = Store(engine)
                fill(engine, MIXES["lab"], waiting, store.now())
                end(engine)
                fill(engine, MIXES["lab"], waiting, store.now())
                for number, gib in enumerate(CARDS):
                    store.cards.see(card(number, gib, outside=0 if number == len(CARDS) - 1 else gib * GIB))
                for what, look in looks(store, waiting).items():
                    wall, own = measure(look)
                    print(f"{database:<12}{waiting:>8}  {what:<24}{wall:>8.1f}{own:>8.1f}", flush=True)


def looks(store: Store, waiting: int) -> dict[str, Callable[[], object]]:
    screen, first = Screen(width=120, unicode=True, color=False), waiting + 1
    shelf = ReportShelf(store, lambda: ArtifactStore(Path(tempfile.mkdtemp()).as_uri()))
    pages = Pages(store, shelf)
    need = Need(lora=8 * GIB, qlora=4 * GIB)
    plan = MemoryPlan(need=need, planned=need)
    job = Submission(spec=SPEC, user="user3", data={}, plan=plan, methods=(Method.LORA, Method.QLORA))
    return {
        "status": lambda: overview_text(overview(store, Choice(), Page()), screen),
        "why, the first": lambda: why_text(why(store, first), screen),
        "why, in the middle": lambda: why_text(why(store, first + waiting // 2), screen),
        "submit": lambda: store.jobs.submit(job),
        "the page": lambda: drawn(pages.lab(Asked({}))),
        "a waiting job's page": lambda: drawn(pages.job(Asked({}), first + waiting // 2)),
    }


def drawn(page: Drawn) -> str:
    return str(render(page.template, **page.values))


def measure(look: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds, and of them this thread's CPU time."""
    look()
    walls, owns = [], []
    for _ in range(LOOKS):
        began, worked = time.perf_counter(), time.thread_time()
        look()
        walls.append((time.perf_counter() - began) * 1000)
        owns.append((time.thread_time() - worked) * 1000)
    return statistics.median(walls), statistics.median(owns)


def end(engine: Engine) -> None:
    """Let all that waits have ended, after an attempt each."""
    values = (
        "status = 'succeeded', reason = 'ok', ended_at = submitted_at, started_at = submitted_at, attempt = 1,"
        " method = 'lora', node = 'box:0', message = 'better'"
    )
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text(f"UPDATE jobs SET {values}"))
        columns = "job_id, attempt, token, node, gpu, method, device_name, started_at, ended_at, reason"
        attempts = "job_id, 1, '', node, 'GPU-0', method, 'a card', started_at, ended_at, reason"
        connection.execute(text(f"INSERT INTO attempts ({columns}) SELECT {attempts} FROM jobs"))


if __name__ == "__main__":
    main()
