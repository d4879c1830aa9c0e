"""The claim gives a job that is alone on its card the room to do without recomputing, if nobody else wants it."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event

from loractl.common.job.adjustment import Adjustment
from loractl.common.job.method import Need, Roomy, RoomyForm
from loractl.common.job.status import Reason, Status
from loractl.common.memory.correction import Measured
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.units import GIB

from ...factories import RESULT, Clock, node_state, submission

NODE = "box:0"
FORMS = {4: 40.0, 2: 23.0, 1: 15.0}
NOTHING = Progress()


def show(store: Store, total: float = 80, **state: Any) -> None:
    store.cards.see(node_state(NODE, **{"total": int(total * GIB), "max_jobs": 4, **state}))


def queue(store: Store, gib: float = 8, **keys: Any) -> int:
    return store.jobs.submit(submission(lora=gib, method="lora", **{"roomy": FORMS, "max_retries": 0, **keys}))


def claim(store: Store, **asked: Any) -> Claim:
    taken = store.attempts.claim(NODE, **asked)
    assert isinstance(taken, Claim), taken
    return taken


def reserved(store: Store, mine: Claim) -> tuple[float, bool | None]:
    """GiB as the card's ledger has them, and whether the attempt's row says that it was given room."""
    attempt = store.attempts.of_job(mine.job_id)[-1]
    (job,) = [one for one in store.cards.fleet().cards[NODE].running if one.job_id == mine.job_id]
    assert job.reserved == attempt.vram_reserved == mine.vram_reserved
    return job.reserved / GIB, attempt.roomy


def test_alone_on_its_card_a_job_trains_without_recomputing(store: Store) -> None:
    show(store)
    job_id = queue(store)
    row = store.jobs.get(job_id)
    assert (row.vram_needed, row.vram_class) == (8 * GIB, 8), "its line is that of its need"
    mine = claim(store)
    assert reserved(store, mine) == (40, True)
    assert mine.adjustment == Adjustment(gradient_checkpointing=False)
    assert mine.vram_planned == 40 * GIB
    started = store.jobs.events(job_id)[-1].text
    assert started.endswith("without recomputing: 40.0 GiB instead of 8.0, which no other job wants now")
    assert store.jobs.get(job_id).adjustment is None, "the room is this attempt's"


def test_on_a_smaller_card_it_takes_the_same_batch_in_smaller_pieces(store: Store) -> None:
    show(store, 24, max_jobs=1)
    mine, pieces = (queue(store), claim(store))[1], {"micro_batch": 2, "accumulation": 8}
    assert reserved(store, mine) == (23, True)
    assert mine.adjustment == Adjustment(**pieces, gradient_checkpointing=False)
    assert "without recomputing in 2 rows at once, accumulating 8 (same effective batch)" in (
        store.jobs.events(mine.job_id)[-1].text
    )


def test_where_only_half_fits_every_second_block_is_recomputed(store: Store) -> None:
    """The row has no such form: what it takes is the middle of the need and of the smallest form."""
    show(store, 12, max_jobs=1)
    job_id = queue(store)
    mine = claim(store)
    assert reserved(store, mine) == (11.5, True) and mine.vram_planned == int(11.5 * GIB)
    assert mine.adjustment == Adjustment(micro_batch=1, accumulation=16, gradient_checkpointing="half")
    started = store.jobs.events(job_id)[-1].text
    assert started.endswith(
        "recomputing every second block alone in 1 row at once, accumulating 16 (same effective batch): 11.5 GiB "
        "instead of 8.0, which no other job wants now"
    )
    assert store.jobs.get(job_id).adjustment is None, "the room is this attempt's"
    store.attempts.beat(mine, Progress(adjustment=Adjustment(gradient_checkpointing=True)))
    assert store.jobs.get(job_id).adjustment == {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    "asked",
    [
        {"training": {"gradient_checkpointing": True}},
        {"training": {"gradient_checkpointing": "half"}},
        {"training": {"gradient_checkpointing": False}},
        {"resources": {"max_vram": "11GiB"}},
    ],
)
def test_what_the_job_itself_says_holds(asked: dict[str, Any], store: Store) -> None:
    show(store)
    queue(store, **asked)
    mine = claim(store)
    assert (reserved(store, mine), mine.adjustment) == ((8, False), Adjustment())


def test_a_job_that_out_of_memory_has_changed_gets_no_room(store: Store) -> None:
    show(store)
    queue(store)
    first = claim(store)
    store.attempts.beat(first, Progress(adjustment=Adjustment(gradient_checkpointing=True)))
    store.attempts.finish(first, Reason.TRAINER_ERROR, "crash", NOTHING)
    store.jobs.retry(first.job_id, "ada")
    second = claim(store)
    assert (reserved(store, second), second.adjustment) == ((8, False), Adjustment(gradient_checkpointing=True))


def test_what_an_evaluation_has_changed_leaves_the_room_to_the_next_attempt(store: Store) -> None:
    show(store, 24, max_jobs=1)
    queue(store)
    first = claim(store)
    store.attempts.beat(first, Progress(adjustment=Adjustment(**{**first.adjustment.as_json(), "eval_batch": 1})))
    assert store.jobs.get(first.job_id).adjustment == {"eval_batch": 1}
    store.attempts.finish(first, Reason.TRAINER_ERROR, "crash", NOTHING)
    store.jobs.retry(first.job_id, "ada")
    show(store, 16, max_jobs=1)
    assert claim(store).adjustment == (
        Adjustment(micro_batch=1, accumulation=16, gradient_checkpointing=False, eval_batch=1)
    )


@pytest.mark.parametrize(
    ("other", "room"),
    [
        ({"gib": 72}, False),  # it fits beside the need
        ({"gib": 73}, True),  # it fits only once this one has left
    ],
)
def test_a_ready_job_that_would_use_the_room_has_it(other: dict[str, Any], room: bool, store: Store) -> None:
    show(store)
    queue(store)
    queue(store, roomy=None, **other)
    assert reserved(store, claim(store)) == ((40, True) if room else (8, False))


def test_a_job_that_is_held_wants_nothing(store: Store) -> None:
    show(store)
    queue(store)
    store.jobs.hold(queue(store), "ada")
    assert reserved(store, claim(store)) == (40, True)


def test_the_room_is_charged_to_nobody(timed: Store, clock: Clock) -> None:
    show(timed)
    queue(timed)
    mine = claim(timed)
    assert timed.cards.fleet().charges == {"ada": 8.0}, "an hour of its need as soon as it starts"
    clock.forward(2 * 3600)
    timed.attempts.finish(mine, Reason.OK, "done", NOTHING, RESULT)
    assert timed.cards.fleet().charges == {"ada": 16.0}


def test_a_simulated_card_never_changes_the_pieces(store: Store) -> None:
    """A processor trains there: its bits must not depend on who waits."""
    show(store, 23.9, kind="sim")
    queue(store)
    mine = claim(store)
    assert (reserved(store, mine), mine.adjustment) == ((8, False), Adjustment())
    store.attempts.finish(mine, Reason.OK, "done", NOTHING, RESULT)
    show(store, 24, kind="sim", max_jobs=1)
    queue(store)
    mine = claim(store)
    assert (reserved(store, mine), mine.adjustment) == ((24, True), Adjustment(gradient_checkpointing="half"))
    store.attempts.finish(mine, Reason.OK, "done", NOTHING, RESULT)
    show(store, 80, kind="sim")
    queue(store)
    assert claim(store).adjustment == Adjustment(gradient_checkpointing=False)


@pytest.mark.both
def test_a_better_plan_gives_the_rest_back_and_teaches_the_job_both_sizes(store: Store) -> None:
    show(store)
    job_id = queue(store)
    mine = claim(store)
    better = Roomy(lora=(RoomyForm(micro_batch=4, bytes=20 * GIB, planned=20 * GIB),))
    need = Need(lora=6 * GIB, qlora=5 * GIB)
    assert store.attempts.beat(mine, Progress(need=need, roomy=better, running=20 * GIB)).accepted
    row, (attempt,) = store.jobs.get(job_id), store.attempts.of_job(job_id)
    assert (row.vram_reserved, row.vram_lora, row.planned) == (20 * GIB, 6 * GIB, vars(need))
    assert (attempt.vram_planned, Roomy.read(row.roomy)) == (20 * GIB, better)
    store.attempts.finish(mine, Reason.TRAINER_ERROR, "crash", NOTHING)
    store.jobs.retry(job_id, "ada")
    show(store, 24, max_jobs=1)
    assert reserved(store, claim(store)) == (20, True)


@pytest.mark.both
def test_a_plan_that_comes_once_out_of_memory_took_the_room_back_is_of_the_need(store: Store) -> None:
    show(store)
    queue(store)
    mine = claim(store)
    store.attempts.beat(mine, Progress(need=Need(lora=6 * GIB, qlora=5 * GIB)))
    (attempt,) = store.attempts.of_job(mine.job_id)
    assert (store.jobs.get(mine.job_id).vram_reserved, attempt.vram_planned) == (6 * GIB, 40 * GIB), "its peak is of 40"


def test_the_peak_of_an_attempt_that_had_the_room_is_told_apart(store: Store) -> None:
    show(store)
    for other in ("org/a", "org/b"):
        queue(store, base_model=other)
        mine = claim(store)
        store.attempts.beat(mine, Progress(vram_process=30 * GIB))
        store.attempts.finish(mine, Reason.OK, "done", NOTHING, RESULT)
        queue(store, base_model="org/c", roomy=None)
        store.attempts.finish(claim(store), Reason.OK, "done", NOTHING, RESULT)
    found: list[Measured] = store.attempts.measured()
    assert sorted((one.roomy, one.planned) for one in found) == [(False, 8 * GIB)] * 2 + [(True, 40 * GIB)] * 2


@pytest.mark.both
def test_an_attempt_of_an_earlier_version_leaves_it_open(store: Store) -> None:
    show(store)
    queue(store)
    mine = claim(store)
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE attempts SET roomy = NULL")
    store.attempts.finish(mine, Reason.OK, "done", NOTHING, RESULT)
    assert [one.roomy for one in store.attempts.measured()] == [False]
    assert store.jobs.get(mine.job_id).status is Status.SUCCEEDED


def test_the_claim_asks_once_however_many_wait(store: Store) -> None:
    def statements(waiting: int) -> int:
        seen: list[str] = []

        def note(_c: Any, _cu: Any, statement: str, *_: Any) -> None:
            seen.append(statement)

        for _ in range(waiting):
            queue(store, 100, base_model="org/b")
        queue(store)
        event.listen(store.engine, "before_cursor_execute", note)
        mine = claim(store)
        event.remove(store.engine, "before_cursor_execute", note)
        assert mine.adjustment.gradient_checkpointing is False
        store.attempts.finish(mine, Reason.OK, "done", NOTHING, RESULT)
        return len(seen)

    show(store)
    assert statements(1) == statements(5) == statements(30)
