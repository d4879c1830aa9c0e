"""What a node's monitor wakes its slots for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loractl.common.placement.hosts import base_key
from loractl.common.settings import load_settings
from loractl.common.store.records import Claim, NewHost
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.workplace import Drain, Workplace
from loractl.worker.device.devices import CpuDevice
from loractl.worker.node.monitor import Monitor

from ...databases import SQLITE_ALONE
from ..factories import node_state, submission

pytestmark = SQLITE_ALONE


@pytest.mark.parametrize("opened", [False, True], ids=["a full card", "one whose trainer may be joined"])
def test_a_card_without_a_slot_looks_for_jobs_that_could_join_its_trainer(
    store: Store, tmp_path: Path, opened: bool
) -> None:
    settings = load_settings({"LORACTL_HOME": str(tmp_path)})
    place = Workplace(
        settings=settings, store=store, artifacts=StoreClient(f"file://{tmp_path}"), node="box:0", drain=Drain(),
        device=CpuDevice(total=24 * GIB),
    )  # fmt: skip

    def write(*, draining: bool) -> Any:
        return store.cards.see(node_state("box:0", total=24 * GIB, max_jobs=1))

    row: Any = SimpleNamespace(write=write)
    hosts: Any = SimpleNamespace(trim=lambda card: None)
    monitor, woken = Monitor(place, row, hosts), list[str]()
    slots: Any = SimpleNamespace(wake=lambda: woken.append("woken"), attempts={})
    monitor.report()
    store.jobs.submit(submission(lora=8, method="lora"))
    mine = store.attempts.claim("box:0")
    assert isinstance(mine, Claim)
    key = base_key(mine.spec, mine.method)
    assert key is not None
    if opened:
        assert store.hosts.open(mine, NewHost(host="mark", node="box:0", key=key, bytes=5 * GIB))
    store.jobs.submit(submission(lora=20, method="lora"))
    monitor.report()
    monitor._go_round(slots)
    assert woken == (["woken"] if opened else []), "its own part may fit where its whole need does not"
