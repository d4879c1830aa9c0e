"""What a training holds from its first step to its last: the base's weights as the method stores them, those that the
adapter trains, and the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec

from .shape import Block, Shape

BLOCK_8BIT = 256
"""Values that share one fp32 scale in bitsandbytes' 8-bit optimizers."""

SMALLEST_8BIT = 4096
"""Tensors with fewer elements keep 32-bit state in them (bitsandbytes, min_8bit_size)."""


PAGED, FUSED, PLAIN = "paged_adamw_8bit", "adamw_torch_fused", "adamw_torch"
"""Those that a worker takes if the job asks for none: they are all AdamW, with different states."""


def optimizer_name(spec: JobSpec, method: Method, *, on_gpu: bool = True) -> str:
    """The optimizer that the worker takes for a job: where none is asked for, paged 8-bit AdamW where memory is scarce;
    on a processor there is nothing to page."""
    if spec.training.optim != "auto":
        return spec.training.optim
    if method is Method.QLORA and on_gpu:
        return PAGED
    return PLAIN if spec.training.exact else FUSED


def state_bytes(optimizer: str, elements: int, *, embedding: bool = False) -> int:
    """An optimizer's state for one tensor. Paged state counts in full: it is on the card while it is used.

    Moments: two of Adam (arXiv:1412.6980), one of Lion (2302.06675), RMSprop and Adagrad, three of AdEMAMix
    (2409.03137); in 8 bit each has an fp32 scale a block (2110.02861), but those of an embedding are in 32 bit
    (worker/engine/optimizer.py).
    """
    name = optimizer.removeprefix("paged_")
    moments = {"adamw": 2, "lion": 1, "ademamix": 3, "adagrad": 1, "rmsprop": 1}.get(name.partition("_")[0], 0)
    if name.endswith("_8bit") and elements >= SMALLEST_8BIT and not embedding:
        return moments * (elements + 4 * -(-elements // BLOCK_8BIT))
    return 4 * moments * elements  # none of sgd without momentum; adafactor's sums are a few kilobytes (1804.04235)


def update_bytes(optimizer: str, adapter: int, tensors: list[TrainedTensor]) -> float:
    """What the optimizer's step takes for itself: torch's AdamW works on all tensors at once and holds a root of the
    second moments; bitsandbytes' kernels work in place; adafactor squares one gradient after the other."""
    if optimizer == "adamw_torch":
        return adapter
    return 8 * max(size for size, _ in tensors) if optimizer == "adafactor" else 0


def weight_bytes(
    shape: Shape, method: Method, *, double_quant: bool = True, full: bool = False, whole_rest: bool = True
) -> int:
    """The base's bytes: 16 bit for LoRA, or 32 where dtype is float32; for QLoRA NF4 where bitsandbytes quantises.
    `whole_rest`: all the rest is in fp32 then (peft's prepare_model_for_kbit_training casts every 16-bit parameter)."""
    if method is not Method.QLORA:
        return (4 if full else 2) * shape.parameters
    layers = [(layer, block.count) for block in shape.blocks for layer in block.linears if layer.quantised]
    packed = sum(count * nf4_bytes(layer.weights, double_quant=double_quant) for layer, count in layers)
    return packed + (4 if whole_rest else 2) * shape.other_parameters


GATHERED_BLOCKS = 3
"""Blocks of a sharded base that a card holds whole at once: the one that computes, the buffer in which it arrived, and
the buffer of the next block, which is on its way (torch/distributed/fsdp/_fully_shard, FSDPParamGroup)."""


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """What one of several cards holds of a base that they divide. Bytes."""

    kept: int  # its part of the blocks, and all that is outside of blocks: the model's ends, the scales of NF4
    gathered: int  # blocks that are there whole for a while


def sharded_bytes(
    shape: Shape, method: Method, cards: int, *, double_quant: bool = True, full: bool = False, whole_rest: bool = True
) -> Sharded:
    """The base's bytes on each of `cards` cards that divide its blocks (worker/engine/ranks/shards.py): `weight_bytes`
    has those of whole blocks."""
    nf4 = method is Method.QLORA
    size = 4 if (whole_rest if nf4 else full) else 2

    def block_bytes(block: Block) -> int:
        packed = sum(-(-layer.weights // 2) for layer in block.linears if layer.quantised)
        return (packed if nf4 else size * block.quantisable) + size * block.other

    whole = weight_bytes(shape, method, double_quant=double_quant, full=full, whole_rest=whole_rest)
    divided = sum(block.count * block_bytes(block) for block in shape.blocks)
    gathered = GATHERED_BLOCKS * max(block_bytes(block) for block in shape.blocks)
    return Sharded(kept=whole - divided + -(-divided // cards), gathered=gathered)


def nf4_bytes(weights: int, *, double_quant: bool = True) -> int:
    """Bytes of one NF4 layer: 4 bit a weight; per 64 weights a scale, in 8 bit with an fp32 one per 256 of those
    (QLoRA, arXiv:2305.14314, section 3); the tables of both codes and the offset."""
    blocks = -(-weights // 64)
    packed = -(-weights // 2)
    if not double_quant:
        return packed + 4 * blocks + 16 * 4
    return packed + blocks + 4 * -(-blocks // 256) + (16 + 256) * 4 + 4


def with_head(shape: Shape, labels: int) -> Shape:
    """The shape of the model as a classifier: a head of labels instead of words. peft keeps the initial head alongside
    the one that it trains."""
    return replace(shape, tied=True, outside=shape.outside + labels * shape.hidden)


class TrainedTensor(NamedTuple):
    """Trained tensors of one size."""

    elements: int
    copies: int


class TrainedEmbedding(TrainedTensor):
    """Those that embed tokens: optimizers treat them in their own way."""


def adapter_tensors(shape: Shape, spec: JobSpec, labels: int | None = None) -> Iterator[TrainedTensor]:
    """Every trained tensor; `labels` are a classifier's."""
    r, targets = spec.lora.r, spec.lora.target_modules
    if labels:
        yield TrainedTensor(shape.hidden * labels, 1)
    for layer, count in shape.adapted(targets):
        yield TrainedTensor(r * layer.inputs, count)
        yield TrainedTensor(r * layer.outputs, count)
        if spec.lora.use_dora:
            yield TrainedTensor(layer.outputs, count)  # the magnitudes
    for name in spec.lora.modules_to_save:
        if part := saved_part(name):
            yield (TrainedEmbedding if part == "embedding" else TrainedTensor)(shape.embedding, 1)
        for layer, count in shape.adapted([name]):
            yield TrainedTensor(layer.weights + (layer.outputs if layer.bias else 0), count)
    for block in shape.blocks:
        if block.experts and block.experts.adapted and targets == "all-linear":
            yield TrainedTensor(block.experts.adapter_parameters(r), block.count)


def adapter_state_bytes(optimizer: str, tensors: Iterable[TrainedTensor]) -> int:
    """An optimizer's state for all trained tensors."""
    return sum(
        tensor.copies * state_bytes(optimizer, tensor.elements, embedding=isinstance(tensor, TrainedEmbedding))
        for tensor in tensors
    )


def saved_part(name: str) -> Literal["embedding", "head"] | None:
    """Which of the model's ends a name in lora.modules_to_save means, if any."""
    last = name.rpartition(".")[2]
    if last in ("lm_head", "embed_out"):
        return "head"
    return "embedding" if last in ("embed_tokens", "wte", "embed_in", "word_embeddings") else None
