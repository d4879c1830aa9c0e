"""Lean trainings: what is resumed, stopped, evaluated or recomputed is the same training, bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from loractl.common.job.method import Method
from loractl.worker.base.adapter import WEIGHTS
from loractl.worker.base.arithmetic import compute_in, evaluating
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base
from loractl.worker.data.tokens import IGNORED, TokenRow
from loractl.worker.engine.loop import TrainingLoop, TrainingRows
from loractl.worker.engine.loss import Backward, MicroBatch, window_of
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.saved_state import read_snapshot, write_snapshot
from loractl.worker.recipe.kinds import trained_kind

from .test_engine import Case, Course, Watch
from .test_loss import Preference, pairs, plainly, preference

MUTE = 2  # the seed of a training that learns nothing of some rows

Settings = tuple[dict[str, Any], dict[str, Any]]  # of a job's lora section, and of its training section


def rows(count: int, seed: int, *, mute: bool = False, lengths: range = range(33, 61)) -> list[TokenRow]:
    """Rows of `lengths` tokens; with `mute`, nothing is learned of every third one."""
    taken = [lengths[(n * 17 + seed * 5) % len(lengths)] for n in range(count)]
    ids = [[3 + (n * 37 + at * 11 + seed) % 250 for at in range(length)] for n, length in enumerate(taken)]
    return [
        TokenRow(number=n, input_ids=row, labels=[IGNORED] * unlearned + row[unlearned:])
        for n, row in enumerate(ids)
        for unlearned in [len(row) if mute and n % 3 == 1 else len(row) // 3]
    ]


class Lab:
    """Trainings on one base."""

    def __init__(self, model: Path, folder: Path, method: str, dtype: str, **training: Any) -> None:
        self._model, self._folder, self._method, self._dtype = model, folder, method, dtype
        self._training, self._numbers = training, itertools.count()
        self.lengths = range(33, 61)  # tokens of a row
        self.beta: dict[str, float] = {}  # of the trainings by name that learn preferences

    def loop(self, name: str, settings: Settings, course: Course, *more: TrainerCallback) -> TrainingLoop:
        """A training on the lab's base. Those of one name and seed are the same training."""
        case = self._case(name, settings)
        seed, loss = case.spec.training.seed, trained_kind(case.spec).loss(case.spec)
        learned = TrainingRows(
            train=rows(9, seed, mute=seed == MUTE, lengths=self.lengths),
            held_out=rows(5, seed + 100, lengths=self.lengths),
        )
        if name in self.beta:
            learned = TrainingRows(train=pairs(9, seed, self.lengths), held_out=pairs(5, seed + 100, self.lengths))
            loss = preference([*learned.train, *learned.held_out], self.beta[name])

        torch.manual_seed(seed)
        base = load_base(str(self._model), Method(self._method), "cpu", case.precision)
        model = add_adapter(base, case.spec, Method(self._method))
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.data.normal_(std=0.05)  # else the first factor has no gradient in the first step
        compute_in(model, case.precision)
        forward = LeanPass(model, case.precision, loss=loss)
        return TrainingLoop(forward, case.arguments(), learned, (Watch(course), *more))

    def trained(self, name: str, settings: Settings, *more: TrainerCallback, resume: Path | None = None) -> Course:
        course = Course()
        loop = self.loop(name, settings, course, *more)
        if resume is not None:
            loop.resume(resume)
        loop.run()
        return course

    def _case(self, name: str, settings: Settings) -> Case:
        training = {"dtype": self._dtype, "exact": False, "learning_rate": 0.01, "max_steps": 6, **self._training}
        return Case(
            self._model,
            self._folder / f"{name}-{next(self._numbers)}",
            self._method,
            settings[0],
            {**training, **settings[1]},
        )


def same(ours: Course, theirs: Course, steps: int | None = None) -> None:
    assert ours.log[:-1] == theirs.log[:-1]
    same_gradients(ours, theirs, steps)
    assert ours.weights.keys() == theirs.weights.keys() and len(ours.weights) > 0
    assert all(torch.equal(weight, theirs.weights[key]) for key, weight in ours.weights.items())


def same_gradients(ours: Course, theirs: Course, steps: int | None = None) -> None:
    pairs = list(zip(ours.gradients[:steps], theirs.gradients[:steps], strict=True))
    assert pairs and all(float(torch.cat([g.flatten() for g in mine]).norm()) > 0 for mine, _ in pairs)
    assert all(torch.equal(a, b) for mine, other in pairs for a, b in zip(mine, other, strict=True))


TRAININGS: dict[str, Settings] = {
    "evaluated": (
        {"r": 4, "lora_dropout": 0.1}, {"seed": 1, "eval_steps": 2, "train_sampling_strategy": "group_by_length"},
    ),
    "accumulating": (
        {"r": 8, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"seed": MUTE, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "max_steps": 3},
    ),
    "large": (
        {"r": 16, "lora_dropout": 0.3},
        {"seed": 3, "per_device_train_batch_size": 3, "label_smoothing_factor": 0.1},
    ),
    "DoRA": ({"r": 2, "use_dora": True, "target_modules": ["v_proj"]}, {"seed": 4, "max_steps": 3}),
}  # fmt: skip

BASES: dict[str, dict[str, Any]] = {
    "lora in fp32": {"method": "lora", "dtype": "float32"},
    "lora in bf16, checkpointing": {"method": "lora", "dtype": "bfloat16", "gradient_checkpointing": True},
    "nf4": {"method": "qlora", "dtype": "bfloat16"},
    "nf4, checkpointing": {"method": "qlora", "dtype": "bfloat16", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", ["evaluated", "DoRA"])
@pytest.mark.parametrize("base", ["lora in fp32", "nf4"])
def test_recomputation_changes_no_bit(tiny_model: Path, tmp_path: Path, base: str, name: str, every: int) -> None:
    """A recomputed block draws the same dropout again."""
    lora, training = TRAININGS[name]
    settings = {**lora, "lora_dropout": 0.3}, {**training, "max_steps": 2, "eval_steps": 2}
    lab = Lab(tiny_model, tmp_path, **BASES[base])
    kept, again = lab.trained(name, settings), Course()
    loop = lab.loop(name, settings, again)
    loop.forward.recompute_blocks(every)
    loop.run()
    same(again, kept)


def test_a_training_is_measured_in_its_midst_by_the_loss_that_it_learns(tiny_model: Path, tmp_path: Path) -> None:
    lab, course = Lab(tiny_model, tmp_path, **BASES["lora in fp32"], max_steps=2, eval_steps=2), Course()
    lab.beta = {"preferences": 0.1}
    loop = lab.loop("preferences", ({}, {}), course, Ticks(scored := list[str](), "scored"))
    loop.args.per_device_eval_batch_size = 2  # as the probe sets it, where more do not fit
    loop.run()
    assert len(scored) == 3
    (measured,) = [line["eval_loss"] for line in course.log if "eval_loss" in line]
    rows, loss = loop.rows.held_out, loop.forward.loss
    assert isinstance(loss, Preference) and len(rows) == 5
    with evaluating(loop.model), torch.no_grad():
        assert measured == pytest.approx(float(plainly(loop.model, rows, loss)) / len(rows), rel=1e-5)


@pytest.mark.parametrize("base", ["lora in bf16, checkpointing", "nf4"])
def test_a_checkpoint_is_resumed_bit_for_bit(tiny_model: Path, tmp_path: Path, base: str) -> None:
    lab = Lab(tiny_model, tmp_path, **BASES[base], save_steps=4)
    whole, rest, settings = Course(), Course(), TRAININGS["evaluated"]
    first = lab.loop("whole", settings, whole)
    first.run()
    resumed = lab.loop("rest", settings, rest)
    resumed.resume(Path(first.args.output_dir) / "checkpoint-4")
    resumed.run()
    assert rest.log[:-1] == whole.log[:-1] and len(rest.gradients) == 2
    means = [loop.state.log_history[-1]["train_loss"] for loop in (first, resumed)]
    assert means[0] == means[1], "the steps before it count"
    assert all(torch.equal(weight, whole.weights[key]) for key, weight in rest.weights.items())


def test_an_adapter_that_did_not_arrive_as_its_checkpoint_has_it_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = Lab(tiny_model, tmp_path, **BASES["lora in fp32"]).loop("one", ({"r": 2}, {}), Course()).model
    write_snapshot(model, {}, tmp_path / "saved")
    read_snapshot(model, tmp_path / "saved")
    file = tmp_path / "saved" / WEIGHTS
    tensors = {name: tensor.double() for name, tensor in load_file(file).items()}
    tensors[min(tensors)] += 1e-12  # what the model's float32 can't hold
    save_file(tensors, file)
    with pytest.raises(TrainingFailed, match="the checkpoint's adapter is not that of this training"):
        read_snapshot(model, tmp_path / "saved")


def test_a_micro_batch_that_fails_has_drawn_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """Tried again, it leaves the gradients that it would have left."""
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    forward = lab.loop("large", TRAININGS["large"], Course()).forward
    (batch,) = window_of(forward.loss, [rows(3, 0)])

    def learned() -> torch.Tensor:
        forward.model.zero_grad()
        torch.manual_seed(5)
        with contextlib.suppress(torch.OutOfMemoryError):
            forward.learn(batch, torch.autograd.backward)
        forward.model.zero_grad()
        forward.learn(batch, torch.autograd.backward)
        return torch.cat([p.grad.flatten() for p in forward.model.parameters() if p.grad is not None])

    torch.manual_seed(5)
    forward.learn(batch, torch.autograd.backward)
    whole = torch.cat([p.grad.flatten() for p in forward.model.parameters() if p.grad is not None])
    block = forward.model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    hook = block.register_full_backward_hook(Shortage())
    assert torch.equal(learned(), whole)
    hook.remove()
    assert not torch.equal(learned(), whole), "a second one draws other numbers"


class Shortage:
    """Has no memory for the first backward pass, when half of it is done."""

    met = False

    def __call__(self, *_: Any) -> None:
        if not self.met:
            self.met = True
            raise torch.OutOfMemoryError("no room")


class End(TrainerCallback):
    """Stops a training in the middle of a window, with a checkpoint."""

    def __init__(self, step: int, piece: int) -> None:
        self._place, self._seen = (step, piece), (0, 0)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, piece = self._seen
        self._seen = (state.global_step, piece + 1 if step == state.global_step else 1)
        if self._seen == self._place:
            control.should_training_stop = control.should_save = True


@pytest.mark.long
def test_a_stop_between_micro_batches_leaves_a_checkpoint_that_resumes_bit_for_bit(
    tiny_model: Path, tmp_path: Path
) -> None:
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    strategy = {"train_sampling_strategy": "group_by_length", "max_steps": 5}
    settings = ({"lora_dropout": 0.2}, {**TRAININGS["accumulating"][1], **strategy})
    whole, rest = lab.trained("whole", settings), Course()
    stopped = lab.loop("stopped", settings, Course(), End(step=3, piece=2))  # at the end of an epoch
    stopped.run()
    assert stopped.state.global_step == 3
    resumed = lab.loop("rest", settings, rest)
    resumed.resume(Path(stopped.args.output_dir) / "checkpoint-3")
    resumed.run()
    assert rest.log[:-1] == whole.log[:-1]
    assert all(torch.equal(weight, whole.weights[key]) for key, weight in rest.weights.items())


def run_short(loop: TrainingLoop, step: int, piece: int) -> None:
    """Train until memory runs out at the end of a micro-batch's backward pass."""
    learn = loop.forward.learn

    def short(batch: MicroBatch, backward: Backward) -> torch.Tensor:
        loss = learn(batch, backward)
        if (loop.state.global_step, batch.number + 1) == (step, piece):
            raise torch.OutOfMemoryError("no room")
        return loss

    loop.forward.learn = short  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError) as raised:
        loop.run()
    assert raised.value.__context__ is None, "it would hold the tensors of the pass"


@pytest.mark.long
@pytest.mark.parametrize("pieces", [1, 3])
def test_memory_that_runs_out_in_a_window_costs_that_window_alone(
    tiny_model: Path, tmp_path: Path, pieces: int
) -> None:
    """At the end of an epoch, with dropout: the checkpoint that is left resumes bit for bit."""
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    keys: dict[str, Any] = {"gradient_accumulation_steps": pieces, "per_device_train_batch_size": 3 // pieces}
    settings = (
        {"lora_dropout": 0.2},
        {**keys, "seed": 4, "train_sampling_strategy": "group_by_length", "max_steps": 5},
    )
    whole = lab.trained("whole", settings)
    failed = lab.loop("failed", settings, Course())
    run_short(failed, step=3, piece=pieces)
    failed.save_last_step()
    rest = lab.trained("rest", settings, resume=Path(failed.args.output_dir) / "checkpoint-3")
    assert rest.log[:-1] == whole.log[:-1] and len(rest.gradients) == 2
    assert all(torch.equal(weight, whole.weights[key]) for key, weight in rest.weights.items())


def test_memory_that_runs_out_in_the_step_itself_leaves_no_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    failed = lab.loop("failed", ({}, {"max_steps": 3}), Course())

    def step() -> None:
        if failed.state.global_step == 1:
            raise torch.OutOfMemoryError("no room")

    failed.optimizer.inner.register_step_pre_hook(lambda *_: step())
    with pytest.raises(torch.OutOfMemoryError):
        failed.run()
    failed.save_last_step()
    assert failed.state.global_step == 1 and not list(Path(failed.args.output_dir).glob("checkpoint-*"))


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
def test_the_tokens_of_a_part_of_an_epoch_are_those_of_its_rows(
    tiny_model: Path, tmp_path: Path, strategy: str
) -> None:
    """Not that part of all tokens: by length, the longest rows come first. Rows have 5 to 60 tokens."""
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    lab.lengths = range(5, 61, 11)
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    settings: Settings = ({}, {"train_sampling_strategy": strategy, "max_steps": 8, **rows})
    whole = lab.loop("whole", settings, Course())
    whole.run()
    stopped = lab.loop("whole", settings, Course(), End(step=7, piece=1))  # the second epoch has 5 steps
    stopped.run()
    checkpoint = Path(stopped.args.output_dir) / f"checkpoint-{stopped.state.global_step}"
    _without_count(checkpoint / "training_state.json")
    resumed = lab.loop("whole", settings, Course())
    resumed.resume(checkpoint)
    counts = [stopped.state.num_input_tokens_seen, resumed.state.num_input_tokens_seen]
    resumed.run()
    passed = whole.state.total_flos / (6 * whole.model.num_parameters(exclude_embeddings=True))
    assert whole.state.num_input_tokens_seen == resumed.state.num_input_tokens_seen == passed
    assert counts[0] == counts[1] > 0


def _without_count(state: Path) -> None:
    """As an older version wrote it."""
    text = json.loads(state.read_text())
    progress = dict(text["dict"])["progress"]
    progress["dict"] = [item for item in progress["dict"] if item[0] != "num_input_tokens_seen"]
    state.write_text(json.dumps(text))


@pytest.mark.long
def test_an_evaluation_changes_no_gradient(tiny_model: Path, tmp_path: Path) -> None:
    """bitsandbytes repacks an NF4 layer's weights on its first forward in eval mode, and gradients are wrong then."""
    lab = Lab(tiny_model, tmp_path, **BASES["nf4"])
    settings: Settings = ({"r": 4, "lora_dropout": 0.1}, {"max_steps": 4, "logging_steps": 1})
    alone = lab.trained("alone", settings)
    evaluated = lab.trained("evaluated", (settings[0], {**settings[1], "eval_steps": 1}))
    assert sum("eval_loss" in line for line in evaluated.log) == 4
    same_gradients(evaluated, alone)


class Ticks(TrainerCallback):
    """Notes steps, or batches that are evaluated."""

    def __init__(self, order: list[str], what: str) -> None:
        self._order, self._what = order, what

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._what == "step":
            self._order.append("step")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._order.append("scored")
