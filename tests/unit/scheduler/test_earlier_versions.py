"""What earlier versions stored of jobs that shared a trainer is still read: a report, and an attempt that ended with
the trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from loractl.common.artifacts import ArtifactStore
from loractl.common.job.status import OUTCOMES, Reason, Status
from loractl.common.settings import load_settings
from loractl.common.store.records import Progress
from loractl.common.store.store import Store
from loractl.scheduler.compare.answer import compared, finished_job
from loractl.scheduler.compare.text import comparison_text
from loractl.scheduler.report.answer import report
from loractl.scheduler.report.text import report_text
from loractl.scheduler.reproduce.answer import repetition
from loractl.scheduler.reproduce.sameness import sameness
from loractl.scheduler.status.job import job_in_full
from loractl.scheduler.status.job_text import job_text
from loractl.scheduler.web.guard import Access
from loractl.scheduler.web.site import make_site

from ... import webs
from ...databases import SQLITE_ALONE
from ..factories import NOON
from .screens import PIPE

pytestmark = SQLITE_ALONE

REPORT = Path(__file__).with_name("report_of_a_pack.json")
"""As loractl 0.5.0 of 18a2d29e wrote it, for a job that trained with jobs 2 and 3 in one process."""


@pytest.fixture
def lab(store: Store, tmp_path: Path) -> webs.SeededLab:
    """A job whose first attempt ended with its shared trainer, and whose second has such a report; job 2 has one of
    now."""
    made = webs.SeededLab(store=store, artifacts=ArtifactStore(tmp_path.as_uri()), now=NOON)
    store.clock = lambda: made.now
    webs.see_cards(store)
    lost = webs.run(made, "tiny", "ada", "kestrel:0", 8, steps=20)
    died = "it shared its trainer with job 2: the trainer was killed"
    assert store.attempts.finish(lost, Reason.HOST_LOST, died, Progress()) is Status.QUEUED
    again = webs.begin(made, "kestrel:0", steps=20, of=20)
    webs.store_result(made, again, 5.5, 5.2, **json.loads(REPORT.read_text("utf-8")))
    webs.finish(made, "other", "ada", 5.5, 5.1)
    return made


def test_an_attempt_that_ended_with_its_trainer_keeps_its_reason_and_has_an_advice(lab: webs.SeededLab) -> None:
    history = job_in_full(lab.store, 1)
    assert [attempt.row.reason for attempt in history.attempts] == [Reason.HOST_LOST, Reason.OK]
    assert "host_lost" in job_text(history, PIPE, full=True)
    assert "it shared its trainer with job 2" in job_text(history, PIPE)
    assert lab.store.jobs.get(1).retries_used == 0, "the lab caused it"
    assert OUTCOMES[Reason.HOST_LOST].next_step(1, has_checkpoint=False).startswith("nothing to do")


def test_the_report_of_a_job_that_shared_its_process_is_read_and_says_so(lab: webs.SeededLab, tmp_path: Path) -> None:
    found = report(lab.store, lab.artifacts, 1, "ada")
    assert found.as_json()["training"]["companions"] == [2, 3]
    assert "10 steps alongside jobs 2, 3 in" in report_text(found.content, PIPE, 1)
    jobs = [finished_job(lab.store, lab.artifacts, number) for number in (1, 2)]
    assert "Time and peak memory of 1 are of a process that it shared" in comparison_text(compared(jobs[:1]), PIPE)
    assert ("other jobs in its trainer", "2, 3", "none") in [
        (caveat.what, caveat.then, caveat.now)
        for caveat in repetition(lab.store, lab.artifacts, load_settings({"LORACTL_HOME": str(tmp_path)}), 1).caveats
    ]
    told = {pair.what: (pair.first, pair.second) for pair in sameness(lab.store, lab.artifacts, 1, 2).ran_with}
    assert ("2, 3", "none") in told.values()


def test_the_page_of_such_a_job_is_drawn(lab: webs.SeededLab) -> None:
    site = make_site(lab.store, lab.shelf, Access(token=None, names=frozenset({"localhost"})))
    page = TestClient(site, "http://localhost").get("/jobs/1")
    assert page.status_code == 200 and "host_lost" in page.text
