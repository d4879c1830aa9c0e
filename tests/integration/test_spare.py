"""The spare trainer of a node, on real processes: taken by an attempt, killed, frozen, of another environment."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from loractl.worker.attempt.log import LogBook
from loractl.worker.attempt.order import common_environment
from loractl.worker.attempt.trainer_process import TrainerProcess
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import CARD_VARIABLE, JOB_VARIABLE, RUN_VARIABLE, end_leftovers, run_mark, runs_of
from loractl.worker.node import spare as module
from loractl.worker.node.spare import Spares
from loractl.worker.protocol.messages import Ended, Note

from .test_out_of_memory import make_order

QUICK = """
import os, subprocess, sys
from loractl.common.job.status import Reason
from loractl.worker.protocol.messages import Ended, Note
from loractl.worker.recipe.trainer import main

sys.stderr.write("from before\\n\\n")

def run(order, stop, tell):
    sys.stderr.write("from the job\\n")
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)  # as a tracker's service
    tell(Note(job_id=order.job_id, kind="child", text=str(child.pid)))
    return Ended(job_id=order.job_id, reason=Reason.OK, message=f"{os.getpid()} {os.environ['LORACTL_JOB']}")

if __name__ == "__main__":
    sys.exit(main(run))
"""


@pytest.fixture
def place(quick_place: Callable[[str], Workplace]) -> Workplace:
    """Its trainers do what QUICK says."""
    return quick_place(QUICK)


@contextmanager
def kept(place: Workplace, busy: Callable[[], bool] = lambda: False) -> Iterator[Spares]:
    spares = Spares(place, busy)
    spares.start()
    try:
        yield spares
    finally:
        spares.stop()
    assert spares.marks == frozenset()


def order_of(place: Workplace, job: int = 12, **more: str) -> dict[str, str]:
    """The environment of an attempt's trainer."""
    return {**common_environment(place), JOB_VARIABLE: str(job), RUN_VARIABLE: run_mark(f"token {job}"), **more}


def until(holds: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def waiting(place: Workplace) -> list[int]:
    """The processes that are spares of this home."""
    found = []
    for process in psutil.process_iter():
        try:
            seen = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if seen.get(CARD_VARIABLE, "").startswith(str(place.settings.home)) and JOB_VARIABLE not in seen:
            found.append(process.pid)
    return found


def ready(caplog: pytest.LogCaptureFixture) -> list[int]:
    """The spares that said they are ready, by number."""
    texts = (record.getMessage() for record in caplog.records)
    return [int(text.rpartition(" ")[2]) for text in texts if text.startswith("a spare trainer is ready")]


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loractl.worker")


def train(place: Workplace, trainer: subprocess.Popen[str], run: str, folder: Path) -> tuple[list[object], str]:
    """What the trainer told, and its log."""
    order = make_order(folder, folder, folder / "data.jsonl").model_copy(update={"job_id": 12})
    told: list[object] = []
    with (folder / "log.txt").open("w") as log:
        process = TrainerProcess(trainer, 12, run, log, LogBook())
        process.send(order)
        trainer.wait(timeout=30)
        process.end()
        while not process.told.empty():
            told.append(process.told.get())
    return told, (folder / "log.txt").read_text()


def test_an_attempt_takes_the_spare_which_is_found_by_its_mark_and_leaves_nothing_behind(
    place: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = order_of(place)
    with kept(place) as spares:
        until(lambda: ready(caplog))
        assert waiting(place) == ready(caplog) and len(spares.marks) == 1
        assert runs_of(own[CARD_VARIABLE]) == spares.marks, "the round for strays knows it"
        trainer = spares.take(own)
        assert trainer is not None and trainer.pid == ready(caplog)[0]
        assert runs_of(own[CARD_VARIABLE]) == {own[RUN_VARIABLE]} and spares.marks == frozenset()
        seen = psutil.Process(trainer.pid).environ()
        assert seen.items() >= own.items() and seen.keys() == own.keys(), "as that of a trainer that was started cold"
        told, log = train(place, trainer, own[RUN_VARIABLE], tmp_path)
        note, ended = told
        assert isinstance(ended, Ended) and ended.message == f"{trainer.pid} 12"
        assert isinstance(note, Note) and not psutil.pid_exists(int(note.text)), "what it started has ended, too"
        assert log == "from the job\n", "what the spare printed before is no job's"
        assert end_leftovers(own[RUN_VARIABLE]) == []
        until(lambda: len(ready(caplog)) == 2)  # another one is made
    assert waiting(place) == []


def test_none_is_made_while_a_job_starts_or_the_worker_stops(
    place: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    starts = threading.Event()
    starts.set()
    with kept(place, starts.is_set) as spares:
        assert spares.take(order_of(place)) is None
        time.sleep(3 * module.LOOK_S)
        assert waiting(place) == []
        starts.clear()
        until(lambda: ready(caplog))
        place.drain.ask("checkpoint")
        assert spares.take(order_of(place)) is not None, "a job that runs to its end may still take it"
        time.sleep(3 * module.LOOK_S)
        assert waiting(place) == []
        end_leftovers(order_of(place)[RUN_VARIABLE])


def test_a_job_with_another_environment_starts_cold(place: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    with kept(place) as spares:
        until(lambda: ready(caplog))
        assert spares.take(order_of(place, HF_TOKEN="of somebody")) is None
        assert spares.take(order_of(place, CUDA_VISIBLE_DEVICES="GPU-2")) is None
        assert len(waiting(place)) == 1
        assert spares.take(order_of(place, 2**63 - 1)) is not None, "the longest number of a job has room"
        end_leftovers(order_of(place, 2**63 - 1)[RUN_VARIABLE])


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_spare_that_dies_or_hangs_is_replaced_later_and_the_job_starts_cold(
    place: Workplace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    monkeypatch.setattr(module, "FIRST_AGAIN_S", 0.5)
    place = replace(place, settings=replace(place.settings, lease_s=3))
    with kept(place) as spares:
        until(lambda: ready(caplog))
        first = ready(caplog)[0]
        os.kill(first, sent)
        began = time.monotonic()
        assert spares.take(order_of(place)) is None
        assert time.monotonic() - began < 3, "it is back within a lease"
        until(lambda: len(ready(caplog)) == 2)
        assert time.monotonic() - began > 0.5 and not psutil.pid_exists(first)
        assert "the spare trainer is dropped" in caplog.text
        assert len(waiting(place)) == 1


def test_a_box_that_once_has_no_thread_to_give_keeps_no_process_and_has_a_spare_later(
    place: Workplace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_AGAIN_S", 0.1)
    start, refused = threading.Thread.start, threading.Event()

    def start_but_one(thread: threading.Thread) -> None:
        if thread.name == "spare's pipe" and not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_but_one)
    with kept(place) as spares:
        until(lambda: ready(caplog))
        assert refused.is_set() and waiting(place) == ready(caplog) and len(spares.marks) == 1


def test_a_spare_of_an_environment_that_has_changed_is_replaced_and_celery_changes_none(
    place: Workplace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_AGAIN_S", 0.0)
    with kept(place) as spares:
        until(lambda: ready(caplog))
        monkeypatch.setenv("CELERY_LOG_LEVEL", "30")
        monkeypatch.setenv("_MP_FORK_LOGLEVEL_", "30")
        time.sleep(2 * module.LOOK_S)
        assert len(waiting(place)) == len(ready(caplog)) == 1
        monkeypatch.setenv("HF_TOKEN", "another one")
        until(lambda: len(ready(caplog)) == 2)
        assert spares.take(order_of(place)) is not None
        end_leftovers(order_of(place)[RUN_VARIABLE])


def test_a_trainer_that_knows_no_spares_costs_no_job_anything(
    place: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "quick.py").write_text("import sys\nsys.exit('quick: what is --spare?')\n")
    with kept(place) as spares:
        until(lambda: "it ended (exit status 1): quick: what is --spare?" in caplog.text)
        assert "another one is made in 10 s" in caplog.text
        assert spares.take(order_of(place)) is None
