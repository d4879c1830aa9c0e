"""The keys that --json prints: a page of the site (docs/build.py), made from the answers that print them.

Words are an answer's docstring; types and comments are its fields. A test holds what commands print against the page.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from loractl.common.job.spec import spec_keys

ROOT = Path(__file__).parents[1]

SHARED = {
    "A job": "scheduler/status/job.py:JobState",
    "An attempt": "scheduler/status/job.py:PastAttempt",
    "A card of an attempt": "scheduler/status/job.py:CardPart",
    "A sweep": "scheduler/status/standing.py:SweepStanding",
    "A member": "common/job/sweep.py:Member",
    "A rung": "common/job/sweep.py:RungPoint",
    "An adapter": "scheduler/adapters/answer.py:StoredAdapter",
    "The data": "worker/data/prepared.py:PreparedData.facts",
    "A measured change": "common/verdict.py:MeasuredChange",
    "A measure": "worker/evaluation/comparison.py:Compared",
    "A verdict": "common/verdict.py:ReportVerdict",
    "An evaluation": "worker/evaluation/report.py:_evaluation",
    "Final rows": "scheduler/report/answer.py:FinalResult",
    "A finding": "common/data/findings.py:Finding",
    "A difference": "scheduler/compare/answer.py:Against",
    "A comparison": "scheduler/compare/answer.py:Comparison",
    "A corrected change": "scheduler/compare/winner.py:CorrectedChange",
    "A pair": "scheduler/reproduce/sameness.py:Pair",
    "Losses of rows": "scheduler/reproduce/sameness.py:RowLosses",
    "Cards asked for": "scheduler/wait/queue.py:CardsAsked",
    "An expected start": "scheduler/wait/starts.py:ExpectedStart",
    "A card as a job sees it": "scheduler/wait/cards.py:CardFit",
    "Room on a card": "scheduler/plan/answer.py:CardRoom",
    "A time": "scheduler/plan/answer.py:CardTime",
    "A solution": "scheduler/plan/solutions.py:Solution",
    "A row of usage": "scheduler/usage/answer.py:UsageRow",
    "A login": "common/store/roles.py:RoleLogin",
    "A join line": "scheduler/lab/lab.py:JoinTicket",
    "A check": "scheduler/lab/health/condition.py:Condition",
    "A diagnosis": "scheduler/lab/health/condition.py:Diagnosis",
    "An adapter of the matrix": "worker/serving/matrix/matrix.py:MatrixRow",
}
"""What several answers hold, each with where it is defined."""

ANSWERS = {
    "submit": "scheduler/submit/draft.py:QueuedJobs",
    "submit --dry-run": "scheduler/submit/draft.py:JobDrafts",
    "sweep": "scheduler/status/standing.py:SweepStanding",
    "sweep --dry-run": "scheduler/sweep/answer.py:SweepDraft",
    "status": "scheduler/status/overview.py:Overview",
    "status --all": "scheduler/status/overview.py:JobList",
    "status JOB": "scheduler/status/job.py:JobHistory",
    "status --sweep": "scheduler/status/standing.py:SweepStanding",
    "why": "scheduler/why/answer.py:Why",
    "why of a job that does not wait": "scheduler/why/answer.py:NotWaiting",
    "plan": "scheduler/plan/answer.py:MemoryNeed",
    "plan --accuracy": "scheduler/plan/answer.py:PlanAccuracy",
    "data check": "worker/data/check.py:Checked",
    "data show": "worker/data/text.py:TrainedRow",
    "import": "scheduler/foreign/configuration.py:Imported",
    "report": "worker/evaluation/report.py:build_report",
    "compare": "scheduler/compare/answer.py:Comparison",
    "compare --sweep": "scheduler/compare/winner.py:SweepComparison",
    "reproduce": "scheduler/reproduce/answer.py:Repetition",
    "reproduce --check": "scheduler/reproduce/sameness.py:Sameness",
    "adapters": "scheduler/adapters/answer.py:AdapterList",
    "adapters show": "scheduler/adapters/answer.py:Lineage",
    "adapters push": "scheduler/adapters/push.py:PushAnswer",
    "adapters merge": "worker/serving/merge.py:Merged",
    "generate": "worker/serving/conversation.py:Completion",
    "matrix": "worker/serving/matrix/matrix.py:Matrix",
    "gpus": "scheduler/fleet/answer.py:DeviceState",
    "usage": "scheduler/usage/answer.py:UsageTable",
    "quota": "common/placement/shares.py:Allowance",
    "lab init": "scheduler/lab/lab.py:LabAnswer",
    "lab invite": "scheduler/lab/lab.py:LabAnswer",
    "join": "scheduler/lab/join.py:JoinAnswer",
    "db roles": "common/store/roles.py:RolesDone",
    "db backup": "scheduler/database/answer.py:Contents",
    "gc": "scheduler/garbage/cleaner.py:Cleared",
    "doctor": "scheduler/lab/health/condition.py:Diagnosis",
}
"""What each command prints."""

FREE = {"labels", "varied", "settings", "versions", "files", "used", "failures", "parts", "rows_trained_on"}
FREE |= {"differences", "carried", "left_out", "filled_in", "commits", "methods", "tasks", "scores", "self_test"}
"""Objects whose keys are names of anything."""


def lines() -> Iterator[str]:
    """The page from its second heading on, as Markdown."""
    seen: dict[str, str] = {}
    for title, where in (SHARED | ANSWERS).items():
        yield from ("", f"## {title}", "")
        if where in seen:
            yield f"As [{seen[where]}](#{anchor(seen[where])})."
            continue
        seen[where] = title
        words, *rows = section(where)
        yield from (linked(words), *rows)


def linked(words: str) -> str:
    """A docstring for the page: a class of it is a link to its section."""
    words = re.sub(r"The fields under their own names(\.  ?)?", lambda end: "" if end[1] else "The keys below", words)
    for title, where in SHARED.items():
        link = f"[{title[0].lower()}{title[1:]}](#{anchor(title)})"
        words = re.sub(rf"(\(see )?\b{where.rpartition(':')[2]}\b", rf"\1{link}", words)
    return words


def anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def hold(printed: Mapping[str, Sequence[Any]]) -> None:
    """Each key that these answers print is on the page, in their section or in what several answers hold, or it is a
    job file's. Each key of a section's table is printed, with the type that it has there. Raises AssertionError."""
    known = set().union(*map(names, SHARED.values()), *(key.split(".") for key in spec_keys()))
    for title, values in printed.items():
        found = {key for value in values for key in keys(json.loads(json.dumps(value)))}
        unnamed = found - names(ANSWERS[title]) - known
        assert not unnamed, f"{title}: {ANSWERS[title]} does not name {unnamed}"
        objects = [one for value in values for one in (value if isinstance(value, list) else [value])]
        for key, kinds in ROW.findall("\n".join(section(ANSWERS[title]))):
            shown = [one[key] for one in json.loads(json.dumps(objects)) if key in one]
            assert shown or not objects, f"{title}: `{key}` is on the page and is not printed"
            strange = [value for value in shown if not any(fits(value, kind) for kind in kinds.split(" or "))]
            assert not strange, f"{title}: `{key}` is {kinds} on the page, and printed as {strange}"


ROW = re.compile(r"^\| `(\w+)` \| ([^|]*) \|", re.M)
"""A row of a table: key and types."""

TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,), "time": (str,), "integer": (int,), "number": (int, float), "true/false": (bool,), "object": (dict,),
    "null": (type(None),), "any": (object,),
}  # fmt: skip


def fits(value: Any, kind: str) -> bool:
    """Whether a printed value has a type of the page."""
    if kind.startswith("list"):
        held = kind.partition(" of ")[2]
        return isinstance(value, list) and all(not held or fits(one, held.removesuffix("s")) for one in value)
    return isinstance(value, TYPES[kind]) and (kind in ("true/false", "any") or not isinstance(value, bool))


def keys(value: Any) -> Iterator[str]:
    """The keys of a value and of all in it, without those that are names of anything."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield key
        below = [*inner.values()] if key in FREE and isinstance(inner, dict) else [inner]
        yield from (name for one in below for name in keys(one))
    for inner in value if isinstance(value, list) else ():
        yield from keys(inner)


@cache
def names(where: str) -> set[str]:
    """What a section names as keys."""
    return set(re.findall(r"`([\w-]+)`", "\n".join(section(where))))


@cache
def section(where: str) -> tuple[str, ...]:
    """The words of an answer, and a table of its fields if it prints them."""
    file, _, name = where.partition(":")
    text = (ROOT / file).read_text("utf-8")
    found: Any = ast.parse(text)
    for part in name.split("."):
        found = next(one for one in found.body if getattr(one, "name", None) == part)
    said = found
    if isinstance(found, ast.ClassDef):
        said = next((one for one in found.body if getattr(one, "name", None) == "as_json"), found)
    words = ast.get_docstring(said)
    assert words, f"{where}: what --json prints has no docstring"
    if words == "The fields under their own names.":
        words += f" {ast.get_docstring(found)}"
    listed = isinstance(found, ast.ClassDef) and (said is found or "own names" in words)
    return (words, *(table(found, text.splitlines()) if listed else ()))


def table(answer: ast.ClassDef, source: list[str]) -> Iterator[str]:
    """The fields up to the first empty line: those behind it are for people."""
    yield from ("", "| key | type | |", "| --- | --- | --- |")
    shown = [ast.literal_eval(one.value) for one in answer.body if isinstance(one, ast.Assign)]  # of a row's columns
    fields = [one for one in answer.body if isinstance(one, ast.AnnAssign)]
    for before, field in zip([fields[0], *fields], fields, strict=False):
        if "" in source[before.end_lineno or 0 : field.lineno - 1]:
            break
        assert isinstance(field.target, ast.Name)
        annotation = ast.unparse(field.annotation)
        if field.target.id == "row" and annotation[0].isupper():
            yield from columns(annotation, *shown)
        else:
            yield entry(field.target.id, annotation, source[(field.end_lineno or 0) - 1])


def columns(table: str, shown: Collection[str] | None = None) -> Iterator[str]:
    """The columns of a table's row, or those shown."""
    text = (ROOT / "common/store/tables.py").read_text("utf-8")
    source = text.splitlines()
    (found,) = (one for one in ast.parse(text).body if isinstance(one, ast.ClassDef) and one.name == table)
    for field in found.body:
        if isinstance(field, ast.AnnAssign) and (name := ast.unparse(field.target)) in (shown or name):
            above = source[field.lineno - 2].strip()
            comment = f"  {above}" if above.startswith("# ") else source[field.lineno - 1]
            yield entry(name, ast.unparse(field.annotation).removeprefix("Mapped[").removesuffix("]"), comment)


def entry(name: str, annotation: str, line: str) -> str:
    """A line of the table of fields. `line`: of code, with its comment."""
    return f"| `{name}` | {kind(annotation)} | {line.partition('  # ')[2].replace('None', 'null')} |"


KINDS = dict.fromkeys((where.rpartition(":")[2] for where in SHARED.values()), "object") | {
    "str": "text", "Path": "text", "int": "integer", "float": "number", "bool": "true/false", "dt.datetime": "time",
    "None": "null", "Any": "any", "Mapping": "object", "dict": "object", "Bytes": "integer", "Seconds": "number",
    "Timestamp": "time", "Labels": "object", "Key": "integer", "JobKey": "integer", "Number": "integer",
}  # fmt: skip


def kind(annotation: str) -> str:
    """A type in words: int | None is integer or null."""
    if held := re.fullmatch(r"(?:tuple|list|Sequence)\[(.*?)(?:, \.\.\.)?\]", annotation):
        return "list of " + kind(held[1]).replace("object", "objects")
    parts = [part.partition("[")[0] for part in annotation.split(" | ")] if "[" not in annotation else None
    if parts is None:
        return KINDS.get(annotation.partition("[")[0], "list") + (" or null" if annotation.endswith("| None") else "")
    return " or ".join(KINDS.get(part, "text" if part[:1].isupper() else part) for part in parts)
