"""The fork server of a node, on real processes: its trainers, and what follows if it dies, hangs or is unfit."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from loractl.common.store.records import Claim
from loractl.common.units import GIB
from loractl.worker.attempt.attempt import begin
from loractl.worker.attempt.order import common_environment
from loractl.worker.attempt.supervisor import supervise
from loractl.worker.attempt.trainer_process import kill
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import CARD_VARIABLE, JOB_VARIABLE, RUN_VARIABLE, end_leftovers, run_mark, runs_of
from loractl.worker.node import fork_server as module
from loractl.worker.node.fork_server import ForkedTrainer, ForkServer
from loractl.worker.protocol.messages import Ended, decode_told, encode

from ..unit.factories import node_state, submission
from ..waiting import until_shown
from .test_out_of_memory import make_order

QUICK = """
import os, subprocess, sys, threading, time
from loractl.common.job.status import Reason
from loractl.worker.protocol.messages import Ended
from loractl.worker.recipe import fork_server
from loractl.worker.recipe.trainer import main

sys.stderr.write("from before\\n\\n")

def run(order, orders, tell):
    sys.stderr.write("from the job\\n")
    if order.user == "dies":
        os.kill(os.getpid(), 11)
    if order.user == "waits":
        time.sleep(600)
    files, child = len(os.listdir("/proc/self/fd")), 0
    if order.user == "starts":
        child = subprocess.Popen(["sleep", "600"], start_new_session=True).pid  # as a tracker's service
    message = f"{os.getpid()} {os.environ['LORACTL_JOB']} {child} {files} {os.getcwd()}"
    return Ended(job_id=order.job_id, reason=Reason.OK, message=message)

if __name__ == "__main__":
    sys.exit(main(run))
"""


@pytest.fixture
def place(quick_place: Callable[[str], Workplace]) -> Workplace:
    """Its trainers do what QUICK says."""
    return quick_place(QUICK)


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loractl.worker")


def until(holds: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def served(place: Workplace, busy: Callable[[], bool] = lambda: False) -> Iterator[ForkServer]:
    server = ForkServer(place, busy)
    server.start()
    try:
        yield server
    finally:
        server.stop()
    assert server.marks == frozenset() and servers(place) == []


def servers(place: Workplace) -> list[int]:
    """The processes of this home that belong to no job."""
    return [pid for pid, seen in processes(place).items() if JOB_VARIABLE not in seen]


def processes(place: Workplace) -> dict[int, dict[str, str]]:
    """The processes of this home, with their environments."""
    found = {}
    for process in psutil.process_iter():
        try:
            seen = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if seen.get(CARD_VARIABLE, "").startswith(str(place.settings.home)):
            found[process.pid] = seen
    return found


def ready(caplog: pytest.LogCaptureFixture) -> list[int]:
    """The servers that were ready so far."""
    texts = (record.getMessage() for record in caplog.records)
    return [int(text.rpartition(" ")[2]) for text in texts if text.startswith("the fork server is ready")]


def environment_of(place: Workplace, job: int = 12, **more: str) -> dict[str, str]:
    """Of an attempt's trainer."""
    return {**common_environment(place), JOB_VARIABLE: str(job), RUN_VARIABLE: run_mark(f"token {job}"), **more}


def fork(server: ForkServer, environment: dict[str, str]) -> ForkedTrainer | str:
    """A trainer, or why there is none."""
    said: list[str] = []
    trainer = server.fork(environment, said.append)
    assert (trainer is None) or not said
    return "".join(said) if trainer is None else trainer


def forked(server: ForkServer, environment: dict[str, str]) -> ForkedTrainer:
    trainer = fork(server, environment)
    assert isinstance(trainer, ForkedTrainer), trainer
    return trainer


@pytest.fixture
def order(tmp_path: Path) -> Callable[..., None]:
    """Gives a trainer its order."""
    start = make_order(tmp_path, tmp_path, tmp_path / "data.jsonl")

    def give(trainer: Any, job: int = 12, user: str = "mara") -> None:
        trainer.stdin.write(encode(start.model_copy(update={"job_id": job, "user": user})))
        trainer.stdin.flush()

    return give


def end(trainer: Any, run: str = "") -> tuple[list[str], str]:
    """Let it end, with all that it has started if its mark is given. Returns its last message's words, and its log."""
    told = trainer.stdout.read()
    kill(trainer)
    if run:
        end_leftovers(run)
    log = trainer.stderr.read()
    trainer.stdout.close()
    trainer.stderr.close()
    message = decode_told(told) if told else None
    return message.message.split() if isinstance(message, Ended) else [], log


def test_a_trainer_by_fork_is_a_trainer_like_any_other(
    place: Workplace, order: Callable[..., None], caplog: Any
) -> None:
    own, another = environment_of(place), environment_of(place, 13)
    with served(place) as server:
        until(lambda: ready(caplog))
        assert servers(place) == ready(caplog) and runs_of(own[CARD_VARIABLE], CARD_VARIABLE) == server.marks
        trainer, fresh = forked(server, own), place.launch(place.settings.trainer, another)
        seen = until_shown(trainer.pid)
        until_shown(fresh.pid)
        assert seen.environ() == own and seen.ppid() == os.getpid() and os.getsid(trainer.pid) == trainer.pid
        assert runs_of(own[CARD_VARIABLE], CARD_VARIABLE) == server.marks | {own[RUN_VARIABLE], another[RUN_VARIABLE]}
        order(trainer, user="starts")
        order(fresh)
        (pid, job, child, files, folder), log = end(trainer, own[RUN_VARIABLE])
        (*_, fresh_files, fresh_folder), _ = end(fresh)
        assert (int(pid), int(job), trainer.returncode) == (trainer.pid, 12, 0)
        assert (files, folder) == (fresh_files, fresh_folder), "it has no more open files than a new process"
        assert not psutil.pid_exists(int(child)), "what it started has ended, too"
        assert log == "from the job\n", "what the server printed is no job's"
        assert servers(place) == ready(caplog), "the server is there for the next"


def test_a_supervised_attempt_trains_in_a_fork_or_its_log_says_why_it_does_not(
    quick_place: Callable[[str], Workplace], tmp_path: Path, caplog: Any
) -> None:
    place = quick_place(QUICK.replace("Reason.OK", "Reason.BAD_DATA"))
    place.store.cards.see(node_state("box:0", kind="cpu", total=24 * GIB))

    def supervised() -> tuple[str, str]:
        """The last message, and the log."""
        place.store.jobs.submit(submission(lora=1, method="lora"))
        claim = place.store.attempts.claim("box:0")
        assert isinstance(claim, Claim)
        attempt = begin(claim, place.settings.work_dir)
        supervise(replace(place, forks=server), attempt)
        return place.store.jobs.get(claim.job_id).message or "", "".join(attempt.unwritten.log.end())

    with served(place) as server:
        until(lambda: ready(caplog))
        message, log = supervised()
        assert f"job 1: the trainer is a fork, process {message.split()[0]}" in caplog.text
        assert "starts the trainer" in log and "from the job" in log and "fork server" not in log
        (tmp_path / "quick.py").touch()
        message, log = supervised()
        assert message.split()[1] == "2" and "from the job" in log and "job 2: the trainer is a fork" not in caplog.text
        assert "quick.py has changed since the imports; a new process is started" in log


@pytest.mark.long
def test_many_trainers_in_a_row_and_beside_each_other_leave_nothing_in_the_server(
    place: Workplace, order: Callable[..., None], caplog: Any
) -> None:
    with served(place) as server:
        until(lambda: ready(caplog))
        process = psutil.Process(ready(caplog)[0])
        sizes, files = [], process.num_fds()
        own_files = psutil.Process().num_fds()
        for turn in range(12):
            environments = [environment_of(place, 4 * turn + number) for number in range(4)]
            trainers = [forked(server, own) for own in environments]
            for trainer, own in zip(trainers, environments, strict=True):
                order(trainer, int(own[JOB_VARIABLE]))
            for trainer, own in zip(trainers, environments, strict=True):
                assert end(trainer)[0][1] == own[JOB_VARIABLE]
            sizes.append(process.memory_full_info().uss)
        assert ready(caplog) == [process.pid] and process.children() == [] and process.num_threads() == 1
        assert process.num_fds() <= files and psutil.Process().num_fds() <= own_files
        assert max(sizes[2:]) < sizes[1] + 2**20, sizes


def test_a_trainer_outlives_the_server_and_its_exit_status_is_known(
    place: Workplace, order: Callable[..., None], caplog: Any
) -> None:
    with served(place) as server:
        until(lambda: ready(caplog))
        trainers = [forked(server, environment_of(place, job)) for job in (1, 2, 3)]
        os.kill(ready(caplog)[0], signal.SIGKILL)
        until(lambda: "it ended (exit status -9)" in caplog.text)
        for trainer, user in zip(trainers, ("dies", "mara", "waits"), strict=True):
            order(trainer, 12, user)
        assert (end(trainers[0])[0], trainers[0].returncode) == ([], -signal.SIGSEGV)
        assert end(trainers[1])[0] and trainers[1].returncode == 0
        assert trainers[2].poll() is None
        kill(trainers[2])
        assert trainers[2].returncode in (9, -signal.SIGKILL), "it ended with its input, or was killed"


def test_a_trainer_that_another_thread_has_ended_is_a_killed_one(place: Workplace, caplog: Any) -> None:
    """As the search for strays does, if it finds out first that a lease is lost."""
    own = environment_of(place)
    with served(place) as server:
        until(lambda: ready(caplog))
        trainer = forked(server, own)
        assert end_leftovers(own[RUN_VARIABLE]) == []
        assert trainer.poll() == -signal.SIGKILL
        kill(trainer)


def test_a_server_that_is_killed_while_it_forks_leaves_no_process(
    place: Workplace, order: Callable[..., None], caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_AGAIN_S", 0.0)
    monkeypatch.setattr(module, "MOST_AGAIN_S", 0.0)
    with served(place) as server:
        for turn in range(6):
            until(lambda turn=turn: len(ready(caplog)) > turn)
            killing = threading.Timer(0.004 * turn, os.kill, (ready(caplog)[-1], signal.SIGKILL))
            killing.start()
            own = environment_of(place, turn)
            if isinstance(trainer := fork(server, own), ForkedTrainer):
                order(trainer)
                assert end(trainer)[0], "it trains on"
            killing.join()
            until(
                lambda own=own: (
                    not any(seen.get(RUN_VARIABLE) == own[RUN_VARIABLE] for seen in processes(place).values())
                )
            )


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_is_replaced_and_the_attempt_starts_fresh(
    place: Workplace, caplog: Any, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    monkeypatch.setattr(module, "FIRST_AGAIN_S", 0.5)
    place = replace(place, settings=replace(place.settings, lease_s=3))
    with served(place) as server:
        until(lambda: ready(caplog))
        first = ready(caplog)[0]
        os.kill(first, sent)
        began, own = time.monotonic(), environment_of(place)
        assert isinstance(fork(server, own), str)
        assert time.monotonic() - began < 3, "it is back within a lease"
        assert processes(place).keys() - {first} == set()
        until(lambda: len(ready(caplog)) == 2)
        assert time.monotonic() - began > 0.5 and not psutil.pid_exists(first)
        assert "the fork server is dropped" in caplog.text
        kill(forked(server, own))


def test_none_is_started_while_a_job_starts_or_the_worker_stops(place: Workplace, caplog: Any) -> None:
    starts = threading.Event()
    starts.set()
    with served(place, starts.is_set) as server:
        assert fork(server, environment_of(place)) == ""
        time.sleep(3 * module.LOOK_S)
        assert servers(place) == []
        starts.clear()
        until(lambda: ready(caplog))
        place.drain.ask("checkpoint")
        kill(forked(server, environment_of(place)))  # a job that runs to its end may still have one
        os.kill(ready(caplog)[0], signal.SIGKILL)
        time.sleep(3 * module.LOOK_S)
        assert servers(place) == []


def test_what_a_trainer_inherits_is_that_of_now(place: Workplace, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_AGAIN_S", 0.0)
    cores = os.sched_getaffinity(0)
    with served(place) as server:
        until(lambda: ready(caplog))
        assert "another environment" in fork(server, environment_of(place, HF_TOKEN="of somebody"))
        assert "another environment" in fork(server, environment_of(place, CUDA_VISIBLE_DEVICES="GPU-2"))
        monkeypatch.setenv("CELERY_LOG_LEVEL", "30")
        monkeypatch.setenv("_MP_FORK_LOGLEVEL_", "30")
        time.sleep(2 * module.LOOK_S)
        assert len(ready(caplog)) == 1, "Celery changes no trainer's environment"
        kill(forked(server, environment_of(place, 2**63 - 1)))  # the longest number of a job has room
        monkeypatch.setenv("HF_TOKEN", "another one")
        until(lambda: len(ready(caplog)) == 2)
        kill(forked(server, environment_of(place)))
        try:
            os.sched_setaffinity(0, {min(cores)})
            said = fork(server, environment_of(place))
        finally:
            os.sched_setaffinity(0, cores)
        assert len(cores) == 1 or "another environment" in said


def test_changed_code_is_not_used(
    place: Workplace, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_AGAIN_S", 0.0)
    packages = tmp_path / "lib" / "site-packages"
    (packages / "torch-2.13.dist-info").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{packages}")
    changes: list[tuple[str, Callable[[], object]]] = [
        ("torch-2.14.dist-info", (packages / "torch-2.14.dist-info").mkdir),
        ("torch-2.13.dist-info", (packages / "torch-2.13.dist-info").rmdir),
        ("quick.py", lambda: (tmp_path / "quick.py").write_text(QUICK + "\n")),
    ]
    with served(place) as server:
        for number, (name, change) in enumerate(changes, 1):
            until(lambda number=number: len(ready(caplog)) == number)
            change()
            assert f"{name} has changed since the imports; a new process is started" in fork(
                server, environment_of(place)
            )
        until(lambda: len(ready(caplog)) == 4)
        kill(forked(server, environment_of(place)))


def begun_by(line: str) -> str:
    """QUICK, with a line more that runs before it serves."""
    return QUICK.replace("sys.stderr.write", f"{line}\nsys.stderr.write", 1)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (
            begun_by("threading.Timer(0, time.sleep, (600,)).start()"),
            "it ended (exit status 1): an import left a thread",
        ),
        (begun_by("fork_server.CARDS = '/proc/'; file = open('/proc/self/maps')"), "CUDA does not survive a fork"),
        ("raise SystemExit('what is --fork-server?')", "it ended (exit status 1): what is --fork-server?"),
    ],
    ids=["a thread", "a device", "another program"],
)
def test_a_process_that_is_unfit_to_fork_is_no_server(
    quick_place: Callable[[str], Workplace], caplog: Any, program: str, why: str
) -> None:
    place = quick_place(program)
    with served(place) as server:
        until(lambda: why in caplog.text)
        assert "another one is started in 10 s" in caplog.text
        assert fork(server, environment_of(place)) == ""


def test_a_thread_that_begins_later_is_found_and_the_attempt_starts_fresh(
    quick_place: Callable[[str], Workplace], caplog: Any
) -> None:
    late = "import signal; signal.signal(signal.SIGUSR2, lambda *_: threading.Timer(0, time.sleep, (600,)).start())"
    place = quick_place(begun_by(late))
    with served(place) as server:
        until(lambda: ready(caplog))
        kill(forked(server, environment_of(place)))
        os.kill(ready(caplog)[0], signal.SIGUSR2)
        until(lambda: psutil.Process(ready(caplog)[0]).num_threads() == 2)
        assert "an import left a thread" in fork(server, environment_of(place))
        until(lambda: "the fork server is dropped: an import left a thread" in caplog.text)


def test_a_box_that_once_has_no_thread_to_give_keeps_no_process_and_has_a_server_later(
    place: Workplace, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_AGAIN_S", 0.1)
    start, refused = threading.Thread.start, threading.Event()

    def start_but_one(thread: threading.Thread) -> None:
        if thread.name == "fork server's output" and not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_but_one)
    with served(place) as server:
        until(lambda: ready(caplog))
        assert refused.is_set() and servers(place) == ready(caplog) and len(server.marks) == 1
