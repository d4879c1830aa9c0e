"""Figures of final rows: nobody is shown one, but of a winner and of a job alone, and each look is a row."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from starlette.testclient import TestClient

from loractl.common.artifacts import ArtifactStore
from loractl.common.job.sweep import NewSweep
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim
from loractl.common.store.store import Store
from loractl.common.store.tables import FinalLook
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.compare.answer import comparison
from loractl.scheduler.compare.text import sweep_comparison_text
from loractl.scheduler.compare.winner import SweepComparison, sweep_comparison
from loractl.scheduler.report.answer import report
from loractl.scheduler.report.text import report_text
from loractl.scheduler.reproduce.sameness import sameness
from loractl.scheduler.status.job import job_history
from loractl.scheduler.status.standing import sweep_standing
from loractl.scheduler.web.guard import Access
from loractl.scheduler.web.pages.shelf import ReportShelf
from loractl.scheduler.web.site import make_site

from .... import webs
from ...factories import submission, take

PLAIN = Screen(width=200, unicode=True, color=False)
FIGURE = "7.77"
"""A tuned model's loss on final rows."""


def shows_it(text: str) -> bool:
    """Whether the loss is in a text; the seconds of a time, like 37.776, may look like it."""
    return re.search(rf"(?<!\d){re.escape(FIGURE)}", text) is not None


def test_only_the_winner_s_are_shown_and_each_look_is_a_row(store: Store, tmp_path: Path) -> None:
    lab = webs.SeededLab(store=store, artifacts=ArtifactStore(tmp_path.as_uri()), now=store.now())
    members = [replace(submission(lora=1, name="triage"), spec=webs.spec(name="triage", lora={"r": r})) for r in (4, 8)]
    store.sweeps.submit(NewSweep(name="triage", varied={"lora.r": "4,8"}), members)
    first, second = claims(store, 2)
    finish(lab, first, 1.0)
    assert not shows_it(told(compare(lab))), "the sweep goes on: its winner is not chosen yet"
    assert "shown once all members have ended" in compare(lab).second_look
    finish(lab, second, 2.0)
    site = page(lab)
    assert not shows_it(everything(lab, site, jobs=(1, 2))) and "nobody has looked yet" in site
    before = [(job.job_id, job.status, job.report_uri, job.manifest_sha256) for job in store.jobs.matching()]

    looked = compare(lab, user="mara")
    assert looked.final is not None and looked.final.job_id == looked.comparison.best.job_id == 1
    assert f"Better than the base: held-out loss 9.00 -> {FIGURE}." in looked.second_look
    assert looked.second_look.endswith("Look 1 at them.") and looked.second_look in told(looked)
    assert compare(lab, user="wei").second_look.endswith("Look 2 at them.")
    assert [(one.job_id, one.sweep_id, one.user) for one in store.results.looks("f" * 64)] == [
        (1, 1, "mara"),
        (1, 1, "wei"),
    ]
    assert "Look 2 at them." in page(lab), "the page shows what somebody has looked at"
    assert len(store.results.looks("f" * 64)) == 2, "and is no look"
    assert not shows_it(everything(lab, "", jobs=(1, 2))), "a look changes no report"
    assert [(job.job_id, job.status, job.report_uri, job.manifest_sha256) for job in store.jobs.matching()] == before
    assert sameness(store, lab.artifacts, 1, 1).same and "final" not in json.dumps(sameness_of(lab))


def test_a_job_alone_shows_its_own_and_says_who_looked_before(store: Store, tmp_path: Path) -> None:
    lab = webs.SeededLab(store=store, artifacts=ArtifactStore(tmp_path.as_uri()), now=store.now())
    for name in ("a", "b", "c"):
        store.jobs.submit(submission(lora=1, name=name))
    one, two, plain = claims(store, 3)
    finish(lab, one, 1.0)
    finish(lab, two, 1.5)
    webs.store_result(lab, plain, 3.0, 1.0)
    answers = [report(store, lab.artifacts, job_id, "ada") for job_id in (1, 2, 2, 3)]
    said = [answer.final.sentence if answer.final else "" for answer in answers]
    assert said[0].endswith("Look 1 at them.")
    assert said[1].endswith("Look 2 at them; job 1 looked at before.")
    assert said[2].endswith("Look 3 at them; job 1 looked at before.") and said[3] == ""
    assert said[0] in report_text(answers[0].content, PLAIN, 0, said[0])
    shown = json.loads(json.dumps(answers[1].as_json()))["final"]
    assert (shown["look"], [look["job_id"] for look in shown["looks"]]) == (2, [1, 2])
    assert "final" not in answers[3].as_json()


def claims(store: Store, count: int) -> list[Claim]:
    found = [take(store) for _ in range(count)]
    return [claim for claim in found if isinstance(claim, Claim)]


def finish(lab: webs.SeededLab, claim: Claim, tuned: float) -> None:
    """A result with 40 final rows."""
    value = webs.the_report(claim.job_id, claim.spec.name, "ada", 3.0, tuned)
    loss = {**value["evaluation"]["metrics"][0], "base": 9.0, "tuned": float(FIGURE), "change": -1.23}
    sentence = f"Better than the base: held-out loss 9.00 -> {FIGURE}."
    final: dict[str, Any] = {
        "sha256": "f" * 64, "rows": 40, "metrics": [{**loss, "low": -1.4, "high": -1.1, "reading": "better"}],
        "verdict": {"reading": "better", "short": "", "sentence": sentence, "aside": ""},
    }  # fmt: skip
    data = {**value["data"], "final_rows": 40, "final_sha256": "f" * 64}
    webs.store_result(lab, claim, 3.0, tuned, final=final, data=data)


def compare(lab: webs.SeededLab, user: str = "ada") -> SweepComparison:
    return sweep_comparison(lab.store, lab.artifacts, 1, user)


def told(answer: SweepComparison) -> str:
    return sweep_comparison_text(answer, PLAIN) + json.dumps(answer.as_json())


def sameness_of(lab: webs.SeededLab) -> dict[str, Any]:
    return sameness(lab.store, lab.artifacts, 1, 2).as_json()


def page(lab: webs.SeededLab) -> str:
    shelf = ReportShelf(lab.store, lambda: lab.artifacts)
    site = make_site(lab.store, shelf, Access(token=None, names=frozenset({"localhost"})))
    client = TestClient(site, base_url="http://localhost")
    pages = [client.get(address).text for address in ("/sweeps/1", "/sweeps", "/jobs/1", "/jobs/2", "/adapters")]
    return "".join(pages).replace("&#39;", "'")


def everything(lab: webs.SeededLab, site: str, jobs: tuple[int, ...]) -> str:
    """All that is told of jobs that are members of a sweep without a look."""
    store, artifacts = lab.store, lab.artifacts
    answers = [report(store, artifacts, job_id, "ada") for job_id in jobs]
    assert not [answer for answer in answers if answer.final]
    texts = [json.dumps(answer.as_json()) + report_text(answer.content, PLAIN, 9) for answer in answers]
    texts += [json.dumps(comparison(store, artifacts, jobs).as_json()), json.dumps(sweep_standing(store, 1).as_json())]
    texts += [json.dumps(job_history(store, job_id).as_json()) for job_id in jobs]
    return "".join([*texts, site])


@pytest.mark.parametrize("upgraded_url", ["postgresql"], indirect=True)
def test_of_two_looks_at_once_one_at_least_counts_both(store: Store, upgraded_url: str) -> None:
    job_id = store.jobs.submit(submission())
    engine, seen = make_engine(upgraded_url), list[list[FinalLook]]()

    def meanwhile(_: object) -> None:
        if not seen:
            seen.append(store.results.look(job_id, "f" * 64, "mara"))

    event.listen(engine, "commit", meanwhile)
    seen.append(Store(engine).results.look(job_id, "f" * 64, "wei"))
    engine.dispose()
    assert [[one.user for one in looks] for looks in seen] == [["mara"], ["mara", "wei"]]
