"""Why a card does not take a job: true of every fleet, and built for none that nobody asks about."""

from __future__ import annotations

from hypothesis import given

from loractl.common.placement.cards import could_start
from loractl.common.placement.refusals import Full, Round, Taken

from .scenes import NOW, Scene, many, scenes


def round_of(scene: Scene) -> Round:
    return Round(cards={card.node: card for card in scene.cards}, decisions=scene.decide(), now=NOW)


@many
@given(scenes())
def test_every_card_that_refuses_a_job_says_so_truly(scene: Scene) -> None:
    decided = round_of(scene)
    for job in scene.jobs:
        placed, limited = decided.placed.get(job.job_id), _is_limited(scene, job.user, decided)
        for node, refusal in decided.refusals(job, job).items():
            card = decided.cards[node]
            starts = could_start(job, card, scene.cards)
            if isinstance(refusal, Full):
                assert not starts and could_start(job, card.without(refusal.after), scene.cards)
            else:
                assert starts == (refusal is None or isinstance(refusal, Taken)), refusal
            if isinstance(refusal, Taken):
                others = {one.job_id for one in (*refusal.given, refusal.kept_for) if one is not None}
                assert others - {job.job_id} and set(decided.placed) >= {one.job_id for one in refusal.given}
            if placed is not None and placed.node == node:
                assert refusal is None
            assert refusal is not None or placed is not None or limited, f"{node} takes {job}, which waits"


def _is_limited(scene: Scene, user: str, decided: Round) -> bool:
    """Whether the user's running jobs, with those that start, are as many as may run."""
    limits = [card.user_limit for card in scene.cards if card.open and card.user_limit is not None]
    running = {job.job_id for card in scene.cards for job in card.running if job.user == user}
    running |= {job_id for job_id, placed in decided.placed.items() if placed.job.user == user}
    assert (decided.limit_of(user) is not None) <= bool(limits)
    return bool(limits) and len(running) >= min(limits)
