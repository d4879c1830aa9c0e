"""A base that several trainings share: their micro-batches pass through it together, each with its own adapter.

All tokens are in one row, one span per training. The base's products run once over all of them; adapters, attention,
head and loss see only their own span, so what one training computes does not depend on the others.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loractl.worker.base.arithmetic import Precision, keep_nf4_in_training_mode
from loractl.worker.base.kept.knowledge import Once
from loractl.worker.base.processor import arithmetic
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import UNSMOOTHED, Backward, Loss, MicroBatch, TokenLoss
from loractl.worker.engine.streams import RandomStreams

from . import apart, wide
from .card_kernels import take_over_norms
from .lean import HeadPart, LeanModel, LeanPass, RowsBehindEachOther
from .product import ADAPTER, CantShare, ExpertsApart, FrozenProduct, SharedProduct, Span, Spans


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One training's micro-batch in a pass of several."""

    model: Any  # the adapted view
    batch: MicroBatch
    backward: Backward
    streams: RandomStreams
    loss: TokenLoss


class SharedBase:
    """A frozen base and the layers of the trainings on it. Each has its own view; the passes run in one more."""

    def __init__(self, model: Any, precision: Precision) -> None:
        """`model`: as loaded, its NF4 layers settled. It must not change."""
        model.requires_grad_(False)
        self.model, self.precision = model, precision
        self._words = view_of(model).train()
        self._lean = LeanModel(self._words, precision)
        self._spans = Spans()
        self._head: SharedProduct | None = None  # if it may get several trainings together
        self._products: dict[str, SharedProduct] = {}  # by the layer's path
        self._in_block: dict[str, list[SharedProduct]] = {}  # by the block's path
        self._asked = False  # whether it was tested that products of several trainings have the bits of each alone
        self.apart: str | None = None  # why each training's rows are multiplied separately; None: together
        take_over_norms(self._words)
        if model.device.type == "cpu":
            # each head chunk has one training, unless the head's weight is widened for all of them
            self._take_over(head=wide.may_widen(model.device, precision.base))
            for block in ExpertsApart.blocks(self._words):
                block.forward = ExpertsApart(block, self._spans)
        self._blocks: list[Any] | None = None  # that can be recomputed; None: not prepared for that

    @property
    def by_row(self) -> str | None:
        """Why, on a card, several rows went through attention one by one when some were last learned; None: they did
        not."""
        return self._lean.by_row

    @property
    def tells_apart(self) -> bool:
        """Whether attention told rows apart in the last pass."""
        return self._lean.tells_apart

    def view(self) -> Any:
        """A view of the base, for one adapter."""
        return view_of(self.model)

    def take_in(self, adapted: Any, once: Once[str | None] | None = None) -> None:
        """Register the layers of an adapter on a view. They are forgotten when the model is gone. Raises CantShare.

        `once`: tests whether the machine multiplies several trainings' rows like each one's, if not tested yet; None:
        this base tests it itself.
        """
        from peft.tuners.lora.layer import LoraLayer

        layers = [(path, m) for path, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)]
        for path, layer in layers:  # all of them first: others' passes use the layers that are taken over
            if not _is_plain(layer):
                raise CantShare(f"{path} is not a plain linear layer")
        for path, layer in layers:
            self._product(path).layers[adapted] = layer
        if not self._asked and any(len(product.layers) > 1 for product in self._products.values()):
            self._join_rows(once)

    def _join_rows(self, once: Once[str | None] | None) -> None:
        """Before the first pass of several trainings: on a CPU, multiply rows together if no bit changes."""
        self._asked = True
        inner = [product for product in self._products.values() if product is not self._head]
        shapes = {product.shape: None for product in inner if product.shape is not None}
        kind = self.precision.base
        if self.model.device.type != "cpu" or not (kind is torch.float32 or wide.may_widen(self.model.device, kind)):
            return
        question = f"several trainings' rows in one product: {', '.join(map(str, shapes))} {' '.join(arithmetic())}"
        find_out = functools.partial(apart.unsteady, shapes)
        why = find_out() if once is None else once(question, find_out, keeps=lambda found: True).answer
        self.apart = why
        for product in inner:
            product.join_rows(steady=why is None)

    def _product(self, path: str) -> SharedProduct:
        if path not in self._products:
            linear = self._words.get_submodule(path)
            block = self._in_block.setdefault(_block_of(path), [])
            self._products[path] = linear.forward = SharedProduct(linear, self._spans, block)
        return self._products[path]

    def _take_over(self, *, head: bool = True) -> None:
        """Also take over layers that nobody has adapted, for their faster products; whichever trainings come, their
        bits stay the same."""
        last, inner = self._words.get_output_embeddings() if head else None, set(self._words.base_model.modules())
        for path, module in list(self._words.named_modules()):
            if (module is last or module in inner) and FrozenProduct.of(module) is not None:
                self._product(path).rounds = module is not last
                if module is last and not _more_than(self._words, last):
                    self._head = self._product(path)

    def learn(self, pieces: Sequence[Piece], *, recomputes: int = 0) -> list[torch.Tensor]:
        """Leave the gradients of several micro-batches. Returns each one's share of its window's mean loss, in nats.

        `recomputes`: each block (1) or every second one (2) is computed again in the backward pass. Existing gradients
        are added to. After an error no stream has moved, but parts of gradients may be left.
        """
        laid = [RowsBehindEachOther.of(piece.batch.rows, self._lean.device) for piece in pieces]
        # Rows without a learned token leave no gradient; together with others they would leave zeros, which move an
        # optimizer.
        learning = [n for n, rows in enumerate(laid) if len(rows.places)]
        losses = [torch.zeros((), device=self._lean.device) for _ in pieces]
        if learning:
            self._recompute_blocks(recomputes)
            found = self._learn([pieces[n] for n in learning], [laid[n] for n in learning])
            for n, loss in zip(learning, found, strict=True):
                losses[n] = loss
        return losses

    def _learn(self, pieces: Sequence[Piece], laid: Sequence[RowsBehindEachOther]) -> list[torch.Tensor]:
        places = _together([rows.places for rows in laid], [rows.tokens for rows in laid])
        parts = [
            HeadPart.of(rows, piece.batch, piece.loss, piece.backward) for piece, rows in zip(pieces, laid, strict=True)
        ]
        with self._passing([(piece.model, piece.streams) for piece in pieces], laid):
            learned = self._decoded(laid)[places]
            with contextlib.nullcontext() if self._head is None else self._head.apart() as apart:
                losses, gradient = self._lean.learn_head(learned, parts, apart)
            torch.autograd.backward(learned, gradient)
        return losses

    def last_logits(self, adapted: Any, streams: RandomStreams, rows: Sequence[TokenRow], count: int) -> list[Any]:
        """The logits of each row's last tokens, in fp32, without dropout."""
        laid = RowsBehindEachOther.of(rows, self._lean.device)
        with torch.no_grad(), self._passing([(adapted, streams)], [laid]):
            whole = self._decoded([laid]).split([len(row.input_ids) for row in rows])
            return [self._lean.logits(hidden[-count:]) for hidden in whole]

    @contextlib.contextmanager
    def _passing(
        self, owners: Sequence[tuple[Any, RandomStreams]], laid: Sequence[RowsBehindEachOther]
    ) -> Iterator[None]:
        """The owners' rows are concatenated until their backward pass is over."""
        lengths = [length for rows in laid for length in rows.lengths]
        with contextlib.ExitStack() as stack:
            spans, begin = [], 0
            for (model, streams), rows in zip(owners, laid, strict=True):
                generator = stack.enter_context(streams.drawing())
                spans.append(Span(owner=model, begin=begin, end=begin + rows.tokens, generator=generator))
                begin += rows.tokens
            stack.enter_context(self._lean.lean(lengths))
            stack.enter_context(self._spans.of(spans))
            yield

    def _decoded(self, laid: Sequence[RowsBehindEachOther]) -> torch.Tensor:
        ids, positions = (torch.cat([getattr(rows, name) for rows in laid], dim=1) for name in ("ids", "positions"))
        return self._lean.decoded(ids, positions)

    def _recompute_blocks(self, every: int) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        if every and self._blocks is None:
            how = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": self._replayed}
            self._words.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
            self._blocks = [m for m in self._words.modules() if getattr(m, "gradient_checkpointing", False)]
        layers = itertools.count()
        for block in self._blocks or ():  # blocks, and the decoder around them, which then keeps no keys and values
            skipped = isinstance(block, GradientCheckpointingLayer) and every > 0 and next(layers) % every > 0
            block.gradient_checkpointing = every > 0 and not skipped

    def _replayed(self) -> tuple[Any, Any]:
        """Around a block, and around its recomputation, which repeats the block's draws."""
        generators = [span.generator for span in self._spans.now]
        return contextlib.nullcontext(), _standing(generators, [generator.get_state() for generator in generators])


def _block_of(path: str) -> str:
    """The path of a layer's block, or its own path if it is in none."""
    block = re.match(r".*?\.\d+(?=\.)", path)
    return path if block is None else block.group()


def _is_plain(layer: Any) -> bool:
    """Whether peft's layer adapts the product of one linear layer: neither fused experts nor an embedding."""
    from transformers.pytorch_utils import Conv1D

    plain = isinstance(layer.get_base_layer(), (torch.nn.Linear, Conv1D))
    return plain and ADAPTER in layer.lora_A and not layer.lora_bias[ADAPTER]


def _more_than(words: Any, head: Any) -> bool:
    """Whether a model has more than a head after its decoder: that would see several trainings' tokens as one."""
    known = {id(parameter) for module in (words.base_model, head) for parameter in module.parameters()}
    return any(id(parameter) not in known for parameter in words.parameters())


@contextlib.contextmanager
def _standing(generators: list[torch.Generator], states: list[torch.Tensor]) -> Iterator[None]:
    before = [generator.get_state() for generator in generators]
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def _together(places: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
    """Positions in spans of these lengths, as positions in the row of all spans."""
    begins = [sum(lengths[:n]) for n in range(len(lengths))]
    return torch.cat([of_one + begin for of_one, begin in zip(places, begins, strict=True)])


class SharedPass(LeanPass):
    """The lean pass of a training on a shared base. Alone it is a pass of one; a pack passes several together."""

    def __init__(
        self,
        base: SharedBase,
        adapted: Any,
        streams: RandomStreams | None = None,
        once: Once[str | None] | None = None,
        *,
        loss: Loss = UNSMOOTHED,
    ) -> None:
        """`once`: finds out how this machine multiplies, if unknown."""
        super().__init__(adapted, base.precision, streams, loss=loss)
        self.base = base
        self.recomputes = 0
        base.take_in(adapted, once)

    def recompute_blocks(self, every: int = 1) -> None:
        self.recomputes = every

    def learn(self, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        return self.base.learn([self.piece(batch, backward)], recomputes=self.recomputes)[0]

    @property
    def by_row(self) -> str | None:
        return self.base.by_row

    @property
    def tells_apart(self) -> bool:
        return self.base.tells_apart

    def last_logits(self, rows: Sequence[TokenRow], count: int) -> list[torch.Tensor]:
        return self.base.last_logits(self.model, self.streams, rows, count)

    def piece(self, batch: MicroBatch, backward: Backward) -> Piece:
        """This training's part of a pass."""
        return Piece(model=self.model, batch=batch, backward=backward, streams=self.streams, loss=self.loss)


def view_of(base: Any) -> Any:
    """A model with its own modules, flags and config, and with the tensors of `base`: an adapter put on it, eval mode,
    or its attention affect no other view. It takes milliseconds and no device memory."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(base.parameters(), base.buffers())}
    for module in base.modules():
        if (state := getattr(module, "quant_state", None)) is not None:  # of an NF4 layer: scales of its weight
            memo[id(state)] = state
    view = copy.deepcopy(base, memo)
    keep_nf4_in_training_mode(view)  # what keeps the base's layers in training mode keeps only the base's
    return view
