"""A step of real sizes, counted: as the engine takes it, and as transformers' Trainer does on peft's model.

Blocks are alike, so two models are counted, of one block and of two, and each further block costs their difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from transformers import masking_utils

from loractl.common.job.method import Method
from loractl.worker.base import shared_heads
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.engine.loss import MicroBatch, learned_in

from .card import card
from .count import CARDS, Count, Work, kind_of
from .passes import Case, base_on_card, pass_of, rows_of

WAYS = {"lean": "loractl", "padded": "Trainer"}
"""Ways of a step. The exact mode's is transformers' Trainer's on peft's model, bit for bit."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A published model's sizes."""

    layers: int
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A step: rows of one length."""

    model: str
    method: Method
    rows: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.method.value} {self.rows} x {self.tokens}"


MODELS = {
    "0.5B": Model(
        layers=24,
        config={
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
            "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    ),
    "1B": Model(
        layers=16,
        config={
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
        },
    ),
    "8B": Model(
        layers=32,
        config={
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
"""Qwen2.5 0.5B, Llama 3.2 1B and Llama 3 8B."""

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(model="0.5B", method=Method.LORA, rows=16, tokens=128),
        Shape(model="0.5B", method=Method.QLORA, rows=4, tokens=1024),
        Shape(model="1B", method=Method.LORA, rows=8, tokens=256),
        Shape(model="1B", method=Method.QLORA, rows=4, tokens=1024),
        Shape(model="8B", method=Method.LORA, rows=8, tokens=256),
        Shape(model="8B", method=Method.QLORA, rows=4, tokens=1024),
    )
}

ADAPTER = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}


START_S = (15e-6, 25e-6)
"""What Python and torch take to start a kernel."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Of one step, without the optimizer's."""

    kernels: int
    gigabytes: float
    elementwise: float  # of these, moved by what is no product, no attention and no loss
    teraflop: float
    milliseconds: dict[str, float]  # by card


def counted(shape: Shape, way: str, *, recomputes: bool = True) -> Step:
    """A forward and a backward pass, in bf16 on an Ada card."""
    model = MODELS[shape.model]
    one, two = (_by_operator(shape, way, layers, recomputes) for layers in (1, 2))
    whole = {
        name: work.plus(work.plus(one.get(name, Work()), -1), model.layers - 2)  # beyond the second block
        for name, work in two.items()
    }
    slow = [work for name, work in whole.items() if kind_of(name) == "elementwise"]
    return Step(
        kernels=round(sum(work.kernels for work in whole.values())),
        gigabytes=sum(work.bytes for work in whole.values()) / 1e9,
        elementwise=sum(work.bytes for work in slow) / 1e9,
        teraflop=sum(work.operations for work in whole.values()) / 1e12,
        milliseconds={
            card: 1e3 * sum(work.seconds[number] for work in whole.values()) for number, card in enumerate(CARDS)
        },
    )


def shares(whole: Step, steps: Sequence[Step], pieces: int) -> dict[str, float]:
    """What so many micro-batches take of a step, by card; blocks are alike, so their time is the mean of `steps`.

    Python starts kernels while the card runs others: the longer of the two counts.
    """

    def taken(of: Sequence[Step], card: str) -> float:
        ms = sum(step.milliseconds[card] for step in of) / len(of)
        return max(ms, 1e3 * sum(START_S) / 2 * sum(step.kernels for step in of) / len(of))

    return {card: pieces * taken(steps, card) / taken([whole], card) for card in whole.milliseconds}


def _by_operator(shape: Shape, way: str, layers: int, recomputes: bool) -> dict[str, Work]:
    config, rows = MODELS[shape.model].config | {"num_hidden_layers": layers}, (shape.tokens,) * shape.rows
    case = Case(way=way, method=shape.method, recomputes=recomputes, model=config, lora=ADAPTER, rows=rows)
    with card(case.capability), _attention_of_a_card():
        precision = choose_precision("cuda")
        learner = pass_of(case, base_on_card(case.model, case.method, precision), precision)
        rows = rows_of(case.rows, skipped=1)
        with Count() as count:
            learner.learn(MicroBatch(rows=rows, learned=learned_in(rows), pieces=1), torch.autograd.backward)
    return count.by_operator


@contextlib.contextmanager
def _attention_of_a_card() -> Iterator[None]:
    """FlashAttention where torch's own choice would take it, without a mask: rows have one length."""

    def flash(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, scale: float | None = None, **__: Any
    ) -> torch.Tensor:
        states = [one.to(shared_heads.kind_of(one)) for one in (query, key, value)]
        answer: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*states, 0.0, True, scale=scale)[0]
        return answer

    with (
        patch.object(torch.nn.functional, "scaled_dot_product_attention", flash),
        patch.object(masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: True),
    ):
        yield
