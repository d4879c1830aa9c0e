"""The roles that loractl db roles makes: who submits can't claim, and a worker can't submit."""

from __future__ import annotations

import datetime as dt
import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from starlette.testclient import TestClient

from loractl.common.artifacts import ArtifactStore
from loractl.common.channels import Channel
from loractl.common.errors import Forbidden, NotYours, ValueRefused, WrongState
from loractl.common.job.adjustment import Adjustment
from loractl.common.job.method import Need
from loractl.common.job.names import Reference
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.job.sweep import NewSweep
from loractl.common.settings import load_settings
from loractl.common.store.database import DatabaseError, make_engine
from loractl.common.store.guard import retried
from loractl.common.store.records import Claim, Delivery, Progress, StoredCheckpoint
from loractl.common.store.roles import SUBMIT, apply_roles, unbounded
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import GIB
from loractl.scheduler.change.amendment import amendment
from loractl.scheduler.lab.health.services import see_logins
from loractl.scheduler.web.guard import Access
from loractl.scheduler.web.pages.shelf import ReportShelf
from loractl.scheduler.web.site import make_site

from ..conftest import Cli
from ..models import write_helpdesk
from ..roles import Logins, role
from ..unit.factories import RESULT, node_state, submission, take

REFUSED = (Forbidden, DatabaseError, ValueRefused)
"""What a login is told: by a function at once, or by a bound, of a change at its COMMIT."""


def test_who_submits_can_submit_cancel_hold_retry_and_read(person: Store, box: Store) -> None:
    first, second = person.jobs.submit(submission()), person.jobs.submit(submission(name="b"))
    person.jobs.hold(second, "ada", "wait")
    person.jobs.release(second, "ada")
    person.jobs.cancel(second, "ada")
    person.jobs.retry(second, "ada")
    assert isinstance(take(box), Claim)
    assert person.jobs.cancel(first, "ada").cancel_requested, "a running job is asked"
    for read in (
        person.jobs.matching,
        person.cards.fleet,
        person.cards.nodes,
        person.adapters.all,
        person.attempts.measured,
        person.cards.drains,
        person.now,
    ):
        read()
    for read_one in (person.jobs.get, person.jobs.events, person.attempts.of_job, person.jobs.log):
        read_one(first)


def test_who_submits_chains_jobs_and_lets_none_of_them_start_early(person: Store, box: Store, lab: Logins) -> None:
    first = person.jobs.submit(submission())
    last, other = (person.jobs.submit(submission(after=[first])) for _ in range(2))
    person.jobs.hold(last, "ada", "wait")
    person.jobs.release(last, "ada")
    person.jobs.cancel(last, "ada")
    person.jobs.retry(last, "ada")
    person.jobs.cancel(last, "ada")
    person.jobs.retry(last, "ada", amendment(person, last, ["priority=5"]))
    for changed in ("after=[]", f"after=[{first}]"):
        person.jobs.edit(amendment(person, other, [changed]), "ada")
    assert [(row.awaits, row.held) for row in map(person.jobs.get, (last, other))] == [(first, False)] * 2
    engine = make_engine(lab.person)
    early = ({"awaits": None}, {"held": True})
    for new in early:  # as retry does, and more
        asked = {"number": last, "new": json.dumps({**vars_of_a_retry(), **new})}
        with pytest.raises(Forbidden), engine.begin() as connection:
            connection.execute(
                text("SELECT loractl_change(:number, 'retry', '{}', CAST(:new AS json), 'ada', '')"), asked
            )
    engine.dispose()
    claim = take(box)
    assert isinstance(claim, Claim) and claim.job_id == first and take(box) is None
    box.attempts.finish(claim, Reason.OK, "", Progress(), RESULT)
    assert not person.jobs.get(last).held
    following = take(box)
    assert isinstance(following, Claim) and following.job_id == last


def test_who_submits_writes_no_row_that_keeps_others_from_ending_or_can_t_be_cancelled(
    person: Store, lab: Logins
) -> None:
    """A list longer than a statement may be, and text that one of PostgreSQL's two kinds of JSON can't hold."""
    first = person.jobs.submit(submission())
    mine, engine = person.jobs.submit(submission(after=[first])), make_engine(lab.person)
    spec = person.jobs.get(mine).spec
    for new in ({"spec": {**spec, "after": [first, *range(1000, 71_000)]}}, {"labels": {"team": "\u0000"}}):
        asked = {"number": mine, "new": json.dumps(new)}
        with pytest.raises(REFUSED), engine.begin() as connection:
            connection.execute(
                text("SELECT loractl_change(:number, 'edited', '{}', CAST(:new AS json), 'ada', '')"), asked
            )
    row = _row(person, first)
    with pytest.raises(REFUSED), engine.begin() as connection:
        connection.execute(SUBMIT_JOB, {"document": json.dumps({"job": {**row, "labels": {"team": "\u0000"}}})})
    with engine.begin() as connection:
        connection.execute(SUBMIT_JOB, {"document": json.dumps({"job": {**row, "labels": {"team": "red"}}})})
    engine.dispose()
    assert person.jobs.get(mine).spec == spec and len(person.jobs.matching()) == 3


def test_the_owner_alone_writes_the_lab_s_settings_and_everybody_reads_them(
    person: Store, box: Store, owner_url: str
) -> None:
    engine = make_engine(owner_url)
    owner = Store(engine)
    owner.lab.set("store", "one")
    for login in (person, box):
        for name in ("store", "new"):
            with pytest.raises(Forbidden):
                login.lab.set(name, "mine")
        assert (login.lab.setting("store"), login.lab.setting("new")) == ("one", None)
    owner.lab.set("store", "two")
    assert box.lab.setting("store") == "two"
    engine.dispose()


def test_the_owner_alone_sets_quotas_and_a_box_counts_what_is_had(person: Store, box: Store, owner_url: str) -> None:
    for login in (person, box):
        with pytest.raises(Forbidden):
            login.usage.set_quota("ada", 1e9, 86400, soft=True)
        with pytest.raises(Forbidden):
            login.usage.remove_quota("ada")
        for what in ("card_hours = 1e6", "window_s = 1", "\"user\" = 'eve'"):
            with pytest.raises(Forbidden), login.engine.begin() as connection:
                connection.execute(text(f"UPDATE quotas SET {what}"))  # by hand
    engine = make_engine(owner_url)
    person.jobs.submit(submission(labels={"team": "nlp"}))
    claim = take(box)
    assert isinstance(claim, Claim)
    Store(engine).usage.set_quota(claim.user, 1.0, 86400, soft=False)
    box.attempts.finish(claim, Reason.OK, "", Progress(), RESULT)
    box.cards.take_turn(0.0, 0.0)
    (use,) = [one for one in person.usage.since(person.now()) if one.jobs]
    assert (use.user, use.labels) == (claim.user, {"team": "nlp"})
    assert not person.usage.allowances()[claim.user].exceeded
    engine.dispose()


def test_a_person_changes_their_own_jobs_operators_and_the_owner_all_and_a_lab_may_be_open(
    person: Store, box: Store, lab: Logins, owner_url: str
) -> None:
    owner, ada = Store(make_engine(owner_url)), str(make_url(lab.person).username)
    ended, waits, runs = (person.jobs.submit(submission(name=name)) for name in ("ended", "waits", "runs"))
    claim = take(box)
    assert isinstance(claim, Claim) and claim.job_id == ended
    box.attempts.finish(claim, Reason.OK, "better", Progress(), RESULT)
    person.jobs.hold(waits, "ada")
    claim = take(box)
    assert isinstance(claim, Claim) and claim.job_id == runs
    person.jobs.release(waits, "ada")
    name = f"bob_{secrets.token_hex(4)}"
    with role(owner_url, name, SUBMIT) as url:
        bob = Store(make_engine(url))
        asked = {
            "cancel": lambda login: login.jobs.cancel(runs, ada),
            "hold": lambda login: login.jobs.hold(waits, ada),
            "retry": lambda login: login.jobs.release(waits, ada),
            "tag": lambda login: login.adapters.tag(Reference(job_id=ended), "prod", ada),
        }
        for tag in ("latest", "a\nb", "x" * 64, ""):
            with (
                pytest.raises(DatabaseError, match="is not a tag that a person can give"),
                person.engine.begin() as connection,
            ):
                call = text("SELECT loractl_tag('ended', :tag, :job_id, NULL, 'ada')")
                connection.execute(call, {"tag": tag, "job_id": ended})
        with owner.engine.connect() as connection:
            limit = text("SELECT rolconnlimit FROM pg_roles WHERE rolname IN (:name, :box) ORDER BY rolconnlimit")
            logins = {"name": name, "box": make_url(lab.box).username}
            assert connection.execute(limit, logins).scalars().all() == [-1, 20]
        before = _all_rows(owner.engine)
        for login in (bob, box):
            for what in ("cancel", "hold", "tag"):
                with pytest.raises(
                    NotYours, match=f"is {ada}'s: only {ada}, an operator or the lab's owner may {what} it"
                ):
                    asked[what](login)
        with pytest.raises(NotYours, match="may edit it"):
            bob.jobs.edit(amendment(bob, waits, ["priority=5"]), ada)
        assert _all_rows(owner.engine) == before
        with pytest.raises(Forbidden, match="only the lab's owner decides what holds for the whole lab"):
            bob.lab.set("operators", name)
        owner.lab.set("operators", f"x {name}")
        asked["hold"](bob)
        bob.jobs.edit(amendment(bob, waits, ["priority=5"]), ada)
        owner.lab.set("operators", "")
        with pytest.raises(NotYours):
            asked["retry"](bob)
        owner.lab.set("changes", "open")
        with pytest.raises(NotYours, match="may edit it"):
            bob.jobs.edit(amendment(bob, waits, ["priority=6"]), ada)
        for what in ("retry", "tag", "cancel"):
            asked[what](bob)
        owner.lab.set("changes", "own")
        owner.jobs.hold(waits, "root")
        told = [event.text for event in owner.jobs.events(waits)][-4:]
        assert told[0] == f"held by {name}" and told[2:] == [f"queued again by {name}", "held by root"]
        own = bob.jobs.submit(submission(name="ended"))
        claim = take(box, node="box:1")
        assert isinstance(claim, Claim) and claim.job_id == own
        box.attempts.finish(claim, Reason.OK, "better", Progress(), RESULT)
        with pytest.raises(NotYours, match=f"is {ada}'s: only {ada}, an operator or the lab's owner may tag it"):
            bob.adapters.tag(Reference(job_id=own), "prod", name)  # it would be taken from the other's
        for one in (bob, owner):
            one.engine.dispose()


def test_numbers_are_compared_as_they_are_and_not_as_a_login_rounds_them(
    person: Store, lab: Logins, owner_url: str
) -> None:
    job_id, owner, engine = person.jobs.submit(submission()), make_engine(owner_url), make_engine(lab.person)
    with owner.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET loss = 0.2345")
    with pytest.raises((Forbidden, DatabaseError)), engine.begin() as connection:
        connection.exec_driver_sql("SET extra_float_digits = -15")
        said = '{"held": true, "loss": 0.21}'
        connection.exec_driver_sql(f"SELECT loractl_change({job_id}, 'held', '{{}}', '{said}', '', '')")
    assert person.jobs.get(job_id).loss == 0.2345
    for one in (owner, engine):
        one.dispose()


def vars_of_a_retry() -> dict[str, object]:
    return {**retried(), "status": "queued", "result_until": None}


def test_a_look_at_final_rows_is_the_login_s_and_of_now(person: Store, box: Store, lab: Logins) -> None:
    job_id = person.jobs.submit(submission())
    claim = take(box)
    assert (
        isinstance(claim, Claim)
        and box.attempts.finish(claim, Reason.OK, "better", Progress(), RESULT) is Status.SUCCEEDED
    )
    engine = make_engine(lab.person)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"SELECT loractl_look({job_id}, 'f', 'eve', '2001-01-01')")
    engine.dispose()
    person.results.look(job_id, "f", "eve")
    login, looks = make_url(lab.person).username, box.results.look(job_id, "f", "heron")
    logins = (login, login, make_url(lab.box).username)
    assert [(one.user, one.sweep_id) for one in looks] == [(login, None) for login in logins]
    assert all(abs((one.at - box.now()).total_seconds()) < 600 for one in looks)


def test_who_submits_draws_no_number_and_numbers_go_on_beyond_32_bits(
    person: Store, box: Store, lab: Logins, owner_url: str
) -> None:
    owner, login = make_engine(owner_url), make_engine(lab.person)
    with owner.begin() as connection:
        sequences = connection.exec_driver_sql("SELECT sequencename FROM pg_sequences").scalars().all()
        assert len(sequences) == 6
        for sequence in sequences:
            connection.exec_driver_sql(f"SELECT setval('{sequence}', {2**31 + 5})")
    for sequence in sequences:
        for call in ("nextval('{}')", "setval('{}', 1)", "currval('{}')"):
            with pytest.raises(Forbidden), login.begin() as connection:
                connection.exec_driver_sql(f"SELECT {call.format(sequence)}")
    first = person.jobs.submit(submission())
    assert first > 2**31
    second = person.jobs.submit(submission(name="b", after=[first], labels={"team": "nlp"}))
    claim = take(box)
    assert isinstance(claim, Claim) and claim.job_id == first
    assert box.attempts.beat(
        claim, Progress(stage=Stage.TRAINING, step=1, log="x", metrics=((1, "loss", 1.0),))
    ).recorded
    assert box.attempts.finish(claim, Reason.OK, "better", Progress(), RESULT) is Status.SUCCEEDED
    person.adapters.tag(Reference(job_id=first), "prod", "ada")
    assert [one.look_id > 2**31 for one in person.results.look(first, "f", "ada")] == [True]
    person.jobs.hold(second, "ada")
    person.jobs.edit(amendment(person, second, ["labels.a=b"]), "ada")
    person.jobs.release(second, "ada")
    last = take(box)
    assert isinstance(last, Claim) and last.job_id == second
    assert person.jobs.cancel(second, "ada").cancel_requested
    assert box.attempts.finish(last, Reason.CANCELLED, "stopped", Progress()) is Status.CANCELLED
    sweep_id = person.sweeps.submit(NewSweep(name="a", varied={}, rungs=None), [submission()])
    assert sweep_id > 2**31 and person.sweeps.get(sweep_id).members[0].job_id > second
    for engine in (owner, login):
        engine.dispose()


def test_the_page_s_role_reads_all_that_is_shown_and_writes_nothing(
    lab: Logins, person: Store, box: Store, owner_url: str, tmp_path: Path
) -> None:
    first, name = person.jobs.submit(submission()), f"web_{secrets.token_hex(4)}"
    assert isinstance(take(box), Claim)
    with role(owner_url, name, "loractl_web") as url:
        store = Store(make_engine(url, read_only=True))
        shelf = ReportShelf(store, lambda: ArtifactStore(tmp_path.as_uri()))
        site = make_site(store, shelf, Access(token=None, names=frozenset({"localhost"})))
        client = TestClient(site, base_url="http://localhost")
        for address in ("/", "/jobs", f"/jobs/{first}", f"/jobs/{first}/log", "/sweeps", "/adapters", "/metrics"):
            assert client.get(address).status_code == 200, address
        assert "loractl_database_up 1.0" in client.get("/metrics").text
        writing = Store(make_engine(url))
        for write in (
            lambda: writing.jobs.submit(submission()),
            lambda: writing.jobs.cancel(first, name),
            lambda: writing.results.look(first, "f", name),
        ):
            with pytest.raises(Forbidden):
                write()
        for one in (store, writing):
            one.engine.dispose()


def test_who_submits_edits_what_is_its_own_and_no_more(person: Store, box: Store, lab: Logins, owner_url: str) -> None:
    owner = make_engine(owner_url)
    others, mine = (
        Store(owner).jobs.submit(submission(user="eve")),
        person.jobs.submit(submission(resources={"time_limit": 9})),
    )

    def edit(job_id: int, *overrides: str) -> None:
        person.jobs.edit(amendment(person, job_id, overrides), "ada")

    edit(mine, "priority=4", "name=mine", "lora_patience=1h", "resources.node_labels.a=b", "dataset.max_length=64")
    edit(mine, "resources.node_labels={}", "lora_patience=null", "method=lora", "training.learning_rate=0.1")
    with pytest.raises(Forbidden):
        edit(others, "labels.a=b")
    claim = take(box)
    assert isinstance(claim, Claim) and claim.job_id == mine
    edit(mine, "resources.time_limit=8", "priority=5", "labels.a=b")
    assert box.attempts.beat(claim, Progress()).time_limit == 8
    box.attempts.finish(claim, Reason.TIMED_OUT, "ran longer", Progress())
    person.jobs.retry(mine, "ada", amendment(person, mine, ["resources.time_limit=7"]))
    again = take(box)
    assert isinstance(again, Claim) and again.spec.resources.time_limit == 7
    engine = make_engine(lab.person)
    for statement in (
        "vram_lora = 1",
        "methods = '[]'",
        "spec = jsonb_set(spec\\:\\:jsonb, '{lora,r}', '1')\\:\\:json",
    ):
        with pytest.raises(Forbidden), engine.begin() as connection:
            connection.execute(text(f"UPDATE jobs SET {statement} WHERE job_id = {mine}"))
            pytest.fail(f"{statement} was let through while it runs")
    engine.dispose()
    owner.dispose()


@pytest.mark.parametrize(
    "smaller",
    [
        Adjustment(micro_batch=1, accumulation=16),
        Adjustment(eval_batch=2),
        Adjustment(micro_batch=2, accumulation=8, gradient_checkpointing=True, eval_batch=4),
    ],
)
def test_who_submits_reproduces_a_job_in_the_pieces_in_which_it_ended(person: Store, smaller: Adjustment) -> None:
    """Its first row has a history: what out-of-memory had changed in the other job."""
    job_id = person.jobs.submit(replace(submission(), adjustment=smaller, purpose="to reproduce job 1"))
    assert person.jobs.get(job_id).adjustment == smaller.as_json()


def test_a_job_in_smaller_pieces_is_edited_to_no_other_batch(person: Store, lab: Logins) -> None:
    """It would train with the batch of its pieces, whatever its file says."""
    adjustment = Adjustment(micro_batch=1, accumulation=16)
    job_id = person.jobs.submit(replace(submission(), adjustment=adjustment, purpose="to reproduce job 1"))
    engine = make_engine(lab.person)

    def edit(**training: float) -> None:
        spec = person.jobs.get(job_id).spec
        new = json.dumps({"spec": {**spec, "training": {**spec["training"], **training}}})
        call = text("SELECT loractl_change(:job_id, 'edited', '{}', CAST(:new AS json), 'ada', '')")
        with engine.begin() as connection:
            assert connection.execute(call, {"job_id": job_id, "new": new}).scalar()

    edit(learning_rate=0.001)
    with pytest.raises(Forbidden):
        edit(gradient_accumulation_steps=3)
    engine.dispose()
    change = amendment(person, job_id, ["training.gradient_accumulation_steps=3"])
    assert person.jobs.edit(change, "ada").adjustment is None, "with its pieces gone it may take another one"


def test_a_box_plans_anew_what_waits_since_before_an_upgrade(
    person: Store, box: Store, owner_url: str, tmp_path: Path
) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 2, "vocab_size": 500}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    job_id = person.jobs.submit(submission(lora=30, base_model=str(tmp_path)))
    owner = make_engine(owner_url)
    with owner.begin() as connection:
        connection.execute(text(f"UPDATE jobs SET engine = 1 WHERE job_id = {job_id}"))
    owner.dispose()
    assert box.jobs.replan_outdated() == [job_id]
    assert (box.jobs.get(job_id).vram_lora or 0) < GIB


def test_who_submits_cannot_claim_or_touch_what_is_a_worker_s(person: Store, box: Store) -> None:
    running = person.jobs.submit(submission())
    person.jobs.submit(submission(name="waits"))
    claim = take(box)
    assert isinstance(claim, Claim)
    for forbidden in (
        lambda: person.attempts.claim("box:0"),
        lambda: take(person),
        lambda: person.attempts.finish(claim, Reason.OK, "", Progress(), RESULT),
        lambda: person.attempts.keep_checkpoint(claim, StoredCheckpoint(step=1, prefix="jobs/1/checkpoints/1-1")),
        lambda: person.cards.drain("box", "ada", "mine"),
        lambda: person.cards.forget("box:0"),
        lambda: person.usage.set_quota("ada", 1e9, 86400, soft=True),
        lambda: apply_roles(person.engine),
        lambda: person.results.remove(running, "ada"),
    ):
        with pytest.raises(Forbidden, match=r"does not let ada_\w+ do that: only (boxes and )?the lab's owner "):
            forbidden()
    assert box.jobs.get(running).token == claim.token


def _called(number: int, kind: str, new: str, expected: str = "{}") -> str:
    return f"SELECT loractl_change({number}, '{kind}', '{expected}', '{new}', 'ada', '')"


BY_HAND = [
    # job 1 runs, job 2 waits, job 3 is somebody else's and has succeeded, job 4 is that one's and waits
    "UPDATE jobs SET status = 'cancelled' WHERE status = 'queued'",
    "UPDATE jobs SET message = 'bad result, do not use' WHERE status = 'succeeded'",
    "UPDATE jobs SET held = held",
    "SELECT * FROM jobs FOR UPDATE",
    "SELECT * FROM jobs FOR KEY SHARE",
    "SELECT * FROM locks FOR UPDATE",
    "INSERT INTO locks VALUES ('user eve')",
    "LOCK TABLE jobs IN SHARE MODE",
    "LOCK TABLE attempts IN ROW EXCLUSIVE MODE",
    "LOCK TABLE alembic_version IN EXCLUSIVE MODE",
    "INSERT INTO wishes VALUES (1, 'eve', now())",
    "DELETE FROM tags",
    "UPDATE tags SET job_id = 2",
    "INSERT INTO tags (name, tag, job_id) VALUES ('tiny', 'prod', 1)",
    "DELETE FROM job_labels",
    "INSERT INTO job_labels VALUES (4, 'a', 'b')",
    "INSERT INTO looks (job_id, rows_sha256, \"user\", at) VALUES (1, 'f', 'eve', now())",
    "UPDATE looks SET job_id = 2",
    "DELETE FROM looks",
    "INSERT INTO events (job_id, attempt, at, kind, text) VALUES (1, 1, now(), 'started', 'forged')",
    "INSERT INTO events (job_id, at, kind, text) VALUES (3, now(), 'failed', 'cancelled by eve')",
    "INSERT INTO events (job_id, at, kind, text) VALUES (4, now(), 'queued', 'queued by eve')",
    "INSERT INTO events (job_id, at, kind, text) VALUES (2, now(), 'held', 'held by eve')",
    _called(3, "edited", '{"message": "bad result, do not use"}'),
    _called(3, "retry", '{"status": "queued"}'),
    _called(3, "cancelled", '{"status": "cancelled", "reason": "cancelled"}'),
    _called(3, "held", '{"held": true}'),
    _called(1, "edited", '{"ended_at": "2026-01-01T00:00:00Z"}'),
    _called(1, "cancelled", '{"status": "cancelled", "reason": "cancelled", "ended_at": "2026-01-01T00:00:00Z"}'),
    _called(1, "held", '{"held": true}'),
    _called(1, "retry", '{"status": "queued", "token": null}'),
    _called(1, "edited", '{"vram_lora": 1}'),
    _called(1, "edited", '{"methods": []}'),
    _called(1, "edited", '{"job_id": 9}'),
    _called(2, "edited", '{"status": "running"}'),
    _called(2, "edited", '{"user": "eve"}'),
    _called(2, "edited", '{"data": {"path": 1}}'),
    _called(2, "edited", '{"queue_key": "garbage"}'),
    _called(2, "edited", '{"methods": 5}'),
    _called(2, "edited", '{"spec": {}}'),
    _called(2, "held", '{"held": true, "avoids": 5}'),
    _called(2, "held", '{"held": true, "retries_used": 2000000000}'),
    _called(2, "held", '{"held": false}'),
    _called(2, "cancelled", '{"status": "succeeded"}'),
    _called(2, "cancelled", '{"status": "cancelled", "reason": "diverged"}'),
    _called(2, "cancelled", '{"status": "cancelled", "reason": "cancelled", "ended_at": "-infinity"}'),
    _called(2, "retry", '{"status": "queued", "not_before": "infinity"}'),
    _called(4, "edited", '{"priority": 5}'),
    "SELECT loractl_may_change(j, j, 'x') FROM jobs j FOR UPDATE",
    "INSERT INTO attempts SELECT * FROM attempts",
    "INSERT INTO nodes SELECT * FROM nodes",
    "DELETE FROM jobs",
    "DELETE FROM events",
    "DROP FUNCTION loractl_is_new(jobs)",
    "DROP FUNCTION loractl_tag(text, text, bigint, bigint, text)",
    "CREATE TABLE mine (a int)",
    "CREATE TEMP TABLE mine (a int)",
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, '\\x00')",
    "CREATE OR REPLACE FUNCTION loractl_login() RETURNS text LANGUAGE sql AS ''",
    "SET ROLE loractl_worker",
    "GRANT loractl_worker TO CURRENT_USER",
]
"""What a client could try that speaks SQL by itself."""

HISTORY = {
    "status": "running",
    "token": "mine",
    "held": True,
    "awaits": 10**6,
    "attempt": 3,
    "retries_used": 2147483647,
    "lab_failures": 2147483647,
    "avoids": 5,
    "preempted_by": 1,
    "loss": 0.001,
    "adapter_uri": "x",
    "result_host": "heron",
    "manifest_sha256": "x",
    "checkpoint": {"step": "../../x", "prefix": "jobs/1/attempt-1"},
}
"""Columns that no new row has set."""

UNREADABLE: dict[str, list[Any]] = {
    "methods": [["x"], None, "lora", {}],
    "adjustment": [
        5,
        [],
        {"micro_batch": 1},
        {"micro_batch": 1, "accumulation": 15},
        {"micro_batch": "1", "accumulation": 16},
        {"micro_batch": -1, "accumulation": -16},
        {"eval_batch": 0},
        {"eval_batch": None},
        {"gradient_checkpointing": 1},
        {"x": 1},
    ],
    "queue_key": ["garbage", "", "10000|001|{5}|ada", "00000|001||ada", "10000|001||eve"],
    "submitted_at": ["infinity", "-infinity", "2001-01-01"],
    "lora_until": ["infinity"],
    "not_before": ["infinity"],
    "ended_at": ["2026-01-01"],
    "priority": [2000],
}
"""Values by column that would stop the workers, or that only the database gives."""


def test_by_hand_who_submits_cannot_do_more(person: Store, box: Store, lab: Logins, owner_url: str) -> None:
    owner = make_engine(owner_url)
    for name in ("runs", "waits"):
        person.jobs.submit(submission(name=name))
    claim = take(box)
    assert (
        isinstance(claim, Claim) and box.attempts.beat(claim, Progress(stage=Stage.TRAINING, step=1, loss=1.0)).accepted
    )
    person.jobs.hold(2, "ada")
    assert Store(owner).jobs.submit(submission(user="eve", priority=9)) == 3
    over = take(box, node="box:1")
    assert (
        isinstance(over, Claim)
        and box.attempts.finish(over, Reason.OK, "better", Progress(), RESULT) is Status.SUCCEEDED
    )
    Store(owner).adapters.tag(Reference(job_id=3), "prod", "eve")
    person.results.look(3, "f" * 64, "ada")
    assert Store(owner).jobs.submit(submission(user="eve", name="waits")) == 4
    before = _all_rows(owner)
    engine = make_engine(lab.person)
    for statement in BY_HAND:
        with pytest.raises(REFUSED):
            with engine.begin() as connection:
                connection.exec_driver_sql(statement)
            pytest.fail(f"{statement} was let through")
    engine.dispose()
    assert _all_rows(owner) == before
    owner.dispose()


def test_by_hand_nobody_changes_their_own_result(person: Store, box: Store, lab: Logins, owner_url: str) -> None:
    owner, engine = make_engine(owner_url), make_engine(lab.person)
    job_id = person.jobs.submit(submission())
    claim = take(box)
    assert isinstance(claim, Claim)
    assert box.attempts.finish(claim, Reason.OK, "better", Progress(), RESULT) is Status.SUCCEEDED
    before = _all_rows(owner)
    for kind, new in {
        "retry": vars_of_a_retry(),
        "edited": {"labels": {"a": "b"}},
        "held": {"held": True},
        "cancelled": {"status": "cancelled", "reason": "cancelled", "ended_at": str(person.now())},
    }.items():
        with pytest.raises(REFUSED):
            with engine.begin() as connection:
                connection.exec_driver_sql(_called(job_id, kind, json.dumps(new)))
            pytest.fail(f"{kind} was let through")
    assert _all_rows(owner) == before
    for one in (owner, engine):
        one.dispose()


def _all_rows(owner: Engine) -> dict[str, list[Any]]:
    names = ("jobs", "events", "attempts", "tags", "job_labels", "sweeps", "wishes", "nodes", "looks")
    with owner.connect() as connection:
        return {name: sorted(map(str, connection.exec_driver_sql(f"SELECT * FROM {name}"))) for name in names}


def test_a_new_row_has_no_history(person: Store, lab: Logins) -> None:
    person.jobs.submit(submission())
    engine, row = make_engine(lab.person), _row(person, 1)

    def copy(**values: Any) -> None:
        with engine.begin() as connection:
            connection.execute(SUBMIT_JOB, {"document": json.dumps({"job": {**row, **values}})})

    copy()
    copy(job_id=1, user="eve", queue_key=row["queue_key"].rpartition("|")[0] + "|eve")  # neither is the client's word
    for name, value in HISTORY.items():
        with pytest.raises(Forbidden):
            copy(**{name: value})
            pytest.fail(f"a new row with {name} was let through")
    for name, values in UNREADABLE.items():
        for value in values:
            with pytest.raises(REFUSED):
                copy(**{name: value})
                pytest.fail(f"a new row with {name} = {value} was let through")
    with pytest.raises(WrongState, match="more than 1 MiB"):
        copy(base_model="x" * 2**20)
    engine.dispose()
    jobs = person.jobs.matching()
    assert len(jobs) == 3 and {job.user for job in jobs} == {make_url(lab.person).username}


SUBMIT_JOB = text("SELECT loractl_submit(CAST(:document AS json))")


def _row(store: Store, job_id: int) -> dict[str, Any]:
    """A job's columns, as a client gives those of a new one."""
    job = store.jobs.get(job_id)
    columns = {column.name: getattr(job, column.name) for column in Job.__table__.columns}
    row: dict[str, Any] = json.loads(json.dumps(columns, default=lambda moment: moment.isoformat()))
    return row


def test_who_did_it_is_the_login_whatever_the_client_claims(person: Store, box: Store, lab: Logins) -> None:
    login = make_url(lab.person).username
    job_id = person.jobs.submit(submission(user="bob", resources={"node_labels": {"nvlink": "yes"}}))
    job = person.jobs.get(job_id)
    assert job.user == login and job.queue_key.endswith(f'|{{"nvlink": "yes"}}|{login}')
    person.jobs.hold(job_id, "bob", "mine")
    assert person.jobs.get(job_id).message == f"held by {login}: mine"
    person.jobs.release(job_id, "bob")
    person.jobs.cancel(job_id, "bob")
    assert person.jobs.get(job_id).message == f"cancelled by {login}"
    first, *told = [event.text for event in person.jobs.events(job_id)]
    assert first == f"queued by bob (login {login})"
    assert told == [f"held by {login}: mine", f"queued again by {login}", f"cancelled by {login}"]
    person.jobs.retry(job_id, str(login))
    assert person.jobs.events(job_id)[-1].text == f"queued again by {login}"
    person.jobs.hold(job_id, str(login), "by bob")
    assert person.jobs.get(job_id).message == f"held by {login}: by bob"
    person.jobs.release(job_id, str(login))
    engine = make_engine(lab.person)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"SELECT loractl_change({job_id}, 'held', '{{}}', '{{\"held\": true}}', '', 'm\nq')")
        yesterday = (dt.datetime.now(dt.UTC) - dt.timedelta(hours=23)).isoformat()
        row = {**_row(person, job_id), "held": False, "message": None, "submitted_at": yesterday}
        asked = {"document": json.dumps({"job": row, "why": "m"})}
        backdated = connection.execute(SUBMIT_JOB, asked).scalar_one()
    engine.dispose()
    assert person.jobs.get(job_id).message == f"held by {login}: m q", "no name can be made longer"
    assert [event.text for event in person.jobs.events(backdated)] == [f"queued by {login}"]
    assert abs((person.jobs.get(backdated).submitted_at - person.now()).total_seconds()) < 600
    person.jobs.release(job_id, str(login))
    assert isinstance(take(box, labels={"nvlink": "yes"}), Claim)


def test_a_worker_can_run_jobs_to_their_end_and_clean_up(person: Store, box: Store) -> None:
    for name in ("ends", "fails", "lost"):
        person.jobs.submit(submission(name=name, max_retries=0))
    claim = take(box)
    assert isinstance(claim, Claim)
    progress = Progress(
        stage=Stage.TRAINING, step=1, total_steps=2, loss=1.0, eta_seconds=1.0, eta_spread_seconds=1.0,
        evaluated=1, to_evaluate=2, tokens_per_second=9.0, metrics=((1, "loss", 1.0),), events=(("data", "rows"),),
        log="line\n", vram_peak=GIB, need=Need(lora=3 * GIB, qlora=GIB), adjustment=Adjustment(micro_batch=1),
    )  # fmt: skip
    assert box.attempts.beat(claim, progress).accepted
    assert box.attempts.keep_checkpoint(claim, StoredCheckpoint(step=1, prefix="jobs/1/checkpoints/1-1"))
    assert box.attempts.finish(claim, Reason.OK, "done", progress, RESULT) is Status.SUCCEEDED
    second = take(box)
    assert isinstance(second, Claim)
    box.attempts.finish(second, Reason.OUT_OF_MEMORY, "out of memory", Progress())
    assert isinstance(take(box), Claim)
    box.cards.arrive(node_state("box:0"))
    assert box.cards.take_turn(5, 15) is not None
    for verb in (box.attempts.reap, box.jobs.end_patience, box.cards.preempt, box.cards.fleet, box.results.spent_logs):
        verb()
    box.cards.drain("box", "loractl", "left something behind", until=box.now() + dt.timedelta(hours=1))
    assert box.cards.end_drain("box")
    assert not box.results.bind(claim.job_id, "c" * 64, "heron"), "it is bound"
    assert box.results.remove(claim.job_id, "heron")
    assert box.results.forget_checkpoint(claim.job_id)
    box.results.forget_log(claim.job_id, 1)
    box.cards.forget("box:0")


def test_a_sweep_is_submitted_by_one_role_and_thinned_out_by_the_other(person: Store, box: Store) -> None:
    asked = {"training": {"max_steps": 8, "eval_steps": 0.25}}
    sweep = NewSweep(name="a", varied={"lora.r": "4,8"}, rungs=(0.25,))
    with pytest.raises(Forbidden):
        box.sweeps.submit(sweep, [submission(**asked)])
    sweep_id = person.sweeps.submit(sweep, [submission(**asked), submission(**asked)])
    told = []
    for loss in (1.0, 2.0):
        claim = take(box)
        assert isinstance(claim, Claim)
        told.append(box.attempts.beat(claim, Progress(step=2, total_steps=8, metrics=((2, "eval_loss", loss),))).pruned)
    assert told[0] is None and told[1] is not None
    assert box.attempts.finish(claim, Reason.PRUNED, told[1], Progress()) is Status.CANCELLED
    person.jobs.retry(claim.job_id, "ada")
    assert len(person.sweeps.cancel(sweep_id, "ada")) == 2
    assert person.sweeps.get(sweep_id).members[1].rungs[0].loss == 2.0


def test_a_box_writes_and_sends_messages_and_a_person_writes_none(person: Store, box: Store, lab: Logins) -> None:
    person.jobs.submit(submission(notify=["ops"]))
    claim = take(box)
    assert isinstance(claim, Claim)
    box.attempts.finish(claim, Reason.OK, "better", Progress(), RESULT)
    ops = (Channel(name="ops", kind="slack", lab=True),)
    box.cards.take_turn(0, 0)
    message = box.outbox.lease(ops, 90)
    assert message is not None and message.subject == "tiny: better"
    engine = make_engine(lab.person)
    for forged in ("UPDATE outbox SET subject = 'x'", "DELETE FROM outbox"):
        with pytest.raises(Forbidden), engine.begin() as connection:
            connection.execute(text(forged))
    engine.dispose()
    with pytest.raises(Forbidden):
        person.outbox.settle(message, Delivery(sent=True))
    assert box.outbox.settle(message, Delivery(sent=True))


def test_a_worker_s_job_gives_way_and_goes_on_by_its_method(person: Store, box: Store) -> None:
    number = person.jobs.submit(submission())
    assert len(person.jobs.get(number).methods) == 2
    claim = take(box)
    assert isinstance(claim, Claim)
    assert box.attempts.keep_checkpoint(claim, StoredCheckpoint(step=1, prefix=f"jobs/{number}/checkpoints/1-1"))
    assert box.attempts.finish(claim, Reason.PREEMPTED, "gave way", Progress(step=1)) is Status.QUEUED
    assert person.jobs.get(number).methods == [claim.method.value]


def test_a_worker_cannot_submit_or_change_what_was_asked(person: Store, box: Store, lab: Logins) -> None:
    person.jobs.submit(submission())
    with pytest.raises(Forbidden, match=r"does not let heron_\w+ do that"):
        box.jobs.submit(submission())
    engine = make_engine(lab.box)
    for change in ("spec = '{}'", "data = '{}'", "\"user\" = 'eve'", "base_model = 'org/other'", "priority = 9"):
        with pytest.raises(Forbidden), engine.begin() as connection:
            connection.execute(text(f"UPDATE jobs SET {change}"))
    for statement in ("DELETE FROM jobs", "DELETE FROM events", "TRUNCATE attempts CASCADE"):
        with pytest.raises(Forbidden), engine.begin() as connection:
            connection.execute(text(statement))
    engine.dispose()


def test_what_a_login_may_fill_the_server_s_disk_with_is_bounded_or_named(
    lab: Logins, owner_url: str, tmp_path: Path
) -> None:
    owner, person = create_engine(owner_url, isolation_level="AUTOCOMMIT"), make_engine(lab.person, kept=0)
    settings = load_settings({"LORACTL_HOME": str(tmp_path), "LORACTL_DATABASE_URL": lab.person})

    def doctor_s() -> str:
        return next(see_logins(settings)).sentence

    def named() -> tuple[str, ...]:
        with person.connect() as connection, owner.connect() as own:
            assert unbounded(connection) == unbounded(own)
            return unbounded(connection)

    def sort(rows: int) -> None:
        with person.connect() as connection:
            connection.exec_driver_sql(f"SELECT i FROM generate_series(1, {rows}) AS i ORDER BY random()")

    assert named() == () and "files are bounded" in doctor_s()
    with pytest.raises(Forbidden), person.connect() as connection:
        connection.exec_driver_sql("SET temp_file_limit = -1")
    with owner.connect() as own:
        assert own.exec_driver_sql("SHOW temp_file_limit").scalar() == "-1"
        database = own.exec_driver_sql("SELECT current_database()").scalar()
        own.exec_driver_sql(f"ALTER DATABASE {database} SET temp_file_limit = '1MB'")
        apply_roles(make_engine(owner_url))
        sort(1000)
        with pytest.raises(DatabaseError, match="temporary file size exceeds"):
            sort(300_000)
        own.exec_driver_sql(f"ALTER DATABASE {database} RESET temp_file_limit")
        own.exec_driver_sql(f"GRANT TEMPORARY ON DATABASE {database} TO loractl_submit")
        for function in ("lo_create(oid)", "pg_advisory_lock(bigint)"):
            own.exec_driver_sql(f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC")
        assert named() == ("temporary tables", "large objects", "advisory locks", "temporary files")
        assert doctor_s().endswith("temporary tables and large objects and advisory locks and temporary files")
        own.exec_driver_sql(f"REVOKE TEMPORARY ON DATABASE {database} FROM loractl_submit")
        apply_roles(make_engine(owner_url))
    assert named() == ()
    owner.dispose()


def test_the_commands_say_so_in_a_sentence(make_cli: Callable[..., Cli], lab: Logins, tmp_path: Path) -> None:
    write_helpdesk(tmp_path / "data.jsonl")
    (tmp_path / "job.yaml").write_text("name: job\nbase_model: gpt2\ndataset: {path: data.jsonl}\n")
    shared = make_cli(LORACTL_ARTIFACTS_URL=tmp_path.as_uri())
    shared.with_environment(LORACTL_DATABASE_URL=lab.person)("submit", tmp_path / "job.yaml")
    told = shared.with_environment(LORACTL_DATABASE_URL=lab.box)("submit", tmp_path / "job.yaml", code=1).stderr
    assert told.startswith("Error: the database does not let heron_"), told
    assert "a box's login submits no jobs, a person's does\nHint: each role has its own rights: docs/deploy.md" in told


def test_a_worker_with_a_person_s_login_is_refused_once(
    lab: Logins, make_cli: Callable[..., Cli], tmp_path: Path
) -> None:
    told = make_cli(LORACTL_DATABASE_URL=lab.person, LORACTL_ARTIFACTS_URL=tmp_path.as_uri())("worker", code=1).stderr
    assert told.count("does not let") == 1 and "Error: node 0 is refused; see above." in told
