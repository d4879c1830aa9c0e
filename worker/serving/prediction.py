"""Labels a file's rows with a stored classifier, or answers them with a stored adapter."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from loractl.common.adapter_config import CONFIG, check_adapter_config
from loractl.common.data.questions import Question
from loractl.common.errors import UsageError
from loractl.worker.base.adapter import WEIGHTS, load_stored, read_labels
from loractl.worker.base.arithmetic import choose_precision, compute_in, evaluating, whole_modules
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import Head, Learner, load_base, load_tokenizer
from loractl.worker.base.source import family_of
from loractl.worker.data.tokens import TokenRow, message_of
from loractl.worker.evaluation.classifier import classify
from loractl.worker.evaluation.comparison import Array

from .card import Footprint, take_card
from .conversation import Conversation, PartialAnswer
from .library import Library, Listed


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A label with its probability, an answer with its ending, or why there is neither."""

    row: int  # its line in jsonl, else its number, from 1
    label: str | None = None
    probability: float | None = None
    answer: str | None = None
    ended: str | None = None  # stop or length
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """What is known about the row; keys without a value are left out."""
        return {key: value for key, value in vars(self).items() if value is not None}


AHEAD = 64
"""Requests that wait for a place in the batch."""

MOST = 1024
"""Answers in memory: finished answers wait for earlier ones."""


def answer_rows(conversation: Conversation, questions: Iterable[Question]) -> Iterator[Outcome]:
    """An answer for each question, in order. A row that can't be answered has its error."""
    pending: deque[tuple[int, PartialAnswer]] = deque()
    for question in questions:
        answer = PartialAnswer()
        try:
            messages = [message_of(turn, conversation.pool.tokenizer) for turn in question.turns]
            conversation.ask(messages, answer.take, json.loads(question.tools) if question.tools else None)
        except UsageError as error:  # too long, or the chat template refuses it
            answer.error = error.sentence
        pending.append((question.number, answer))
        while conversation.engine.waiting >= AHEAD or len(pending) >= MOST:
            conversation.engine.step()
            yield from _ready(pending)
    while pending:
        conversation.engine.step()
        yield from _ready(pending)


def _ready(pending: deque[tuple[int, PartialAnswer]]) -> Iterator[Outcome]:
    """The complete answers at the head."""
    while pending and (pending[0][1].ended or pending[0][1].error):
        row, answer = pending.popleft()
        if answer.error:
            yield Outcome(row=row, error=answer.error)
        else:
            yield Outcome(row=row, answer=answer.text, ended=answer.ended)


WINDOW = 1024
"""Texts read at once: they are labelled in batches of similar length."""

ROOM_BYTES = 2**30
"""Card memory that a batch of texts may take."""


@dataclass(frozen=True, kw_only=True)
class StoredClassifier:
    """A base with a trained head and its adapter, which computes as in training."""

    learner: Learner
    labels: tuple[str, ...]  # in the order of the head
    max_length: int  # tokens; longer texts are cut, as in the training
    batch: int

    def label_rows(self, questions: Iterable[Question]) -> Iterator[Outcome]:
        """The likeliest label of each text, in order, with its probability."""
        texts = iter(questions)
        while window := list(islice(texts, WINDOW)):
            yield from self._label(window)

    def _label(self, questions: list[Question]) -> Iterator[Outcome]:
        rows = [self._tokens(question) for question in questions]
        readable, model = [row for row in rows if row.input_ids], self.learner.model
        shares: Iterator[Array] = iter(())
        if readable:
            with evaluating(model), whole_modules(model, self.learner.precision.base):
                shares = iter(_softmax(classify(model, self.learner.tokenizer.pad_token_id, readable, self.batch)))
        for row in rows:
            if not row.input_ids:
                yield Outcome(row=row.number, error="the model's tokenizer turns this text into no token")
                continue
            share = next(shares)
            best = int(share.argmax())
            # as many decimals as other texts in the batch leave alone: they moved 16-bit probabilities by 0.002
            decimals = 4 if self.learner.precision.base is torch.float32 else 2
            yield Outcome(row=row.number, label=self.labels[best], probability=round(float(share[best]), decimals))

    def _tokens(self, question: Question) -> TokenRow:
        ids = self.learner.tokenizer(question.text, truncation=True, max_length=self.max_length).input_ids
        return TokenRow(number=question.number, input_ids=list(ids), labels=[], label=0)


def open_classifier(
    library: Library, adapter: Listed, gpu: str | None, tell: Callable[[str], None], warn: Callable[[str], None]
) -> StoredClassifier:
    """Load the base of a classifier like its job did, with the trained head. Raises LoractlError."""
    spec, method, revision = adapter.spec, adapter.method, library.revision(adapter)
    for sentence in library.warnings_about([adapter]):
        warn(sentence)
    folder = library.fetch(adapter)
    check_adapter_config(folder / CONFIG)
    labels = read_labels(folder)
    footprint = Footprint.of((spec.base_model, revision), adapter.arithmetic, adapter.size, cache=ROOM_BYTES)
    device = take_card(library.settings, library.store, gpu, footprint)
    run_code = library.may_run_code(adapter)
    precision = choose_precision(device, adapter.arithmetic.on(device).dtype, family_of(spec.base_model, revision))
    tokenizer = load_tokenizer(spec.base_model, revision, run_code=run_code)
    head = Head(labels=labels, pad=tokenizer.pad_token_id, seed=0)
    base = load_base(spec.base_model, method, device, precision, revision, run_code=run_code, head=head)
    begun = spec.lora.model_copy(update={"init_lora_weights": "default"})  # the stored weights replace them
    steps = spec.training.model_copy(update={"exact": adapter.exact})
    model = add_adapter(base, spec.model_copy(update={"lora": begun, "training": steps}), method)
    load_stored(model, folder / WEIGHTS)
    compute_in(model, precision)
    tell(f"{spec.base_model.rpartition('/')[2]} is loaded with a head of {len(labels)} labels.")
    return StoredClassifier(
        learner=Learner(model=model.eval(), tokenizer=tokenizer, precision=precision),
        labels=labels,
        max_length=spec.dataset.max_length,
        batch=spec.evaluation.per_device_eval_batch_size,
    )


def _softmax(logits: Array) -> Array:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True))
