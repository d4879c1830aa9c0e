"""Traces of jobs for a replay: read from a file, as a replay wants them, and how busy they keep a fleet."""

from __future__ import annotations

import csv
import datetime as dt
import enum
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loractl.common.job.method import Method, Need
from loractl.common.placement.cards import Card, default_max_jobs
from loractl.common.placement.duration import UNKNOWN_S
from loractl.common.placement.lines import Waiting
from loractl.common.placement.replay import ReplayedJob
from loractl.common.units import GIB, parse_duration, parse_size

BEGIN = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)
"""When a trace begins; only distances from it count."""

OPENB_CARD_BYTES = 24 * GIB
"""openb's pods ask for thousandths of a card without its memory size. Like its README, we assume a 24 GB card."""

PREPARE_S = 0.6
"""Seconds from the claim to the first step besides the base: messages, data and adapter. Measured with SmolLM2-135M and
90 short rows on a two-core machine."""

LOAD_BYTES_S = 0.28 * GIB
"""Bytes of a base that are read, checked and placed per second. Chosen, not measured on a card."""


@dataclass(frozen=True, kw_only=True)
class TraceJob:
    """A job of a trace. Seconds and bytes."""

    arrival: float
    need: int
    seconds: float
    user: str
    priority: int = 0
    base_size: int = 0  # bytes that the loaded base takes of its need; 0: unknown, it starts at once


def read_trace(path: Path) -> list[TraceJob]:
    """Read our own columns or openb's list of pods, in order of arrival. Raises ValueError with the bad line."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header, rows = {*(reader.fieldnames or ())}, [(reader.line_num, row) for row in reader]
    if header >= {"arrival", "vram", "duration", "user"}:
        read = _own_job
    elif header >= {"num_gpu", "gpu_milli", "qos", "creation_time", "scheduled_time", "deletion_time"}:
        # a pod with a part of one card that was started and has ended
        rows = [(line, row) for line, row in rows
                if row["num_gpu"] == "1" and row["scheduled_time"] and row["deletion_time"]]  # fmt: skip
        read = _pod
    else:
        raise ValueError(f"{path}:1: the first line is arrival,vram,duration,user, or that of openb's list of pods")
    jobs = []
    for line, row in rows:
        try:
            job = read(row)
            if not (job.need > job.base_size >= 0 and 0 <= job.seconds < math.inf and abs(job.arrival) < math.inf):
                raise ValueError("its size, its base's size or its times make no job")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{line}: {error}") from error
        jobs.append(job)
    return sorted(jobs, key=lambda job: job.arrival)


def _own_job(row: Mapping[str, str]) -> TraceJob:
    return TraceJob(
        arrival=parse_duration(row["arrival"]),
        need=parse_size(row["vram"]),
        seconds=parse_duration(row["duration"]),
        user=row["user"].strip(),
        priority=int(row.get("priority") or 0),
        base_size=parse_size(row["base_size"]) if row.get("base_size") else 0,
    )


def _pod(row: Mapping[str, str]) -> TraceJob:
    return TraceJob(
        arrival=float(row["creation_time"]),
        need=int(float(row["gpu_milli"]) / 1000 * OPENB_CARD_BYTES),
        seconds=float(row["deletion_time"]) - float(row["scheduled_time"]),
        user=row["qos"],
    )


class Predictions(enum.Enum):
    """What our rule is told of each job's duration before it starts."""

    EXACT = "exact"
    NOISY = "noisy"  # off by a factor of e at one sigma
    ABSENT = "absent"

    def of(self, jobs: Sequence[TraceJob]) -> list[float]:
        """Seconds; equal in every run."""
        rng = random.Random(1)
        match self:
            case Predictions.EXACT:
                return [job.seconds for job in jobs]
            case Predictions.NOISY:
                return [job.seconds * rng.lognormvariate(0, 1) for job in jobs]
            case Predictions.ABSENT:
                return [UNKNOWN_S for _ in jobs]


def to_replay(
    jobs: Sequence[TraceJob], compress: float, *, predictions: Predictions = Predictions.NOISY
) -> list[ReplayedJob]:
    """The jobs for a replay from BEGIN on, their arrivals `compress` times as close, numbered by arrival."""
    first = min((job.arrival for job in jobs), default=0.0)
    return [
        ReplayedJob(
            waiting=Waiting(
                job_id=number,
                user=job.user,
                priority=job.priority,
                since=BEGIN + dt.timedelta(seconds=(job.arrival - first) / compress),
                methods=(Method.LORA,),  # a trace has one need, for any method
                need=Need(lora=job.need, qlora=None),
                left_s=left_s,
            ),
            seconds=job.seconds,
            start_s=PREPARE_S + job.base_size / LOAD_BYTES_S if job.base_size else 0.0,
        )
        for number, (job, left_s) in enumerate(zip(jobs, predictions.of(jobs), strict=True), start=1)
    ]


def parse_fleet(text: str) -> list[Card]:
    """Cards of "2x12GiB,80GiB"; they are named by number and size."""
    sizes = []
    for part in text.split(","):
        count, size = re.fullmatch(r"\s*(?:(\d{1,4})\s*x\s*)?(.+?)\s*", part).groups()  # type: ignore[union-attr]
        sizes += [parse_size(size)] * int(count or 1)
    return [
        Card(node=f"sim:{number}", total=size, max_jobs=default_max_jobs(size)) for number, size in enumerate(sizes)
    ]


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


RATED = 20
"""From this number of jobs on, the middle nine tenths leave some out, and arrivals have a rate."""


def load_of(jobs: Sequence[ReplayedJob], cards: Sequence[Card]) -> float | None:
    """How busy the jobs would keep the cards if each were alone on one; above 1, whole cards can't keep up. None for a
    few jobs: the minutes in which they happen to arrive give no rate.

    Measured over the middle nine tenths of arrivals, which leaves out a trace's long ends. The scarcest cards decide:
    all of them, or those that hold the larger jobs.
    """
    if len(jobs) < RATED:
        return None
    middle = jobs[len(jobs) // RATED : len(jobs) - len(jobs) // RATED]
    span = (middle[-1].waiting.since - middle[0].waiting.since).total_seconds()
    if not span:
        return math.inf
    shares = []
    for below in {0, *(card.capacity for card in cards)}:
        work = sum(job.seconds or 0.0 for job in middle if (job.waiting.least or 0) > below)
        if work:
            shares.append(work / span / sum(card.capacity > below for card in cards))
    return max(shares, default=0.0)
