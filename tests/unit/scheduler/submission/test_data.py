"""A data set that is no file must be one that the hub can have."""

from __future__ import annotations

import pytest

from loractl.common.errors import DataError
from loractl.scheduler.submission.data import check_data

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
