"""Several cards for one job, as processes on the processor: their losses and adapters are those of one card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loractl.common.job.method import Method, Parallel
from loractl.worker.base.adapter import WEIGHTS
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.model import load_base
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.ranks.part import rows_of
from loractl.worker.protocol.messages import Note, Start, Stepped, Told
from loractl.worker.recipe.run import Run

from ..gangs import Trained, train_on
from ..models import write_helpdesk
from .test_out_of_memory import make_order
from .test_preferences import pairs

NONE, DATA, SHARDED = Parallel.NONE, Parallel.DATA, Parallel.SHARDED
UNEVEN: dict[str, Any] = {
    "max_steps": 5, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "eval_steps": 2,
    "save_steps": 3, "dtype": "float32", "learning_rate": 5e-3,
}  # fmt: skip
"""21 rows in windows of 6: the last one has 3, of which a rank has none in its second micro-batch."""


class Case:
    """One training, on one rank or on several, for which it leaves a folder each."""

    def __init__(
        self, model: Path, folder: Path, *, method: str = "lora", job: dict[str, Any] | None = None, **training: Any
    ) -> None:
        self._model, self._folder, self._method, self._job, self._training = model, folder, method, job, training
        data = folder / "data.jsonl"
        self._data = pairs(data, 23) if job and job.get("task_type") == "preference" else write_helpdesk(data, 23)

    def order(self, name: str, resume: str | None = None, samples: int = 0) -> Start:
        earlier = self._folder / resume if resume else None
        order = make_order(
            self._folder / name, self._model, self._data, method=self._method, resume=earlier, job=self._job,
            **self._training,
        )  # fmt: skip
        quiet = order.spec.evaluation.model_copy(update={"samples": samples})
        return order.model_copy(update={"spec": order.spec.model_copy(update={"evaluation": quiet})})

    def on(self, kind: Parallel, name: str = "", resume: str | None = None) -> tuple[Trained, dict[str, torch.Tensor]]:
        trained = train_on(self.order(name or kind.value, resume), kind)
        assert set(trained.ends) == {"ok"}, trained.ends
        return trained, self.adapter(name or kind.value)

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self._folder / name / "result" / "adapter" / WEIGHTS)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two adapters' weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_two_ranks_train_as_one_does(tiny_model: Path, tmp_path: Path) -> None:
    """Rows that do not divide evenly, windows of several micro-batches, and a held-out loss in mid-training."""
    case = Case(tiny_model, tmp_path, **UNEVEN)
    one, whole = case.on(NONE)
    for kind in (DATA, SHARDED):
        two, divided = case.on(kind)
        assert two.losses == pytest.approx(one.losses, abs=1e-5) and len(one.losses) == 5
        assert two.held_out == pytest.approx(one.held_out, abs=1e-5) and len(one.held_out) == 3
        assert apart(whole, divided) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(
    "asked, kinds",
    [
        ({"loss_type": ["sigmoid", "sft"]}, (DATA, SHARDED)),
        pytest.param({"loss_type": "simpo"}, (DATA,), marks=pytest.mark.long),
        pytest.param(
            {"loss_type": ["ipo", "hinge"], "loss_weights": [1, 0.5]}, (DATA, SHARDED), marks=pytest.mark.long
        ),
        pytest.param({"loss_type": "robust", "label_smoothing": 0.1}, (SHARDED,), marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_ranks_learn_from_pairs_as_one_does(
    tiny_model: Path, tmp_path: Path, asked: dict[str, Any], kinds: tuple[Parallel, ...], *, exact: bool
) -> None:
    """Each rank with its rows, and with what the reference makes of them, at a beta where that counts."""
    job = {"task_type": "preference", "preference": {"beta": 0.5, **asked}}
    case = Case(tiny_model, tmp_path, job=job, **UNEVEN | {"exact": exact})
    one, whole = case.on(NONE)
    for kind in kinds:
        two, divided = case.on(kind)
        assert two.losses == pytest.approx(one.losses, abs=1e-5) and len(one.losses) == 5
        assert two.held_out == pytest.approx(one.held_out, abs=1e-5) and len(one.held_out) == 3
        assert apart(whole, divided) < 1e-5


def test_a_gang_that_was_stopped_goes_on_on_one_card_and_on_two(tiny_model: Path, tmp_path: Path) -> None:
    case = Case(tiny_model, tmp_path, **UNEVEN)
    _, whole = case.on(NONE)
    stopped = train_on(case.order("stopped"), SHARDED, watch=stop_after(2))
    assert stopped.ends[0] == "stopped" and stopped.ends[1] != "ok"
    for kind, name in ((NONE, "on one"), (DATA, "on two")):
        rest, adapter = case.on(kind, name, resume="stopped")
        assert [m.resumed_from_step for m in rest.told if isinstance(m, Note) and m.kind == "resumed"] == [2]
        assert apart(whole, adapter) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_a_base_that_cards_divide_is_loaded_into_the_box_s_memory(
    method: Method, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a card, too: transformers looks for one by itself, and a base of NF4 would lie on it whole."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    precision = choose_precision("cpu", "bfloat16")
    base = load_base(str(tiny_model), method, "cuda", precision, divisible=True)
    assert {tensor.device.type for tensor in (*base.parameters(), *base.buffers())} == {"cpu"}


@pytest.mark.long
@pytest.mark.parametrize(
    "method, more",
    [
        ("qlora", {}), ("qlora", {"dtype": "bfloat16"}), ("lora", {"exact": True}), ("qlora", {"exact": True}),
        ("lora", {"gradient_checkpointing": True}),
        ("qlora", {"gradient_checkpointing": "half", "label_smoothing_factor": 0.1}),
    ],
)  # fmt: skip
def test_twenty_steps_on_two_ranks_are_those_of_one(
    tiny_model: Path, tmp_path: Path, method: str, more: dict[str, Any]
) -> None:
    case = Case(tiny_model, tmp_path, method=method, **UNEVEN | {"max_steps": 20, "learning_rate": 1e-3} | more)
    one, whole = case.on(NONE)
    near = 0.02 if "bfloat16" in more.values() else 1e-5
    for kind in (DATA, SHARDED):
        two, divided = case.on(kind)
        assert two.losses == pytest.approx(one.losses, abs=near) and len(one.losses) == 20
        assert apart(whole, divided) < near


@pytest.mark.long
def test_dropout_of_a_gang_is_the_same_after_a_resume(tiny_model: Path, tmp_path: Path) -> None:
    case = Case(tiny_model, tmp_path, **UNEVEN)
    case._training["lora"] = {"lora_dropout": 0.2}
    _, whole = case.on(DATA)
    train_on(case.order("stopped"), DATA, watch=stop_after(2))
    _, rest = case.on(DATA, "rest", resume="stopped")
    assert apart(whole, rest) == 0


@pytest.mark.long
def test_a_divided_model_is_evaluated_as_a_whole_one(tiny_model: Path, tmp_path: Path) -> None:
    """Answers are generated, and checkpoints proven, by the leader alone: the others lend their parts of the base.

    Both evaluate one adapter, that of the checkpoint of the last step: two that were trained are only nearly equal.
    """
    case = Case(tiny_model, tmp_path, method="qlora", max_steps=2, save_steps=2, dtype="float32")
    found = []
    for kind, earlier in ((NONE, None), (SHARDED, NONE.value)):
        order = case.order(kind.value, earlier, samples=2)
        trained = train_on(order, kind)
        assert set(trained.ends) == {"ok"} and bool(trained.losses) == (kind is NONE)
        report = json.loads((Path(order.output_dir) / "report.json").read_text())
        found.append((report["evaluation"]["metrics"], report["evaluation"]["answers"]))
    assert found[0] == found[1]


def test_rows_are_divided_evenly_and_in_order() -> None:
    rows = [TokenRow(number=n, input_ids=[n], labels=[n]) for n in range(7)]
    for count in range(8):
        parts = [rows_of(rows[:count], rank, 3) for rank in range(3)]
        assert [row for part in parts for row in part] == rows[:count]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 and len(parts[0]) == max(map(len, parts))


def stop_after(step: int) -> Any:
    def watch(run: Run, told: Told) -> None:
        if isinstance(told, Stepped) and told.step >= step:
            run.stop.saves.set()
            run.stop.came.set()

    return watch
