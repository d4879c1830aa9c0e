"""A card that fails its self-test, on a real worker and NVML's real client on a stand-in library.

Cards that are lost: tests/unit/worker/test_cards.py, and test_box.py for one that could not be read at first.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store

from ..conftest import Cli
from ..models import write_job
from ..nvml import FakeCard, StandIn, build, compiler

SMALL = FakeCard(uuid="GPU-aaaa", total=24576)

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
    return {row.node: row.fault for row in store.cards.nodes()}


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.2)


@pytest.mark.long
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
    (row,) = store.cards.nodes()
    assert (row.kind, row.self_test["torch"], row.outside_bytes) == ("nvml", torch.__version__, 0)
    assert store.attempts.of_job(1) == []
    assert "has no CUDA build: install one that has" in " ".join(cli("why", 1).stdout.split())
