"""The engine's passes on the fake card, each a step of a small model: forwards, backwards and the optimizer's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import varlen

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.worker.base.arithmetic import Precision, choose_precision, compute_in, evaluating
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.shared_heads import repeat_where_needed
from loractl.worker.data.tokens import IGNORED, TokenRow
from loractl.worker.engine.loss import UNSMOOTHED, BentLoss, LearnedTokens, MicroBatch, TokenLoss
from loractl.worker.engine.optimizer import ScaledOptimizer
from loractl.worker.engine.passes import attention, fused
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.passes.padded import PaddedPass

from .card import CARD, card
from .watch import Watch

TINY = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
}  # fmt: skip

WINDOWS = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}

ADAPTER = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}

WIDE_HEADS = {"hidden_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}
"""Like Gemma's."""

ATTENTION = ("_varlen_attn", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
             "_safe_softmax")  # fmt: skip
"""Operators of attention forwards; the last one is of plain products, which hold every score."""

ROWS = (5, 9, 1, 7)
"""Tokens of the rows of a step."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way through the engine."""

    way: str = "lean"  # lean, unfused or padded
    method: Method = Method.LORA
    dtype: str = "auto"  # of the job file
    capability: tuple[int, int] = (8, 9)
    recomputes: int = 1  # each block, every second one (2), or none (0)
    evaluates: bool = False
    bends: bool = False  # the loss
    lora: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = ROWS


def outcome(case: Case) -> dict[str, Any]:
    """What the pass did, in words and numbers that JSON has."""
    with card(case.capability):
        precision = choose_precision("cuda", case.dtype, case.model.get("model_type", TINY["model_type"]))
        base = base_on_card({**TINY, **case.model}, case.method, precision)
        forward = pass_of(case, base, precision)
        watch = Watch()
        with watch:
            _evaluate(case, forward) if case.evaluates else _learn(case, forward)
        faults = dict(watch.faults)
        if not case.evaluates:
            faults |= _missing(forward.model)
        return {
            "faults": faults,
            "types": [str(precision.base), precision.amp],
            "by_row": forward.layout.by_row if isinstance(forward, LeanPass) else None,
            "at_once": watch.operators["_varlen_attn"],
            "attention": {name: watch.operators[name] for name in ATTENTION if watch.operators[name]},
            "moved": watch.moved,
            "operators": sum(watch.operators.values()),
        }


def base_on_card(config: dict[str, Any], method: Method, precision: Precision) -> Any:
    """A base as loading leaves it, without content."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    repeat_where_needed()
    with unset_fake_temporarily(), torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=precision.base)
        if method is Method.QLORA:
            how = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=precision.base,
            )
            base = replace_with_bnb_linear(base, get_keys_to_not_convert(base), how)
    base.to(CARD)
    _pack(base, precision.base)
    return base


def _pack(base: Any, compute: torch.dtype) -> None:
    """Let bitsandbytes pack the layers that are in NF4."""
    from bitsandbytes.functional import name2qmap, quantize_4bit
    from bitsandbytes.nn import Linear4bit

    codes = torch.empty(256, device=CARD)  # which bitsandbytes makes of numbers that it reads one by one
    for layer in base.modules():
        if isinstance(layer, Linear4bit):
            weight = torch.empty((layer.out_features, layer.in_features), dtype=compute, device=CARD)
            with patch.dict(name2qmap, dynamic=codes):
                packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
            layer.weight = torch.nn.Parameter(packed, requires_grad=False)
            layer.weight.quant_state = layer.quant_state = state


def job(case: Case) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "card",
            "base_model": "/base",
            "method": case.method.value,
            "dataset": {"path": "rows.jsonl"},
            "lora": ADAPTER | case.lora,
            "training": {"exact": case.way == "padded"},
        }
    )


def pass_of(case: Case, base: Any, precision: Precision) -> Any:
    model = _adapted(base, job(case), case.method)
    forward: Any
    if case.way == "padded":
        compute_in(model, precision)
        forward = PaddedPass(model, 0, loss=_loss(case))
    else:
        forward = LeanPass(model, precision, loss=_loss(case), fuses=case.way == "lean")
    model.train()
    if case.recomputes:
        forward.recompute_blocks(case.recomputes)
    return forward


class RowLoss(BentLoss):
    """As bent as a preference's, and of each row by itself."""

    def count(self, rows: Sequence[TokenRow]) -> int:
        return len(rows)

    def summed(self, logp: torch.Tensor, tokens: LearnedTokens) -> torch.Tensor:
        own = logp.new_zeros(len(tokens.rows), 1).index_put((tokens.row_of, tokens.example_of), logp, accumulate=True)
        return -torch.nn.functional.logsigmoid(own).sum()


def _loss(case: Case) -> TokenLoss:
    return RowLoss() if case.bends else UNSMOOTHED


def _adapted(base: Any, spec: JobSpec, method: Method) -> Any:
    with CARD:
        return add_adapter(base, spec, method)


def _learn(case: Case, forward: Any) -> None:
    """A micro-batch and its step."""
    fp16 = case.dtype == "float16" or (case.capability < (8, 0) and case.dtype == "auto")
    trained = [p for p in forward.model.parameters() if p.requires_grad]
    step = ScaledOptimizer(torch.optim.AdamW(trained, fused=True), torch.amp.GradScaler("cuda") if fp16 else None)
    rows = rows_of(case.rows)
    forward.learn(MicroBatch(rows=rows, learned=forward.loss.count(rows), pieces=1), step.backward)
    step.clip(trained, 1.0)
    if step.scaler is None:  # which reads whether something overflowed
        step.step()


def _evaluate(case: Case, forward: Any) -> None:
    with evaluating(forward.model):
        for scored in forward.scores(rows_of(case.rows)):
            assert scored.losses.device == CARD and scored.losses.dtype == torch.float32


def rows_of(lengths: tuple[int, ...], skipped: int = 2) -> list[TokenRow]:
    """Rows of which all but the first tokens are learned."""
    rows = [list(range(length)) for length in lengths]
    labels = [[IGNORED] * skipped + ids[skipped:] for ids in rows]
    return [TokenRow(number=n, input_ids=ids, labels=labels[n]) for n, ids in enumerate(rows)]


def _missing(model: Any) -> dict[str, int]:
    """Trained parameters without a gradient of their own type on the card."""
    found = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.grad is None:
            found[f"no gradient for {name}"] = 1
        elif (p.grad.device, p.grad.dtype, p.grad.shape) != (CARD, p.dtype, p.shape):
            found[f"the gradient of {name} is {p.grad.dtype} on {p.grad.device}"] = 1
    return found


CASES: dict[str, Case] = {
    "lora": Case(),
    "nf4": Case(method=Method.QLORA),
    "nf4, fp16": Case(method=Method.QLORA, dtype="float16"),
    "unfused": Case(way="unfused"),
    "unfused, nf4": Case(way="unfused", method=Method.QLORA),
    "padded": Case(way="padded"),
    "padded, nf4": Case(way="padded", method=Method.QLORA),
    "no recomputation": Case(recomputes=0),
    "every second block": Case(recomputes=2),
    "no dropout": Case(lora={"lora_dropout": 0.0}),
    "fp32": Case(dtype="float32"),
    "dora": Case(lora={"use_dora": True}),
    "one row": Case(rows=(9,)),
    "whole modules": Case(lora={"modules_to_save": ["model.norm"]}),
    "biases, windows": Case(model=WINDOWS),
    "a bent loss, fp16": Case(bends=True, dtype="float16"),
    "a bent loss, unfused, nf4": Case(way="unfused", method=Method.QLORA, bends=True),
    "a bent loss, padded": Case(way="padded", bends=True),
    "evaluation": Case(evaluates=True),
    "evaluation, nf4": Case(evaluates=True, method=Method.QLORA),
}
"""The ways of a pass on a card of Ampere and newer."""

CARDS: dict[str, Case] = {
    "7.5": Case(capability=(7, 5)),
    "7.5, nf4": Case(capability=(7, 5), method=Method.QLORA),
    "7.5, a family that overflows fp16": Case(capability=(7, 5), model={"model_type": "gemma2"}),
    "7.0": Case(capability=(7, 0)),
    "7.5, fp32": Case(capability=(7, 5), dtype="float32"),
    "7.5, evaluation": Case(capability=(7, 5), evaluates=True),
    "7.5, windows": Case(capability=(7, 5), model=WINDOWS),
    "7.5, padded": Case(capability=(7, 5), way="padded"),
    "8.0, fp32": Case(capability=(8, 0), dtype="float32"),
    "8.0, one row": Case(capability=(8, 0), rows=(9,)),
    "8.0, wide heads, one row": Case(capability=(8, 0), model=WIDE_HEADS, rows=(9,)),
    "8.9, wide heads, one row": Case(capability=(8, 9), model=WIDE_HEADS, rows=(9,)),
    "8.0": Case(capability=(8, 0), evaluates=True),
    "8.6": Case(capability=(8, 6), evaluates=True),
    "8.9": Case(capability=(8, 9), evaluates=True),
    "9.0": Case(capability=(9, 0), evaluates=True),
    "12.0": Case(capability=(12, 0), evaluates=True),
}
"""Cards of each generation."""

MANY: dict[str, Case] = {
    f"{way}, {method.value}, {dtype}{', recomputing' * recomputes}{', dora' * dora}": Case(
        way=way, method=method, dtype=dtype, recomputes=recomputes, lora={"use_dora": dora}
    )
    for way in ("lean", "unfused", "padded")
    for method in (Method.LORA, Method.QLORA)
    for dtype in ("bfloat16", "float16", "float32")
    for recomputes in (True, False)
    for dora in (True, False)
}
"""All that can be combined, for `make test-long`."""


@contextlib.contextmanager
def fault(name: str) -> Iterator[None]:
    """Put a fault into the engine, which its own tests on a processor might not see."""
    borders, backward, kernel = attention.borders_of, fused._Product.backward, varlen.varlen_attn
    faults: dict[str, tuple[Any, str, Any]] = {
        "a tensor on the processor": (
            attention,
            "borders_of",
            lambda lengths, _: borders(lengths, torch.device("cpu")),
        ),
        "mixed types": (varlen, "varlen_attn", lambda q, *others, **sides: kernel(q.float(), *others, **sides)),
        "a gradient that is lost": (
            fused._Product,
            "backward",
            staticmethod(lambda ctx, given: (*backward(ctx, given)[:-1], None)),
        ),
    }
    with patch.object(*faults[name]):
        yield


FAULTS = ("a tensor on the processor", "mixed types", "a gradient that is lost")
