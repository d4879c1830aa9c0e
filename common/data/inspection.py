"""A look at every row to train on: each finding that needs no tokenizer, in one pass and in little memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from loractl.common.verdict import MIN_CASES

from .examples import Example, Turn
from .findings import LABELS, Finding, about_rows, answer_of, number_rows, shares_of
from .giveaway import Giveaway
from .resemblance import Resemblance
from .rows import Told
from .split import Split

FEW_TRAINED = 20
"""With fewer rows a model learns them by heart."""

FEW_HELD_OUT = MIN_CASES
"""Below this the report gives no interval."""

FEW_OF_A_LABEL = 8
"""A label with fewer rows to train on is hardly learned: they say little about the next row."""

LOPSIDED = 0.9
"""From this share of one label on, a model that always gives this label looks good."""

ONE_SIDED = 0.75
"""From this share of pairs on, one answer's length says which one was chosen."""

SHORT_CHARACTERS = 2

SHOWN_PAIRS = 3

_MOJIBAKE = ("\ufffd", "Ã©", "Ã¨", "Ã¼", "Ã¶", "Ã¤", "Ã±", "â€™", "â€œ", "â€“")
"""UTF-8 that was once read as Latin-1, and what a decoder writes in place of what it can't read."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def check_examples(
    train: Sequence[Example],
    held_out: Sequence[Example],
    split: Split | None = None,
    told: Told | None = None,
    leaks: Leaks | None = None,
    final: Leaks | None = None,
    giveaway: Giveaway | None = None,
) -> list[Finding]:
    """Findings from the rows themselves, and about the held-out and final rows that a `split` left out.

    `told` is called with the number of rows looked at. Each row is looked at once, and only its digests are kept.
    Afterwards `leaks`, of the held-out rows, and `final`, of the final rows, know which of them are given away, and
    `giveaway` whether most held-out answers can be read off their questions.
    """
    leaks, labelled = leaks or Leaks(held_out), _Labelled(held_out)
    looks = (leaks, final) if final is not None else (leaks,)
    first = (_Repeated(), *looks, giveaway or Giveaway(len(train), held_out))
    then = (_Answers(), _Texts(), _Borders(), labelled, _Pairs())
    for count, example in enumerate(train):
        question = _prompt_hash(example) if _asks(example) else None
        for look in (*first, *then):
            look.see(example, question)
        if told is not None and count % 1000 == 0:
            told(count, len(train))
    findings = [*_counts(train, held_out, final), *(finding for look in first for finding in look.findings())]
    pairs = bool(train) and bool(train[0].rejected)
    findings += _held_back(split, pairs=pairs) if split is not None else []
    return findings + [finding for look in then for finding in look.findings()]


def _held_back(split: Split, *, pairs: bool) -> Iterator[Finding]:
    """`pairs`: rows with the same prompt are alike, whatever their answers are."""
    overlap, near, repeated = split.overlap, split.near, split.repeated
    of = "{its prompt is|their prompts are}" if pairs else "{it is|they are}"
    if overlap:
        text = f"{{n}} of the held-out file left out, because {of} trained on"
        text += f", {near} of them in another case or with other spaces" if near and not pairs else ""
        text = number_rows(text, overlap)
        yield Finding(level="warning", kind="overlap", text=text, count=overlap)
    again = "{is a duplicate|are duplicates}, apart from case and spaces"
    if repeated:
        text = "{n} held out {answers|answer} a prompt that is held out already: each prompt is measured once"
        text = text if pairs else f"{{n}} held out {again}: each row counts once"
        text = number_rows(text, repeated)
        yield Finding(level="warning", kind="repeated held-out rows", text=text, count=repeated)
    if overlap := split.final_overlap:
        text = number_rows(f"{{n}} of the final file left out, because {of} trained on or held out", overlap)
        yield Finding(level="warning", kind="overlap", text=text, count=overlap)
    if twice := split.final_repeated:
        again = "{answers|answer} a prompt that is among them already" if pairs else again
        text = number_rows(f"{{n}} of the final ones {again}", twice)
        yield Finding(level="warning", kind="repeated held-out rows", text=text, count=twice)


def _counts(train: Sequence[Example], held_out: Sequence[Example], final: Leaks | None) -> Iterator[Finding]:
    if len(train) < FEW_TRAINED:
        text = f"only {len(train)} row{'' if len(train) == 1 else 's'} to train on"
        yield Finding(level="warning", kind="few rows", text=text, count=len(train))
    if len(held_out) < FEW_HELD_OUT:
        text = f"only {len(held_out)} held out: too few for an interval around what the report measures"
        hint = f"hold out {FEW_HELD_OUT} or more: dataset.test_size or dataset.eval_path"
        yield Finding(level="note", kind="few held-out rows", text=text, count=len(held_out), hint=hint)
    if final is not None and len(final) < FEW_HELD_OUT:
        text = f"only {len(final)} final: too few for an interval around what is measured on them"
        hint = f"{FEW_HELD_OUT} or more: dataset.final_size or dataset.final_path"
        yield Finding(level="note", kind="few held-out rows", text=text, count=len(final), hint=hint)


class _Repeated:
    """Rows that occur several times, and prompts with several answers."""

    def __init__(self) -> None:
        self._rows = array("Q")  # digest after digest
        self._numbers = array("q")
        self._questions, self._answers, self._asked = array("Q"), array("Q"), array("q")

    def see(self, example: Example, question: int | None) -> None:
        self._rows.append(example.digest())
        self._numbers.append(example.number)
        if question is not None and not example.rejected:  # a prompt may have any number of pairs
            self._questions.append(question)
            self._answers.append(_digest(answer_of(example).strip()))
            self._asked.append(example.number)

    def findings(self) -> Iterator[Finding]:
        again = sorted(place for places in _equal(self._rows) for place in places[1:])
        repeated = [self._numbers[place] for place in again]
        yield from about_rows("warning", "duplicate rows", "{n} to train on {is a duplicate|are duplicates}", repeated)
        differing = sorted(
            self._asked[places[0]]
            for places in _equal(self._questions)
            if len({self._answers[place] for place in places}) > 1
        )
        text = "one prompt, several answers: {n} whose prompt appears again with another answer"
        yield from about_rows("warning", "contradicting answers", text, differing)


class Leaks:
    """Held-out rows that the model has seen, in part or nearly: they measure its memory. Final rows likewise."""

    def __init__(self, held_out: Sequence[Example], called: str = "held out") -> None:
        """`called`: the words after the number of rows, as in "3 rows held out"."""
        self._held_out, self._called = held_out, called
        self._alike = Resemblance(held_out)
        self._parts = {part for example in held_out for part in _answered(example.turns)}
        self._prompts = {_prompt_hash(example) for example in held_out if _asks(example)}
        self._trained_parts: set[int] = set()  # of those
        self._trained_prompts: set[int] = set()

    def see(self, example: Example, question: int | None) -> None:
        self._alike.see(example)
        self._trained_parts.update(part for part in _answered(example.turns) if part in self._parts)
        if question in self._prompts:
            self._trained_prompts.add(question)

    def see_all(self, examples: Iterable[Example]) -> None:
        for example in examples:
            self.see(example, _prompt_hash(example) if _asks(example) else None)

    @classmethod
    def of_final(cls, final: Sequence[Example] | None) -> Leaks | None:
        """Of a job's final rows, where it has some."""
        return None if final is None else cls(final, "of the final ones")

    def __len__(self) -> int:
        """The number of rows looked at."""
        return len(self._held_out)

    @property
    def rows(self) -> list[int]:
        """Their numbers."""
        return sorted({*self._alike.found, *itertools.chain(*self._seen())})

    def _seen(self) -> tuple[list[int], list[int]]:
        """Rows that begin with a trained conversation, and rows whose prompt alone is trained on."""
        partly, known = [], []
        for example in self._held_out:
            if any(part in self._trained_parts for part in _answered(example.turns)):
                partly.append(example.number)
            elif _asks(example) and _prompt_hash(example) in self._trained_prompts:
                known.append(example.number)
        return partly, known

    def findings(self) -> Iterator[Finding]:
        partly, known = self._seen()
        text = f"{{n}} {self._called} {{begins|begin}} with a conversation that is trained on"
        hint = "hold out whole conversations: dataset.eval_path"
        yield from about_rows("warning", "overlapping conversations", text, partly, hint)
        text = f"{{n}} {self._called} {{has|have}} a prompt that is trained on"
        yield from about_rows("warning", "overlapping prompts", text, known)
        alike = sorted(self._alike.found.keys() - {*partly, *known})
        pairs = ", ".join(f"{number} that of row {self._alike.found[number]}" for number in alike[:SHOWN_PAIRS])
        text = f"{{n}} {self._called} {{asks|ask}} the same as a row to train on, apart from some words, their order "
        text += f"or text around them: {pairs}{', ...' if len(alike) > SHOWN_PAIRS else ''}"
        hint = "hold out other rows with dataset.eval_path, or drop such rows"
        yield from about_rows("warning", "resembling rows", text, alike, hint)


class _Answers:
    """What the answers are like: one word again and again, or hardly there."""

    def __init__(self) -> None:
        self._counted: Counter[str] = Counter()  # until there are more than labels
        self._taught = 0
        self._short, self._echoed = array("q"), array("q")

    def see(self, example: Example, question: int | None) -> None:
        if not (example.turns or example.prompt):
            return
        self._taught += 1
        answer = answer_of(example).strip()
        if len(self._counted) <= LABELS:
            self._counted[answer] += 1
        if len(answer) <= SHORT_CHARACTERS:
            self._short.append(example.number)
        users = [turn.content for turn in example.turns if turn.role == "user"]
        if answer == (users[-1] if users else example.prompt).strip():
            self._echoed.append(example.number)

    def findings(self) -> Iterator[Finding]:
        if not self._taught:
            return
        labels = shares_of(self._counted)
        if len(self._counted) == 1 and self._taught > 1:
            text = f"every answer is the same: {_quoted(next(iter(self._counted)))}"
            yield Finding(level="warning", kind="one label only", text=text, count=self._taught)
        elif labels is not None:
            text = f"the answers look like {len(labels)} labels: {_shares(list(labels.items()))}"
            yield Finding(level="note", kind="labels", text=text, count=self._taught)
            if max(labels.values()) >= LOPSIDED:
                text = "one label is nearly all: a model that always answers it will look good"
                yield Finding(level="warning", kind="lopsided labels", text=text, count=self._taught)
        else:
            text = f"{{n}} with an answer of at most {SHORT_CHARACTERS} characters, among longer ones"
            yield from about_rows("warning", "short answers", text, self._short)
        yield from about_rows("warning", "echoed prompts", "{n} whose answer is the prompt again", self._echoed)


class _Labelled:
    """A classifier's labels: how often each is taught, and whether the report can say anything about it."""

    def __init__(self, held_out: Sequence[Example]) -> None:
        self._held_out = held_out
        self._rows: dict[str, array[int]] = defaultdict(lambda: array("q"))

    def see(self, example: Example, question: int | None) -> None:
        if example.label is not None:
            self._rows[example.label].append(example.number)

    def findings(self) -> Iterator[Finding]:
        rows = self._rows
        if not rows:
            return
        pairs = ((len(numbers), label) for label, numbers in rows.items())
        counts = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
        total = sum(n for n, _ in counts)
        shares = [(label, count / total) for count, label in counts]
        text = f"{len(counts)} labels: {_shares(shares)}"
        yield Finding(level="note", kind="labels", text=text, count=total)
        if shares[0][1] >= LOPSIDED:
            text = "one label is nearly all: a model that always answers it will look good"
            yield Finding(level="warning", kind="lopsided labels", text=text, count=total)
        rare = {label: count for count, label in counts if count < FEW_OF_A_LABEL}
        listed = ", ".join(f"{_quoted(label)} {count}" for label, count in list(rare.items())[:6])
        text = f"{{n}} of labels with fewer than {FEW_OF_A_LABEL} of them: {listed}{', ...' if len(rare) > 6 else ''}"
        numbers = sorted(number for label in rare for number in rows[label])
        hint = "add rows of them, or join them with another label"
        yield from about_rows("warning", "rare labels", text, numbers, hint)
        unseen = sorted(rows.keys() - {example.label for example in self._held_out})
        if unseen and self._held_out:
            names = ", ".join(map(_quoted, unseen[:6])) + (", ..." if len(unseen) > 6 else "")
            what = f"{len(unseen)} of {len(rows)} labels have no row held out"
            text = f"{what}, so the report can't say how they do: {names}"
            yield Finding(level="note", kind="labels not held out", text=text, count=len(unseen))


class _Pairs:
    """What besides quality separates a pair's chosen answer from the rejected one, and pairs that contradict others."""

    def __init__(self) -> None:
        self._longer = self._shorter = 0
        self._numbers = array("q")
        self._both, self._first = array("Q"), array("Q")  # digests of a prompt with both answers, with the chosen one

    def see(self, example: Example, question: int | None) -> None:
        if not example.rejected:
            return
        chosen, rejected = (one.said for one in example.sides)
        self._longer += len(chosen) > len(rejected)
        self._shorter += len(chosen) < len(rejected)
        prompt = example.likeness()
        sides = [_digest(f"{prompt} {answer}") for answer in (chosen, rejected)]
        self._numbers.append(example.number)
        self._both.append(sides[0] ^ sides[1])
        self._first.append(sides[0])

    def findings(self) -> Iterator[Finding]:
        pairs = len(self._numbers)
        most, word = max((self._longer, "longer"), (self._shorter, "shorter"))
        if pairs >= FEW_TRAINED and most >= ONE_SIDED * pairs:
            text = f"chosen is {word} in {100 * most / pairs:.0f} % of pairs: the model may learn length"
            yield Finding(level="warning", kind="length bias", text=text, count=most)
        swapped = [places for places in _equal(self._both) if len({self._first[place] for place in places}) > 1]
        numbers = sorted(self._numbers[place] for places in swapped for place in places)
        text = "{n} whose rejected answer another row of the same prompt has as the chosen one, and the other way round"
        yield from about_rows("warning", "contradicting answers", text, numbers)


def _shares(shares: Sequence[tuple[str, float]]) -> str:
    """The labels with their shares, the first six of them."""
    listed = ", ".join(f"{_quoted(label)} {100 * share:.0f} %" for label, share in shares[:6])
    return listed + (f", and {len(shares) - 6} more" if len(shares) > 6 else "")


class _Texts:
    """Text that is damaged or missing."""

    def __init__(self) -> None:
        self._damaged, self._hidden, self._blank, self._padded, self._after = (array("q") for _ in range(5))

    def see(self, example: Example, question: int | None) -> None:
        for part in _parts(example):
            if any(mark in part for mark in _MOJIBAKE):
                self._damaged.append(example.number)
                break
        if any(map(_CONTROL.search, _parts(example))):
            self._hidden.append(example.number)
        if any(turn.role == "user" and not turn.content.strip() for one in example.sides for turn in one.turns):
            self._blank.append(example.number)
        if (example.turns or example.prompt) and any(answer_of(one)[-1:].isspace() for one in example.sides):
            self._padded.append(example.number)
        if any(one.turns and one.answers[-1] + 1 < len(one.turns) for one in example.sides):
            self._after.append(example.number)

    def findings(self) -> Iterator[Finding]:
        hint = "the file was decoded with a wrong encoding earlier"
        text = "{n} with characters of a wrong encoding"
        yield from about_rows("warning", "damaged text", text, self._damaged, hint)
        yield from about_rows("warning", "control characters", "{n} with control characters", self._hidden)
        yield from about_rows("warning", "empty questions", "{n} with an empty user message", self._blank)
        text = "{n} with an answer that ends in space, which is learned"
        yield from about_rows("note", "trailing space", text, self._padded)
        text = "{n} whose last message is no answer to learn: what follows the last answer is not used"
        yield from about_rows("warning", "after the last answer", text, self._after)


_CLOSES = ".,;:?!)]"
"""Characters that end a word or a sentence and have a space after them."""


def _is_wide(character: str) -> bool:
    """Whether it is of a script without spaces, as Chinese is (Unicode's East Asian Width)."""
    return unicodedata.east_asian_width(character) in ("W", "F")


class _Borders:
    """Prompt and completion are joined as they are."""

    def __init__(self) -> None:
        self._spaced, self._glued = array("q"), array("q")
        self._pairs = False

    def see(self, example: Example, question: int | None) -> None:
        if not example.prompt:
            return
        self._pairs = self._pairs or bool(example.rejected)
        last, begun = example.prompt[-1], [one.text[len(one.prompt)] for one in example.sides]
        if last == " " and not all(map(str.isspace, begun)):
            self._spaced.append(example.number)
        closed = (last.isalnum() or last in _CLOSES) and not _is_wide(last)
        if closed and any(first.isalnum() and not _is_wide(first) for first in begun):
            self._glued.append(example.number)

    def findings(self) -> Iterator[Finding]:
        text = "{n} whose prompt ends in a space"
        hint = "most tokenizers put a word's space before it"
        hint += ": let the prompt end without, and the completion begin with one"
        yield from about_rows("warning", "space before the answer", text, self._spaced, hint)
        text = f"{{n}} whose prompt and {'answers' if self._pairs else 'completion'} run together without a space"
        hint = "nothing is put between them: begin the completion with a space, or use instruction and output instead, "
        hint += "like dataset.columns: {instruction: question, output: answer}"
        if self._pairs:
            hint = "plain text is joined as it is: begin the answers with a space; for the model's chat template "
            hint += "call the prompt instruction, with dataset.columns: {instruction: prompt}"
        yield from about_rows("warning", "words run together", text, self._glued, hint)


def _equal(digests: array[int]) -> Iterator[list[int]]:
    """The places of each digest that occurs several times, ascending."""
    order = sorted(range(len(digests)), key=digests.__getitem__)
    for _, places in itertools.groupby(order, key=digests.__getitem__):
        if len(same := list(places)) > 1:
            yield same


def _digest(text: str) -> int:
    """64 bits of a text's hash."""
    return _short(hashlib.sha256(text.encode("utf-8", "surrogatepass")))


def _short(running: hashlib._Hash) -> int:
    return int.from_bytes(running.digest()[:8], "big")


def _answered(turns: Sequence[Turn]) -> Iterator[int]:
    """A hash for each beginning of a conversation that ends in an answer."""
    running = hashlib.sha256()
    for turn in turns:
        running.update(json.dumps([turn.role, turn.content, *turn.apart]).encode())
        if turn.role == "assistant":
            yield _short(running)


def _asks(example: Example) -> bool:
    """Whether a part of the row is given and not learned."""
    return bool(example.turns or example.prompt or example.label is not None)


def _prompt_hash(example: Example) -> int:
    if not example.turns:
        return _digest(example.prompt if example.label is None else example.text)
    asked = example.turns[: example.answers[-1]]
    tools = [example.tools] if example.tools else []
    return _digest(json.dumps([*((t.role, t.content, *t.apart) for t in asked), *tools]))


def _parts(example: Example) -> Iterator[str]:
    for side in example.sides:
        yield from (turn.said for turn in side.turns)
        yield side.text


def _quoted(text: str) -> str:
    text = " ".join(text.split())
    return f"“{text[:40]}{'…' if len(text) > 40 else ''}”"
