"""Jobs are compared on the same rows, in pairs, and a difference is named only where it is clear."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.common.errors import UsageError
from loractl.common.job.spec import JobSpec
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.compare.answer import FinishedJob, compared, differences
from loractl.scheduler.compare.text import comparison_text, draw_comparison

RNG = random.Random(5)
SCREEN = Screen(width=140, unicode=True, color=False)
TOKENS = [RNG.randint(5, 40) for _ in range(40)]
BASE = [3.0 * n for n in TOKENS]


def job(job_id: int, losses: Sequence[float], *, rows: str = "same", peak: int = 2**31, **settings: Any) -> FinishedJob:
    """A finished job with the summed loss of each held-out row."""
    weights = TOKENS[: len(losses)]
    tuned = sum(losses) / sum(weights)
    loss = {"name": "loss", "label": "loss", "unit": "nats", "tuned": tuned, "base": 3.0}
    loss |= {"low": tuned - 3.1, "high": tuned - 2.9}
    report = {
        "job": {"job_id": job_id, "name": f"run-{job_id}"},
        "method": "lora",
        "verdict": {"reading": "better"},
        "wall_seconds": 90.0,
        "data": {"held_out_sha256": rows},
        "training": {"peak_memory_bytes": peak, "losses": [[1, 3.0], [5, 2.0]]},
        "evaluation": {
            "metrics": [loss],
            "row_losses": [[n, w, b, t] for n, (w, b, t) in enumerate(zip(weights, BASE, losses, strict=False))],
        },
    }
    return FinishedJob(job_id=job_id, spec={"name": f"run-{job_id}", **settings}, report=report)


def noisy(mean: float, spread: float, rng: random.Random = RNG, rows: int = 40) -> list[float]:
    """Summed losses of rows whose tokens lose `mean` each."""
    return [w * (mean + rng.gauss(0, spread)) for w in TOKENS[:rows]]


def behind(best: Sequence[float], errors: float, seed: int) -> list[float]:
    """Losses that are so many standard errors of their mean difference above the best one's."""
    rng = random.Random(seed)
    noise = [rng.gauss(0, 0.3) for _ in best]
    mean = sum(w * x for w, x in zip(TOKENS, noise, strict=True)) / sum(TOKENS)
    noise = [x - mean for x in noise]
    error = math.sqrt(40 / 39 * sum((w * x) ** 2 for w, x in zip(TOKENS, noise, strict=True))) / sum(TOKENS)
    return [loss + w * (x + errors * error) for loss, w, x in zip(best, TOKENS, noise, strict=True)]


def test_the_best_leads_and_only_what_is_clearly_behind_is_worse() -> None:
    best = noisy(1.0, 0.2)
    near = behind(best, 0.5, seed=1)
    far = [loss + 0.5 * w for loss, w in zip(best, TOKENS, strict=True)]
    order = compared([job(3, far), job(1, near), job(2, best)])
    assert order.jobs[0].job_id in (1, 2) and order.jobs[2].job_id == 3
    assert order.jobs[0].against is None
    assert order.jobs[1].against is not None and order.jobs[1].against.reading == "no clear difference"
    assert order.jobs[2].against is not None and order.jobs[2].against.reading == "worse"


def test_a_constant_shift_is_measured_without_spread() -> None:
    best = noisy(1.0, 0.3)
    order = compared([job(1, best), job(2, [loss + 0.25 * w for loss, w in zip(best, TOKENS, strict=True)])])
    against = order.jobs[1].against
    assert against is not None and against.rows == 40
    assert (against.change, against.low, against.high) == pytest.approx((0.25, 0.25, 0.25))


def test_a_difference_that_nobody_would_notice_is_no_practical_one_and_is_written_with_its_digits() -> None:
    best, rng = noisy(16.5, 0.3), random.Random(3)
    near = [loss + w * (0.002 + rng.gauss(0, 0.0004)) for loss, w in zip(best, TOKENS, strict=True)]
    order = compared([job(1, best), job(2, near)])
    against = order.jobs[1].against
    assert against is not None and against.low > 0 and against.reading == "no practical difference"
    text = comparison_text(order, SCREEN)
    row = next(line for line in text.splitlines() if line.lstrip().startswith("2 "))
    shown = re.search(r"\+0\.00\d+ \(\+(0\.00\d+) to \+(0\.00\d+)\) +no practical difference", row)
    assert shown and shown[1] != shown[2]
    assert order.as_json()["jobs"][1]["reading"] == "no practical difference"


def test_equal_jobs_differ_no_oftener_than_one_time_in_twenty() -> None:
    """The lesser of two comes first, so what is tested is the larger against it: two-sided all the same."""
    rng, called = random.Random(11), 0
    for _ in range(400):
        order = compared([job(1, noisy(1.0, 0.3, rng)), job(2, noisy(1.0, 0.3, rng))])
        assert order.jobs[1].against is not None
        called += order.jobs[1].against.reading == "worse"
    assert 5 <= called <= 36, f"{called} of 400"


def test_many_comparisons_are_corrected_together() -> None:
    """Ten jobs, each 2.2 standard errors behind: alone each would be called worse, together none is."""
    best = noisy(1.0, 0.2)
    runs = [job(n + 2, behind(best, 2.2, seed=n)) for n in range(10)]
    alone = [compared([job(1, best), run]).jobs[1].against for run in runs]
    together = [run.against for run in compared([job(1, best), *runs]).jobs[1:]]
    assert [a.reading for a in alone if a] == ["worse"] * 10
    assert [a.reading for a in together if a] == ["no clear difference"] * 10


def test_jobs_on_other_rows_are_not_compared_row_by_row() -> None:
    order = compared([job(1, noisy(1.0, 0.1)), job(2, noisy(2.0, 0.1), rows="others"), job(3, noisy(2.0, 0.1))])
    assert [one.job_id for one in order.jobs if one.against] == [3]
    assert "other held-out rows" in comparison_text(order, SCREEN)


def of_pairs(job_id: int, mean: float, begun_from: str = "", base: str = "m", **preference: Any) -> FinishedJob:
    """A job that learned from pairs: a row is a pair, of weight 1."""
    made = job(job_id, noisy(mean, 0.2), task_type="preference", base_model=base, preference=preference)
    evaluation = made.report["evaluation"]
    evaluation["row_losses"] = [[n, 1, base / w, tuned / w] for n, w, base, tuned in evaluation["row_losses"]]
    share = {"name": "preference_accuracy", "label": "preference accuracy", "unit": "%", "tuned": 50.0 + 10 * job_id}
    evaluation["metrics"].append(share)
    made.report["adapter"] = {"init_from": {"sha256": begun_from} if begun_from else None}
    return made


def test_pairs_are_compared_pair_by_pair_and_told_with_the_share_that_is_preferred_rightly() -> None:
    order = compared([of_pairs(1, 0.5), of_pairs(2, 0.7, loss_type="sigmoid"), of_pairs(3, 0.9, beta=0.1)])
    assert [one.against.reading for one in order.jobs if one.against] == ["worse", "worse"], (
        "defaults are the same loss"
    )
    text = comparison_text(order, SCREEN)
    assert "in nats a pair on the same 40 rows" in text and "PREFERENCE ACCURACY %" in text and " 60.0 " in text
    assert "another loss" not in text


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ({"beta": 0.1}, {"beta": 0.5}, False), ({"loss_type": "ipo"}, {"loss_type": ["ipo", "sft"]}, False),
        ({"begun_from": "a"}, {"begun_from": "b"}, False), ({}, {"begun_from": "b"}, False),
        ({"begun_from": "a", "loss_type": "simpo"}, {"begun_from": "b", "loss_type": "simpo"}, True),
        ({"base": "m"}, {"base": "n"}, False), ({"base": "n", "loss_type": "simpo"}, {"loss_type": "simpo"}, True),
        ({"loss_type": "ipo"}, {"loss_type": ["ipo"], "loss_weights": [1.0]}, True),
    ],
    ids=["beta", "terms", "other references", "base and adapter", "no reference", "other bases", "no base", "written"],
)  # fmt: skip
def test_losses_of_pairs_that_are_not_one_measure_are_not_compared(
    first: dict[str, Any], second: dict[str, Any], alike: bool
) -> None:
    """The second has more loss and ranks more pairs rightly, which decides where the losses are no one measure."""
    order = compared([of_pairs(1, 0.5, **first), of_pairs(2, 0.9, **second)])
    assert [job.job_id for job in order.jobs] == ([1, 2] if alike else [2, 1])
    assert order.reading(order.jobs[1]) == ("worse" if alike else "another loss")
    told = "1 learns by another loss than 2: preference accuracy ranks them."
    assert (told in comparison_text(order, SCREEN)) != alike


def test_pairs_that_were_cut_elsewhere_are_other_rows() -> None:
    jobs = [of_pairs(1, 0.5), of_pairs(2, 0.9)]
    for job, cut in zip(jobs, (0, 3), strict=True):
        for row in job.report["evaluation"]["row_losses"]:
            row.append(40 - cut)
    order = compared(jobs)
    assert order.jobs[1].against is None and order.reading(order.jobs[1]) == "other held-out rows"


def test_few_rows_get_no_reading_and_a_missing_loss_no_place() -> None:
    order = compared([job(1, noisy(1.0, 0.1, rows=5)), job(2, noisy(2.0, 0.1, rows=5))])
    assert order.jobs[1].against is not None and order.jobs[1].against.reading == "too few rows"
    assert "nan" not in comparison_text(order, SCREEN)
    lost = job(4, noisy(1.0, 0.1))
    lost.report["evaluation"]["metrics"][0]["tuned"] = None
    assert [one.job_id for one in compared([lost, job(5, noisy(2.0, 0.1))]).jobs] == [5, 4]


def test_a_key_that_came_after_a_job_does_not_differ_from_its_default() -> None:
    new = JobSpec.model_validate({"name": "a", "base_model": "b", "dataset": {"path": "c"}}).model_dump(mode="json")
    old = {**new, "dataset": {key: new["dataset"][key] for key in ("path", "format", "test_size")}}
    assert differences([job(1, noisy(1.0, 0.1), **old), job(2, noisy(2.0, 0.1), **new)]) == {}


def test_only_settings_that_differ_are_shown() -> None:
    jobs = [
        job(1, noisy(1.0, 0.1), lora={"r": 8, "lora_alpha": 16}, labels={"a": "b"}),
        job(2, noisy(2.0, 0.1), lora={"r": 32, "lora_alpha": 16}, training={"seed": 1}),
    ]
    assert differences(jobs) == {"lora.r": [8, 32], "training.seed": [0, 1]}
    text = comparison_text(compared(jobs), SCREEN)
    assert "lora.r" in text and "lora_alpha" not in text
    assert "same settings" in comparison_text(compared([jobs[0], jobs[0]]), SCREEN)


def test_the_time_and_the_peak_of_a_job_beside_others_are_not_called_its_own() -> None:
    jobs = [job(number, noisy(float(number), 0.1)) for number in (1, 2, 3)]
    assert "shared" not in comparison_text(compared(jobs), SCREEN)
    for one in jobs[:2]:
        one.report["training"]["companions"] = [3 - one.job_id]
    assert "peak memory of 1 and 2 are of a process that they shared" in comparison_text(compared(jobs), SCREEN)


def test_a_base_that_was_edited_in_place_and_other_rows_are_told() -> None:
    """Their settings are the same, and "The jobs have the same settings." was all that was said."""
    jobs = [job(1, noisy(1.0, 0.1)), job(2, noisy(2.0, 0.1))]
    for one, base, rows in zip(jobs, ("a" * 64, "b" * 64), ("c" * 64, "d" * 64), strict=True):
        one.report["base"] = {"commit": None, "sha256": base}
        one.report["data"]["train_rows_sha256"] = rows
    told = {"base_model's files": ["a" * 12, "b" * 12], "rows to train on": ["c" * 12, "d" * 12]}
    assert compared(jobs).as_json()["differences"] == told
    text = comparison_text(compared(jobs), SCREEN)
    assert "base_model's files" in text and "same settings" not in text
    other = replace(jobs[1], spec={**jobs[1].spec, "dataset": {"test_size": 0.5}})
    assert "rows to train on" not in compared([jobs[0], other]).differences, "the setting says it"
    smaller = replace(jobs[1], spec={**jobs[1].spec, "base_model": "org/small"})
    assert "rows to train on" in compared([jobs[0], smaller]).differences, "another base reads the same rows"
    data = {**smaller.report["data"], "too_long_rows_dropped": 3}
    dropped = replace(smaller, report={**smaller.report, "data": data})
    assert "rows to train on" not in compared([jobs[0], dropped]).differences, "its tokenizer has left some out"
    del jobs[1].report["base"]
    assert list(compared(jobs).differences) == ["rows to train on"], "an older report does not say"


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_comparison(
        compared([job(1, noisy(1.0, 0.1)), job(2, noisy(2.0, 0.1)), job(3, noisy(1.1, 0.1))]), tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_classifiers_are_compared_by_row_and_with_no_job_of_another_task() -> None:
    best = noisy(1.0, 0.2)
    jobs = [job(1, best, task_type="SEQ_CLS"), job(2, noisy(1.5, 0.2), task_type="SEQ_CLS")]
    assert "in nats a row on the same 40 rows" in comparison_text(compared(jobs), SCREEN)
    assert "in nats a token on the same 40 rows" in comparison_text(compared([job(1, best), job(2, best)]), SCREEN)
    compared([job(1, best), job(2, best, task_type="CAUSAL_LM")])  # one is older than the key
    with pytest.raises(UsageError, match="jobs 1 and 3 learn different tasks"):
        compared([jobs[0], job(3, best)])


def test_a_job_whose_loss_is_no_number_on_some_row_is_last_and_compared_with_none() -> None:
    good, poor, broken = (job(n, [loss * w for w in TOKENS]) for n, loss in ((1, 1.0), (2, 2.0), (3, 0.1)))
    broken.report["evaluation"]["row_losses"][0][3] = broken.metrics["loss"]["tuned"] = None
    found = compared([broken, good, poor])
    assert [(one.job_id, found.reading(one)) for one in found.jobs] == [(1, "best"), (2, "worse"), (3, "not known")]
    assert [one["against_best"] is None for one in found.as_json()["jobs"]] == [True, False, True]
    assert "not known" in comparison_text(found, SCREEN)
    assert compared([broken]).reading(broken) == "not known"
