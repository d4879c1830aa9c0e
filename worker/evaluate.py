"""Base against tuned on the held-out rows: losses, generated answers, and how sure the difference is.

Both are measured on the same weights in one process: the base is the model with its adapter switched off.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from loractl.common.spec import DataFormat, JobSpec, Metric

from .data import IGNORED, PreparedData, TokenRow, collate, prompt_of
from .memory import is_out_of_memory, release
from .model import evaluating

BOOTSTRAP_SAMPLES = 10_000
BOOTSTRAP_SEED = 7
_DRAWS_AT_ONCE = 100  # keeps a hundred thousand rows within 80 MB

MIN_CASES = 8
"""Fewer cases are too few for a bootstrap interval: its ends are then little more than the rows themselves."""

Reading = Literal["better", "worse", "no clear change", "too few cases"]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One metric of base and tuned, with a 95% interval of the change from paired bootstrap samples."""

    name: str
    label: str
    unit: str  # nats, %, ...
    higher_is_better: bool
    cases: int
    base: float
    tuned: float
    low: float
    high: float

    @property
    def change(self) -> float:
        return self.tuned - self.base

    @property
    def reading(self) -> Reading:
        if self.cases < MIN_CASES:
            return "too few cases"
        if not all(map(math.isfinite, (self.change, self.low, self.high))) or self.low <= 0 <= self.high:
            return "no clear change"
        return "better" if (self.change > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One held-out row, answered by base and tuned."""

    row: int
    prompt: str
    expected: str
    base: str
    tuned: str
    base_ended: bool  # stopped by itself rather than at max_new_tokens
    tuned_ended: bool

    @property
    def base_exact(self) -> bool:
        return _same(self.base, self.expected)

    @property
    def tuned_exact(self) -> bool:
        return _same(self.tuned, self.expected)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the report says of the comparison."""

    metrics: list[Compared]
    answers: list[Answer]
    rows: int
    seconds: float


def evaluate(
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    spec: JobSpec,
    check_stop: Callable[[], None],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation:
    """Score base and tuned on the held-out rows and generate `evaluation.samples` answers of each."""
    began = time.monotonic()
    rows = data.held_out.rows[: spec.evaluation.max_rows]
    examples = data.held_out_examples[: spec.evaluation.samples]
    batch = spec.evaluation.per_device_eval_batch_size
    prompts = [(e.number, p) for e in examples if (p := prompt_of(e, tokenizer)) is not None]
    total, done = 2 * (len(rows) + len(prompts)), 0

    def tick(count: int) -> None:
        nonlocal done
        check_stop()
        done += count
        progress(done, total)

    scores, texts = {}, {}
    for name in ("base", "tuned"):
        with evaluating(model, base=name == "base"):
            scores[name] = score_rows(model, tokenizer, rows, batch, tick)
            ids = [prompt[0] for _, prompt in prompts]
            texts[name] = generate(model, tokenizer, ids, batch, spec.evaluation.max_new_tokens, tick)
    answers = [
        Answer(
            row=number,
            prompt=shown,
            expected=expected,
            base=base[0],
            base_ended=base[1],
            tuned=tuned[0],
            tuned_ended=tuned[1],
        )
        for (number, (_, shown, expected)), base, tuned in zip(prompts, texts["base"], texts["tuned"], strict=True)
    ]
    metrics = _compare(scores["base"], scores["tuned"], answers, spec, data.format)
    return Evaluation(metrics=metrics, answers=answers, rows=len(rows), seconds=time.monotonic() - began)


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """Per row: the summed loss (nats) and count of learned tokens, and the same for the end-of-sequence tokens."""

    loss: Array
    tokens: Array
    stop_loss: Array
    stops: Array


def score_rows(
    model: Any, tokenizer: Any, rows: list[TokenRow], batch: int, tick: Callable[[int], None] = lambda n: None
) -> RowScores:
    """Cross-entropy of every learned token, in fp32, for a model in eval mode. Longest rows first, so that an
    out-of-memory comes at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    result = np.zeros((4, len(rows)))

    def score(chosen: list[int]) -> None:
        picked = [{"input_ids": rows[i].input_ids, "labels": rows[i].labels} for i in chosen]
        tensors = {k: v.to(model.device) for k, v in collate(picked, tokenizer.pad_token_id).items()}
        labels = tensors.pop("labels")[:, 1:]
        logits = model(**tensors, use_cache=False).logits[:, :-1]
        learned = labels != IGNORED
        # only the learned positions are copied to fp32: logits of whole rows are the largest tensor of all
        loss = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        loss[learned] = torch.nn.functional.cross_entropy(logits[learned].float(), labels[learned], reduction="none")
        stop = learned & (labels == tokenizer.eos_token_id)
        found = torch.stack([loss.sum(1), learned.sum(1), (loss * stop).sum(1), stop.sum(1)])
        result[:, chosen] = found.double().cpu().numpy()
        tick(len(chosen))

    in_batches(order, batch, score)
    return RowScores(loss=result[0], tokens=result[1], stop_loss=result[2], stops=result[3])


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    batch: int,
    max_new_tokens: int,
    tick: Callable[[int], None] = lambda n: None,
) -> list[tuple[str, bool]]:
    """(answer, ended by itself) for each prompt: greedy, in left-padded batches of similar length."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list[tuple[str, bool]] = [("", False)] * len(prompts)
    ends = _end_ids(model, tokenizer)

    def answer(chosen: list[int]) -> None:
        longest = len(prompts[chosen[0]])
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompts[i])) + prompts[i] for i in chosen])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            use_cache=True,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
        )
        for place, tokens in zip(chosen, out[:, longest:].tolist(), strict=True):
            end = next((n for n, token in enumerate(tokens) if token in ends), None)
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
            answers[place] = (text, end is not None)
        tick(len(chosen))

    in_batches(order, batch, answer)
    return answers


def in_batches(order: list[int], batch: int, work: Callable[[list[int]], None]) -> int:
    """Do the work on `batch` items at a time; out of memory halves the batch, down to one. Returns the last size.

    A training must not be lost because its evaluation takes larger batches than it did itself.
    """
    start = 0
    while start < len(order):
        chosen = order[start : start + batch]
        try:
            work(chosen)
        except Exception as error:
            if len(chosen) == 1 or not is_out_of_memory(error):
                raise
        else:
            start += batch
            continue
        batch = len(chosen) // 2
        release()  # outside of the handler: until it ends, the error's traceback holds the tensors
    return batch


def paired_interval(
    base: Array, tuned: Array, weight: Array, transform: Callable[[Array], Array] = lambda x: x
) -> tuple[float, float, float, float]:
    """(base, tuned, low, high): means sum(x)/sum(weight) and the 95% percentile interval of tuned - base.

    Rows are drawn with replacement, the same rows for both (Efron and Tibshirani 1993, chapter 13).
    """
    n, rng = len(weight), np.random.default_rng(BOOTSTRAP_SEED)
    drawn = []
    for _ in range(BOOTSTRAP_SAMPLES // _DRAWS_AT_ONCE):
        draws = rng.multinomial(n, np.full(n, 1 / n), size=_DRAWS_AT_ONCE).astype(np.float64)
        drawn.append(draws @ np.stack([weight, base, tuned], axis=1))
    totals = np.concatenate(drawn)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        changes = transform(totals[:, 2] / totals[:, 0]) - transform(totals[:, 1] / totals[:, 0])
        means = [float(transform(np.array([values.sum() / weight.sum()]))[0]) for values in (base, tuned)]
    low, high = np.nanpercentile(changes, [2.5, 97.5])
    return means[0], means[1], float(low), float(high)


def _compare(
    base: RowScores, tuned: RowScores, answers: list[Answer], spec: JobSpec, format: DataFormat
) -> list[Compared]:
    wanted = set(spec.evaluation.metrics)
    found = [_metric("loss", "loss", "nats", False, base.loss, tuned.loss, base.tokens)]
    if Metric.PERPLEXITY in wanted:
        found.append(_metric("perplexity", "perplexity", "", False, base.loss, tuned.loss, base.tokens, np.exp))
    if format is not DataFormat.TEXT and base.stops.sum() > 0:
        found.append(
            _metric(
                "stop_token_loss", "loss on the stop token", "nats", False, base.stop_loss, tuned.stop_loss, base.stops
            )
        )
    if answers:
        ones = np.ones(len(answers))
        if Metric.EXACT_MATCH in wanted:
            found.append(
                _share("exact_match", "exact match", [a.base_exact for a in answers], [a.tuned_exact for a in answers])
            )
        if Metric.ROUGE in wanted:
            b, t = _rouge([a.base for a in answers], answers), _rouge([a.tuned for a in answers], answers)
            found.append(_metric("rougeL", "ROUGE-L", "%", True, b, t, ones))
        found.append(
            _share(
                "ends_by_itself",
                "answers that end by themselves",
                [a.base_ended for a in answers],
                [a.tuned_ended for a in answers],
            )
        )
    return found


def _share(name: str, label: str, base: list[bool], tuned: list[bool]) -> Compared:
    return _metric(
        name, label, "%", True, 100 * np.array(base, float), 100 * np.array(tuned, float), np.ones(len(base))
    )


def _metric(
    name: str,
    label: str,
    unit: str,
    higher: bool,
    base: Array,
    tuned: Array,
    weight: Array,
    transform: Callable[[Array], Array] = lambda x: x,
) -> Compared:
    b, t, low, high = paired_interval(base, tuned, weight, transform)
    cases = int((weight > 0).sum())
    return Compared(
        name=name, label=label, unit=unit, higher_is_better=higher, cases=cases, base=b, tuned=t, low=low, high=high
    )


def _rouge(texts: list[str], answers: list[Answer]) -> Array:
    """ROUGE-L F1 in percent, by Google's rouge-score with stemming off."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return np.array(
        [100 * scorer.score(a.expected, text)["rougeL"].fmeasure for a, text in zip(answers, texts, strict=True)]
    )


def _same(answer: str, expected: str) -> bool:
    """Exact match: equal after whitespace is folded."""
    return " ".join(answer.split()) == " ".join(expected.split())


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    return {tokenizer.eos_token_id, *(token for token in more if token is not None)}
