"""The lab's numbers in the text form of Prometheus: read at one moment, and bounded for any number of jobs.

Labels name a job by job_id: a label `job` is Prometheus' own.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from loractl import __version__
from loractl.common.errors import LoractlError
from loractl.common.job.status import BLAMED, Reason
from loractl.common.store.database import REFUSALS
from loractl.common.store.fleet import FleetView
from loractl.common.store.store import Store
from loractl.common.store.tables import Attempt, peak_of
from loractl.scheduler.fleet.answer import DeviceState, Fleet, fleet_of

MOST_RUNNING = 1000
"""Running jobs with their own numbers."""

SETTLED_S = 5.0
"""A transaction commits at most this long after the time that it wrote; younger runs are read next time."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FRESH_S = 5.0
"""Two scrapes within it read the database once."""

WAIT_BUCKETS = (1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 12 * 3600.0, 86400.0, 3 * 86400.0)
RATIO_BUCKETS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0)


class Tally:
    """What is counted since this server started: attempts by outcome and by card, waits, and the accuracy of plans."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter({str(reason): 0 for reason in Reason})
        self.card_failures: Counter[tuple[str, str]] = Counter()
        self.waits = Buckets(WAIT_BUCKETS)
        self.ratios = Buckets(RATIO_BUCKETS)

    def add(self, runs: Iterable[tuple[Attempt, dt.datetime]], since: dt.datetime, until: dt.datetime) -> None:
        """Count those that began or ended after `since`, up to `until`."""
        for run, waits_from in runs:
            if run.attempt == 1 and since < run.started_at <= until:
                self.waits.add(max(0.0, (run.started_at - waits_from).total_seconds()))
            if run.ended_at is None or not since < run.ended_at <= until:
                continue
            self.outcomes[str(run.reason or "unknown")] += 1
            if run.reason in BLAMED:
                self.card_failures[run.node, str(run.reason)] += 1
            peak = peak_of(run)
            if run.vram_planned and peak and run.device_kind == "nvml" and run.reason == Reason.OK:
                self.ratios.add(peak / run.vram_planned)


class Buckets:
    """A histogram's counts."""

    def __init__(self, ends: Sequence[float]) -> None:
        self._ends = ends
        self._counts = [0] * (len(ends) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[next((n for n, end in enumerate(self._ends) if value <= end), len(self._ends))] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper end, how many are no larger), as in Prometheus."""
        ends = [*(f"{end:g}" for end in self._ends), "+Inf"]
        return [(end, float(sum(self._counts[: n + 1]))) for n, end in enumerate(ends)]


class Exporter(Collector):
    """Reads the lab on request, and writes its numbers. Ended jobs have no series of their own."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tally = Tally()
        self._counted_until: dt.datetime | None = None
        self._lock = threading.Lock()
        self._text: tuple[float, bytes] = (-FRESH_S, b"")
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """The numbers as they are now, or were a moment ago."""
        with self._lock:
            if time.monotonic() - self._text[0] >= FRESH_S:
                self._text = time.monotonic(), generate_latest(self._registry)
            return self._text[1]

    def collect(self) -> Iterable[Metric]:
        """The metrics. Without a database, only that it is down, and what was counted before."""
        started = time.monotonic()
        what = "The version of this server"
        families: list[Metric] = [InfoMetricFamily("loractl_build", what, {"version": __version__})]
        try:
            view, store = self._store.cards.fleet(), self._store
            since = self._counted_until or view.now
            until = max(since, store.now() - dt.timedelta(seconds=SETTLED_S))
            self._tally.add(store.attempts.runs(since, until), since, until)
            self._counted_until = until
            lab = (*_jobs(store), *_cards(fleet_of(view)), *_running(view), *_notifications(store), _usage(store))
            families += lab
            up = 1
        except (*REFUSALS, LoractlError):
            up = 0
        away = "Whether the database answered: 1, or 0"
        families.append(_gauge("loractl_database_up", away, [({}, up)]))
        families += [*_counted(self._tally)]
        took = "Seconds that reading these numbers took"
        families.append(_gauge("loractl_scrape_duration_seconds", took, [({}, time.monotonic() - started)]))
        return families

    def describe(self) -> Iterable[Metric]:
        """None in advance: nothing is read when the exporter is created."""
        return []


def _gauge(name: str, what: str, samples: Iterable[tuple[dict[str, str], float]]) -> Metric:
    family = GaugeMetricFamily(name, what)
    for labels, value in samples:
        family.add_sample(name, labels, value)
    return family


def _moment(name: str, what: str, at: dt.datetime | None) -> Metric:
    return _gauge(name, what, [] if at is None else [({}, at.timestamp())])


def _counter(name: str, what: str, labels: Sequence[str], counts: Iterable[tuple[Sequence[str], float]]) -> Metric:
    family = CounterMetricFamily(name, what, labels=labels)
    for values, count in counts:
        family.add_metric(values, count)
    return family


def _jobs(store: Store) -> Iterator[Metric]:
    known = store.jobs.counts().items()
    counts = [({"state": state.value, "reason": why}, float(many)) for (state, why), many in known]
    what = "Jobs by state; reason: why one ended, the stage of a running one, held, retry or ready of a waiting one"
    yield _gauge("loractl_jobs", what, counts)
    what = "When the oldest job that could start now was submitted; absent if none waits"
    yield _moment("loractl_oldest_ready_job_timestamp_seconds", what, store.jobs.oldest_ready())


def _cards(fleet: Fleet) -> Iterator[Metric]:
    devices = [(device, {"host": device.row.host, "card": device.row.node}) for device in fleet.devices]
    what = "Bytes of each card by use: jobs, outside, margin, free; together they are the card"
    yield _gauge(
        "loractl_card_bytes",
        what,
        [(on | {"use": use}, size) for d, on in devices for use, size in card_uses(d).items()],
    )
    opened = [(labels, float(device.card.open)) for device, labels in devices]
    yield _gauge("loractl_card_open", "Whether the card takes jobs: 1, or 0", opened)
    drained = [(labels, float(device.closed_by is not None)) for device, labels in devices]
    yield _gauge("loractl_card_drained", "Whether the card is drained: 1, or 0", drained)
    seen = [(labels, device.row.seen_at.timestamp()) for device, labels in devices]
    yield _gauge("loractl_card_seen_timestamp_seconds", "When the card's worker last wrote its row", seen)
    what = "When a worker last ran the fleet's round, which ends leases"
    yield _moment("loractl_fleet_round_timestamp_seconds", what, fleet.round_at)
    load = [(labels, device.row.load / 100) for device, labels in devices if device.row.load is not None]
    yield _gauge("loractl_card_load_ratio", "How busy the card is, 0 to 1", load)
    warm = [(labels, float(d.row.temperature)) for d, labels in devices if d.row.temperature is not None]
    yield _gauge("loractl_card_temperature_celsius", "The card's temperature", warm)
    failures = [(on | {"reason": why}, float(n)) for d, on in devices for why, n in d.failures.items()]
    what = "Attempts that the lab failed on the card since one ended well, at most a day old"
    yield _gauge("loractl_card_recent_failures", what, failures)


def card_uses(device: DeviceState) -> dict[str, float]:
    """Bytes of a card by use; they always add up to the card, whatever the parts claim."""
    card = device.card
    left = card.total
    uses: dict[str, float] = {}
    for name, size in (("jobs", card.taken), ("outside", card.outside), ("margin", card.margin)):
        uses[name] = float(min(left, max(0, size)))
        left -= int(uses[name])
    return {**uses, "free": float(left)}


def _usage(store: Store) -> Metric:
    what = "Hours of whole cards that each user's ended attempts had"
    used = [((user,), hours) for user, hours in store.usage.card_hours().items()]
    return _counter("loractl_card_hours", what, ["user"], used)


def _running(view: FleetView) -> Iterator[Metric]:
    shown = list(view.running.values())[:MOST_RUNNING]
    jobs = [(job, {"job_id": str(job.job_id), "card": job.node or ""}) for job in shown]
    progress = [(on, job.step / job.total_steps) for job, on in jobs if job.step is not None and job.total_steps]
    what = "How far a running job is, 0 to 1; one series a job, with its first card if it has several"
    yield _gauge("loractl_job_progress_ratio", what, progress)
    leases = [(on, job.lease_expires_at.timestamp()) for job, on in jobs if job.lease_expires_at is not None]
    what = "When a running job's lease ends unless its worker says something before; one series a job, as its progress"
    yield _gauge("loractl_job_lease_end_timestamp_seconds", what, leases)
    known = {job.job_id for job in shown}
    parts = [
        ({"job_id": str(occupant.job_id), "host": card.host, "card": card.node}, float(occupant.reserved))
        for card in view.cards.values()
        for occupant in card.running
        if occupant.job_id in known
    ]
    what = "Bytes that a running job's plan reserves of a card; one series for each card of a job on several"
    yield _gauge("loractl_job_reserved_bytes", what, parts)


def _notifications(store: Store) -> Iterator[Metric]:
    traffic = store.outbox.traffic()
    states = [
        ({"channel": each.channel, "state": state}, float(count))
        for each in traffic
        for state, count in (("waiting", each.waiting), ("sent", each.sent), ("given_up", each.given_up))
    ]
    yield _gauge("loractl_notifications", "Messages that are due now, and those sent or given up within a day", states)
    oldest = [({"channel": each.channel}, each.oldest.timestamp()) for each in traffic if each.oldest]
    what = "When the oldest message that waits was written; absent if none waits"
    yield _gauge("loractl_oldest_notification_timestamp_seconds", what, oldest)


def _counted(tally: Tally) -> Iterator[Metric]:
    since = "since this server began"
    ended = [((reason,), count) for reason, count in sorted(tally.outcomes.items())]
    yield _counter("loractl_attempts", f"Attempts that ended {since}, by reason", ["reason"], ended)
    what = f"Attempts that ended {since} for a reason that blames the card or its box, or what the box has of the base"
    blamed = sorted(tally.card_failures.items())
    failed = [((node.rpartition(":")[0], node, reason), count) for (node, reason), count in blamed]
    yield _counter("loractl_card_failures", what, ["host", "card", "reason"], failed)
    yield _histogram(
        "loractl_queue_wait_seconds", f"From submission to the first start, of jobs that started {since}", tally.waits
    )
    what = f"Measured peak over planned bytes, of attempts on GPUs that ended well {since}"
    yield _histogram("loractl_plan_measured_ratio", what, tally.ratios)


def _histogram(name: str, what: str, buckets: Buckets) -> Metric:
    family = HistogramMetricFamily(name, what)
    family.add_metric([], buckets=buckets.cumulative(), sum_value=buckets.total)
    return family
