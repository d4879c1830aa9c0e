"""Layers of an adapted model that compute in the engine's own way while rows pass, not by others' code: a frozen linear
layer and its adapter are one product, to which the adapter's part is added in place."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loractl.worker.base.arithmetic import Precision
from loractl.worker.base.shared_heads import kind_of

from . import wide
from .card_kernels import is_on_card, row_norms
from .wide import Scratch


class NotFused(Exception):
    """A model has an adapter on a layer that is not a plain linear one."""


class FusedLayers:
    """Products with adapters, norms, and on a processor every product of a frozen weight."""

    def __init__(self, model: Any, precision: Precision) -> None:
        """Raises NotFused."""
        words = model.get_base_model()
        self._casts = Casts()
        self._in_block: dict[str, list[AdaptedProduct]] = {}  # by the block's path
        self._forwards: list[tuple[Any, Callable[..., Any]]] = [*row_norms(words)]
        self._head: AdaptedProduct | None = None  # if its outputs are in fp32 all the same
        self._take_adapted(words)
        if words.device.type == "cpu":
            self._take_frozen(words, head=wide.may_widen(words.device, precision.base))

    @contextlib.contextmanager
    def taken_over(self) -> Iterator[None]:
        """Until the backward pass is over: blocks that are recomputed need it, too."""
        before = [module.__dict__.get("forward") for module, _ in self._forwards]
        self._casts.forget()
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:  # even if torch ends a block's recomputation early, by raising its own error
            for (module, _), own in zip(self._forwards, before, strict=True):
                if own is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = own
            self._casts.forget()

    @contextlib.contextmanager
    def head_scratch(self) -> Iterator[Scratch | None]:
        """Memory in which the head leaves its logits, each time over the last; None: it leaves them elsewhere."""
        if self._head is None:
            yield None
            return
        self._head.frozen.scratch = scratch = Scratch()
        try:
            yield scratch
        finally:
            self._head.frozen.scratch = None
            scratch.leave()  # its name may outlive the block, and so hold memory for as many logits

    def _take_adapted(self, words: Any) -> None:
        from peft.tuners.lora.layer import LoraLayer

        for path, layer in words.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            frozen = FrozenProduct.of(layer.get_base_layer())
            if frozen is None or ADAPTER not in layer.lora_A or layer.lora_bias[ADAPTER]:
                raise NotFused(f"{path} is not a plain linear layer")
            self._take(path, layer, frozen, layer)

    def _take_frozen(self, words: Any, *, head: bool) -> None:
        """Also layers without an adapter, for their faster products."""
        from peft.tuners.lora.layer import LoraLayer

        last = words.get_output_embeddings() if head else None
        adapted = {id(module.get_base_layer()) for module in words.modules() if isinstance(module, LoraLayer)}
        for path, linear in [*words.base_model.named_modules(), *([("", last)] if last is not None else [])]:
            if id(linear) in adapted or (frozen := FrozenProduct.of(linear)) is None:
                continue
            product = self._take(path, linear, frozen, None)
            if linear is last:
                self._head, product.rounds = product, False

    def _take(self, path: str, module: Any, frozen: FrozenProduct, layer: Any) -> AdaptedProduct:
        block = re.match(r".*?\.\d+(?=\.)", path)  # the path of the layer's block; a layer in none is its own
        others = self._in_block.setdefault(path if block is None else block.group(), [])
        product = AdaptedProduct(frozen, layer, others, self._casts)
        self._forwards.append((module, product))
        return product


ADAPTER = "default"
"""peft's name for a model's only adapter."""


UNPACKED = 1536
"""Beyond this number of rows bitsandbytes 0.50 unpacks a 4-bit weight before it multiplies (backends/cuda/ops.py). For
fewer it may have a kernel that does both."""


class Casts:
    """A block's factors in the type of its products, on a card. One kernel casts all of them: a card would start one
    for each, and a Llama block has fourteen."""

    def __init__(self) -> None:
        self._of: tuple[Any, dict[torch.Tensor, torch.Tensor]] = (None, {})  # block and type, and the casts by factor

    def forget(self) -> None:
        """Before and after a pass: an optimizer changes the factors."""
        self._of = (None, {})

    def take(self, block: list[AdaptedProduct], kind: torch.dtype) -> dict[torch.Tensor, torch.Tensor]:
        """The cast of each factor that has another type. Blocks pass one after another, so only one's are held."""
        if self._of[0] != (id(block), kind):
            before = [factor for product in block for factor in product.factors if factor.dtype is not kind]
            with torch.no_grad():
                after = [torch.empty_like(factor, dtype=kind) for factor in before]
                if before:
                    torch._foreach_copy_(after, before)
            self._of = (id(block), kind), dict(zip(before, after, strict=True))
        return self._of[1]


class AdaptedProduct:
    """The forward() of a frozen linear layer, with the part of its adapter if it has one."""

    def __init__(self, frozen: FrozenProduct, layer: Any, block: list[AdaptedProduct], casts: Casts) -> None:
        """`layer`: peft's layer around it; None: it has no adapter. `block`: the products in the same block of the
        model, to which this one is added."""
        block.append(self)
        self.frozen, self._layer, self._block, self._casts = frozen, layer, block, casts
        self._variant = None if layer is None else layer.lora_variant.get(ADAPTER)
        self.rounds = True  # what it computes in fp32, to its input's type

    @property
    def factors(self) -> tuple[torch.Tensor, ...]:
        """A and B, where the product adds their part; a variant like DoRA does it in peft's own code."""
        if self._layer is None or self._variant is not None:
            return ()
        return self._layer.lora_A[ADAPTER].weight, self._layer.lora_B[ADAPTER].weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(kind := kind_of(x))
        casts = self._casts.take(self._block, kind) if is_on_card(x) else {}
        factors = self.factors
        part = _AdapterPart.of(self._layer) if factors else None
        answer = _Product.apply(flat, self.frozen, self.rounds, part, casts, *factors).view(*x.shape[:-1], -1)
        if self.frozen.quantised:
            answer = answer.to(x.dtype)  # an NF4 layer's output has its input's type
        if self._variant is None:
            return answer
        found: torch.Tensor = self._variant.forward(self._layer, active_adapter=ADAPTER, x=x, result=answer)
        return found.to(answer.dtype)


@dataclass(frozen=True, kw_only=True)
class _AdapterPart:
    """What an adapter adds to a product, besides its factors."""

    kind: torch.dtype  # of its gradients
    scaling: float
    dropout: float

    @classmethod
    def of(cls, layer: Any) -> _AdapterPart:
        dropout = layer.lora_dropout[ADAPTER]
        return cls(
            kind=layer.lora_A[ADAPTER].weight.dtype,
            scaling=layer.scaling[ADAPTER],
            dropout=getattr(dropout, "p", 0.0) if dropout.training else 0.0,
        )


class _Product(torch.autograd.Function):
    """x W + s (dropout(x) A) B.

    The adapter's part is added in place to the base's product, forward and backward: it needs no tensor of the output's
    size. A card adds the base's product to the adapter's, since what a large product reads and writes besides its
    weight costs nothing there. All is computed in the type of `x`, or in fp32 if a CPU is faster that way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        frozen: FrozenProduct,
        rounds: bool,
        part: _AdapterPart | None,
        casts: dict[torch.Tensor, torch.Tensor],
        *factors: torch.Tensor,
    ) -> Any:
        ctx.frozen, ctx.part, ctx.narrow, ctx.kept = frozen, part, x.dtype, None
        ctx.widened = widened = wide.widens(x)
        kind = torch.float32 if widened else x.dtype
        with wide.as_it_is(x):
            read = x.to(kind)
            if part is None:
                answer = frozen(read, widened=widened)
            else:
                a, b = (casts.get(factor, factor).to(kind) for factor in factors)
                mask = _mask(x, part.dropout) if part.dropout else None
                seen = read if mask is None else _dropped(read, mask, part.dropout)
                inner = seen @ a.T
                # a CPU applies dropout again: memory costs it more
                saved = [a, b, seen if is_on_card(x) else x, inner, *([] if mask is None else [mask])]
                ctx.kept = _Kept.node(x, factors, saved)
                if frozen.adds(x):
                    answer = _scaled(inner, b.T, part.scaling, x.new_empty(len(x), frozen.outputs))
                    frozen.add(x, answer)
                else:
                    answer = frozen(read, widened=widened).addmm_(inner, b.T, alpha=part.scaling)
        return answer.to(x.dtype) if rounds else answer

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> Any:
        frozen, part, kind = ctx.frozen, ctx.part, torch.float32 if ctx.widened else ctx.narrow
        # contiguous: the library also picks a kernel by strides
        given, nothing = given.contiguous().to(kind), (None,) * 4
        if part is None:
            back = frozen.gradient(given, widened=ctx.widened) if ctx.needs_input_grad[0] else None
            return (back if back is None else back.to(ctx.narrow), *nothing)
        (a, b, seen, inner, *masks), ctx.kept = ctx.kept.saved_tensors, None
        mask, adds, back = masks[0] if masks else None, is_on_card(given), None
        if ctx.needs_input_grad[0] and not adds:
            back = frozen.gradient(given, widened=ctx.widened)
        seen = seen.to(kind)
        if mask is not None and not adds:
            seen = _dropped(seen, mask, part.dropout)
        to_b, of_inner = _slopes(given, inner, b, part)
        to_a = (of_inner.T @ seen).to(part.kind)
        if ctx.needs_input_grad[0] and adds:
            back = _scaled(of_inner, a, 1 / (1 - part.dropout), given.new_empty(len(given), frozen.inputs))
            if mask is not None:
                back.mul_(mask)
            frozen.add_gradient(given, back)
        elif back is not None and mask is None:
            back.addmm_(of_inner, a)
        elif back is not None:
            back += _dropped(of_inner @ a, mask, part.dropout)
        return (back if back is None else back.to(ctx.narrow), *nothing, to_a, to_b)


def _slopes(
    of_answer: torch.Tensor, inner: torch.Tensor, b: torch.Tensor, part: _AdapterPart
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


def _mask(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """What dropout keeps: on a CPU the numbers by which torch's own dropout multiplies its input, on a card one byte
    per element."""
    kind = torch.bool if is_on_card(x) else x.dtype
    mask = torch.empty(x.shape, dtype=kind, device=x.device).bernoulli_(1 - dropout)
    return mask if kind is torch.bool else mask.div_(1 - dropout)


def _dropped(x: torch.Tensor, mask: torch.Tensor, dropout: float) -> torch.Tensor:
    if mask.dtype is torch.bool:  # the kernel that also scales
        return torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - dropout))
    return x * mask


class FrozenProduct:
    """What a frozen linear layer computes, forward and backward, on tensors of shape (tokens, width)."""

    def __init__(self, linear: Any, weight: Callable[[], torch.Tensor], *, inputs: int, outputs: int) -> None:
        self._linear, self._own, self._weight = linear, linear.forward, weight
        self.inputs, self.outputs = inputs, outputs
        self.quantised = hasattr(linear, "quant_state")
        self._stored = linear.weight.quant_state.dtype if self.quantised else linear.weight.dtype
        self.scratch: Scratch | None = None  # for outputs in fp32: each overwrites the last

    @classmethod
    def of(cls, linear: Any) -> FrozenProduct | None:
        """None for an unknown kind of layer, or one that is trained."""
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit
        from transformers.pytorch_utils import Conv1D

        weights: dict[type, Callable[[], torch.Tensor]] = {
            torch.nn.Linear: lambda: linear.weight,
            Conv1D: lambda: linear.weight.T,
            Linear4bit: lambda: dequantize_4bit(linear.weight.data, linear.weight.quant_state),
        }
        weight = weights.get(type(linear))
        if weight is None or any(parameter.requires_grad for parameter in linear.parameters()):
            return None
        turned = isinstance(linear, Conv1D)
        inputs, outputs = linear.weight.shape if turned else (linear.in_features, linear.out_features)
        return cls(linear, weight, inputs=inputs, outputs=outputs)

    def __call__(self, x: torch.Tensor, *, widened: bool) -> torch.Tensor:
        """`widened`: `x` was made fp32 for a faster product."""
        bias = self._linear.bias
        if widened:
            return wide.product(x, self._weight(), bias, self.scratch)
        if x.device.type == "cpu":
            weight = self._weight().to(x.dtype).T
            return torch.mm(x, weight) if bias is None else torch.addmm(bias.to(x.dtype), x, weight)
        own: torch.Tensor = self._own(x)
        return own

    def gradient(self, given: torch.Tensor, *, widened: bool) -> torch.Tensor:
        """From the output's gradient to the input's."""
        weight = self._weight()
        return wide.input_gradient(given, weight) if widened else given @ weight.to(given.dtype)

    def adds(self, x: torch.Tensor) -> bool:
        """Whether a card may add the output to what is already there."""
        few = self.quantised and len(x) <= UNPACKED
        return is_on_card(x) and self._linear.bias is None and self._stored is x.dtype and not few

    def add(self, x: torch.Tensor, answer: torch.Tensor) -> None:
        answer.addmm_(x, self._weight().T)

    def add_gradient(self, given: torch.Tensor, back: torch.Tensor) -> None:
        back.addmm_(given, self._weight().to(given.dtype))
