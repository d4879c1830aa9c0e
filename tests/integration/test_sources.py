"""Several data sets in one job, from its rows to its report; a split means what the datasets library means by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.errors import DataError
from loractl.common.job.sections import DatasetSpec
from loractl.common.job.slices import parse_split
from loractl.worker.base.model import load_tokenizer
from loractl.worker.data.prepared import PreparedData, prepare_data

from ..models import write_helpdesk

BOUND = st.none() | st.integers(-40, 40)


@given(BOUND, BOUND, st.booleans(), st.integers(0, 60))
def test_a_slice_has_the_rows_that_datasets_takes(first: int | None, end: int | None, percent: bool, rows: int) -> None:
    from datasets.arrow_reader import ReadInstruction

    sign = "%" if percent else ""
    split = f"train[{'' if first is None else f'{first}{sign}'}:{'' if end is None else f'{end}{sign}'}]"
    (part,) = parse_split(split)
    (there,) = ReadInstruction.from_spec(split).to_absolute({"train": rows})
    assert list(part.places(rows)) == list(range(there.from_, there.to))


def pairs(path: Path, count: int) -> Path:
    rows = [
        {"question": f"What is {n} and {n}?", "said": f"It is {2 * n}." * (20 if n == 77 else 1)} for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def prepared(tiny_model: Path, tmp_path: Path) -> Callable[..., PreparedData]:
    """Prepare the help desk's rows and those of a second file."""
    main, other = write_helpdesk(tmp_path / "a.jsonl", 40), pairs(tmp_path / "b.jsonl", 100)
    more = {"path": str(other), "columns": {"instruction": "question", "output": "said"}}

    def prepare(share: float | None = None, cache: Path | None = None, **keys: object) -> PreparedData:
        dataset = DatasetSpec.model_validate({"path": str(main), "more": [{**more, "share": share}], **keys})
        return prepare_data(dataset, str(main), None, None, load_tokenizer(str(tiny_model)), cache, [str(other)])

    return prepare


@pytest.mark.long
def test_rows_of_both_files_are_trained_on_and_held_out_and_the_report_says_how_many(
    prepared: Callable[..., PreparedData], tmp_path: Path
) -> None:
    data = prepared(0.5, tmp_path / "cache", test_size=0.2)
    facts = data.facts()
    assert facts["train_rows"] + facts["held_out_rows"] == 80
    (told,) = facts["sources"]
    assert told.startswith("40 rows of a.jsonl (") and ", 40 of the 100 rows of b.jsonl (" in told
    assert "row 1 of b.jsonl is row 1001 here" in told
    numbers = set(data.train.rows.numbers) | set(data.held_out.rows.numbers)
    assert len(numbers) == 80 and max(numbers) > 1000
    again = prepared(0.5, tmp_path / "cache", test_size=0.2)
    assert again.digest == data.digest == prepared(0.5, test_size=0.2).digest
    assert prepared(0.4, test_size=0.2).digest != data.digest


def test_a_split_and_that_of_the_held_out_file_are_what_is_read(tiny_model: Path, tmp_path: Path) -> None:
    main, held = str(write_helpdesk(tmp_path / "a.jsonl", 40)), str(write_helpdesk(tmp_path / "held.jsonl", 100))
    asked = {"path": main, "split": "train[:25%]", "eval_path": held, "eval_split": "train[40:55]+train[95%:]"}
    data = prepare_data(DatasetSpec.model_validate(asked), main, held, None, load_tokenizer(str(tiny_model)), None)
    assert data.train.rows.numbers == [*range(1, 11)]
    assert data.held_out.rows.numbers == [*range(41, 56), *range(96, 101)]


def test_a_row_that_does_not_fit_is_called_by_its_own_file_and_number(prepared: Callable[..., PreparedData]) -> None:
    with pytest.raises(DataError, match=r"b\.jsonl: row 78: has \d+ tokens"):
        prepared(max_length=64, on_overflow="error")
