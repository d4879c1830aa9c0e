"""Answers that appear in their own question, as in `[gold=alarm]`: a model learns to read them off.

A place gives answers away if its text matches the row's answer far more often than chance would explain (Cohen's
kappa, 1960, over all rows that have the place). An answer counts as a whole, without the words that nearly all answers
begin or end with, and by its last number, so that "3" gives "It is 3." away. Answers elsewhere are the task itself, and
only noted: spans at any place are extraction, a question that is nothing else is copying, and one that names the other
labels offers choices.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .examples import Example
from .findings import LABEL_WORDS, Finding, answer_of, shares_of

GIVEN_AWAY = "answer in the question"
LENGTH_TELLS, CASE_TELLS, SPACES_TELL = "length tells the label", "case tells the label", "spaces tell the label"
SIGNS_TELL = "first or last sign tells the label"
READ_OFF = {GIVEN_AWAY, LENGTH_TELLS, CASE_TELLS, SPACES_TELL, SIGNS_TELL}
"""The kinds of findings by which answers can be told without reading what is asked."""

MOST_ROWS = 1000
"""Of more rows than these, about this many are sampled on each side, which gives a share to within 3 %."""

MOST_CHARACTERS = 2000
"""Of a question: half of them from its beginning, half from its end."""

FEWEST, SHARE = 8, 0.1
"""The fewest rows, and the least share of rows, that a place must give away: fewer may be chance."""

AGREEMENT = 0.7
"""From this kappa on, a place gives answers away."""

FEWEST_LENGTHS, NEAR = 20, 5
"""The fewest rows whose lengths say anything, and how many rows of the nearest lengths guess a row's label."""

TOLD_SHARE = 0.5
"""From this share on, answers that are part of the task are reported."""

_SHOWN, _PLACES = 40, 4

_FRAME, _NEARLY_ALL = 6, 0.8
"""The most words around an answer's core, and the share of answers that have them."""

_GOLDEN = 2654435761
"""2**32 by the golden ratio: its multiples are spread evenly, whatever habit rows have (Knuth, vol. 3, 6.4)."""

_WORDS_FOR_IT = {
    "answer", "answers", "cheat", "completion", "correct", "expected", "gold", "hint", "key", "label", "labels",
    "output", "reference", "response", "solution", "spoiler", "target", "teacher", "truth",
}  # fmt: skip
"""Words that name the answer itself. After any other word that the question asks about, it is extraction."""

_NAMED = re.compile(r"[^\w\s]?(\w+)(?: is| was)?[^\w\n]*[:\uff1a=>|#\u2192]\W*$")
_OPTION = re.compile(r"(?:^|\s)(\(?[a-e1-5][.):] )$")
_IS = re.compile(rf"\b(?:{'|'.join(sorted(_WORDS_FOR_IT))})\b(?:[^\w.!?\n]+[^\W\d]+){{0,4}}[^\w.!?\n]+$")
_WORDS_BEFORE = re.compile(r"[^\W\d]+[^\w.!?\n]+[^\W\d]+ $")
_JOINED = re.compile(r"(?<=[^\W_])[_-](?=[^\W_])")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_BRACKETS = {"[": "]", "(": ")", "{": "}", "<": ">"}
_EDGES = " \t\r\n.!;,"


class Giveaway:
    """Looks at rows one by one, keeps a sample of them, and reports afterwards what gives their answers away."""

    def __init__(self, rows: int, held_out: Sequence[Example], called: str = "held out") -> None:
        """`rows`: how many rows to train on it will see. `called`: what follows "rows", of those not trained on."""
        self._titles = ("to train on", called)
        self._sample = _SampledRows(rows)
        self._held_out = held_out
        self.read_off = ""
        """A clause for the verdict once `findings` has run: how most held-out answers can be told; else empty."""
        self.rule: FormRule | None = None
        """The rule where that is by the questions' form."""

    def see(self, example: Example, question: int | None = None) -> None:
        self._sample.see(example)

    def findings(self) -> Iterator[Finding]:
        """Findings about the rows seen and the rows held out."""
        train, held = self._sample, _SampledRows(len(self._held_out))
        for example in self._held_out:
            held.see(example)
        labels = _labels(train.rows) or _labels(held.rows)
        sides = [_Side(side, title, labels) for side, title in zip((train, held), self._titles, strict=True)]
        place = next((found for side in sides if (found := side.place) is not None), None)
        for part in (_cores, _last_numbers) if place is None else ():
            parts = [
                _Side(side, title, frozenset()).of_parts(part)
                for side, title in zip((train, held), self._titles, strict=True)
            ]
            if (place := next((found for side in parts if (found := side.place) is not None), None)) is not None:
                sides = parts
                break
        if place is not None:
            given = sides[1].given_by(place)
            if len(given) > TOLD_SHARE * len(sides[1].rows) and not place.unnamed:
                self.read_off = f"{sides[1].share(given)} hold the answer in the question"
            yield _given_away(place, sides)
        elif labels and (told := max((_agreed(sides, form), form) for form in _FORMS))[0] >= AGREEMENT:
            kind, what, hint = _FORMS[told[1]]
            self.rule = FormRule(what=what, right=_told_right(told[1], *(side.rows for side in sides)))
            self.read_off = f"{what} of a question tell{'s' * (told[1] not in ('capitals', 'spaces'))} its label"
            text = f"{self.read_off}: the {NEAR} rows nearest in it guess it with a kappa of {told[0]:.2f}"
            text += "; if the label is about that, a rule without a model may do as well"
            yield Finding(level="warning", kind=kind, text=text, count=len(sides[0].rows), hint=hint)
        elif (finding := sides[0].task) is not None:
            yield finding


@dataclass(frozen=True, kw_only=True)
class FormRule:
    """A rule that tells labels by one number of a question's form, learned from rows to train on alone."""

    what: str  # that it goes by
    right: Mapping[int, bool]  # whether it tells the label of a held-out row, by number


_FORMS = {
    "length": (
        LENGTH_TELLS,
        "the length",
        "cut or pad the questions alike, unless length is what the label is about",
    ),
    "capitals": (
        CASE_TELLS,
        "the capital letters",
        "write questions alike, unless case is what the label is about",
    ),
    "spaces": (SPACES_TELL, "the spaces", "write the spaces of all questions alike, and drop signs that can't be seen"),
    "first": (
        SIGNS_TELL,
        "the first sign",
        "begin questions alike, unless that sign is what the label is about",
    ),
    "last": (SIGNS_TELL, "the last sign", "end questions alike, unless that sign is what the label is about"),
}
"""What of a question's form is looked at, without its words."""


def _agreed(sides: Sequence[_Side], form: str) -> float:
    """Of the sides that have rows enough, the least agreement."""
    some = [side.rows for side in sides if len(side.rows) >= FEWEST_LENGTHS]
    rows = list(map(_with_signs, some)) if form in ("first", "last") else some
    return min((told_by(form, side) for side in rows), default=0.0)


def _told_right(form: str, train: Sequence[_AskedRow], held: Sequence[_AskedRow]) -> dict[int, bool]:
    """Whether each held-out row has the label of the rows to train on that are nearest to it in this."""
    rows = [*train, *held]
    rows = _with_signs(rows) if form in ("first", "last") else rows
    of_length: dict[int, Counter[str]] = {getattr(row, form): Counter() for row in rows}
    for row in rows[: len(train)]:
        of_length[getattr(row, form)][row.answer] += 1
    lengths = sorted(of_length)
    guessed = {length: _most(_near(place, lengths, of_length)) for place, length in enumerate(lengths)}
    return {row.number: guessed[getattr(row, form)] == row.answer for row in rows[len(train) :]}


def _most(votes: Mapping[str, int]) -> str:
    return min(votes, key=lambda label: (-votes[label], label))


def _with_signs(rows: Sequence[_AskedRow]) -> list[_AskedRow]:
    """The rows with the punctuation by which their questions begin and end, apart from what all of them have there,
    such as a command."""
    begin = _shared([row.question for row in rows])
    end = _shared([row.question[begin:][::-1] for row in rows])
    own = (row.question[begin : len(row.question) - end] for row in rows)
    return [replace(row, first=_sign(text), last=_sign(text[::-1])) for row, text in zip(rows, own, strict=True)]


def _shared(texts: Sequence[str]) -> int:
    """How many characters all texts begin with."""
    first, last = min(texts), max(texts)
    return next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))


def _sign(text: str) -> int:
    """What a text begins with, as a number: up to two signs, or 0 for a letter or a digit."""
    signs = re.match(r"\s*((?:[^\w\s]|_){0,2})", text)
    return int.from_bytes(signs[1].encode("utf-32-be", "surrogatepass")) if signs is not None else 0


def told_by(form: str, rows: Sequence[_AskedRow]) -> float:
    """How far the lengths of questions, or another number of their form, agree with their labels (Cohen's kappa): each
    label guessed from all other rows of the nearest lengths, at least five. 0 for few rows. Rows of equal length vote
    alike, in whatever order the file has them: many files are sorted by label."""
    if len(rows) < FEWEST_LENGTHS:
        return 0.0
    of_length: dict[int, Counter[str]] = {}
    for row in rows:
        of_length.setdefault(getattr(row, form), Counter())[row.answer] += 1
    lengths = sorted(of_length)
    near = {length: _near(place, lengths, of_length) for place, length in enumerate(lengths)}
    pairs = []
    for row in rows:
        votes = near[getattr(row, form)].copy()
        votes[row.answer] -= 1
        pairs.append((row.answer, _most(votes)))
    return _kappa(pairs)


def _near(place: int, lengths: Sequence[int], of_length: Mapping[int, Counter[str]]) -> Counter[str]:
    """The labels of the length at this place and of those nearest to it, until there are five more than one's own."""
    here, low, high = lengths[place], place - 1, place + 1
    votes = Counter(of_length[here])
    while votes.total() <= NEAR and (low >= 0 or high < len(lengths)):
        below = here - lengths[low] if low >= 0 else math.inf
        above = lengths[high] - here if high < len(lengths) else math.inf
        if below <= above:
            votes += of_length[lengths[low]]
            low -= 1
        if above <= below:
            votes += of_length[lengths[high]]
            high += 1
    return votes


def _kappa(pairs: Sequence[tuple[str, str]]) -> float:
    """Cohen's kappa of what is and what is said."""
    right = sum(answer == said for answer, said in pairs) / len(pairs)
    asked, told = (Counter(side) for side in zip(*pairs, strict=True))
    chance = sum(count * told[answer] for answer, count in asked.items()) / len(pairs) ** 2
    return (right - chance) / (1 - chance) if chance < 1 else 0.0


class _SampledRows:
    """Some rows of many, drawn by their numbers."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.whole = count <= MOST_ROWS
        self.rows: list[_AskedRow] = []

    def see(self, example: Example) -> None:
        drawn = self.whole or example.number * _GOLDEN % 2**32 * self.count < MOST_ROWS << 32
        if drawn and (row := _row_of(example)) is not None:
            self.rows.append(row)


@dataclass(frozen=True, kw_only=True, slots=True)
class _AskedRow:
    number: int
    question: str  # in lower case
    answer: str  # the same, without punctuation around it
    labelled: bool  # a classifier's
    length: int  # of the whole question, in characters
    capitals: int  # of a thousand letters
    spaces: int  # besides one between two words, and signs that can't be seen
    first: int = 0  # signs before the first letter, see _sign
    last: int = 0


@dataclass(frozen=True, kw_only=True)
class _AnswerPlace:
    """Where answers appear: after a mark, alone on a line, or else as the only label of a text."""

    mark: str = ""
    alone: bool = False
    unnamed: bool = False  # the mark is any two words, like "route to", and nothing says that an answer follows

    @property
    def fewest(self) -> float:
        """The least share of rows that it must give away."""
        return TOLD_SHARE if self.unnamed or self == _AnswerPlace() else SHARE

    @property
    def words(self) -> str:
        if self.mark:
            return f"behind “{' '.join(self.mark.split())}”"
        return "on a separate line" if self.alone else "as the only label there"


class _Side:
    """The sampled rows, either those to train on or those held out."""

    def __init__(self, sample: _SampledRows, title: str, labels: frozenset[str]) -> None:
        self.rows, self.labels = sample.rows, labels
        self._parts = False  # whether an answer's place holds a part of it
        self._about = f"{len(self.rows)}{'' if sample.whole else f' of {sample.count}'} rows {title}"

    def of_parts(self, part: Callable[[Sequence[_AskedRow]], Sequence[str]]) -> _Side:
        """These rows with a part of each answer in its place; without rows if hardly any has another part."""
        parts = part(self.rows)
        rows = [replace(row, answer=found) for row, found in zip(self.rows, parts, strict=True) if found]
        other = sum(bool(found) and found != row.answer for row, found in zip(self.rows, parts, strict=True))
        side = copy.copy(self)
        side._parts = True
        side.rows = rows if 2 * other >= len(self.rows) else []
        return side

    def share(self, rows: Sequence[_AskedRow]) -> str:
        return f"{100 * len(rows) / len(self.rows):.0f} % of {self._about}"

    @property
    def place(self) -> _AnswerPlace | None:
        """The place that gives away the most answers."""
        places: Counter[_AnswerPlace] = Counter()
        for row in self.rows:
            places.update({place for at in _standing(row.answer, row.question) for place in self._places(row, at)})
        if self.rows and self.rows[0].labelled:
            places[_AnswerPlace()] = sum(self._said(row, _AnswerPlace()) == [row.answer] for row in self.rows)
        for place, count in places.most_common(20):
            enough = max(FEWEST, place.fewest * len(self.rows))
            if count >= enough and self._agreement(place) >= AGREEMENT and not self._is_task(place):
                return place
        return None

    def given_by(self, place: _AnswerPlace) -> list[_AskedRow]:
        return [row for row in self.rows if row.answer in self._said(row, place)]

    def _places(self, row: _AskedRow, at: int) -> Iterator[_AnswerPlace]:
        """The kinds of place in which the answer appears there."""
        before = row.question[max(0, at - _SHOWN) : at]
        named = _NAMED.search(before)
        if named is None or (self._parts and named[1] not in _WORDS_FOR_IT):
            named = _IS.search(before)  # a part of an answer, like a number, follows other words by chance
        if named is not None:
            yield _AnswerPlace(mark=named[0])
        elif (option := _OPTION.search(before)) is not None:
            yield _AnswerPlace(mark=option[1])
        if row.answer not in self.labels:
            return
        if named is None and (words := _WORDS_BEFORE.search(before)) is not None:
            yield _AnswerPlace(mark=words[0], unnamed=True)
        end = at + len(row.answer)
        if (closing := _BRACKETS.get(before[-1:])) is not None and row.question[end : end + 1] == closing:
            yield _AnswerPlace(mark=before[-1])
        if row.answer in _lines(row.question):
            yield _AnswerPlace(alone=True)

    def _said(self, row: _AskedRow, place: _AnswerPlace) -> list[str]:
        """What a row has at each occurrence of a place: an answer, or nothing."""
        if place.alone:
            return [line for line in _lines(row.question) if line in self.labels]
        if not place.mark:
            found = {match[0] for match in self._any_label.finditer(row.question)}
            return list(found) if len(found) == 1 else []
        if (closing := _BRACKETS.get(place.mark)) is not None:
            held = re.findall(rf"{re.escape(place.mark)}([^\n]+?){re.escape(closing)}", row.question)
            return [text for text in held if text in self.labels]
        said = []
        for match in re.finditer(re.escape(place.mark), row.question):
            rest = row.question[match.end() :]
            if re.match(rf"{re.escape(row.answer)}(?!\w)", rest):
                said.append(row.answer)
            else:
                other = self._any_label.match(rest) if self.labels else None
                said.append(other[0] if other is not None else "")
        return said

    @cached_property
    def _any_label(self) -> re.Pattern[str]:
        longest_first = sorted(self.labels, key=lambda label: (-len(label), label))
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")

    def _agreement(self, place: _AnswerPlace) -> float:
        return _kappa([(row.answer, said) for row in self.rows for said in self._said(row, place)])

    def _is_task(self, place: _AnswerPlace) -> bool:
        """Whether answers at that place are what the rows ask for: a named part of the text, or all of it."""
        rows = self.given_by(place)
        if _copies(rows):
            return True
        if place.unnamed:
            asked = [re.compile(rf"\b{re.escape(word)}\b") for word in re.findall(r"\w{4,}", place.mark)]
            again = [any(len(word.findall(row.question)) > 1 for word in asked) for row in rows]
            return 2 * sum(again) >= len(rows)
        name = _NAMED.search(place.mark)
        if name is None or name[1] in _WORDS_FOR_IT:
            return False
        word = re.compile(rf"\b{re.escape(name[1])}s?\b")

        def is_part(row: _AskedRow) -> bool:
            """Whether it is asked for by name, a text, or what the text after the mark begins with."""
            named, text = len(word.findall(row.question)) > 1, len(row.answer.split()) > LABEL_WORDS
            goes_on = re.search(rf"{re.escape(place.mark + row.answer)}[ \t]+\w", row.question) is not None
            return named or text or (goes_on and not place.mark.endswith("="))

        return 2 * sum(map(is_part, rows)) >= len(rows)

    @property
    def task(self) -> Finding | None:
        """A note where many answers appear in their question for a good reason."""
        rows = [row for row in self.rows if next(_standing(row.answer, row.question), None) is not None]
        if len(rows) < max(FEWEST, TOLD_SHARE * len(self.rows)):
            return None
        if self.labels and 2 * sum(len(set(self._any_label.findall(row.question))) > 1 for row in rows) >= len(rows):
            taken = "next to other labels: taken for choices"
        elif _copies(rows):
            taken = "and little else: taken for copying"
        else:
            taken = "behind no mark: taken for extraction"
        text = f"{self.share(rows)} hold the answer in the question, {taken}"
        return Finding(level="note", kind="answers within questions", text=text, count=len(rows))


def _cores(rows: Sequence[_AskedRow]) -> list[str]:
    """The answers without the words that nearly all of them begin or end with."""
    answers = [row.answer for row in rows]
    for at, apart in ((0, str.split), (-1, str.rsplit)):
        for _ in range(_FRAME):  # long answers are not kept as words, which would take ten times the memory
            words = Counter(two[at].strip(_EDGES) for a in answers if len(two := apart(a, None, 1)) > 1)
            common = words.most_common(1)
            if not common or common[0][1] < _NEARLY_ALL * len(answers):
                break
            word = common[0][0]
            two_parts = ((a, apart(a, None, 1)) for a in answers)
            answers = [two[-1 - at] if len(two) > 1 and two[at].strip(_EDGES) == word else a for a, two in two_parts]
    return [answer.strip(_EDGES) for answer in answers]


def _last_numbers(rows: Sequence[_AskedRow]) -> list[str]:
    """The last number of each answer; empty without one."""
    return [(_NUMBER.findall(row.answer) or [""])[-1] for row in rows]


def _labels(rows: Sequence[_AskedRow]) -> frozenset[str]:
    """The answers where they are labels, else none."""
    counted = Counter(row.answer for row in rows)
    classifier = any(row.labelled for row in rows)
    return frozenset(counted) if classifier or shares_of(counted) is not None else frozenset()


def _given_away(place: _AnswerPlace, sides: Sequence[_Side]) -> Finding:
    found = [(side, side.given_by(place)) for side in sides]
    shares = " and ".join(side.share(rows) for side, rows in found if rows)
    first = next(row for _, rows in found for row in rows)
    text = f"{shares} hold the answer in the question, {place.words}: row {first.number} asks {_shown(first, place)}, "
    text += f"and its answer is “{first.answer[:_SHOWN]}”"
    hint = "remove it from the questions, unless reading it off is the task"
    count = max(len(rows) for _, rows in found)
    return Finding(level="warning", kind=GIVEN_AWAY, text=text, count=count, hint=hint)


def unquoted(text: str) -> str:
    """A finding's sentence without its quotes from the rows, for readers who may not see them."""
    return re.sub(r"( hold the answer in the question), .*: row \d+ asks “.*”", r"\1", text, flags=re.DOTALL)


def _row_of(example: Example) -> _AskedRow | None:
    """What a row asks and answers; None where it asks nothing, answers nothing, or answers what it asks."""
    answer = answer_of(example)
    if example.turns:
        last = example.answers[-1]
        answer = example.turns[last].content
        asked = "\n".join(turn.content for turn in example.turns[:last] if turn.role in ("system", "user"))
    else:
        asked = example.prompt if example.label is None else example.text
    length = len(asked)
    if length > MOST_CHARACTERS:
        asked = f"{asked[: MOST_CHARACTERS // 2]}\n{asked[-MOST_CHARACTERS // 2 :]}"
    question, answer = (_JOINED.sub(" ", text.lower()) for text in (asked, answer[-MOST_CHARACTERS:]))
    answer = answer.strip(_EDGES)
    if not question or not answer or question.strip(_EDGES) == answer:
        return None
    answer = _shortened(answer, question)
    labelled = example.label is not None
    letters = sum(map(str.isalpha, asked))
    return _AskedRow(
        number=example.number,
        question=question,
        answer=answer,
        labelled=labelled,
        length=length,
        capitals=1000 * sum(map(str.isupper, asked)) // max(1, letters),
        spaces=sum(c.isspace() or not c.isprintable() for c in asked) - len(asked.split()) + 1,
    )


def _shortened(answer: str, question: str) -> str:
    """An answer of many words by its ends and its last number, if neither it nor a core of it is in the question: a
    sample's long answers would take megabytes."""
    words = answer.split(None, _FRAME)
    ends = words.pop().rsplit(None, _FRAME) if len(words) > _FRAME else []
    if len(ends) <= _FRAME or ends[0] in question:
        return answer
    return " ".join([*words, "\0", *_NUMBER.findall(ends[0])[-1:], "\0", *ends[1:]])


def _standing(answer: str, question: str) -> Iterator[int]:
    """The first places where an answer appears in a question, outside of other words."""
    at, left = question.find(answer), _PLACES
    while at >= 0 and left:
        within = (question[at - 1 : at] + answer[0], question[at + len(answer) - 1 :][:2])
        if not any(len(pair) == 2 and pair.isalnum() for pair in within):
            left -= 1
            yield at
        at = question.find(answer, at + 1)


def _lines(question: str) -> list[str]:
    lines = question.split("\n")
    return [line.strip(_EDGES) for line in lines] if len(lines) > 1 else []


def _copies(rows: Sequence[_AskedRow]) -> bool:
    """Whether the questions differ in little besides their answers."""
    rests = {row.question.replace(row.answer, "") for row in rows}
    return len(rests) == 1 or 2 * len(rests) < len({row.answer for row in rows})


def _shown(row: _AskedRow, place: _AnswerPlace) -> str:
    at = row.question.find(f"{place.mark}{row.answer}") + len(place.mark)
    if not place.mark:
        at = next(_standing(row.answer, row.question))
    begin, end = max(0, at - _SHOWN), at + len(row.answer) + 8
    part = " ".join(row.question[begin:end].split())
    return f"“{'…' if begin else ''}{part}{'…' if end < len(row.question) else ''}”"
