"""What a month of a busy lab's usage costs to read, and what quotas cost a claim, on SQLite (a file) and PostgreSQL.

    .venv/bin/python -m benchmarks.usage [attempts] [waiting]

The month has this many attempts of 12 users on six cards. Prints how long the transaction of an end takes to add one up
(of the first thousand), how long `usage` reads all by each group, and the largest difference from sums by hand. Then
claims by turns with no quota, with one for each user, and with half of them used up, while jobs wait; p50 of a claim.
"""

from __future__ import annotations

import datetime as dt
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, delete, insert, text

from loractl.common.job.status import Reason, Status
from loractl.common.placement.card_hours import by_hour
from loractl.common.placement.gangs import GangShare
from loractl.common.store.queries.usage import SUMS, label_set, record
from loractl.common.store.records import Claim, NodeState
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.store.tables import Job, LabelSet, Quota, Usage
from loractl.common.units import GIB
from loractl.scheduler.usage.answer import GROUPS, usage_table

from .claim import CARDS, MIXES, fill, give_back, postgresql, sqlite

ATTEMPTS, WAITING, CLAIMS, USERS, ONE_BY_ONE = 100_000, 100_000, 40, 12, 1000
MONTH_S = 30 * 86400.0


@dataclass(frozen=True, kw_only=True)
class Made:
    """An attempt that never was."""

    user: str
    card: int
    gib: int
    labels: dict[str, str]
    start: dt.datetime
    end: dt.datetime

    @property
    def card_hours(self) -> float:
        return (self.end - self.start).total_seconds() / 3600 * self.gib / CARDS[self.card]


def main() -> None:
    attempts, waiting = (int(word) for word in (*sys.argv[1:3], *map(str, (ATTEMPTS, WAITING)[len(sys.argv[1:3]) :])))
    for name, opened in (("SQLite", sqlite), ("PostgreSQL", postgresql)):
        with opened() as engine:
            store = prepared(engine)
            _usage(name, store, attempts)
            _claims(name, engine, store, waiting)


def prepared(engine: Engine) -> Store:
    """A lab with six cards. Only the last one is free."""
    upgrade(engine)
    store = Store(engine)
    see_cards(store)
    return store


def see_cards(store: Store) -> None:
    for number, gib in enumerate(CARDS):
        free = number == len(CARDS) - 1
        state = NodeState(
            node=f"box:{number}", host="box", gpu=f"GPU-{number}", device_name="a card", kind="nvml", total=gib * GIB,
            outside_bytes=0 if free else gib * GIB, max_jobs=4,
        )  # fmt: skip
        store.cards.see(state)


def made(count: int, now: dt.datetime) -> list[Made]:
    """A month of attempts of minutes to two days."""
    rng, found = random.Random(7), []
    for _ in range(count):
        card, length = rng.randrange(len(CARDS)), min(2 * 86400.0, 60 * 10 ** rng.uniform(0, 2.5))
        start = now - dt.timedelta(seconds=rng.uniform(length, MONTH_S))
        labels = {"team": f"team{rng.randrange(4)}"} if rng.random() < 0.7 else {}
        found.append(
            Made(
                user=f"user{rng.randrange(USERS)}", card=card, gib=rng.randint(1, CARDS[card]), labels=labels,
                start=start, end=start + dt.timedelta(seconds=length),
            )
        )  # fmt: skip
    return found


def _usage(name: str, store: Store, attempts: int) -> None:
    now = store.now()
    month, began = made(attempts, now), time.perf_counter()
    with store.begin(read_only=False) as tx:
        for one in month[:ONE_BY_ONE]:
            job = Job(job_id=0, user=one.user, labels=one.labels, status=Status.SUCCEEDED, reason=Reason.OK, attempt=1)
            record(tx, job, [GangShare(node=f"box:{one.card}", bytes=int(one.gib * GIB))], one.start, one.end)
    each = (time.perf_counter() - began) / min(attempts, ONE_BY_ONE) * 1000
    print(f"{name:<12}{attempts} attempts, {each:.2f} ms for the sums of one")
    _write_all(store, month)
    by_hand: dict[str, float] = defaultdict(float)
    for one in month:
        by_hand[one.user] += one.card_hours
    for by in GROUPS:
        began = time.perf_counter()
        table = usage_table(store, by, now - dt.timedelta(days=32))
        took = (time.perf_counter() - began) * 1000
        wrong = max(abs(row.card_hours - by_hand[row.name]) for row in table.rows) if by == "user" else None
        apart = "" if wrong is None else f", at most {wrong:.1e} of {sum(by_hand.values()):.0f} h from the sums by hand"
        print(f"{name:<12}by {by:<8}{took:>8.0f} ms{apart}", flush=True)


def _write_all(store: Store, month: Sequence[Made]) -> None:
    """The same sums of the whole month at once: one by one they take minutes."""
    sums: dict[tuple[dt.datetime, str, str, str], dict[str, float]] = defaultdict(lambda: dict.fromkeys(SUMS, 0.0))
    sets = {label_set(one.labels): one.labels for one in month if one.labels}
    for one in month:
        for hour, hours in by_hour(one.start, one.end):
            row = sums[hour, one.user, f"box:{one.card}", label_set(one.labels)]
            row["card_hours"] += hours * one.gib / CARDS[one.card]
            row["gib_hours"] += hours * one.gib
    names = ("hour", "user", "node", "label_set")
    rows = [{**dict(zip(names, key, strict=True)), **added} for key, added in sums.items()]
    with store.begin(read_only=False) as tx:
        tx.add_new(LabelSet, [{"label_set": key, "labels": labels} for key, labels in sets.items()])
        tx.session.execute(delete(Usage))
        for start in range(0, len(rows), 5000):
            tx.session.execute(insert(Usage), rows[start : start + 5000])
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    print(f"{'':<12}{len(rows)} rows of usage")


def _claims(name: str, engine: Engine, store: Store, waiting: int) -> None:
    fill(engine, MIXES["lab"], waiting, store.now())
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(CLAIMS + 3):
        for kind in ("no quota", "12 quotas", "half used up"):
            _set_quotas(store, kind)
            see_cards(store)
            began = time.perf_counter()
            claim = store.attempts.claim(f"box:{len(CARDS) - 1}")
            if number >= 3:
                times[kind].append((time.perf_counter() - began) * 1000)
            assert isinstance(claim, Claim), claim
            give_back(engine, claim.job_id)
    for kind, taken in times.items():
        print(f"{name:<12}claim, {waiting} jobs wait, {kind:<14}{statistics.median(taken):>8.1f} ms", flush=True)


def _set_quotas(store: Store, kind: str) -> None:
    with store.begin(read_only=False) as tx:
        tx.session.execute(delete(Quota))
    if kind != "no quota":
        for number in range(USERS):
            used_up = kind == "half used up" and number % 2
            store.usage.set_quota(f"user{number}", 0.0 if used_up else 1e6, 7 * 86400, soft=False)


if __name__ == "__main__":
    main()
