"""How examples of each format become rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loractl.common.data.examples import Example
from loractl.common.job.sections import DataFormat

from .token_rows import TokenRows
from .tokens import IGNORED, TokenRow, asked_in, cut, encode, teaches, texts_of


class RowForm:
    """Conversations and texts. Either all of a text is learned, or only what follows its prompt."""

    lesson = "token"
    """What is missing from a row that was cut too early."""

    def __init__(self, format: DataFormat) -> None:
        self._format = format

    def encode(self, example: Example, tokenizer: Any) -> list[TokenRow]:
        """The rows of one example, uncut. Raises ValueError for one that can't be."""
        return encode(example, tokenizer, self._format)

    def cut(self, row: TokenRow, example: Example, tokenizer: Any, most: int) -> TokenRow:
        """The example's row with each text cut to `most` tokens."""
        return self.shortened(row, most)

    def shortened(self, row: TokenRow, most: int) -> TokenRow:
        """The first tokens of the row's texts."""
        return cut(row, most)

    def texts(self, row: TokenRow) -> tuple[TokenRow, ...]:
        """The row's separate texts. dataset.max_length applies to each of them."""
        return (row,)

    def teaches(self, row: TokenRow) -> bool:
        """Whether anything can be learned from it."""
        return all(map(teaches, self.texts(row)))

    def length(self, row: TokenRow) -> int:
        """Tokens of its longest text."""
        return max(len(text.input_ids) for text in self.texts(row))


class LabelledForm(RowForm):
    """Texts whose label is learned, but none of their tokens."""

    def encode(self, example: Example, tokenizer: Any) -> list[TokenRow]:
        ids = list(tokenizer(example.text).input_ids)
        if not ids:
            raise ValueError("has a text that the model's tokenizer turns into no token")
        return [TokenRow(number=example.number, input_ids=ids, labels=[IGNORED] * len(ids))]

    def cut(self, row: TokenRow, example: Example, tokenizer: Any, most: int) -> TokenRow:
        # cut like its users' texts: some tokenizers close each text
        ids = list(tokenizer(example.text, truncation=True, max_length=most).input_ids)
        return replace(row, input_ids=ids, labels=[IGNORED] * len(ids))

    def teaches(self, row: TokenRow) -> bool:
        return True


class PairForm(RowForm):
    """Pairs. Both answers are in one row, each after its own copy of the prompt, so nothing can separate them. The
    chosen answer comes first; the rejected one begins at the row's only `start`."""

    lesson = "difference between two answers"

    def encode(self, example: Example, tokenizer: Any) -> list[TokenRow]:
        chosen, rejected = (encode(one, tokenizer, self._format)[-1] for one in example.sides)
        return [_pair_of(chosen, rejected)]

    def shortened(self, row: TokenRow, most: int) -> TokenRow:
        chosen, rejected = self.texts(row)
        return _pair_of(cut(chosen, most), cut(rejected, most))

    def texts(self, row: TokenRow) -> tuple[TokenRow, ...]:
        chosen, rejected = texts_of(row)
        return chosen, rejected

    def teaches(self, row: TokenRow) -> bool:
        chosen, rejected = self.texts(row)
        # answers may begin alike and be cut there, or differ only in what the template removes, like a space
        return super().teaches(row) and chosen.input_ids != rejected.input_ids


def _pair_of(chosen: TokenRow, rejected: TokenRow) -> TokenRow:
    return TokenRow(
        number=chosen.number,
        input_ids=[*chosen.input_ids, *rejected.input_ids],
        labels=[*chosen.labels, IGNORED, *rejected.labels[1:]],  # nothing precedes the first token of a text
        starts=(len(chosen.input_ids),),
    )


def with_prompts(rows: Sequence[TokenRow]) -> TokenRows:
    """The same pairs, with the chosen answer's prompt learned as well."""
    return TokenRows.of(map(with_prompt, rows))


def with_prompt(row: TokenRow) -> TokenRow:
    """One of them."""
    asked = asked_in(row)
    return replace(row, labels=[IGNORED, *row.input_ids[1:asked], *row.labels[max(1, asked) :]], asked=asked)


_FORMS: Mapping[DataFormat, RowForm] = {
    **{format: RowForm(format) for format in DataFormat},
    DataFormat.CLASSIFICATION: LabelledForm(DataFormat.CLASSIFICATION),
    DataFormat.PREFERENCE: PairForm(DataFormat.PREFERENCE),
    DataFormat.PREFERENCE_TEXT: PairForm(DataFormat.PREFERENCE_TEXT),
}


def form_of(format: DataFormat) -> RowForm:
    """How a format's examples become rows."""
    return _FORMS[format]
