"""The checker passes a good history, and finds each kind of breach in one that was edited by hand."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.common.artifacts import ArtifactStore, manifest_sha256
from loractl.common.job.identity import spec_digest
from loractl.worker.device.occupancy import run_mark

from ..unit.factories import spec
from .checker import PROMISES, check, examine
from .history import Act, AttemptRow, Change, History, Hit, Sighting, Span, Window
from .successes import ANY_FAULT, NO_FAULT, tally
from .trainer import TENSOR, last_link

T0 = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
LEASE_S = 6.0


def at(seconds: float) -> dt.datetime:
    return T0 + dt.timedelta(seconds=seconds)


def row(status: str, attempt: int = 0, token: str | None = None, lease: float = 0, **more: Any) -> dict[str, Any]:
    base = {"status": status, "attempt": attempt, "token": token, "checkpoint": None, "reason": None, "message": None}
    base |= {
        "priority": 0,
        "preemptible": False,
        "yields": False,
        "eta_seconds": None,
        "work_left_s": 60.0,
        "preempted_by": None,
        "retries_used": 0,
        "held": False,
    }
    base |= {"user": "ada", "name": "a", "ended_at": at(20), "spec": SPEC, "sweep_id": None}
    return {**base, "lease_expires_at": at(lease).isoformat() if token else None, "adapter_uri": None, **more}


SPEC = {"training": {"learning_rate": 1e-3}, "resources": {"time_limit": 60.0}}
LIMIT = "resources.time_limit"
KEPT = {"step": 5, "prefix": "jobs/1/checkpoints/1-5"}
URI = "file:///store/jobs/1/attempt-2/adapter"


def good() -> History:
    """Job 1: the first attempt keeps a checkpoint and is lost, the second ends well. Job 2: cancelled in the queue."""
    queued = row("queued")
    first = row("running", 1, "a", lease=6)
    beaten = row("running", 1, "a", lease=8)
    kept = row("running", 1, "a", lease=8, checkpoint=KEPT)
    lost = row("queued", 1, checkpoint=KEPT, reason="worker_lost")
    second = row("running", 2, "b", lease=22, checkpoint=KEPT)
    done = row("succeeded", 2, adapter_uri=URI)
    changes = [
        Change(tx=1, at=at(0), what="job", job_id=1, attempt=0, new=queued),
        Change(tx=2, at=at(0), what="job", job_id=1, attempt=1, old=queued, new=first),
        Change(tx=2, at=at(0), what="events", job_id=1, attempt=1, kind="started"),
        Change(tx=3, at=at(2), what="job", job_id=1, attempt=1, old=first, new=beaten),
        Change(tx=3, at=at(2), what="metrics", job_id=1, attempt=1),
        Change(tx=4, at=at(3), what="job", job_id=1, attempt=1, old=beaten, new=kept),
        Change(tx=5, at=at(10), what="job", job_id=1, attempt=1, old=kept, new=lost),
        Change(tx=5, at=at(10), what="events", job_id=1, attempt=1, kind="requeued"),
        Change(tx=6, at=at(16), what="job", job_id=1, attempt=2, old=lost, new=second),
        Change(tx=7, at=at(20), what="job", job_id=1, attempt=2, old=second, new={**done, "adapter_uri": None}),
        Change(tx=7, at=at(20), what="job", job_id=1, attempt=2, old={**done, "adapter_uri": None}, new=done),
        Change(tx=7, at=at(20), what="adapters", job_id=1, attempt=2),
        Change(tx=8, at=at(1), what="job", job_id=2, attempt=0, new=queued),
        Change(tx=9, at=at(2), what="job", job_id=2, attempt=0, old=queued, new=row("cancelled")),
    ]
    attempts = [
        AttemptRow(
            job_id=1, attempt=1, token="a", node="x:0", started_at=at(0), ended_at=at(10), reason="worker_lost",
            message="x:0 was silent for 6 s",
        ),
        AttemptRow(
            job_id=1, attempt=2, token="b", node="y:0", started_at=at(16), ended_at=at(20), reason="ok",
            resumed_from_step=5,
        ),
    ]  # fmt: skip
    return History(
        printed=[1, 2],
        cancelled={2: at(2)},
        jobs={1: done, 2: row("cancelled")},
        attempts=attempts,
        adapters={1: {"attempt": 2, "uri": URI}},
        changes=changes,
        lease_s=LEASE_S,
        hits=(Hit(at=at(4), job_id=1, attempt=1, final=False),),
        spans=(Span(kind="kill a node", start=at(0), end=at(30)),),
    )


def during(history: History, start: float, end: float) -> History:
    """With a fault between those seconds alone."""
    return replace(history, spans=(Span(kind="kill a node", start=at(start), end=at(end)),))


def seen(token: str, seconds: float) -> tuple[Sighting, ...]:
    """A process of the attempt with this token, seen at last so many seconds after the start."""
    return (Sighting(run=run_mark(token), pid=7, at=at(seconds)),)


def on_two_cards(history: History, *cards: str) -> History:
    """Both attempts of job 1 on these cards, which asked for two."""
    asked = with_job(history, 1, spec={"resources": {"cards": 2}})
    first = with_attempt(asked, 1, cards=cards, node=cards[0])
    return with_attempt(first, 2, cards=("y:0", "y:1"))


def hit(history: History, **how: bool) -> History:
    """The first attempt was hit, its node or a rank."""
    return replace(history, hits=(Hit(at=at(4), job_id=1, attempt=1, **{"final": True, **how}),))


def with_changes(history: History, *more: Change) -> History:
    return replace(history, changes=[*history.changes, *more])


def away(history: History, box: str | None, seconds: float = 3) -> History:
    """In place of the hit, a box or the database was away for five seconds."""
    return replace(history, hits=(), windows=(Window(start=at(seconds), end=at(seconds + 5), box=box),))


def did(history: History, kind: str, job_id: int, seconds: float, *, heard: bool = True, **more: Any) -> History:
    """Somebody asked for it, and was answered a second later."""
    act = Act(kind=kind, job_id=job_id, asked_at=at(seconds), over_at=at(seconds + 1), acknowledged=heard, **more)
    return replace(history, acts=(*history.acts, act))


def cleared(history: History, *, seconds: float = 30, newer: bool = True) -> History:
    """gc took the result of job 1. `newer`: its owner has a newer one of the same name."""
    gone = row("succeeded", 2)
    change = Change(tx=20, at=at(30), what="job", job_id=1, attempt=2, old=DONE, new=gone)
    found = replace(with_changes(history, change), jobs={**history.jobs, 1: gone}, adapters={})
    found = did(found, "gc", 0, seconds)
    return with_result(found, 3) if newer else found


def with_result(history: History, job_id: int) -> History:
    """Another job of the same owner and name has ended well, a little later."""
    uri = f"file:///store/jobs/{job_id}/attempt-1/adapter"
    well = AttemptRow(
        job_id=job_id, attempt=1, token="n", node="x:0", started_at=at(20), ended_at=at(25), reason="ok"
    )  # fmt: skip
    running, done = row("running", 1, "n"), row("succeeded", 1, adapter_uri=uri, ended_at=at(25))
    change = Change(tx=18, at=at(25), what="job", job_id=job_id, attempt=1, old=running, new=done)
    found = replace(with_changes(history, change), attempts=[*history.attempts, well])
    rows = {**found.jobs, job_id: done}
    return replace(found, jobs=rows, adapters={**found.adapters, job_id: {"attempt": 1, "uri": uri}})


def released(history: History) -> History:
    """Job 1 was held between its attempts, and let go."""
    waits, held = row("queued", 1, checkpoint=KEPT), row("queued", 1, checkpoint=KEPT, held=True)
    changes = [
        Change(tx=20, at=at(11.5), what="job", job_id=1, attempt=1, old=waits, new=held),
        Change(tx=21, at=at(14.5), what="job", job_id=1, attempt=1, old=held, new=waits),
    ]
    return did(did(with_changes(history, *changes), "hold", 1, 11), "retry", 1, 14)


def tried_again(history: History, *, seconds: float = 30, heard: bool = True, **queued: Any) -> History:
    """Job 2, which was cancelled, was queued again, and cancelled once more."""
    waits = row("queued", **queued)
    again = Change(tx=20, at=at(30.5), what="job", job_id=2, attempt=0, old=row("cancelled"), new=waits)
    over = Change(tx=21, at=at(33), what="job", job_id=2, attempt=0, old=waits, new=row("cancelled"))
    return did(with_changes(history, again, over), "retry", 2, seconds, heard=heard)


def gave_way(
    history: History,
    *,
    priority: int = 9,
    spent: int = 0,
    preemptible: bool = True,
    to: int | None = 7,
    yields: bool = False,
    left_s: float | None = None,
) -> History:
    """The first attempt of job 1 gave way to job 7, with its checkpoint."""
    can = {"preemptible": preemptible, "yields": yields, "eta_seconds": left_s}
    ran = row("running", 1, "a", lease=8, checkpoint=KEPT, **can)
    asked = {**ran, "preempted_by": to}
    waits = row("queued", 1, checkpoint=KEPT, reason="preempted", retries_used=spent)
    changes = [change for change in history.changes if change.tx != 5]
    raised = Change(tx=30, at=at(2), what="job", job_id=7, old=row("queued"), new=row("queued", priority=priority))
    changes[9:9] = [
        raised,
        Change(tx=31, at=at(4), what="job", job_id=1, attempt=1, old=ran, new=asked),
        Change(tx=32, at=at(5), what="job", job_id=1, attempt=1, old=asked, new=waits),
    ]
    return with_attempt(replace(history, changes=changes), 1, reason="preempted", ended_at=at(5))


def in_a_sweep(history: History, rate: float, reason: str = "pruned") -> History:
    """Job 2 is of a sweep with another member, and was stopped."""
    spec = {"training": {"learning_rate": rate}}
    other = row("succeeded", sweep_id=1, spec={"training": {"learning_rate": 1e-2}})
    jobs = {**history.jobs, 2: row("cancelled", sweep_id=1, spec=spec)}
    stopped = AttemptRow(
        job_id=2, attempt=1, token="s", node="x:0", started_at=at(1), ended_at=at(2), reason=reason
    )  # fmt: skip
    found = replace(history, jobs=jobs, cancelled={}, attempts=[*history.attempts, stopped])
    best = with_result(found, 4)
    return replace(best, jobs={**best.jobs, 4: {**best.jobs[4], "sweep_id": 1, "spec": other["spec"]}})


def with_attempt(history: History, number: int, **values: Any) -> History:
    attempts = [replace(a, **values) if a.attempt == number else a for a in history.attempts]
    return replace(history, attempts=attempts)


def with_job(history: History, job_id: int, **values: Any) -> History:
    return replace(history, jobs={**history.jobs, job_id: {**history.jobs[job_id], **values}})


SECOND = row("running", 2, "b")
DONE = row("succeeded", 2, adapter_uri=URI)


def after(history: History, number: int, *, any_end: bool = False) -> History:
    """Job 1 was to start after this one."""
    spec = {"after": [number], "after_any": any_end}
    return replace(history, jobs={**history.jobs, 1: {**history.jobs[1], "spec": spec}})


BREACHES: dict[str, tuple[int, Callable[[History], History]]] = {
    "all was done while no fault was active": (0, lambda h: replace(h, spans=())),
    "no job ended while a fault was active": (0, lambda h: during(h, 0, 18)),
    "a printed number is gone": (1, lambda h: replace(h, printed=[1, 2, 3])),
    "a job waits for ever": (1, lambda h: with_job(h, 2, status="queued")),
    "the run was given up": (1, lambda h: replace(h, stuck=("3 jobs",))),
    "a job ended twice": (
        1,
        lambda h: with_changes(
            h,
            Change(tx=20, at=at(30), what="job", job_id=1, attempt=2, old=DONE, new=row("queued", 2)),
            Change(tx=21, at=at(31), what="job", job_id=1, attempt=3, old=row("running", 3, "c"), new=DONE),
        ),
    ),
    "two attempts ended well": (2, lambda h: with_attempt(h, 1, reason="ok", resumed_from_step=5)),
    "the files of another attempt are listed": (
        2,
        lambda h: with_job(h, 1, adapter_uri="file:///store/jobs/1/attempt-1/adapter"),
    ),
    "a cancelled job has a result": (2, lambda h: replace(h, adapters={**h.adapters, 2: {"attempt": 1, "uri": URI}})),
    "a metric of a lost attempt": (
        2,
        lambda h: with_changes(
            h,
            Change(tx=20, at=at(17), what="job", job_id=1, attempt=2, old=SECOND, new=SECOND),
            Change(tx=20, at=at(17), what="metrics", job_id=1, attempt=1),
        ),
    ),
    "an event without the job's row": (
        2,
        lambda h: with_changes(h, Change(tx=20, at=at(17), what="events", job_id=1, attempt=1, kind="note")),
    ),
    "a checkpoint named by a lost attempt": (
        2,
        lambda h: with_changes(
            h,
            Change(
                tx=20, at=at(17), what="job", job_id=1, attempt=2, old=row("running", 2, "b"),
                new=row("running", 2, "b", checkpoint={"step": 9, "prefix": "jobs/1/checkpoints/1-9"}),
            ),
        ),
    ),
    "a running job was claimed": (
        2,
        lambda h: with_changes(
            h,
            Change(tx=20, at=at(17), what="job", job_id=1, attempt=3, old=SECOND, new=row("running", 3, "c")),
        ),
    ),
    "a waiting job succeeded": (
        2,
        lambda h: with_changes(h, Change(tx=20, at=at(17), what="job", job_id=1, old=row("queued", 1), new=DONE)),
    ),
    "a finished job changed": (
        3,
        lambda h: with_changes(h, Change(tx=20, at=at(30), what="job", job_id=1, attempt=2, old=DONE, new=DONE)),
    ),
    "a cancelled job ran": (
        3,
        lambda h: replace(
            h,
            attempts=[
                *h.attempts,
                AttemptRow(
                    job_id=2, attempt=1, token="d", node="x:0", started_at=at(5), ended_at=at(6), reason="cancelled"
                ),
            ],
        ),
    ),
    "a cancelled job failed": (3, lambda h: with_job(h, 2, status="failed")),
    "a lost worker was noticed late": (4, lambda h: with_attempt(h, 1, ended_at=at(40))),
    "an attempt never ended": (4, lambda h: with_attempt(h, 1, ended_at=None, reason=None)),
    "an attempt began anew": (4, lambda h: with_attempt(h, 2, resumed_from_step=None)),
    "an artifact is damaged": (5, lambda h: replace(h, artifacts={1: "torn"})),
    "a killed node was noticed late": (4, lambda h: hit(with_attempt(h, 1, ended_at=at(23)))),
    "a process outlives its attempt": (6, lambda h: replace(h, sightings=seen("a", 60))),
    "a process remains": (6, lambda h: replace(h, left=("process 7",))),
    "an attempt failed for the store": (7, lambda h: with_attempt(h, 1, reason="store_failed")),
    "a job failed": (7, lambda h: with_job(h, 1, status="failed")),
    "a job failed for the lab": (8, lambda h: with_job(h, 1, status="failed", reason="gpu_error")),
    "a good card failed": (8, lambda h: with_attempt(h, 1, reason="gpu_error")),
    "an attempt ended as only earlier versions let one end": (7, lambda h: with_attempt(h, 1, reason="host_lost")),
    "a job diverged for another one's fault": (7, lambda h: with_attempt(h, 1, reason="diverged")),
    "a job was cancelled for another one's": (9, lambda h: with_attempt(h, 1, reason="cancelled")),
    "a job ended by another one's loss": (9, lambda h: with_attempt(h, 1, reason="diverged")),
    "a job had one of two cards": (10, lambda h: on_two_cards(h, "x:0")),
    "a job had one card twice": (10, lambda h: on_two_cards(h, "x:0", "x:0")),
    "a job had cards of two boxes": (10, lambda h: on_two_cards(h, "x:0", "y:0")),
    "a job's first card was not its node's": (10, lambda h: with_attempt(on_two_cards(h, "x:0", "x:1"), 1, node="x:1")),
    "a job for one card had two": (10, lambda h: with_attempt(h, 1, cards=("x:0", "x:1"))),
    "a rank outlived another": (
        10,
        lambda h: replace(hit(on_two_cards(h, "x:0", "x:1"), rank=True), sightings=seen("a", 40)),
    ),
    "the second card's node was missed late": (
        10,
        lambda h: hit(with_attempt(on_two_cards(h, "x:0", "x:1"), 1, ended_at=at(23))),
    ),
    "a trainer died of itself": (7, lambda h: with_attempt(h, 1, reason="killed")),
    "an acknowledged edit is gone": (11, lambda h: did(h, "edit", 1, 5, key=LIMIT, value=90)),
    "an edit was undone by an older one": (
        11,
        lambda h: did(did(h, "edit", 1, 5, key=LIMIT, value=60), "edit", 1, 7, key=LIMIT, value=90),
    ),
    "a held job ran": (11, lambda h: did(h, "hold", 1, 12)),
    "a held job ran before its release": (11, lambda h: did(did(h, "hold", 1, 12), "retry", 1, 18)),
    "an acknowledged retry did nothing": (11, lambda h: did(h, "retry", 2, 30)),
    "a job was queued again by nobody": (3, lambda h: replace(tried_again(h), acts=())),
    "a job was queued again long before it was asked": (3, lambda h: tried_again(h, seconds=100)),
    "a tagged adapter is gone": (11, lambda h: did(cleared(h), "tag", 1, 26)),
    "a result went without gc": (12, lambda h: replace(cleared(h), acts=())),
    "gc took a result long after it was over": (12, lambda h: cleared(h, seconds=10)),
    "gc took the newest of a name": (12, lambda h: cleared(h, newer=False)),
    "gc took a living job's checkpoint": (
        12,
        lambda h: with_changes(
            h,
            Change(
                tx=5, at=at(11), what="job", job_id=1, attempt=1, old=row("queued", 1, checkpoint=KEPT),
                new=row("queued", 1),
            ),
        ),
    ),
    "a job gave way to one of no higher priority": (13, lambda h: gave_way(h, priority=0)),
    "a job gave way to nobody": (13, lambda h: gave_way(h, to=None)),
    "a job gave way that may not": (13, lambda h: gave_way(h, preemptible=False)),
    "a job gave way to a long one": (13, lambda h: gave_way(h, priority=0, preemptible=False, yields=True, left_s=239)),
    "who gave way spent a retry": (13, lambda h: gave_way(h, spent=1)),
    "who gave way never ended": (13, lambda h: with_job(gave_way(h), 1, status="queued")),
    "an attempt with a lease was ended as lost": (4, lambda h: with_attempt(h, 1, ended_at=at(7))),
    "its own row held the lease": (4, lambda h: with_attempt(h, 1, lease_expires_at=at(11))),
    "no fault had met who was lost": (4, lambda h: replace(h, hits=())),
    "another box was away": (4, lambda h: away(h, "y")),
    "its box was away long before": (4, lambda h: away(h, "x", -20)),
    "who gave way began anew": (4, lambda h: with_attempt(gave_way(h), 2, resumed_from_step=None)),
    "a sweep stopped its best": (14, lambda h: in_a_sweep(h, rate=1e-3)),
    "a job started before the one that it starts after": (15, lambda h: after(h, 2)),
    "a job of no sweep was stopped by one": (14, lambda h: with_attempt(h, 1, reason="pruned")),
}  # fmt: skip


def test_a_good_history_is_not_complained_of() -> None:
    assert check(good()) == []
    shorter = gave_way(good(), priority=0, preemptible=False, yields=True, left_s=240)
    assert not [breach for breach in check(shorter) if breach.promise == 13]


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_found(name: str) -> None:
    promise, edit = BREACHES[name]
    assert promise in {breach.promise for breach in check(edit(good()))}


def test_every_promise_can_be_found_broken() -> None:
    assert {promise for promise, _ in BREACHES.values()} == set(PROMISES)


def test_a_good_history_of_two_cards_is_not_complained_of() -> None:
    history = on_two_cards(good(), "x:1", "x:0")
    assert check(hit(history)) == []
    assert check(replace(hit(history, rank=True), sightings=(*seen("a", 14), *seen("b", 21)))) == []


def test_what_succeeded_is_counted_for_each_fault_that_was_active() -> None:
    spans = (Span(kind="a", start=at(0), end=at(2)), Span(kind="b", start=at(2), end=at(3)))
    counts = tally(good().changes, (*spans, Span(kind="b", start=at(3), end=at(4))))
    assert counts == {
        "a": {"submit": 2, "claim": 1, "heartbeat": 1},
        "b": {"heartbeat": 1, "checkpoint": 1},
        ANY_FAULT: {"submit": 2, "claim": 1, "heartbeat": 1, "checkpoint": 1},
        NO_FAULT: {"claim": 1, "finish": 1},
    }


def test_what_people_asked_for_and_got_is_not_complained_of() -> None:
    edited = did(good(), "edit", 1, 5, key=LIMIT, value=60)
    assert check(edited) == []
    assert check(did(edited, "edit", 1, 7, key=LIMIT, value=90, heard=False)) == []
    assert check(released(good())) == []
    assert check(tried_again(good())) == []
    assert check(tried_again(good(), heard=False)) == []
    assert check(tried_again(good(), awaits=1)) == []
    assert [one.promise for one in check(tried_again(good(), held=True))] == [11]
    assert check(cleared(good())) == []
    assert check(did(good(), "tag", 1, 26)) == []
    assert check(gave_way(good())) == []
    assert check(in_a_sweep(good(), rate=0.1)) == []


def test_a_job_starts_once_the_jobs_of_its_list_are_over_as_it_asks() -> None:
    late, early = good(), replace(good(), changes=sorted(good().changes, key=lambda change: change.job_id != 2))
    for history, any_end, promises in ((late, True, [15]), (early, False, [15]), (early, True, [])):
        assert [broken.promise for broken in check(after(history, 2, any_end=any_end))] == promises


def test_a_box_that_stood_still_could_end_no_process() -> None:
    history = replace(good(), sightings=seen("a", 60))
    stood = Window(start=at(11), end=at(30), box="x:0")
    assert check(history)
    assert check(replace(history, windows=(stood,))) == []
    assert check(replace(history, windows=(replace(stood, box="y"),)))


def test_nobody_has_to_notice_while_the_database_or_every_box_is_away() -> None:
    late = with_attempt(good(), 1, ended_at=at(40))
    assert check(replace(late, windows=(Window(start=at(9), end=at(33)),))) == []
    both = tuple(Window(start=at(9), end=at(33), box=box) for box in ("x", "y"))
    assert check(replace(late, windows=both, boxes=frozenset({"x", "y"}))) == []
    assert check(replace(late, windows=both[:1], boxes=frozenset({"x", "y"})))


def test_who_lost_the_lease_in_a_fault_or_the_node_was_not_living() -> None:
    for box in ("x", "x:0", None):
        assert check(away(good(), box)) == []
    assert check(with_attempt(good(), 1, ended_at=at(7), message="x:0 was restarted")) == []


def test_a_lease_that_the_attempt_s_own_row_holds_is_not_over() -> None:
    late = with_attempt(good(), 1, ended_at=at(23))
    assert check(late)
    assert check(with_attempt(late, 1, lease_expires_at=at(16))) == []


def test_a_checkpoint_that_the_suite_tore_need_not_be_resumed() -> None:
    anew = with_attempt(good(), 2, resumed_from_step=None)
    assert check(replace(anew, torn=frozenset({KEPT["prefix"]}))) == []


def test_a_stored_result_is_whole_and_what_was_asked_for(tmp_path: Path) -> None:
    asked = spec(training={"max_steps": 7})
    folder, link = tmp_path / "result", last_link(spec_digest(asked), "data", 7)
    header = json.dumps({TENSOR: {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}}).encode()
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + link)
    (folder / "report.json").write_text(json.dumps({TENSOR: link.hex()}))
    store = ArtifactStore((tmp_path / "store").as_uri())
    manifest = store.put_result(folder, "jobs/1/attempt-1")
    job: dict[str, Any] = {
        "adapter_uri": f"{store.url}/jobs/1/attempt-1/adapter",
        "manifest_sha256": manifest_sha256(manifest),
        "data": {"path": {"sha256": "data"}},
        "spec": asked.model_dump(mode="json"),
    }
    assert examine(store, job) is None
    more = spec(training={"max_steps": 8}).model_dump(mode="json")
    assert "lead to" in (examine(store, {**job, "spec": more}) or ""), "a step is missing"
    stored = tmp_path / "store" / "jobs" / "1" / "attempt-1" / "adapter" / "adapter_model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1])
    assert "does not match its manifest" in (examine(store, job) or "")
