"""One row as the trainer sees it: its tokens, and which of them are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loractl.common.errors import UsageError
from loractl.common.job.spec import JobSpec

from .origin import dataset_hash
from .prepared import PreparedData, prepare_data
from .tokens import IGNORED, TokenRow


@dataclass(frozen=True, kw_only=True)
class TrainedRow:
    """A row to train on, with the data that it belongs to."""

    row: TokenRow
    data: PreparedData

    def as_json(self) -> dict[str, Any]:
        """The row for programs. `label` is a classifier's alone."""
        row = self.row
        learned = [label != IGNORED for label in row.labels]
        label = {} if row.label is None else {"label": self.data.label_names[row.label]}
        return {
            "row": row.number, "input_ids": row.input_ids, "learned": learned, **label, "data": self.data.facts(),
        }  # fmt: skip


def trained_row(spec: JobSpec, tokenizer: Any, number: int | None) -> TrainedRow:
    """The row of this number, or with None the first that is trained on. Raises DataError, UsageError."""
    dataset = spec.dataset
    data = prepare_data(dataset, dataset.path, dataset.eval_path, dataset_hash(dataset.path), tokenizer, None)
    rows = data.train.rows
    row = rows[0] if number is None else next((row for row in rows if row.number == number), None)
    if row is None:
        raise UsageError(
            f"row {number} is not trained on",
            f"rows of {dataset.path} that are: {rows[0].number} to {rows[-1].number}, less those held out",
        )
    return TrainedRow(row=row, data=data)
