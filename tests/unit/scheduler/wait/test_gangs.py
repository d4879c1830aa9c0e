"""Why a job that several cards are to share waits: which card it lacks, and who has it."""

from __future__ import annotations

from typing import Any

from loractl.common.job.method import Method
from loractl.common.placement.rule import RESERVE_AFTER_S
from loractl.common.store.fleet import waiting_of
from loractl.common.text import in_short, in_words
from loractl.common.units import GIB
from loractl.scheduler.wait.cards import card_fits
from loractl.scheduler.wait.queue import asked_of
from loractl.scheduler.wait.reasons import explain
from loractl.scheduler.wait.starts import ahead_of

from ...fleets import card, drained, fleet, in_seconds, running, waits


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
    assert told(shared(), *pair(), **busy) == (
        "memory",
        "waits for a second card of 20.0 GiB on heron when job 12 ends",
    )
    both = {"ran": [running(12, "heron:1", 20), running(13, "heron:0", 20)]}
    assert told(shared(), *pair(), **both)[1].startswith("waits for 2 cards of 20.0 GiB on heron when jobs 1")
    small = {"ran": [running(12, "heron:1", 2)]}
    assert told(shared(), *pair(), **small)[0] == "busy", "there the memory is free, and the card takes no second job"
    kept = shared(submitted_at=in_seconds(-RESERVE_AFTER_S - 1))
    assert told(kept, *pair(), ran=[running(12, "heron:1", 20, 600)])[1].endswith(
        "on heron when job 12 ends (kept for it)"
    )


def test_a_job_that_needs_several_cards_has_the_others_of_its_box_ahead_of_it() -> None:
    """`status` named those that go first, `why` said that nothing is ahead: what was asked first decided."""
    first = waits(lora=40, qlora=None, methods=(Method.LORA,), job_id=7)
    second = shared(alone=False, job_id=8)
    first.vram_lora = second.vram_lora = 20 * GIB
    for asked, expected in ((second, [7]), (first, [])):
        view = fleet(pair(), ran=[running(12, "heron:1", 20)], waiting=[first, second])
        ready = [waiting_of(vars(job), view.now) for job in (first, second)]
        assert [other.job_id for other in ahead_of(asked, view, ready)] == expected
        assert [other.job_id for other in ahead_of(second, view, ready)] == [7]


def test_a_gang_that_starts_names_all_its_cards() -> None:
    assert told(shared(), *pair()) == ("next", "heron:0 and heron:1 are about to take it")


def test_where_no_worker_runs_several_cards_a_job_that_asks_for_them_says_so() -> None:
    plain = [card(f"heron:{n}", 24) for n in range(2)]
    assert told(shared(alone=False), *plain) == ("never", "asks for 2 cards, and no worker here runs a job on several")
    assert told(shared(), *plain) == ("never", "needs 40.0 GiB, and the largest card has 24.0 GiB")
    assert told(shared(cards=3, alone=False), *pair())[1] == "needs 3 cards of 20.0 GiB of one box, and no box has them"


def test_a_box_with_a_closed_card_is_waited_for() -> None:
    first, second = pair()
    second.draining = True
    word, sentence = told(shared(alone=False), first, second)
    assert (word, sentence) == ("worker", "heron:0 has too few other cards in its box that can hold a share now")


def test_a_box_that_is_not_whole_is_named_by_what_it_lacks() -> None:
    """It was told that something outside loractl holds 0.0 GiB of the other card, or that open cards were not open."""
    whole = waits(lora=40, qlora=None, methods=(Method.LORA,), gangs=shared().gangs)
    assert told(whole, *pair(), drains=[drained("heron:1")]) == (
        "drained",
        "heron:1 is drained by lena: replacing a fan",
    )
    first, second = pair()
    second.outside_bytes, second.outside = 20 * GIB, [{"pid": 9, "name": "vllm", "bytes": 20 * GIB}]
    for job in (whole, shared(alone=False)):
        assert told(job, first, second) == ("memory", "heron:1 has 4.0 GiB left: vllm (pid 9) holds 20.0 GiB")


def test_a_gang_that_waits_for_lora_says_whose_end_gives_it_room() -> None:
    """It was told that no card has room for LoRA."""
    way = {"cards": 2, "parallel": "sharded", "lora": 20 * GIB, "qlora": 10 * GIB}
    job = waits(lora=40, qlora=30, gangs={"alone": True, "ways": [way]}, lora_until=in_seconds(3600))
    asked = ("memory", "waits for a second card of 20.0 GiB on heron when job 12 ends")
    assert told(job, *pair(), ran=[running(12, "heron:1", 20)]) == asked


def test_a_job_whose_share_is_small_is_taken_by_a_processor_that_holds_all_of_it() -> None:
    job = shared(4, job_id=7)
    cards = [card("heron:0", 16), card("wren:0", 64, kind="cpu")]
    first = waits(lora=16, qlora=16, job_id=6)
    view = fleet(cards, ran=[running(12, "heron:0", 16)], waiting=[first, job])
    assert explain(job, view).sentence == "wren:0 is about to take it"


def test_each_card_says_what_of_the_job_it_would_have() -> None:
    job = shared()
    view = fleet(pair(), ran=[running(12, "heron:1", 20)], waiting=[job])
    assert [(fit.when, fit.then) for fit in card_fits(job, view)] == [
        ("now", "has room for its share"),
        ("?", "fits when job 12 ends"),
    ]


def test_a_card_that_has_nobody_to_share_the_job_with_is_too_small_for_it() -> None:
    job = shared()
    cards = [card("heron:0", 8, gangs=True), card("heron:1", 24, gangs=True)]
    view = fleet(cards, ran=[running(12, "heron:1", 20)], waiting=[job])
    assert {(fit.when, fit.then) for fit in card_fits(job, view)} == {("never", "smaller than the job")}


def test_a_job_whose_cards_are_kept_for_another_says_for_whom() -> None:
    first = shared(cards=3, submitted_at=in_seconds(-RESERVE_AFTER_S - 1), job_id=8, user="bob")
    second, trio = shared(15), [*pair(), card("heron:2", 24, gangs=True)]
    view = fleet(trio, ran=[running(12, "heron:2", 20, 600)], waiting=[first, second], charges={"ada": 9.0})
    wait = explain(second, view)
    assert (wait.word, wait.sentence) == ("kept", "heron:0 and heron:1 are kept for job 8, which goes first")
    fits = card_fits(second, view)
    assert fits[0].then == "kept for job 8, which goes first"
    assert (fits[2].at, fits[2].then) == (in_seconds(600), "fits when job 12 ends")


def test_a_box_with_too_few_cards_for_it_never_has_room() -> None:
    job = shared()
    cards = [*pair(), card("crane:0", 24, gangs=True), card("wren:0", 12, gangs=True)]
    told = {fit.node: fit.then for fit in card_fits(job, fleet(cards, waiting=[job]))}
    assert told["crane:0"] == "has too few other cards in its box"
    assert told["wren:0"] == "smaller than its share"
    only = shared(alone=False, cards=4)
    told = {fit.node: fit.then for fit in card_fits(only, fleet(cards, waiting=[only]))}
    assert told["heron:0"] == "has too few other cards in its box"


def test_cards_that_are_closed_or_held_by_others_are_not_too_few_for_ever() -> None:
    job, only, short = (
        shared(),
        shared(alone=False),
        ("?", "has too few other cards in its box that can hold a share now"),
    )

    def fits(asks: Any, *nodes: Any, **others: Any) -> dict[str, tuple[str, str]]:
        return {fit.node: (fit.when, fit.then) for fit in card_fits(asks, fleet(nodes, waiting=[asks], **others))}

    first, second = pair()
    second.outside_bytes = 20 * GIB
    second.outside = [{"pid": 9, "name": "vllm", "bytes": 20 * GIB}]
    assert fits(only, first, second)["heron:0"] == short
    crane = [card(f"crane:{n}", 24, gangs=True) for n in range(2)]
    found = fits(job, first, second, *crane)
    assert found["heron:0"] == short and found["heron:1"] == ("?", "has 4.0 GiB left: vllm (pid 9) holds 20.0 GiB")
    for asks in (job, only):
        assert fits(asks, *pair(), drains=[drained("heron:1")])["heron:0"] == short
    assert fits(job, *pair(), *crane, drains=[drained("heron:1")])["heron:0"] == short
    slice_ = card("heron:2", 24, gangs=False)
    for asks in (job, only):
        assert fits(asks, *pair(), slice_, drains=[drained("heron:1")])["heron:2"][0] == "never"


def test_what_it_asks_for_is_that_of_each_card() -> None:
    job = shared()
    asks = asked_of(job, fleet(pair(), waiting=[job]))
    assert (asks.cards, asks.as_json()["parallel"], asks.bytes) == (2, "sharded", 20 * GIB)
    alone = asked_of(job, fleet([card("heron:0", 24)], waiting=[job]))
    assert (alone.cards, alone.bytes) == (1, 40 * GIB), "no box divides it"


def test_cards_are_named_in_words_and_in_short() -> None:
    names = [f"heron:{n}" for n in (0, 10, 2)]
    assert in_words(names) == "heron:0, heron:10 and heron:2" and in_words(names[:1]) == "heron:0"
    assert in_short(names) == "heron 0, 2, 10" and in_short(names[:1]) == "heron:0"
