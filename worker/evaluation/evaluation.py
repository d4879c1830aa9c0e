"""Base against tuned on the held-out rows: losses, generated answers, and how sure the difference is.

Both are measured on the same weights in one process: the base is the model with its adapter switched off.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from loractl.common.data.rows import Example
from loractl.common.job.spec import DataFormat, JobSpec, Metric
from loractl.worker.base.arithmetic import evaluating, whole_modules
from loractl.worker.base.gauge import is_out_of_memory, release
from loractl.worker.data.batch import collate
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.tokens import IGNORED, TokenRow, prompt_of

from .confusion import Labels, labels_taught
from .dialogue import Answered, answers_of
from .statistics import Array, paired_interval

if TYPE_CHECKING:
    from .harness import Benchmarks

MIN_CASES = 8
"""Fewer cases are too few for a bootstrap interval: its ends are then little more than the rows themselves."""

LABEL_SLACK = 2
"""Tokens beyond the longest label: for its end, and to see that an answer goes on."""

ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}

Reading = Literal["better", "worse", "no clear change", "too few cases"]


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
class Turns:
    """The mean loss of the answers that stand at one place of their conversations, in nats a token."""

    turn: int
    cases: int
    base: float
    tuned: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the report says of the comparison."""

    metrics: list[Compared]
    answers: list[Answer]
    rows: int
    seconds: float
    row_losses: list[tuple[int, int, float, float]]
    """(row, learned tokens, summed loss of base, of tuned in nats): with them two jobs are compared row by row."""
    labels: Labels | None = None
    turns: list[Turns] = field(default_factory=list)
    baseline: str | None = None  # what `base` is where it is not the base model
    benchmarks: Benchmarks | None = None  # of the lm-eval harness, where the job names tasks


def evaluate(
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    spec: JobSpec,
    compute: torch.dtype,
    check_stop: Callable[[], None],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation:
    """Score base and tuned on the held-out rows, and generate answers of each.

    Answers: of the first `evaluation.samples` rows in full; where answers are labels, of every row, as long as a label.
    """
    began = time.monotonic()
    asked = spec.evaluation
    work = Work.of(data, spec, tokenizer)
    total, done = 2 * work.passes, 0

    def tick(count: int) -> None:
        nonlocal done
        check_stop()
        done += count
        progress(done, total)

    found: dict[str, _Found] = {}
    for name in ("base", "tuned"):
        with evaluating(model, base=name == "base"), whole_modules(model, compute):

            def score(rows: list[TokenRow]) -> RowScores:
                return score_rows(model, tokenizer, rows, asked.per_device_eval_batch_size, tick)

            def answer(prompts: list[Prompt], longest: int) -> list[tuple[str, bool]]:
                ids = [prompt.ids for prompt in prompts]
                return generate(model, tokenizer, ids, asked.per_device_eval_batch_size, longest, tick)

            found[name] = _Found(
                rows=score(work.rows),
                whole=score([turn.whole for turn in work.turns]),
                alone=score([turn.alone for turn in work.turns if turn.alone is not None]),
                regression=score(work.regression),
                texts=answer(work.prompts, asked.max_new_tokens),
                labels=answer(work.labelled, work.label_tokens),
            )
    base, tuned = found["base"], found["tuned"]
    answers = [
        Answer(
            row=prompt.row,
            prompt=prompt.shown,
            expected=prompt.expected,
            base=of_base[0],
            base_ended=of_base[1],
            tuned=of_tuned[0],
            tuned_ended=of_tuned[1],
        )
        for prompt, of_base, of_tuned in zip(work.prompts, base.texts, tuned.texts, strict=True)
    ]
    labels = None
    if work.labelled:
        expected = [prompt.expected for prompt in work.labelled]
        labels = Labels.of(work.labels, expected, *([text for text, _ in one.labels] for one in (base, tuned)))
    return Evaluation(
        metrics=_compare(base, tuned, work, answers, labels, spec, data.format),
        answers=answers,
        rows=len(work.rows),
        seconds=time.monotonic() - began,
        row_losses=[
            (row.number, int(tokens), round(float(b), 6), round(float(t), 6))
            for row, tokens, b, t in zip(work.rows, base.rows.tokens, base.rows.loss, tuned.rows.loss, strict=True)
        ],
        labels=labels,
        turns=_by_turn(work.turns, base.whole, tuned.whole),
    )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A held-out row's question, as it is given to the model and as it is shown, and the answer that is expected."""

    row: int
    ids: list[int]
    shown: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """What base and tuned are both measured on."""

    rows: list[TokenRow]
    prompts: list[Prompt]
    labels: list[str]
    labelled: list[Prompt]
    label_tokens: int
    turns: list[Answered]
    regression: list[TokenRow]
    longest_answer: int

    @classmethod
    def of(cls, data: PreparedData, spec: JobSpec, tokenizer: Any) -> Work:
        asked = spec.evaluation
        examples = data.held_out_examples[: asked.max_rows]
        labels = labels_taught(data.train_examples) if Metric.LABELS in asked.metrics else []
        label_tokens = max((len(tokenizer(name, add_special_tokens=False).input_ids) for name in labels), default=0)
        several = answers_of(examples, tokenizer, spec.dataset.max_length) if Metric.CONTEXT in asked.metrics else []
        return cls(
            rows=data.held_out.rows[: asked.max_rows],
            prompts=_prompts(data.held_out_examples[: asked.samples], tokenizer),
            labels=labels,
            labelled=_prompts(examples, tokenizer) if labels else [],
            label_tokens=label_tokens + LABEL_SLACK,
            turns=several,
            regression=data.regression.rows[: asked.max_rows] if data.regression else [],
            longest_answer=asked.max_new_tokens,
        )

    @property
    def passes(self) -> int:
        """Rows and prompts that one model works on."""
        return len(self.scored) + len(self.prompts) + len(self.labelled)

    @property
    def scored(self) -> list[TokenRow]:
        """Every row that is scored."""
        alone = [turn.alone for turn in self.turns if turn.alone is not None]
        return [*self.rows, *(turn.whole for turn in self.turns), *alone, *self.regression]

    @property
    def tokens(self) -> int:
        """Tokens that pass one model, answers at their longest."""
        answers = len(self.prompts) * self.longest_answer + len(self.labelled) * self.label_tokens
        return sum(len(row.input_ids) for row in self.scored) + answers


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What one model gave."""

    rows: RowScores
    whole: RowScores
    alone: RowScores
    regression: RowScores
    texts: list[tuple[str, bool]]
    labels: list[tuple[str, bool]]


def _prompts(examples: list[Example], tokenizer: Any) -> list[Prompt]:
    found = [(e.number, p) for e in examples if (p := prompt_of(e, tokenizer)) is not None]
    return [Prompt(row=number, ids=ids, shown=shown, expected=expected) for number, (ids, shown, expected) in found]


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """Per row: the summed loss (nats) and count of learned tokens, the same for the end-of-sequence tokens, and how
    many learned tokens were the likeliest."""

    loss: Array
    tokens: Array
    stop_loss: Array
    stops: Array
    right: Array


def score_rows(
    model: Any, tokenizer: Any, rows: list[TokenRow], batch: int, tick: Callable[[int], None] = lambda n: None
) -> RowScores:
    """Cross-entropy of every learned token, in fp32, for a model in eval mode. Longest rows first, so that an
    out-of-memory comes at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    result = np.zeros((5, len(rows)))

    def score(chosen: list[int]) -> None:
        picked = [{"input_ids": rows[i].input_ids, "labels": rows[i].labels} for i in chosen]
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
        found = torch.stack([loss.sum(1), learned.sum(1), (loss * stop).sum(1), stop.sum(1), right.sum(1)])
        result[:, chosen] = found.double().cpu().numpy()
        tick(len(chosen))

    in_batches(order, batch, score)
    names = ("loss", "tokens", "stop_loss", "stops", "right")
    return RowScores(**dict(zip(names, result, strict=True)))


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
    ends = end_ids(model, tokenizer)

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


def _compare(
    base: _Found,
    tuned: _Found,
    work: Work,
    answers: list[Answer],
    labels: Labels | None,
    spec: JobSpec,
    format: DataFormat,
) -> list[Compared]:
    wanted, b, t = set(spec.evaluation.metrics), base.rows, tuned.rows
    found = [measure("loss", "loss", "nats", False, b.loss, t.loss, b.tokens)]
    if Metric.PERPLEXITY in wanted:
        found.append(measure("perplexity", "perplexity", "", False, b.loss, t.loss, b.tokens, np.exp))
    if Metric.TOKEN_ACCURACY in wanted:
        name = "tokens guessed right"
        found.append(measure("token_accuracy", name, "%", True, 100 * b.right, 100 * t.right, b.tokens))
    if format is not DataFormat.TEXT and b.stops.sum() > 0:
        name = "loss on the stop token"
        found.append(measure("stop_token_loss", name, "nats", False, b.stop_loss, t.stop_loss, b.stops))
    if labels is not None:
        right = [
            [one == e for one, e in zip(said, labels.expected, strict=True)] for said in (labels.base, labels.tuned)
        ]
        found.append(share("accuracy", "labels right", *right))
        low_high = labels.macro_f1()
        found.append(interval_of("macro_f1", "macro F1 of the labels", "%", True, len(labels.expected), *low_high))
    if answers:
        found += _of_answers(answers, wanted)
    if work.turns:
        found += _of_turns(work.turns, base, tuned)
    if work.regression:
        name, of = "loss on the regression set", (base.regression, tuned.regression)
        found.append(measure("regression_loss", name, "nats", False, of[0].loss, of[1].loss, of[0].tokens))
    return found


def _of_answers(answers: list[Answer], wanted: set[Metric]) -> list[Compared]:
    found, ones = [], np.ones(len(answers))
    if Metric.EXACT_MATCH in wanted:
        exact = ([a.base_exact for a in answers], [a.tuned_exact for a in answers])
        found.append(share("exact_match", "exact match", *exact))
    if Metric.ROUGE in wanted:
        expected = [a.expected for a in answers]
        base, tuned = rouge([a.base for a in answers], expected), rouge([a.tuned for a in answers], expected)
        for kind, label in ROUGE.items():
            found.append(measure(kind, label, "%", True, base[kind], tuned[kind], ones))
    ended = ([a.base_ended for a in answers], [a.tuned_ended for a in answers])
    return [*found, share("ends_by_itself", "answers that end by themselves", *ended)]


def _of_turns(turns: list[Answered], base: _Found, tuned: _Found) -> list[Compared]:
    """Answers that come after others: their loss, and by how much it rises without what was said before."""
    later = [n for n, turn in enumerate(turns) if turn.alone is not None]
    if not later:
        return []
    weight = base.whole.tokens[later]
    whole = base.whole.loss[later], tuned.whole.loss[later]
    # an answer's tokens are the same with and without its context, but for what a border merges
    alone = (one.alone.loss / one.alone.tokens * weight for one in (base, tuned))
    gains = [without - within for without, within in zip(alone, whole, strict=True)]
    return [
        measure("later_answers_loss", "loss on later answers", "nats", False, whole[0], whole[1], weight),
        measure("context_gain", "worth of earlier turns", "nats", True, gains[0], gains[1], weight),
    ]


def _by_turn(turns: list[Answered], base: RowScores, tuned: RowScores) -> list[Turns]:
    found = []
    for number in sorted({turn.turn for turn in turns}):
        here = [n for n, turn in enumerate(turns) if turn.turn == number]
        means = [float(one.loss[here].sum() / one.tokens[here].sum()) for one in (base, tuned)]
        found.append(Turns(turn=number, cases=len(here), base=means[0], tuned=means[1]))
    return found


def share(name: str, label: str, base: list[bool], tuned: list[bool]) -> Compared:
    """How many rows each does right, in percent."""
    return measure(
        name, label, "%", True, 100 * np.array(base, float), 100 * np.array(tuned, float), np.ones(len(base))
    )


def measure(
    name: str,
    label: str,
    unit: str,
    higher: bool,
    base: Array,
    tuned: Array,
    weight: Array,
    transform: Callable[[Array], Array] = lambda x: x,
) -> Compared:
    """A metric that is a sum over rows by a sum of weights; rows of no weight are no cases."""
    cases = int((weight > 0).sum())
    return interval_of(name, label, unit, higher, cases, *paired_interval(base, tuned, weight, transform))


def interval_of(
    name: str, label: str, unit: str, higher: bool, cases: int, base: float, tuned: float, low: float, high: float
) -> Compared:
    """A metric whose interval is known already."""
    return Compared(
        name=name,
        label=label,
        unit=unit,
        higher_is_better=higher,
        cases=cases,
        base=base,
        tuned=tuned,
        low=low,
        high=high,
    )


def rouge(texts: Sequence[str], expected: Sequence[str]) -> dict[str, Array]:
    """F1 in percent of each kind of ROUGE, by Google's rouge-score with stemming off."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE))
    scores = [scorer.score(e, text) for e, text in zip(expected, texts, strict=True)]
    return {kind: np.array([100 * score[kind].fmeasure for score in scores]) for kind in ROUGE}


def _same(answer: str, expected: str) -> bool:
    """Exact match: equal after whitespace is folded."""
    return " ".join(answer.split()) == " ".join(expected.split())


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model is configured with."""
    configured = model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    return {tokenizer.eos_token_id, *(token for token in more if token is not None)}
