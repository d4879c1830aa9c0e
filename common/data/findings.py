"""What may be wrong with training data: findings that need no tokenizer, for submit and for the worker alike.

The trainer refuses an error. It learns from rows with a warning, though they probably are not as intended. A note
only informs.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from loractl.common.errors import DataError
from loractl.common.job.sections import EvaluationSpec, TrainingSpec

from .examples import Example

Level = Literal["error", "warning", "note"]

SHOWN_ROWS = 5

LABELS = 20
"""The most different answers that count as labels, if each is short and several rows give it."""

LABEL_WORDS = 5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding about a data set, with the number of its rows and the first of them."""

    level: Level
    kind: str
    text: str
    count: int = 0
    rows: tuple[int, ...] = ()
    hint: str | None = None

    @property
    def sentence(self) -> str:
        """The finding with its rows, for a line of text."""
        if not self.rows:
            return self.text
        more = ", ..." if self.count > len(self.rows) else ""
        return f"{self.text} (row{'s' if self.count > 1 else ''} {', '.join(map(str, self.rows))}{more})"


def about_rows(level: Level, kind: str, text: str, rows: Sequence[int], hint: str | None = None) -> list[Finding]:
    """A finding about these rows; none without rows. The text is one for `number_rows`."""
    if not rows:
        return []
    text = number_rows(text, len(rows))
    return [Finding(level=level, kind=kind, text=text, count=len(rows), rows=tuple(rows[:SHOWN_ROWS]), hint=hint)]


def number_rows(text: str, rows: int) -> str:
    """A sentence with its number of rows for `{n}`, and each `{is|are}` in the form for one row or for several."""
    text = text.replace("{n}", "1 row" if rows == 1 else f"{rows} rows")
    return re.sub(r"\{([\w ]+)\|([\w ]+)\}", lambda verb: verb[1] if rows == 1 else verb[2], text)


def about_fields(names: Sequence[str]) -> list[Finding]:
    """Fields of rows that are not read."""
    if not names:
        return []
    return [
        Finding(level="note", kind="fields that are not read", text=f"not used: {', '.join(names)}", count=len(names))
    ]


def about_warmup(training: TrainingSpec, rows: int | None) -> list[Finding]:
    """A warm-up that is longer than the training; an error if nothing would be learned. `rows`: None if their number is
    not known.

    Packed rows are fewer, so its steps are too.
    """
    warmup, steps = training.warmup_steps, _steps(training, rows)
    if steps is None or warmup < max(1, steps) or training.lr_scheduler_type == "constant":
        return []
    text = f"training.warmup_steps is {warmup:g} and the run has {steps} step{'' if steps == 1 else 's'}"
    hint = "below 1 it is a share of all steps: 0.03"
    if steps == 1:
        text += ": its learning rate is 0, so nothing would be learned"
        return [Finding(level="error", kind="long warm-up", text=text, hint=hint)]
    text += ": the learning rate never reaches its full value"
    return [Finding(level="warning", kind="long warm-up", text=text, hint=hint)]


def _steps(training: TrainingSpec, rows: int | None) -> int | None:
    """Optimizer steps of a training on these rows; None if that depends on an unknown number of rows."""
    if training.max_steps is not None:
        return training.max_steps
    if rows is None or training.num_train_epochs is None:
        return None
    return math.ceil(training.num_train_epochs * math.ceil(rows / training.effective_batch))


def about_measures(asked: EvaluationSpec, held_out: Sequence[Example]) -> list[Finding]:
    """Measures of the job's own that find nothing to compare in the expected answers."""
    expected = [answer_of(example) for example in held_out[: asked.samples] if example.turns or example.prompt]
    findings = []
    for metric in asked.own if expected else ():
        try:
            left = metric.score.goals(expected, time.thread_time).count(None)
        except ValueError as error:
            text = f"evaluation.metrics: {metric.name} {error}"
            findings.append(Finding(level="warning", kind="measures that compare nothing", text=text))
            continue
        if left:
            every = f"{left} of {len(expected)} expected answers"
            text = f"evaluation.metrics: {metric.name} finds nothing to compare in {every} that it would be measured on"
            hint = f"it looks for {metric.extract} there, too" if metric.extract else f"its compare is {metric.compare}"
            kind = "measures that compare nothing"
            findings.append(Finding(level="warning", kind=kind, text=text, count=left, hint=hint))
    return findings


def refusals(errors: Iterable[DataError]) -> list[Finding]:
    """The trainer's refusals: one finding per kind, which quotes the first."""
    kinds: dict[str, list[DataError]] = defaultdict(list)
    for error in errors:
        kinds[error.kind].append(error)
    findings = []
    for kind, same in kinds.items():
        text = same[0].what if len(same) == 1 else f"{len(same)} rows; the first: {same[0].what}"
        rows = tuple(error.row for error in same[:SHOWN_ROWS] if error.row is not None)
        hint = same[0].hint
        findings.append(Finding(level="error", kind=kind, text=text, count=len(same), rows=rows, hint=hint))
    return findings


def answer_of(example: Example) -> str:
    """The last answer; a text's label; all of a plain text."""
    if example.label is not None:
        return example.label
    if example.turns:
        return example.turns[example.answers[-1]].said
    return example.text[len(example.prompt) :]


def label_shares(examples: Sequence[Example]) -> dict[str, float] | None:
    """Share of each label, the most frequent first; None where the answers do not look like labels."""
    return shares_of(Counter(answer_of(e).strip() for e in examples if e.turns or e.prompt))


def shares_of(counted: Counter[str]) -> dict[str, float] | None:
    """Share of each answer, the most frequent first; None where these do not look like labels."""
    if not counted or len(counted) > LABELS or len(counted) * 2 > counted.total():
        return None
    if any(len(answer.split()) > LABEL_WORDS for answer in counted):
        return None
    return {answer: count / counted.total() for answer, count in counted.most_common()}
