"""Pairs against their oracle: TRL's trainers on the same model, rows, order, seed and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.worker.base.arithmetic import choose_precision, compute_in
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base, load_tokenizer
from loractl.worker.recipe.arguments import training_arguments

from .conftest import Recipe

pytest.importorskip("trl", minversion="1.16.0", reason="the oracle is in the extra: pip install -e .[oracle]")
pytestmark = pytest.mark.long

STEPS, BATCH = 20, 4

CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "sigmoid and answers": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
    "simpo and answers": {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.2], "beta": 2.0},
    "orpo": {"loss_type": "orpo"},
}


def pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"item {n} of {n % 7} is",
            "chosen": f" number {n * 3} " + "and good " * (1 + n % 3),
            "rejected": f" bad {n % 5} " * (1 + n % 4),
        }
        for n in range(first, first + count)
    ]


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("name", CASES)
def test_a_training_is_trl_s(name: str, method: str, recipe: Recipe, start: Any, tmp_path: Path) -> None:
    asked, rows = CASES[name], pairs(STEPS * BATCH)
    data, held_out = tmp_path / "pairs.jsonl", tmp_path / "held-out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    held_out.write_text("".join(json.dumps(row) + "\n" for row in pairs(4, 1000)), "utf-8")
    keys: dict[str, Any] = {
        "method": method,
        "dataset": {"path": str(data), "eval_path": str(held_out)},
        "job": {"task_type": "preference", "preference": asked},
        "evaluation": {"samples": 0},
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "dtype": "float32",
        "learning_rate": 5e-4,
        "seed": 7,
        "exact": method == "qlora",  # by bitsandbytes' own products, which round NF4 otherwise than the engine's
    }
    ours = recipe("a", **keys)[0]
    assert ours.reason.value == "ok", ours.message
    report = json.loads((tmp_path / "a" / "result" / "report.json").read_text())
    losses, weights = by_trl(start("b", **keys), rows)
    assert [loss for _, loss in report["training"]["losses"]] == pytest.approx(losses, rel=1e-5, abs=1e-5)
    from safetensors.torch import load_file

    trained = load_file(tmp_path / "a" / "result" / "adapter" / "adapter_model.safetensors")
    assert trained.keys() == weights.keys()
    largest = max(float(weight.abs().max()) for weight in weights.values())
    assert max(float((trained[key] - weights[key]).abs().max()) for key in trained) <= 1e-4 * largest


def by_trl(order: Any, rows: list[dict[str, str]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of each step, and the adapter."""
    from datasets import Dataset
    from peft import get_peft_model_state_dict
    from transformers import set_seed

    spec: JobSpec = order.spec
    method, precision = Method(order.method), choose_precision("cpu", "float32")
    theirs = training_arguments(order, spec, precision)
    same = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "adam_beta1")
    same += ("adam_beta2", "adam_epsilon", "optim", "seed", "max_steps", "per_device_train_batch_size")
    arguments = {
        **{name: getattr(theirs, name) for name in same},
        "gradient_accumulation_steps": 1,
        "output_dir": order.checkpoint_dir,
        "train_sampling_strategy": "sequential",
        "max_length": spec.dataset.max_length,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "beta": spec.preference.beta,
        "label_smoothing": spec.preference.label_smoothing,
        "disable_dropout": True,
    }
    set_seed(spec.training.seed)
    base = load_base(spec.base_model, method, "cpu", precision)
    model = add_adapter(base, spec, method)
    compute_in(model, precision)
    tokenizer = load_tokenizer(spec.base_model)
    if not spec.preference.has_reference:
        tokenizer.bos_token = None  # CPO's and ORPO's trainers would begin each row with one, as DPO's does not
    trained = {parameter: parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad}
    trainer = _trainer(spec, arguments)(model=model, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    for parameter, weight in trained.items():
        parameter.data = weight  # DPO's trainer casts an adapter on NF4 to bf16; here it stays in fp32, as peft has it
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: weight.detach() for name, weight in get_peft_model_state_dict(model).items()}


def _trainer(spec: JobSpec, arguments: dict[str, Any]) -> Any:
    from functools import partial

    names, weights = spec.preference.losses, dict(zip(spec.preference.losses, spec.preference.weights, strict=True))
    if "orpo" in names:
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        del arguments["label_smoothing"]
        return partial(ORPOTrainer, args=ORPOConfig(**arguments))
    if "simpo" in names:
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        simpo = {"loss_type": "simpo", "cpo_alpha": weights.get("sft", 0.0), "simpo_gamma": spec.preference.simpo_gamma}
        return partial(CPOTrainer, args=CPOConfig(**arguments | simpo))
    from trl import DPOConfig, DPOTrainer

    both = {"loss_type": list(names), "loss_weights": list(weights.values())}
    return partial(DPOTrainer, args=DPOConfig(**arguments | both))
