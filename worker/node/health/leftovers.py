"""Processes that attempts leave behind on a device: they are ended, or the card is closed."""

from __future__ import annotations

import logging

from loractl.common.store.records import Claim
from loractl.common.units import gib
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import RANK_VARIABLE, Watch, card_mark, end_leftovers, run_mark, runs_of
from loractl.worker.protocol.idle_trainer import host_name

log = logging.getLogger("loractl.worker")


LEFT_S = 20.0
"""Seconds that a trainer's memory may stay on the card after its end: the driver takes a moment."""


def close_if_left(place: Workplace, watch: Watch, claim: Claim, host: str | None = None) -> None:
    """After an attempt no process and no memory of it remains; else the card is closed, and the reason says why.

    `host`: the mark of the trainer that it has shared; where that has ended, nothing of it remains either.
    """
    job, deadline = str(claim.job_id), place.clock.now() + LEFT_S
    shared = set() if host is None or _lives(place, host) else {host_name(host)}
    names = {job} if host is None else shared  # what it shared was not in its name; a next attempt of it may run by now

    def held_now() -> int:
        used = watch.look().used
        return sum(used.get(name, 0) for name in names)

    while (alive := end_leftovers(run_mark(claim.token))) or held_now():
        if place.clock.now() > deadline:
            held = held_now()
            what = f"process {alive[0]}" if alive else f"{gib(held)} GiB of memory"
            reason = f"job {job} left {what} behind; check the card, then loractl undrain {place.node}"
            log.error("%s is closed: %s", place.node, reason)
            place.store.cards.drain(place.node, "loractl", reason)
            return
        place.clock.sleep(0.5)


def _lives(place: Workplace, host: str) -> bool:
    return place.hosts is not None and place.hosts.knows(host)


def end_all(place: Workplace) -> None:
    """End what an earlier, killed node of this device left running: this node runs nothing yet."""
    for run in runs_of(card_mark(place.settings, place.node)):
        end_leftovers(run)


def end_strays(place: Workplace) -> None:
    """End processes of attempts that no longer run: a trainer may have left some behind, and the node of another card,
    if it stands still, ranks of a job on several."""
    card = card_mark(place.settings, place.node)
    known = _marks_of_no_attempt(place)  # first: one may become an attempt's meanwhile
    marks = (runs_of(card) | runs_of(card, RANK_VARIABLE)) - known  # then: an attempt that starts now has its claim
    if not marks:
        return
    known |= _marks_of_no_attempt(place)  # one may have been made meanwhile
    for run in marks - known - {run_mark(token) for token in place.store.cards.tokens(place.node)}:
        log.warning("what an attempt left behind on %s is ended", place.node)
        end_leftovers(run)


def has_ranks(place: Workplace) -> bool:
    """Whether a job on several cards runs here that the node of another card has started."""
    return bool(runs_of(card_mark(place.settings, place.node), RANK_VARIABLE))


def _marks_of_no_attempt(place: Workplace) -> frozenset[str]:
    """Those of the spare trainer and of hosts."""
    keepers = (place.spares, place.hosts)
    return frozenset(mark for keeper in keepers if keeper is not None for mark in keeper.marks)
