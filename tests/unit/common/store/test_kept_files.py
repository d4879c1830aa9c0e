"""Which files of a box's cache its next jobs are told of."""

from __future__ import annotations

import pytest

from loractl.common.job.status import Reason
from loractl.common.store.queries import heartbeats
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store

from ...factories import Clock, submission, take


def claim(store: Store, node: str = "box:0") -> Claim:
    store.jobs.submit(submission())
    taken = take(store, node=node)
    assert isinstance(taken, Claim)
    return taken


def kept(*files: tuple[str, str]) -> Progress:
    return Progress(kept=tuple((key * 64, sha256 * 64) for key, sha256 in files))


def listed(store: Store, host: str = "box") -> list[tuple[str, str, int]]:
    return [(row.key[0], row.sha256[0], row.job_id) for row in store.cards.kept_files(host)]


def test_a_box_knows_the_files_that_its_own_jobs_have_left(store: Store) -> None:
    first, other = claim(store), claim(store, "heron:1")
    store.attempts.beat(first, kept(("a", "1"), ("b", "2")))
    store.attempts.finish(other, Reason.OUT_OF_MEMORY, "no memory", kept(("c", "3")))
    assert sorted(listed(store)) == [("a", "1", first.job_id), ("b", "2", first.job_id)]
    assert listed(store, "heron") == [("c", "3", other.job_id)]


def test_the_last_file_of_a_key_counts_and_no_other_box_s_job_replaces_it(store: Store) -> None:
    first, second, other = claim(store), claim(store), claim(store, "heron:1")
    store.attempts.beat(first, kept(("a", "1")))
    store.attempts.beat(second, kept(("a", "2")))
    store.attempts.beat(other, kept(("a", "3")))
    assert listed(store) == [("a", "2", second.job_id)]
    assert listed(store, "heron") == []


def test_an_attempt_that_has_lost_its_lease_leaves_nothing(store: Store) -> None:
    lost = claim(store)
    store.attempts.finish(lost, Reason.WORKER_LOST, "gone", Progress())
    assert not store.attempts.beat(lost, kept(("a", "1"))).accepted
    assert listed(store) == []


def test_a_box_s_oldest_files_make_room(timed: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "MOST_KEPT", 2)
    mine = claim(timed)
    for key in ("a", "b", "a", "c"):  # a is left once more after b
        clock.forward(1)
        timed.attempts.beat(mine, kept((key, "1")))
    assert [key for key, *_ in listed(timed)] == ["c", "a"]


def test_a_file_goes_with_the_job_that_wrote_it(timed: Store, clock: Clock) -> None:
    mine = claim(timed)
    timed.attempts.beat(mine, kept(("a", "1")))
    timed.attempts.finish(mine, Reason.BAD_DATA, "bad", Progress())
    clock.forward(100)
    assert timed.results.forget_jobs([mine.job_id], clock.now) == {mine.job_id}
    assert listed(timed) == []
