"""What the database learns of memory: out-of-memory raises the need, measured peaks correct the plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, update
from sqlalchemy.orm import Session

from loractl.common.job.adjustment import Adjustment
from loractl.common.job.method import Method, Need
from loractl.common.job.status import Reason, Status
from loractl.common.memory.context import CONTEXT_BYTES
from loractl.common.memory.correction import ENGINE, FACTOR_BOUNDS, GROWTH, LIKE_IT_SPARE, Measured, learned, peaks_like
from loractl.common.memory.need_key import need_key
from loractl.common.memory.plan import predict
from loractl.common.store.queries.need import LEAST_SHARE, OUTSIDER_LIMIT, OUTSIDER_SHARE
from loractl.common.store.records import Claim, Left, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Attempt, AttemptShare, Job
from loractl.common.units import GIB, gib

from ....databases import SQLITE_ALONE
from ...factories import RESULT, Clock, node_state, submission


def show(store: Store, node: str = "box:0", total: float = 24, **state: Any) -> None:
    store.cards.see(node_state(node, total=int(total * GIB), **state))


def claim(store: Store, node: str = "box:0") -> Claim:
    taken = store.attempts.claim(node)
    assert isinstance(taken, Claim), taken
    return taken


def runs_out(store: Store, mine: Claim, peak: float | None = None, need: Need | None = None) -> Status | None:
    """The attempt ends out of memory; `peak`: GiB that its process had then, without it all that it was given;
    `need`: what its trainer has planned."""
    had = int(peak * GIB) if peak is not None else mine.vram_reserved
    return store.attempts.finish(mine, Reason.OUT_OF_MEMORY, "out of memory", Progress(vram_process=had, need=need))


def text_of_last(store: Store, job_id: int) -> tuple[str, str]:
    event = store.jobs.events(job_id)[-1]
    return event.kind, event.text


@SQLITE_ALONE
def test_what_was_too_little_is_raised_by_a_quarter_and_a_larger_card_takes_it(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=16, method="lora"))
    show(store, "a:0", 18)
    show(store, "b:0", 24)
    assert runs_out(store, claim(store, "a:0")) is Status.QUEUED
    row = store.jobs.get(job_id)
    assert (row.vram_lora, row.vram_needed, row.vram_class) == (int(16 * GIB * GROWTH), 20 * GIB, 24)
    assert (row.retries_used, row.not_before, row.vram_reserved) == (0, None, None)
    assert text_of_last(store, job_id) == (
        "requeued",
        "attempt 1 ended (out_of_memory): out of memory; it waits for 20.0 GiB now",
    )
    assert store.attempts.claim("a:0") is None
    mine = claim(store, "b:0")
    assert (mine.attempt, mine.vram_reserved) == (2, 20 * GIB)


@SQLITE_ALONE
def test_qlora_is_next_where_it_is_permitted_and_the_card_holds_no_larger_lora(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=16, qlora=8))
    show(store, total=18)
    first = claim(store)
    assert first.method is Method.LORA
    assert runs_out(store, first) is Status.QUEUED
    second = claim(store)
    assert (second.method, second.vram_reserved) == (Method.QLORA, 8 * GIB)
    assert store.jobs.events(job_id)[-1].text.endswith("with qlora (auto: lora does not fit)")


@SQLITE_ALONE
def test_a_measured_peak_beyond_the_growth_is_what_it_needs(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=8, method="lora"))
    show(store)
    runs_out(store, claim(store), peak=14)
    assert store.jobs.get(job_id).vram_lora == int(14 * GIB * 1.05)


@pytest.mark.both
@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({}, "out of memory; lora had 20.0 GiB, and no card of the fleet has more"),
        (
            {"resources": {"max_vram": "22GiB"}},
            "out of memory; lora had 20.0 GiB, and its resources.max_vram allows no more",
        ),
    ],
)
def test_a_job_that_no_card_could_give_more_fails_with_a_sentence(store: Store, keys: dict, sentence: str) -> None:
    job_id = store.jobs.submit(submission(lora=20, method="lora", **keys))
    show(store)
    assert runs_out(store, claim(store)) is Status.FAILED
    row = store.jobs.get(job_id)
    assert (row.status, row.reason, row.message) == (Status.FAILED, Reason.OUT_OF_MEMORY, sentence)
    assert text_of_last(store, job_id) == ("failed", sentence)
    assert store.attempts.claim("box:0") is None


@pytest.mark.both
def test_each_step_down_happens_once_until_nothing_is_left(store: Store) -> None:
    store.jobs.submit(submission(lora=16, qlora=8))
    show(store, total=18)
    seen = []
    while isinstance(taken := store.attempts.claim("box:0"), Claim):
        seen.append((taken.method.value, round((taken.vram_reserved or 0) / GIB, 1)))
        runs_out(store, taken)
    assert seen == [("lora", 16.0), ("qlora", 8.0), ("qlora", 10.0), ("qlora", 12.5), ("qlora", 15.6)]
    assert store.jobs.get(1).status is Status.FAILED


@pytest.mark.both
def test_memory_that_an_outsider_took_does_not_raise_the_need(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=16, method="lora"))
    show(store)
    below = 16 * OUTSIDER_SHARE - 0.1
    for attempt in (1, 2):
        assert runs_out(store, claim(store), peak=below) is Status.QUEUED
        row = store.jobs.get(job_id)
        assert (row.vram_lora, row.attempt) == (16 * GIB, attempt)
        said = "; it held 13.5 of its 16.0 GiB, so another program seems to have taken memory of box:0"
        assert text_of_last(store, job_id)[1].endswith(said)
    runs_out(store, claim(store), peak=16 * OUTSIDER_SHARE + 0.1)
    assert store.jobs.get(job_id).vram_lora == 20 * GIB


@SQLITE_ALONE
def test_one_request_too_large_for_what_is_left_of_its_own_share_ends_too(store: Store) -> None:
    store.jobs.submit(submission(lora=16, qlora=8))
    show(store, total=18)
    seen = []
    while len(seen) < 12 and isinstance(taken := store.attempts.claim("box:0"), Claim):
        seen.append((taken.method.value, round((taken.vram_reserved or 0) / GIB, 1)))
        runs_out(store, taken, peak=0.5 * seen[-1][1])
    assert seen == [("lora", 16.0)] * OUTSIDER_LIMIT + [
        ("qlora", 8.0),
        ("qlora", 10.0),
        ("qlora", 12.5),
        ("qlora", 15.6),
    ]
    assert store.jobs.get(1).status is Status.FAILED


@SQLITE_ALONE
def test_a_trainer_that_planned_more_than_it_was_given_lacked_nothing_that_others_took(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=16, method="lora"))
    show(store, total=18)
    assert runs_out(store, claim(store), peak=0.5, need=Need(lora=30 * GIB, qlora=None)) is Status.FAILED
    assert store.jobs.get(job_id).message == "out of memory; lora had 16.0 GiB, and no card of the fleet has more"


@pytest.mark.both
@pytest.mark.parametrize("reason", [Reason.DRAINED, Reason.WORKER_LOST, Reason.TRAINER_ERROR])
def test_a_job_that_planned_less_as_it_ran_waits_where_that_fits(timed: Store, clock: Clock, reason: Reason) -> None:
    job_id = timed.jobs.submit(submission(lora=20, qlora=None, method="lora", max_retries=1))
    show(timed, "big:0")
    mine = claim(timed, "big:0")
    timed.attempts.beat(mine, Progress(need=Need(lora=10 * GIB, qlora=None)))
    timed.attempts.finish(mine, reason, "it stopped", Progress())
    row = timed.jobs.get(job_id)
    assert (row.vram_needed, row.vram_class) == (10 * GIB, 12)
    assert timed.jobs.has_unfinished(14 * GIB, {})
    clock.forward(120)
    show(timed, "small:0", 14)
    timed.cards.drain("big", "ada", "it is sold")
    assert claim(timed, "small:0").job_id == job_id


@SQLITE_ALONE
def test_a_job_of_unknown_need_learns_one_from_what_was_too_little(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=None, qlora=None, method="lora"))
    show(store, "a:0", 16)
    show(store, "b:0", 48, max_jobs=4)
    mine = claim(store, "a:0")
    assert mine.vram_reserved == 16 * GIB
    runs_out(store, mine)
    assert store.jobs.get(job_id).vram_needed == 20 * GIB
    assert claim(store, "b:0").vram_reserved == 20 * GIB


@SQLITE_ALONE
def test_on_a_processor_the_method_is_tried_no_more(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=16, qlora=8))
    show(store, total=64, kind="cpu")
    assert runs_out(store, claim(store), peak=3) is Status.QUEUED
    assert claim(store).method is Method.QLORA
    assert store.jobs.get(job_id).vram_lora == 64 * GIB + 1


@SQLITE_ALONE
def test_the_plan_that_a_trainer_on_a_processor_tells_is_the_attempt_s(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=2, method="lora"))
    show(store, total=64, kind="cpu")
    mine = claim(store)
    assert store.attempts.of_job(job_id)[0].vram_planned is None, "the job's may be one for a card"
    store.attempts.beat(mine, Progress(need=Need(lora=3 * GIB, qlora=GIB)))
    assert store.attempts.of_job(job_id)[0].vram_planned == 3 * GIB == store.jobs.get(job_id).vram_lora


@pytest.mark.both
def test_patience_and_steps_down_of_the_batch_end_with_a_new_reservation(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=16, qlora=8, lora_patience="9h"))
    show(store, "a:0", 18)
    mine = claim(store, "a:0")
    store.attempts.beat(mine, Progress(adjustment=Adjustment(micro_batch=1, accumulation=16)))
    assert store.jobs.get(job_id).adjustment == {"micro_batch": 1, "accumulation": 16}
    runs_out(store, mine)
    row = store.jobs.get(job_id)
    assert (row.lora_until, row.adjustment) == (None, None)
    again = claim(store, "a:0")
    assert (again.method, again.adjustment) == (Method.QLORA, Adjustment())


# --- learning ---


def ran(store: Store, key: str, peak: float, *, family: str = "llama", ends: Reason = Reason.OK, **keys: Any) -> int:
    """A job of that kind that ran once and peaked at so many GiB."""
    wanted = {"lora": 10, "method": "lora", **keys}
    job_id = store.jobs.submit(submission(**wanted, need_key=key, family=family))
    mine = claim(store)
    assert mine.job_id == job_id
    result = RESULT if ends is Reason.OK else None
    store.attempts.finish(mine, ends, "done", Progress(vram_process=int(peak * GIB), vram_peak=GIB), result)
    if store.jobs.get(job_id).status is Status.QUEUED:
        store.jobs.cancel(job_id, "ada")
    return job_id


@SQLITE_ALONE
def test_what_ran_on_gpus_is_remembered_by_key_and_by_family(store: Store) -> None:
    show(store, total=48)
    ran(store, "key-1", 9)
    ran(store, "key-2", 8, family="qwen2")
    ran(store, "key-3", 7)
    ran(store, "key-1", 10, ends=Reason.OUT_OF_MEMORY)
    ran(store, "key-1", 5, ends=Reason.TRAINER_ERROR)
    everything = store.attempts.measured()
    assert sorted(one.peak // GIB for one in everything if one.peak) == [7, 8, 9, 10], (
        "a failure says nothing of memory"
    )
    like = store.attempts.measured("key-1", "llama")
    assert sorted((one.need_key, one.out_of_memory) for one in like) == [
        ("key-1", False),
        ("key-1", True),
        ("key-3", False),
    ]
    assert {one.need_key for one in store.attempts.measured("key-2", None)} == {"key-2"}
    assert store.attempts.measured("no-such", None) == []
    assert len(store.attempts.measured(limit=2)) == 2
    assert like[0].planned == 10 * GIB and like[0].device_name == "NVIDIA A40"


@SQLITE_ALONE
@pytest.mark.parametrize("kind", ["cpu", "sim"])
def test_what_ran_on_no_real_card_teaches_nothing(store: Store, kind: str) -> None:
    show(store, total=48, kind=kind)
    ran(store, "key-1", 9)
    assert store.attempts.measured() == []


@SQLITE_ALONE
def test_the_next_job_like_it_is_reserved_what_the_last_one_took(store: Store) -> None:
    show(store, total=48)
    ran(store, "key-1", 8)
    planned = Need(lora=10 * GIB, qlora=5 * GIB)
    assert learned(planned, "key-1", store.attempts.measured("key-1", "llama")) == Need(
        lora=int(8 * GIB * LIKE_IT_SPARE), qlora=5 * GIB
    )
    ran(store, "key-1", 10, ends=Reason.OUT_OF_MEMORY)
    found = learned(planned, "key-1", store.attempts.measured("key-1", "llama"))
    assert found.lora == int(10 * GIB * GROWTH), "what was too little once is too little again"
    assert peaks_like("key-1", Method.LORA, store.attempts.measured()) == [8 * GIB]


def test_the_attempt_s_plan_is_the_one_before_what_was_learned(store: Store) -> None:
    show(store, total=48)
    wanted = submission(lora=10, method="lora", need_key="k", family="llama")
    job_id = store.jobs.submit(replace(wanted, plan=replace(wanted.plan, need=Need(lora=12 * GIB, qlora=None))))
    mine = claim(store)
    assert (mine.vram_planned, mine.vram_reserved) == (10 * GIB, 12 * GIB)
    store.attempts.beat(mine, Progress(need=Need(lora=5 * GIB, qlora=2 * GIB)))
    row = store.jobs.get(job_id)
    assert (row.vram_lora, row.vram_reserved) == (6 * GIB, 6 * GIB), "a fifth more was learned, and holds for it too"
    assert store.attempts.of_job(job_id)[0].vram_planned == 5 * GIB
    store.attempts.beat(mine, Progress(need=Need(lora=10 * GIB, qlora=5 * GIB)))  # its rows prove to need padding
    row = store.jobs.get(job_id)
    assert (row.vram_lora, row.vram_reserved) == (12 * GIB, 6 * GIB), "it has no more, the next attempt will"
    assert store.attempts.of_job(job_id)[0].vram_planned == 10 * GIB, "which its peak is compared with"


def test_a_trainer_s_plan_corrects_a_need_that_nothing_has_taught(store: Store) -> None:
    """A row's own figures of one byte would make each better plan one of one byte, too."""
    wanted = submission(lora=40, method="lora", roomy={4: 44})
    job_id = store.jobs.submit(replace(wanted, plan=replace(wanted.plan, need=Need(lora=1, qlora=None))))
    show(store, total=48, max_jobs=4)
    mine = claim(store)
    assert runs_out(store, mine, peak=0.5, need=Need(lora=40 * GIB, qlora=10 * GIB)) is Status.QUEUED
    assert store.jobs.get(job_id).vram_lora == int(FACTOR_BOUNDS[0] * 40 * GIB)
    show(store, total=48, max_jobs=4, outside_bytes=47 * GIB)
    assert store.attempts.claim("box:0") is None


@pytest.mark.both
def test_a_need_has_a_floor_that_its_base_s_recorded_size_gives(store: Store) -> None:
    """Not the peaks of other jobs on it: those grow with the rows, and a job of short rows fits a small card."""
    show(store, total=48, max_jobs=4)
    store.jobs.submit(submission(need_key="key-1"))
    store.attempts.beat(first := claim(store), Progress(base_bytes=5 * GIB))
    store.attempts.finish(first, Reason.OK, "done", Progress(vram_process=40 * GIB), RESULT)
    store.jobs.submit(submission(lora=6, method="lora"))
    store.attempts.beat(several := claim(store), Progress(base_bytes=GIB))
    with store.engine.begin() as connection:
        part = {"job_id": several.job_id, "attempt": 1, "rank": 1, "node": "box:1", "bytes": GIB}
        connection.execute(insert(AttemptShare).values(part))
    store.attempts.finish(several, Reason.OK, "its cards had a part of the base each", Progress(), RESULT)
    short = store.jobs.submit(submission(lora=6, method="lora"))
    mine = claim(store)
    assert (mine.job_id, mine.vram_reserved) == (short, 6 * GIB)
    store.attempts.finish(mine, Reason.OK, "done", Progress(), RESULT)
    job_id = store.jobs.submit(submission(lora=1 / GIB, method="lora"))
    show(store, total=48, max_jobs=4, outside_bytes=47 * GIB)
    assert store.attempts.claim("box:0") == Left(nodes=frozenset()), "look again"
    assert store.attempts.claim("box:0") is None
    assert store.jobs.get(job_id).vram_needed == int(LEAST_SHARE * 5 * GIB) == 4 * GIB
    least = "its base alone was measured to take 5.0 GiB with lora"
    assert text_of_last(store, job_id) == ("planned", f"needs 4.0 GiB, not 0.0: {least}")
    show(store, total=48, max_jobs=4)
    assert claim(store).vram_reserved == 4 * GIB
    other = store.jobs.submit(submission(lora=1 / GIB, method="lora", base_model="org/unknown"))
    assert claim(store).job_id == other, "nothing is known of that one"


def test_what_waits_and_what_runs_hides_no_attempt_of_its_kind(store: Store) -> None:
    """The newest jobs are asked, of those that have run: behind a long queue others would be out of sight."""
    show(store, total=48)
    ran(store, "key-1", 9)
    for _ in range(2):
        store.jobs.submit(submission(need_key="key-1", family="llama"))
    assert (
        len(store.attempts.measured("key-1", None, limit=1))
        == len(store.attempts.measured("key-9", "llama", limit=1))
        == 1
    )


@pytest.mark.both
def test_an_attempt_of_an_older_engine_teaches_nothing(store: Store) -> None:
    """Its steps took other memory: its peak would be reserved for jobs like it for ever."""
    show(store, total=48)
    ran(store, "key-1", 9)
    assert len(store.attempts.measured("key-1", "llama")) == 1
    with Session(store.engine) as session, session.begin():
        session.execute(update(Attempt).values(engine=ENGINE - 1))
    assert store.attempts.measured() == [] == store.attempts.measured("key-1", "llama")


@pytest.mark.both
def test_an_older_version_s_attempt_without_a_name_is_unknown(store: Store) -> None:
    show(store, total=48)
    ran(store, "key-1", 9)
    with Session(store.engine) as session, session.begin():
        session.execute(update(Attempt).values(device_name=None, vram_process=None))
    (one,) = store.attempts.measured()
    assert one == Measured(
        device_name="unknown", method=Method.LORA, family="llama", need_key="key-1", planned=10 * GIB,
        reserved=10 * GIB, peak=GIB + CONTEXT_BYTES, out_of_memory=False,
    )  # fmt: skip


@SQLITE_ALONE
def test_where_nvml_shows_no_process_the_allocator_s_peak_counts_with_a_context(store: Store) -> None:
    """In a container or WSL: without it the next job like it would be reserved too little, and run out of memory."""
    show(store, total=48)
    store.jobs.submit(submission(lora=10, method="lora", need_key="key-1", family="llama"))
    store.attempts.finish(claim(store), Reason.OK, "done", Progress(vram_peak=8 * GIB), RESULT)
    assert peaks_like("key-1", Method.LORA, store.attempts.measured()) == [8 * GIB + CONTEXT_BYTES]
    need = learned(Need(lora=10 * GIB, qlora=None), "key-1", store.attempts.measured("key-1", "llama")).lora
    assert need is not None and need - CONTEXT_BYTES > 8 * GIB, "the allocator has no less than it took"


@SQLITE_ALONE
def test_a_small_job_that_nvml_does_not_show_held_its_context_too(store: Store) -> None:
    """Else an outsider would be blamed, and the job run out of memory again with no more than before."""
    job_id = store.jobs.submit(submission(lora=2, method="lora"))
    show(store)
    mine = claim(store)
    store.attempts.finish(mine, Reason.OUT_OF_MEMORY, "full", Progress(vram_peak=int(1.4 * GIB)))
    assert store.jobs.get(job_id).vram_lora == int(2 * GIB * GROWTH)


LLAMA = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip


def submit_before_the_upgrade(store: Store, base: Path | str, **asked: Any) -> int:
    """A job that waits with a plan for other steps: 30 GiB, where today's need 13."""
    job_id = store.jobs.submit(
        submission(lora=30, qlora=20, base_model=str(base), method="lora", need_key="old", **asked)
    )
    set_columns(store, job_id, engine=ENGINE - 1)
    return job_id


def set_columns(store: Store, job_id: int, **values: Any) -> None:
    with Session(store.engine) as session, session.begin():
        session.execute(update(Job).where(Job.job_id == job_id).values(**values))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


@SQLITE_ALONE
def test_after_an_upgrade_what_waits_is_planned_for_the_new_steps(store: Store, base: Path) -> None:
    job_id = submit_before_the_upgrade(store, base, priority=3)
    show(store)
    assert store.attempts.claim("box:0") is None, "it was planned for more than the card has"
    assert store.jobs.replan_outdated() == [job_id]
    job, asked = store.jobs.get(job_id), submission(base_model=str(base), method="lora").spec
    need = predict(asked)
    assert (job.vram_lora, job.vram_qlora, job.vram_needed) == (need.lora, need.qlora, need.lora)
    assert job.planned == vars(need)
    assert (job.need_key, job.family, job.engine) == (need_key(asked, {}), "llama", ENGINE)
    text = f"planned again for this version's steps: lora {gib(need.lora)} GiB, qlora {gib(need.qlora)} GiB"
    assert text_of_last(store, job_id) == ("planned", text)
    assert store.jobs.replan_outdated() == [], "once"
    assert claim(store).job_id == job_id


@pytest.mark.both
def test_only_what_waits_with_an_older_plan_is_planned_anew_where_its_base_is(store: Store, base: Path) -> None:
    elsewhere, cancelled = submit_before_the_upgrade(store, "/nowhere"), submit_before_the_upgrade(store, base)
    store.jobs.cancel(cancelled, "ada")
    newest = store.jobs.submit(submission(lora=30, base_model=str(base)))
    unreadable = submit_before_the_upgrade(store, base)
    set_columns(store, unreadable, spec={**store.jobs.get(unreadable).spec, "something_new": 1})
    assert store.jobs.replan_outdated() == []
    assert {store.jobs.get(each).vram_lora for each in (elsewhere, cancelled, newest, unreadable)} == {30 * GIB}
    store.jobs.retry(cancelled, "ada")
    assert store.jobs.replan_outdated() == [cancelled]


@pytest.mark.both
def test_a_job_that_has_run_keeps_what_its_own_rows_have_taught(store: Store, base: Path) -> None:
    job_id = submit_before_the_upgrade(store, base)
    set_columns(store, job_id, attempt=1, vram_lora=GIB, planned={"lora": GIB, "qlora": None})
    assert store.jobs.replan_outdated() == [job_id]
    job, need = store.jobs.get(job_id), predict(submission(base_model=str(base), method="lora").spec)
    assert (job.vram_lora, job.vram_qlora) == (GIB, need.qlora)
    assert job.planned == {"lora": GIB, "qlora": need.qlora}
