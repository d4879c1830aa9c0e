"""A linear layer of a base that several adapters share: its product over all tokens at once, and each adapter's factors
on its own tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from . import apart, wide
from .apart import LayerShape
from .card_kernels import is_on_card

ADAPTER = "default"
"""peft's name for the only adapter in a view of the base."""


UNPACKED = 1536
"""Beyond this number of rows bitsandbytes 0.50 unpacks a 4-bit weight before it multiplies (backends/cuda/ops.py). For
fewer it may have a kernel that does both."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """The tokens of one adapter's micro-batch, adjacent in the single row of a pass."""

    owner: Any  # the adapted model
    begin: int
    end: int
    generator: torch.Generator  # from which its dropout draws


class Spans:
    """Which adapter has which tokens of the current pass."""

    def __init__(self) -> None:
        self.now: tuple[Span, ...] = ()
        self._cast: tuple[Any, dict[torch.Tensor, torch.Tensor]] = (None, {})  # block and type, and the casts by factor

    @property
    def lengths(self) -> list[int]:
        return [span.end - span.begin for span in self.now]

    @contextlib.contextmanager
    def of(self, spans: Sequence[Span]) -> Iterator[None]:
        """Until the backward pass is over: blocks that are recomputed need them too."""
        before, self.now = self.now, tuple(spans)
        self._cast = (None, {})  # an optimizer may have changed the factors since
        try:
            yield
        finally:  # even if torch ends a block's recomputation early, by raising its own error
            self.now, self._cast = before, (None, {})

    def cast(self, block: list[SharedProduct], kind: torch.dtype) -> dict[torch.Tensor, torch.Tensor]:
        """The factors of a block's products that have another type, each cast to this type. One kernel casts all of
        them: a card would start one for each, and a Llama block has fourteen."""
        if self._cast[0] != (id(block), kind):
            layers = [layer for product in block for span in self.now if (layer := product.layers.get(span.owner))]
            plain = [layer for layer in layers if ADAPTER not in layer.lora_variant]
            before = [factor for layer in plain for factor in _factors(layer) if factor.dtype is not kind]
            with torch.no_grad():
                after = [torch.empty_like(factor, dtype=kind) for factor in before]
                if before:
                    torch._foreach_copy_(after, before)
            self._cast = (id(block), kind), dict(zip(before, after, strict=True))
        return self._cast[1]


def _factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


class ExpertsApart:
    """Replaces the forward() of a block of experts on a CPU: each adapter's tokens pass it separately.

    An expert multiplies as many rows as the pass has for it, and the library's rounding depends on that number.
    """

    def __init__(self, block: Any, spans: Spans) -> None:
        self._own, self._spans = block.forward, spans

    @staticmethod
    def blocks(model: Any) -> list[Any]:
        """The blocks of experts that get only hidden states."""
        found = [module for module in model.modules() if "experts" in dict(module.named_children())]
        return [block for block in found if len(inspect.signature(block.forward).parameters) == 1]

    def __call__(self, hidden_states: torch.Tensor) -> Any:
        whole, answers = self._spans.now, []
        if len(whole) < 2:
            return self._own(hidden_states)
        for span, own in zip(whole, hidden_states.split(self._spans.lengths, dim=-2), strict=True):
            with self._spans.of([dataclasses.replace(span, begin=0, end=own.shape[-2])]):
                answers.append(self._own(own))
        if isinstance(answers[0], torch.Tensor):
            return torch.cat(answers, dim=-2)
        return tuple(torch.cat(parts, dim=-2) for parts in zip(*answers, strict=True))


class SharedProduct:
    """Replaces a linear layer's forward()."""

    def __init__(self, linear: Any, spans: Spans, block: list[SharedProduct]) -> None:
        """`block`: the list of the products in the same block of the model, to which this one is added."""
        block.append(self)
        self._linear, self._block = linear, block
        self._own: Callable[[torch.Tensor], torch.Tensor] = linear.forward
        self._spans = spans
        self._frozen = FrozenProduct.of(linear)
        self.rounds = True  # what it computes in fp32, to its input's type
        # by adapted model, whose layers go with it
        self.layers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        taken = [(span, layer) for span in self._spans.now if (layer := self.layers.get(span.owner)) is not None]
        if not taken:
            # on a CPU with the bits that it has among trainings with factors here
            ours = x.device.type == "cpu" and self._frozen is not None
            return self._together(x, []) if ours else self._alike(x)
        if not self._sees_all(x):
            raise CantShare(f"a layer is given {x.numel() // x.shape[-1]} of {sum(self._spans.lengths)} tokens")
        if self._frozen is None:
            return self._apart(x, self._alike(x), taken)
        plain = [(span, layer) for span, layer in taken if ADAPTER not in layer.lora_variant]
        answer = self._together(x, plain)
        return (
            answer if len(plain) == len(taken) else self._apart(x, answer, [one for one in taken if one not in plain])
        )

    def apart(self) -> contextlib.AbstractContextManager[wide.Apart]:
        """Products in fp32 are computed from one training's tokens at a time."""
        assert self._frozen is not None
        return self._frozen.apart()

    @property
    def shape(self) -> LayerShape | None:
        """By which a library may pick a kernel; None for an unknown kind of layer."""
        return None if self._frozen is None else self._frozen.shape

    def join_rows(self, *, steady: bool) -> None:
        """Multiply rows of several trainings together, if that leaves the bits of their fp32 products unchanged."""
        if self._frozen is not None:
            self._frozen.steady = steady

    def _sees_all(self, x: torch.Tensor) -> bool:
        return x.numel() == x.shape[-1] * sum(self._spans.lengths)

    def _lengths(self, x: torch.Tensor) -> list[int]:
        """Each training's tokens of `x`; all tokens if `x` is not the input of the pass."""
        return self._spans.lengths if self._sees_all(x) else [x.numel() // x.shape[-1]]

    def _alike(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's own output, whose bits do not depend on the other trainings in the pass."""
        several = x.device.type == "cpu" and len(self._lengths(x)) > 1
        return apart.each(self._own, x, self._lengths(x)) if several else self._own(x)

    def _together(self, x: torch.Tensor, taken: list[tuple[Span, Any]]) -> torch.Tensor:
        factors = [factor for half in zip(*(_factors(layer) for _, layer in taken), strict=True) for factor in half]
        parts = [_Factors.of(span, layer) for span, layer in taken]
        flat = x.reshape(-1, x.shape[-1]).to(kind := _compute_type(x))
        casts = self._spans.cast(self._block, kind) if is_on_card(x) else {}
        answer = _Product.apply(flat, self._frozen, self.rounds, self._lengths(x), parts, casts, *factors)
        answer = answer.view(*x.shape[:-1], -1)
        # an NF4 layer's output has its input's type
        return answer.to(x.dtype) if hasattr(self._linear, "quant_state") else answer

    def _apart(self, x: torch.Tensor, answer: torch.Tensor, taken: list[tuple[Span, Any]]) -> torch.Tensor:
        """By peft's own code for a variant like DoRA, which shares only the base's product."""
        lengths, layers = self._spans.lengths, dict(taken)
        # split, not slices: slices create a full-size tensor for each span in the backward pass
        rows = zip(self._spans.now, x.split(lengths, dim=-2), answer.split(lengths, dim=-2), strict=True)
        return torch.cat([_adapted(layers.get(span), span, *states) for span, *states in rows], dim=-2)


class CantShare(Exception):
    """A layer whose adapter can't be told apart by spans of tokens."""


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """One adapter's part of a product."""

    rows: slice
    kind: torch.dtype  # of its gradients
    scaling: float
    dropout: float
    generator: torch.Generator

    @classmethod
    def of(cls, span: Span, layer: Any) -> _Factors:
        dropout = getattr(layer.lora_dropout[ADAPTER], "p", 0.0) if torch.is_grad_enabled() else 0.0
        return cls(
            rows=slice(span.begin, span.end),
            kind=layer.lora_A[ADAPTER].weight.dtype,
            scaling=layer.scaling[ADAPTER],
            dropout=dropout,
            generator=span.generator,
        )


class _Product(torch.autograd.Function):
    """x W + s (dropout(x) A) B, with each adapter's A, B, s and dropout on its own rows.

    The factors' part is added in place to the base's product, forward and backward: it needs no tensor of the output's
    size. A card adds the base's product to the factors', since what a large product reads and writes besides its weight
    costs nothing there. All is computed in the type of `x`, or in fp32 if a CPU is faster that way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        frozen: FrozenProduct,
        rounds: bool,
        lengths: list[int],
        parts: list[_Factors],
        casts: dict[torch.Tensor, torch.Tensor],
        *factors: torch.Tensor,
    ) -> Any:
        ctx.frozen, ctx.parts, ctx.lengths, ctx.narrow, ctx.kept = frozen, parts, lengths, x.dtype, None
        ctx.widened = widened = wide.widens(x)
        kind = torch.float32 if widened else x.dtype
        with wide.as_it_is(x):
            read, inners = x.to(kind), []
            above, below = ([casts.get(factor, factor).to(kind) for factor in half] for half in _halves(factors))
            saved = [*above, *below]
            for part, a in zip(parts, above, strict=True):
                seen, mask = read[part.rows], _mask(x[part.rows], part) if part.dropout else None
                seen = seen if mask is None else _dropped(seen, mask, part)
                inners.append(seen @ a.T)
                # a CPU applies dropout again: memory costs it more
                saved += [seen if is_on_card(x) else x[part.rows], inners[-1], *([] if mask is None else [mask])]
            if parts:
                ctx.kept = _Kept.node(x, factors, saved)
            if parts and frozen.adds(x):
                answer = _room(x, frozen.shape.outputs, parts)
                for part, inner, b in zip(parts, inners, below, strict=True):
                    _scaled(inner, b.T, part.scaling, answer[part.rows])
                frozen.add(x, answer)
            else:
                answer = frozen(read, lengths, widened=widened)
                for part, inner, b in zip(parts, inners, below, strict=True):
                    answer[part.rows].addmm_(inner, b.T, alpha=part.scaling)
        return answer.to(x.dtype) if rounds else answer

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> Any:
        narrow, widened, count = ctx.narrow, ctx.widened, len(ctx.parts)
        saved, ctx.kept = () if ctx.kept is None else ctx.kept.saved_tensors, None
        kind = torch.float32 if widened else narrow
        # contiguous: the library also picks a kernel by strides, which are those of the whole pass
        given = given.contiguous().to(kind)
        (above, below), rest = _halves(saved[: 2 * count]), iter(saved[2 * count :])
        back, adds = None, count > 0 and is_on_card(given)
        if ctx.needs_input_grad[0]:
            back = (
                _room(given, ctx.frozen.shape.inputs, ctx.parts)
                if adds
                else ctx.frozen.gradient(given, ctx.lengths, widened=widened)
            )
        to_a, to_b = [], []
        for part, a, b in zip(ctx.parts, above, below, strict=True):
            seen, inner, mask = next(rest).to(kind), next(rest), next(rest) if part.dropout else None
            if mask is not None and not adds:
                seen = _dropped(seen, mask, part)
            of_b, of_inner = _slopes(given[part.rows], inner, b, part)
            to_a.append((of_inner.T @ seen).to(part.kind))
            to_b.append(of_b)
            if back is None:
                continue
            own = back[part.rows]
            if adds:
                _scaled(of_inner, a, 1 / (1 - part.dropout), own)
                if mask is not None:
                    own.mul_(mask)
            elif mask is None:
                own.addmm_(of_inner, a)
            else:
                own += _dropped(of_inner @ a, mask, part)
        if adds and back is not None:
            ctx.frozen.add_gradient(given, back)
        return (back if back is None else back.to(narrow), None, None, None, None, None, *to_a, *to_b)


def _halves(factors: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Every A, and every B."""
    return factors[: len(factors) // 2], factors[len(factors) // 2 :]


def _slopes(
    of_answer: torch.Tensor, inner: torch.Tensor, b: torch.Tensor, part: _Factors
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of B and of its input. A card scales them as it multiplies."""
    if is_on_card(of_answer):
        return _scaled(of_answer.T, inner, part.scaling).to(part.kind), _scaled(of_answer, b, part.scaling)
    # in this order: a library takes twice as long for a product that is a few numbers wide
    of_b = (inner.T @ of_answer).T.to(part.kind)
    of_b = torch.mul(of_b, part.scaling, out=of_b.new_empty(of_b.shape))
    return of_b, (of_answer @ b).mul_(part.scaling)


def _scaled(left: torch.Tensor, right: torch.Tensor, scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale, out=out)


def _room(x: torch.Tensor, width: int, parts: Sequence[_Factors]) -> torch.Tensor:
    """For the rows of `x`; zeros if not all of them are adapted."""
    covered = sum(part.rows.stop - part.rows.start for part in parts) == len(x)
    return x.new_empty(len(x), width) if covered else x.new_zeros(len(x), width)


class _Kept(torch.autograd.Function):
    """What a product's backward pass needs, saved before the product is computed: recomputation of a block ends with
    the last tensor saved in it, and so skips the block's last product."""

    @staticmethod
    def node(x: torch.Tensor, factors: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> Any:
        """Holds them as `saved_tensors` while it lives: it is in no graph. `x`, `factors`: which have gradients."""
        with torch.enable_grad():
            return _Kept.apply(tensors, x, *factors).grad_fn

    @staticmethod
    def forward(ctx: Any, tensors: Sequence[torch.Tensor], x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return x.new_empty(0)


def _mask(x: torch.Tensor, part: _Factors) -> torch.Tensor:
    """What dropout keeps: on a CPU the numbers by which torch's own dropout multiplies its input, on a card one byte
    per element."""
    kind = torch.bool if is_on_card(x) else x.dtype
    mask = torch.empty(x.shape, dtype=kind, device=x.device).bernoulli_(1 - part.dropout, generator=part.generator)
    return mask if kind is torch.bool else mask.div_(1 - part.dropout)


def _dropped(x: torch.Tensor, mask: torch.Tensor, part: _Factors) -> torch.Tensor:
    if mask.dtype is torch.bool:  # the kernel that also scales
        return torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - part.dropout))
    return x * mask


def _compute_type(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _adapted(layer: Any, span: Span, x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """The base's output with an adapter's part, by peft's own code."""
    if layer is None:
        return answer
    with _drawing_from(span.generator):
        if (variant := layer.lora_variant.get(ADAPTER)) is not None:
            found: torch.Tensor = variant.forward(layer, active_adapter=ADAPTER, x=x, result=answer)
        else:
            a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            found = answer + b(a(layer.lora_dropout[ADAPTER](x))) * layer.scaling[ADAPTER]
    return found.to(answer.dtype)


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Make torch's functions draw from a generator that they can't take as an argument."""
    devices = [generator.device] if generator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        place = torch.cuda if devices else torch
        place.set_rng_state(generator.get_state())
        yield
        generator.set_state(place.get_rng_state())


class FrozenProduct:
    """What a linear layer computes without adapters, forward and backward, on tensors of shape (tokens, width)."""

    def __init__(self, linear: Any, weight: Callable[[], torch.Tensor], shape: LayerShape) -> None:
        self._linear, self._own, self._weight = linear, linear.forward, weight
        self.shape = shape
        self.steady = False  # whether rows of several trainings may be multiplied together in fp32
        self._apart: wide.Apart | None = None

    @classmethod
    def of(cls, linear: Any) -> FrozenProduct | None:
        """None for an unknown kind of layer."""
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit
        from transformers.pytorch_utils import Conv1D

        weights: dict[type, Callable[[], torch.Tensor]] = {
            torch.nn.Linear: lambda: linear.weight,
            Conv1D: lambda: linear.weight.T,
            Linear4bit: lambda: dequantize_4bit(linear.weight.data, linear.weight.quant_state),
        }
        if (weight := weights.get(type(linear))) is None:
            return None
        turned, quantised = isinstance(linear, Conv1D), isinstance(linear, Linear4bit)
        inputs, outputs = linear.weight.shape if turned else (linear.in_features, linear.out_features)
        stored = linear.weight.quant_state.dtype if quantised else linear.weight.dtype
        biased = linear.bias is not None
        return cls(
            linear,
            weight,
            LayerShape(outputs=outputs, inputs=inputs, biased=biased, turned=turned, stored=stored),
        )

    @contextlib.contextmanager
    def apart(self) -> Iterator[wide.Apart]:
        """Products in fp32 are computed for as many tokens at a time as the output's `lengths` say; the weight is
        widened once for all of them."""
        self._apart = apart = wide.Apart()
        try:
            yield apart
        finally:
            self._apart = None
            apart.scratch.leave()  # its name may outlive the block, and so hold memory for as many logits

    def __call__(self, x: torch.Tensor, lengths: Sequence[int], *, widened: bool) -> torch.Tensor:
        """`lengths`: each training's tokens. `widened`: `x` was made fp32 for a faster product."""
        bias = self._linear.bias
        if widened:
            scratch = None if self._apart is None else self._apart.scratch
            return wide.product(x, self._weight(), bias, self._pieces(x, lengths), scratch)
        if x.device.type == "cpu":
            bias = bias if bias is None else bias.to(x.dtype)
            return apart.product(x, self._weight().to(x.dtype), bias, self._pieces(x, lengths))
        own: torch.Tensor = self._own(x)
        return own

    def gradient(self, given: torch.Tensor, lengths: Sequence[int], *, widened: bool) -> torch.Tensor:
        """From the output's gradient to the input's."""
        weight = self._weight()
        if widened:
            return wide.input_gradient(given, weight, self._pieces(given, lengths))
        weight = weight.to(given.dtype)
        if given.device.type == "cpu":
            return apart.input_gradient(given, weight, self._pieces(given, lengths))
        return given @ weight

    def adds(self, x: torch.Tensor) -> bool:
        """Whether a card may add the output to what is already there."""
        few = hasattr(self._linear, "quant_state") and len(x) <= UNPACKED
        return is_on_card(x) and self._linear.bias is None and self.shape.stored is x.dtype and not few

    def add(self, x: torch.Tensor, answer: torch.Tensor) -> None:
        answer.addmm_(x, self._weight().T)

    def add_gradient(self, given: torch.Tensor, back: torch.Tensor) -> None:
        back.addmm_(given, self._weight().to(given.dtype))

    def _pieces(self, x: torch.Tensor, lengths: Sequence[int]) -> Sequence[int]:
        """How many rows are multiplied at a time on a CPU."""
        if self._apart is not None:
            return self._apart.lengths
        return apart.pieces(lengths, steady=self.steady and x.dtype is torch.float32)
