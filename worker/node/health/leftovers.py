"""Processes that attempts leave behind on a device: they are killed; if that fails, the card is closed."""

from __future__ import annotations

import logging

from loractl.common.store.records import Claim
from loractl.common.units import gib
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import RANK_VARIABLE, Watch, card_mark, end_leftovers, run_mark, runs_of
from loractl.worker.protocol.idle_trainer import host_name

log = logging.getLogger("loractl.worker")

LEFT_S = 20.0
"""Seconds that a trainer's memory may stay on the card after its end: the driver takes a moment to free it."""


def close_if_left(place: Workplace, watch: Watch, claim: Claim, host: str | None = None) -> None:
    """Check after an attempt that none of its processes and memory remains; else close the card, with the reason.

    `host`: the mark of the trainer that it shared; if that has ended, nothing of it may remain either.
    """
    job, deadline = str(claim.job_id), place.clock.now() + LEFT_S
    shared = set() if host is None or _lives(place, host) else {host_name(host)}
    names = {job} if host is None else shared  # not the job's if it shared: its next attempt may already run here

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
    """End what a killed earlier node of this device left running; this node runs nothing yet."""
    for run in runs_of(card_mark(place.settings, place.node)):
        end_leftovers(run)


def end_strays(place: Workplace) -> None:
    """End processes of attempts that no longer run. A trainer may have left some behind, and so may the node of another
    card, if it hangs: ranks of a job on several cards."""
    card = card_mark(place.settings, place.node)
    known = _marks_of_no_attempt(place)  # first: such a process may be handed to an attempt meanwhile
    marks = (runs_of(card) | runs_of(card, RANK_VARIABLE)) - known  # then: an attempt that starts now has its claim
    if not marks:
        return
    known |= _marks_of_no_attempt(place)  # such a process may have been started meanwhile
    for run in marks - known - {run_mark(token) for token in place.store.cards.tokens(place.node)}:
        log.warning("ending processes that an attempt left behind on %s", place.node)
        end_leftovers(run)


def has_ranks(place: Workplace) -> bool:
    """Whether ranks of a job on several cards run here that the node of another card started."""
    return bool(runs_of(card_mark(place.settings, place.node), RANK_VARIABLE))


def _marks_of_no_attempt(place: Workplace) -> frozenset[str]:
    """The marks of the spare trainer and of hosts."""
    keepers = (place.spares, place.hosts)
    return frozenset(mark for keeper in keepers if keeper is not None for mark in keeper.marks)
