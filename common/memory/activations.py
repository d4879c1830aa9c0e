"""Activations: the bytes that each part of a transformer block keeps for the backward pass, and those of a loss on the
logits, in a training step or an evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from loractl.common.job.spec import JobSpec

from .shape import Block, Experts, Linear, Shape
from .step import HEAD_CHUNK, Step


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes of one transformer block."""

    saved: float  # kept from its forward to its backward pass
    working: float  # on top of that where it is worst
    forward: float  # the working set of a forward pass that keeps nothing

    def __add__(self, other: Cost) -> Cost:
        """Two parts that run one after the other."""
        return Cost(
            saved=self.saved + other.saved,
            working=max(self.working, other.working),
            forward=max(self.forward, other.forward),
        )

    def peak(self, recomputed: bool) -> float:
        return self.working + (self.saved if recomputed else 0)


def stored_bytes(shape: Shape, blocks: list[tuple[Cost, int]], step: Step) -> float:
    """What the forward pass leaves for the backward pass: the inputs of blocks that are recomputed, and all that others
    keep. Blocks of several kinds are assumed to be recomputed alike."""
    mask = 0
    if not step.lean and (step.eager or step.padded or shape.alibi):  # one for all blocks
        mask = (
            step.batch * step.length**2 * (step.wide * shape.heads if shape.alibi else step.wide if step.eager else 1)
        )
    recomputed = -(-shape.layers // step.checkpoints) if step.checkpoints else 0
    inputs = recomputed * step.tokens * shape.hidden * step.wide
    return mask + inputs + sum(count * cost.saved for cost, count in blocks) * (1 - recomputed / max(1, shape.layers))


def block_cost(shape: Shape, block: Block, step: Step) -> Cost:
    """One block's activations, part by part as its operators keep them.

    Its backward pass begins with the MLP, so what the MLP kept is gone when attention's turn comes.
    """
    tokens, adapted = step.tokens, _adapted(shape, block, step)
    norms = 4 * shape.hidden * _norms(shape, step)
    if shape.head_norms:
        norms += 4 * _query_width(shape) + 4 * key_width(shape)
    casts = 2 * sum(step.r * (layer.inputs + layer.outputs) for layer in adapted) if step.autocast else 0
    unpacked = step.quantised and step.autocast and step.whole_rest
    copies = sum(2 * layer.weights for layer in block.linears if not layer.quantised) if unpacked else 0
    attention = _attention(shape, step)
    feed_forward = _mlp(shape, block, step) + _experts(block.experts, step)
    inner = _factor_bytes([layer for layer in adapted if layer.name.startswith("mlp.")], step)
    outer = _factor_bytes([layer for layer in adapted if not layer.name.startswith("mlp.")], step)
    later = feed_forward.saved + tokens * inner
    saved = tokens * (norms + outer) + casts + copies + attention.saved + later
    around = tokens * _around(shape, step)
    if step.dora:
        saved += sum(_dora_bytes(layer, step) for layer in adapted)
        around += max((_dora_working(layer, step) for layer in adapted), default=0)
    return Cost(
        saved=saved,
        working=around + max(feed_forward.working, attention.working - later),
        forward=around + max(feed_forward.forward, attention.forward),
    )


def _dora_bytes(layer: Linear, step: Step) -> float:
    """What DoRA's magnitudes keep of a layer: the base's output and the factors', and with dropout, where the base's
    output is computed again, the base's weights cast once more (peft/tuners/lora/dora.py, DoraLinearLayer.forward)."""
    size = 2 if step.autocast else 4
    cast = step.quantised or (step.autocast and not step.lean)  # a lean step's input is of the weights' type
    again = layer.weights * size if step.dropout and cast else 0
    return step.tokens * layer.outputs * 2 * size + again


def _dora_working(layer: Linear, step: Step) -> float:
    """The norm of W + BA (an identity, BA made from it, the base's weights unpacked, and their sum), and the scaled
    output in fp32 with its gradient."""
    size = 2 if step.autocast else 4
    return 4 * layer.inputs**2 + layer.weights * (size + size + step.wide) + step.tokens * layer.outputs * (4 + size)


def _around(shape: Shape, step: Step) -> float:
    """Bytes a token of the hidden size that are alive around the busiest layer: the norm's output, the layer's own,
    the residual between, the gradient on its way back. LayerNorm computes in fp32 under autocast."""
    normed = 4 if shape.norm == "layer" or step.wide == 4 else 2
    parallel = shape.norms_per_block if shape.family in ("gpt_neox", "falcon") else 1
    layers = 12 if step.full else 6 if step.wide == 4 else 8
    if step.lean and (shape.norms_per_block == 4 or shape.family == "olmo2"):
        layers += 4  # a layer's output is normed too, in fp32
    if step.lean and step.wide_norms and step.quantised:
        layers += 12  # NF4 layers that are given fp32 make 16-bit copies of it; traced
    return shape.hidden * (layers + normed * parallel)


def _adapted(shape: Shape, block: Block, step: Step) -> list[Linear]:
    return [layer for layer, _ in replace(shape, blocks=(block,)).adapted(step.targets)]


def _factor_bytes(layers: list[Linear], step: Step) -> float:
    """Bytes a token that LoRA layers keep: the first factor's input, dropout's mask, the second factor's input.

    Where an input is in fp32 already and neither cast nor dropped out, layers that read the same one share it.
    """
    second = step.factor_input * step.r * len(layers)
    if step.lean and not step.full and not step.dropout:
        return second + step.wide * sum(_inputs(layers))
    if step.wide == 4 and not step.autocast and not step.dropout:
        return second + sum({layer.inputs: 4 * layer.inputs for layer in layers}.values())
    return second + sum(
        layer.inputs * (step.factor_input + (step.mask_bytes if step.dropout else 0)) for layer in layers
    )


def _inputs(layers: list[Linear]) -> list[int]:
    """Widths of the tensors that layers read: layers of one width read the same tensor, but the last of a part reads
    what the others made."""
    before = {layer.inputs for layer in layers[:-1]}
    return [*before, *(layer.inputs for layer in layers[-1:] if len(layers) > 1 or layer.inputs not in before)]


def _norms(shape: Shape, step: Step) -> int:
    """Norms of a block that keep an fp32 input of their own. In fp32 the residual itself is that input, and the two
    norms of a parallel block share it."""
    parallel = shape.family in ("gpt_neox", "falcon") and step.wide == 4
    return 1 if parallel else shape.norms_per_block


def _attention(shape: Shape, step: Step) -> Cost:
    """Queries, keys, values and what the kernel keeps of them, and its output. Fused kernels keep a log-sum a head
    (FlashAttention, arXiv:2205.14135); the eager one keeps every score, and so does torch's fallback (math)."""
    q, kv, tokens = _query_width(shape), key_width(shape), step.tokens
    scores = step.batch * shape.heads * step.length**2
    size = 2 if step.autocast or step.wide == 2 else 4
    gradients = tokens * size * 2 * q
    # keys and values, once for every head
    repeated = step.padded or step.eager or not step.grouped
    k = v = q if repeated else kv
    if shape.fused_qkv and (not step.quantised or step.wide == 2) and (kv == q or not repeated):
        v = q + 2 * kv  # a view, which keeps all of the fused layer's output
    kept = tokens * size * (q + k + v)
    if step.eager:
        softmax = _softmax(scores, step.wide, copied=size == 2)
        capped = size * scores if shape.softcaps else 0
        if step.lean:  # a row at a time
            softmax = replace(softmax, working=softmax.working / step.batch, forward=softmax.forward / step.batch)
        return replace(softmax, saved=softmax.saved + kept + capped, working=softmax.working + gradients)
    mask = step.batch * step.length**2 * size if step.padded else 0
    if shape.alibi and step.quantised and step.whole_rest:
        mask = scores * size  # the shared fp32 mask, cast in every block
    saved = kept + tokens * (size * q + 4 * shape.heads) + mask
    return Cost(saved=saved, working=2 * gradients + 2 * mask, forward=gradients + 2 * mask)


def _softmax(scores: int, size: int, *, copied: bool) -> Cost:
    """Scores of `size` bytes that are kept: their softmax in fp32, and its 16-bit copy for the product with the values.

    CUDA's backward pass holds the gradient, gradient times output, and the result next to the output; the copy is gone
    by then (aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out).
    """
    copy = 2 if copied else 0
    return Cost(saved=scores * (4 + copy), working=scores * (4 + 4 + size - copy), forward=scores * (4 + size))


def _mlp(shape: Shape, block: Block, step: Step) -> Cost:
    """A dense MLP: gate, up and the activated gate, or the input of an activation alone."""
    down = [layer for layer in block.linears if layer.name.startswith("mlp.") and layer.outputs == shape.hidden]
    if not down:
        return NOTHING
    f, tokens = max(layer.inputs for layer in down), step.tokens
    # under autocast a layer answers in 16 bit, one in NF4 in the type of its input
    nf4 = step.quantised and any(layer.quantised for layer in block.linears)
    size = 4 if step.full else step.wide if nf4 else 2
    if shape.gated:
        kept = 3 * size
    elif shape.family == "gpt2":  # gelu_new is written out: the cube's input, the sum, tanh, and half the input
        kept = 16 if step.quantised else 14
    else:
        kept = size
    working = size  # the down layer's input
    if any(layer in down for layer in _adapted(shape, block, step)):
        # GPT-2's activation is written out, and fp32 under autocast
        lean = step.lean and size == 2 and shape.family != "gpt2"
        working += 4 if size == 2 and step.autocast and not lean else 0  # peft's fp32 copy of it
        working += (2 if lean else 4) if step.dropout and step.autocast else 0
    else:
        working = max(working, 2 * size)  # the gradients of both factors of the product
    return Cost(saved=tokens * kept * f, working=tokens * working * f, forward=tokens * (kept + working) * f)


def _experts(experts: Experts | None, step: Step) -> Cost:
    """Fused experts: a token's row once for each chosen expert; adapted experts add a merged copy of all weights, and
    the gradient of the down projection's share of it (peft's ParamWrapper)."""
    if experts is None:
        return NOTHING
    adapted = experts.adapted and step.targets == "all-linear"
    rows, h, f = step.tokens * experts.chosen, experts.hidden, experts.ffn
    size = 4 if step.full or (step.quantised and step.whole_rest) else 2  # their weights' own
    saved = rows * size * (3 * f + h + (f + h if adapted else 0))
    merged = size * experts.weights if adapted else 0
    working = rows * size * (f + h) + merged / 3
    return Cost(saved=saved + merged, working=working, forward=rows * size * (4 * f + 2 * h) + merged)


NOTHING = Cost(saved=0, working=0, forward=0)


def _query_width(shape: Shape) -> int:
    return shape.heads * shape.head_dim


def key_width(shape: Shape) -> int:
    return shape.kv_heads * shape.head_dim


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
    logit = CHUNK_BYTES if step.lean else LOSS_BYTES
    if shape.softcaps:  # the tanh that a cap keeps, in the type that the head answers in
        logit += 4 if step.full or step.widens else 2
    cast = (step.quantised and step.whole_rest) or step.saved_head
    head = 2 * shape.embedding if cast and step.autocast else 0
    at_once = _chunk(step) if step.lean else step.tokens
    worst = max(at_once * shape.vocab * logit + head, _head_gradient_bytes(shape, step, at_once))
    if step.lean:  # the last norm and its output, those that are learned from and their gradient, one chunk of logits
        size = 4 if step.full else 2
        return step.tokens * shape.hidden * (4 + 3 * size) + worst
    return step.tokens * 4 * shape.hidden + worst


def _head_gradient_bytes(shape: Shape, step: Step, at_once: int) -> float:
    """A trained head's gradient of `at_once` tokens, before it is added to that of earlier ones: in the 16 bits of its
    product and in fp32, when the logits are gone; in fp32 alone it is made while their gradient is there."""
    if not step.saved_head:
        return 0
    return 6 * shape.embedding if step.autocast else 4 * (shape.embedding + at_once * shape.vocab)


def embedding_gradient_bytes(shape: Shape, step: Step) -> float:
    """A trained embedding's gradient at the end of the backward pass, before it is added to that of earlier
    micro-batches, and that of its output."""
    return 4 * shape.embedding + step.tokens * shape.hidden * step.wide if step.saved_embedding else 0


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
    scores = step.batch * shape.heads * step.length**2 if step.eager else 0
    return ends if scores > (_chunk(step) if step.lean else step.tokens) * classes(shape, step) else 0.0


def _chunk(step: Step) -> int:
    return min(HEAD_CHUNK, step.tokens)


def classes(shape: Shape, step: Step) -> int:
    """Logits of one token."""
    return step.labels or shape.vocab
