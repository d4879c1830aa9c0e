"""Who may serve a device under a name: the box that did, and no copy of it while it lives."""

from __future__ import annotations

import threading

import pytest

from loractl.common.errors import CardTaken, NameTaken, UsageError, WrongState
from loractl.common.job.status import Reason, Status
from loractl.common.settings import LEASE_S
from loractl.common.store.fleet import NODE_STALE_S
from loractl.common.store.records import BoxIdentity, Claim, NodeState, Progress
from loractl.common.store.store import Store

from ...factories import Clock, node_state, submission

pytestmark = pytest.mark.both

HERON = {"instance": "a home", "machine": "a machine", "boot": "its boot"}

COPIES = {
    "an equal name": {"instance": "another home"},
    "a copied home": {"machine": "another machine", "boot": "of its own"},
    "a home of before on another machine": {"instance": "another home", "machine": None, "boot": None},
}


def heron(**changed: str | None) -> NodeState:
    return node_state("heron:0", **{**HERON, **changed})


def run(store: Store) -> Claim:
    """A job that runs on heron's card."""
    store.cards.arrive(heron())
    store.cards.see(heron())
    store.jobs.submit(submission())
    claim = store.attempts.claim("heron:0")
    assert isinstance(claim, Claim)
    return claim


def test_the_same_boot_of_the_same_box_gives_back_what_it_left_at_once(timed: Store) -> None:
    claim = run(timed)
    assert timed.cards.arrive(heron()).given_back == (claim.job_id,)
    assert timed.attempts.of_job(claim.job_id)[0].reason is Reason.WORKER_LOST


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_a_living_box_is_refused_and_takes_nothing(timed: Store, clock: Clock, copy: str) -> None:
    claim = run(timed)
    clock.forward(NODE_STALE_S)
    with pytest.raises(NameTaken, match="another box is named heron and serves its device 0"):
        timed.cards.arrive(heron(**COPIES[copy]))
    with pytest.raises(NameTaken):
        timed.cards.see(heron(**COPIES[copy]))
    timed.cards.forget("heron:0", BoxIdentity(**{**HERON, **COPIES[copy]}))
    assert [node.node for node in timed.cards.nodes()] == ["heron:0"], "a refused box that ends leaves the other's row"
    assert timed.attempts.beat(claim, Progress()).accepted


def test_after_another_boot_of_the_machine_jobs_go_back_with_their_lease(timed: Store, clock: Clock) -> None:
    claim = run(timed)
    seen = clock.now
    clock.forward(NODE_STALE_S - 1)
    assert timed.attempts.beat(claim, Progress()).accepted, "the machine was copied, and the first one lives"
    again = timed.cards.arrive(heron(boot="the next"))
    assert (again.seen_at, again.given_back) == (seen, ())
    clock.forward(2)
    assert timed.cards.arrive(heron(boot="the next")).seen_at is None, "its row is nobody's now"
    timed.cards.see(heron(boot="the next"))
    assert timed.attempts.reap() == [] and timed.jobs.get(claim.job_id).status is Status.RUNNING
    clock.forward(LEASE_S)
    assert [job_id for job_id, _ in timed.attempts.reap()] == [claim.job_id]


def test_a_box_that_was_silent_for_long_does_not_take_its_name_back(timed: Store, clock: Clock) -> None:
    run(timed)
    clock.forward(NODE_STALE_S + 1)
    successor = heron(instance="another home")
    timed.cards.arrive(successor)
    timed.cards.see(successor)
    with pytest.raises(NameTaken):
        timed.cards.see(heron())


def test_a_row_of_an_older_version_is_taken_over_when_it_is_nobodys(timed: Store, clock: Clock) -> None:
    timed.cards.see(heron(machine=None, boot=None))
    assert timed.cards.arrive(heron()).seen_at == clock.now
    clock.forward(NODE_STALE_S + 1)
    assert timed.cards.arrive(heron()).seen_at is None


def test_of_boxes_that_start_together_with_one_name_one_serves(store: Store) -> None:
    served, refused, start = [], [], threading.Barrier(6)

    def arrive(number: int) -> None:
        start.wait()
        try:
            store.cards.arrive(heron(instance=f"home {number}"))
            served.append(number)
        except NameTaken:
            refused.append(number)

    threads = [threading.Thread(target=arrive, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(served), len(refused)) == (1, 5)
    assert store.cards.nodes()[0].instance == f"home {served[0]}"


def test_of_workers_that_start_together_on_one_card_under_several_names_one_serves(timed: Store, clock: Clock) -> None:
    """Each would promise the whole card, as in two containers of one machine."""
    start, servers = threading.Barrier(6), dict[str, str | None]()

    def arrive(host: str) -> None:
        start.wait()
        servers[host] = timed.cards.arrive(node_state(f"{host}:0", gpu="GPU-1")).server

    hosts = [f"box-{number}" for number in range(6)]
    threads = [threading.Thread(target=arrive, args=(host,)) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (served,) = (host for host, server in servers.items() if server is None)
    assert {server for host, server in servers.items() if host != served} == {f"{served}:0"}
    assert [node.host for node in timed.cards.nodes()] == [served]
    clock.forward(NODE_STALE_S + 1)
    last = next(host for host in hosts if host != served)
    assert timed.cards.arrive(node_state(f"{last}:0", gpu="GPU-1")).server is None, "nobody serves it by now"
    for host in ("heron", "owl"):
        assert timed.cards.arrive(node_state(f"{host}:0", gpu="SIM-0")).server is None, "one number for all of them"


def test_of_workers_that_come_back_to_one_card_under_two_names_one_serves(timed: Store, clock: Clock) -> None:
    """Their rows are of this very boot, as of containers that were killed and that start again together."""
    heron, owl = (node_state(f"{host}:0", **{**HERON, "instance": host}, gpu="GPU-1") for host in ("heron", "owl"))
    for state in (heron, owl):
        timed.cards.see(state)
        clock.forward(NODE_STALE_S + 1)
    assert [timed.cards.arrive(state).server for state in (heron, owl)] == [None, "heron:0"]


def test_a_worker_that_was_frozen_while_another_took_its_card_is_refused_and_gets_no_job(
    timed: Store, clock: Clock
) -> None:
    owl = node_state("owl:0", **{**HERON, "instance": "owl"}, gpu="GPU-1")
    timed.cards.see(heron(gpu="GPU-1"))
    clock.forward(NODE_STALE_S + 1)
    assert timed.cards.arrive(owl).server is None
    timed.cards.see(owl)
    timed.jobs.submit(submission())
    for _ in range(2):
        with pytest.raises(CardTaken, match="owl:0 serves the card of heron:0"):
            timed.cards.see(heron(gpu="GPU-1"))
        assert not isinstance(timed.attempts.claim("heron:0"), Claim)
    assert isinstance(timed.attempts.claim("owl:0"), Claim)
    clock.forward(NODE_STALE_S + 1)
    assert timed.cards.see(heron(gpu="GPU-1")).open, "nobody serves it any more"


def test_a_frozen_worker_whose_row_was_forgotten_meanwhile_does_not_take_its_card_back(
    timed: Store, clock: Clock
) -> None:
    timed.cards.see(heron(gpu="GPU-1"))
    clock.forward(NODE_STALE_S + 1)
    assert timed.cards.arrive(node_state("owl:0", gpu="GPU-1")).server is None
    timed.cards.forget_silent("heron")
    with pytest.raises(CardTaken, match="owl:0 serves the card of heron:0"):
        timed.cards.see(heron(gpu="GPU-1"))


@pytest.mark.parametrize("boot", ["its boot", "the next"])
def test_a_node_that_comes_back_with_another_card_keeps_its_former_card_for_no_one(
    timed: Store, clock: Clock, boot: str
) -> None:
    timed.cards.see(heron(gpu="GPU-1"))
    clock.forward(NODE_STALE_S + 1)
    assert timed.cards.arrive(heron(gpu="GPU-2", boot=boot)).server is None
    assert timed.cards.arrive(node_state("heron:1", gpu="GPU-1")).server is None
    assert timed.cards.arrive(node_state("owl:0", gpu="GPU-2")).server == "heron:0"


def test_a_silent_box_is_forgotten_once_no_job_counts_as_running_there(timed: Store, clock: Clock) -> None:
    claim = run(timed)
    timed.cards.see(node_state("heron:1"))
    timed.cards.see(node_state("owl:0"))
    with pytest.raises(UsageError, match="no worker has reported wren"):
        timed.cards.forget_silent("wren")
    with pytest.raises(WrongState, match="the worker of heron:0 was seen"):
        timed.cards.forget_silent("heron")
    clock.forward(NODE_STALE_S + LEASE_S)
    with pytest.raises(WrongState, match=f"job {claim.job_id} still counts as running on heron:0"):
        timed.cards.forget_silent("heron")
    assert len(timed.cards.nodes()) == 3, "none of its cards"
    timed.attempts.reap()
    assert timed.cards.forget_silent("heron") == ["heron:0", "heron:1"]
    assert timed.cards.forget_silent("owl:0") == ["owl:0"] and timed.cards.nodes() == []
    timed.cards.see(heron())
    assert [node.node for node in timed.cards.nodes()] == ["heron:0"], "it may come back"
