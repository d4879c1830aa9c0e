"""How a sweep looks: one line among the jobs, opened a row a member, and its winner named only where that is clear."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from loractl.common.job.status import Reason, Stage, Status
from loractl.common.job.sweep import Member, RungPoint, SweepView
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.compare.answer import FinishedJob, compared
from loractl.scheduler.compare.text import sweep_comparison_text
from loractl.scheduler.compare.winner import SweepComparison
from loractl.scheduler.status.job import state_of
from loractl.scheduler.status.overview import Overview
from loractl.scheduler.status.overview_text import overview_text
from loractl.scheduler.status.standing import SweepStanding
from loractl.scheduler.status.standing_text import opened, overview
from loractl.scheduler.sweep.command import listed
from loractl.scheduler.wait.queue import WaitingJobs

from ...factories import NOON
from ...factories import job as row
from ..compare.test_answer import behind, job, noisy

PLAIN = Screen(width=80, unicode=True, color=False)
WIDE = Screen(width=120, unicode=True, color=False)
ASCII = Screen(width=80, unicode=False, color=False)
FIRST, SECOND = RungPoint(rung=0.25, step=8, loss=1.5), RungPoint(rung=0.5, step=16, loss=1.25)


def member(job_id: int, rate: float, status: Status = Status.QUEUED, **changed: Any) -> Member:
    return Member(
        job_id=job_id, name=f"triage-{job_id}", settings={"lora.r": 8, "training.learning_rate": rate}, status=status,
        **{"total_steps": 32, **changed},
    )  # fmt: skip


def done(job_id: int, loss: float, rate: float = 1e-3) -> Member:
    return member(job_id, rate, Status.SUCCEEDED, step=32, rungs=(FIRST, SECOND), final_loss=loss, has_result=True)


def stopped(job_id: int, step: int = 9, rate: float = 1e-5) -> Member:
    point = replace(FIRST, loss=2.5)
    return member(job_id, rate, Status.CANCELLED, reason=Reason.PRUNED, step=step, rungs=(point,))


def view(*members: Member, **changed: Any) -> SweepView:
    values = {
        "sweep_id": 3, "name": "triage", "user": "mara", "created_at": NOON, "rungs": (0.25, 0.5),
        "varied": {"lora.r": "8", "training.learning_rate": "1e-5,1e-3"}, "members": members,
    }  # fmt: skip
    return SweepView(**{**values, **changed})


def in_full(sweep: SweepView, screen: Screen) -> str:
    return opened(SweepStanding(sweep=sweep), screen)


def test_a_sweep_is_one_line_with_the_best_so_far() -> None:
    running = member(12, 1e-4, Status.RUNNING, stage=Stage.TRAINING, step=9, rungs=(FIRST,), node="heron:1")
    head, line = overview([view(running, member(13, 3e-4), stopped(14), done(15, 0.98765))], WIDE)
    assert head.split() == ["SWEEP", "NAME", "OWNER", "RUN", "WAIT", "STOPPED", "DONE", "BEST", "SO", "FAR"]
    assert " ".join(line.split()) == "3 triage ×4 mara 1 1 1 1 0.988 with r 8, learning_rate 0.001"
    assert "triage x1" in overview([view(running)], ASCII)[1]
    assert "1.500 at 25 % with r 8, learning_rate 0.0001" in overview([view(running, stopped(14))], WIDE)[1]
    assert overview([view(member(13, 3e-4))], PLAIN)[1].endswith("–")


def test_who_has_the_least_loss_is_the_best_though_another_is_further() -> None:
    """5.380 at 50 % was called the best so far, beside 0.478 at 25 %."""
    far = member(1, 1e-6, Status.RUNNING, step=17, rungs=(FIRST, SECOND), node="heron:1")
    ahead = member(2, 5e-3, Status.RUNNING, step=9, rungs=(replace(FIRST, loss=0.478),), node="heron:1")
    assert "0.478 at 25 % with r 8, learning_rate 0.005" in overview([view(far, ahead)], WIDE)[1]


def test_what_ended_otherwise_is_counted_only_where_there_is_such() -> None:
    head, line, best = overview([view(member(1, 0.1, Status.FAILED, reason=Reason.DIVERGED), done(2, 1.0))], PLAIN)
    assert "with r 8" in best, "what is best is told whole, below its row where there is no room beside it"
    assert "FAILED" in head and " ".join(line.split()).startswith("3 triage ×2 mara 0 0 0 1 1")
    assert "CANCELLED" not in head


def test_what_a_person_cancelled_did_not_fail() -> None:
    """`status` said FAILED 1 of it, beside "0 ✗" of the day."""
    gone = member(1, 0.1, Status.CANCELLED, reason=Reason.CANCELLED)
    head, line, _ = overview([view(gone, done(2, 1.0))], PLAIN)
    assert "FAILED" not in head and " ".join(line.split()).startswith("3 triage ×2 mara 0 0 0 1 1")
    assert head.split()[7] == "CANCELLED"
    assert SweepStanding(sweep=view(gone)).as_json()["cancelled"] == 1


def test_members_stand_in_their_sweep_s_line_and_not_among_the_jobs() -> None:
    waiting, alone = row(job_id=12, sweep_id=3), row(job_id=20, name="alone", status=Status.RUNNING)
    jobs = {
        "running": (state_of(alone),),
        "waiting": (state_of(waiting),),
        "ended": {},
        "after": None,
        "sweep_count": 1,
    }
    sweeps = (view(member(12, 1e-4)),)
    counts = {"running_count": 1, "waiting_count": 1}
    text = overview_text(Overview(**jobs, **counts, waits=WaitingJobs(), sweeps=sweeps, now=NOON), PLAIN)
    assert text.startswith("1 running, 1 waiting.")
    assert "alone" in text and "triage ×1" in text and "helpdesk" not in text
    assert "loractl status --sweep" in text


def test_an_opened_sweep_has_a_row_a_member_and_its_state_in_words() -> None:
    text = in_full(
        view(
            member(12, 1e-4, Status.RUNNING, stage=Stage.EVALUATING, step=32, rungs=(FIRST, SECOND), node="heron:1"),
            member(13, 3e-4, held=True),
            stopped(14),
            member(15, 0.1, Status.FAILED, reason=Reason.DIVERGED),
            member(16, 0.2, Status.CANCELLED, reason=Reason.CANCELLED),
        ),
        PLAIN,
    )
    assert text.startswith("Sweep 3 triage by mara: 5 jobs, 1 run, 1 wait, 1 stopped early, 1 failed, 1 cancelled.\n")
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()[:2].isdigit()}
    assert rows["12"].endswith("1.250  50 %  evaluates on heron:1")
    assert rows["13"].endswith("held") and rows["14"].endswith("2.500  25 %  stopped at 25 %")
    assert rows["15"].endswith("failed: diverged") and rows["16"].endswith("cancelled")
    assert "Best so far: 12 (r 8, learning_rate 0.0001), held-out loss 1.250 at 50 %." in text
    assert "loractl cancel --sweep 3" in text and "saved" not in text


def test_at_its_end_the_best_and_the_saved_steps_are_told() -> None:
    text = in_full(view(done(12, 1.1), done(13, 0.9), stopped(14), stopped(15, step=18)), PLAIN)
    assert "Best: 13 (r 8, learning_rate 0.001), held-out loss 0.900." in text
    assert "Stopping the losers saved 37 of 128 steps (29 %)." in text
    assert "loractl compare --sweep 3" in text
    none = in_full(view(member(1, 0.1, Status.FAILED, reason=Reason.DIVERGED)), PLAIN)
    assert "Best" not in none and "loractl status 1" in none


def test_hostile_text_does_not_steer_the_terminal() -> None:
    nasty = "\x1b[2J\x9b31m"
    hostile = view(
        replace(done(1, 1.0), settings={f"labels.{nasty}": nasty, "lora.r": 1}, node=nasty), name=nasty, user=nasty
    )
    hostile = replace(hostile, varied={f"labels.{nasty}": nasty, "lora.r": "1"})
    for text in ("\n".join(overview([hostile], PLAIN)), in_full(hostile, PLAIN)):
        assert "\x1b" not in text and "\x9b" not in text


def test_keys_that_end_alike_are_told_in_full() -> None:
    two = view(replace(done(1, 1.0), settings={"a.seed": 1, "b.seed": 2}), varied={"a.seed": "1", "b.seed": "2"})
    assert "a.seed 1, b.seed 2" in in_full(two, PLAIN)


def test_the_json_of_a_sweep_holds_what_the_screen_tells() -> None:
    found = json.loads(json.dumps(SweepStanding(sweep=view(done(12, 1.1), stopped(14))).as_json()))
    assert (found["best_job_id"], found["saved_steps"], found["total_steps"], found["ended"]) == (12, 23, 64, True)
    assert [found[name] for name in ("running", "waiting", "stopped", "done", "failed")] == [0, 0, 1, 1, 0]
    assert found["cancelled"] == 0
    assert found["members"][1]["rungs"] == [{"rung": 0.25, "step": 8, "loss": 2.5}]
    assert found["members"][1]["reason"] == "pruned"


@pytest.mark.parametrize(
    ("numbers", "text"), [([12, 13, 14], "12 to 14"), ([12, 13], "12, 13"), ([1, 2, 4], "1, 2, 4")]
)
def test_numbers_are_told_as_a_span_where_they_are_one(numbers: list[int], text: str) -> None:
    assert listed(numbers) == text


def judged(sweep: SweepView, *jobs: FinishedJob) -> SweepComparison:
    return SweepComparison(sweep=sweep, comparison=compared(jobs))


def test_a_winner_is_clear_only_where_the_rows_say_so() -> None:
    best = noisy(1.0, 0.2)
    near = behind(best, 0.5, seed=1)
    far = [loss + 5.0 for loss in best]
    both = view(done(1, 1.0), done(2, 1.1), stopped(3))
    clear = judged(both, job(1, best), job(2, far)).sentence
    assert clear.startswith("Best: 1 (r 8, learning_rate 0.001), held-out loss ") and "clearly less than" in clear
    unclear = judged(both, job(1, best), job(2, near), job(3, far))
    assert unclear.sentence.endswith("; 2 can't be told apart from it.") and unclear.alike == [2] and not unclear.clear
    few = judged(both, job(1, noisy(1.0, 0.1, rows=5)), job(2, noisy(2.0, 0.1, rows=5)))
    assert few.sentence.endswith("; on 5 rows 2 can't be told apart from it.")
    assert "2 was measured on other rows" in judged(both, job(1, best), job(2, far, rows="others")).sentence
    betas = [job(n, some, task_type="preference", preference={"beta": n}) for n, some in ((1, best), (2, far))]
    for one, accuracy in zip(betas, (60.0, 80.0), strict=True):
        share = {"name": "preference_accuracy", "label": "preference accuracy", "unit": "%", "tuned": accuracy}
        one.report["evaluation"]["metrics"].append(share)
    by_accuracy = judged(both, *betas).sentence
    assert by_accuracy.startswith("Best by preference accuracy: 2 (r 8, learning_rate 0.001), 80.0 %; ")
    assert by_accuracy.endswith("; 1 was measured by another loss.")
    other = judged(replace(both, unlike="dataset.path"), job(1, best), job(2, far, rows="others")).sentence
    assert other.startswith("Least loss: 1 ") and "2 was measured on other rows" in other
    assert "the only member with a result" in judged(both, job(1, best)).sentence
    assert judged(view(done(1, 1.0), member(2, 0.1)), job(1, best)).sentence.startswith("Best so far: 1 ")


def test_no_member_is_the_best_where_losses_cannot_be_compared() -> None:
    sweep = view(done(1, 0.02), done(2, 0.41), unlike="preference.loss_type")
    assert (sweep.best, sweep.stored_best, SweepStanding(sweep=sweep).as_json()["best_job_id"]) == (None, None, None)
    told = in_full(sweep, WIDE)
    assert "Sweep 3 has no best member: losses of different preference.loss_type can't be compared." in told
    assert told.endswith("The members that have ended: loractl compare --sweep 3") and "Best" not in told


def test_a_member_that_was_stopped_with_less_loss_is_named() -> None:
    best, far = noisy(0.01, 0.002), noisy(5.4, 0.2)
    ahead = replace(stopped(5), rungs=(replace(FIRST, loss=0.165),))
    both = judged(view(done(1, 0.01), done(4, 5.4), stopped(3), ahead), job(1, best), job(4, far))
    assert "clearly less than every other result." in both.sentence
    assert both.sentence.endswith(" Job 5 had 0.165 when it was stopped at 25 %.")
    alone = judged(view(done(4, 5.4), ahead), job(4, far)).sentence
    assert "the only member with a result. Job 5 had 0.165 when" in alone
    behind_both = judged(view(done(1, 0.01), done(4, 1.4), stopped(3)), job(1, best), job(4, noisy(1.4, 0.1)))
    assert behind_both.sentence.endswith("clearly less than every other result.")


def test_a_loss_that_stays_optimistic_is_called_so() -> None:
    best, far = noisy(1.0, 0.2), noisy(5.4, 0.2)
    near = behind(best, 0.5, seed=1)
    two = view(done(1, 1.0), done(2, 1.1))
    corrected = judged(two, job(1, best), job(2, near)).caution
    assert corrected.startswith("Corrected for the choice among 2 on the same 40 rows, against the base: loss 3.00 -> ")
    assert "optimistic" not in corrected
    kept = job(1, best, training={"load_best_model_at_end": True})
    kept.report["training"] |= {"eval_losses": [[2, 1.5], [4, 1.0]], "stopped_early_at_step": None}
    assert judged(two, kept, job(2, near)).caution.endswith("It stays optimistic: these rows chose its step, too.")
    alone = judged(view(done(1, 1.0)), job(1, best))
    assert alone.caution == "", "nothing was chosen"
    others = judged(two, job(1, best), job(2, far, rows="others")).caution
    assert others == "Its loss is optimistic, since it was chosen on these rows."


def test_of_many_that_are_alike_the_nearest_are_named() -> None:
    best = noisy(1.0, 0.2)
    jobs = [job(1, best), *(job(n, behind(best, 0.5 + n / 100, seed=n)) for n in range(2, 11))]
    told = judged(view(*(done(n, 1.0) for n in range(1, 11))), *jobs).sentence
    assert told.endswith("; 7, 4, 3, 10, 2, 9 and 3 more can't be told apart from it.")


def test_the_comparison_lists_the_stopped_below_with_where_and_at_what_loss() -> None:
    best = noisy(1.0, 0.2)
    jobs = job(1, best), job(2, [loss + 5.0 for loss in best])
    answer = judged(view(done(1, 1.0), done(2, 1.1), stopped(3), stopped(4)), *jobs)
    below = sweep_comparison_text(answer, PLAIN).partition("Stopped early:\n")[2].splitlines()
    assert [line.split() for line in below[1:3]] == [
        ["3", "8", "1e-05", "25", "%", "8", "2.500"],
        ["4", "8", "1e-05", "25", "%", "8", "2.500"],
    ]
    told = json.loads(json.dumps(answer.as_json()))
    winner = told["winner"]
    assert (winner["job_id"], winner["runner_up"], winner["clear"], winner["alike"]) == (1, 2, True, [])
    assert (winner["sentence"], winner["caution"]) == (answer.sentence, answer.caution)
    assert answer.caution.startswith("No other comes near it") and "2 more lost on these rows" in answer.caution
    assert [member["job_id"] for member in told["stopped"]] == [3, 4]
    assert [finished["job_id"] for finished in told["jobs"]] == [1, 2] and told["differences"] == {}
    assert "Stopped early" not in sweep_comparison_text(judged(view(done(1, 1.0), done(2, 1.1)), *jobs), PLAIN)


def test_members_whose_base_was_edited_between_them_are_not_told_apart_by_their_settings_alone() -> None:
    jobs = job(1, noisy(1.0, 0.2)), job(2, noisy(2.0, 0.2))
    for one in jobs:
        one.report["base"] = {"sha256": str(one.job_id) * 64}
    text = sweep_comparison_text(judged(view(done(1, 1.0), done(2, 1.1)), *jobs), PLAIN)
    assert "Not the same in all of them, under the same settings: base_model's files." in text
