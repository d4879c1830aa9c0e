"""How a wait looks: within the screen, in ASCII where it must be, without escapes in a pipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loractl.common.store.fleet import FleetView
from loractl.common.store.records import Claim
from loractl.common.store.store import Store
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.status.job import job_in_full, state_of
from loractl.scheduler.status.job_text import job_text
from loractl.scheduler.wait.cards import card_fits
from loractl.scheduler.wait.reasons import Tier, Wait, explain
from loractl.scheduler.wait.starts import ExpectedStart
from loractl.scheduler.why.answer import Ahead, Why
from loractl.scheduler.why.answer import why as asked
from loractl.scheduler.why.text import why_text

from ....databases import SQLITE_ALONE
from ...factories import node_state, submission
from ...fleets import in_seconds, waits
from ..screens import HOSTILE, PIPE, crowded, lab, seemly, shown

SECOND = Ahead(jobs=((1486, "priya"),), complete=True)

HELP = {
    "helps": "It would start now on heron:3 with max_length 1536",
    "command": "loractl plan 1485 --set dataset.max_length=1536",
}

FIRST = Ahead(jobs=(), complete=True)
"""Of the job that is first among more than are read."""


START = ExpectedStart(at=in_seconds(600), spread_s=120.0, nodes=("heron:0",), measured=(1471,))


def why(
    view: FleetView,
    screen: Screen,
    job: Any,
    start: ExpectedStart | None = None,
    wait: Wait | None = None,
    ahead: Ahead | None = SECOND,
    unknown: str = "",
) -> str:
    answer = Why(
        job=state_of(job),
        wait=replace(wait or explain(job, view), **HELP),
        start=start,
        cards=tuple(card_fits(job, view)),
        ahead=ahead,
        now=view.now,
        unknown=unknown,
    )
    return why_text(answer, screen)


@shown
@pytest.mark.parametrize("view", [lab, crowded])
def test_a_reason_fits_any_screen(view: Any, screen: Screen) -> None:
    found = view()
    job = waits(10**6 + 99, 9000, 9000, name="n" * 63, user=HOSTILE) if view is crowded else waits(1485, 30, 25)
    node = list(found.cards)[-1]
    seemly(why(found, screen, job, ExpectedStart(at=in_seconds(10**6), spread_s=86_400 * 3, nodes=(node,))), screen)
    seemly(why(found, screen, job, wait=Wait(tier=Tier.POLICY, word="held", sentence=HOSTILE * 40)), screen)


def test_the_first_of_a_long_line_is_told_so_and_a_held_job_has_no_place() -> None:
    job, said = waits(1485, 30, 25), "Nothing is ahead of it."
    assert said in why(lab(), PIPE, job, ahead=FIRST)
    assert said not in why(lab(), PIPE, job, ahead=None)


def test_a_reason_stands_before_the_cards_and_what_would_help_after_them() -> None:
    view, job = lab(), waits(1485, 30, 25, name="sql-gen")
    lines = why(view, PIPE, job, START).splitlines()
    assert lines[0] == "1485 sql-gen waits for 25.0 GiB on one card."
    assert lines[1] == "Reason: memory, heron:0 when job 1471 ends."
    assert lines[2].startswith("Expected start: ")
    assert lines[2].endswith(" ± 2 min on heron:0, if job 1471 ends as its steps say.")
    assert lines[4].split() == ["CARD", "FREE", "OF", "FREE", "AT", "THEN"]
    end = lines.index("", 5)
    cards = {line[2:].split()[0]: line for line in lines[5:end]}
    assert cards["heron:0"].startswith("→ heron:0     4.0  48")
    assert cards["heron:0"].endswith("fits when job 1471 ends")
    assert cards["kestrel:0"] == "  kestrel:0   6.2  24  never      smaller than the job"
    assert cards["osprey:0"].split(maxsplit=3)[3].endswith("its worker is being stopped")
    assert lines[end + 1] == "Ahead of it: 1486 (priya)."
    assert lines[end + 2 :] == [
        "It would start now on heron:3 with max_length 1536: loractl plan 1485 --set",
        "dataset.max_length=1536",
    ]


def test_an_expected_start_that_is_not_known_says_so_unless_it_is_plain() -> None:
    view = lab()
    said = "nobody knows yet when job 1471 ends"
    assert f"Expected start: not known: {said}." in why(view, PIPE, waits(1485, 30, 25), unknown=said)
    assert "Expected start" not in why(view, PIPE, waits(1485, 300, 250)), "never is never"


def test_a_job_of_unknown_need_waits_for_a_card_of_its_own() -> None:
    assert why(lab(), PIPE, waits(1485, None, None)).startswith("1485 helpdesk waits for a card of its own.")


@pytest.fixture
def running_here(store: Store) -> Store:
    """A job that runs on the only card."""
    store.cards.see(node_state("box:0"))
    store.jobs.submit(submission())
    assert isinstance(store.attempts.claim("box:0"), Claim)
    return store


@SQLITE_ALONE
def test_why_of_a_running_job_says_what_is_wrong_with_its_card(running_here: Store) -> None:
    """Its worker was dead, and all that was said is that it runs there."""
    told = "Job 1 does not wait: it is running on box:0"
    assert why_text(asked(running_here, 1), PIPE).startswith(f"{told}. ")
    running_here.cards.drain("box:0", "mara", "new fans", until=None, at_once=False)
    assert why_text(asked(running_here, 1), PIPE).startswith(f"{told}, its card is drained by mara. ")


@SQLITE_ALONE
def test_a_held_job_says_how_it_is_released(running_here: Store) -> None:
    held = running_here.jobs.submit(submission())
    running_here.jobs.hold(held, "mara", "later")
    assert why_text(asked(running_here, held), PIPE).endswith(f"Release it: loractl release {held}")
    assert f"Release it: loractl release {held}" in job_text(job_in_full(running_here, held), PIPE)
