"""Several jobs in one trainer process: each is what it would be alone, and none ends for another's sake."""

from __future__ import annotations

import json
import os
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loractl.common.job.status import Reason
from loractl.worker.base.kept.remains import TrainingRemains
from loractl.worker.engine.passes import apart
from loractl.worker.engine.passes.shared import SharedBase
from loractl.worker.protocol.messages import (
    Ended,
    GoingOn,
    Learned,
    LogLines,
    MemberLeft,
    Note,
    Opened,
    Order,
    Passed,
    Saved,
    Start,
    Stepped,
    Stop,
    Told,
    encode,
)  # fmt: skip
from loractl.worker.recipe import trainer
from loractl.worker.recipe.members import Members, Roster
from loractl.worker.recipe.order_desk import MemberOver, OrderDesk
from loractl.worker.recipe.run import DeviceLimit
from loractl.worker.recipe.trainer import _Host

from .conftest import Recipe

WEIGHTS = Path("result") / "adapter" / "adapter_model.safetensors"
MEASURED = ("metrics", "row_losses", "answers")
LONG = {"per_device_train_batch_size": 4, "max_steps": 6}  # over 32 tokens a micro-batch: the same kernels alone

KEPT_OPEN: list[object] = []  # a trainer whose orders end, ends: here it would be pytest


class Process:
    """A trainer's main thread, in a thread of this process."""

    def __init__(self) -> None:
        read, write = os.pipe()
        self._pipe = os.fdopen(write, "w")
        KEPT_OPEN.append(self._pipe)
        self._desk = OrderDesk(os.fdopen(read))
        self._desk.open()
        self.told: dict[int, list[Told]] = defaultdict(list)
        self.on: list[Callable[[Told], None]] = []
        self.roster = Roster()
        self._server = _Host(self.roster, self._tell)
        self._members = Members(self._server, self._desk, self._tell, self.roster)
        self.stays: bool | None = None
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def send(self, *orders: Order) -> None:
        for order in orders:
            self._pipe.write(encode(order))
        self._pipe.flush()

    def join(self) -> None:
        self._thread.join(timeout=300)
        assert not self._thread.is_alive(), self.told

    def ended(self, job: int) -> Ended:
        (found,) = [message for message in self.told[job] if isinstance(message, Ended)]
        return found

    def of(self, job: int, kind: type[Any]) -> list[Any]:
        return [message for message in self.told[job] if isinstance(message, kind)]

    def when(self, job: int, kind: type[Told], do: Callable[[], None], step: int = 0) -> None:
        """Once the job has told such a message."""
        done: list[bool] = []

        def hear(message: Told) -> None:
            here = message.job_id == job and isinstance(message, kind) and getattr(message, "step", 0) >= step
            if here and not done:
                done.append(True)
                do()

        self.on.append(hear)

    def base(self) -> Any:
        """The model that is cached."""
        assert self._server._base_cache is not None and self._server._base_cache._snapshot is not None
        return self._server._base_cache._snapshot.model

    def remained(self) -> list[str]:
        """Why the process does not stay, as it was told."""
        told = [message for messages in self.told.values() for message in messages]
        faults = [m.fault for m in told if isinstance(m, MemberLeft) and m.fault]
        return faults + [m.text for m in told if isinstance(m, LogLines) and "does not stay" in m.text]

    def _tell(self, message: Told) -> None:
        self.told[message.job_id].append(message)
        for hear in self.on:
            hear(message)

    def _main(self) -> None:
        while True:
            order = self._desk.next()
            if isinstance(order, Start):
                self._members.begin(order)
                self.roster.shared = len(self._members) > 1 or self.roster.shared
            elif isinstance(order, MemberOver):
                stays = self._members.finish(order)
                if not len(self._members):
                    self.stays = stays
                    return


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "result" / "report.json").read_text())
    return report


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_jobs_in_one_process_leave_the_adapters_that_they_leave_alone(
    recipe: Recipe, start: Callable[..., Start], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With evaluations in mid-training, answers and reports in between; one comes late, one is cancelled."""
    monkeypatch.setattr("loractl.worker.recipe.run.SIGN_S", 0.0)
    monkeypatch.setattr(trainer, "LEARNED_S", 0.0)
    first = {"method": method, **LONG, "max_steps": 10, "eval_steps": 3, "lora": {"r": 8, "lora_dropout": 0.1}}
    second = {"method": method, **LONG, "seed": 7, "lora": {"r": 4, "use_dora": method == "lora"}}
    alone = {1: recipe("alone1", **first), 2: recipe("alone2", **second)}
    process = Process()
    process.when(1, Opened, lambda: process.send(start("two", job_id=2, keep=True, joins=True, **second)))
    process.when(2, Stepped, lambda: process.send(start("gone", job_id=3, keep=True, joins=True, **first)), step=1)
    process.when(3, Stepped, lambda: process.send(Stop(job_id=3, save=False)), step=1)
    process.send(start("one", job_id=1, keep=True, **first))
    process.join()
    assert {job: process.ended(job).reason for job in (1, 2, 3)} == {
        1: Reason.OK, 2: Reason.OK, 3: Reason.CANCELLED
    }  # fmt: skip
    for job, folder in ((1, "one"), (2, "two")):
        assert weights(tmp_path / folder) == weights(tmp_path / f"alone{job}")
        losses = [m.metrics for m in process.of(job, Stepped) if m.metrics]
        assert losses == [m.metrics for m in alone[job][1] if isinstance(m, Stepped) and m.metrics]
        found, expected = (read_report(tmp_path / name)["evaluation"] for name in (folder, f"alone{job}"))
        assert [found[key] for key in MEASURED] == [expected[key] for key in MEASURED]
    measured_by = [read_report(tmp_path / name)["evaluation"]["base_measured_by_job"] for name in ("one", "two")]
    assert sorted(measured_by, key=str) in ([1, None], [2, None]), "the base is measured once for both"
    assert process.ended(1).message == alone[1][0].message
    assert process.stays, process.remained()
    assert [left.fault for job in (1, 2, 3) for left in process.of(job, MemberLeft)] == [None, None]
    assert any("step" in lines.text for lines in process.of(2, LogLines))
    passes = [passed for told in list(process.told) for passed in process.of(told, Passed)]
    assert passes and all(passed.tokens > 32 and passed.seconds > 0 for passed in passes)
    assert any(process.of(job, Learned) for job in (1, 2, 3))
    assert all(process.of(job, GoingOn) for job in (1, 2)), "each says by itself that it is at work"
    assert read_report(tmp_path / "one")["training"]["companions"] == [2, 3]
    assert not [note for note in process.of(3, Note) if note.kind == "saved"]


def test_a_job_learns_what_it_learns_alone_while_one_that_it_joined_answers(
    recipe: Recipe, start: Callable[..., Start], tmp_path: Path
) -> None:
    """DoRA casts its factors by torch's autocast, which answers are in, too."""
    first = {**LONG, "dtype": "bfloat16", "max_steps": 3, "evaluation": {"max_new_tokens": 24}}
    lora = {"use_dora": True, "lora_dropout": 0.1}
    joins = {**LONG, "dtype": "bfloat16", "max_steps": 14, "eval_steps": 4, "lora": lora, "evaluation": {"samples": 0}}
    recipe("alone", **joins)
    process = Process()
    process.when(1, Opened, lambda: process.send(start("two", job_id=2, keep=True, joins=True, **joins)))
    process.send(start("one", job_id=1, keep=True, **first))
    process.join()
    assert {job: process.ended(job).reason for job in (1, 2)} == {1: Reason.OK, 2: Reason.OK}
    assert weights(tmp_path / "two") == weights(tmp_path / "alone")


def test_a_job_that_joins_on_a_machine_that_rounds_by_rows_says_so(
    start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack on it gains less."""
    monkeypatch.setattr(apart, "unsteady", lambda shapes: "answers of 512 rows differ")
    process, how = Process(), {**LONG, "dtype": "float32", "evaluation": {"samples": 0}}
    process.when(1, Opened, lambda: process.send(start("two", job_id=2, keep=True, joins=True, **how)))
    process.send(start("one", job_id=1, keep=True, **how))
    process.join()
    said = {job: [note.text for note in process.of(job, Note) if "multiplied" in note.text] for job in (1, 2)}
    assert said == {1: [], 2: ["the rows of each training are multiplied by themselves: answers of 512 rows differ"]}


def test_one_that_diverges_is_drained_or_can_t_share_ends_alone(
    recipe: Recipe, start: Callable[..., Start], tmp_path: Path
) -> None:
    good = {**LONG, "max_steps": 12}
    drained = {**LONG, "seed": 5, "lora": {"r": 4, "lora_dropout": 0.2}}
    recipe("alone", **good)
    recipe("whole", **drained)
    process = Process()
    others = [
        start("poisoned", job_id=2, keep=True, joins=True, lora={"lora_alpha": 1e38}, **LONG),
        start("drained", job_id=3, keep=True, joins=True, **drained),
        start("exact", job_id=4, keep=True, joins=True, exact=True, **LONG),
    ]
    process.when(1, Opened, lambda: process.send(*others))
    process.when(3, Stepped, lambda: process.send(Stop(job_id=3, save=True)), step=2)
    process.send(start("good", job_id=1, keep=True, **good))
    process.join()
    reasons = {job: process.ended(job).reason for job in (1, 2, 3, 4)}
    assert reasons == {1: Reason.OK, 2: Reason.DIVERGED, 3: Reason.DRAINED, 4: Reason.HOST_LOST}
    assert weights(tmp_path / "good") == weights(tmp_path / "alone") and process.stays
    ended, told = recipe("rest", resume="drained", **drained)
    assert ended.reason is Reason.OK and any(m.resumed_from_step for m in told if isinstance(m, Note))
    assert weights(tmp_path / "rest") == weights(tmp_path / "whole")


def test_a_base_that_one_job_changes_counts_for_no_job_of_its_process(
    recipe: Recipe, start: Callable[..., Start], tmp_path: Path
) -> None:
    """One weight, by a hundredth, at the second job's third step: no later checkpoint and no result is told."""
    saving = {**LONG, "max_steps": 8, "save_steps": 2}
    process = Process()

    def change() -> None:
        with torch.no_grad():
            next(iter(process.base().parameters())).view(-1)[7] += 0.01

    process.when(1, Opened, lambda: process.send(start("two", job_id=2, keep=True, joins=True, **saving)))
    process.when(2, Stepped, change, step=3)
    process.send(start("one", job_id=1, keep=True, **{**saving, "max_steps": 40}))
    process.join()
    for job in (1, 2):
        ended = process.ended(job)
        assert ended.reason is Reason.HOST_LOST and "a weight of the base has changed" in ended.message
    told = [message for message in process.told[2] if isinstance(message, (Stepped, Saved))]
    last_saved = max((one.step for one in told if isinstance(one, Saved)), default=0)
    assert last_saved <= 3, "a checkpoint of a good base, or none"
    assert not process.stays and "has changed" in " ".join(process.remained())


def test_a_card_that_fails_under_several_jobs_fails_none_of_them_for_good(
    start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel's error comes to all who compute in the process, whoever began the kernel; it is raised as CUDA words
    it, at every pass from then on."""
    failed, learn = threading.Event(), SharedBase.learn

    def until_it_fails(base: SharedBase, *given: Any, **how: Any) -> Any:
        if failed.is_set():
            raise RuntimeError("CUDA error: device-side assert triggered\nFor debugging consider passing ...")
        return learn(base, *given, **how)

    monkeypatch.setattr(SharedBase, "learn", until_it_fails)
    process = Process()
    process.when(1, Opened, lambda: process.send(start("two", job_id=2, keep=True, joins=True, **LONG)))
    process.when(2, Stepped, failed.set, step=1)
    process.send(start("one", job_id=1, keep=True, **{**LONG, "max_steps": 200}))
    process.join()
    ends = [process.ended(job) for job in (1, 2)]
    said = "it shared its trainer with other jobs: RuntimeError: CUDA error: device-side assert triggered"
    assert [(end.reason, end.message) for end in ends] == [(Reason.HOST_LOST, said)] * 2
    assert not process.stays and any("the card failed" in why for why in process.remained())


def test_what_a_member_leaves_is_found_while_others_go_on(start: Callable[..., Start], tmp_path: Path) -> None:
    order = start("one", keep=True)
    traces = TrainingRemains(order=order)
    tensor = torch.zeros(2**18)
    traces.note([tensor])
    assert "1.0 MiB of its tensors are still there" in str(traces.left())
    del tensor
    assert traces.left() is None
    cycle: list[object] = [(tmp_path / "one" / "mapped").open("w")]
    cycle.append(cycle)  # as an error's traceback makes one
    del cycle
    assert traces.left() is None
    with (tmp_path / "one" / "open").open("w"), (tmp_path / "two").open("w"):
        assert str(traces.left()).startswith(str(tmp_path / "one" / "open"))
    assert traces.left() is None


def test_the_limit_is_the_base_and_what_its_members_may_take(
    start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int | None] = []
    for name in ("hold_to", "limit_to"):
        monkeypatch.setattr(f"loractl.worker.recipe.run.{name}", lambda limit, *_: held.append(limit))
    anchor, one, two = (
        start("a", job_id=n, keep=True, joins=n > 1).model_copy(update={"device": "cuda"}) for n in (1, 2, 3)
    )
    device_limit = DeviceLimit()
    device_limit.grant(anchor, 100, 0)
    device_limit.grant(one, 20, 60)
    device_limit.lower(anchor, 90, 60)
    device_limit.take_back(anchor, 60)
    device_limit.grant(two, 30, 60)
    device_limit.take_back(one, 60)
    device_limit.take_back(two, 60)
    assert held == [100, 120, 110, 60 + 20, 60 + 50, 60 + 30]
