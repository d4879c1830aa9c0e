"""A training step: the numbers of one job that decide what its activations take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loractl.common.job.method import Method, Parallel
from loractl.common.job.spec import JobSpec

from .shape import Shape
from .weights import saved_part

PROCESSOR_MASK_BYTES = 4
"""torch has no fused dropout on a processor: the mask is a tensor of the input's own type, which peft makes fp32 and a
lean step leaves as it is."""

HEAD_CHUNK = 256
"""Learned tokens whose logits a lean step holds at once (worker/engine/passes/lean.py)."""

MOST_LONGEST = 256
"""Rows whose own lengths are counted; further rows of a micro-batch are assumed to be as long as the last of them."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The longest rows in tokens after tokenising: of those to train on, and of those held out."""

    train: int
    evaluate: int
    rows: int | None = None  # to train on: a micro-batch can't hold more
    labels: int | None = None  # of a classifier
    longest: tuple[int, ...] = ()  # the longest rows to train on, longest first: MOST_LONGEST of them
    text: int | None = None  # the longest answer of a pair to train on

    def tokens(self, rows: int) -> int:
        """Tokens of the largest micro-batch of `rows` rows, without padding."""
        first = (self.longest or (self.train,))[:rows]
        return sum(first) + (rows - len(first)) * first[-1]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """How a training runs where no key of the spec says so. The defaults are those of this project's worker."""

    on_gpu: bool = True  # False: a processor, where the worker recomputes nothing unless the job asks for it
    attention: Literal["sdpa", "eager"] | None = None  # None: what transformers takes for the architecture
    autocast: bool = True  # False: a loop without it, which computes adapters in fp32
    keeps_logits: bool = False  # True: a loop that holds the model's output during the backward pass
    double_quant: bool = True
    widens: bool = True  # False: a processor that is known to make no products of 16-bit numbers in fp32
    padded: bool = False  # True: the engine has found that this model's rows need padding
    full: bool = False  # True: the device takes fp32 where a job leaves the type to it
    grouped: bool = True  # False: a card without a fused kernel for heads that share keys and values
    cards: int = 1  # that share the job; the plan is of each of them
    parallel: Parallel = Parallel.NONE


@dataclass(frozen=True, kw_only=True)
class Step:
    """The numbers of a job that the formulas of the plan look at."""

    batch: int
    length: int
    unpadded: int | None  # tokens of all rows, if they follow each other; None: each row is as long as the longest
    evaluated: int  # length of the longest held-out row
    quantised: bool  # QLoRA
    whole_rest: bool  # what NF4 leaves alone is in fp32
    wide_norms: bool  # LayerNorm is fp32 under autocast, an NF4 layer answers in the type of its input: all become fp32
    lean: bool  # rows after each other, logits in chunks, adapters' input as it is; else as transformers' Trainer
    full: bool  # all in fp32, without autocast
    widens: bool  # products of 16-bit numbers may be made in fp32: on some processors
    saved_embedding: bool  # trained in fp32, which makes the residual stream fp32
    saved_head: bool  # trained in fp32
    dora: bool
    packed: bool  # rows of several examples, kept apart by a mask
    checkpoints: int  # blocks are recomputed: each (1), every second (2), none (0)
    dropout: bool
    mask_bytes: int  # of dropout's mask, an element
    r: int
    targets: str | list[str]
    eager: bool
    grouped: bool  # a fused kernel takes heads that share keys and values; else these are repeated for each head
    autocast: bool
    keeps_logits: bool
    labels: int | None  # of a classifier

    @classmethod
    def of(cls, shape: Shape, spec: JobSpec, method: Method, lengths: Lengths | None, stack: Stack) -> Step:
        training = spec.training
        full = training.dtype == "float32" or (stack.full and training.dtype == "auto")
        saved = {saved_part(name) for name in spec.lora.modules_to_save}
        lean = is_lean(shape, spec) and not stack.padded
        asked = None if training.attn_implementation == "auto" else training.attn_implementation
        row = lengths.train if lengths else longest_row(spec)
        texts = 1 if lean else spec.kind.halves  # of a row, where each is padded by itself
        batch = micro_batch(spec, lengths, stack.cards) * texts
        return cls(
            batch=batch,
            unpadded=lengths.tokens(batch) if lengths and lean else None,
            lean=lean,
            whole_rest=training.exact or full,
            wide_norms=shape.norm == "layer" and shape.linear_parameters > 0,
            full=full,
            widens=lean and stack.autocast and not full and not stack.on_gpu and stack.widens,
            saved_embedding="embedding" in saved,
            saved_head="head" in saved,
            dora=spec.lora.use_dora,
            packed=training.packing,
            length=row if texts == 1 else (lengths and lengths.text) or row // texts,
            evaluated=lengths.evaluate if lengths else longest_row(spec),
            quantised=method is Method.QLORA,
            checkpoints=checkpoints_activations(spec, on_gpu=stack.on_gpu),
            dropout=spec.lora.lora_dropout > 0,
            mask_bytes=_mask_bytes(stack, in_16_bit=lean and not full),
            r=spec.lora.r,
            targets=spec.lora.target_modules,
            eager=(stack.attention or asked or shape.attention) == "eager",
            grouped=stack.grouped and not (full and stack.on_gpu),  # torch has none for a card's fp32
            autocast=stack.autocast and not full,
            keeps_logits=stack.keeps_logits,
            labels=planned_labels(spec, lengths),
        )

    @property
    def tokens(self) -> int:
        return self.batch * self.length if self.unpadded is None else self.unpadded

    @property
    def padded(self) -> bool:
        """Rows of one batch differ in length, so attention needs a mask; a single row of one example needs none."""
        return not self.lean and (self.batch > 1 or self.packed)

    @property
    def wide(self) -> int:
        """Bytes per element of the residual stream, which takes the norms' and embeddings' type."""
        nf4 = self.quantised and (self.whole_rest or self.wide_norms)
        return 4 if nf4 or self.full or self.saved_embedding else 2

    @property
    def factor_input(self) -> int:
        """Bytes per element of what a LoRA layer's first factor keeps: autocast's 16-bit copy, else fp32."""
        return 2 if self.autocast else 4


def _mask_bytes(stack: Stack, *, in_16_bit: bool) -> int:
    return 1 if stack.on_gpu else PROCESSOR_MASK_BYTES // 2 if in_16_bit else PROCESSOR_MASK_BYTES


def is_lean(shape: Shape, spec: JobSpec) -> bool:
    """Whether the engine trains a job without padding, as `forward_pass` of worker/engine/passes/choice.py decides."""
    training = spec.training
    padded = training.exact or training.engine == "peft" or training.torch_compile
    padded = padded or training.neftune_noise_alpha is not None
    return not padded and spec.kind.padded is None and not shape.needs_padding


def longest_row(spec: JobSpec) -> int:
    """The most tokens that a row may have."""
    return spec.kind.halves * spec.dataset.max_length


def micro_batch(spec: JobSpec, lengths: Lengths | None, cards: int = 1) -> int:
    """Rows of one forward pass on each card: the spec's number, a card's part of a step, or all rows."""
    most = spec.training.per_device_train_batch_size if cards == 1 else spec.training.rows_a_card(cards)[0]
    return min(most, lengths.rows) if lengths and lengths.rows else most


def planned_labels(spec: JobSpec, lengths: Lengths | None) -> int | None:
    """Labels of a classifier, as many as its data have or a guess; None for a job that learns to answer."""
    return spec.kind.planned_labels(lengths.labels if lengths else None)


def checkpoints_activations(spec: JobSpec, *, on_gpu: bool = True) -> int:
    """Which blocks are recomputed in the backward pass, for the plan and for the training itself: each (1), every
    second from the first on (2), or none (0). On a GPU each is unless the job refuses, on a processor, where memory is
    not what is scarce, only where it asks for it."""
    asked = spec.training.gradient_checkpointing
    return 2 if asked == "half" else int(on_gpu if asked is None else asked)
