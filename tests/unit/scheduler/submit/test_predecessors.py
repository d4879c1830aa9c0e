"""What a job starts after, as submit and edit take it: by number, by name in its submit, by the adapter it needs."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.errors import JobNotFound, SpecError, UsageError
from loractl.common.job.file import load_spec, load_specs
from loractl.common.job.sections import AncestorJob
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.common.job.sweep import NewSweep
from loractl.common.store.records import HELD_OUT_LOSS, Claim, Progress
from loractl.common.store.store import Store
from loractl.scheduler.change.amendment import amendment
from loractl.scheduler.submit.ancestor import in_order, settle_predecessors
from loractl.scheduler.submit.draft import like_job, of_files

from ....databases import SQLITE_ALONE
from ...factories import RESULT, Clock, spec, submission, take

DAY_S = 24 * 3600
JOB = "base_model: org/model\ndataset: {path: org/data}\n"


def written(folder: Path, *jobs: str) -> Path:
    (file := folder / "job.yaml").write_text("---\n".join(f"{job}\n{JOB}" for job in jobs))
    return file


def test_a_file_of_several_jobs_is_put_in_order_of_their_names(tmp_path: Path) -> None:
    file = written(tmp_path, "name: c\nafter: [b, 7]", "name: b\nlora: {init_from: {job: a}}", "name: a\nafter: 3")
    drafts = of_files([file], ["priority=4"])
    assert [(draft.spec.name, draft.spec.after, draft.spec.priority) for draft in drafts] == [
        ("a", [3], 4),
        ("b", [], 4),
        ("c", ["b", 7], 4),
    ]
    with pytest.raises(SpecError) as refused:
        load_spec(file)
    assert refused.value.problems[0].what == "holds 3 documents, and one is wanted here"


def test_each_job_of_a_file_is_told_its_faults_by_line(tmp_path: Path) -> None:
    file = written(tmp_path, "name: a\nlora: {rank: 3}", "name: b\nafter: [b c]\nafter_any: true")
    with pytest.raises(SpecError) as refused:
        load_specs(file)
    assert [(problem.line, problem.key) for problem in refused.value.problems] == [(2, "lora.rank"), (7, "after")]
    assert refused.value.problems[1].what == (
        '"b c" is not a job; write its number, or its name in the same submit, like 12 or tickets'
    )


@pytest.mark.parametrize("end", ["---\n", "...\n", "--- # no more\n"])
def test_a_line_that_ends_the_last_document_begins_none(tmp_path: Path, end: str) -> None:
    (file := tmp_path / "job.yaml").write_text(f"---\nname: a\n{JOB}{end}")
    assert load_spec(file).name == "a"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("after_any: true", "after_any: after names no job; name one, or leave it out"),
        ("after: [2, 2]", "after: names a job twice"),
        (
            "after: 2\nafter_any: true\nlora: {init_from: {job: 2}}",
            "after_any: lora.init_from needs that job",
        ),
        ("after: 2\nafter_any: true\nlora: {init_from: 2}", "after_any: lora.init_from needs that job"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, keys: str, said: str) -> None:
    with pytest.raises(SpecError) as refused:
        load_spec(written(tmp_path, f"name: a\n{keys}"))
    assert str(refused.value).find(said) >= 0


def named(**jobs: list[str | int]) -> list[JobSpec]:
    return [spec(name=name, after=after) for name, after in jobs.items()]


def test_a_ring_and_a_name_that_two_have_are_refused() -> None:
    assert in_order(named(c=["a", "b"], b=["a"], a=[])) == [2, 1, 0]
    with pytest.raises(UsageError, match="these jobs wait for each other: b -> c -> b"):
        in_order(named(a=["b"], b=["c"], c=["b"]))
    with pytest.raises(UsageError, match="b: two jobs of this submit are called a"):
        in_order([*named(a=[], b=["a"]), *named(a=[])])


def test_many_jobs_that_name_each_other_are_put_in_order_at_once() -> None:
    names = [f"j{number}" for number in range(300)]
    specs = [spec(name=name, after=names[max(0, place - 30) : place]) for place, name in enumerate(names)]
    assert in_order(specs[::-1]) == list(range(300))[::-1]


def test_a_chain_may_be_longer_than_python_nests_calls() -> None:
    count = 1100
    assert (
        in_order(named(**{f"j{n}": [f"j{n + 1}"] * (n + 1 < count) for n in range(count)})) == list(range(count))[::-1]
    )


@SQLITE_ALONE
def test_a_job_that_is_not_there_and_one_that_came_later_are_refused(store: Store) -> None:
    first, second = (store.jobs.submit(submission(lora=1, qlora=1)) for _ in range(2))
    with pytest.raises(JobNotFound, match="after names job 99, which does not exist"):
        settle_predecessors(spec(after=[99]), store)
    with pytest.raises(JobNotFound, match="after names job 99, which does not exist"):
        amendment(store, first, ["after=99"])
    with pytest.raises(UsageError, match="after names tickets, which is not a job of this submit"):
        settle_predecessors(spec(after=["tickets"]), store)
    with pytest.raises(UsageError, match=f"job {first} can't wait for job {second}"):
        amendment(store, first, [f"after={second}"])
    with pytest.raises(UsageError, match=f"job {second} can't wait for job {second}"):
        amendment(store, second, [f"after={second}"])


@SQLITE_ALONE
def test_an_adapter_that_a_job_will_have_is_compared_with_its_job_file(store: Store) -> None:
    ancestor = store.jobs.submit(submission(lora=1, qlora=1))
    settled = settle_predecessors(spec(lora={"init_from": {"job": ancestor}}), store)
    assert (settled.lora.init_from, settled.after) == (str(ancestor), [ancestor])
    assert settle_predecessors(settled, store) == settled, "an edit finds it so"
    with pytest.raises(UsageError, match=rf"can't begin from job {ancestor}: lora.r is 8, and that adapter's 16"):
        settle_predecessors(spec(lora={"r": 8, "init_from": {"job": ancestor}}), store)
    beside = {"answers": spec(name="answers", lora={"r": 4})}
    with pytest.raises(UsageError, match=r"can't begin from job answers: lora.r is 16, and that adapter's 4"):
        settle_predecessors(spec(lora={"init_from": {"job": "answers"}}), store, beside)


@SQLITE_ALONE
def test_a_job_like_another_does_not_wait_as_it_did(store: Store) -> None:
    first = store.jobs.submit(submission(lora=1, qlora=1))
    last = store.jobs.submit(submission(lora=1, qlora=1, after=[first], after_any=True))
    again = like_job(store, last, [])
    assert (again.spec.after, again.spec.after_any) == ([], False)


@SQLITE_ALONE
def test_an_edit_looks_only_for_the_jobs_that_it_names_anew(store: Store) -> None:
    timed = Store(store.engine, clock := Clock())
    first, other = (timed.jobs.submit(submission(lora=1, qlora=1, max_retries=0)) for _ in range(2))
    last = timed.jobs.submit(submission(lora=1, qlora=1, after=[first], after_any=True, max_retries=0))
    for _ in (first, other, last):
        claim = take(timed)
        assert isinstance(claim, Claim)
        timed.attempts.finish(claim, Reason.BAD_DATA, "", Progress())
    clock.forward(40 * DAY_S)
    gone = {first, other}
    assert timed.results.forget_jobs(gone, clock.now - dt.timedelta(days=30)) == gone
    timed.jobs.retry(last, "ada", amendment(timed, last, ["priority=3"]))
    assert timed.jobs.get(last).priority == 3 and not timed.jobs.get(last).held
    with pytest.raises(JobNotFound, match=f"after names job {other}, which does not exist"):
        amendment(timed, last, [f"after=[{first}, {other}]"])


@SQLITE_ALONE
def test_an_empty_after_takes_after_any_with_it(store: Store) -> None:
    first = store.jobs.submit(submission(lora=1, qlora=1))
    last = store.jobs.submit(submission(lora=1, qlora=1, after=[first], after_any=True))
    store.jobs.edit(amendment(store, last, ["after=[]"]), "ada")
    row = store.jobs.get(last)
    assert (row.after, row.after_any, row.awaits, row.held) == ([], False, None, False)
    with pytest.raises(SpecError, match="after_any: after names no job"):
        amendment(store, last, ["after_any=true"])


@SQLITE_ALONE
def test_no_edit_lets_a_job_start_without_the_adapter_that_it_needs(store: Store) -> None:
    ancestor = store.jobs.submit(submission(lora=1, qlora=1))
    settled = settle_predecessors(spec(lora={"init_from": {"job": ancestor}}), store)
    begun = store.jobs.submit(replace(submission(lora=1, qlora=1), spec=settled))
    with pytest.raises(SpecError, match=r"after_any: lora.init_from needs that job's adapter"):
        amendment(store, begun, ["after_any=true"])


@SQLITE_ALONE
def test_a_job_like_one_of_a_sweep_s_best_begins_from_the_same_member(store: Store) -> None:
    new = NewSweep(name="tuned", varied={"lora.r": "16"})
    sweep_id = store.sweeps.submit(new, [submission(lora=1, qlora=1)])
    settled = settle_predecessors(spec(lora={"init_from": {"sweep": sweep_id}}), store)
    last = store.jobs.submit(replace(submission(lora=1, qlora=1), spec=settled))
    assert like_job(store, last, []).spec.lora.init_from == AncestorJob(sweep=sweep_id), "nothing is chosen yet"
    claim = take(store)
    assert isinstance(claim, Claim)
    store.attempts.finish(claim, Reason.OK, "", Progress(metrics=((1, HELD_OUT_LOSS, 0.5),)), RESULT)
    assert like_job(store, last, []).spec.lora.init_from == str(claim.job_id)


@SQLITE_ALONE
@pytest.mark.parametrize(
    "change", ["lora.init_from={{sweep: {}}}", "lora.init_from.sweep={}", "lora={{init_from: {{sweep: {}}}}}"]
)
def test_a_best_member_chosen_before_an_edit_named_another_sweep_is_forgotten(store: Store, change: str) -> None:
    new = NewSweep(name="tuned", varied={"lora.r": "16"})
    first, second = (store.sweeps.submit(new, [submission(lora=1, qlora=1)]) for _ in range(2))
    settled = settle_predecessors(spec(lora={"init_from": {"sweep": first}}), store)
    last = store.jobs.submit(replace(submission(lora=1, qlora=1), spec=settled))
    claim = take(store)
    assert isinstance(claim, Claim)
    store.attempts.finish(claim, Reason.OK, "", Progress(metrics=((1, HELD_OUT_LOSS, 0.5),)), RESULT)
    assert store.adapters.descendants(claim.job_id) == [last]
    store.jobs.edit(amendment(store, last, [change.format(second)]), "ada")
    assert like_job(store, last, []).spec.lora.init_from == AncestorJob(sweep=second)
    assert store.adapters.descendants(claim.job_id) == []
    assert store.jobs.get(last).after == [member.job_id for member in store.sweeps.get(second).members]


@SQLITE_ALONE
@pytest.mark.parametrize("change", ["lora.init_from={}", "lora={{init_from: {}}}"])
def test_a_job_that_waits_for_a_sweep_s_best_may_begin_from_a_member_that_has_ended(store: Store, change: str) -> None:
    new = NewSweep(name="tuned", varied={"lora.r": "16,16"})
    sweep_id = store.sweeps.submit(new, [submission(lora=1, qlora=1), submission(lora=1, qlora=1)])
    settled = settle_predecessors(spec(lora={"init_from": {"sweep": sweep_id}}), store)
    last = store.jobs.submit(replace(submission(lora=1, qlora=1), spec=settled))
    claim = take(store)
    assert isinstance(claim, Claim)
    store.attempts.finish(claim, Reason.OK, "", Progress(metrics=((1, HELD_OUT_LOSS, 0.5),)), RESULT)
    assert store.jobs.get(last).is_blocked, "the other member has not ended"
    store.jobs.edit(amendment(store, last, [change.format(claim.job_id)]), "ada")
    row = store.jobs.get(last)
    assert (row.after, row.after_any, row.held) == ([], False, False)


def test_a_name_in_after_is_not_the_stored_adapter_of_that_name(tmp_path: Path) -> None:
    job = written(tmp_path, "name: pairs\nafter: [answers]\nafter_any: true\nlora: {init_from: answers}")
    assert load_spec(job).lora.init_from == "answers"


@SQLITE_ALONE
def test_a_job_of_after_named_as_a_stored_adapter_is_told_the_form_that_is_meant(store: Store) -> None:
    answers = store.jobs.submit(submission(name="answers"))
    for after, beside, form in (
        ([answers], {}, f"{{job: {answers}}}"),
        (["answers"], {"answers": spec(name="answers")}, "{job: answers}"),
    ):
        with pytest.raises(UsageError, match="no adapter answers:latest is stored") as refused:
            settle_predecessors(spec(name="pairs", after=after, lora={"init_from": "answers"}), store, beside)
        assert refused.value.hint is not None and refused.value.hint.endswith(f"will have: lora: {{init_from: {form}}}")
