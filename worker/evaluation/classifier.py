"""A classifier on held-out rows: its head's answers, against always naming the most frequent label.

Its base model has no head, and an untrained head answers noise, which is easy to beat. So the baseline is a classifier
that reads no text: it always names the most frequent label of the training rows, and its confidence in each label is
that label's share of those rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from loractl.common.job.sections import Metric
from loractl.worker.base.gauge import in_batches, in_own_thread
from loractl.worker.base.model import measuring
from loractl.worker.data.token_rows import collate, inputs_of
from loractl.worker.data.tokens import TokenRow

from .cheap import form_metrics
from .comparison import Array, Compared, Labels, Mask, judged_apart, label_metrics, with_new_rows
from .evaluation import Evaluation, EvaluationTask, counter
from .row_losses import LOSS, NEW_ROWS_LOSS

BASELINE = "the most frequent label"


def evaluate_classifier(task: EvaluationTask) -> Evaluation:
    """Score the head on the held-out rows, next to the baseline that reads no text."""
    began, learner, data, spec = time.monotonic(), task.learner, task.data, task.spec
    model, pad, batch = learner.model, learner.tokenizer.pad_token_id, spec.evaluation.per_device_eval_batch_size
    rows = data.held_out.rows[: spec.evaluation.max_rows]

    def run(work: Callable[[], None]) -> None:
        in_own_thread(partial(measuring, learner, work))

    logits = classify(model, pad, rows, batch, counter(task, len(rows)), run)
    expected: Array = np.array([row.label for row in rows], dtype=np.int64)
    counts = np.bincount(data.train.rows.class_labels, minlength=len(data.label_names))
    shares: Array = counts / counts.sum()  # of the training rows; none is zero
    majority = int(shares.argmax())
    losses = -np.log(shares)[expected], row_losses(logits, expected)
    labels = Labels(
        names=list(data.label_names),
        expected=expected.tolist(),
        base=[majority] * len(rows),
        tuned=logits.argmax(1).tolist(),
    )
    wanted, each = Metric.LABELS in spec.evaluation.metrics, np.ones(len(rows))
    numbers = np.array([row.number for row in rows])
    given_away = np.isin(numbers, data.held_out.given_away)
    metrics = [LOSS.compare(*losses, each)]
    if given_away.any() and not given_away.all():
        new = ~given_away
        metrics.append(NEW_ROWS_LOSS.compare(losses[0][new], losses[1][new], each[new]))

    def measured(some: Mask) -> list[Compared]:
        part = labels.among(some)
        return [*label_metrics(part), *form_metrics(data.held_out.rule, numbers[some].tolist(), part)]

    if wanted:
        parts = [np.ones_like(given_away), *([~given_away] if judged_apart(given_away) else [])]
        metrics += with_new_rows(*map(measured, parts))
    return Evaluation(
        metrics=metrics,
        answers=[],
        rows=len(rows),
        seconds=time.monotonic() - began,
        row_losses=[
            (row.number, 1, round(float(base), 6), round(float(tuned), 6))
            for row, base, tuned in zip(rows, *losses, strict=True)
        ],
        labels=labels if wanted else None,
        baseline=f"{BASELINE}, {data.label_names[majority]}",
        against=BASELINE,
        given_away=int(given_away.sum()),
    )


def classify(
    model: Any,
    pad: int,
    rows: Sequence[TokenRow],
    batch: int,
    tick: Callable[[int], None] = lambda n: None,
    run: Callable[[Callable[[], None]], None] = in_own_thread,
) -> Array:
    """The head's logits for each row, float64 of shape (rows, labels), for a model in eval mode. Longest rows first, so
    that an out-of-memory comes at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    answered: dict[int, Array] = {}

    def work(chosen: list[int]) -> None:
        tensors = collate([inputs_of(rows[i]) for i in chosen], pad)
        del tensors["labels"]
        logits = model(**{name: t.to(model.device) for name, t in tensors.items()}, use_cache=False).logits
        answered.update(zip(chosen, logits.double().cpu().numpy(), strict=True))

    in_batches(order, batch, work, run, tick)
    return np.stack([answered[place] for place in range(len(rows))])


def row_losses(logits: Array, expected: Array) -> Array:
    """Cross-entropy of each row in nats."""
    top = logits.max(1, keepdims=True)
    whole = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    return np.asarray(whole - logits[np.arange(len(expected)), expected])
