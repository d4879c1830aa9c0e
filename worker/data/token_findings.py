"""Findings about a job's data after the tokenizer and the chat template: one finding per kind.

common/data/inspection.py has what the rows show without a tokenizer.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loractl.common.data.examples import Example
from loractl.common.data.findings import SHOWN_ROWS, Finding, Level, about_rows
from loractl.common.job.sections import DataFormat, Overflow
from loractl.common.job.spec import JobSpec
from loractl.common.memory.config import find_config

from .row_forms import form_of
from .tokens import APART, IGNORED, TokenRow, encode, rendered, rendered_answers, thought_and_answer, with_thought

FEW_STEPS = 10
"""Fewer optimizer steps than this hardly move an adapter."""


class TemplateLook:
    """Looks for messages and names that the chat template leaves out, for answers of pairs that are not learned, and
    for text that the tokenizer takes for its own special tokens."""

    def __init__(self, tokenizer: Any, most: int | None = None) -> None:
        """`most`: the most rows to render; None: all."""
        self._tokenizer, self._most, self._seen = tokenizer, most, 0
        self._marks = [mark for mark in tokenizer.all_special_tokens if len(mark) > 2]
        self._marked = array("q")
        self._dropped: dict[str, array[int]] = {}
        self._nameless, self._given = array("q"), array("q")

    def see(self, example: Example) -> None:
        if any(mark in part for mark in self._marks for part in _said(example)):
            self._marked.append(example.number)
        self._seen += 1
        if not example.turns or (self._most is not None and self._seen > self._most):
            return
        try:
            roles = {role for side in example.sides for role in self._left_out(side)}
            nameless = any(map(self._drops_names, example.sides))
            several = [side for side in example.sides if len(side.answers) > 1] if example.rejected else []
            given = any(len(encode(side, self._tokenizer, DataFormat.PREFERENCE)) > 1 for side in several)
        except ValueError:
            return  # encoding reports it
        for numbers, is_so in ((self._nameless, nameless), (self._given, given)):
            if is_so:
                numbers.append(example.number)
        for role in roles:
            self._dropped.setdefault(role, array("q")).append(example.number)

    def _left_out(self, example: Example) -> set[str]:
        """Roles with a message that does not appear unchanged in the text. Raises ValueError."""
        text = rendered(example, self._tokenizer)
        shown = example.turns[: example.answers[-1] + 1]  # nothing after the last answer is rendered, see _Texts
        turns = [(turn.role, part) for turn in shown for part in (turn.content, turn.thought)]
        roles = {role for role, part in turns if part.strip() not in text}
        if "assistant" in roles:  # each answer may have its own row, with its thought written differently
            said = [with_thought(example.turns[place]) for place in example.answers]
            rendered_as = map("".join, map(str.split, rendered_answers(example, self._tokenizer)))
            parts = ("".join(part.split()) for content in said for part in thought_and_answer(content))
            pairs = zip(parts, (text for text in rendered_as for _ in range(2)), strict=True)
            if all(part in answer for part, answer in pairs):
                roles.discard("assistant")
        return roles

    def _drops_names(self, example: Example) -> bool:
        """Whether a message has a name that changes nothing of what the template writes."""
        if not any(turn.name for turn in example.turns):
            return False
        bare = replace(example, turns=tuple(replace(turn, name="") for turn in example.turns))
        return rendered(example, self._tokenizer) == rendered(bare, self._tokenizer)

    def findings(self) -> list[Finding]:
        hint = "the tokenizer ends or begins a message there; remove them"
        text = "{n} with a special token within the text"
        findings = about_rows("warning", "special tokens in text", text, self._marked, hint)
        some = "" if self._most is None or self._seen <= self._most else f" of the first {self._most}"
        for role, numbers in self._dropped.items():
            text = f"{{n}}{some} whose {role} message the model's chat template leaves out or changes"
            findings += about_rows("warning", f"dropped {role} message", text, numbers)
        text = f"{{n}}{some} with a name that the model's chat template leaves out"
        hint = "write it into the content, if the model should know who speaks"
        findings += about_rows("note", "dropped names", text, self._nameless, hint)
        text = f"{{n}}{some} with several answers on a side; only the last is learned, {APART}"
        hint = "what differs before it is context; give each answer a pair of its own"
        return findings + about_rows("warning", "answers that are context", text, self._given, hint)


class TokenLook:
    """Looks at the rows of each example, and keeps two numbers and any problems of each row."""

    def __init__(self, spec: JobSpec, tokenizer: Any) -> None:
        self._spec, self._tokenizer = spec, tokenizer
        self.max_length = spec.dataset.max_length
        self._room = context_length(spec.base_model)
        self.lengths = array("L")  # tokens of each row, before it is cut or left out; for a pair, of its longer half
        self._tokens = self._cut = 0  # of all texts, before they are cut, and beyond max_length
        # of the rows used: their numbers, tokens and learned tokens
        self.numbers, self.used, self.learned = array("q"), array("L"), array("L")
        self.left_out = 0  # examples
        self._apart = array("q")
        self._doubled, self._open_ended, self._strange = array("q"), array("q"), array("q")
        self._beyond, self._long_answers = array("q"), array("q")
        self._too_long, self._empty, self._untaught = array("q"), array("q"), array("q")
        self._given = False  # some tokens are not learned

    def see(self, rows: Sequence[TokenRow]) -> None:
        """The rows of one example."""
        number, most, form = rows[0].number, self.max_length, form_of(self._spec.dataset.format)
        self.lengths.extend(form.length(row) for row in rows)
        sizes = [len(text.input_ids) for row in rows for text in form.texts(row)]
        self._tokens += sum(sizes)
        self._cut += sum(size - most for size in sizes if size > most)
        if any(form.length(row) > most for row in rows):
            self._too_long.append(number)
            if self._spec.dataset.on_overflow is Overflow.DROP:
                self.left_out += 1
                return
        if len(rows) > 1:
            self._apart.append(number)
        for row in rows:
            self.numbers.append(number)
            self.used.append(len(row.input_ids))
            self.learned.append(learned_tokens(row))
        texts = [text for row in rows for text in form.texts(row)]
        found = [numbers for text in texts for numbers, is_so in self._faults(text) if is_so]
        for numbers in (self._doubled, self._open_ended, self._strange, self._beyond, self._long_answers):
            if any(numbers is one for one in found):
                numbers.append(number)
        if not any(form.teaches(form.shortened(row, most)) for row in rows):
            (self._empty if any(map(form.teaches, rows)) else self._untaught).append(number)

    def _faults(self, row: TokenRow) -> list[tuple[array[int], bool]]:
        """Where to note a row, and whether to."""
        ids, labels, most, tokenizer = row.input_ids, row.labels, self.max_length, self._tokenizer
        bos, eos, unknown = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
        learned = learned_tokens(row)
        self._given = self._given or IGNORED in labels[1:]
        known = unknown in (None, bos, eos, tokenizer.pad_token_id)
        return [
            (self._doubled, bos is not None and ids[:2] == [bos, bos] and bos != eos),
            (self._open_ended, bool(learned) and eos not in labels[:most]),
            (self._strange, not known and unknown in ids[:most]),
            (self._beyond, self._room is not None and len(ids) > self._room),
            (self._long_answers, _last_answer(row) > self._spec.evaluation.max_new_tokens),
        ]

    def findings(self, *, every: bool = True) -> list[Finding]:
        """What the token ids show. `every`: these are all the rows, so that steps can be counted."""
        spec, findings = self._spec, self._marks()
        if self._room is not None and spec.dataset.max_length > self._room:
            text = f"{{n}} of more tokens than the model's {self._room} positions"
            hint = f"dataset.max_length: {self._room}"
            findings += about_rows("warning", "beyond the context", text, self._beyond, hint)
        if spec.evaluation.samples and self._given and 20 * len(self._long_answers) > len(self.numbers):
            generated = spec.evaluation.max_new_tokens
            text = f"{{n}} with an answer longer than evaluation.max_new_tokens ({generated}): the report will cut it"
            findings += about_rows("note", "answers longer than generated", text, self._long_answers)
        if every and self._apart:
            rows = Counter(self.numbers)
            text = f"{{n}} as {sum(rows[number] for number in self._apart)} rows, {APART}"
            findings += about_rows("note", "a row for each answer", text, self._apart)
        return findings + (_few_steps(len(self.numbers), spec) if every else [])

    def _marks(self) -> list[Finding]:
        """The tokenizer's own special tokens: a row's beginning, its end, and unknown text."""
        hint = "take it out of the text: the tokenizer puts one there"
        text = "{n} beginning with two BOS tokens"
        findings = about_rows("warning", "doubled BOS", text, self._doubled, hint)
        text = "{n} where no end-of-sequence token is learned: the model will not know where to stop"
        findings += about_rows("warning", "EOS is not learned", text, self._open_ended)
        text = "{n} with characters that the tokenizer does not know"
        return findings + about_rows("warning", "unknown tokens", text, self._strange)

    def length_findings(self, held_out: TokenLook, final: TokenLook) -> list[Finding]:
        """The effect of dataset.max_length on the rows, and on the held-out or final rows of other looks."""
        looks = (self, held_out, final)
        dataset, lengths = self._spec.dataset, [length for look in looks for length in look.lengths]
        untaught = tuple(look._untaught for look in looks)
        text = f"{{n}} with no {form_of(dataset.format).lesson} to learn, as the model's template and tokenizer show it"
        unfit = _about_each("error", "no learned token", text, untaught)
        most, too_long = dataset.max_length, tuple(look._too_long for look in looks)
        hint = f"dataset.max_length: {max(lengths, default=0)} would hold them all"
        if dataset.on_overflow is Overflow.ERROR:
            text = f"{{n}} of more than dataset.max_length ({most}) tokens"
            return unfit + _about_each("error", "too long", text, too_long, hint)
        if dataset.on_overflow is Overflow.DROP:
            text = f"{{n}} left out, with more than dataset.max_length ({most}) tokens"
            return unfit + _about_each("warning", "too long, left out", text, too_long, hint)
        empty = tuple(look._empty for look in looks)
        text = f"{{n}} with no {form_of(dataset.format).lesson} to learn within dataset.max_length ({most})"
        findings = unfit + _about_each("error", "no learned token", text, empty, hint)
        cut = [sorted(set(numbers) - set(untaught)) for numbers, untaught in zip(too_long, empty, strict=True)]
        share = 100 * sum(look._cut for look in looks) / max(1, sum(look._tokens for look in looks))
        taken = f"{share:.0f}" if share >= 1 else "less than 1"
        text = f"{{n}} cut at dataset.max_length ({most}), which takes {taken} % of all tokens"
        return findings + _about_each("warning", "cut rows", text, cut, hint)


def _about_each(
    level: Level, kind: str, text: str, sides: Sequence[Sequence[int]], hint: str | None = None
) -> list[Finding]:
    """A finding about rows to train on, held out and final; it lists the first rows to train on, if any."""
    trained, held_out, final = sides
    text += f", {len(held_out)} of them held out" if held_out else ""
    text += f", {len(final)} of them final" if final else ""
    found = about_rows(level, kind, text, [*trained, *held_out, *final], hint)
    return [replace(finding, rows=tuple((trained or held_out or final)[:SHOWN_ROWS])) for finding in found]


def _few_steps(rows: int, spec: JobSpec) -> list[Finding]:
    batch = spec.training.effective_batch
    steps = int(-(-rows // batch) * (spec.training.num_train_epochs or 1))
    if spec.training.max_steps is not None or steps >= FEW_STEPS:
        return []
    text = f"only {steps} optimizer step{'' if steps == 1 else 's'}: {rows} rows, {batch} a step"
    hint = "lower training.gradient_accumulation_steps, or train more epochs"
    return [Finding(level="warning", kind="few steps", text=text, hint=hint)]


def context_length(base_model: str) -> int | None:
    """The positions for which a model in a folder or the local cache was made; None if its config does not say."""
    path = find_config(base_model)
    if path is None:
        return None
    config = json.loads(Path(path).read_text("utf-8"))
    config = config.get("text_config", config)
    positions = next((config[k] for k in ("max_position_embeddings", "n_positions") if config.get(k)), None)
    return int(positions) if positions else None


def learned_tokens(row: TokenRow) -> int:
    return sum(label != IGNORED for label in row.labels)


def _last_answer(row: TokenRow) -> int:
    """Tokens of the last learned stretch, without a prompt that is learned as well."""
    count = 0
    for label in reversed(row.labels):
        if label == IGNORED and count:
            break
        count += label != IGNORED
    return min(count, len(row.labels) - row.asked)


def _said(example: Example) -> list[str]:
    return [part for side in example.sides for part in ([turn.said for turn in side.turns] or [side.text])]
