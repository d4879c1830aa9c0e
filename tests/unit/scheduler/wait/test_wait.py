"""Why a job waits: each word and its sentence, each card, the expected start, and what would help."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from loractl import __version__
from loractl.common.job.method import Method
from loractl.common.job.status import Reason
from loractl.common.placement.cards import Yields
from loractl.common.placement.lines import Waiting
from loractl.common.placement.preemption import undisturbed_s
from loractl.common.placement.rule import RESERVE_AFTER_S
from loractl.common.store.fleet import NODE_STALE_S, FleetView, GivingWay
from loractl.common.store.tables import Job
from loractl.common.units import GIB, clock
from loractl.scheduler.wait.cards import SILENT_S, card_fits, closed_cards, process_name, trouble_of
from loractl.scheduler.wait.queue import WaitingJobs, reason, without_queue
from loractl.scheduler.wait.reasons import Tier, explain
from loractl.scheduler.wait.sooner import sooner, without_others
from loractl.scheduler.wait.starts import LISTED_JOBS, MOST_STARTS, ExpectedStart, ahead_of, outlook, why_unknown

from ...factories import NOON
from ...fleets import card, drained, fleet, in_seconds, ready, running, waits

LORA_ONLY = (Method.LORA,)
TWO_HOURS_AGO = in_seconds(-7200)
NOTEBOOK = {"pid": 4711, "user": "tomas", "name": "vllm", "bytes": 16 * GIB}


def told(job: Job, *nodes: Any, **others: Any) -> tuple[str, str]:
    """The word and the sentence for a job that waits with `others` in the fleet."""
    others["waiting"] = [*others.get("waiting", ()), job]
    wait = explain(job, fleet(nodes, **others))
    return wait.word, wait.sentence


# --- never ---


def test_a_job_larger_than_every_card_never_starts_and_says_by_how_much() -> None:
    nodes = card("a:0", 24), card("b:0", 48, margin=1, outside_bytes=40), card("off:0", 40, draining=True)
    assert told(waits(lora=60, qlora=50), *nodes) == ("never", "needs 50.0 GiB, and the largest card has 47.0 GiB")
    assert told(waits(lora=60, qlora=47), *nodes)[0] != "never", "others may leave"


def test_a_label_that_no_box_has_is_named() -> None:
    job = waits(labels={"nvlink": "yes", "site": "roof"})
    assert told(job, card(labels={"nvlink": "yes"})) == ("never", "no box has the label nvlink=yes, site=roof")
    assert told(job) == ("worker", "no worker is online: start loractl worker on a box"), "none is known at all"


def test_a_job_whose_own_limit_is_below_its_need_never_starts() -> None:
    job = waits(methods=())
    job.spec = {"resources": {"max_vram": 2 * GIB}}
    assert told(job, card()) == ("never", "its resources.max_vram, 2.0, is less than it needs with any method")


def test_the_smaller_method_of_several_decides_what_never_fits() -> None:
    assert told(waits(lora=30, qlora=20), card(total=24), ran=[running(1, "box:0", 5)])[0] == "memory"
    assert told(waits(lora=30, qlora=20, methods=LORA_ONLY), card(total=24))[0] == "never"
    until = in_seconds(3600)
    assert told(waits(lora=30, qlora=20, lora_until=until), card(total=24))[0] != "never", "it will take QLoRA later"


@pytest.mark.parametrize(
    ("bound", "command"),
    [
        ({}, "loractl edit 7 --set method=qlora"),
        ({"sweep_id": 3}, "loractl submit --like 7 --set method=qlora"),
        ({"attempt": 1}, "loractl submit --like 7 --set method=qlora"),
    ],
)
def test_the_command_for_qlora_is_one_that_the_job_takes(bound: dict[str, int], command: str) -> None:
    """A member of a sweep, or a job that has begun, keeps its method."""
    job = waits(7, lora=30, qlora=20, methods=LORA_ONLY, **bound)
    assert explain(job, fleet([card(total=24)], waiting=[job])).command == command
    busy = fleet([card(total=24), card("b:0", total=48)], ran=[running(1, "b:0", 40, 600)], waiting=[job])
    assert (found := sooner(job, busy)) is not None and found[1] == command


# --- policy ---


def test_a_held_job_waits_for_a_person_whatever_is_free() -> None:
    assert told(waits(held=True, message="held: its worker was lost 3 times"), card()) == (
        "held",
        "its worker was lost 3 times",
    )
    assert told(waits(held=True), card()) == ("held", "until loractl release")
    assert told(waits(held=True, message="held by ada"), card()) == ("held", "by ada")


def test_a_failed_attempt_waits_for_its_time_and_then_like_any_other() -> None:
    assert told(waits(attempt=2, not_before=in_seconds(40)), card()) == ("retry", "attempt 3 in 40 s")
    assert told(waits(attempt=2, not_before=NOON), card())[0] == "next"


def test_a_job_that_only_a_newer_worker_can_read_says_so() -> None:
    left = waits(attempt=0, not_before=in_seconds(40), message="written by loractl 9.0")
    assert told(left, card()) == ("version", "written by loractl 9.0")
    failed = waits(attempt=1, not_before=in_seconds(40), message="it crashed", reason=Reason.TRAINER_ERROR)
    assert told(failed, card()) == ("retry", "attempt 2 in 40 s")


def test_a_user_at_the_limit_is_told_so() -> None:
    nodes = card("a:0", user_limit=2), card("b:0", user_limit=1, draining=True), card("c:0")
    ran = [running(1, "a:0", 8), running(2, "b:0", 8), running(3, "c:0", 8, user="bob")]
    assert told(waits(), *nodes, ran=ran) == ("limit", "ada runs 2 jobs, and one person may run 2 at a time")
    assert told(waits(user="bob"), *nodes, ran=ran)[0] != "limit"


def test_a_job_behind_the_last_one_that_its_user_may_run_says_so() -> None:
    nodes = card("a:0", user_limit=1), card("b:0")
    assert told(waits(8), *nodes, waiting=[waits(7)]) == (
        "limit",
        "job 7 goes first on a:0, and one person may run 1 at a time",
    )
    assert told(waits(8, user="bob"), *nodes, waiting=[waits(7)])[0] == "next"


def test_a_job_whose_result_lies_on_a_box_names_it_and_until_when() -> None:
    until = {"result_host": "heron", "result_until": in_seconds(300)}
    mine, other = card("heron:0"), card("owl:0", 48)
    assert told(waits(**until), mine, other) == ("next", "heron:0 is about to take it")
    text = r"only heron, which has its finished result, may take it until .*\d; {}"

    def state(*nodes: Any, **more: Any) -> str:
        word, sentence = told(waits(**until), *nodes, **more)
        assert word == "result"
        matched = re.fullmatch(text.format("(.*)"), sentence)
        assert matched is not None, sentence
        return matched[1]

    assert state(mine, other, ran=[running(1, "heron:0", 20)]) == "heron:0 when job 1 ends"
    assert state(other) == "it has no worker now"
    assert state(mine, other, drains=[drained("heron")]) == "heron:0 is drained by lena: replacing a fan"
    assert state(card("heron:0", seen_at=TWO_HOURS_AGO), other) == "heron:0 was last seen 2 h 00 min ago"
    assert state(card("heron:0", draining=True), other) == "heron:0 is closed: its worker is being stopped"
    over = waits(result_host="heron", result_until=NOON)
    assert told(over, card("heron:0", draining=True), other) == ("next", "owl:0 is about to take it")
    view = fleet([mine, other], waiting=[waits(**until)])
    then = {fit.node: fit.then for fit in card_fits(waits(**until), view)}
    assert then == {
        "heron:0": "about to take it",
        "owl:0": "may not take it until then: heron has its finished result",
    }


def failed(name: str, until: float = 600) -> dict[str, dict[str, str]]:
    """What a job's row says after a gpu_error."""
    return {name: {"reason": "gpu_error", "until": in_seconds(until).isoformat()}}


def test_a_card_that_failed_it_is_named_with_the_reason_and_until_when() -> None:
    nodes, ran = (card("a:0"), card("b:0")), [running(1, "b:0", 24)]
    for name in ("a:0", "a"):
        word, sentence = told(waits(avoids=failed(name)), *nodes, ran=ran)
        assert word == "avoids"
        assert re.fullmatch(r"a:0 failed it \(gpu_error\), so it waits for another card until .*\d", sentence)
        found = fits(waits(avoids=failed(name)), *nodes, ran=ran)
        assert f"a:0 {found['a:0'][1]}" == sentence
        assert found["b:0"] == ("?", "fits when job 1 ends")
    assert told(waits(avoids=failed("a:0")), card("a:0"), card("b:0", 2))[0] == "next", "the other is too small"
    over = {"a:0": {"reason": "gpu_error", "until": NOON.isoformat()}}
    assert told(waits(avoids=over), *nodes, ran=ran)[0] == "next"


def test_a_card_of_another_number_format_is_named_while_it_waits_for_one_of_its_checkpoint_s() -> None:
    old, new = card("a:0", self_test={"capability": "7.5"}), card("b:0", self_test={"capability": "9.0"})
    ran = [running(1, "b:0", 24)]
    why = "a:0 does not compute in bfloat16, as its checkpoint does, so it waits for another card"
    assert told(waits(begun_bf16=True), old, new, ran=ran) == ("format", why)
    found = fits(waits(begun_bf16=True), old, new, ran=ran)
    assert f"a:0 {found['a:0'][1]}" == why
    assert told(waits(begun_bf16=True), old)[0] == "next"
    other = told(
        waits(begun_bf16=False), new, card("a:0", self_test={"capability": "7.5"}), ran=[running(1, "a:0", 24)]
    )
    assert other == ("format", "b:0 computes in bfloat16, its checkpoint not, so it waits for another card")


def test_a_pause_after_a_failure_of_the_lab_says_where_and_how() -> None:
    job = waits(attempt=1, not_before=in_seconds(9), reason=Reason.DISK_FULL, message="full", node="a:0")
    assert told(job, card()) == ("retry", "attempt 2 in 9 s: a:0 failed it (disk_full)")
    again = waits(attempt=2, not_before=in_seconds(9), reason=Reason.GPU_ERROR, message="lost", node="a:0")
    again.avoids = {**failed("a:0", 300), **failed("a:1")}
    assert told(again, card("a:0"), card("a:1"))[1] == "attempt 3 in 9 s: a:1 failed it (gpu_error)", "it had both"


# --- fleet ---


def test_a_card_that_is_closed_by_a_fault_is_named_with_it() -> None:
    lost = "the driver has lost it: reset it"
    assert told(waits(), card(fault=lost)) == ("closed", f"box:0 is closed: {lost}")
    assert told(waits(), card(fault=lost), card("b:0"))[0] == "next", "another takes it"
    (fit,) = card_fits(waits(), fleet([card(fault=lost)]))
    assert (fit.when, fit.then) == ("?", f"closed: {lost}")


def test_a_card_that_can_t_be_read_may_be_large_enough() -> None:
    unread, small = card(total=0, fault="reboot the box"), card("b:0", 4)
    for nodes in ((unread,), (unread, small)):
        assert told(waits(lora=60, qlora=50), *nodes) == ("closed", "box:0 is closed: reboot the box")
    assert {fit.when for fit in card_fits(waits(lora=60, qlora=50), fleet([unread, small]))} == {"?", "never"}


def test_a_drained_card_is_named_with_who_why_and_until_when() -> None:
    order = drained("box:0", until=in_seconds(3600))
    word, sentence = told(waits(), card(), drains=[order])
    assert word == "drained"
    assert re.fullmatch(r"box:0 is drained by lena until .*\d: replacing a fan", sentence)
    assert told(waits(), card(), drains=[drained("box")]) == ("drained", "box:0 is drained by lena: replacing a fan")
    assert told(waits(), card(), drains=[drained("box", until=NOON)])[0] == "next", "it is over"
    assert told(waits(), card(), card("b:0", 4), drains=[drained("box")])[0] == "next", "a smaller card takes QLoRA"
    small = card("b:0", 2)
    assert told(waits(), card(), small, drains=[drained("box")])[0] == "drained", "the other can't hold it"


def test_a_silent_box_was_seen_so_long_ago() -> None:
    silent = card(seen_at=in_seconds(-NODE_STALE_S - 540))
    assert told(waits(), silent) == ("offline", "box:0 was last seen 10 min ago")
    assert told(waits(), card(seen_at=in_seconds(-SILENT_S)))[0] == "next", "a late look is not silence"


def test_a_stopping_worker_takes_nothing_more() -> None:
    assert told(waits(), card(draining=True)) == ("stopping", "box:0 is closed: its worker is being stopped")


def test_a_box_that_is_silent_or_drained_is_told_at_once() -> None:
    silent = card("heron:0", seen_at=in_seconds(-20)), card("heron:1", seen_at=in_seconds(-20))
    view = fleet([*silent, card("crane:0"), card("crane:1"), card("owl:0", draining=True)], drains=[drained("crane:1")])
    assert closed_cards(view) == ["crane:1 drained by lena", "heron silent for 20 s", "owl being stopped"]
    assert told(waits(), card(seen_at=in_seconds(-20))) == (
        "offline",
        "box:0 would take it, but has been silent for 20 s",
    )
    assert trouble_of(view, "crane:0") is None and closed_cards(fleet([card(seen_at=in_seconds(-14))])) == []
    assert closed_cards(fleet([card(seen_at=in_seconds(-4000))])) == [], "a box that is long gone is no news"


def test_while_the_queue_is_away_that_is_the_reason_of_what_a_card_is_about_to_take() -> None:
    job, full = waits(), waits(8, 500)
    view = fleet([card()], waiting=[job, full])
    waits_for = WaitingJobs(reasons={job.job_id: explain(job, view), full.job_id: explain(full, view)})
    told_so = without_queue(waits_for, "the queue is unreachable at redis://lab").reasons
    assert told_so[7].word == "queue" and told_so[7].sentence.startswith(
        "the queue is unreachable at redis://lab; box:0"
    )
    assert told_so[8] == waits_for.reasons[8]


def test_a_silent_box_of_another_version_is_to_be_upgraded() -> None:
    old = card(seen_at=TWO_HOURS_AGO, versions={"loractl": "0.0.9"})
    assert told(waits(), old) == (
        "version",
        f"box:0 ran loractl 0.0.9, this is {__version__}: upgrade its worker",
    )


def test_a_processor_that_leaves_a_job_to_gpus_which_lack_its_label_says_so() -> None:
    job = waits(labels={"site": "roof"})
    word, sentence = told(job, card("gpu:0"), card("cpu:0", kind="cpu", labels={"site": "roof"}))
    assert (word, sentence) == (
        "worker",
        "cpu:0 is a processor, which takes only jobs that no GPU of the fleet can hold",
    )


# --- next, and capacity ---


def test_a_job_that_the_rule_places_is_next_and_says_when_that_is_late() -> None:
    assert told(waits(), card()) == ("next", "box:0 is about to take it")
    assert told(waits(submitted_at=in_seconds(-300)), card()) == ("next", "box:0 is about to take it, waiting 5 min")


def test_memory_that_running_jobs_hold_is_free_when_they_end() -> None:
    ran = [running(11, "box:0", 20, 600), running(12, "box:0", 20, 60), running(13, "box:0", 20, None)]
    assert told(waits(lora=24, qlora=24), card(total=64, max_jobs=4), ran=ran) == ("memory", "box:0 when job 12 ends")
    assert told(waits(lora=44, qlora=44), card(total=64, max_jobs=4), ran=ran) == (
        "memory",
        "box:0 when jobs 12 and 11 end",
    )
    assert told(waits(lora=64, qlora=64), card(total=64, max_jobs=4), ran=ran) == (
        "memory",
        "box:0 when jobs 12, 11 and 1 more end",
    )


def test_the_card_that_is_free_first_is_named() -> None:
    nodes = card("a:0"), card("b:0"), card("c:0")
    ran = [running(1, "a:0", 20, 900), running(2, "b:0", 20, 300), running(3, "c:0", 20, None)]
    assert told(waits(), *nodes, ran=ran) == ("memory", "b:0 when job 2 ends")


def test_a_card_with_room_but_no_slot_is_busy() -> None:
    assert told(waits(), card(total=48), ran=[running(11, "box:0", 8, 60)]) == ("busy", "box:0 when job 11 ends")


def test_qlora_that_fits_sooner_is_what_a_job_waits_for() -> None:
    nodes = card("a:0", 24, max_jobs=3), card("b:0", 8)
    ran = [running(1, "a:0", 20, 900), running(2, "b:0", 8, 60)]
    assert told(waits(lora=20, qlora=8), *nodes, ran=ran) == ("memory", "b:0 when job 2 ends")


def test_memory_that_others_hold_is_told_with_whose_it_is() -> None:
    node = card(outside_bytes=20, outside=[NOTEBOOK, {**NOTEBOOK, "pid": 4712, "bytes": 4 * GIB}])
    assert told(waits(lora=8, qlora=8), node) == (
        "memory",
        "box:0 has 4.0 GiB left: vllm of tomas (pid 4711) and 1 more hold 20.0 GiB",
    )
    nameless = card(outside_bytes=20, outside=[{"pid": 4711, "user": None, "name": None, "bytes": 20 * GIB}])
    assert told(waits(lora=8, qlora=8), nameless) == (
        "memory",
        "box:0 has 4.0 GiB left: pid 4711 holds 20.0 GiB",
    )
    assert told(waits(lora=8, qlora=8), card(outside_bytes=20)) == (
        "memory",
        "box:0 has 4.0 GiB left: something outside loractl holds, or recently held, 20.0 GiB",
    )
    assert told(waits(lora=8, qlora=4), node)[0] == "next", "QLoRA fits beside them"


def test_a_job_behind_another_one_says_whose_turn_it_is() -> None:
    mine = waits(7, lora=20, qlora=20)
    assert told(mine, card(), waiting=[waits(9, priority=3, user="bob")]) == (
        "order",
        "box:0 goes to job 9 first: its priority is higher",
    )
    assert told(mine, card(), waiting=[waits(6)]) == ("order", "box:0 goes to job 6 first")
    assert told(mine, card(), waiting=[waits(9, user="bob")], charges={"ada": 5.0}) == (
        "share",
        "box:0 goes to job 9 first: bob has used the cards less",
    )


def test_the_term_that_puts_another_job_first_is_named() -> None:
    """It said only that the other goes first, and that nothing is ahead."""
    old, mine = waits(6, submitted_at=in_seconds(-90_000)), waits(7)
    short = waits(8, work_left_s=60.0)
    assert told(mine, card(), waiting=[short]) == (
        "order",
        "box:0 goes to job 8 first: its work counts as 60 s, this one's as 60 min",
    )
    assert told(mine, card(), waiting=[old]) == ("order", "box:0 goes to job 6 first: it has waited for 25 h 00 min")
    view = fleet([card()], waiting=[old, mine])
    assert [other.job_id for other in ahead_of(mine, view, ready([mine, old]))] == [6]


def test_a_card_that_is_kept_for_a_job_that_waited_long_is_kept_from_the_next() -> None:
    first = waits(5, lora=40, qlora=40, submitted_at=in_seconds(-RESERVE_AFTER_S))
    ran = [running(1, "box:0", 20, 600)]
    second = waits(9, lora=20, qlora=20, user="bob")
    node = card(total=48, max_jobs=4)
    assert told(second, node, ran=ran, waiting=[first], charges={"bob": 99.0}) == (
        "kept",
        "box:0 is kept for job 5, which goes first",
    )
    assert told(first, node, ran=ran, waiting=[second], charges={"bob": 99.0}) == (
        "memory",
        "box:0 when job 1 ends (kept for it)",
    )
    small = waits(9, lora=8, qlora=8, user="bob")
    assert told(small, node, ran=ran, waiting=[first], charges={"bob": 99.0})[0] == "next", (
        "it takes nothing from the first"
    )


def test_patience_is_told_with_the_card_that_would_take_qlora() -> None:
    job = waits(lora=40, qlora=8, lora_until=in_seconds(3600))
    word, sentence = told(job, card(), card("b:0", 48, draining=True))
    assert word == "patience"
    assert re.fullmatch(r"it waits for LoRA until .*\d, but QLoRA would fit on box:0", sentence)
    word, sentence = told(job, card(), ran=[running(1, "box:0", 24, 600)])
    assert word == "patience"
    assert re.fullmatch(r"it waits for LoRA until .*\d, but no card has room; then it may use QLoRA", sentence)
    assert told(job, card("b:0", 48), ran=[running(1, "b:0", 48, 600)]) == ("memory", "b:0 when job 1 ends")


def test_a_card_for_qlora_alone_is_nothing_before_the_patience_is_over() -> None:
    when, then = fits(waits(lora=40, qlora=8, lora_until=in_seconds(3600)), card())["box:0"]
    assert when not in ("now", "never", "?")
    assert then == "too small for LoRA, for which the job waits until then"


# --- card by card ---


def fits(job: Job, *nodes: Any, **others: Any) -> dict[str, tuple[str, str]]:
    others["waiting"] = [*others.get("waiting", ()), job]
    return {fit.node: (fit.when, fit.then) for fit in card_fits(job, fleet(nodes, **others))}


def test_each_card_says_what_it_is_for_the_job() -> None:
    nodes = [
        card("a:0"), card("b:0", 2), card("c:0", labels={}), card("d:0", draining=True),
        card("e:0", seen_at=TWO_HOURS_AGO), card("f:0"), card("g:0"), card("h:0", outside_bytes=22, outside=[NOTEBOOK]),
        card("i:0"), card("j:0", 2),
    ]  # fmt: skip
    for one in nodes:
        if one.node != "c:0":
            one.labels = {"nvlink": "yes"}
    found = fits(
        waits(labels={"nvlink": "yes"}),
        *nodes,
        ran=[running(1, "f:0", 24, 600), running(2, "g:0", 24)],
        drains=[drained("i"), drained("j")],
    )
    when = found["f:0"][0]
    assert found == {
        "a:0": ("now", "about to take it"),
        "b:0": ("never", "smaller than the job"),
        "c:0": ("never", "lacks the label nvlink=yes"),
        "d:0": ("?", "closed: its worker is being stopped"),
        "e:0": ("?", "was last seen 2 h 00 min ago"),
        "f:0": (when, "fits when job 1 ends"),
        "g:0": ("?", "fits when job 2 ends"),
        "h:0": ("?", "has 2.0 GiB left: vllm of tomas (pid 4711) holds 22.0 GiB"),
        "i:0": ("?", "drained by lena: replacing a fan"),
        "j:0": ("never", "smaller than the job"),
    }
    assert when not in ("now", "never", "?")


def test_a_card_with_room_says_who_goes_first_there() -> None:
    mine = waits(7)
    assert fits(mine, card(), waiting=[waits(6)])["box:0"] == ("now", "goes to job 6 first")
    first = waits(5, lora=40, qlora=40, submitted_at=in_seconds(-RESERVE_AFTER_S))
    big = card(total=48, max_jobs=4)
    found = fits(waits(9, lora=20, qlora=20), big, ran=[running(1, "box:0", 20, 600)], waiting=[first])
    assert found["box:0"] == ("now", "kept for job 5, which goes first")


def test_a_card_that_two_jobs_get_at_once_is_about_to_take_each() -> None:
    """It said to the second one that the first goes first."""
    jobs = [waits(1, lora=8), waits(2, lora=8)]
    view = fleet([card(total=48, max_jobs=2)], waiting=jobs)
    assert [fit.then for job in jobs for fit in card_fits(job, view)] == ["about to take it"] * 2


def test_qlora_that_fits_now_beats_lora_that_fits_later() -> None:
    node = card(total=24, max_jobs=2)
    assert fits(waits(lora=20, qlora=8), node, ran=[running(1, "box:0", 12, 600)])["box:0"][0] == "now"


def test_a_processor_leaves_to_gpus_what_they_can_hold() -> None:
    nodes = card("cpu:0", 64, kind="cpu"), card("gpu:0", 24)
    assert fits(waits(lora=40, qlora=30), *nodes) == {
        "cpu:0": ("now", "about to take it"),
        "gpu:0": ("never", "smaller than the job"),
    }
    ran = [running(1, "gpu:0", 24, 600)]
    assert fits(waits(), *nodes, ran=ran)["cpu:0"] == (
        "never",
        "a processor, which takes only jobs that no GPU of the fleet can hold",
    )


# --- expected starts ---


def starts(view: FleetView, *wanted: int) -> Mapping[int, ExpectedStart]:
    return outlook(view, wanted, lambda job: None).starts


def test_jobs_start_when_those_before_them_end_as_measured() -> None:
    ran = [
        running(1, "a:0", 20, 600, eta_spread_seconds=60.0),
        running(2, "b:0", 20, 900, eta_spread_seconds=600.0),
    ]
    waiting = [waits(7, lora=24, qlora=24), waits(8, lora=24, qlora=24), waits(9, lora=24, qlora=24)]
    view = fleet([card("a:0"), card("b:0")], ran, waiting)
    assert starts(view, 7, 8, 9) == {
        7: ExpectedStart(at=in_seconds(600), spread_s=60.0, nodes=("a:0",), measured=(1,)),
        8: ExpectedStart(at=in_seconds(900), spread_s=600.0, nodes=("b:0",), measured=(2,)),
    }, "when 7 and 8 end nobody knows, so 9 has no time"


def test_a_job_behind_an_end_that_nobody_knows_gets_no_time() -> None:
    waiting = [waits(7, lora=24, qlora=24)]
    view = fleet([card()], [running(1, "box:0", 20)], waiting)
    assert starts(view, 7) == {}


def test_the_spread_is_that_of_the_end_on_which_the_start_rests() -> None:
    ran = [running(1, "a:0", 20, 600, eta_spread_seconds=500.0), running(2, "b:0", 20, 700, eta_spread_seconds=10.0)]
    waiting = [waits(7, lora=24, qlora=24)]
    view = fleet([card("a:0"), card("b:0")], ran, waiting)
    assert starts(view, 7) == {7: ExpectedStart(at=in_seconds(600), spread_s=500.0, nodes=("a:0",), measured=(1,))}


def test_predicted_lengths_carry_an_expected_start_on_and_are_named() -> None:
    """Behind a waiting job nobody had an expected start."""
    waiting = [
        waits(7, lora=24, qlora=24, work_left_s=1200.0),
        waits(8, lora=24, qlora=24),
        waits(9, lora=24, qlora=24),
    ]
    view = fleet([card("a:0")], [running(1, "a:0", 20, 600, eta_spread_seconds=60.0)], waiting)
    found = outlook(view, (7, 8, 9), lambda job: None)
    assert found.starts == {
        7: ExpectedStart(at=in_seconds(600), spread_s=60.0, nodes=("a:0",), measured=(1,)),
        8: ExpectedStart(at=in_seconds(1800), spread_s=60.0, nodes=("a:0",), measured=(1,), predicted=(7,)),
    }
    assert (
        why_unknown(waiting[2], view, ready(waiting), found)
        == "jobs 7 and 8 start before it, and nobody knows for how long"
    )


def test_jobs_that_will_share_a_card_are_expected_to_slow_each_other() -> None:
    """A start behind two of them was expected as if each had the card alone."""
    waiting = [waits(number, lora=10, qlora=10, work_left_s=1200.0) for number in (7, 8)]
    view = fleet([card("a:0", max_jobs=2)], [running(1, "a:0", 20, 600)], [*waiting, waits(9, lora=24, qlora=24)])
    for contention, ends in ((None, 2400), (0.0, 1800), (0.25, 2100)):
        shared = replace(view.cards["a:0"], contention=contention)
        found = starts(replace(view, cards={"a:0": shared}), 7, 8, 9)
        assert {number: one.at for number, one in found.items()} == {
            7: in_seconds(600), 8: in_seconds(600), 9: in_seconds(ends),
        }  # fmt: skip


def test_a_replay_that_stops_says_so_and_does_not_guess() -> None:
    waiting = [waits(number, lora=24, qlora=24, work_left_s=60.0) for number in range(10, 13 + MOST_STARTS)]
    view = fleet([card("a:0")], [running(1, "a:0", 20, 600)], waiting)
    last = waiting[-1].job_id
    found = outlook(view, [last], lambda job: None)
    assert len(found.starts) == MOST_STARTS and last not in found.starts
    assert why_unknown(waiting[-1], view, ready(waiting), found) == f"it is not among the next {MOST_STARTS} to start"


def test_only_the_next_of_a_line_is_read_once_the_one_before_has_started() -> None:
    line = [waits(number, lora=24, qlora=24, work_left_s=60.0) for number in range(10, 20)]
    view, read = fleet([card("a:0")], [running(1, "a:0", 20, 600)], line[:1]), list[int]()
    behind = {before.job_id: after for before, after in pairwise(ready(line))}

    def after(job: Waiting) -> Waiting | None:
        read.append(job.job_id)
        return behind.get(job.job_id)

    found = outlook(view, [12], after).starts
    assert [(number, start.at) for number, start in found.items()] == [
        (10, in_seconds(600)), (11, in_seconds(660)), (12, in_seconds(720))
    ]  # fmt: skip
    assert read == [10, 11, 12]


def test_a_job_that_starts_now_starts_now() -> None:
    waiting = [waits(7)]
    assert starts(fleet([card()], (), waiting), 7)[7] == ExpectedStart(at=NOON, spread_s=0.0, nodes=("box:0",))


# --- what is ahead, and what would help ---


def test_who_is_ahead_follows_the_rule_and_leaves_out_whom_no_card_of_mine_could_hold() -> None:
    mine = waits(7, lora=8, qlora=8)
    waiting = [
        waits(3), waits(4, lora=60, qlora=60), waits(8), waits(9, priority=1, user="bob"),
        waits(10, user="cyd"), waits(2, user="eve"), mine,
    ]  # fmt: skip
    view = fleet(
        [card(), card("big:0", 80, labels={"site": "roof"}, draining=True)], [running(1, "box:0", 20)], waiting
    )
    view.charges.update({"ada": 5.0, "cyd": 1.0, "eve": 9.0})
    assert [other.job_id for other in ahead_of(mine, view, ready(waiting))] == [9, 10, 3]


def test_without_any_worker_the_older_ones_are_ahead() -> None:
    mine, waiting = waits(7, lora=8, qlora=8), [waits(3, lora=8, qlora=8), waits(8, lora=8, qlora=8)]
    assert [other.job_id for other in ahead_of(mine, fleet([], (), [*waiting, mine]), ready([*waiting, mine]))] == [3]


def test_a_job_behind_the_beginning_of_the_order_is_told_what_is_sure() -> None:
    mine = waits(999, lora=8, qlora=8)
    before = [waits(number, lora=8, qlora=8) for number in range(10, 10 + LISTED_JOBS + 1)]
    view = fleet([card()], [running(1, "box:0", 20)], [*before, mine])
    assert reason(mine, view, ready(before), {}).sentence.endswith("; job 10 and at least 50 more go first")
    assert reason(mine, view, ready([*before[:3], mine]), {}).sentence.endswith("; job 10 and 2 more go first")


def test_a_program_in_the_way_is_named_only_when_it_alone_is() -> None:
    node = card(outside_bytes=20, outside=[NOTEBOOK])
    job = waits(lora=8, qlora=8)
    assert without_others(job, fleet([node], (), [job])) == ("box:0", "vllm of tomas")
    assert without_others(job, fleet([node], [running(1, "box:0", 4)], [job])) is None, "no slot is free"
    assert without_others(waits(lora=4, qlora=4), fleet([node], (), [job])) is None, "it fits beside it"


@pytest.mark.parametrize(
    ("process", "name"),
    [
        (NOTEBOOK, "vllm of tomas"),
        ({"pid": 5, "user": None, "name": None, "bytes": None}, "pid 5"),
        ({"pid": 5, "user": "eve", "name": None, "bytes": 1}, "pid 5 of eve"),
    ],
)
def test_a_program_is_named_by_what_is_known_of_it(process: dict[str, Any], name: str) -> None:
    assert process_name(process) == name


def test_the_tiers_are_told_in_their_order() -> None:
    assert list(Tier) == [Tier.NEVER, Tier.POLICY, Tier.FLEET, Tier.CAPACITY, Tier.NEXT]
    too_large = waits(lora=99, qlora=99, held=True)
    assert told(too_large, card())[0] == "never"
    assert told(waits(held=True), card(draining=True))[0] == "held"
    assert (
        told(waits(not_before=in_seconds(dt.timedelta(minutes=5).total_seconds())), card(draining=True))[0] == "retry"
    )


# --- time ---


def test_a_card_whose_worker_stops_too_soon_says_when_and_what_the_job_needs() -> None:
    ends = card("a:0", 24, until=in_seconds(1800), window_s=4 * 3600.0)
    text = f"a:0 stops at {clock(in_seconds(1800), NOON)}"
    asked = waits(checkpoint_s=2400.0)
    assert told(asked, ends) == ("time", f"{text}, but the job needs 40 min to store its first checkpoint")
    unknown = f"{text}, but the job's time to a checkpoint is not known, so it starts only with 60 min left"
    assert told(waits(), ends) == ("time", unknown)
    assert told(waits(checkpoint_s=60.0), ends)[0] == "next"
    late = fleet([card("a:0", 24, until=in_seconds(3600), window_s=7200.0)], ran=[running(9, "a:0", 24, 3500)])
    assert explain(waits(checkpoint_s=600.0), late).word == "time", "it has room too late"
    (fit,) = card_fits(asked, fleet([ends], waiting=[asked]))
    assert (fit.when, fit.then) == (
        "never",
        text.removeprefix("a:0 ") + ", but the job needs 40 min to store its first checkpoint",
    )


def test_a_job_that_needs_longer_than_any_worker_stays_is_told_so() -> None:
    short = card("a:0", 24, until=in_seconds(1800), window_s=3600.0)
    said = "needs 2 h 00 min to store its first checkpoint, and no worker stays longer than 60 min"
    assert told(waits(checkpoint_s=7200.0), short) == ("never", said)
    wait = explain(waits(checkpoint_s=7200.0), fleet([short]))
    assert wait.command == "loractl edit 7 --set training.save_steps=25"
    busy = running(3, "b:0", 20, ends_in=600)
    assert told(waits(checkpoint_s=7200.0), short, card("b:0", 24), ran=[busy])[0] == "memory"


def test_an_expected_start_counts_on_a_long_job_that_will_give_way() -> None:
    """Once it has run undisturbed; after the short one it goes on, and the next in line waits for that."""
    row = {name: value for name, value in vars(waits(1, lora=20)).items() if name in ("queue_key", "lora_until")}
    ran = running(1, "a:0", 20, 10 * 3600.0, **row, vram_lora=20 * GIB, vram_qlora=20 * GIB, methods=["lora"])
    waiting = [waits(7, lora=24, qlora=24, work_left_s=120.0)]
    view = fleet([card("a:0")], [ran], waiting)
    assert outlook(view, [7], lambda job: None).starts[7].at == in_seconds(10 * 3600)
    giving_way = GivingWay(jobs={1: Yields()})
    cards = {one.node: one for one in giving_way.on(view.cards.values())}
    view = replace(view, cards=cards, giving_way=giving_way)
    found = outlook(view, [7], lambda job: None, asking=[7])
    assert found.starts[7].at == in_seconds(undisturbed_s(Yields()))
    found = outlook(view, [7], lambda job: None)
    assert found.starts[7].at == in_seconds(10 * 3600), "to one that keeps its own card nobody yields"
    off = replace(view, giving_way=replace(giving_way, is_on=False))
    assert outlook(off, [7], lambda job: None, asking=[7]).starts[7].at == in_seconds(10 * 3600)
