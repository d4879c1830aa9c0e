"""What a model is made of: its parameters by kind, and its linear layers by name."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from loractl.common.module_pattern import ModulePattern

ROUTER_FACTOR = 1
"""peft gives an expert layer's router the job's own rank."""

GATE_UP_FACTOR = 2
"""peft doubles the rank on a fused gate_up_proj: it holds two layers of the original checkpoint
(peft/utils/transformers_weight_conversion.py)."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear layer of a block; `name` is its path inside the block."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    quantised: bool = True  # bitsandbytes replaces plain nn.Linear and GPT-2's Conv1D, no other class

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Experts fused into two parameters of three dimensions, which bitsandbytes does not see."""

    count: int
    chosen: int  # per token
    hidden: int
    ffn: int  # width of one expert
    adapted: bool  # whether peft's all-linear reaches them, as it does where it knows the checkpoint's old layout

    @property
    def weights(self) -> int:
        return 3 * self.count * self.hidden * self.ffn

    @property
    def router(self) -> int:
        return self.count * self.hidden

    def adapter_parameters(self, r: int) -> int:
        """LoRA weights on router, gate_up_proj and down_proj (peft's ParamWrapper: one pair of factors an expert)."""
        router = ROUTER_FACTOR * r * (self.hidden + self.count)
        gate_up = GATE_UP_FACTOR * r * self.count * (self.hidden + 2 * self.ffn)
        return router + gate_up + r * self.count * (self.ffn + self.hidden)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A transformer block and how often the model has it."""

    count: int
    linears: tuple[Linear, ...]
    norms: int  # parameters of its norms
    experts: Experts | None = None
    text: bool = True  # False: a vision tower, which holds weights and adapters but sees no token
    path: str = "model.layers.{}"  # its name in the model, with a place for its number
    numbers: tuple[int, ...] | None = None  # of each such block; None: from 0 on

    def names(self, layer: Linear) -> list[str]:
        """A layer's whole names in the model, as many as there are such blocks."""
        return [f"{self.path.format(n)}.{layer.name}" for n in self.numbers or range(self.count)]

    @property
    def quantisable(self) -> int:
        return sum(layer.weights for layer in self.linears if layer.quantised)

    @property
    def other(self) -> int:
        fused = self.experts.weights + self.experts.router if self.experts else 0
        unseen = sum(layer.weights for layer in self.linears if not layer.quantised)
        return fused + unseen + self.norms + sum(layer.outputs for layer in self.linears if layer.bias)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the memory plan needs to know of a model. Sizes are numbers of elements."""

    family: str  # config.json's model_type
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the output head is the embedding
    blocks: tuple[Block, ...]
    outside: int = 0  # parameters besides blocks, embedding and head: final norm, positions, a tower's ends
    norm: Literal["rms", "layer"] = "rms"
    norms_per_block: int = 2  # over the hidden size
    head_norms: bool = False  # norms on queries and keys
    gated: bool = True  # the MLP multiplies an activated gate with a second projection
    attention: Literal["sdpa", "eager"] = "sdpa"  # what transformers takes where nothing is asked for
    softcaps: bool = False  # tanh caps on attention scores and logits (Gemma 2)
    alibi: bool = False  # positions as a mask of every head's own (Falcon)
    needs_padding: bool = False  # rows can't be separated otherwise (worker/engine/passes/choice.py)

    @property
    def fused_qkv(self) -> bool:
        """Queries, keys and values are slices of one layer's output, rotated where positions are rotary."""
        return self.family in ("phi3", "gpt_neox") or (self.family == "falcon" and not self.alibi)

    @property
    def layers(self) -> int:
        return sum(block.count for block in self.blocks if block.text)

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def linear_parameters(self) -> int:
        """Weights that NF4 replaces."""
        return sum(block.count * block.quantisable for block in self.blocks)

    @property
    def other_parameters(self) -> int:
        """All the rest: embedding, head, norms, biases, fused experts, linear layers of a class of their own."""
        ends = self.embedding * (1 if self.tied else 2) + self.outside
        return ends + sum(block.count * block.other for block in self.blocks)

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Those that a token passes: of experts, the chosen ones."""
        idle = (
            block.count * block.experts.weights * (1 - block.experts.chosen / block.experts.count)
            for block in self.blocks
            if block.experts
        )
        return self.parameters - round(sum(idle))

    def adapted(self, targets: str | Iterable[str]) -> list[tuple[Linear, int]]:
        """The linear layers that an adapter reaches, each with how often it does.

        A target names a layer when it is its path or the path's end (peft's check_target_module_exists). A text other
        than all-linear is an expression over whole names.
        """
        every = [(layer, block.count) for block in self.blocks for layer in block.linears]
        if targets == "all-linear":
            return every
        if isinstance(targets, str):
            each = ((layer, _matched(targets, block, layer)) for block in self.blocks for layer in block.linears)
            return [(layer, count) for layer, count in each if count]
        wanted = tuple(targets)
        return [(layer, count) for layer, count in every if any(_names(target, layer.name) for target in wanted)]

    def adapter_parameters(self, r: int, targets: str | Iterable[str]) -> int:
        """Trained parameters of a LoRA adapter: r (in + out) a layer (arXiv:2106.09685, section 4.1)."""
        targets = targets if isinstance(targets, str) else tuple(targets)
        dense = sum(count * r * (layer.inputs + layer.outputs) for layer, count in self.adapted(targets))
        if targets != "all-linear":
            return dense
        fused = [(b.experts, b.count) for b in self.blocks if b.experts and b.experts.adapted]
        return dense + sum(count * experts.adapter_parameters(r) for experts, count in fused)


MOST_STEPS = 100_000
"""Of an expression over the names of one kind of layer. With 20 kinds that is 3 s at most."""


@functools.lru_cache(maxsize=512)
def _matched(pattern: str, block: Block, layer: Linear) -> int:
    """How many of these blocks' layers match; all of them if that takes too long to decide: plans err on the high side,
    and check_adapter and the worker refuse such an expression."""
    try:
        return len(ModulePattern(text=pattern).matches(block.names(layer), most_steps=MOST_STEPS))
    except ValueError:
        return block.count


def _names(target: str, name: str) -> bool:
    return target == name or name.endswith(f".{target}") or target.endswith(f".{name}")
