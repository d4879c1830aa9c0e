"""What each address shows: reads its parameters, gets the answer, and names the template."""

from __future__ import annotations

import datetime as dt
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loractl.common.errors import UsageError
from loractl.common.job.status import FAILS_AGAIN, Reason, Status
from loractl.common.store.records import Choice, Page
from loractl.common.store.store import Store
from loractl.common.units import LARGEST, LAST_NUMBER
from loractl.scheduler.status.job import JobState
from loractl.scheduler.status.overview import job_list
from loractl.scheduler.usage.answer import GROUPS, quota_list, usage_table

from .contest import newest_sweeps, sweep_contest
from .dossier import job_dossier
from .drawing import contest_charts, course_charts
from .floor import lab_floor
from .matrix import adapter_matrix
from .shelf import ReportShelf

PAGE_JOBS, PAGE_ADAPTERS, PAGE_SWEEPS, PAGE_ANSWERS = 50, 25, 25, 5
PARAMETERS = ("user", "name", "label", "status", "after", "answers", "from", "adapter", "by", "days")
"""All parameters that a page's address may have."""

USAGE_DAYS, MOST_DAYS = 30, 3650
OWNERS_KEPT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What is to be drawn."""

    template: str
    title: str
    section: str  # of the navigation
    values: Mapping[str, Any]


class Asked:
    """A request's parameters. Raises UsageError for an invalid one."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        self._given = {key: value.strip() for key, value in parameters.items() if value.strip()}
        if any("\0" in text for text in self._given.values()):
            raise UsageError("a parameter of this address has a zero byte", "no name and no label has one")

    def text(self, key: str) -> str | None:
        return self._given.get(key)

    def number(self, key: str) -> int | None:
        text = self._given.get(key)
        if text is None:
            return None
        if (number := number_of(text)) is None:
            raise UsageError(f"{key}={text[:40]!r} is not a number", "like 12")
        return number

    def choice(self) -> Choice:
        """The filter for the jobs shown."""
        label, status = self.text("label"), self.text("status")
        if label is not None and "=" not in label:
            raise UsageError(f"label={label[:60]!r} has no value", "like label=team=nlp")
        if status is not None and status not in set(Status):
            raise UsageError(f"status={status[:40]!r} is not a job state", f"one of {', '.join(Status)}")
        key, _, value = (label or "").partition("=")
        return Choice(
            user=self.text("user"),
            name=self.text("name"),
            label=(key, value) if label else None,
            status=Status(status) if status else None,
        )

    @property
    def filters(self) -> dict[str, str]:
        """The parameters that a link to the next page keeps."""
        return {key: value for key in ("user", "name", "label", "status") if (value := self._given.get(key))}


def number_of(text: str) -> int | None:
    """The text as a number of a job or sweep; else None."""
    number = int(text) if re.fullmatch(r"[0-9]{1,16}", text) else 0
    return number if 0 < number <= LAST_NUMBER else None


class Pages:
    """The pages of one lab."""

    def __init__(self, store: Store, shelf: ReportShelf) -> None:
        self._store, self._shelf = store, shelf
        self._owners: tuple[float, dict[str, int]] = (-OWNERS_KEPT_S, {})

    def lab(self, asked: Asked) -> Drawn:
        """The whole lab at one moment."""
        page = Page(limit=PAGE_JOBS, after=asked.number("after"))
        floor = lab_floor(self._store, self._shelf, asked.choice(), page)
        values = {"floor": floor, "filters": asked.filters, "now": floor.seen.now}
        return self._drawn("lab.jinja", "Lab", "lab", values)

    def jobs(self, asked: Asked) -> Drawn:
        """All jobs, the newest first."""
        listed = job_list(self._store, asked.choice(), Page(limit=PAGE_JOBS, after=asked.number("after")))
        values = {"listed": listed, "filters": asked.filters, "now": listed.now, "statuses": list(Status)}
        return self._drawn("jobs.jinja", "Jobs", "jobs", values)

    def job(self, asked: Asked, job_id: int) -> Drawn:
        """One job in full."""
        dossier = job_dossier(self._store, self._shelf, job_id)
        groups = dossier.report.groups if dossier.report is not None else ()
        chosen = asked.text("answers") or next((group.key for group in groups if group.answers), "repaired")
        values = {
            "dossier": dossier,
            "job": dossier.job,
            "now": dossier.history.now,
            "charts": course_charts(dossier.course),
            "group": next((group for group in groups if group.key == chosen), None),
            "first_answer": asked.number("from") or 1,
            "answers_shown": PAGE_ANSWERS,
            "commands": commands_for(dossier.job),
        }
        return self._drawn("job.jinja", f"{dossier.job.name} ({job_id})", "jobs", values)

    def sweeps(self, asked: Asked) -> Drawn:
        """The sweeps, the newest first."""
        views, after = newest_sweeps(self._store, Page(limit=PAGE_SWEEPS, after=asked.number("after")))
        return self._drawn("sweeps.jinja", "Sweeps", "sweeps", {"views": views, "after": after})

    def sweep(self, asked: Asked, sweep_id: int) -> Drawn:
        """One sweep in full."""
        contest = sweep_contest(self._store, self._shelf, sweep_id)
        charts = contest_charts(contest.lines, contest.leaders)
        title = f"{contest.sweep.name} (sweep {sweep_id})"
        return self._drawn(
            "sweep.jinja", title, "sweeps", {"contest": contest, "sweep": contest.sweep, "charts": charts}
        )

    def adapters(self, asked: Asked) -> Drawn:
        """The stored adapters by their measures."""
        page = Page(limit=PAGE_ADAPTERS, after=asked.number("after"))
        matrix = adapter_matrix(self._store, self._shelf, page, asked.number("adapter"))
        values = {"matrix": matrix, "now": matrix.listed.now, "after": page.after}
        return self._drawn("adapters.jinja", "Adapters", "adapters", values)

    def usage(self, asked: Asked) -> Drawn:
        """The card usage of the last days, and quotas on it."""
        by, days = asked.text("by") or "user", min(asked.number("days") or USAGE_DAYS, MOST_DAYS)
        if by not in GROUPS:
            raise UsageError(f"by={by[:40]!r} is not a way to group", f"one of {', '.join(GROUPS)}")
        table = usage_table(self._store, by, self._store.now() - dt.timedelta(days=days))
        quotas = quota_list(self._store)
        values = {"table": table, "quotas": quotas, "days": days, "groups": GROUPS, "now": table.now}
        return self._drawn("usage.jinja", "Usage", "usage", values)

    def log(self, job_id: int) -> Callable[[int], tuple[str, int]]:
        """A job's log in parts: from the last chunk read, the next text and its last chunk.

        Raises JobNotFound.
        """
        job = self._store.jobs.get(job_id)

        def part(after: int) -> tuple[str, int]:
            chunks = self._store.jobs.log(job_id, after, 8)
            if not chunks and after == 0 and job.report_uri is not None:  # loractl gc keeps it only with the result
                return self._shelf.stored_log(job_id), LARGEST
            return "".join(chunk.text for chunk in chunks), chunks[-1].chunk_id if chunks else 0

        return part

    def _drawn(self, template: str, title: str, section: str, values: Mapping[str, Any]) -> Drawn:
        more = {"owners": self._colours(), **values}
        return Drawn(template=template, title=title, section=section, values=more)

    def _colours(self) -> dict[str, int]:
        """A number for every user who had a card or waits for one: the same on all pages."""
        read_at, owners = self._owners
        if time.monotonic() - read_at >= OWNERS_KEPT_S:
            owners = {name: n for n, name in enumerate(self._store.jobs.users())}
            self._owners = time.monotonic(), owners
        return owners


def commands_for(job: JobState) -> list[str]:
    """The commands a person may want next."""
    number = job.job_id
    if job.status is Status.RUNNING:
        return [f"loractl status {number} --watch", f"loractl cancel {number}"]
    if job.status is Status.QUEUED:
        wish = f"loractl release {number}" if job.held else f"loractl hold {number}"
        return [f"loractl why {number}", wish, f"loractl cancel {number}"]
    if job.status is Status.SUCCEEDED and job.adapter_uri:
        return [f"loractl adapters pull {number} DIR", f"loractl chat {number}", f"loractl reproduce {number}"]
    if job.status is Status.SUCCEEDED:
        return [f"loractl submit --like {number}"]
    otherwise = f"loractl submit --like {number} --set KEY=VALUE"
    if job.reason is Reason.TIMED_OUT:
        return [f"loractl retry {number} --set resources.time_limit=2h", otherwise]
    return [otherwise] if job.reason in FAILS_AGAIN else [f"loractl retry {number}", otherwise]
