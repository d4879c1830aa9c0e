"""Which cards a box has, and what is wrong with them: through the real nvidia-ml-py on a stand-in library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ...nvml import MIB, FakeCard, StandIn, build, compiler

GIB = 2**30

LOOK = """
import json, sys
from loractl.common.settings import load_settings
from loractl.worker.device.devices import find_device, find_devices, order_of_numbers
settings, only = load_settings(), sys.argv[1] or None
devices = [find_device(settings, only[1:])] if only and only[0] == "=" else find_devices(settings, only)
for _ in sys.stdin:
    print(json.dumps([{
        "number": device.number, "uuid": device.uuid, "name": device.name, "total": device.total, "free": seen.free,
        "kind": device.kind, "fault": seen.fault, "load": seen.load, "temperature": seen.temperature,
        "sees": device.environment(), "order": order_of_numbers(),
        "processes": None if seen.processes is None else [[p.pid, p.bytes] for p in seen.processes],
    } for device in devices for seen in [device.look()]]), flush=True)
"""

Look = Callable[[], list[dict]]

SMALL = FakeCard(
    uuid="GPU-aaaa", total=24576, held=300, load=55, temperature=61, name="NVIDIA A10", processes=((7, 1000),)
)
LARGE = FakeCard(
    uuid="GPU-bbbb", total=81920, name="NVIDIA A100 80GB", processes=((8, None), (9, 4096), (10, 1))
)  # fmt: skip
CARDS = (SMALL, LARGE)


def but(card: FakeCard, **changes: object) -> FakeCard:
    return FakeCard(**{**vars(card), **changes})


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    if compiler() is None:
        pytest.skip("no C compiler for the NVML stand-in")
    return build(tmp_path_factory.mktemp("nvml"))


def start(library: StandIn, only: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "CUDA_"))}
    return subprocess.Popen(
        [sys.executable, "-c", LOOK, only],
        env={**kept, **library.environment(), "LORACTL_HOME": str(library.folder), **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@contextmanager
def looking(library: StandIn, only: str = "", **environment: str) -> Iterator[Look]:
    """A process that looks at the cards, again and again."""
    process = start(library, only, environment)
    assert process.stdin and process.stdout

    def once() -> list[dict]:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, process.stderr.read()
        return list(json.loads(line))

    try:
        yield once
    finally:
        process.kill()
        process.wait()


def look(library: StandIn, only: str = "", **environment: str) -> list[dict]:
    with looking(library, only, **environment) as once:
        return once()


def refusal(library: StandIn, only: str = "", **environment: str) -> str:
    """The error of a box that has no such cards."""
    _, said = start(library, only, environment).communicate("\n", timeout=60)
    return said


def test_cards_are_seen_through_nvml_with_their_processes(library: StandIn) -> None:
    library.show(*CARDS)
    small, large = look(library)
    assert small == {
        "number": "0", "uuid": "GPU-aaaa", "name": "NVIDIA A10", "total": 24 * GIB, "free": (24576 - 1300) * MIB,
        "kind": "nvml", "load": 55, "temperature": 61, "sees": {"CUDA_VISIBLE_DEVICES": "GPU-aaaa"},
        "processes": [[7, 1000 * MIB]], "fault": None, "order": None,
    }  # fmt: skip
    assert large["processes"] == [[8, None], [9, 4096 * MIB], [10, MIB]], "the driver does not tell of 8"
    assert large["free"] == (81920 - 4097) * MIB
    library.show(SMALL)
    assert [card["uuid"] for card in look(library)] == ["GPU-aaaa"], "the file is read at every call"


def test_an_older_driver_lists_no_processes_and_ends_no_node(tmp_path: Path) -> None:
    if compiler() is None:
        pytest.skip("no C compiler for the NVML stand-in")
    library = build(tmp_path, old=True)
    library.show(SMALL)
    (card,) = look(library)
    assert (card["processes"], card["fault"], card["load"]) == (None, None, 55)


def test_a_box_serves_the_cards_that_its_owner_or_its_scheduler_names(library: StandIn) -> None:
    library.show(*CARDS)
    for only in ("1", "GPU-b"):
        assert [card["uuid"] for card in look(library, only)] == ["GPU-bbbb"]
    assert [card["number"] for card in look(library, "1,0")] == ["1", "0"]
    assert [card["number"] for card in look(library, CUDA_VISIBLE_DEVICES="GPU-bbbb")] == ["1"], "its number stays"
    assert "no card of this box" in refusal(library, "2")
    assert "not one card" in refusal(library, "GPU")
    assert "no card of this box" in refusal(library, "0", CUDA_VISIBLE_DEVICES="1"), "what is hidden can't be asked for"


def test_cards_by_number_are_taken_in_pci_order_which_is_said_or_refused(library: StandIn) -> None:
    library.show(*CARDS)
    (card,) = look(library, CUDA_VISIBLE_DEVICES="1")
    assert card["uuid"] == "GPU-bbbb"
    assert card["order"] == "CUDA_VISIBLE_DEVICES=1 is read as nvidia-smi counts, in PCI order; UUIDs are safer."
    refused = refusal(library, CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="FASTEST_FIRST")
    assert "counts the fastest card first" in refused
    assert [c["uuid"] for c in look(library, CUDA_VISIBLE_DEVICES="GPU-aaaa", CUDA_DEVICE_ORDER="FASTEST_FIRST")]


def test_a_box_of_gpus_without_its_cards_does_not_serve_the_processor(library: StandIn) -> None:
    library.show(*CARDS)
    for hidden in ("7", "GPU-cccc", "0,7"):
        assert "CUDA_VISIBLE_DEVICES: " in refusal(library, CUDA_VISIBLE_DEVICES=hidden)
    assert [card["kind"] for card in look(library, CUDA_VISIBLE_DEVICES="")] == ["cpu"], "who hides all says so"
    assert "shows no NVIDIA card" in refusal(library, CUDA_VISIBLE_DEVICES="-1", LORACTL_DEVICES="nvml")


def test_a_simulated_card_trains_on_the_processor(library: StandIn) -> None:
    library.show(*CARDS)
    card = look(library, "0", LORACTL_DEVICES="nvml:cpu")[0]
    assert (card["kind"], card["sees"]) == ("sim", {"CUDA_VISIBLE_DEVICES": ""})


def test_without_a_driver_there_is_no_card(library: StandIn) -> None:
    library.file.unlink(missing_ok=True)
    assert [card["kind"] for card in look(library)] == ["cpu"]
    assert "NVML finds no NVIDIA card" in refusal(library, LORACTL_DEVICES="nvml")


def test_a_driver_that_does_not_answer_closes_the_cards_and_the_box_does_not_serve_its_processor(
    library: StandIn,
) -> None:
    library.show(*CARDS, init=18)
    (card,) = look(library)
    assert (card["kind"], card["total"]) == ("nvml", 0)
    assert card["fault"] == "NVIDIA's library and kernel driver have different versions: reboot the box"
    library.show(*CARDS, init=999)
    assert "NVML says: Unknown Error; look at nvidia-smi" in look(library)[0]["fault"]


def test_a_driver_that_is_updated_under_a_worker_closes_its_cards_until_it_answers_again(library: StandIn) -> None:
    library.show(*CARDS)
    with looking(library, "1") as once:
        assert once()[0]["fault"] is None
        library.show(*(but(card, lost=True) for card in CARDS), init=18)
        assert "different versions" in once()[0]["fault"]
        library.show(*CARDS)
        assert (once()[0]["fault"], once()[0]["free"]) == (None, (81920 - 4097) * MIB)


def test_a_lost_card_is_closed_and_the_others_are_served(library: StandIn) -> None:
    """Beside a lost card NVML answers for none by UUID: nvml.h warns of it."""
    library.show(but(SMALL, lost=True), LARGE)
    lost, well = look(library)
    assert (lost["number"], lost["total"], well["fault"]) == ("0", 0, None)
    assert lost["fault"] == "the driver has lost it: look for Xid in dmesg, then reset it or reboot the box"
    assert (well["uuid"], well["free"]) == ("GPU-bbbb", (81920 - 4097) * MIB)
    assert [c["uuid"] for c in look(library, CUDA_VISIBLE_DEVICES="GPU-aaaa")] == ["unread-0"], "it may be that one"
    library.show(*CARDS)
    with looking(library) as once:
        assert [card["fault"] for card in once()] == [None, None]
        library.show(but(SMALL, lost=True), LARGE)
        assert [bool(card["fault"]) for card in once()] == [True, False]
        library.show(*CARDS)
        assert [card["fault"] for card in once()] == [None, None], "after a reset it is as before"


def test_a_node_whose_card_is_gone_does_not_serve_the_processor(library: StandIn) -> None:
    library.show(SMALL)
    for number in ("1", "0.2"):
        (card,) = look(library, f"={number}", LORACTL_DEVICES="nvml")
        assert (card["number"], card["kind"]) == (number, "nvml")
        assert "no longer shows it" in card["fault"]
    (card,) = look(library, "=0", LORACTL_DEVICES="nvml", CUDA_VISIBLE_DEVICES="GPU-bbbb")
    assert card["uuid"] == "GPU-aaaa", "its worker has chosen the cards; what is hidden since then ends no node"


def test_a_card_in_an_exclusive_compute_mode_is_closed_to_jobs(library: StandIn) -> None:
    library.show(but(SMALL, mode=3), but(LARGE, mode=2))
    exclusive, prohibited = look(library)
    how = "jobs share cards: nvidia-smi -i GPU-aaaa -c DEFAULT"
    assert exclusive["fault"] == f"its compute mode is EXCLUSIVE_PROCESS, {how}"
    assert "PROHIBITED" in prohibited["fault"]


def test_mig_slices_are_cards_of_their_own(library: StandIn) -> None:
    first = FakeCard(uuid="MIG-1111", total=20096, held=12, name="NVIDIA A100 80GB MIG 2g.20gb", processes=((9, 4096),))
    second = FakeCard(uuid="MIG-2222", total=9856, name="NVIDIA A100 80GB MIG 1g.10gb")
    library.show(SMALL, but(LARGE, temperature=52, slices=(first, second)))
    whole, one, two = look(library)
    assert (whole["number"], one["number"], two["number"]) == ("0", "1.0", "1.1")
    assert (one["total"], one["free"]) == (20096 * MIB, (20096 - 12 - 4096) * MIB)
    assert one["sees"] == {"CUDA_VISIBLE_DEVICES": "MIG-1111"}
    assert (one["load"], one["temperature"], one["processes"]) == (None, 52, [[9, 4096 * MIB]])
    assert [card["number"] for card in look(library, "1")] == ["1.0", "1.1"], "a card's number means all its slices"
    assert [card["uuid"] for card in look(library, "1.1")] == ["MIG-2222"]
    assert [card["uuid"] for card in look(library, CUDA_VISIBLE_DEVICES="MIG-2222")] == ["MIG-2222"]
    library.show(but(LARGE, slices=()))
    assert "it is in MIG mode and has no slices" in look(library)[0]["fault"]


def test_a_card_whose_driver_lists_no_processes_tells_what_is_free(library: StandIn) -> None:
    library.show(but(SMALL, processes=None, held=5000))
    (card,) = look(library)
    assert (card["processes"], card["free"], card["fault"]) == (None, (24576 - 5000) * MIB, None)
