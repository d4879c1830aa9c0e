"""Workloads: the jobs of a trace and the cards of a fleet, parsed from text."""

from __future__ import annotations

import csv
import datetime as dt
import enum
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loractl.common.errors import DataError, UsageError
from loractl.common.job.method import Method, Need
from loractl.common.placement.cards import Card, default_max_jobs, largest_gpu
from loractl.common.placement.duration import UNKNOWN_S
from loractl.common.placement.lines import Waiting
from loractl.common.placement.replay import Presence, ReplayedJob
from loractl.common.units import GIB, duration, parse_duration, parse_size

from .assumptions import SAVE_S, forms_of, start_s

BEGIN = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)
"""When a trace begins; only distances from it count."""

OWN_COLUMNS = frozenset({"arrival", "vram", "duration", "user"})
OPENB_COLUMNS = frozenset({"num_gpu", "gpu_milli", "qos", "creation_time", "scheduled_time", "deletion_time"})
OPENB_CARD_BYTES = 24 * GIB
"""openb's pods ask for thousandths of a card without its memory size. Like its README, we assume a 24 GB card."""

_LARGEST = 2**63


@dataclass(frozen=True, kw_only=True)
class TraceJob:
    """A job of a trace. Seconds and bytes."""

    arrival: float
    need: int
    seconds: float
    user: str
    priority: int = 0
    base_size: int = 0  # bytes that the loaded base takes of its need; 0: unknown, it starts at once


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The jobs of a trace in order of arrival, and what else its file says."""

    jobs: tuple[TraceJob, ...]
    left_out: int = 0  # rows that are no job on one card with a lifetime
    users_are: str = "user"  # what the file's users really are


def read_trace(path: Path) -> Workload:
    """Read loractl's own form or openb's list of pods.

    Our columns are arrival, vram, duration and user, and perhaps priority and base_size. Raises DataError with the
    number of the bad line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = frozenset(reader.fieldnames or ())
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, f"can't be read as CSV: {getattr(error, 'strerror', None) or error}") from error
    if header >= OWN_COLUMNS:
        return _sorted(Workload(jobs=tuple(_own_job(path, line, row) for line, row in rows)))
    if header >= OPENB_COLUMNS:
        pods = [(line, row) for line, row in rows if _is_job(row)]
        jobs = tuple(_pod(path, line, row) for line, row in pods)
        return _sorted(Workload(jobs=jobs, left_out=len(rows) - len(jobs), users_are="qos class"))
    raise DataError(
        f"{path}:1",
        f"its header lacks {', '.join(sorted(OWN_COLUMNS - header))}",
        hint="the first line is arrival,vram,duration,user; openb's list of pods is read as it is",
    )


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The jobs of a workload that are replayed, and how many are not."""

    workload: Workload
    jobs: tuple[TraceJob, ...]
    never: int  # larger than every card
    longer: int  # run longer than the given limit
    slow: int = 0  # load for longer than any card that holds them is there

    def on_bases_of(self, size: int) -> Chosen:
        """Each job with a base of this size, or half its need if that is no larger. Raises UsageError if the trace has
        sizes itself."""
        if any(job.base_size for job in self.jobs):
            raise UsageError("--base-size: the trace has a column base_size itself", "leave --base-size out")
        jobs = (replace(job, base_size=size if job.need > size else job.need // 2) for job in self.jobs)
        return replace(self, jobs=tuple(jobs))


def choose(workload: Workload, cards: Sequence[Card], longest: float, limit: int | None) -> Chosen:
    """The first `limit` jobs that some card holds and that take at most `longest` seconds."""
    largest = largest_gpu(cards)
    held = [job for job in workload.jobs if job.need <= largest]
    jobs = [job for job in held if job.seconds <= longest]
    never, longer = len(workload.jobs) - len(held), len(held) - len(jobs)
    return Chosen(workload=workload, jobs=tuple(jobs[:limit]), never=never, longer=longer)


def without_slow(chosen: Chosen, cards: Sequence[Card], presences: Mapping[str, Presence], *, forks: bool) -> Chosen:
    """Without the jobs that load for as long as any card that holds them is there, or longer: none of them begins."""

    def stay_s(need: int) -> float:
        there = [presences.get(card.node) for card in cards if card.usable >= need]
        return max((math.inf if one is None else one.open_s for one in there), default=math.inf)

    jobs = [job for job in chosen.jobs if start_s(job.base_size, forks=forks) < stay_s(job.need)]
    return replace(chosen, jobs=tuple(jobs), slow=len(chosen.jobs) - len(jobs))


class Predictions(enum.Enum):
    """What our rule is told of each job's duration before it starts."""

    EXACT = "exact"
    NOISY = "noisy"  # off by a factor of e at one sigma
    ABSENT = "absent"

    def of(self, jobs: Sequence[TraceJob]) -> list[float]:
        """Seconds; the same in every run."""
        rng = random.Random(1)  # noqa: S311  a draw, no secret
        match self:
            case Predictions.EXACT:
                return [job.seconds for job in jobs]
            case Predictions.NOISY:
                return [job.seconds * rng.lognormvariate(0, 1) for job in jobs]
            case Predictions.ABSENT:
                return [UNKNOWN_S for _ in jobs]


def to_replay(
    jobs: Sequence[TraceJob],
    compress: float,
    *,
    forks: bool = False,
    roomy: bool = False,
    predictions: Predictions = Predictions.NOISY,
) -> list[ReplayedJob]:
    """The jobs for a replay from BEGIN on, their arrivals `compress` times as close, numbered by arrival.

    `forks`: a trainer has its imports from the fork server. `roomy`: whether jobs may do without recomputing.
    """
    lefts = predictions.of(jobs)
    starts = [start_s(job.base_size, forks=forks) for job in jobs]
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
            start_s=start,
            save_s=SAVE_S,
            roomy=forms_of(job.need) if roomy else (),
        )
        for number, (job, start, left_s) in enumerate(zip(jobs, starts, lefts, strict=True), start=1)
    ]


def parse_fleet(text: str, max_jobs: int | None = None) -> list[Card]:
    """Cards of "2x12GiB,80GiB"; they are named by number and size. Raises UsageError."""
    return [
        Card(node=node, total=size, max_jobs=default_max_jobs(size) if max_jobs is None else max_jobs)
        for node, size, _ in _parts(text)
    ]


def parse_presences(text: str) -> dict[str, Presence]:
    """When cards are there, of "2x12GiB open 4h shut 2h, 80GiB until 3d", by name; none of those that stay. Raises
    UsageError."""
    return {node: presence for node, _, presence in _parts(text) if presence is not None}


_PART = re.compile(
    r"\s*(?:(\d{1,4})\s*x\s*)?(?P<size>.*?)"
    r"(?:\s+open\s+(?P<open>\S+)\s+shut\s+(?P<shut>\S+)|\s+until\s+(?P<until>\S+))?\s*"
)


def _parts(text: str) -> Iterator[tuple[str, int, Presence | None]]:
    """Each card: its name, bytes, and when it is there if it does not stay."""
    number = 0
    for part in text.split(","):
        match = _PART.fullmatch(part)
        try:
            if match is None or not match["size"]:
                raise ValueError("is empty")
            size, count, presence = parse_size(match["size"]), int(match[1] or 1), _presence(match)
            if not GIB <= size < _LARGEST or count < 1:
                raise ValueError("is not a card; write its size with a unit")
        except ValueError as error:
            hint = "like --fleet 2x12GiB,80GiB; of cards that go, '24GiB open 4h shut 2h' or '24GiB until 3d'"
            raise UsageError(f"--fleet {text}: {part.strip()!r} {error}", hint) from error
        for _ in range(count):
            yield f"sim:{number}", size, presence
            number += 1


def _presence(part: re.Match[str]) -> Presence | None:
    times = {}
    for word in ("open", "shut", "until"):
        if part[word] is not None:
            try:
                times[word] = parse_duration(part[word])
            except ValueError as error:
                raise ValueError(f"says {word} {part[word]}, which {error}") from error
            if times[word] < LEAST_PRESENCE_S:
                raise ValueError(f"says {word} {part[word]}, which is below {duration(LEAST_PRESENCE_S)}")
    if not times:
        return None
    return Presence(open_s=times.get("open", times.get("until", 0.0)), shut_s=times.get("shut"))


LEAST_PRESENCE_S = 60.0
"""The least time for which a card is there, or away: each turn is a step of the replay."""


def fleet_text(cards: Sequence[Card], presences: Mapping[str, Presence] | None = None) -> str:
    """The fleet as a person would say it: 2x12, 80 GiB; 24 GiB open 4 h and shut 2 h."""
    groups: dict[Presence | None, list[Card]] = {}
    for card in cards:
        groups.setdefault((presences or {}).get(card.node), []).append(card)
    return ", and ".join(f"{_sizes(some)} GiB{_presence_text(presence)}" for presence, some in groups.items())


def _sizes(cards: Sequence[Card]) -> str:
    counts = Counter(card.total for card in cards)
    return ", ".join(
        f"{count}x{size / GIB:g}" if count > 1 else f"{size / GIB:g}" for size, count in sorted(counts.items())
    )


def _presence_text(presence: Presence | None) -> str:
    if presence is None:
        return ""
    there, away = (duration(one).removesuffix(" 00 min") for one in (presence.open_s, presence.shut_s or 0.0))
    return f" until {there}" if presence.shut_s is None else f" open {there} and shut {away}"


def _sorted(workload: Workload) -> Workload:
    jobs = tuple(sorted(workload.jobs, key=lambda job: job.arrival))
    return replace(workload, jobs=jobs)


def _own_job(path: Path, line: int, row: Mapping[str, str | None]) -> TraceJob:
    def read(name: str, parse: Callable[[str], float]) -> float:
        return _value(path, line, row, name, parse)

    def given(name: str) -> bool:
        return bool((row.get(name) or "").strip())

    need = int(read("vram", parse_size))
    if not need:
        raise DataError(f"{path}:{line}", "vram is 0", hint="what the job needs of a card, like 20GiB")
    size = int(read("base_size", parse_size)) if given("base_size") else 0
    if size >= need:
        hint = "the part of vram that the loaded base takes, like 5GiB"
        raise DataError(f"{path}:{line}", "base_size is not below vram", hint=hint)
    return TraceJob(
        arrival=read("arrival", parse_duration),
        need=need,
        seconds=read("duration", parse_duration),
        user=(row["user"] or "").strip(),
        priority=int(read("priority", int)) if given("priority") else 0,
        base_size=size,
    )


def _is_job(row: Mapping[str, str | None]) -> bool:
    """A pod with a part of one card that was started and has ended."""
    return row["num_gpu"] == "1" and bool(row["scheduled_time"]) and bool(row["deletion_time"])


def _pod(path: Path, line: int, row: Mapping[str, str | None]) -> TraceJob:
    def read(name: str) -> float:
        return _value(path, line, row, name, float)

    seconds = read("deletion_time") - read("scheduled_time")
    if seconds < 0:
        raise DataError(f"{path}:{line}", "deletion_time is before scheduled_time")
    return TraceJob(
        arrival=read("creation_time"),
        need=int(read("gpu_milli") / 1000 * OPENB_CARD_BYTES),
        seconds=seconds,
        user=row["qos"] or "",
    )


def _value(path: Path, line: int, row: Mapping[str, str | None], name: str, parse: Callable[[str], float]) -> float:
    text = (row.get(name) or "").strip()
    try:
        value = parse(text)
    except ValueError as error:
        what = str(error) if str(error).startswith("is ") else "is not a number"
        raise DataError(f"{path}:{line}", f"{name} {text!r} {what}" if text else f"{name} is missing") from error
    if not abs(value) < _LARGEST:  # nan is no number either
        raise DataError(f"{path}:{line}", f"{name} {text!r} is not a number of any use")
    return value
