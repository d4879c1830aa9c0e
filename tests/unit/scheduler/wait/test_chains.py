"""Why a job waits that starts after others: the first of a chain whose turn it is, and when that ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import delete, update

from loractl.common.errors import ExitCode, WrongState
from loractl.common.job.status import Reason, Stage
from loractl.common.job.sweep import NewSweep
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.scheduler.change.amendment import amendment
from loractl.scheduler.status.follow import follow
from loractl.scheduler.status.job import job_in_full
from loractl.scheduler.status.job_text import job_text
from loractl.scheduler.wait.queue import waiting_jobs
from loractl.scheduler.why.answer import Why, why
from loractl.scheduler.why.text import why_text

from ....databases import SQLITE_ALONE
from ...factories import Clock, spec, submission, take
from ..screens import WIDE

pytestmark = SQLITE_ALONE


def queue(store: Store, name: str, *after: int, **keys: object) -> int:
    wanted = spec(**{"name": name, "after": list(after), **keys})
    return store.jobs.submit(replace(submission(lora=1, qlora=1), spec=wanted))


def sentence(store: Store, job_id: int) -> str:
    wait = waiting_jobs(store, [store.jobs.get(job_id)]).reasons[job_id]
    assert wait.word == "after"
    return wait.sentence


def helps(store: Store, job_id: int) -> tuple[str, str]:
    answer = why(store, job_id)
    assert isinstance(answer, Why)
    return answer.wait.helps, answer.wait.command


def test_the_head_of_a_chain_is_named_and_where_it_stands(store: Store) -> None:
    timed = Store(store.engine, Clock())
    first = queue(timed, "answers", max_retries=0)
    last = queue(timed, "merged", queue(timed, "pairs", first))
    assert sentence(timed, 2) == "job 1 (answers), which waits for a card"
    behind = "job 2 (pairs), which waits for job 1 (answers), "
    claim = take(timed)
    assert isinstance(claim, Claim)
    timed.attempts.beat(claim, Progress(stage=Stage.TRAINING, step=1, eta_seconds=600))
    assert sentence(timed, last) == f"{behind}which runs on box:0 until about 12:10"
    assert helps(timed, last) == ("Start without", f"loractl edit {last} --set after=[]")
    timed.attempts.finish(claim, Reason.BAD_DATA, "no rows", Progress())
    assert sentence(timed, last) == f"{behind}which has failed: it starts once a retry of that job succeeds"
    assert helps(timed, 2) == ("Queue that one again", "loractl retry 1")


def test_a_job_that_waits_for_another_or_is_held_has_no_place_in_a_line(store: Store) -> None:
    first = queue(store, "answers")
    blocked, held = queue(store, "pairs", first), queue(store, "later")
    store.jobs.hold(held, "ada")
    for job_id in (blocked, held):
        answer = why(store, job_id)
        assert isinstance(answer, Why) and answer.ahead is None
        assert "ahead of it" not in why_text(answer, WIDE) and "Ahead of it" not in why_text(answer, WIDE)
    store.jobs.cancel(first, "ada")
    store.jobs.edit(amendment(store, blocked, ["after=[]"]), "ada")
    assert "Nothing is ahead of it." in why_text(why(store, blocked), WIDE)


@pytest.mark.parametrize(
    ("any_end", "said"), [(True, "it starts in a moment"), (False, "it starts once a retry of that job succeeds")]
)
def test_a_cancelled_one_is_over_for_who_takes_any_end(store: Store, any_end: bool, said: str) -> None:
    first = queue(store, "answers")
    last = queue(store, "pairs", first, after_any=any_end)
    store.jobs.cancel(first, "ada")
    assert sentence(store, last) == f"job 1 (answers), which was cancelled: {said}"


def test_only_what_helps_is_advised(store: Store) -> None:
    first = queue(store, "answers")
    any_end = queue(store, "report", first, after_any=True)
    begun = queue(store, "pairs", first, lora={"init_from": str(first)})
    with pytest.raises(WrongState) as refused:
        store.jobs.release(begun, "ada")
    assert refused.value.hint == f"loractl why {begun}"
    assert helps(store, begun) == ("", "")
    store.jobs.cancel(first, "ada")
    assert helps(store, any_end) == ("Start without", f"loractl edit {any_end} --set after=[]")
    assert helps(store, begun) == ("Queue that one again", f"loractl retry {first}")
    new = NewSweep(name="tuned", varied={"lora.r": "16"})
    sweep_id = store.sweeps.submit(new, [submission(lora=1, qlora=1)])
    member = store.sweeps.get(sweep_id).members[0].job_id
    best = queue(store, "best", member, after_any=True, lora={"init_from": {"sweep": sweep_id}})
    assert helps(store, best) == ("", "")


def test_of_a_removed_job_only_what_helps_is_advised(store: Store) -> None:
    """By hand: gc keeps a job for which others wait."""
    first = queue(store, "answers")
    plain = queue(store, "report", first)
    begun = queue(store, "pairs", first, lora={"init_from": str(first)})
    with store.begin(read_only=False) as tx:
        tx.session.execute(delete(Job).where(Job.job_id == first))
    assert sentence(store, plain) == sentence(store, begun) == "job 1, which was removed"
    assert helps(store, plain) == ("Start without", f"loractl edit {plain} --set after=[]")
    dropped = "It can't begin without that adapter. Drop it"
    assert helps(store, begun) == (dropped, f"loractl cancel {begun}")


def test_a_job_shows_those_before_it_and_behind_it(store: Store) -> None:
    first = queue(store, "answers")
    second = queue(store, "pairs", first)
    queue(store, "merged", second)
    shown = job_text(job_in_full(store, second), WIDE)
    assert "after     1 answers (queued)\nthen      3\n" in shown
    store.jobs.hold(second, "mara", "disk")
    assert waiting_jobs(store, [store.jobs.get(second)]).reasons[second].word == "held"
    assert sentence(store, 3) == "job 2 (pairs), which is held"


def test_a_row_that_awaits_itself_or_a_later_one_ends_no_answer(store: Store) -> None:
    """Only a person could have written that: submit and edit let a job wait for earlier ones alone."""
    first = queue(store, "answers")
    second = queue(store, "pairs", first)
    third = queue(store, "merged", second)
    for awaits, said in (
        (second, "job 2 (pairs), which is held"),
        (third, "job 3 (merged), which waits for job 2 (pairs), which is held"),
    ):
        with store.engine.begin() as connection:
            connection.execute(update(Job).where(Job.job_id == second).values(awaits=awaits))
        assert sentence(store, second) == said
        assert follow(store, second) is ExitCode.FAILED, "nothing lets it go on by itself"
        assert helps(store, second) == ("Start without", "loractl edit 2 --set after=[]")
