"""Conversations of several answers: each answer scored in its context, and again without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loractl.common.data.examples import Example
from loractl.common.job.sections import DataFormat
from loractl.worker.data.tokens import IGNORED, TokenRow, encode

from .comparison import Compared, Measure
from .row_losses import RowScores

LATER_ANSWERS_LOSS = Measure(name="later_answers_loss", label="loss on later answers")
CONTEXT_GAIN = Measure(name="context_gain", label="worth of earlier turns", higher_is_better=None)

MOST_TURNS = 400
"""The most answers scored; conversations beyond that are left out of this part, but not of the others."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One answer of a conversation, as rows in which only this answer is learned."""

    turn: int  # 1 for the first answer
    whole: TokenRow  # after the whole preceding conversation
    alone: TokenRow | None  # after only the last question; None for a first answer


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The mean loss of the answers at the same position in their conversations, in nats per token."""

    turn: int
    cases: int
    base: float
    tuned: float


def answers_of(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Answered]:
    """The answers of conversations with several, in order, if they have at most `max_length` tokens."""
    answers: list[Answered] = []
    for example in examples:
        places = example.answers
        if len(places) < 2:
            continue
        if len(answers) + len(places) > MOST_TURNS:
            break
        for number, place in enumerate(places, start=1):
            whole = _only_last(replace(example, turns=example.turns[: place + 1]), tokenizer)
            alone = _only_last(_without_context(example, place), tokenizer) if number > 1 else None
            if len(whole.input_ids) <= max_length:
                answers.append(Answered(turn=number, whole=whole, alone=alone))
    return answers


def _without_context(example: Example, place: int) -> Example:
    """The answer after the user's last message, and the system message if there is one."""
    question = max(n for n, turn in enumerate(example.turns[:place]) if turn.role == "user")
    system = tuple(turn for turn in example.turns[:1] if turn.role == "system")
    return replace(example, turns=(*system, *example.turns[question : place + 1]))


def _only_last(example: Example, tokenizer: Any) -> TokenRow:
    """The row with only its last answer learned."""
    row = encode(example, tokenizer, DataFormat.MESSAGES)[-1]
    labels = row.labels
    end = max(n for n, label in enumerate(labels) if label != IGNORED) + 1
    begin = end
    while begin > 0 and labels[begin - 1] != IGNORED:
        begin -= 1
    kept = [label if begin <= n < end else IGNORED for n, label in enumerate(labels)]
    return replace(row, labels=kept)


def turn_metrics(
    turns: Sequence[Answered], whole: tuple[RowScores, RowScores], alone: tuple[RowScores, RowScores]
) -> list[Compared]:
    """Answers that come after others: their loss, and how much it rises without the preceding conversation.

    `whole`, `alone`: the scores of base and tuned, with and without the context. A case is a conversation: its answers
    belong together, so they are drawn together.
    """
    later = [n for n, turn in enumerate(turns) if turn.alone is not None]
    if not later:
        return []
    of = np.unique([turns[n].whole.number for n in later], return_inverse=True)[1]
    tokens = whole[0].tokens[later]
    # an answer's tokens are the same with and without its context, except where tokens merge at its border
    losses = [scores.loss[later] for scores in whole] + [scores.loss / scores.tokens * tokens for scores in alone]
    weight, base, tuned, base_alone, tuned_alone = (
        np.asarray(np.bincount(of, weights=values), dtype=np.float64) for values in (tokens, *losses)
    )
    return [
        LATER_ANSWERS_LOSS.compare(base, tuned, weight),
        CONTEXT_GAIN.compare(base_alone - base, tuned_alone - tuned, weight),
    ]


def by_turn(turns: Sequence[Answered], base: RowScores, tuned: RowScores) -> list[Turns]:
    """The mean loss at each position in a conversation, base next to tuned."""
    means = []
    for number in sorted({turn.turn for turn in turns}):
        here = [n for n, turn in enumerate(turns) if turn.turn == number]
        both = [float(scores.loss[here].sum() / scores.tokens[here].sum()) for scores in (base, tuned)]
        means.append(Turns(turn=number, cases=len(here), base=both[0], tuned=both[1]))
    return means
