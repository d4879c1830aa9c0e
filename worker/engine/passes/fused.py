"""Layers of an adapted model that compute in the engine's own way while rows pass, not by others' code."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from loractl.worker.base.arithmetic import Precision

from . import wide
from .card_kernels import row_norms
from .product import ADAPTER, AdaptedProduct, Casts, FrozenProduct
from .scratch import Scratch


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
        product = AdaptedProduct(frozen, layer, self._in_block.setdefault(_block_of(path), []), self._casts)
        self._forwards.append((module, product))
        return product


def _block_of(path: str) -> str:
    """The path of a layer's block, or its own path if it is in none."""
    block = re.match(r".*?\.\d+(?=\.)", path)
    return path if block is None else block.group()
