"""The lean forward pass: rows in, loss and gradients out, without work that does not affect the loss.

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
    ForwardPass,
    LearnedTokens,
    Loss,
    MicroBatch,
    TokenLoss,
)

from .attention import RowLayout
from .card_kernels import Rotary
from .cross_entropy import LateGradient, scaled, summed_losses, widened
from .fused import FusedLayers, NotFused
from .wide import Scratch


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


def _lengths(row: TokenRow) -> list[int]:
    """The lengths of a packed row's examples, or of the row itself if it is one."""
    borders = [0, *row.starts, len(row.input_ids)]
    return [end - begin for begin, end in itertools.pairwise(borders)]


@dataclass(frozen=True, kw_only=True)
class HeadLoss:
    """What is learned from the hidden states before the learned tokens."""

    targets: torch.Tensor
    count: int  # the loss's divisor
    smoothing: float  # of labels, for cross-entropy
    bent: Callable[[torch.Tensor], torch.Tensor] | None  # from log-probabilities to the loss, divided, for other losses
    backward: Backward

    @classmethod
    def of(cls, laid: RowsBehindEachOther, batch: MicroBatch, loss: TokenLoss, backward: Backward) -> HeadLoss:
        """Before the rows pass the model: afterwards it would wait for the card."""
        smoothing, bent = 0.0, None
        if isinstance(loss, CrossEntropy):
            smoothing = loss.smoothing
        else:
            bent = functools.partial(loss.share, tokens=LearnedTokens.of(batch.rows, laid.targets.device), batch=batch)
        return cls(targets=laid.targets, count=batch.learned, smoothing=smoothing, bent=bent, backward=backward)

    def scale(self, share: torch.Tensor) -> torch.Tensor:
        """The factor of the gradient of a summed cross-entropy, whose share of the loss is known: the training itself
        scales its loss."""
        self.backward(proxy := share.detach().requires_grad_())
        assert proxy.grad is not None
        return proxy.grad / self.count


class LeanPass(ForwardPass):
    """Losses and gradients of an adapted model without wasted work."""

    def __init__(self, model: Any, precision: Precision, *, loss: Loss = UNSMOOTHED, fuses: bool = True) -> None:
        """`fuses`: whether products may be computed in the engine's own way; not where cards divide a base."""
        assert isinstance(loss, (CrossEntropy, BentLoss)), "a classifier's rows are padded"
        self.model = model
        self.device: torch.device = model.device
        self.loss: TokenLoss = loss
        self._precision = precision
        self._words = model.get_base_model()
        self._decoder = self._words.base_model
        self.layout = RowLayout(self._words)
        self._rotary = Rotary(self._words)
        self._kind: Any = None  # of the decoder's output
        self._adapters = [m for m in self._words.modules() if hasattr(m, "cast_input_dtype_enabled")]
        self._fused: FusedLayers | None = None
        if fuses:
            with contextlib.suppress(NotFused):
                self._fused = FusedLayers(model, precision)

    def learn(self, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        """Leave a micro-batch's gradients, added to existing ones. Returns its share of the window's mean loss, in
        nats, without a graph. After an error no random stream has moved, but parts of gradients may be left."""
        return self.learn_rows(RowsBehindEachOther.of(batch.rows, self.device), batch, backward)

    def learn_rows(self, laid: RowsBehindEachOther, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        """`learn` for rows that are already laid out."""
        if not len(laid.places):
            return torch.zeros((), device=self.device)
        head = HeadLoss.of(laid, batch, self.loss, backward)
        with _streams_rewound(self.device), self._passing(laid, fused=self._fused):
            learned = self._decoded(laid)[laid.places]
            loss, gradient = self._learn_head(learned, head)
            torch.autograd.backward(learned, gradient)
        return loss

    def pass_through(self, row: TokenRow, *, learns: bool = False) -> None:
        """A pass that leaves nothing, or gradients of zero: for a rank without rows while others have some."""
        laid = RowsBehindEachOther.of([row], self.device)
        with self._passing(laid, fused=self._fused if learns else None):
            hidden = self._decoded(laid)
            if learns:
                hidden.backward(torch.zeros_like(hidden))

    def held_out_loss(self, rows: Sequence[TokenRow]) -> float:
        losses = [scored.losses for scored in self.scores(rows)]
        if isinstance(self.loss, BentLoss) and losses:
            return float(self.loss.summed(-torch.cat(losses), LearnedTokens.of(rows, self.device)))
        return sum(float(some.double().sum()) for some in losses)

    def scores(self, rows: Sequence[TokenRow]) -> list[ScoredTokens]:
        """Every learned token of some rows, for a model in eval mode, whose products are the model's and peft's own."""
        found = []
        laid = RowsBehindEachOther.of(rows, self.device)
        with torch.no_grad(), self._passing(laid):
            learned = self._decoded(laid)[laid.places]
            for at in range(0, len(laid.places), HEAD_CHUNK):
                part = slice(at, at + HEAD_CHUNK)
                targets, logits = laid.targets[part], self._logits(learned[part]).float()
                losses = F.cross_entropy(logits, targets, reduction="none")
                right = logits.argmax(-1) == targets
                found.append(ScoredTokens(rows=laid.row_of[part], targets=targets, losses=losses, right=right))
        return found

    def last_logits(self, rows: Sequence[TokenRow], count: int) -> list[torch.Tensor]:
        """The logits of each row's last tokens, in fp32, as the rows are learned but for a model in eval mode."""
        laid = RowsBehindEachOther.of(rows, self.device)
        with torch.no_grad(), self._passing(laid, fused=self._fused):
            whole = self._decoded(laid).split([len(row.input_ids) for row in rows])
            return [self._logits(hidden[-count:]).float() for hidden in whole]

    def last_logits_alone(self, row: TokenRow, count: int) -> torch.Tensor:
        """Do it for one row, by the model's own attention and products."""
        with torch.no_grad():
            return self._logits(self._decoded(RowsBehindEachOther.of([row], self.device))[-count:]).float()

    @property
    def fuses(self) -> bool:
        """Whether products are computed in the engine's own way."""
        return self._fused is not None

    def tokens(self, rows: Sequence[TokenRow]) -> int:
        return sum(len(row.input_ids) for row in rows)

    @contextlib.contextmanager
    def _passing(self, laid: RowsBehindEachOther, *, fused: FusedLayers | None = None) -> Iterator[None]:
        """Until the backward pass is over: rows are concatenated, and adapters read their input as it is. Under
        autocast their products cast it, and peft's fp32 copy would be wasted."""
        for layer in self._adapters:
            layer.cast_input_dtype_enabled = False
        layers = contextlib.nullcontext() if fused is None else fused.taken_over()
        try:
            with self.layout.of(laid.lengths), self._rotary.taken_over(), layers:
                yield
        finally:
            for layer in self._adapters:
                layer.cast_input_dtype_enabled = True

    def _decoded(self, laid: RowsBehindEachOther) -> torch.Tensor:
        """The last hidden state of every token."""
        with self._autocast():
            seen = self._decoder(input_ids=laid.ids, position_ids=laid.positions, use_cache=False)
        self._kind = type(seen)
        hidden: torch.Tensor = seen.last_hidden_state[0]
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """By the model's own code, which may scale or cap them, in its compute type."""
        answer = self._kind(last_hidden_state=hidden[None])
        with self._autocast(), _answering(self._decoder, answer):
            nothing = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
            found: torch.Tensor = self._words(input_ids=nothing).logits.squeeze(0)
        return found

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        amp = self._precision.amp
        return contextlib.nullcontext() if amp is None else torch.autocast(self.device.type, dtype=AMP[amp])

    def _learn_head(self, hidden: torch.Tensor, head: HeadLoss) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the gradient with respect to the hidden states, chunk by chunk."""
        with contextlib.nullcontext() if self._fused is None else self._fused.head_scratch() as own:
            # a card keeps memory that it has freed; a trace, whose tensors are another type, counts what a card takes
            scratch = own or (Scratch() if hidden.device.type == "cpu" and type(hidden) is torch.Tensor else None)
            slopes = None  # of each token, if the loss is not linear
            loss = torch.zeros((), device=self.device)
            if head.bent is not None:
                logp = self._log_probabilities(hidden.detach(), head.targets, own, scratch).requires_grad_()
                share = head.bent(logp)
                head.backward(share)
                assert logp.grad is not None
                loss, slopes = share.detach(), logp.grad
            gradient = torch.empty_like(hidden)
            for at in range(0, len(hidden), HEAD_CHUNK):
                part = slice(at, at + HEAD_CHUNK)
                piece = hidden.detach()[part].requires_grad_()
                logits = self._scratch_logits(piece, own)
                kind, slope = logits.dtype, list[torch.Tensor]()
                start = LateGradient.apply(logits, slope)
                logits = widened(logits.detach(), scratch)  # the 16-bit logits are freed
                summed, whole = summed_losses(logits, head.targets[part], head.smoothing, scratch)
                del logits  # frees memory for the backward pass
                share = summed / head.count
                scale = head.scale(share) if slopes is None else -slopes[part, None]
                slope.append(scaled(whole, scale, kind))
                del whole
                torch.autograd.backward(start, start.detach())
                gradient[part] = piece.grad
                if slopes is None:
                    loss += share
        return loss, gradient

    def _log_probabilities(
        self, hidden: torch.Tensor, targets: torch.Tensor, own: Scratch | None, scratch: Scratch | None
    ) -> torch.Tensor:
        """In fp32, chunk by chunk and without a graph."""
        found = []
        with torch.no_grad(), random_streams_kept():  # dropout in the head, if any, is repeated
            for piece, expected in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
                logits = widened(self._scratch_logits(piece, own), scratch)
                found.append(F.cross_entropy(logits, expected, reduction="none").neg_())
                del logits  # before the next chunk's
        return torch.cat(found)

    def _scratch_logits(self, hidden: torch.Tensor, own: Scratch | None) -> torch.Tensor:
        """The head's logits. `own`: where the head leaves them."""
        logits = self._logits(hidden)
        if own is not None and not own.holds(logits):
            own.leave()  # scaled or capped logits are elsewhere; their softmax takes as much again
        return logits


@contextlib.contextmanager
def _streams_rewound(device: torch.device) -> Iterator[None]:
    """What an error interrupts has drawn nothing."""
    on_card = device.type == "cuda"
    before = torch.cuda.get_rng_state(device) if on_card else torch.get_rng_state()
    try:
        yield
    except BaseException:
        torch.cuda.set_rng_state(before, device) if on_card else torch.set_rng_state(before)
        raise


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
