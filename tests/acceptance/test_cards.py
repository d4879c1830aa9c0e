"""Cards that fail, on a real worker and NVML's real client on a stand-in library: they are closed, one by one."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loractl.common.job.status import Status
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store

from ..conftest import Cli
from ..models import write_job
from ..nvml import FakeCard, StandIn, build, compiler

SMALL = FakeCard(uuid="GPU-aaaa", total=24576)
LARGE = FakeCard(uuid="GPU-bbbb", total=81920)
LOST = FakeCard(uuid="GPU-aaaa", total=24576, lost=True)

Start = Callable[..., tuple[Cli, Store]]


@pytest.fixture
def library(tmp_path: Path) -> StandIn:
    if compiler() is None:
        pytest.skip("no C compiler for the NVML stand-in")
    return build(tmp_path)


@pytest.fixture
def start(make_cli: Callable[..., Cli], library: StandIn) -> Iterator[Start]:
    """Start a worker on the stand-in's cards."""
    workers: list[subprocess.Popen[str]] = []

    def run(**environment: str) -> tuple[Cli, Store]:
        cli = make_cli(LORACTL_HOST="heron", **library.environment(), **environment)
        cli("db", "upgrade")
        workers.append(cli.start("worker", "--reserve", "0"))
        return cli, Store(connect(load_settings(cli.environment)))

    yield run
    for worker in workers:
        for _ in range(2):
            worker.send_signal(signal.SIGINT)
        print(worker.communicate(timeout=60)[0])


def faults(store: Store) -> dict[str, str | None]:
    return {row.node: row.fault for row in store.nodes()}


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.2)


def test_a_lost_card_is_closed_and_the_other_goes_on(
    start: Start, library: StandIn, tiny_model: Path, tmp_path: Path
) -> None:
    library.show(LOST, LARGE)
    cli, store = start(LORACTL_DEVICES="nvml:cpu")
    until(lambda: len(faults(store)) == 2)
    assert str(faults(store)["heron:0"]).startswith("the driver has lost it") and faults(store)["heron:1"] is None
    assert "closed: the driver has lost it: look for Xid" in " ".join(cli("gpus").stdout.split())
    cli("submit", write_job(tmp_path, tiny_model))
    until(lambda: store.job(1).status is Status.SUCCEEDED, 120)
    assert [attempt.node for attempt in store.attempts(1)] == ["heron:1"]

    library.show(SMALL, LARGE)
    until(lambda: faults(store) == {"heron:0": None, "heron:1": None})
    assert store.fleet().cards["heron:0"].total == SMALL.total * 2**20, "a reset card comes back by itself"

    seen = {row.node: row.versions for row in store.nodes()}
    library.show(SMALL, LARGE, init=18)  # a driver's update, which the running nodes meet at their next look
    library.show(LOST, FakeCard(uuid="GPU-bbbb", total=81920, lost=True), init=18)
    until(lambda: all("different versions" in str(fault) for fault in faults(store).values()))
    assert seen.keys() == faults(store).keys(), "no node ended for it"
    cli("submit", write_job(tmp_path, tiny_model))
    assert "Reason: closed, heron:0: NVIDIA's library" in " ".join(cli("why", 2).stdout.split())


@pytest.mark.cold
def test_a_box_of_gpus_with_a_torch_for_processors_closes_its_cards_and_trains_nothing_on_the_processor(
    start: Start, library: StandIn, tmp_path: Path, tiny_model: Path
) -> None:
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch has a CUDA build")
    library.show(SMALL)
    cli, store = start(LORACTL_DEVICES="auto")
    until(lambda: faults(store).get("heron:0") == "its self-test has not ended yet")
    cli("submit", write_job(tmp_path, tiny_model))
    until(lambda: "no CUDA build" in str(faults(store)["heron:0"]))
    (row,) = store.nodes()
    assert (row.kind, row.self_test["torch"], row.outside_bytes) == ("nvml", torch.__version__, 0)
    assert store.attempts(1) == []
    assert "has no CUDA build: install one that has" in " ".join(cli("why", 1).stdout.split())
