"""Preference losses: functions of the log-probabilities of two answers to one prompt."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it

from loractl.common.job.sections import PreferenceSpec
from loractl.worker.data.tokens import IGNORED, TokenRow

from .loss import BentLoss, LearnedTokens, MicroBatch


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs as a model scores them: tensors of shape (pairs,), log-probabilities summed over tokens, in nats."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    learned: torch.Tensor  # of the tokens that a term for answers learns: the chosen answer's, for orpo with its prompt
    learned_tokens: torch.Tensor

    @property
    def margins(self) -> torch.Tensor:
        """Log-probability of the chosen answer minus that of the rejected one."""
        return self.chosen - self.rejected

    @property
    def mean_margins(self) -> torch.Tensor:
        """The margin per token, so that shorter answers get no advantage."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


A_TOKEN = frozenset({"ipo", "simpo", "orpo"})
"""Losses that compare answers by their mean log-probability per token."""


def margins(asked: PreferenceSpec, pairs: Pairs) -> torch.Tensor:
    """The margins in the unit of the loss: summed, or per token."""
    return pairs.mean_margins if A_TOKEN & {*asked.losses} else pairs.margins


def pair_losses(asked: PreferenceSpec, pairs: Pairs, reference: Pairs | None) -> torch.Tensor:
    """The loss of each pair, of shape (pairs,), without terms for the chosen answers (`asked.answer_weight`).

    `reference`: the scores of the same pairs by the model that the adapter must stay near. Formulas: TRL 1.16's.
    """
    total = torch.zeros_like(pairs.chosen)
    for name, weight in zip(asked.losses, asked.weights, strict=True):
        if name in _LOSSES:
            total = total + weight * _LOSSES[name](asked, pairs, reference or pairs)
    return total


def _delta(pairs: Pairs, reference: Pairs) -> torch.Tensor:
    """The difference of the answers' log-ratios to the reference."""
    return pairs.margins - reference.margins


def _sigmoid(asked: PreferenceSpec, pairs: Pairs, reference: Pairs) -> torch.Tensor:
    return -F.logsigmoid(asked.beta * _delta(pairs, reference))


def _hinge(asked: PreferenceSpec, pairs: Pairs, reference: Pairs) -> torch.Tensor:
    return torch.relu(1 - asked.beta * _delta(pairs, reference))


def _ipo(asked: PreferenceSpec, pairs: Pairs, reference: Pairs) -> torch.Tensor:
    delta = (pairs.chosen - reference.chosen) / pairs.chosen_tokens
    delta = delta - (pairs.rejected - reference.rejected) / pairs.rejected_tokens
    return (delta - 1 / (2 * asked.beta)) ** 2


def _robust(asked: PreferenceSpec, pairs: Pairs, reference: Pairs) -> torch.Tensor:
    delta, wrong = asked.beta * _delta(pairs, reference), asked.label_smoothing
    return (wrong * F.logsigmoid(-delta) - (1 - wrong) * F.logsigmoid(delta)) / (1 - 2 * wrong)


def _simpo(asked: PreferenceSpec, pairs: Pairs, reference: Pairs) -> torch.Tensor:
    logits, wrong = asked.beta * pairs.mean_margins - asked.simpo_gamma, asked.label_smoothing
    return -(1 - wrong) * F.logsigmoid(logits) - wrong * F.logsigmoid(-logits)


def _orpo(asked: PreferenceSpec, pairs: Pairs, reference: Pairs) -> torch.Tensor:
    """The odds ratio's part (the paper's equations 4 and 7); the loss of the answers is a term for answers."""
    # an answer with probability 1 has infinite odds, and its gradient is NaN
    chosen, rejected = (
        (each / tokens).clamp(max=-_LEAST)
        for each, tokens in ((pairs.chosen, pairs.chosen_tokens), (pairs.rejected, pairs.rejected_tokens))
    )
    odds = (chosen - rejected) - (_log_of_rest(chosen) - _log_of_rest(rejected))
    return -asked.beta * F.logsigmoid(odds)


_LEAST = torch.finfo(torch.float32).eps
"""The mean log-probability per token, below zero, from which on an answer counts as certain."""


def _log_of_rest(log_probability: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, in the form that is exact on either side of -log 2 (Maechler 2012)."""
    near = torch.log(-torch.expm1(log_probability))
    far = torch.log1p(-torch.exp(log_probability))
    return torch.where(log_probability > -0.6931472, near, far)


_Loss = Callable[[PreferenceSpec, Pairs, Pairs], torch.Tensor]

_LOSSES: dict[str, _Loss] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "simpo": _simpo,
    "orpo": _orpo,
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The number of learned tokens of a pair's row, text by text, in the order of `LearnedTokens`."""

    asked: int  # of the prompt, before the chosen answer
    chosen: int
    rejected: int

    @classmethod
    def of(cls, row: TokenRow) -> Sizes:
        (begin,) = row.starts
        first, second = row.labels[1:begin], row.labels[begin:]
        learned = sum(label != IGNORED for label in first)
        asked = max(0, row.asked - 1)  # the first token is never learned
        return cls(asked=asked, chosen=learned - asked, rejected=sum(label != IGNORED for label in second))


Scores = dict[bytes, tuple[float, float]]
"""Summed log-probabilities of a pair's answers, chosen and rejected, by the row's identity."""


def row_key(row: TokenRow) -> bytes:
    """A row's identity: another row with the same number has other tokens."""
    said = array("l", (*row.input_ids, -1, *row.starts, -1, *row.labels)).tobytes()
    return hashlib.blake2b(said, digest_size=16).digest()


class PairReference:
    """How the model that an adapter must stay close to scores pairs: as another process has found."""

    def __init__(self, known: Scores) -> None:
        self.known = known

    def meet(self, rows: Sequence[TokenRow]) -> None:
        """Find out what is unknown about some rows, which may run the model without a graph."""

    def forget(self) -> None:
        """Find out all of it again."""

    def of(self, row: TokenRow) -> tuple[float, float]:
        """The summed log-probabilities of a pair's answers, in nats, for a row that it has met."""
        return self.known[row_key(row)]


class PairLoss(BentLoss):
    """The mean over pairs of the losses that a job names. A term for the chosen answers is a mean over their tokens, as
    in TRL; a held-out pair's is its own, which no other pair changes."""

    def __init__(self, asked: PreferenceSpec, reference: PairReference | None = None) -> None:
        self.asked, self.reference = asked, reference

    def count(self, rows: Sequence[TokenRow]) -> int:
        return len(rows)

    def count_answered(self, rows: Sequence[TokenRow]) -> int:
        if not self.asked.answer_weight:
            return 0
        return sum(size.asked + size.chosen for size in map(Sizes.of, rows))

    def meet(self, rows: Sequence[TokenRow]) -> None:
        if self.reference is not None:
            self.reference.meet(rows)

    def forget(self) -> None:
        if self.reference is not None:
            self.reference.forget()

    def known(self, rows: Sequence[TokenRow]) -> list[tuple[float, float]]:
        return [] if self.reference is None else [self.reference.of(row) for row in rows]

    def take(self, rows: Sequence[TokenRow], known: list[tuple[float, float]]) -> None:
        if self.asked.has_reference:
            self.reference = PairReference({row_key(row): found for row, found in zip(rows, known, strict=True)})

    def summed(self, logp: torch.Tensor, tokens: LearnedTokens) -> torch.Tensor:
        pairs = pairs_of(logp, tokens.rows)
        total, weight = self._compared(pairs, tokens.rows), self.asked.answer_weight
        return total - weight * (pairs.learned / pairs.learned_tokens).sum() if weight else total

    def share(self, logp: torch.Tensor, tokens: LearnedTokens, batch: MicroBatch) -> torch.Tensor:
        pairs = pairs_of(logp, tokens.rows)
        share, weight = self._compared(pairs, tokens.rows) / batch.learned, self.asked.answer_weight
        return share - weight * pairs.learned.sum() / batch.answered if weight else share

    def _compared(self, pairs: Pairs, rows: Sequence[TokenRow]) -> torch.Tensor:
        """The sum of the pairs' losses, without a term for answers."""
        reference = None
        if self.reference is not None:
            known = torch.tensor([self.reference.of(row) for row in rows], device=pairs.chosen.device).unbind(1)
            reference = replace(pairs, chosen=known[0], rejected=known[1])
        return pair_losses(self.asked, pairs, reference).sum()


def pairs_of(logp: torch.Tensor, rows: Sequence[TokenRow]) -> Pairs:
    """Pairs from the log-probabilities of their learned tokens, row by row: in fp32, of shape (tokens,)."""
    sizes = [Sizes.of(row) for row in rows]
    # one sum per text, each over the same tokens in the same order however many others there are
    parts = logp.split([size for one in sizes for size in (one.asked, one.chosen, one.rejected)])
    asked, chosen, rejected = (torch.stack([part.sum() for part in parts[n::3]]) for n in range(3))

    def counts(*found: int) -> torch.Tensor:
        return torch.tensor(found, dtype=logp.dtype, device=logp.device)

    return Pairs(
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=counts(*(size.chosen for size in sizes)),
        rejected_tokens=counts(*(size.rejected for size in sizes)),
        learned=asked + chosen,
        learned_tokens=counts(*(size.asked + size.chosen for size in sizes)),
    )
