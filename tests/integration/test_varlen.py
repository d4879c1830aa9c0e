"""Rows of any lengths in one kernel. No processor has it: plain products of what it should compute stand in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as torch_varlen
from transformers import MistralConfig, MistralModel

from loractl.common.units import GIB
from loractl.worker.base.shared_heads import kind_of
from loractl.worker.engine.passes import attention
from loractl.worker.engine.passes.attention import RowLayout
from loractl.worker.protocol.messages import Note

from .conftest import Recipe

CPU = torch.device("cpu")


class StandIn:
    """FlashAttention's kernel for rows of any lengths, by plain products."""

    def __init__(self) -> None:
        self.there, self.calls, self.wrong = False, 0, 1.0

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *how: Any) -> Any:
        if not self.there:
            raise NotImplementedError("no such kernel on a processor")
        self.calls += 1
        answer = torch.empty_like(query)
        for row, _, _, v, chances in self._rows(query, key, value, *how):
            answer[row] = (chances @ v).transpose(0, 1).to(query.dtype) * self.wrong
        return answer, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)

    def backward(self, given: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _, begin_q, begin_k, max_q, max_k, causal, _, scale, window = arguments
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        rows = self._rows(query, key, value, begin_q, begin_k, max_q, max_k, causal, scale, window)
        for row, q, k, v, chances in rows:
            of_seen = given[row].float().transpose(0, 1)
            of_chances = of_seen @ v.transpose(1, 2)
            of_scores = chances * (of_chances - (of_chances * chances).sum(-1, keepdim=True)) * factor
            parts = of_scores @ k, of_scores.transpose(1, 2) @ q, chances.transpose(1, 2) @ of_seen
            for to, part in zip(found, parts, strict=True):  # heads of a group have one key and one value
                to[row] = part.unflatten(0, (to.shape[1], -1)).sum(1).transpose(0, 1).to(to.dtype)
        return found

    @staticmethod
    def _rows(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, begin_q: torch.Tensor, begin_k: torch.Tensor,
        max_q: int, max_k: int, causal: bool, scale: float | None, window: list[int], *_: Any,
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:  # fmt: skip
        assert begin_q.dtype == torch.int32 and bool((begin_q == begin_k).all()) and max_q == max_k
        before, after = window
        assert causal == (window == [-1, 0]) and after == 0
        for begin, end in itertools.pairwise(begin_q.tolist()):
            assert end - begin <= max_q
            q, k, v = (one[begin:end].float().transpose(0, 1) for one in (query, key, value))
            k, v = (one.repeat_interleave(len(q) // len(one), 0) for one in (k, v))
            at = torch.arange(end - begin)
            behind = at[:, None] - at[None]  # so many tokens is the key behind the query
            seen = (behind >= 0) & ((behind <= before) | torch.tensor(before < 0))
            scores = q @ k.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
            yield slice(begin, end), q, k, v, scores.masked_fill(~seen, float("-inf")).softmax(-1)


STAND_IN = StandIn()
torch_varlen._varlen_attn.register_kernel("cpu")(STAND_IN.forward)
torch_varlen._varlen_attn_backward.register_kernel("cpu")(STAND_IN.backward)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """As if a processor were a card that has the kernel."""
    attention.why_no_kernel.cache_clear()
    monkeypatch.setattr(attention, "PLACES", ("cpu",))
    monkeypatch.setattr(STAND_IN, "there", True)
    monkeypatch.setattr(STAND_IN, "calls", 0)
    yield STAND_IN
    attention.why_no_kernel.cache_clear()


@pytest.mark.long
@pytest.mark.parametrize("window", [None, 4, 40])
def test_a_model_computes_the_same_by_one_kernel_as_row_by_row(
    window: int | None, kernel: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = passed(window)
    assert kernel.calls == 3  # its check of itself, and two layers
    monkeypatch.setattr(attention, "PLACES", ())
    attention.why_no_kernel.cache_clear()
    by_row = passed(window)
    assert kernel.calls == 3
    for ours, theirs in zip(at_once, by_row, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.long
def test_a_block_that_is_recomputed_may_be_the_first_that_asks_for_the_kernel(kernel: StandIn) -> None:
    recomputed = passed(None, recomputes=True)
    assert kernel.calls == 5  # its check of itself, and two layers twice
    for ours, theirs in zip(recomputed, passed(None), strict=True):
        torch.testing.assert_close(ours, theirs)


def passed(window: int | None, *, recomputes: bool = False) -> list[torch.Tensor]:
    """The hidden states of three rows of a small model, and the gradients of its first layer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": window}
    model = MistralModel(MistralConfig(**shape, **heads, attn_implementation="sdpa"))
    if recomputes:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    lengths = [7, 1, 12]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with RowLayout(model).of(lengths):
        hidden = model(input_ids=torch.arange(20)[None], position_ids=positions, use_cache=False).last_hidden_state
        hidden.pow(3).sum().backward()
    attention = model.layers[0].self_attn
    return [hidden, *(one.weight.grad for one in (attention.q_proj, attention.k_proj, attention.v_proj))]


def test_what_autocast_computes_in_is_what_the_kernel_is_given(kernel: StandIn) -> None:
    query, key, value = states = [torch.randn(1, heads, 8, 16, requires_grad=True) for heads in (4, 2, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kind_of(query) == torch.bfloat16
        answer = attention.attend(query, key, value, attention.borders_of([3, 5], CPU), 5, None, None)
    assert answer.dtype == torch.bfloat16 and answer.shape == (1, 8, 4, 16)
    answer.sum().backward()
    assert all(one.grad is not None and one.grad.dtype == torch.float32 for one in states)


def test_a_kernel_that_computes_something_else_is_not_taken(kernel: StandIn) -> None:
    kernel.wrong = 1.1
    try:
        why = attention.why_no_kernel(CPU, torch.bfloat16, 64, False)
    finally:
        kernel.wrong = 1.0
    assert why == "the kernel for rows of any lengths computes something else"


def test_a_device_without_the_kernel_goes_row_by_row_and_says_why(
    kernel: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attention.why_no_kernel(CPU, torch.bfloat16, 64, True) is None
    monkeypatch.setattr(kernel, "there", False)
    attention.why_no_kernel.cache_clear()
    assert attention.why_no_kernel(CPU, torch.bfloat16, 64, True) == WHY


WHY = "the kernel for rows of any lengths does not take these (no such kernel on a processor)"


@pytest.mark.long
@pytest.mark.parametrize(
    ("there", "attention", "batch", "said"),
    [
        (True, "auto", 2, []),
        (False, "auto", 2, [f"attention goes row by row: {WHY}"]),
        (False, "auto", 1, []),
        (True, "eager", 2, ["attention goes row by row: the model's attention is eager, not sdpa"]),
    ],
    ids=["at once", "no kernel", "rows alone", "eager"],
)
def test_the_history_says_why_rows_go_one_by_one(
    there: bool,
    attention: str,
    batch: int,
    said: list[str],
    kernel: StandIn,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "there", there)
    how = {"attn_implementation": attention, "per_device_train_batch_size": batch}
    _, told = recipe(memory_limit=8 * GIB, max_steps=1, evaluation={"samples": 0, "metrics": ["loss"]}, **how)
    notes = [one.text for one in told if isinstance(one, Note) and one.kind == "engine"]
    assert [note for note in notes if "attention" in note] == said
