"""The best of many on noise is called no better, and a gain that is there stays one."""

from __future__ import annotations

import random

import pytest

from loractl.common.verdict import MeasuredChange
from loractl.scheduler.compare.answer import FinishedJob, compared
from loractl.scheduler.compare.winner import corrected

from .test_answer import BASE, TOKENS, job

MEMBERS = 12


def shuffled(seed: int, *, rows: int = 40, gain: float = 0.0) -> list[FinishedJob]:
    """A sweep on answers that were shuffled: what a member changes in a row is luck, plus `gain` nats a token."""
    rng = random.Random(seed)
    return [
        job(number, [b + w * (rng.gauss(0, 0.4) - gain) for b, w in zip(BASE[:rows], TOKENS, strict=False)])
        for number in range(1, MEMBERS + 1)
    ]


def uncorrected(best: FinishedJob) -> str:
    """What the interval of the best one alone says against its base, as its own report does."""
    against = compared([best, job(99, BASE[: len(best.report["evaluation"]["row_losses"])])]).jobs[1].against
    assert against is not None
    return MeasuredChange(
        base=3.0, change=-against.change, low=-against.high, high=-against.low, cases=against.rows
    ).reading


@pytest.mark.parametrize("rows", [12, 40])
def test_of_twelve_on_noise_no_winner_is_called_better(rows: int) -> None:
    sweeps = [compared(shuffled(seed, rows=rows)) for seed in range(100)]
    plain = [uncorrected(order.best) for order in sweeps]
    assert plain.count("better") >= 25, "without a correction luck is called a gain"
    losers = sum(any(job.against and job.against.reading == "worse" for job in order.jobs) for order in sweeps)
    assert losers <= 9, "about one sweep in twenty may name a loser by chance; by the best one's pairs alone 15 do"
    for order in sweeps[:5]:
        change = corrected(order)
        assert change is not None and change.among > 1
        assert change.metric["reading"] == "no clear change"


def test_the_correction_takes_off_what_the_choice_added_and_leaves_a_gain() -> None:
    """Of twelve with the same gain, the best one shows more than that; corrected it shows that."""
    sweeps = [compared(shuffled(seed, gain=0.5)) for seed in range(6)]
    apparent = [order.best.loss - 3.0 for order in sweeps]
    changes = [corrected(order) for order in sweeps]
    told = [change.change for change in changes if change]
    assert len(told) == 6 and sum(apparent) / 6 < -0.57
    assert sum(told) / 6 == pytest.approx(-0.5, abs=0.03)
    assert all(change.metric["reading"] == "better" and change.low < -0.5 < change.high for change in changes if change)


def test_a_winner_that_nothing_comes_near_keeps_its_own_interval() -> None:
    jobs = shuffled(1, gain=0.5)
    far = [job(one.job_id, [loss + 2 * w for loss, w in zip(BASE, TOKENS, strict=True)]) for one in jobs[1:]]
    order = compared([jobs[0], *far])
    change, loss = corrected(order), order.best.metrics["loss"]
    assert change is not None and change.among == 1
    assert (change.change, change.low, change.high) == (order.best.loss - 3.0, loss["low"], loss["high"])


def test_many_rows_are_drawn_in_groups() -> None:
    """Fifty times as many rows: the interval is narrower all the same, and takes no fifty times as long."""
    few, many = shuffled(3, gain=0.2)[:3], []
    for one in few:
        losses = one.report["evaluation"]["row_losses"]
        report = {**one.report, "evaluation": {**one.report["evaluation"], "row_losses": losses * 50}}
        many.append(FinishedJob(job_id=one.job_id, spec=one.spec, report=report))
    wide, narrow = corrected(compared(few)), corrected(compared(many))
    assert wide is not None and narrow is not None and narrow.cases == 2000
    assert narrow.high - narrow.low < (wide.high - wide.low) / 3


def test_where_it_can_t_be_corrected_nothing_is_claimed() -> None:
    assert corrected(compared(shuffled(1, rows=5))) is None, "too few rows"
    old = shuffled(1)
    del old[3].report["evaluation"]["row_losses"]
    assert corrected(compared(old)) is None, "a report of an earlier version"
    other = [*shuffled(1), job(20, BASE, rows="others")]
    assert corrected(compared(other)) is None, "it lost on other rows"
    lost = shuffled(1)
    lost[5].report["evaluation"]["metrics"][0]["tuned"] = None
    lost[5].report["evaluation"]["row_losses"][0][3] = None
    assert corrected(compared(lost)) is not None, "one that diverged was never the best"
