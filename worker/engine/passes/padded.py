"""The exact forward pass: rows padded to one length, logits of every token, as transformers' Trainer computes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from loractl.common.job.status import Reason
from loractl.worker.base.arithmetic import evaluating
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.data.token_rows import collate, inputs_of
from loractl.worker.data.tokens import TokenRow, cut, joined, texts_of
from loractl.worker.engine.loss import (
    UNSMOOTHED,
    Backward,
    BentLoss,
    CrossEntropy,
    ForwardPass,
    LabelLoss,
    LearnedTokens,
    Loss,
    MicroBatch,
    accepts_window,
)

from .attention import BY_POSITION


class PaddedPass(ForwardPass):
    """Losses of a model, equal bit for bit to those of transformers' Trainer."""

    def __init__(
        self,
        model: Any,
        pad: int,
        *,
        compiled: bool = False,
        noise: float | None = None,
        loss: Loss = UNSMOOTHED,
    ) -> None:
        """`noise`: NEFTune's alpha."""
        self.model = model
        self.device: torch.device = model.device
        self._pad = pad
        self.loss = loss
        self._noise = noise
        self._learner = torch.compile(model, backend="inductor") if compiled else model
        self._whole_windows = accepts_window(model)
        text = model.config.get_text_config()
        self._routed = getattr(text, "output_router_logits", False)
        self._by_position = text._attn_implementation in BY_POSITION

    def learn(self, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        with noisy_embeddings(self.model, self._noise):
            if isinstance(self.loss, BentLoss):
                loss = self.loss.share(*self._log_probabilities(self._learner, batch.rows), batch)
            else:
                loss = self._loss(self._learner, batch.rows, batch.learned, self.loss)
            if _is_model_s_own(self.loss) and not self._whole_windows:  # averaged over the micro-batch
                loss = loss * self.loss.count(batch.rows) / batch.learned if batch.divided else loss / batch.pieces
            backward(loss)
        return loss.detach()

    def held_out_loss(self, rows: Sequence[TokenRow]) -> float:
        # without the part for its router that a model may add: the report's has none
        alone = {"output_router_logits": False} if self._routed else {}
        with torch.no_grad():
            if isinstance(self.loss, BentLoss):
                return float(self.loss.summed(*self._log_probabilities(self.model, rows)))
            learned = max(1, self.loss.count(rows))
            return learned * float(self._loss(self.model, rows, learned, self.loss.held_out, **alone))

    def pass_through(self, row: TokenRow, *, learns: bool = False) -> None:
        """A pass that leaves nothing, or gradients of zero: for a rank without rows while others have some."""
        ids = torch.tensor([texts_of(row)[0].input_ids], device=self.device)
        logits = self._learner(input_ids=ids, use_cache=False)["logits"]
        if learns:
            logits.backward(torch.zeros_like(logits))

    def tokens(self, rows: Sequence[TokenRow]) -> int:
        """Tokens that pass the model, padding included."""
        laid = self._laid(rows)
        return len(laid) * max(len(row.input_ids) for row in laid)

    def last_logits(self, rows: Sequence[TokenRow], count: int) -> torch.Tensor:
        """The logits of the last row's last tokens, in fp32, for a model in eval mode."""
        laid = self._laid(rows)
        inputs, end = self._inputs(laid), len(laid[-1].input_ids)
        del inputs["labels"]
        with torch.no_grad():
            logits: torch.Tensor = self.model(**inputs, use_cache=False).logits[-1, end - count : end].float()
        return logits

    def _laid(self, rows: Sequence[TokenRow]) -> Sequence[TokenRow]:
        """The rows as they pass the model. Each answer of a pair is a row of its own: a layer that carries a state from
        token to token, or that looks at no positions, would show the rejected answer the chosen one. Packed rows are
        one row where attention looks at positions in a batch of one alone."""
        if isinstance(self.loss, BentLoss):
            return [text for row in rows for text in texts_of(row)]
        return [joined(rows)] if self._by_position and any(row.starts for row in rows) else rows

    def _inputs(self, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
        return {name: t.to(self.device) for name, t in collate([inputs_of(row) for row in rows], self._pad).items()}

    def _log_probabilities(self, model: Any, rows: Sequence[TokenRow]) -> tuple[torch.Tensor, LearnedTokens]:
        """Of the rows' learned tokens, in fp32."""
        laid = self._laid(rows)
        inputs, tokens = self._inputs(laid), LearnedTokens.of(laid, self.device)
        targets = inputs.pop("labels")[tokens.row_of, tokens.place]
        logits = model(**inputs)["logits"][tokens.row_of, tokens.place - 1]
        losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        return -losses, LearnedTokens.of(rows, self.device)

    def _loss(
        self, model: Any, rows: Sequence[TokenRow], learned: int, loss: CrossEntropy | LabelLoss, **how: bool
    ) -> torch.Tensor:
        inputs = self._inputs(self._laid(rows))
        count = torch.tensor(float(learned), device=self.device)
        if not _is_model_s_own(loss):
            labels = inputs.pop("labels")
            return loss.of_logits(model(**inputs)["logits"], labels, count)
        window = {"num_items_in_batch": count} if self._whole_windows else {}
        # only the loss of the output is kept, so that the logits are freed before the backward pass
        found = model(**inputs, **window, **how)
        share = self.loss.count(rows) / learned
        if not (window and self._routed and share < 1):
            return found["loss"]
        # the model adds its router's loss to that of any rows: of a window's it would count once a micro-batch
        words = loss.of_logits(found["logits"], inputs["labels"], count)
        return words + share * (found["loss"] - words)


APART_TOLERANCE = 0.01
"""Share of the largest logit that rounding may move; another example in sight moves far more."""

TRIED = 64
"""Tokens of an example that are tried: logits of a long row would take gigabytes."""


def check_apart(padded: PaddedPass, rows: Iterable[TokenRow]) -> None:
    """Change all that precedes the last example in two packed rows: nothing of it may change. Raises
    TrainingFailed(bad_spec).

    transformers keeps packed examples apart if position ids restart and no attention mask is given
    (masking_utils.find_packed_sequence_indices). An architecture with its own attention may not.
    """
    packed = next((row for row in rows if row.starts), None)
    if packed is None:
        return
    first, last = (cut(text, TRIED) for text in texts_of(packed)[:2])
    vocabulary = padded.model.get_input_embeddings().weight.shape[0]
    other = replace(first, input_ids=[(token + 1) % vocabulary for token in first.input_ids])
    with evaluating(padded.model):
        pairs = [joined([one, last]) for one in (first, other)]
        seen, same = (padded.last_logits([row, row], len(last.input_ids)) for row in pairs)
    moved_by = float((seen - same).abs().max() / seen.abs().max())
    if not moved_by <= APART_TOLERANCE:
        raise TrainingFailed(
            Reason.BAD_SPEC,
            "training.packing: in this model's attention packed examples see each other "
            f"(logits moved by {100 * moved_by:.0f} %); set packing: false",
        )


def _is_model_s_own(loss: Loss) -> bool:
    """Whether the model's code computes it. Some models' code knows nothing about a window."""
    return isinstance(loss, CrossEntropy) and not loss.smoothing


@contextlib.contextmanager
def noisy_embeddings(model: Any, alpha: float | None) -> Iterator[None]:
    """Add uniform noise of magnitude alpha / sqrt(length x width) to the embeddings of a model in training mode."""
    if alpha is None:
        yield
        return

    embeddings = model.get_base_model().get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha
    hook = embeddings.register_forward_hook(neftune_post_forward_hook)
    try:
        yield
    finally:
        hook.remove()
