"""What one model makes of held-out rows: their loss token by token, and answers in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loractl.common.job.sections import Metric
from loractl.worker.base.gauge import in_batches, in_own_thread
from loractl.worker.base.model import Scorer, positions_of
from loractl.worker.data.token_rows import collate
from loractl.worker.data.tokens import IGNORED, TokenRow

from .comparison import Array, Compared, Mask, Measure, judged_apart, percent, with_new_rows

LOSS = Measure(name="loss", label="loss")
NEW_ROWS_LOSS = Measure(name="new_rows_loss", label="loss, rows like none that is trained on")
PERPLEXITY = Measure(name="perplexity", label="perplexity", unit="")
TOKEN_ACCURACY = percent("token_accuracy", "tokens guessed right")
STOP_TOKEN_LOSS = Measure(name="stop_token_loss", label="loss on the stop token")
WORDS_LOSS = Measure(name="words_loss", label="loss without the stop token")


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """Per row: the summed loss (nats) and count of learned tokens, the same for the end-of-sequence tokens, and how
    many learned tokens were the likeliest."""

    loss: Array
    tokens: Array
    stop_loss: Array
    stops: Array
    right: Array

    def among(self, rows: Mask) -> RowScores:
        """Those of some rows."""
        return RowScores(**{name: values[rows] for name, values in vars(self).items()})


def score_rows(
    model: Any,
    tokenizer: Any,
    rows: list[TokenRow],
    batch: int,
    tick: Callable[[int], None] = lambda n: None,
    scorer: Scorer | None = None,
    halved: Callable[[], None] = lambda: None,
    run: Callable[[Callable[[], None]], None] = in_own_thread,
) -> RowScores:
    """Cross-entropy of every learned token, in fp32, for a model in eval mode. Longest rows first, so that an
    out-of-memory comes at once. `halved`: called if that made batches smaller, whose sums round differently. `run` does
    a batch, and `tick` gets its number of rows."""
    order = longest_first(rows)
    result = np.zeros((5, len(rows)))

    def score(chosen: list[int]) -> None:
        picked = [rows[i] for i in chosen]
        sums = _sums(model, tokenizer, picked) if scorer is None else _lean_sums(scorer, tokenizer, picked)
        result[:, chosen] = sums.double().cpu().numpy()

    if in_batches(order, batch, score, run, tick) < batch:
        halved()
    names = ("loss", "tokens", "stop_loss", "stops", "right")
    return RowScores(**dict(zip(names, result, strict=True)))


def longest_first(rows: Sequence[TokenRow]) -> list[int]:
    """The places of rows in the order in which they are scored."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))


def by_example(scores: RowScores, rows: Sequence[TokenRow]) -> RowScores:
    """The scores of each example: the sums over its rows, which follow each other."""
    firsts = [place for place, row in enumerate(rows) if place == 0 or row.number != rows[place - 1].number]
    if len(firsts) == len(rows):
        return scores
    return RowScores(**{name: np.add.reduceat(values, firsts) for name, values in vars(scores).items()})


def _sums(model: Any, tokenizer: Any, rows: list[TokenRow]) -> torch.Tensor:
    """The five numbers of each row of a batch, of shape (5, rows)."""
    picked = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    tensors = {k: v.to(model.device) for k, v in collate(picked, tokenizer.pad_token_id).items()}
    labels = tensors.pop("labels")[:, 1:]
    logits = model(**tensors, use_cache=False).logits[:, :-1]
    learned = labels != IGNORED
    # only the learned positions are copied to fp32: logits of whole rows are the largest tensor of all
    loss = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    right = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    here = logits[learned].float()
    loss[learned] = torch.nn.functional.cross_entropy(here, labels[learned], reduction="none")
    right[learned] = here.argmax(-1) == labels[learned]
    stop = learned & (labels == tokenizer.eos_token_id)
    return torch.stack([loss.sum(1), learned.sum(1), (loss * stop).sum(1), stop.sum(1), right.sum(1)])


def _lean_sums(scorer: Scorer, tokenizer: Any, rows: list[TokenRow]) -> torch.Tensor:
    """Those five numbers, of shape (5, rows), without logits of whole rows."""
    sums = torch.zeros((5, len(rows)), dtype=torch.float64)
    for scored in scorer.scores(rows):
        stop = scored.targets == tokenizer.eos_token_id
        one = torch.ones_like(scored.losses)
        each = torch.stack([scored.losses, one, scored.losses * stop, one * stop, one * scored.right])
        sums.index_add_(1, scored.rows.cpu(), each.double().cpu())
    return sums


def loss_metrics(
    base: RowScores,
    tuned: RowScores,
    wanted: set[Metric],
    *,
    stops: bool,
    given_away: Mask | None = None,
) -> list[Compared]:
    """The loss, and what else the job asks for; `stops`: whether rows have an end that can be learned.

    `given_away`: by example, whether a row to train on gives it away; the loss of the others is reported, too. So is
    the loss of all tokens but the stop token, where the gain is one of that token alone.
    """
    losses = [LOSS.compare(base.loss, tuned.loss, base.tokens)]
    given_away = np.zeros(len(base.loss), bool) if given_away is None else given_away
    if given_away.any() and not given_away.all():
        new = ~given_away
        losses.append(NEW_ROWS_LOSS.compare(base.loss[new], tuned.loss[new], base.tokens[new]))
    metrics = [*losses]
    if Metric.PERPLEXITY in wanted:
        metrics.append(PERPLEXITY.compare(base.loss, tuned.loss, base.tokens, np.exp))
    if Metric.TOKEN_ACCURACY in wanted:
        metrics.append(TOKEN_ACCURACY.compare(100 * base.right, 100 * tuned.right, base.tokens))
    if stops and base.stops.sum() > 0:
        metrics.append(STOP_TOKEN_LOSS.compare(base.stop_loss, tuned.stop_loss, base.stops))
        parts = [(base, tuned)]
        if judged_apart(given_away):
            parts.append((base.among(~given_away), tuned.among(~given_away)))
        words = with_new_rows(*([_without_stop_token(*part)] for part in parts))
        pairs = zip(losses, words, strict=False)  # too few rows to judge by have a loss alone
        if any(loss.reading == "better" and rest.cases and rest.reading != "better" for loss, rest in pairs):
            metrics += words
    return metrics


def _without_stop_token(base: RowScores, tuned: RowScores) -> Compared:
    before, after = base.loss - base.stop_loss, tuned.loss - tuned.stop_loss
    return WORDS_LOSS.compare(before, after, base.tokens - base.stops)


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
    if not prompts:
        return []
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
