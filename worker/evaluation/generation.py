"""Generated text, in batches, for the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loractl.worker.base.gauge import in_batches, in_own_thread
from loractl.worker.base.model import positions_of


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    batch: int,
    max_new_tokens: int,
    tick: Callable[[int], None] = lambda n: None,
    between: Callable[[], None] | None = None,
    halved: Callable[[], None] = lambda: None,
    run: Callable[[Callable[[], None]], None] = in_own_thread,
) -> list[tuple[str, bool]]:
    """(answer, ended by itself) for each prompt: greedy, in left-padded batches of similar length.

    Where the model has a table of positions, a batch's answers end with it: each prompt must leave room for a token.
    `between`: called after each token of a batch; its errors come through. `halved`, `run`: see score_rows.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list[tuple[str, bool]] = [("", False)] * len(prompts)
    ends, positions = end_ids(model, tokenizer), positions_of(model)

    def answer(chosen: list[int]) -> None:
        longest = len(prompts[chosen[0]])
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompts[i])) + prompts[i] for i in chosen])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens if positions is None else min(max_new_tokens, positions - longest),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            use_cache=True,
            stopping_criteria=None if between is None else [_Between(between)],
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
        )
        for place, tokens in zip(chosen, out[:, longest:].tolist(), strict=True):
            end = next((n for n, token in enumerate(tokens) if token in ends), None)
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
            answers[place] = (text, end is not None)

    if in_batches(order, batch, answer, run, tick) < batch:
        halved()
    return answers


class _Between:
    """Replaces a rule that ends an answer: it ends none."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._call()
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the tokenizer's, and those in the model's config."""
    configured = model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    return {tokenizer.eos_token_id, *(token for token in more if token is not None)}
