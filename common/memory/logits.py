"""Logits: the bytes of a loss on them, in a step of training or when a held-out row is evaluated."""

from __future__ import annotations

from dataclasses import replace

from loractl.common.job.spec import JobSpec

from .activations import block_cost, key_width
from .shape import Shape
from .step import HEAD_CHUNK, Step

LOSS_BYTES = 12
"""Bytes per logit where the loss is at its peak: the log-softmax kept in fp32, its gradient, and the logits' gradient
(transformers' ForCausalLMLoss casts logits to fp32; the 16-bit logits are freed before the backward pass)."""

CHUNK_BYTES = 8
"""Bytes per logit of a lean step's chunk at its peak: in fp32 the logits, and what will be their gradient."""

EVALUATED_LOGIT_BYTES = 12
"""Bytes per held-out logit: the fp32 copy that accelerate makes, the learned positions' copy, their log-softmax
(worker/evaluation/evaluation.py)."""


def loss_bytes(shape: Shape, step: Step) -> float:
    """The last norm, the logits and their loss, and the 16-bit copy of an fp32 head that autocast keeps.

    A classifier's head runs on every token, though only one a row counts. Its input, its output and the gradients of
    both take memory (GenericForSequenceClassification.forward in transformers/modeling_layers.py).
    """
    if step.labels:
        size = 2 if step.autocast else 4
        head = size * step.labels * shape.hidden if step.autocast else 0
        return step.tokens * (4 * shape.hidden + size * (2 * shape.hidden + 2 * step.labels)) + head
    logit = (CHUNK_BYTES if step.lean else LOSS_BYTES) + (_capped_bytes(step) if shape.softcaps else 0)
    cast = (step.quantised and step.whole_rest) or step.saved_head
    head = 2 * shape.embedding if cast and step.autocast else 0
    if step.lean:  # the last norm and its output, those that are learned from and their gradient, one chunk of logits
        size = 4 if step.full else 2
        return step.tokens * shape.hidden * (4 + 3 * size) + _chunk(step) * shape.vocab * logit + head
    return step.tokens * (4 * shape.hidden + shape.vocab * logit) + head


def evaluation_bytes(shape: Shape, spec: JobSpec, step: Step) -> float:
    """Scoring one held-out row, or answering it with a cache of keys and values; gradients are gone by then. A
    classifier answers nothing."""
    row = replace(step, batch=1, length=step.evaluated, unpadded=None)
    working = max(block_cost(shape, block, row).forward for block in shape.blocks if block.text)
    if step.labels:
        return max(working, loss_bytes(shape, row))
    head = 2 * shape.embedding if step.quantised and step.whole_rest and step.autocast else 0
    logits = min(HEAD_CHUNK, step.evaluated) if step.lean else step.evaluated
    scored = logits * shape.vocab * EVALUATED_LOGIT_BYTES + head
    scored += 2 * step.wide * step.evaluated * shape.hidden if step.lean else 0  # all hidden states, those learned from
    if spec.evaluation.samples == 0:
        return max(scored, working)
    tokens = step.evaluated + spec.evaluation.max_new_tokens
    cached = tokens * 2 * key_width(shape) * step.wide  # autocast is off there
    return max(scored, working + (shape.layers + 1) * cached)


def answered_bytes(shape: Shape, step: Step) -> float:
    """The 16-bit logits that a head answers. The loss casts them to fp32, so they are gone by its peak, but the block
    that they leave cached is too small for any of its tensors, and nothing else is as large."""
    if step.lean or step.full or step.labels or step.keeps_logits:  # kept logits are counted as tensors
        return 0.0
    return step.tokens * shape.vocab * 2.0 if step.autocast or step.wide == 2 else 0.0


def stranded_bytes(shape: Shape, step: Step, ends: float) -> float:
    """What the loss leaves cached that the backward pass can't use. The allocator splits a free block for a smaller
    tensor, but never joins two for a larger one: scores that are larger than logits need memory of their own, as the
    loss needs in front of blocks that were cached while the forward pass ran."""
    scores = step.batch * shape.heads * step.length**2 if step.eager or shape.single_key else 0
    return ends if scores > (_chunk(step) if step.lean else step.tokens) * classes(shape, step) else 0.0


def _capped_bytes(step: Step) -> int:
    """Bytes per logit of the tanh that a cap keeps, in the type that the head answers in."""
    return 4 if step.full or step.widens else 2


def _chunk(step: Step) -> int:
    return min(HEAD_CHUNK, step.tokens)


def classes(shape: Shape, step: Step) -> int:
    """Logits of one token."""
    return step.labels or shape.vocab
