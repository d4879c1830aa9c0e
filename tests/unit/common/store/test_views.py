"""What the page reads, the same from SQLite and from PostgreSQL."""

from __future__ import annotations

from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store

from ....databases import SQLITE_ALONE
from ...factories import submission, take

pytestmark = SQLITE_ALONE


def test_a_line_is_thinned_to_whole_distances_and_keeps_its_last_point(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    claim = take(store)
    assert isinstance(claim, Claim)
    store.attempts.beat(claim, Progress(metrics=tuple((step, "loss", 1 / step) for step in range(1, 101))))
    assert [point.step for point in store.jobs.thinned([job_id], "loss", 60)] == list(range(2, 101, 2))
    assert len(store.jobs.thinned([job_id], "loss", 101)) == 100
