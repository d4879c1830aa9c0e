"""The engine against its oracle: transformers' Trainer on the same model, rows and arguments, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.worker.base.arithmetic import choose_precision, compute_in, random_streams_kept
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base
from loractl.worker.data.prepared import pack
from loractl.worker.data.token_rows import collate, inputs_of
from loractl.worker.data.tokens import IGNORED, TokenRow
from loractl.worker.engine.loop import TrainingLoop, TrainingRows
from loractl.worker.engine.passes.padded import PaddedPass
from loractl.worker.protocol.marker import MARKER
from loractl.worker.protocol.messages import Note, Stepped
from loractl.worker.recipe.arguments import training_arguments
from loractl.worker.recipe.kinds import trained_kind

from .conftest import Recipe
from .test_out_of_memory import make_order

PAD = 2
TOLD = ("loss", "grad_norm", "learning_rate", "epoch", "eval_loss", "step")


@dataclass
class Course:
    """What a training did: the gradients before each step, its log, the weights that it left."""

    gradients: list[list[torch.Tensor]] = field(default_factory=list)
    log: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def compared(course: Course) -> list[dict[str, float]]:
    """The log but its last line and its held-out losses, which are means of batch means in the Trainer."""
    return [{name: value for name, value in line.items() if name != "eval_loss"} for line in course.log[:-1]]


class Watch(TrainerCallback):
    def __init__(self, course: Course) -> None:
        self._course = course

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._course.gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._course.log = [{name: line[name] for name in TOLD if name in line} for line in state.log_history]
        self._course.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


class TracelessTrainer(Trainer):
    """The Trainer, but an evaluation draws nothing of the steps after it: its DataLoader would."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with random_streams_kept():
            return super().evaluate(*args, **kwargs)


def rows(count: int = 11) -> list[TokenRow]:
    """Rows of 6 to 40 tokens, of which the first third is not learned."""
    lengths = [6 + (n * 17) % 35 for n in range(count)]
    ids = [[3 + (n * 37 + at * 11) % 250 for at in range(length)] for n, length in enumerate(lengths)]
    return [
        TokenRow(number=n, input_ids=row, labels=[IGNORED] * (len(row) // 3) + row[len(row) // 3 :])
        for n, row in enumerate(ids)
    ]


class Case:
    """One training, by the engine and by the Trainer."""

    def __init__(self, model: Path, folder: Path, method: str, lora: dict[str, Any], training: dict[str, Any]) -> None:
        settings: dict[str, Any] = {"max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
        settings["exact"] = True
        self.order = make_order(folder, model, folder, method=method, lora=lora, **settings | training)
        self.method = Method(method)
        self.rows, self.held_out = rows(), rows(5)
        if self.spec.training.packing:
            self.rows = pack(self.rows, 64)

    @property
    def spec(self) -> JobSpec:
        return self.order.spec

    def model(self) -> Any:
        set_seed(self.spec.training.seed)
        base = load_base(self.spec.base_model, self.method, "cpu", self.precision)
        return add_adapter(base, self.spec, self.method)

    @property
    def precision(self) -> Any:
        return choose_precision("cpu", self.spec.training.dtype)

    def arguments(self) -> TrainingArguments:
        return training_arguments(self.order, self.spec, self.precision)

    def loop(self, *callbacks: TrainerCallback) -> TrainingLoop:
        arguments, model = self.arguments(), self.model()
        compute_in(model, self.precision)
        loss = trained_kind(self.spec).loss(self.spec)
        forward = PaddedPass(model, PAD, noise=arguments.neftune_noise_alpha, loss=loss)
        return TrainingLoop(forward, arguments, TrainingRows(train=self.rows, held_out=self.held_out), callbacks)

    def by_engine(self, *more: TrainerCallback, resume: Path | None = None) -> Course:
        course = Course()
        loop = self.loop(Watch(course), *more)
        if resume is not None:
            loop.resume(resume)
        loop.run()
        return course

    def by_trainer(self) -> Course:
        course = Course()
        TracelessTrainer(
            model=self.model(),
            args=self.arguments(),
            train_dataset=[inputs_of(row) for row in self.rows],
            eval_dataset=[inputs_of(row) for row in self.held_out],
            data_collator=lambda rows: collate(rows, PAD),
            callbacks=[Watch(course)],
        ).train()
        return course


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora in fp32": ("lora", {}, {"dtype": "float32"}),
    "lora in bf16, dropout, across an epoch": ("lora", {"lora_dropout": 0.2}, {"dtype": "bfloat16", "max_steps": 8}),
    "accumulation, a short last window": (
        "lora", {"lora_dropout": 0.1}, {"dtype": "float32", "gradient_accumulation_steps": 4, "max_steps": 5},
    ),
    "checkpointing with dropout": (
        "lora", {"lora_dropout": 0.2}, {"dtype": "bfloat16", "gradient_checkpointing": True},
    ),
    "every second block, dropout": (
        "lora", {"lora_dropout": 0.2}, {"dtype": "bfloat16", "gradient_checkpointing": "half"},
    ),
    "nf4": ("qlora", {}, {"dtype": "bfloat16"}),
    "nf4, checkpointing, accumulation, dropout": (
        "qlora", {"lora_dropout": 0.2},
        {"dtype": "bfloat16", "gradient_checkpointing": True, "gradient_accumulation_steps": 3},
    ),
    "rows by length, evaluated": (
        "lora", {"lora_dropout": 0.1},
        {"train_sampling_strategy": "group_by_length", "dtype": "float32", "max_steps": 7, "eval_steps": 3},
    ),
    "rows in order, smoothed labels, evaluated": (
        "lora", {}, {"train_sampling_strategy": "sequential", "label_smoothing_factor": 0.2, "eval_steps": 2},
    ),
    "noise on the embeddings": ("lora", {}, {"neftune_noise_alpha": 5}),
    "decay of all but norms": (
        "lora", {"modules_to_save": ["model.norm", "lm_head"]}, {"weight_decay": 0.5, "learning_rate": 0.01},
    ),
    "packed rows": ("lora", {}, {"packing": True, "dtype": "bfloat16"}),
    "the schedule's own numbers, averaged losses": (
        "lora", {"use_dora": True},
        {
            "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}, "warmup_steps": 2,
            "logging_steps": 3, "max_steps": 8, "optim": "adafactor",
        },
    ),
    "8 bit of state": ("qlora", {"r": 64}, {"optim": "paged_adamw_8bit", "max_grad_norm": 0.1}),
    "epochs": ("lora", {}, {"max_steps": None, "num_train_epochs": 1.5, "per_device_train_batch_size": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_engine_trains_as_the_trainer_does_bit_for_bit(tiny_model: Path, tmp_path: Path, name: str) -> None:
    case = Case(tiny_model, tmp_path / "a", *CASES[name])
    ours, theirs = case.by_engine(), case.by_trainer()
    assert compared(ours) == compared(theirs) and len(ours.log) > 2
    assert len(ours.gradients) == len(theirs.gradients)
    for mine, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert ours.weights.keys() == theirs.weights.keys()
    assert all(torch.equal(weight, theirs.weights[key]) for key, weight in ours.weights.items())


RESUMED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "by length, in the second epoch": (
        "lora", {"lora_dropout": 0.2}, {"train_sampling_strategy": "group_by_length", "max_steps": 11},
    ),
    "8 bit of state, dropout": ("qlora", {"r": 64, "lora_dropout": 0.1}, {"optim": "adamw_8bit", "max_steps": 11}),
    "averages over a checkpoint": ("lora", {"lora_dropout": 0.1}, {"logging_steps": 5, "max_steps": 11}),
    "adafactor": ("lora", {}, {"optim": "adafactor", "max_steps": 11, "neftune_noise_alpha": 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_equals_a_run_without_one_bit_for_bit(tiny_model: Path, tmp_path: Path, name: str) -> None:
    method, lora, training = RESUMED[name]
    case = Case(tiny_model, tmp_path / "a", method, lora, {**training, "save_steps": 8})
    whole = case.by_engine()
    saved = Path(case.order.checkpoint_dir) / "checkpoint-8"
    rest = case.by_engine(resume=saved)
    assert rest.log[:-1] == whole.log[:-1], "the losses before the checkpoint belong to the log"
    assert all(torch.equal(weight, whole.weights[key]) for key, weight in rest.weights.items())
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}


def test_trackers_get_the_names_that_the_trainer_gives_them(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    case = Case(tiny_model, tmp_path / "a", "lora", {}, {"report_to": ["tensorboard"], "eval_steps": 2, "max_steps": 2})
    seen = []
    for name, train in (("ours", case.by_engine), ("theirs", case.by_trainer)):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / name))
        train()
        seen.append(EventAccumulator(str(tmp_path / name)).Reload())
    assert seen[0].Tags()["scalars"] == seen[1].Tags()["scalars"]
    for name in ("train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "eval/loss"):
        ours, theirs = ([(event.step, event.value) for event in told.Scalars(name)] for told in seen)
        assert ours == theirs, name


def test_job_json_tells_the_arguments_by_transformers_names(recipe: Recipe, tmp_path: Path) -> None:
    recipe(max_steps=2, evaluation={"samples": 0, "metrics": ["loss"]}, warmup_steps=3)
    told = json.loads((tmp_path / "a" / "result" / "job.json").read_text())["training_arguments"]
    assert told.keys() <= {one.name for one in dataclasses.fields(TrainingArguments)}
    asked = {
        "warmup_steps": 3,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "cosine",
        "max_steps": 2,
        "use_cpu": True,
    }
    assert {name: told[name] for name in asked} == asked


def test_a_checkpoint_in_another_format_is_not_resumed_and_the_history_says_so(recipe: Recipe, tmp_path: Path) -> None:
    """What the Trainer of earlier versions wrote: its marker names no format."""
    _, whole = recipe("whole", max_steps=4, evaluation={"samples": 0, "metrics": ["loss"]})
    recipe("first", max_steps=4, stop_after=2, evaluation={"samples": 0, "metrics": ["loss"]})
    for marker in (tmp_path / "first" / "checkpoints").glob(f"*/{MARKER}"):
        said = json.loads(marker.read_text())
        del said["belongs_to"]["format"]
        marker.write_text(json.dumps(said))
    _, told = recipe("rest", max_steps=4, resume="first", evaluation={"samples": 0, "metrics": ["loss"]})
    (note,) = [m.text for m in told if isinstance(m, Note) and m.kind == "refused"]
    assert note.endswith("another version of loractl wrote it, in another format; the training starts again")
    steps = [[m.step for m in run if isinstance(m, Stepped) and "loss" in m.metrics] for run in (told, whole)]
    assert steps[0] == steps[1] == [1, 2, 3, 4]
