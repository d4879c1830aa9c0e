"""Answers to the rows of a file, as many at once as the batch holds."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator

from loractl.common.data.questions import Question
from loractl.common.errors import UsageError
from loractl.worker.data.tokens import message_of

from .conversation import Conversation, PartialAnswer
from .outcome import Outcome

AHEAD = 64
"""Requests that wait for a place in the batch."""

MOST = 1024
"""Answers in memory: those that are ready wait for the ones before them."""


def answer_rows(conversation: Conversation, questions: Iterable[Question]) -> Iterator[Outcome]:
    """An answer for each question, in their order. A row that can't be answered has its error."""
    pending: deque[tuple[int, PartialAnswer]] = deque()
    for question in questions:
        pending.append((question.number, _ask(conversation, question)))
        while conversation.engine.waiting >= AHEAD or len(pending) >= MOST:
            conversation.engine.step()
            yield from _ready(pending)
    while pending:
        conversation.engine.step()
        yield from _ready(pending)


def _ask(conversation: Conversation, question: Question) -> PartialAnswer:
    answer = PartialAnswer()
    try:
        messages = [message_of(turn, conversation.pool.tokenizer) for turn in question.turns]
        conversation.ask(messages, answer.take, json.loads(question.tools) if question.tools else None)
    except UsageError as error:  # too long, or the chat template refuses it
        answer.error = error.sentence
    return answer


def _ready(pending: deque[tuple[int, PartialAnswer]]) -> Iterator[Outcome]:
    """The answers at the head that are complete."""
    while pending and (pending[0][1].ended or pending[0][1].error):
        row, answer = pending.popleft()
        if answer.error:
            yield Outcome(row=row, error=answer.error)
        else:
            yield Outcome(row=row, answer=answer.text, ended=answer.ended)
