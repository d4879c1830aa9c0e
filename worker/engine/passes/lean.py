"""The lean forward pass: it skips work that does not affect the loss.

Rows are concatenated without padding. The head sees only learned tokens, some hundred at a time, and each chunk's
gradient is taken at once, so that logits of a whole batch never exist. If the loss is not linear in the
log-probabilities, the head sees the tokens once before, without a graph: each token's slope depends on the
log-probabilities of all. Adapters read their input in its own number format.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it

from loractl.common.memory.step import HEAD_CHUNK
from loractl.worker.base.arithmetic import AMP, Precision, random_streams_kept
from loractl.worker.base.model import ScoredTokens
from loractl.worker.data.tokens import IGNORED, TokenRow
from loractl.worker.engine.loss import (
    UNSMOOTHED,
    Backward,
    BentLoss,
    CrossEntropy,
    LabelLoss,
    LearnedTokens,
    Loss,
    MicroBatch,
    TokenLoss,
)
from loractl.worker.engine.streams import RandomStreams

from . import wide
from .attention import RowLayout
from .card_kernels import Rotary
from .cross_entropy import LateGradient, scaled, summed_losses, widened
from .scratch import Scratch


@dataclass(frozen=True, kw_only=True)
class RowsBehindEachOther:
    """Some rows as one, and what is learned from them."""

    ids: torch.Tensor  # (1, tokens)
    positions: torch.Tensor  # (1, tokens), which restart with every row
    lengths: list[int]
    places: torch.Tensor  # of the tokens before each learned token
    targets: torch.Tensor  # the learned token
    row_of: torch.Tensor  # its row

    @classmethod
    def of(cls, rows: Sequence[TokenRow], device: torch.device) -> RowsBehindEachOther:
        ids = torch.tensor([token for row in rows for token in row.input_ids])
        labels = torch.tensor([label for row in rows for label in (IGNORED, *row.labels[1:])])
        expected = F.pad(labels[1:], (0, 1), value=IGNORED)
        places = (expected != IGNORED).nonzero()[:, 0]
        lengths = [length for row in rows for length in _lengths(row)]
        positions = torch.cat([torch.arange(length) for length in lengths])
        owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row.input_ids) for row in rows]))
        tensors = {"ids": ids[None], "positions": positions[None], "places": places}
        tensors |= {"targets": expected[places], "row_of": owners[places]}
        return cls(lengths=lengths, **{name: tensor.to(device) for name, tensor in tensors.items()})

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


def _lengths(row: TokenRow) -> list[int]:
    """The lengths of a packed row's examples, or of the row itself if it is one."""
    borders = [0, *row.starts, len(row.input_ids)]
    return [end - begin for begin, end in itertools.pairwise(borders)]


@dataclass(frozen=True, kw_only=True)
class HeadPart:
    """What one training learns from its hidden states."""

    targets: torch.Tensor
    count: int  # the loss's divisor
    smoothing: float  # of labels, for cross-entropy
    bent: Callable[[torch.Tensor], torch.Tensor] | None  # from log-probabilities to the loss, divided, for other losses
    backward: Backward

    @classmethod
    def of(cls, laid: RowsBehindEachOther, batch: MicroBatch, loss: TokenLoss, backward: Backward) -> HeadPart:
        """Before the rows pass the model: afterwards it would wait for the card."""
        smoothing, bent = 0.0, None
        if isinstance(loss, CrossEntropy):
            smoothing = loss.smoothing
        else:
            bent = functools.partial(loss.share, tokens=LearnedTokens.of(batch.rows, laid.targets.device), batch=batch)
        return cls(targets=laid.targets, count=batch.learned, smoothing=smoothing, bent=bent, backward=backward)


class LeanModel:
    """A causal model that gets concatenated rows, and whose head is applied only to some tokens."""

    def __init__(self, words: Any, precision: Precision) -> None:
        self.words = words
        self.device: torch.device = words.device
        self._precision = precision
        self._decoder = words.base_model
        self._layout = RowLayout(words)
        self._rotary = Rotary(words)
        self._kind: Any = None  # of the decoder's output
        self._adapters = [m for m in words.modules() if hasattr(m, "cast_input_dtype_enabled")]

    @property
    def by_row(self) -> str | None:
        """Why, on a card, several rows went through attention one by one in the last pass; None: they did not."""
        return self._layout.by_row

    @property
    def tells_apart(self) -> bool:
        """Whether attention told rows apart in the last pass."""
        return self._layout.tells_apart

    @contextlib.contextmanager
    def lean(self, lengths: list[int]) -> Iterator[None]:
        """Rows of these lengths are concatenated, and adapters read their input as it is: under autocast their products
        cast it, and peft's fp32 copy would be wasted."""
        for layer in self._adapters:
            layer.cast_input_dtype_enabled = False
        try:
            with self._layout.of(lengths), self._rotary.taken_over():
                yield
        finally:
            for layer in self._adapters:
                layer.cast_input_dtype_enabled = True

    def decoded(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The last hidden state of every token."""
        with self._autocast():
            seen = self._decoder(input_ids=ids, position_ids=positions, use_cache=False)
        self._kind = type(seen)
        hidden: torch.Tensor = seen.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The words' logits in fp32."""
        return self._own_logits(hidden).float()

    def _own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """By the model's own code, which may scale or cap them, in its compute type."""
        answer = self._kind(last_hidden_state=hidden[None])
        with self._autocast(), _answering(self._decoder, answer):
            nothing = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
            found: torch.Tensor = self.words(input_ids=nothing).logits.squeeze(0)
        return found

    def learn_head(
        self, hidden: torch.Tensor, parts: Sequence[HeadPart], apart: wide.Apart | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Each training's share of its window's mean loss, and the gradient with respect to all hidden states, chunk by
        chunk. `apart`: the head's, if a chunk may have several trainings."""
        totals, gradient = [torch.zeros((), device=self.device) for _ in parts], torch.empty_like(hidden)
        begin, scratch = 0, _scratch_for(hidden) if apart is None else apart.scratch
        slopes = dict[int, torch.Tensor]()  # of each token, if a training's loss is not linear
        ends = itertools.accumulate(len(part.targets) for part in parts)
        for number, (part, end) in enumerate(zip(parts, ends, strict=True)):
            if part.bent is not None and len(part.targets):
                own = hidden.detach()[end - len(part.targets) : end]
                logp = self._log_probabilities(own, part.targets, apart, scratch).requires_grad_()
                share = part.bent(logp)
                part.backward(share)
                assert logp.grad is not None
                totals[number], slopes[number] = share.detach(), logp.grad
        for chunk in _chunks([len(part.targets) for part in parts], joined=apart is not None):
            owners = [parts[number] for number, _ in chunk]
            targets = [part.targets[tokens] for part, (_, tokens) in zip(owners, chunk, strict=True)]
            lengths = [len(one) for one in targets]
            place = slice(begin, begin := begin + sum(lengths))
            piece = hidden.detach()[place].requires_grad_()
            logits = self._apart_logits(piece, lengths, apart)
            kind, slope = logits.dtype, list[torch.Tensor]()
            start = LateGradient.apply(logits, slope)
            logits = widened(logits.detach(), scratch)  # the 16-bit logits are freed
            smoothings = [owner.smoothing for owner in owners]
            sums, whole = summed_losses(logits, torch.cat(targets), lengths, smoothings, scratch)
            del logits  # frees memory for the backward pass
            shares = [one / owner.count for one, owner in zip(sums, owners, strict=True)]
            scales = [
                -slopes[number][tokens, None] if number in slopes else _scale(share, owner)
                for (number, tokens), share, owner in zip(chunk, shares, owners, strict=True)
            ]
            slope.append(scaled(whole, lengths, scales, kind))
            del whole
            torch.autograd.backward(start, start.detach())
            gradient[place] = piece.grad
            for (number, _), share in zip(chunk, shares, strict=True):
                if number not in slopes:
                    totals[number] += share
        return totals, gradient

    def _log_probabilities(
        self, hidden: torch.Tensor, targets: torch.Tensor, apart: wide.Apart | None, scratch: Scratch | None
    ) -> torch.Tensor:
        """One training's log-probabilities, in fp32, chunk by chunk and without a graph."""
        found = []
        with torch.no_grad(), random_streams_kept():  # dropout in the head, if any, is repeated
            for piece, expected in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
                logits = widened(self._apart_logits(piece, [len(piece)], apart), scratch)
                found.append(F.cross_entropy(logits, expected, reduction="none").neg_())
                del logits  # before the next chunk's
        return torch.cat(found)

    def _apart_logits(self, hidden: torch.Tensor, lengths: list[int], apart: wide.Apart | None) -> torch.Tensor:
        """The head's logits. `lengths`: how many tokens belong to each training."""
        if apart is not None:
            apart.lengths = lengths
        logits = self._own_logits(hidden)
        if apart is not None and not apart.scratch.holds(logits):
            apart.scratch.leave()  # scaled or capped logits are elsewhere; their softmax takes as much again
        return logits

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        amp = self._precision.amp
        return contextlib.nullcontext() if amp is None else torch.autocast(self.device.type, dtype=AMP[amp])


def _chunks(counts: Sequence[int], *, joined: bool) -> Iterator[list[tuple[int, slice]]]:
    """Trainings' tokens in chunks, in order: the training's number, and its tokens. With `joined`, small chunks of
    several trainings become one; each training's own chunks are cut as if it were alone."""
    chunk: list[tuple[int, slice]] = []
    room = 0
    for number, count in enumerate(counts):
        for at in range(0, count, HEAD_CHUNK):
            tokens = slice(at, min(at + HEAD_CHUNK, count))
            size = tokens.stop - at
            if chunk and (size > room or not joined):
                yield chunk
                chunk = []
            room = (room if chunk else HEAD_CHUNK) - size
            chunk.append((number, tokens))
    if chunk:
        yield chunk


def _scratch_for(hidden: torch.Tensor) -> Scratch | None:
    """Memory for the logits of these hidden states. A card keeps memory that it has freed, and a trace, whose tensors
    are another type, counts what a card takes."""
    return Scratch() if hidden.device.type == "cpu" and type(hidden) is torch.Tensor else None


def _scale(loss: torch.Tensor, owner: HeadPart) -> torch.Tensor:
    """The factor of its sum's gradient: a training scales its loss itself."""
    owner.backward(proxy := loss.detach().requires_grad_())
    assert proxy.grad is not None
    return proxy.grad / owner.count


class LeanPass:
    """Losses of an adapted model without wasted work."""

    def __init__(
        self,
        model: Any,
        precision: Precision,
        streams: RandomStreams | None = None,
        *,
        loss: Loss = UNSMOOTHED,
    ) -> None:
        """`streams`: from which the training draws; None: it has the process's own to itself."""
        self.model = model
        self.device: torch.device = model.device
        assert not isinstance(loss, LabelLoss), "a classifier's rows are padded"
        self.loss: TokenLoss = loss
        self.streams = streams or RandomStreams(self.device)
        self._lean = LeanModel(model.get_base_model(), precision)

    def recompute_blocks(self, every: int = 1) -> None:
        """Hold the activations of each block (1), or of every second one (2), only in the backward pass."""
        self.model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)

    def learn(self, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        """Leave a micro-batch's gradients. Returns its share of the window's mean loss, in nats, without a graph."""
        return self.learn_rows(RowsBehindEachOther.of(batch.rows, self.device), batch, backward)

    def learn_rows(self, laid: RowsBehindEachOther, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        """`learn` for rows that are already laid out."""
        part = HeadPart.of(laid, batch, self.loss, backward)
        with self._lean.lean(laid.lengths):
            learned = self._decoded(laid)[laid.places]
            (total,), gradient = self._lean.learn_head(learned, [part])
            if len(laid.places):
                torch.autograd.backward(learned, gradient)
        return total

    def pass_through(self, row: TokenRow, *, learns: bool = False) -> None:
        """A pass that leaves nothing, or gradients of zero: for a rank without rows while others have some."""
        laid = RowsBehindEachOther.of([row], self.device)
        with self._lean.lean(laid.lengths):
            hidden = self._decoded(laid)
            if learns:
                hidden.backward(torch.zeros_like(hidden))

    def held_out_loss(self, rows: Sequence[TokenRow]) -> float:
        """The loss of one batch of held-out rows, not smoothed and summed over what it counts, for a model in eval
        mode."""
        losses = [scored.losses for scored in self.scores(rows)]
        if isinstance(self.loss, BentLoss) and losses:
            return float(self.loss.summed(-torch.cat(losses), LearnedTokens.of(rows, self.device)))
        return sum(float(some.double().sum()) for some in losses)

    def scores(self, rows: Sequence[TokenRow]) -> list[ScoredTokens]:
        """Every learned token of some rows, for a model in eval mode."""
        found = []
        laid = RowsBehindEachOther.of(rows, self.device)
        with torch.no_grad(), self._lean.lean(laid.lengths):
            learned = self._decoded(laid)[laid.places]
            for at in range(0, len(laid.places), HEAD_CHUNK):
                part = slice(at, at + HEAD_CHUNK)
                targets, logits = laid.targets[part], self._lean.logits(learned[part])
                losses = F.cross_entropy(logits, targets, reduction="none")
                right = logits.argmax(-1) == targets
                found.append(ScoredTokens(rows=laid.row_of[part], targets=targets, losses=losses, right=right))
        return found

    def last_logits(self, rows: Sequence[TokenRow], count: int) -> list[torch.Tensor]:
        """The logits of each row's last tokens, in fp32, for a model in eval mode."""
        laid = RowsBehindEachOther.of(rows, self.device)
        with torch.no_grad(), self._lean.lean(laid.lengths):
            whole = self._decoded(laid).split([len(row.input_ids) for row in rows])
            return [self._lean.logits(hidden[-count:]) for hidden in whole]

    def last_logits_alone(self, row: TokenRow, count: int) -> torch.Tensor:
        """The same for one row, by the model's own attention."""
        with torch.no_grad():
            return self._lean.logits(self._decoded(RowsBehindEachOther.of([row], self.device))[-count:])

    @property
    def by_row(self) -> str | None:
        """Why, on a card, several rows went through attention one by one in the last pass; None: they did not."""
        return self._lean.by_row

    @property
    def tells_apart(self) -> bool:
        """Whether attention told rows apart in the last pass."""
        return self._lean.tells_apart

    def tokens(self, rows: Sequence[TokenRow]) -> int:
        """Tokens that pass the model."""
        return sum(len(row.input_ids) for row in rows)

    def _decoded(self, rows: RowsBehindEachOther) -> torch.Tensor:
        return self._lean.decoded(rows.ids, rows.positions)


@contextlib.contextmanager
def _answering(decoder: Any, answer: Any) -> Iterator[None]:
    """Make the decoder return what it has computed before. Other effects of a pass, like gathering a divided base, do
    not happen."""
    own = decoder.__dict__.get("forward")
    hooks = decoder._forward_pre_hooks, decoder._forward_hooks
    decoder.forward = lambda *_, **__: answer
    decoder._forward_pre_hooks, decoder._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        decoder._forward_pre_hooks, decoder._forward_hooks = hooks
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
