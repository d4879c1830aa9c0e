"""What a serving process has reserved of a card is seen by the card's node, until that process ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from loractl.common.errors import LoractlError
from loractl.common.job.method import Method
from loractl.common.memory.config import read_shape
from loractl.common.settings import Settings, load_settings
from loractl.common.store.records import Claim, Left, NodeState
from loractl.common.store.store import Store
from loractl.worker.device.occupancy import Watch, reserve, unused_reservations
from loractl.worker.device.snapshot import Process, Snapshot
from loractl.worker.serving import card
from loractl.worker.serving.card import Footprint, take_card
from loractl.worker.serving.library import Arithmetic

from ...databases import SQLITE_ALONE
from ..factories import node_state, submission

GIB = 2**30

RESERVE = """
import sys, time
from pathlib import Path
from loractl.worker.device.occupancy import reserve
kept = reserve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
print("reserved", flush=True)
time.sleep(60)
"""


@contextmanager
def serving(home: Path, uuid: str, size: int) -> Iterator[subprocess.Popen[str]]:
    """A process that has reserved, as `serve` does."""
    arguments = [sys.executable, "-c", RESERVE, str(home), uuid, str(size)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "reserved\n"
        yield process
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A card of 80 GiB that shows what it is told to."""

    processes: tuple[Process, ...] | None = ()
    held: int = 0
    index: int = 0
    number: str = "0"
    uuid: str = "GPU-a"
    name: str = "a card"
    kind: Literal["nvml"] = "nvml"
    trains_on: Literal["cuda"] = "cuda"
    total: int = 80 * GIB

    def look(self) -> Snapshot:
        return Snapshot(free=self.total - self.held, processes=self.processes)

    def environment(self) -> dict[str, str]:
        return {}


class Changing:
    """A card that shows what it is told to at the moment."""

    now = Shown()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.now, name)


def outside(home: Path, shown: Shown) -> int | None:
    return Watch(device=shown, node_pid=os.getpid(), home=home).look().outside


def test_what_serve_reserved_counts_before_it_is_allocated_and_once(tmp_path: Path) -> None:
    with serving(tmp_path, "GPU-a", 20 * GIB) as process:
        assert outside(tmp_path, Shown()) == 20 * GIB
        half = Shown(processes=(Process(pid=process.pid, bytes=12 * GIB),), held=12 * GIB)
        assert outside(tmp_path, half) == 20 * GIB
        more = Shown(processes=(Process(pid=process.pid, bytes=21 * GIB),), held=21 * GIB)
        assert outside(tmp_path, more) == 21 * GIB, "what it really holds, where that is more"
        assert outside(tmp_path, Shown(processes=None, held=12 * GIB)) == 20 * GIB, "a driver that lists no processes"
        assert unused_reservations(tmp_path, "GPU-b", (), 0) == 0, "another card"
    assert outside(tmp_path, Shown()) == 0, "killed: nothing is left of it"
    assert not list((tmp_path / "cards" / "GPU-a").iterdir())


def test_what_serve_held_is_free_as_soon_as_it_ends(tmp_path: Path) -> None:
    """Other people's memory is kept for a while, in case it comes back. What was reserved is not."""
    shown = Changing()
    watch = Watch(device=shown, node_pid=os.getpid(), home=tmp_path)
    with serving(tmp_path, "GPU-a", 20 * GIB) as process:
        notebook = Process(pid=1, bytes=3 * GIB)
        shown.now = Shown(processes=(Process(pid=process.pid, bytes=18 * GIB), notebook), held=21 * GIB)
        assert watch.look().outside == 23 * GIB
    shown.now = Shown()
    assert watch.look().outside == 3 * GIB, "the notebook's alone"


def test_a_reservation_is_given_back(tmp_path: Path) -> None:
    reserve(tmp_path, "GPU-a", GIB).close()
    assert unused_reservations(tmp_path, "GPU-a", (), 0) == 0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    cards = {"LORACTL_DEVICES": "sim:8GiB,24GiB", "LORACTL_HOST": "heron", "CUDA_VISIBLE_DEVICES": ""}
    return load_settings({"LORACTL_HOME": str(tmp_path / "home"), **cards})


def report(store: Store, index: int, total: int, held: int = 0) -> None:
    store.cards.see(
        NodeState(
            node=f"heron:{index}", host="heron", gpu=f"SIM-{index}", device_name="s", kind="sim", total=total,
            outside_bytes=held, outside=[], used={}, margin=GIB // 2, max_jobs=1, user_limit=None, labels={},
            load=None, temperature=None, draining=False, versions={}, instance="i",
        )
    )  # fmt: skip


SIX = Footprint(base=5 * GIB, adapters=GIB // 4, cache=GIB // 8)


@SQLITE_ALONE
def test_the_freest_card_is_taken_and_reserved(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(card, "_held", [])
    report(store, 0, 8 * GIB)
    report(store, 1, 24 * GIB, held=20 * GIB)
    assert take_card(settings, store, None, SIX) == "cpu"  # simulated cards compute there
    assert [kept.bytes for kept in card._held] == [SIX.least]
    assert unused_reservations(settings.home, "SIM-0", None, 0) == SIX.least
    assert unused_reservations(settings.home, "SIM-1", None, 0) == 0, "the larger one is full"


@SQLITE_ALONE
@pytest.mark.parametrize("own", [["0", "backend:native"], []])
def test_on_a_card_answers_need_no_plan_for_a_length(
    own: list[str], store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a training. Each token of an answer is another length."""
    monkeypatch.setattr(card, "_held", [])
    monkeypatch.setattr(card, "find_devices", lambda *_: [Shown()])
    monkeypatch.setattr("loractl.worker.base.gauge.hold_to", lambda *_: None)  # it asks for a real card
    names = "TORCH_CUDNN_SDPA_DEPRIORITIZED", "PYTORCH_ALLOC_CONF"
    for name, value in zip(names, own or ["", ""], strict=True):
        monkeypatch.setenv(name, value)
        if not own:
            del os.environ[name]
    assert take_card(settings, store, None, SIX) == "cuda"
    assert [os.environ[name] for name in names] == (own or ["1", "expandable_segments:True"])


@SQLITE_ALONE
def test_no_room_is_refused_with_a_sentence(store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_held", [])
    report(store, 0, 8 * GIB, held=3 * GIB)
    with serving(settings.home, "SIM-1", 20 * GIB):
        with pytest.raises(LoractlError) as refused:
            take_card(settings, store, None, SIX)
        assert refused.value.sentence == ("this takes 5.9 GiB, and the freest card (0) has 4.5 free next to its jobs")
        with pytest.raises(LoractlError, match=r"card 1 has 4\.0 free next to its jobs"):
            take_card(settings, store, "1", SIX)
    assert card._held == []


def test_without_a_size_for_the_cache_jobs_keep_a_part(settings: Settings) -> None:
    free = 24 * GIB
    some = Footprint(base=5 * GIB, adapters=GIB, cache=None)
    assert some.least < some.within(free) < free - 6 * GIB
    assert Footprint(base=None, adapters=0, cache=None).within(free) == free


def test_layers_that_are_not_in_nf4_take_16_bit_unless_they_compute_in_fp32(tmp_path: Path) -> None:
    """As the steps of the training took it: by default lean, with `training.exact` as peft's recipe has it."""
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_shape(tmp_path)
    assert shape is not None

    def held(**how: Any) -> int:
        nf4 = Arithmetic(method=Method.QLORA, **how)
        base = Footprint.of((str(tmp_path), None), nf4, adapters=0).base
        assert base is not None
        return base

    assert held(exact=True) - held() == 2 * shape.other_parameters
    assert held(dtype="float32") == held(exact=True)


@SQLITE_ALONE
def test_a_job_waits_for_what_serve_has_reserved_and_starts_when_it_ends(store: Store, tmp_path: Path) -> None:
    """The node's own look at its card, and the claim that follows from it."""
    store.jobs.submit(submission(lora=70, qlora=None, method="lora"))
    state = node_state("box:0", total=80 * GIB, outside_bytes=0, used={}, margin=0, max_jobs=4)
    store.cards.see(state)
    watch = Watch(device=Shown(), node_pid=os.getpid(), home=tmp_path)

    def claim() -> Claim | Left | None:
        seen = watch.look()
        return store.attempts.claim("box:0", seen.outside, seen.used)

    with serving(tmp_path, "GPU-a", 20 * GIB):
        assert claim() is None
    assert isinstance(claim(), Claim)
