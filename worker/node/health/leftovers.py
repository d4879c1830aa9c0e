"""Processes that attempts leave behind on a device: they are killed; if that fails, the card is closed."""

from __future__ import annotations

import logging

from loractl.common.store.records import Claim
from loractl.worker.attempt.trainer_run import LEFT_S, left_of
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import CARD_VARIABLE, RANK_VARIABLE, card_mark, end_leftovers, run_mark, runs_of

log = logging.getLogger("loractl.worker")


def close_if_left(place: Workplace, claim: Claim) -> None:
    """Check after an attempt that none of its processes and memory remains; else close the card, with the reason."""
    deadline = place.clock.now() + LEFT_S
    while (left := left_of(place, claim)) is not None:
        if place.clock.now() > deadline:
            reason = f"job {claim.job_id} left {left} behind; check the card, then loractl undrain {place.node}"
            log.error("%s is closed: %s", place.node, reason)
            place.store.cards.drain(place.node, "loractl", reason)
            return
        place.clock.sleep(0.5)


def end_all(place: Workplace) -> None:
    """End what a killed earlier node of this device left running; this node runs nothing yet."""
    for run in runs_of(card_mark(place.settings, place.node), CARD_VARIABLE):
        end_leftovers(run)


def end_strays(place: Workplace) -> None:
    """End processes of attempts that no longer run. A trainer may have left some behind, and so may the node of another
    card, if it hangs: ranks of a job on several cards."""
    marks = runs_of(card_mark(place.settings, place.node), CARD_VARIABLE, RANK_VARIABLE)
    if not marks:
        return
    own = frozenset() if place.forks is None else place.forks.marks
    for run in marks - own - {run_mark(token) for token in place.store.cards.tokens(place.node)}:
        log.warning("ending processes that an attempt left behind on %s", place.node)
        end_leftovers(run)


def has_ranks(place: Workplace) -> bool:
    """Whether ranks of a job on several cards run here that the node of another card started."""
    return bool(runs_of(card_mark(place.settings, place.node), RANK_VARIABLE))
