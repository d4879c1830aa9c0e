"""A job on several cards as its supervisor has it: one trainer, whose order names a rank for each card."""

from __future__ import annotations

import datetime as dt
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from loractl.common.job.method import Need, Parallel, SharedNeed, Ways
from loractl.common.job.status import Reason, Stage
from loractl.common.placement.gangs import GangShare
from loractl.common.settings import load_settings
from loractl.common.store.database import connect, make_engine
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Node
from loractl.common.units import GIB
from loractl.worker.attempt.attempt import SupervisedAttempt, begin
from loractl.worker.attempt.order import prepare
from loractl.worker.attempt.stops import wanted_stop
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.trainer_run import _lighter
from loractl.worker.attempt.workplace import Drain, Workplace
from loractl.worker.device.devices import find_devices
from loractl.worker.device.occupancy import RANK_VARIABLE, Watch, card_mark
from loractl.worker.node.slots import Claimer
from loractl.worker.protocol.messages import Ended, Rank
from loractl.worker.recipe import other_ranks
from loractl.worker.recipe.other_ranks import LINK_LOST, OtherRanks

from ..factories import node_state, submission

SHARES = (GangShare(node="box:1", bytes=6 * GIB), GangShare(node="box:0", bytes=6 * GIB))


@pytest.fixture
def place(upgraded_home: Path) -> Workplace:
    """The second of a box's two simulated cards."""
    settings = load_settings(
        {"LORACTL_HOME": str(upgraded_home), "LORACTL_DEVICES": "sim:8GiB,8GiB", "LORACTL_HOST": "box"}
    )
    store = Store(connect(settings))
    store.cards.see(node_state("box:1", kind="sim", total=8 * GIB))
    return Workplace(
        settings=settings, store=store, device=find_devices(settings)[1], node="box:1", drain=Drain(),
        artifacts=StoreClient(settings.artifacts_url),
    )  # fmt: skip


@pytest.fixture
def state(place: Workplace) -> SupervisedAttempt:
    place.store.jobs.submit(submission(base_model="org/a", lora=1, method="lora"))
    claim = place.store.attempts.claim("box:1")
    assert isinstance(claim, Claim)
    state = begin(replace(claim, parallel=Parallel.SHARDED, shares=SHARES), place.settings.work_dir)
    state.folder.mkdir(parents=True)
    return state


def test_an_order_names_a_process_for_each_card(place: Workplace, state: SupervisedAttempt) -> None:
    start = prepare(place, state)
    hidden, card = {"CUDA_VISIBLE_DEVICES": ""}, card_mark(place.settings, "box:0")
    assert start.ranks == [
        Rank(rank=0, node="box:1", gpu="SIM-1", device="cpu", environment=hidden),
        Rank(rank=1, node="box:0", gpu="SIM-0", device="cpu", environment={**hidden, RANK_VARIABLE: card}),
    ]
    assert (start.parallel, start.rank, start.gpu) == (Parallel.SHARDED, 0, "SIM-1")
    assert start.day == place.store.jobs.get(start.job_id).submitted_at.date()
    alone = replace(state, claim=replace(state.claim, shares=SHARES[:1]))
    assert prepare(place, alone).ranks == []


def test_a_drain_of_any_of_its_cards_ends_it_with_a_checkpoint(place: Workplace, state: SupervisedAttempt) -> None:
    assert wanted_stop(place, state) is None
    state.wishes.card_drained = "box:0 is being drained"
    wish = wanted_stop(place, state)
    assert wish is not None and wish.save and (wish.reason, wish.message) == (Reason.DRAINED, "box:0 is being drained")


def test_the_first_claim_waits_for_the_box_s_other_cards_and_leaves_them_their_jobs(place: Workplace) -> None:
    """Whichever card was up first took as many jobs as may share it, and the other one stayed idle. It did so after a
    kill, too, by the row that the other one had left."""
    place.store.cards.see(node_state("box:0", kind="sim", total=8 * GIB, max_jobs=4))
    with Session(make_engine(place.settings.database_url)) as session, session.begin():
        session.execute(update(Node).where(Node.node == "box:0").values(seen_at=dt.datetime(2000, 1, 1, tzinfo=dt.UTC)))
    place.store.cards.see(node_state("box:1", kind="sim", total=8 * GIB, max_jobs=4))
    for _ in range(2):
        place.store.jobs.submit(submission(base_model="org/a", lora=1, method="lora"))
    claimer = Claimer(place, Watch(device=place.device, node_pid=os.getpid()), devices=2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(claimer.claim)
        with pytest.raises(TimeoutError):
            first.result(timeout=0.3)
        place.store.cards.see(node_state("box:0", kind="sim", total=8 * GIB, max_jobs=4))
        assert first.result(timeout=4) is not None, "sooner than without the other one"
    assert claimer.claim() is None
    assert place.store.attempts.claim("box:0") is not None


def test_a_job_says_whose_drain_ends_it_and_not_that_the_worker_stops(
    place: Workplace, state: SupervisedAttempt
) -> None:
    state.wishes.card_drained = "box:1 is drained by mara: new fans"
    place.drain.ordered = True
    wish = wanted_stop(place, state)
    assert wish is not None and (wish.reason, wish.message) == (Reason.DRAINED, state.wishes.card_drained)
    place.drain.ask("checkpoint")
    wish = wanted_stop(place, state)
    assert wish is not None and wish.message == "the worker is being stopped"


def test_a_claim_of_several_cards_is_supervised_whatever_the_queue_does(place: Workplace) -> None:
    """A wake between the claim and its first beat could take the lease's time, or lose the claim."""
    place = replace(place, settings=replace(place.settings, redis_url="redis://queue.example:6379"))  # no password
    for node in ("box:0", "box:1"):
        place.store.cards.see(node_state(node, kind="sim", total=8 * GIB, gangs=True))
    way = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=6 * GIB, qlora=None))
    job = submission(lora=12, qlora=None, method="lora")
    place.store.jobs.submit(replace(job, ways=Ways(alone=False, gangs=(way,))))
    claim = Claimer(place, Watch(device=place.device, node_pid=os.getpid())).claim()
    assert claim is not None and [share.node for share in claim.shares] == ["box:1", "box:0"]
    place.wake_others(["box:0"])


BAD_RANK = """
from loractl.common.job.status import Reason
from loractl.worker.protocol.messages import Ended
from loractl.worker.recipe.trainer import main


def run(order, stop, tell):
    return Ended(job_id=order.job_id, reason=Reason.GPU_ERROR, message="CUDA error: the card has fallen off the bus")


if __name__ == "__main__":
    main(run)
"""


def test_the_end_names_the_card_whose_rank_failed(
    place: Workplace, state: SupervisedAttempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader only sees that its link is broken."""
    (tmp_path / "bad_rank.py").write_text(BAD_RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(other_ranks, "GRACE_S", 60.0)  # the rank has only begun, and imports what trains
    start = prepare(place, state)
    gang = OtherRanks(start, lambda told: None, "bad_rank")
    broken = Ended(job_id=start.job_id, reason=Reason.TRAINER_ERROR, message=LINK_LOST)
    state.heard.ended = gang.settle(broken)
    assert state.verdict() == (Reason.GPU_ERROR, "rank 1 on box:0: CUDA error: the card has fallen off the bus")
    assert state.failed_card == "box:0"


def test_a_trainer_can_blame_only_its_job_s_cards(state: SupervisedAttempt) -> None:
    failed = Ended(job_id=state.claim.job_id, reason=Reason.GPU_ERROR, message="a fault", card="box:1")
    for card, blamed in (("box:1", "box:1"), ("owl:0", None), (None, None)):
        state.heard.ended = failed.model_copy(update={"card": card})
        assert state.failed_card == blamed
    state.heard.ended, state.own.forced = failed, (Reason.DRAINED, "the worker is being stopped")
    assert state.failed_card is None


def test_ranks_that_divide_a_base_restart_with_less_if_the_first_try_was_too_large(
    place: Workplace, state: SupervisedAttempt
) -> None:
    """In one process the trainer tries smaller batches itself: then out of memory before the training is the end."""
    start = prepare(place, state)
    state.unwritten.pending = Progress(stage=Stage.PREPARING)
    state.heard.ended = Ended(job_id=start.job_id, reason=Reason.OUT_OF_MEMORY, message="rank 1 on box:0: no room")
    assert _lighter(state, start.model_copy(update={"parallel": Parallel.DATA})) is None
    lighter = _lighter(state, start)
    assert lighter is not None and lighter.adjustment.micro_batch is not None and lighter.ranks == start.ranks
