"""One row as the trainer sees it: its tokens, and which of them are learned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from loractl.common.data.fields import SIDES
from loractl.common.errors import DataError, UsageError
from loractl.common.job.kinds import PAIRS
from loractl.common.job.sections import BadRow
from loractl.common.job.spec import JobSpec

from .origin import dataset_hash
from .prepared import PreparedData, prepare_data
from .row_forms import form_of
from .tokens import IGNORED, TokenRow


@dataclass(frozen=True, kw_only=True)
class TrainedRow:
    """An example to train on as its rows, usually one, with its data."""

    rows: list[TokenRow]
    data: PreparedData

    def as_json(self) -> dict[str, Any]:
        """The row for programs. `label`: of a classifier. `chosen`, `rejected`: of a pair. `rows`: of a conversation
        with several."""
        first = self.rows[0]
        if self.data.format in PAIRS:
            texts = form_of(self.data.format).texts(first)
            halves = {side: _told(text) for side, text in zip(SIDES, texts, strict=True)}
            return {"row": first.number, **halves, "data": self.data.facts()}
        told = list(map(_told, self.rows))
        label = {} if first.label is None else {"label": self.data.label_names[first.label]}
        shown = told[0] if len(told) == 1 else {"rows": told}
        return {"row": first.number, **shown, **label, "data": self.data.facts()}


def _told(row: TokenRow) -> dict[str, Any]:
    return {"input_ids": row.input_ids, "learned": [label != IGNORED for label in row.labels]}


def trained_row(spec: JobSpec, tokenizer: Any, number: int | None) -> TrainedRow:
    """The row with this number, or for None the first row to train on. Raises DataError, UsageError."""
    dataset = spec.dataset
    more = [source.path for source in dataset.more]
    given = (dataset.path, dataset.eval_path, dataset_hash(dataset.path), tokenizer, None, more)
    prepare = partial(prepare_data, final_path=dataset.final_path)
    try:
        data = prepare(dataset, *given)
    except DataError as error:
        if number is None or error.row is None or error.row == number:
            raise
        data = prepare(dataset.model_copy(update={"on_bad_row": BadRow.DROP}), *given)  # another row may be bad
    rows = data.train.rows
    wanted = rows[0].number if number is None else number
    found = next((of for of in rows.by_example() if of[0].number == wanted), None)
    if found is None:
        raise UsageError(
            f"row {number} is not trained on",
            f"rows of {', '.join([dataset.path, *more])} that are: {rows[0].number} to {rows[-1].number}, less those "
            "held out or left out",
        )
    return TrainedRow(rows=found, data=data)
