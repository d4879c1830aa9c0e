"""What may be wrong with training data: findings that need no tokenizer, for submit and for the worker alike.

The trainer refuses an error. It learns from rows with a warning, though they are probably not what was meant. A note
only informs. docs/data.md lists every kind.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from loractl.common.errors import DataError

from .example import Example, Turn

Level = Literal["error", "warning", "note"]

SHOWN_ROWS = 5

FEW_TRAINED = 20
"""Fewer rows than these are learned by heart rather than from."""

FEW_HELD_OUT = 8
"""Below this the report gives no interval (MIN_CASES in worker/evaluation)."""

LABELS = 20
"""At most so many different answers count as labels, if each is short and several rows give it."""

LABEL_WORDS = 5

FEW_OF_A_LABEL = 8
"""A label with fewer rows to train on is hardly learned: so few rows say little about the next one."""

LOPSIDED = 0.9
"""From this share of one label on, a model that always gives this label looks good."""

SHORT_CHARACTERS = 2

_MOJIBAKE = ("\ufffd", "Ã©", "Ã¨", "Ã¼", "Ã¶", "Ã¤", "Ã±", "â€™", "â€œ", "â€“")
"""UTF-8 that was once read as Latin-1, and what a decoder writes in place of what it can't read."""


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
    """A finding about these rows; no finding without rows. `{n}` in the text is their number."""
    if not rows:
        return []
    text = text.replace("{n}", "1 row" if len(rows) == 1 else f"{len(rows)} rows")
    return [Finding(level=level, kind=kind, text=text, count=len(rows), rows=tuple(rows[:SHOWN_ROWS]), hint=hint)]


def refusals(errors: Iterable[DataError]) -> list[Finding]:
    """The trainer's refusals: one finding a kind, which quotes the first."""
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


def check_examples(train: Sequence[Example], held_out: Sequence[Example], overlap: int = 0) -> list[Finding]:
    """What the rows themselves show. `overlap`: held-out rows that were left out because they are trained on."""
    findings = [finding for check in (_counts, _repeated, _leaks) for finding in check(train, held_out)]
    if overlap:
        text = f"{overlap} row{'s' if overlap > 1 else ''} of the held-out file left out, because they are trained on"
        findings.append(Finding(level="warning", kind="overlap", text=text, count=overlap))
    for check in (_answers, _texts, _borders):
        findings += check(train)
    return [*findings, *_labelled(train, held_out)]


def answer_of(example: Example) -> str:
    """The last answer; a text's label; all of a plain text."""
    if example.label is not None:
        return example.label
    if example.turns:
        return next(turn.content for turn in reversed(example.turns) if turn.role == "assistant")
    return example.text[len(example.prompt) :]


def label_shares(examples: Sequence[Example]) -> dict[str, float] | None:
    """Share of each label, the most frequent first; None where the answers do not look like labels."""
    counted = Counter(answer_of(e).strip() for e in examples if e.turns or e.prompt)
    if not counted or len(counted) > LABELS or len(counted) * 2 > counted.total():
        return None
    if any(len(answer.split()) > LABEL_WORDS for answer in counted):
        return None
    return {answer: count / counted.total() for answer, count in counted.most_common()}


def _counts(train: Sequence[Example], held_out: Sequence[Example]) -> Iterator[Finding]:
    if len(train) < FEW_TRAINED:
        text = f"only {len(train)} row{'' if len(train) == 1 else 's'} to train on"
        yield Finding(level="warning", kind="few rows", text=text, count=len(train))
    if len(held_out) < FEW_HELD_OUT:
        text = f"only {len(held_out)} held out: too few for an interval around what the report measures"
        hint = f"hold out {FEW_HELD_OUT} or more: dataset.test_size or dataset.eval_path"
        yield Finding(level="note", kind="few held-out rows", text=text, count=len(held_out), hint=hint)


def _repeated(train: Sequence[Example], held_out: Sequence[Example]) -> Iterator[Finding]:
    seen: set[str] = set()
    repeated = []
    for example in train:
        content = example.content_hash()
        if content in seen:
            repeated.append(example.number)
        seen.add(content)
    yield from about_rows("warning", "duplicate rows", "{n} to train on stand there already", repeated)
    answers: dict[str, set[str]] = defaultdict(set)
    first: dict[str, int] = {}
    for example in train:
        if _asks(example):
            question = _prompt_hash(example)
            answers[question].add(answer_of(example).strip())
            first.setdefault(question, example.number)
    differing = sorted(first[question] for question, given in answers.items() if len(given) > 1)
    text = "one prompt, several answers: {n} whose prompt stands again with another answer"
    yield from about_rows("warning", "contradicting answers", text, differing)


def _leaks(train: Sequence[Example], held_out: Sequence[Example]) -> Iterator[Finding]:
    """Held-out rows that the model has seen in part: they measure its memory."""
    trained = {part for example in train for part in _answered(example.turns)}
    partly = [e.number for e in held_out if any(part in trained for part in _answered(e.turns))]
    text = "{n} held out begin with a conversation that is trained on"
    hint = "hold out whole conversations: dataset.eval_path"
    yield from about_rows("warning", "overlapping conversations", text, partly, hint)
    prompts = {_prompt_hash(e) for e in train if _asks(e)}
    known = [e.number for e in held_out if _asks(e) and _prompt_hash(e) in prompts]
    known = sorted(set(known) - set(partly))
    yield from about_rows("warning", "overlapping prompts", "{n} held out have a prompt that is trained on", known)


def _answers(train: Sequence[Example]) -> Iterator[Finding]:
    taught = [e for e in train if e.turns or e.prompt]
    if not taught:
        return
    labels = label_shares(taught)
    different = {answer_of(e).strip() for e in taught}
    if len(different) == 1 and len(taught) > 1:
        text = f"every answer is the same: {_quoted(next(iter(different)))}"
        yield Finding(level="warning", kind="one label only", text=text, count=len(taught))
    elif labels is not None:
        text = f"the answers look like {len(labels)} labels: {_shares(list(labels.items()))}"
        yield Finding(level="note", kind="labels", text=text, count=len(taught))
        if max(labels.values()) >= LOPSIDED:
            text = "one label is nearly all: a model that always answers it will look good"
            yield Finding(level="warning", kind="lopsided labels", text=text, count=len(taught))
    else:
        short = [e.number for e in taught if len(answer_of(e).strip()) <= SHORT_CHARACTERS]
        text = f"{{n}} with an answer of at most {SHORT_CHARACTERS} characters, among longer ones"
        yield from about_rows("warning", "short answers", text, short)
    echoed = [e.number for e in taught if answer_of(e).strip() == _question(e).strip()]
    yield from about_rows("warning", "echoed prompts", "{n} whose answer is the prompt again", echoed)


def _labelled(train: Sequence[Example], held_out: Sequence[Example]) -> Iterator[Finding]:
    """A classifier's labels: how often each is taught, and whether the report can say anything about it."""
    rows: dict[str, list[int]] = defaultdict(list)
    for example in train:
        if example.label is not None:
            rows[example.label].append(example.number)
    if not rows:
        return
    counts = sorted(((len(numbers), label) for label, numbers in rows.items()), key=lambda pair: (-pair[0], pair[1]))
    shares = [(label, count / sum(n for n, _ in counts)) for count, label in counts]
    text = f"{len(counts)} labels: {_shares(shares)}"
    yield Finding(level="note", kind="labels", text=text, count=len(train))
    if shares[0][1] >= LOPSIDED:
        text = "one label is nearly all: a model that always answers it will look good"
        yield Finding(level="warning", kind="lopsided labels", text=text, count=len(train))
    rare = {label: count for count, label in counts if count < FEW_OF_A_LABEL}
    listed = ", ".join(f"{_quoted(label)} {count}" for label, count in list(rare.items())[:6])
    text = f"{{n}} of labels with fewer than {FEW_OF_A_LABEL} of them: {listed}{', ...' if len(rare) > 6 else ''}"
    numbers = sorted(number for label in rare for number in rows[label])
    yield from about_rows("warning", "rare labels", text, numbers, "add rows of them, or join them with another label")
    unseen = sorted(rows.keys() - {example.label for example in held_out})
    if unseen and held_out:
        names = ", ".join(map(_quoted, unseen[:6])) + (", ..." if len(unseen) > 6 else "")
        text = f"{len(unseen)} of {len(rows)} labels have no row held out, so the report can't say how they do: {names}"
        yield Finding(level="note", kind="labels not held out", text=text, count=len(unseen))


def _shares(shares: Sequence[tuple[str, float]]) -> str:
    """The labels with their shares, the first six of them."""
    listed = ", ".join(f"{_quoted(label)} {100 * share:.0f} %" for label, share in shares[:6])
    return listed + (f", and {len(shares) - 6} more" if len(shares) > 6 else "")


def _texts(train: Sequence[Example]) -> Iterator[Finding]:
    def where(wrong: Callable[[str], bool]) -> list[int]:
        return [e.number for e in train if any(map(wrong, _parts(e)))]

    damaged = where(lambda text: any(mark in text for mark in _MOJIBAKE))
    hint = "the file was read in a wrong encoding before it came here"
    yield from about_rows("warning", "damaged text", "{n} with characters of a wrong encoding", damaged, hint)
    hidden = where(lambda text: any(ord(c) < 32 and c not in "\n\r\t" for c in text))
    yield from about_rows("warning", "control characters", "{n} with control characters", hidden)
    blank = [e.number for e in train if any(t.role == "user" and not t.content.strip() for t in e.turns)]
    yield from about_rows("warning", "empty questions", "{n} with an empty user message", blank)
    padded = [e.number for e in train if (e.turns or e.prompt) and answer_of(e).rstrip() != answer_of(e)]
    yield from about_rows("note", "trailing space", "{n} with an answer that ends in space, which is learned", padded)


def _borders(train: Sequence[Example]) -> Iterator[Finding]:
    """Prompt and completion are joined as they are."""
    pairs = [(e.number, e.prompt, e.text[len(e.prompt) :]) for e in train if e.prompt]
    spaced = [number for number, prompt, answer in pairs if prompt[-1] == " " and not answer[0].isspace()]
    hint = "most tokenizers put a word's space before it: let the prompt end without, and the completion begin with one"
    yield from about_rows("warning", "space before the answer", "{n} whose prompt ends in a space", spaced, hint)
    glued = [number for number, prompt, answer in pairs if prompt[-1].isalnum() and answer[0].isalnum()]
    yield from about_rows("warning", "words run together", "{n} whose prompt and completion join to one word", glued)


def _answered(turns: Sequence[Turn]) -> Iterator[str]:
    """A hash for each beginning of a conversation that ends in an answer."""
    running = hashlib.sha256()
    for turn in turns:
        running.update(json.dumps([turn.role, turn.content]).encode())
        if turn.role == "assistant":
            yield running.hexdigest()


def _asks(example: Example) -> bool:
    """Whether a part of the row is given and not learned."""
    return bool(example.turns or example.prompt or example.label is not None)


def _prompt_hash(example: Example) -> str:
    if not example.turns:
        given = example.prompt if example.label is None else example.text
        return hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()
    last = max(n for n, turn in enumerate(example.turns) if turn.role == "assistant")
    return hashlib.sha256(json.dumps([(t.role, t.content) for t in example.turns[:last]]).encode()).hexdigest()


def _question(example: Example) -> str:
    users = [turn.content for turn in example.turns if turn.role == "user"]
    return users[-1] if users else example.prompt


def _parts(example: Example) -> Iterator[str]:
    yield from (turn.content for turn in example.turns)
    yield example.text


def _quoted(text: str) -> str:
    text = " ".join(text.split())
    return f"“{text[:40]}{'…' if len(text) > 40 else ''}”"
