"""The ranks beside a gang's leader: how they start, what becomes of the job when one of them ends."""

from __future__ import annotations

import os
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loractl.common.job.method import Method, Parallel
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.worker.protocol.exit_reason import exit_reason
from loractl.worker.protocol.messages import Ended, Peaks, Rank, Start, Told
from loractl.worker.recipe import other_ranks
from loractl.worker.recipe.other_ranks import LINK_LOST, OtherRanks

Begin = Callable[..., OtherRanks]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """A gang of two, whose second rank runs a few lines of Python once it has its order."""

    def start(body: str, told: list[Told] | None = None) -> OtherRanks:
        (tmp_path / "rank_of_test.py").write_text(
            "import json, os, signal, sys\norder = json.loads(sys.stdin.readline())\n"
            "def end(reason, message='', **more):\n"
            "    print(json.dumps({'type': 'ended', 'job_id': 1, 'reason': reason, 'message': message, **more}))\n"
            + textwrap.dedent(body)
        )
        (tmp_path / "attempt" / "result").mkdir(parents=True)
        return OtherRanks(order(tmp_path), (told if told is not None else []).append, "rank_of_test")

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(other_ranks, "GRACE_S", 5.0)
    return start


def order(folder: Path) -> Start:
    spec = JobSpec.model_validate({"name": "t", "base_model": "m", "dataset": {"path": "x.jsonl"}})
    ranks = [
        Rank(rank=0, node="box:0", gpu="A", device="cpu"),
        Rank(rank=1, node="box:1", gpu="B", device="cpu", environment={"CARD": "one"}, memory_limit=7),
    ]
    return Start(
        job_id=1, attempt=1, user="u", node="box:0", gpu="A", device="cpu", spec=spec, method=Method.LORA,
        vram_planned=None, data_path="x", data_sha256=None, eval_path=None, checkpoint_dir="c", earlier_checkpoints=[],
        output_dir=str(folder / "attempt" / "result"), cache_dir="c", parallel=Parallel.DATA, ranks=ranks,
    )  # fmt: skip


def leader(reason: Reason, message: str = "", **more: object) -> Ended:
    return Ended(job_id=1, reason=reason, message=message, **more)


def test_each_rank_has_its_own_card_limit_and_place(begin: Begin, capfd: pytest.CaptureFixture[str]) -> None:
    gang = begin("""
        names = ("rank", "node", "gpu", "memory_limit")
        print([order[name] for name in names], os.environ["CARD"], file=sys.stderr)
        print(oct(os.stat(os.path.dirname(order["meeting"])).st_mode), file=sys.stderr)
        end("ok", peaks={"reserved": 9})
        """)
    ended = gang.settle(leader(Reason.OK, peaks=Peaks(reserved=5)))
    assert ended.reason is Reason.OK and ended.peaks is not None and ended.peaks.reserved == 9, "the fullest card's"
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["[rank 1] [1, 'box:1', 'B', 7] one", "[rank 1] 0o40700"]
    assert gang.order.meeting is not None and not Path(gang.order.meeting).parent.exists()


@pytest.mark.parametrize(
    "body, reason, message",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", Reason.KILLED, "rank 1 on box:1: the trainer was killed"),
        ("end('out_of_memory', 'no room for 9 MiB more')", Reason.OUT_OF_MEMORY, "rank 1 on box:1: no room for 9 MiB"),
        ("sys.exit(3)", Reason.TRAINER_ERROR, "rank 1 on box:1: the trainer ended without a result (exit status 3)"),
        (f"end('trainer_error', {LINK_LOST!r})", Reason.TRAINER_ERROR, "the leader's own"),
    ],
)
def test_the_rank_that_failed_first_says_why_the_job_did(
    begin: Begin, body: str, reason: Reason, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if LINK_LOST in body:
        monkeypatch.setattr(other_ranks, "GRACE_S", 0.5)
    ended = begin(body).settle(leader(Reason.TRAINER_ERROR, "the leader's own"))
    assert ended.reason is reason and ended.message.startswith(message)


def test_a_reason_of_the_leader_s_own_stays(begin: Begin) -> None:
    assert begin("sys.exit(3)").settle(leader(Reason.DIVERGED)).reason is Reason.DIVERGED


def test_a_leader_that_waits_for_a_dead_rank_ends_with_its_reason(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel between cards may wait for ever: nothing comes of the leader's own thread."""
    monkeypatch.setattr(other_ranks, "GRACE_S", 0.1)
    told: list[Told] = []
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    gang = begin("os.kill(os.getpid(), signal.SIGKILL)", told)
    deadline = time.monotonic() + 20
    while not statuses and time.monotonic() < deadline:
        gang._settled.wait(0.02)
    (ended,) = told
    assert statuses == [1] and isinstance(ended, Ended) and ended.reason is Reason.KILLED


@pytest.mark.parametrize(
    ("kills", "reason", "says"),
    [
        (0, Reason.KILLED, "by a person or a program: the kernel counted no kill for memory"),
        (1, Reason.HOST_OUT_OF_MEMORY, "out-of-memory killer"),
        (None, Reason.HOST_OUT_OF_MEMORY, "out-of-memory killer, whose kills can't be read here"),
    ],
)
def test_a_kill_is_the_kernel_s_if_it_counted_one_or_reports_no_count(
    kills: int | None, reason: Reason, says: str
) -> None:
    told = exit_reason(-signal.SIGKILL, kernel_kills=kills)
    assert told["reason"] is reason and told["message"].endswith(says)
