"""A job on several cards is one job wherever a person or a monitoring system looks, and each of its cards is named."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from loractl.common.artifacts import ArtifactStore
from loractl.common.job.status import Reason, Stage
from loractl.common.job.sweep import NewSweep
from loractl.common.store.database import make_engine
from loractl.common.store.records import Choice, Claim, Page, Progress
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.fleet.answer import fleet
from loractl.scheduler.fleet.text import devices
from loractl.scheduler.status.job import job_in_full, job_state
from loractl.scheduler.status.job_text import job_text, state_line
from loractl.scheduler.status.overview import job_list, overview
from loractl.scheduler.status.overview_text import job_list_text, overview_text
from loractl.scheduler.status.standing import sweep_standing
from loractl.scheduler.status.standing_text import opened
from loractl.scheduler.web.guard import Access
from loractl.scheduler.web.metrics import Exporter
from loractl.scheduler.web.pages.shelf import ReportShelf
from loractl.scheduler.web.site import make_site
from loractl.scheduler.why.answer import why
from loractl.scheduler.why.text import why_text

from ..common.store.test_gangs import claimed, gang, show
from ..common.store.test_outbox import OPS, due
from ..factories import Clock

PIPE = Screen(width=80, unicode=True, color=False)
EVERYTHING = (Choice(), Page())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(sqlite_template: Path, tmp_path: Path, clock: Clock) -> Iterator[Store]:
    shutil.copy(sqlite_template, tmp_path / "lab.db")
    engine = make_engine(f"sqlite:///{tmp_path / 'lab.db'}")
    yield Store(engine, clock)
    engine.dispose()


@pytest.fixture
def ran(timed: Store) -> Claim:
    """A job that trains on both cards of heron, and holds 18 and 17 GiB of them."""
    show(timed, "heron:0", "heron:1")
    timed.jobs.submit(gang())
    claim = claimed(timed)
    timed.attempts.beat(claim, Progress(stage=Stage.TRAINING, step=30, total_steps=60, loss=1.0, vram_process=19 * GIB))
    for card, used in (("heron:0", 18), ("heron:1", 17)):
        show(timed, card, used={"1": used * GIB})
    return claim


def test_every_command_names_all_its_cards(timed: Store, ran: Claim) -> None:
    assert " heron 0, 1 " in overview_text(overview(timed, *EVERYTHING), PIPE)
    assert "attempt 1 on heron:0 and heron:1" in job_list_text(job_list(timed, *EVERYTHING), PIPE)
    assert "it is running on heron:0 and heron:1." in why_text(why(timed, 1), PIPE)
    assert devices(fleet(timed), PIPE).count("ada 1 on heron 0, 1") == 2, "on each of its cards"
    assert "on heron:0 and heron:1, training" in state_line(job_state(timed, 1))
    assert [job["cards"] for device in fleet(timed).as_json() for job in device["jobs"]] == [["heron:0", "heron:1"]] * 2
    (listed,) = overview(timed, *EVERYTHING).as_json()
    assert (listed["node"], listed["cards"]) == ("heron:0", ["heron:0", "heron:1"])


def test_a_sweep_and_a_message_name_all_its_cards(timed: Store, tmp_path: Path) -> None:
    show(timed, "heron:0", "heron:1")
    sweep_id = timed.sweeps.submit(NewSweep(name="grid", varied={"lora.r": "8"}), [gang()])
    claim = claimed(timed)
    timed.attempts.beat(claim, Progress(stage=Stage.TRAINING, step=30, total_steps=60))
    standing = sweep_standing(timed, sweep_id)
    assert standing.as_json()["members"][0]["cards"] == ["heron:0", "heron:1"]
    assert " trains on heron 0, 1" in opened(standing, PIPE)
    timed.cards.drain("heron:1", "mara", "new fans", until=None, at_once=False)
    assert " trains on heron 0, 1, drained by mara (heron:1)" in opened(sweep_standing(timed, sweep_id), PIPE)
    assert timed.cards.end_drain("heron:1")
    shelf = ReportShelf(timed, lambda: ArtifactStore(tmp_path.as_uri()))
    page = TestClient(make_site(timed, shelf, Access(token=None, names=frozenset({"localhost"}))), "http://localhost")
    assert "training on heron:0 and heron:1" in page.get(f"/sweeps/{sweep_id}").text
    timed.attempts.finish(claim, Reason.BAD_DATA, "no rows", Progress())
    timed.jobs.submit(gang(notify=["ops"]))
    timed.attempts.finish(claimed(timed), Reason.BAD_DATA, "no rows", Progress())
    message = due(timed, OPS)
    assert message is not None and "of ada, last on heron:0 and heron:1." in message.text


def test_what_it_holds_of_each_card_stands_beside_its_plan(timed: Store, ran: Claim) -> None:
    lines = job_text(job_in_full(timed, 1), PIPE).splitlines()
    assert lines[0].endswith("on heron:0 and heron:1, attempt 1, training")
    assert "memory    19.0 GiB at most on one card, planned 20.0 GiB on each   method lora" in lines
    assert "          now heron:0 18.0, heron:1 17.0" in lines
    timed.attempts.finish(ran, Reason.CANCELLED, "enough", Progress())
    ended = job_text(job_in_full(timed, 1), PIPE, full=True)
    assert "  heron 0, 1  lora " in ended and " 20.0 " in ended and " 19.0 " in ended
    assert "of several cards the plan of each" in ended
    (attempt,) = job_in_full(timed, 1).as_json()["attempts"]
    assert [(card["node"], card["reserved"], card["used"]) for card in attempt["cards"]] == [
        ("heron:0", 20 * GIB, None), ("heron:1", 20 * GIB, None),
    ]  # fmt: skip
    assert "now heron" not in job_text(job_in_full(timed, 1), PIPE)
    assert job_state(timed, 1).cards == ()


def test_a_silent_card_of_several_is_named(timed: Store, ran: Claim, clock: Clock) -> None:
    clock.forward(20)
    show(timed, "heron:0")
    assert job_in_full(timed, 1).trouble == "silent for 20 s (heron:1)"
    assert " :1 silent for 20 s " in overview_text(overview(timed, *EVERYTHING), PIPE)


def test_a_sum_over_the_cards_of_a_node_counts_it_once(timed: Store, ran: Claim) -> None:
    families = text_string_to_metric_families(Exporter(timed).text().decode())
    samples = [sample for family in families for sample in family.samples]
    names = Counter(sample.name for sample in samples)
    assert (names["loractl_job_progress_ratio"], names["loractl_job_lease_end_timestamp_seconds"]) == (1, 1)
    parts = {s.labels["card"]: s.value for s in samples if s.name == "loractl_job_reserved_bytes"}
    assert parts == {"heron:0": 20 * GIB, "heron:1": 20 * GIB}
    taken = sum(s.value for s in samples if s.name == "loractl_card_bytes" and s.labels["use"] == "jobs")
    assert taken == sum(parts.values())


def test_the_page_shows_it_once_with_all_its_cards(timed: Store, ran: Claim, tmp_path: Path) -> None:
    shelf = ReportShelf(timed, lambda: ArtifactStore(tmp_path.as_uri()))
    page = TestClient(make_site(timed, shelf, Access(token=None, names=frozenset({"localhost"}))), "http://localhost")

    def text(address: str) -> Any:
        answer = page.get(address)
        assert answer.status_code == 200
        return answer.text

    lab = text("/")
    assert lab.count('data-key="r1"') == 1 and ">heron 0, 1<" in lab
    assert "20.0 GiB planned of each of heron:0 and heron:1" in lab and "ada · 1 · 2×20.0" in lab
    job = text("/jobs/1")
    assert "Attempt 1 on heron:0 and heron:1" in job and "planned 20.0 GiB on each of 2 cards" in job
    assert "heron:1 holds 17.0 of 20.0 GiB now" in job
    assert "attempt 1 on heron:0 and heron:1" in text("/jobs")
