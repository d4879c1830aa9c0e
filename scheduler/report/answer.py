"""The evaluation report of a finished job, and what else its result holds.

report.html is checked before a person's browser gets it: a worker has written it, and a worker may have been someone
else's. A page of loractl shows text, tables and lines, so nothing else is served, and our own policy precedes it.

Showing any figure that a job measured on its final rows is a look, which the database records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

from loractl.common.artifacts import ArtifactStore, Binding
from loractl.common.binding import result_binding
from loractl.common.errors import ArtifactError, WrongState
from loractl.common.job.status import Status
from loractl.common.store.store import Store
from loractl.common.store.tables import FinalLook, Job
from loractl.common.text import in_words
from loractl.common.verdict import has_interval, written


@dataclass(frozen=True, kw_only=True)
class FinalResult:
    """Base against tuned on rows that chose nothing, and the looks at these rows so far."""

    job_id: int
    content: Mapping[str, Any]  # as in the report's file
    looks: Sequence[FinalLook]  # the last is this one

    @property
    def sentence(self) -> str:
        """What these rows say, and how often they were looked at."""
        rows, verdict = self.content["rows"], self.content["verdict"]
        told = [verdict["sentence"]]
        loss = next(metric for metric in self.content["metrics"] if metric["name"] == "loss")
        if has_interval(loss):
            told.append(f"Change of the loss {written(loss).change} ({written(loss).interval}).")
        told.append(f"Nothing was chosen by {f'these {rows} rows' if rows != 1 else 'this row'}.")
        others = dict.fromkeys(str(look.job_id) for look in self.looks if look.job_id != self.job_id)
        before = f"; job{'s' * (len(others) != 1)} {in_words(list(others))} looked at before" if others else ""
        return " ".join([*told, *filter(None, [verdict.get("aside")]), f"Look {len(self.looks)} at them{before}."])

    def as_json(self) -> dict[str, Any]:
        """The report file's entry on the final rows, `job_id`, the number of this `look`, and all `looks` at these rows
        so far with `job_id`, `sweep_id`, `user` and `at`."""
        told = [
            {"job_id": one.job_id, "sweep_id": one.sweep_id, "user": one.user, "at": one.at.isoformat()}
            for one in self.looks
        ]
        return {**self.content, "job_id": self.job_id, "look": len(self.looks), "looks": told}


def look(store: Store, artifacts: ArtifactStore, job_id: int, stored: Binding, user: str) -> FinalResult | None:
    """What a finished job measured on its final rows, once the look is recorded; None if it has none.

    `stored`: its result. Raises ArtifactError.
    """
    content = artifacts.read_final(stored)
    if content is None:
        return None
    return FinalResult(job_id=job_id, content=content, looks=store.results.look(job_id, str(content["sha256"]), user))


def seen(store: Store, job_id: int, content: Mapping[str, Any] | None) -> FinalResult | None:
    """What `look` answered last, without a new look; None while nobody has looked at this job's."""
    looks = [] if content is None else store.results.looks(str(content["sha256"]))
    while looks and looks[-1].job_id != job_id:
        looks.pop()
    return FinalResult(job_id=job_id, content=content, looks=looks) if content is not None and looks else None


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What the trainer measured of base and tuned model."""

    job_id: int
    user: str
    content: dict[str, Any]  # of report.json
    final: FinalResult | None = None  # of a job with final rows that is in no sweep

    def as_json(self) -> dict[str, Any]:
        """report.json as the trainer wrote it; docs/results.md explains what it says. `final`, if it is there and
        the job is in no sweep, with the looks at it (see FinalResult)."""
        return self.content if self.final is None else {**self.content, "final": self.final.as_json()}


def report(store: Store, artifacts: ArtifactStore, job_id: int, user: str) -> EvaluationReport:
    """The report of a finished job, for `user`. Raises JobNotFound, WrongState, ArtifactError."""
    job, stored = result_of(store, job_id)
    content = artifacts.read_report(stored)
    final = look(store, artifacts, job_id, stored, user) if job.sweep_id is None else None
    return EvaluationReport(job_id=job_id, user=job.user, content=content, final=final)


def report_page(store: Store, artifacts: ArtifactStore, job_id: int) -> bytes:
    """The report as an HTML page in which nothing runs. Raises JobNotFound, WrongState, ArtifactError."""
    _, stored = result_of(store, job_id)
    return guarded(artifacts.read_bytes(stored, "report.html"), job_id)


def result_of(store: Store, job_id: int) -> tuple[Job, Binding]:
    """The job and the place of its verified result. Raises JobNotFound; WrongState while there is no result."""
    job = store.jobs.get(job_id)
    if job.status is not Status.SUCCEEDED:
        raise WrongState(
            f"job {job_id} has no result: it {job.status.in_words}", f"loractl status {job_id} shows its state"
        )
    if job.report_uri is None:
        raise WrongState(
            f"job {job_id} no longer has a result: it was removed",
            f"loractl status {job_id} says who and when",
        )
    return job, result_binding(store, job)


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""Nothing runs, nothing is loaded, nothing is sent."""

_HEAD = f'<!doctype html>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'

_TAGS = frozenset(
    {
        "html", "head", "meta", "title", "style", "body", "main", "header", "footer", "section", "div", "p", "span",
        "small", "b", "i", "em", "strong", "h1", "h2", "h3", "h4", "pre", "code", "ul", "ol", "li", "dl", "dt", "dd",
        "table", "thead", "tbody", "tfoot", "tr", "th", "td", "label", "input", "svg", "g", "path", "circle", "rect",
        "line", "polyline", "text",
    }
)  # fmt: skip
_ATTRIBUTES = frozenset(
    {
        "lang", "charset", "name", "content", "http-equiv", "class", "id", "style", "title", "role", "for", "type",
        "checked", "colspan", "rowspan", "aria-label", "aria-hidden", "viewbox", "x", "y", "x1", "y1", "x2", "y2",
        "cx", "cy", "r", "rx", "ry", "d", "points", "width", "height", "fill", "stroke", "text-anchor",
    }
)  # fmt: skip


def guarded(page: bytes, job_id: int) -> bytes:
    """The page of a report, in which nothing runs. Raises ArtifactError for a page that loractl can't have written."""
    try:
        text = page.decode("utf-8")
    except UnicodeDecodeError:
        raise _refused(job_id, "it is not UTF-8 text") from None
    reader = _PageReader()
    reader.feed(text)
    reader.close()
    if reader.wrong is not None:
        raise _refused(job_id, f"it holds {reader.wrong}")
    return (_HEAD + text).encode()


def _refused(job_id: int, why: str) -> ArtifactError:
    return ArtifactError(
        f"the page of job {job_id} is not loractl's: {why}",
        f"don't open it; loractl report {job_id} prints what report.json says",
    )


class _PageReader(HTMLParser):
    """Looks for what no page of loractl has. Text is harmless, and is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _TAGS:
            self._find(f"<{tag}>")
        for name, value in attrs:
            if name not in _ATTRIBUTES:
                self._find(f"<{tag} {name}=...>")
            elif name == "http-equiv" and (value or "").lower() != "content-security-policy":
                self._find("<meta http-equiv=...>")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None and "<" in data:  # a browser may see tags there: it parses styles in pictures so
            self._find(f"tags in <{self.cdata_elem}>")

    def handle_comment(self, data: str) -> None:
        self._find("a comment")

    def handle_pi(self, data: str) -> None:
        self._find("a processing instruction")

    def unknown_decl(self, data: str) -> None:
        self._find("a declaration")

    def handle_decl(self, decl: str) -> None:
        if decl.lower() != "doctype html":
            self._find("a declaration")

    def _find(self, what: str) -> None:
        if self.wrong is None:
            self.wrong = "".join(c if c.isprintable() else "?" for c in what[:60])
