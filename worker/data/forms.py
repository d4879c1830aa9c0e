"""How examples of a format become rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loractl.common.data.example import Example
from loractl.common.job.sections import DataFormat

from .tokens import IGNORED, TokenRow, cut, encode, teaches


class RowForm:
    """Conversations, and texts of which all or the end is learned."""

    def __init__(self, format: DataFormat) -> None:
        self._format = format

    def encode(self, example: Example, tokenizer: Any) -> list[TokenRow]:
        """The rows of one example, uncut. Raises ValueError for one that can't be."""
        return encode(example, tokenizer, self._format)

    def cut(self, row: TokenRow, example: Example, tokenizer: Any, most: int) -> TokenRow:
        """The row of an example as at most so many tokens."""
        return cut(row, most)

    def teaches(self, row: TokenRow) -> bool:
        """Whether anything of it is learned."""
        return teaches(row)


class LabelledForm(RowForm):
    """Texts of which the label is learned and no token."""

    def encode(self, example: Example, tokenizer: Any) -> list[TokenRow]:
        ids = list(tokenizer(example.text).input_ids)
        if not ids:
            raise ValueError("has a text that the model's tokenizer turns into no token")
        return [TokenRow(number=example.number, input_ids=ids, labels=[IGNORED] * len(ids))]

    def cut(self, row: TokenRow, example: Example, tokenizer: Any, most: int) -> TokenRow:
        # as its users will cut it: some tokenizers close each text
        ids = list(tokenizer(example.text, truncation=True, max_length=most).input_ids)
        return replace(row, input_ids=ids, labels=[IGNORED] * len(ids))

    def teaches(self, row: TokenRow) -> bool:
        return True


_FORMS: Mapping[DataFormat, RowForm] = {
    **{format: RowForm(format) for format in DataFormat},
    DataFormat.CLASSIFICATION: LabelledForm(DataFormat.CLASSIFICATION),
}


def form_of(format: DataFormat) -> RowForm:
    """How a format's examples become rows."""
    return _FORMS[format]
