"""A data set that is no file must be one that the hub can have."""

from __future__ import annotations

from pathlib import Path

import pytest

from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import DataError
from loractl.scheduler.submission.data import check_data, store_data

from ...factories import spec


@pytest.mark.parametrize(
    "name", ["json", "csv", "squad", "a/b/c", "hf://datasets/a/b", "no such file", "data@main", "a/b@", "a/b@../c"]
)
def test_a_name_that_is_neither_is_refused_at_submit(name: str) -> None:
    with pytest.raises(DataError, match="no data set of the hub") as caught:
        check_data(spec(dataset={"path": name}))
    assert "owner/name" in str(caught.value.hint)
    with pytest.raises(DataError, match="no data set of the hub"):
        check_data(spec(dataset={"path": "org/data", "eval_path": name}))


def test_a_hub_id_is_left_to_the_worker() -> None:
    check_data(spec(dataset={"path": "org/data", "eval_path": "org-2/data_set.v2"}))
    check_data(spec(dataset={"path": "org/data@refs/pr/1", "eval_path": "org/data@v1.0"}))


def test_what_is_stored_of_a_file_of_lines_says_how_many_rows_and_bytes_it_has(tmp_path: Path) -> None:
    lines, other = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    lines.write_text('{"text": "a"}\n\n{"text": "bcd"}')
    other.write_text("text\na\n")
    store = ArtifactStore(f"file://{tmp_path / 'store'}")
    wanted = spec(dataset={"path": str(lines), "eval_path": str(other)})
    stored = store_data(wanted, store)
    assert (stored["path"]["rows"], stored["path"]["bytes"]) == (2, 14 + 15)
    assert stored["path"]["tokens"] == (6 + 8) // 3 + 8 + 7, "three small letters for one, else a byte"
    assert set(stored["eval_path"]) == {"uri", "sha256"}
