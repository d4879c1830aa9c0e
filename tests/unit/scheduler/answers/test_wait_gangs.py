"""Why a job that several cards are to share waits: which card it lacks, and who has it."""

from __future__ import annotations

from typing import Any

from loractl.common.job.method import Method
from loractl.common.placement.rule import RESERVE_AFTER_S
from loractl.common.units import GIB
from loractl.scheduler.answers.wait.cards import card_fits
from loractl.scheduler.answers.wait.reasons import explain

from ...fleets import card, fleet, in_seconds, running, waits


def shared(gib: float = 20, *, cards: int = 2, alone: bool = True, **more: Any) -> Any:
    way = {"cards": cards, "parallel": "sharded", "lora": int(gib * GIB), "qlora": None}
    return waits(lora=40, qlora=None, methods=(Method.LORA,), gangs={"alone": alone, "ways": [way]}, **more)


def told(job: Any, *nodes: Any, **others: Any) -> tuple[str, str]:
    wait = explain(job, fleet(nodes, **others, waiting=[job]))
    return wait.word, wait.sentence


def pair(**more: Any) -> list[Any]:
    return [card(f"heron:{n}", 24, gangs=True, **more) for n in range(2)]


def test_a_gang_says_which_card_it_lacks_and_who_has_it() -> None:
    busy = {"ran": [running(12, "heron:1", 20)]}
    assert told(shared(), *pair(), **busy) == ("memory", "waits for a second card of 20.0 GiB on heron when 12 ends")
    both = {"ran": [running(12, "heron:1", 20), running(13, "heron:0", 20)]}
    assert told(shared(), *pair(), **both)[1].startswith("waits for 2 cards of 20.0 GiB on heron when 1")
    kept = shared(submitted_at=in_seconds(-RESERVE_AFTER_S - 1))
    assert told(kept, *pair(), ran=[running(12, "heron:1", 20, 600)])[1].endswith("on heron when 12 ends (kept for it)")


def test_a_gang_that_starts_names_all_its_cards() -> None:
    assert told(shared(), *pair()) == ("next", "heron:0 and heron:1 are about to take it")


def test_where_no_worker_runs_several_cards_a_job_that_asks_for_them_says_so() -> None:
    plain = [card(f"heron:{n}", 24) for n in range(2)]
    assert told(shared(alone=False), *plain) == ("never", "asks for 2 cards, and no worker here runs a job on several")
    assert told(shared(), *plain) == ("never", "needs 40.0 GiB, the largest card has 24.0")
    assert told(shared(cards=3, alone=False), *pair())[1] == "needs 3 cards of 20.0 GiB of one box, and no box has them"


def test_a_box_with_a_closed_card_is_waited_for() -> None:
    first, second = pair()
    second.draining = True
    word, sentence = told(shared(alone=False), first, second)
    assert (word, sentence) == ("worker", "it asks for several cards of one box, and not enough are open")


def test_each_card_says_what_of_the_job_it_would_have() -> None:
    job = shared()
    view = fleet(pair(), ran=[running(12, "heron:1", 20)], waiting=[job])
    assert [(fit.when, fit.then) for fit in card_fits(job, view)] == [
        ("now", "its share is 20.0 GiB, of 2 cards"),
        ("?", "its share is 20.0 GiB, of 2 cards, when 12 ends"),
    ]


def test_a_card_that_has_nobody_to_share_the_job_with_is_too_small_for_it() -> None:
    job = shared()
    cards = [card("heron:0", 8, gangs=True), card("heron:1", 24, gangs=True)]
    view = fleet(cards, ran=[running(12, "heron:1", 20)], waiting=[job])
    assert {(fit.when, fit.then) for fit in card_fits(job, view)} == {("never", "card is smaller than the job")}
