"""The memory plan: a training's peak in device memory, part by part, from the model's config.json and the job alone.

It follows the recipe as it runs (worker/model.py, worker/train.py): transformers' Trainer under bf16 autocast, peft's
LoRA layers, bitsandbytes' NF4. What each operator keeps for the backward pass was read from a traced step
(worker/trace.py), which is also what the plan is tested against; no number is fitted to measured runs.
docs/memory-plan.md has the formulas in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from loractl.common.job.need import Need
from loractl.common.job.spec import JobSpec, Method, TaskType
from loractl.common.units import thousands

from .architecture import Block, Experts, Linear, Shape, read_shape

MIB = 2**20

CONTEXT_BYTES = 500 * MIB
"""A CUDA context with its kernels and cuBLAS workspaces: 0.15 GiB (T4) to 0.5 GiB (A100, H100); the upper end."""

MARGIN_SHARE = 0.05
"""Share of what the training allocates that is kept free on top: for fragmentation that the allocator's part does not
name. A round number about the size of the plan's mean error by reserved memory (docs/memory-plan.md)."""

SEGMENT_BYTES = 20 * MIB
"""Smaller tensors share segments of this size (kLargeBuffer in c10/cuda/CUDACachingAllocator): on average half of the
last one of each pool stays empty."""

TRACED_SLACK = 0.25
"""Share of a traced step's own memory that is added for blocks the allocator can't use; where the tensors are known by
name this is counted, and comes to 5 to 30% of activations and logits."""

LOSS_BYTES = 12
"""Bytes per logit where the loss is at its peak: the log-softmax kept in fp32, its gradient, and the logits' gradient
(transformers' ForCausalLMLoss casts logits to fp32; the 16-bit ones are freed before the backward pass)."""

EVALUATED_LOGIT_BYTES = 12
"""Bytes per held-out logit: the fp32 copy that accelerate makes, the learned positions' copy, their log-softmax
(worker/evaluate.py)."""

BLOCK_8BIT = 256
"""Values that share one fp32 scale in bitsandbytes' 8-bit optimizers."""

UNREAD_LABELS = 100
"""A classifier's labels while its data have not been read: more than most have, and less than 10 MiB of head."""

MOST = 2**24
"""Where the search for the largest length or micro-batch ends: more than any model takes."""

SMALLEST_8BIT = 4096
"""Tensors with fewer elements keep 32-bit state in them (bitsandbytes, min_8bit_size)."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The longest rows in tokens after tokenising: of those to train on, and of those held out."""

    train: int
    evaluate: int
    rows: int | None = None  # to train on: a micro-batch can't hold more
    labels: int | None = None  # of a classifier


@dataclass(frozen=True, kw_only=True)
class Stack:
    """How a training runs where no key of the spec says so. The defaults are those of this project's worker."""

    attention: Literal["sdpa", "eager"] | None = None  # None: what transformers takes for the architecture
    autocast: bool = True  # False: a loop without it, which computes adapters in fp32
    keeps_logits: bool = False  # True: a loop that holds the model's output during the backward pass
    double_quant: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes by part at the training's peak, and a word on each."""

    method: Method
    parts: dict[str, int]
    margin_bytes: int
    notes: dict[str, str]

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def tensor_bytes(self) -> int:
        """What the training allocates: without the CUDA context and what the allocator can't use."""
        return self.peak_bytes - self.parts["context"] - self.parts["allocator"]

    @property
    def need_bytes(self) -> int:
        """What a card must have free."""
        return self.peak_bytes + self.margin_bytes


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The largest values that fit, each with the job's other key as it is; None where nothing fits."""

    micro_batch: int | None
    max_length: int | None


def predict(spec: JobSpec, lengths: Lengths | None = None) -> Need:
    """The job's need by method; unknown where the base model is not here, or its architecture is not known."""
    shape = read_shape(spec.base_model, spec.revision)
    if shape is None:
        return Need(lora=None, qlora=None)
    lora, qlora = (plan(shape, spec, method, lengths).need_bytes for method in (Method.LORA, Method.QLORA))
    return Need(lora=lora, qlora=qlora)


def plan(
    shape: Shape, spec: JobSpec, method: Method, lengths: Lengths | None = None, *, stack: Stack | None = None
) -> Plan:
    """The plan of a job on a GPU. Without `lengths` every row is taken to be dataset.max_length tokens long.

    The peak is the largest of four moments: the loss, the backward pass through one block, the optimizer's step, and
    the evaluation of one held-out row (larger batches of it are halved where they don't fit).
    """
    stack = stack or Stack()
    run = _Run.of(shape, spec, method, lengths, stack)
    if run.labels:
        shape = with_head(shape, run.labels)
    weights = weight_bytes(shape, method, double_quant=stack.double_quant, full=run.full)
    tensors = list(adapter_tensors(shape, spec, run.labels))
    adapter = 4 * sum(size * count for size, count in tensors)  # peft keeps them in fp32 (autocast_adapter_dtype)
    state = sum(count * state_bytes(optimizer_name(spec, method), size) for size, count in tensors)
    held = weights + 2 * adapter + state  # gradients stay from one micro-batch of a step to the next

    blocks = [(_block(shape, block, run), block.count) for block in shape.blocks if block.text]
    stored = _stored(shape, blocks, run)
    if run.keeps_logits:
        stored += run.tokens * _classes(shape, run) * (2 if run.autocast else run.wide)
    ends = _loss(shape, run)
    at_loss = stored + ends
    at_block = stored + max(cost.peak(run.checkpoints) for cost, _ in blocks)
    at_step = _step_bytes(optimizer_name(spec, method), adapter, tensors)
    training = max(at_loss, at_block, at_step)
    reserved = max(at_loss + max(cost.forward for cost, _ in blocks), at_block + _too_small(shape, run, ends), at_step)
    unusable = max(0.0, reserved - training)

    logits = ends if at_loss >= max(at_block, at_step) else 0
    step = at_step if at_step > max(at_loss, at_block) else 0
    sizes = {
        "weights": weights,
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": state + step,
        "activations": training - logits - step,
        "logits": logits,
        "evaluation": max(0, _evaluation(shape, spec, run) - adapter - training),
        "context": CONTEXT_BYTES,
        "allocator": unusable + SEGMENT_BYTES,
    }
    parts = {name: int(size) for name, size in sizes.items()}
    margin = int(MARGIN_SHARE * (held + training))
    return Plan(method=method, parts=parts, margin_bytes=margin, notes=_notes(shape, spec, run, logits > 0))


def largest_fit(shape: Shape, spec: JobSpec, method: Method, limit: int, lengths: Lengths | None = None) -> Fit:
    """The largest micro-batch at the job's length, and the largest max_length at its micro-batch, in `limit` bytes.

    A max_length beyond the longest row changes nothing, so it is sought as if rows of any length were there.
    """

    def batch_fits(size: int) -> bool:
        training = spec.training.model_copy(update={"per_device_train_batch_size": size})
        return plan(shape, spec.model_copy(update={"training": training}), method, lengths).need_bytes <= limit

    def length_fits(size: int) -> bool:
        dataset = spec.dataset.model_copy(update={"max_length": size})
        return plan(shape, spec.model_copy(update={"dataset": dataset}), method).need_bytes <= limit

    most = lengths.rows if lengths and lengths.rows else MOST
    return Fit(micro_batch=_largest(batch_fits, 1, most), max_length=_largest(length_fits, 8, MOST))


def traced_plan(weights: int, adapter: int, state: int, own: int, method: Method) -> Plan:
    """The plan from bytes that a traced step took; `own` is what it needed beside weights, adapter and state."""
    parts = {
        "weights": weights,
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": state,
        "activations": own,
        "logits": 0,
        "evaluation": 0,
        "context": CONTEXT_BYTES,
        "allocator": int(TRACED_SLACK * own) + SEGMENT_BYTES,
    }
    words = dict.fromkeys(parts, "traced") | {"logits": "within activations", "evaluation": "not planned"}
    margin = int(MARGIN_SHARE * (weights + 2 * adapter + state + own))
    return Plan(method=method, parts=parts, margin_bytes=margin, notes=words)


def weight_bytes(shape: Shape, method: Method, *, double_quant: bool = True, full: bool = False) -> int:
    """The base's bytes: 16 bit for LoRA, or 32 where dtype is float32; for QLoRA NF4 where bitsandbytes quantises, and
    fp32 for all the rest (peft's prepare_model_for_kbit_training casts every 16-bit parameter)."""
    if method is not Method.QLORA:
        return (4 if full else 2) * shape.parameters
    layers = [(layer, block.count) for block in shape.blocks for layer in block.linears if layer.quantised]
    packed = sum(count * nf4_bytes(layer.weights, double_quant=double_quant) for layer, count in layers)
    return packed + 4 * shape.other_parameters


def nf4_bytes(weights: int, *, double_quant: bool = True) -> int:
    """Bytes of one NF4 layer: 4 bit a weight; per 64 weights a scale, in 8 bit with an fp32 one per 256 of those
    (QLoRA, arXiv:2305.14314, section 3); the tables of both codes and the offset."""
    blocks = -(-weights // 64)
    packed = -(-weights // 2)
    if not double_quant:
        return packed + 4 * blocks + 16 * 4
    return packed + blocks + 4 * -(-blocks // 256) + (16 + 256) * 4 + 4


def micro_batch(spec: JobSpec, lengths: Lengths | None) -> int:
    """Rows of one forward pass: the spec's number, or all there are."""
    most = spec.training.per_device_train_batch_size
    return min(most, lengths.rows) if lengths and lengths.rows else most


def planned_labels(spec: JobSpec, lengths: Lengths | None) -> int | None:
    """Labels of a classifier, as many as its data have or a guess; None for a job that learns to answer."""
    if spec.task_type is not TaskType.SEQ_CLS:
        return None
    return (lengths and lengths.labels) or UNREAD_LABELS


def with_head(shape: Shape, labels: int) -> Shape:
    """The shape of the model as a classifier: in place of its words a head of labels, which peft keeps as it began
    beside the one that it trains."""
    return replace(shape, tied=True, outside=shape.outside + labels * shape.hidden)


def adapter_tensors(shape: Shape, spec: JobSpec, labels: int | None = None) -> Iterator[tuple[int, int]]:
    """(elements, how often) of every trained tensor; `labels` are a classifier's."""
    r, targets = spec.lora.r, spec.lora.target_modules
    if labels:
        yield shape.hidden * labels, 1
    for layer, count in shape.adapted(targets):
        yield r * layer.inputs, count
        yield r * layer.outputs, count
        if spec.lora.use_dora:
            yield layer.outputs, count  # the magnitudes
    for name in spec.lora.modules_to_save:
        if _saved_part(name) is not None:
            yield shape.embedding, 1
        for layer, count in shape.adapted([name]):
            yield layer.weights + (layer.outputs if layer.bias else 0), count
    for block in shape.blocks:
        if block.experts and block.experts.adapted and targets == "all-linear":
            yield block.experts.adapter_parameters(r), block.count


def optimizer_name(spec: JobSpec, method: Method) -> str:
    """The optimizer that the worker takes for a job on a GPU."""
    if spec.training.optim != "auto":
        return spec.training.optim
    return "paged_adamw_8bit" if method is Method.QLORA else "adamw_torch"


def state_bytes(optimizer: str, elements: int) -> int:
    """An optimizer's state for one tensor. Paged state counts in full: it is on the card while it is used.

    Moments: two of Adam (arXiv:1412.6980), one of Lion (2302.06675), RMSprop and Adagrad, three of AdEMAMix
    (2409.03137); in 8 bit each has an fp32 scale a block (2110.02861).
    """
    name = optimizer.removeprefix("paged_")
    moments = {"adamw": 2, "lion": 1, "ademamix": 3, "adagrad": 1, "rmsprop": 1}.get(name.partition("_")[0], 0)
    if name.endswith("_8bit") and elements >= SMALLEST_8BIT:
        return moments * (elements + 4 * -(-elements // BLOCK_8BIT))
    return 4 * moments * elements  # none of sgd without momentum; adafactor's sums are a few kilobytes (1804.04235)


def checkpoints_activations(spec: JobSpec) -> bool:
    """Whether blocks are recomputed in the backward pass; on a GPU they are unless the job refuses."""
    return spec.training.gradient_checkpointing is not False


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The numbers of one plan that everything below looks at."""

    batch: int
    length: int
    evaluated: int  # length of the longest held-out row
    quantised: bool  # QLoRA
    full: bool  # all in fp32, without autocast
    saved_embedding: bool  # trained in fp32, which makes the residual stream fp32
    saved_head: bool
    dora: bool
    packed: bool  # rows of several examples, kept apart by a mask
    checkpoints: bool
    dropout: bool
    r: int
    targets: Literal["all-linear"] | list[str]
    eager: bool
    autocast: bool
    keeps_logits: bool
    labels: int | None  # of a classifier

    @classmethod
    def of(cls, shape: Shape, spec: JobSpec, method: Method, lengths: Lengths | None, stack: Stack) -> _Run:
        training, full = spec.training, spec.training.dtype == "float32"
        saved = {_saved_part(name) for name in spec.lora.modules_to_save}
        asked = None if training.attn_implementation == "auto" else training.attn_implementation
        return cls(
            batch=micro_batch(spec, lengths),
            full=full,
            saved_embedding="embedding" in saved and not full,
            saved_head="head" in saved and not full,
            dora=spec.lora.use_dora,
            packed=training.packing,
            length=lengths.train if lengths else spec.dataset.max_length,
            evaluated=lengths.evaluate if lengths else spec.dataset.max_length,
            quantised=method is Method.QLORA,
            checkpoints=checkpoints_activations(spec),
            dropout=spec.lora.lora_dropout > 0,
            r=spec.lora.r,
            targets=spec.lora.target_modules,
            eager=(stack.attention or asked or shape.attention) == "eager",
            autocast=stack.autocast and not full,
            keeps_logits=stack.keeps_logits,
            labels=planned_labels(spec, lengths),
        )

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def padded(self) -> bool:
        """Rows of one batch differ in length, so attention needs a mask; a single row of one example needs none."""
        return self.batch > 1 or self.packed

    @property
    def wide(self) -> int:
        """Bytes per element of the residual stream, which takes the norms' and embeddings' type."""
        return 4 if self.quantised or self.full or self.saved_embedding else 2

    @property
    def factor_input(self) -> int:
        """Bytes per element of what a LoRA layer's first factor keeps: autocast's 16-bit copy, else fp32."""
        return 2 if self.autocast else 4


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """Bytes of one transformer block."""

    saved: float  # kept from its forward to its backward pass
    working: float  # on top of that where it is worst
    forward: float  # the working set of a forward pass that keeps nothing

    def __add__(self, other: _Cost) -> _Cost:
        """Two parts that run one after the other."""
        return _Cost(
            saved=self.saved + other.saved,
            working=max(self.working, other.working),
            forward=max(self.forward, other.forward),
        )

    def peak(self, recomputed: bool) -> float:
        return self.working + (self.saved if recomputed else 0)


def _stored(shape: Shape, blocks: list[tuple[_Cost, int]], run: _Run) -> float:
    """What the forward pass leaves for the backward pass: the blocks' inputs, or all that they keep."""
    mask = 0
    if run.eager or run.padded or shape.alibi:  # one for all blocks
        mask = run.batch * run.length**2 * (run.wide * shape.heads if shape.alibi else run.wide if run.eager else 1)
    if run.checkpoints:
        return mask + shape.layers * run.tokens * shape.hidden * run.wide
    return mask + sum(count * cost.saved for cost, count in blocks)


def _block(shape: Shape, block: Block, run: _Run) -> _Cost:
    """One block's activations, part by part as its operators keep them.

    Its backward pass begins with the MLP, so what the MLP kept is gone when attention's turn comes.
    """
    tokens, adapted = run.tokens, _adapted(shape, block, run)
    norms = 4 * shape.hidden * _norms(shape, run)
    if shape.head_norms:
        norms += 4 * _q(shape) + 4 * _kv(shape)
    casts = 2 * sum(run.r * (layer.inputs + layer.outputs) for layer in adapted) if run.autocast else 0
    unpacked = run.quantised and run.autocast
    copies = sum(2 * layer.weights for layer in block.linears if not layer.quantised) if unpacked else 0
    attention = _attention(shape, run)
    feed_forward = _mlp(shape, block, run) + _experts(block.experts, run)
    inner = _factor_bytes([layer for layer in adapted if layer.name.startswith("mlp.")], run)
    outer = _factor_bytes([layer for layer in adapted if not layer.name.startswith("mlp.")], run)
    later = feed_forward.saved + tokens * inner
    saved = tokens * (norms + outer) + casts + copies + attention.saved + later
    around = tokens * _around(shape, run)
    if run.dora:
        saved += sum(_dora_bytes(layer, run) for layer in adapted)
        around += max((_dora_working(layer, run) for layer in adapted), default=0)
    return _Cost(
        saved=saved,
        working=around + max(feed_forward.working, attention.working - later),
        forward=around + max(feed_forward.forward, attention.forward),
    )


def _dora_bytes(layer: Linear, run: _Run) -> float:
    """What DoRA's magnitudes keep of a layer: the base's output and the factors', and with dropout, where the base's
    output is computed again, the base's weights cast once more (peft/tuners/lora/dora.py, DoraLinearLayer.forward)."""
    size = 2 if run.autocast else 4
    again = layer.weights * size if run.dropout and (run.autocast or run.quantised) else 0
    return run.tokens * layer.outputs * 2 * size + again


def _dora_working(layer: Linear, run: _Run) -> float:
    """The norm of W + BA (an identity, BA made from it, the base's weights unpacked, and their sum), and the scaled
    output in fp32 with its gradient."""
    size = 2 if run.autocast else 4
    return 4 * layer.inputs**2 + layer.weights * (size + size + run.wide) + run.tokens * layer.outputs * (4 + size)


def _around(shape: Shape, run: _Run) -> float:
    """Bytes a token of the hidden size that are alive around the busiest layer: the norm's output, the layer's own,
    the residual between, the gradient on its way back. LayerNorm computes in fp32 under autocast."""
    normed = 4 if shape.norm == "layer" or run.wide == 4 else 2
    parallel = shape.norms_per_block if shape.family in ("gpt_neox", "falcon") else 1
    layers = 12 if run.full else 6 if run.wide == 4 else 8
    return shape.hidden * (layers + normed * parallel)


def _adapted(shape: Shape, block: Block, run: _Run) -> list[Linear]:
    return [layer for layer, _ in replace(shape, blocks=(block,)).adapted(run.targets)]


def _factor_bytes(layers: list[Linear], run: _Run) -> float:
    """Bytes a token that LoRA layers keep: the first factor's input, dropout's mask, the second factor's input.

    Where an input is in fp32 already and neither cast nor dropped out, layers that read the same one share it.
    """
    second = run.factor_input * run.r * len(layers)
    if run.wide == 4 and not run.autocast and not run.dropout:
        return second + sum({layer.inputs: 4 * layer.inputs for layer in layers}.values())
    return second + sum(layer.inputs * (run.factor_input + (1 if run.dropout else 0)) for layer in layers)


def _norms(shape: Shape, run: _Run) -> int:
    """Norms of a block that keep an fp32 input of their own. In fp32 the residual itself is that input, and the two
    norms of a parallel block share it."""
    parallel = shape.family in ("gpt_neox", "falcon") and run.wide == 4
    return 1 if parallel else shape.norms_per_block


def _attention(shape: Shape, run: _Run) -> _Cost:
    """Queries, keys, values and what the kernel keeps of them, and its output. Fused kernels keep a log-sum a head
    (FlashAttention, arXiv:2205.14135); the eager one keeps every score, and so does torch's fallback (math)."""
    q, kv, tokens = _q(shape), _kv(shape), run.tokens
    scores = run.batch * shape.heads * run.length**2
    size = 2 if run.autocast or run.wide == 2 else 4
    gradients = tokens * size * 2 * q
    if shape.single_key:  # torch has no fused kernel for one key head and computes in fp32
        softmax = _softmax(scores, 4, copied=False)
        keys = q if run.batch > 1 else kv  # spread over the heads by a view, which a batch of several rows copies
        saved = softmax.saved + tokens * 4 * (q + 2 * keys)
        return replace(softmax, saved=saved, working=softmax.working + 2 * gradients)
    repeated = run.padded or run.eager or shape.family == "falcon"  # keys and values, once for every head
    k = v = q if repeated else kv
    if shape.fused_qkv and not run.quantised and (kv == q or not repeated):
        v = q + 2 * kv  # a view, which keeps all of the fused layer's output
    kept = tokens * size * (q + k + v)
    if run.eager:
        softmax = _softmax(scores, run.wide, copied=size == 2)
        capped = size * scores if shape.softcaps else 0
        return replace(softmax, saved=softmax.saved + kept + capped, working=softmax.working + gradients)
    mask = run.batch * run.length**2 * size if run.padded else 0
    if shape.alibi and run.quantised:
        mask = scores * size  # the shared fp32 mask, cast in every block
    saved = kept + tokens * (size * q + 4 * shape.heads) + mask
    return _Cost(saved=saved, working=2 * gradients + 2 * mask, forward=gradients + 2 * mask)


def _softmax(scores: int, size: int, *, copied: bool) -> _Cost:
    """Scores of `size` bytes that are kept: their softmax in fp32, and its 16-bit copy for the product with the values.

    CUDA's backward pass holds the gradient, gradient times output, and the result beside the output; the copy is gone
    by then (aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out).
    """
    copy = 2 if copied else 0
    return _Cost(saved=scores * (4 + copy), working=scores * (4 + 4 + size - copy), forward=scores * (4 + size))


def _mlp(shape: Shape, block: Block, run: _Run) -> _Cost:
    """A dense MLP: gate, up and the activated gate, or the input of an activation alone."""
    down = [layer for layer in block.linears if layer.name.startswith("mlp.") and layer.outputs == shape.hidden]
    if not down:
        return _NOTHING
    f, tokens = max(layer.inputs for layer in down), run.tokens
    size = 4 if run.full else run.wide if any(layer.quantised for layer in block.linears) else 2
    if shape.gated:
        kept = 3 * size
    elif shape.family == "gpt2":  # gelu_new is written out: the cube's input, the sum, tanh, and half the input
        kept = 16 if run.quantised else 14
    else:
        kept = size
    working = size  # the down layer's input
    if any(layer in down for layer in _adapted(shape, block, run)):
        working += 4 if size == 2 and run.autocast else 0  # peft's fp32 copy of it
        working += 4 if run.dropout and run.autocast else 0
    else:
        working = max(working, 2 * size)  # the gradients of both factors of the product
    return _Cost(saved=tokens * kept * f, working=tokens * working * f, forward=tokens * (kept + working) * f)


def _experts(experts: Experts | None, run: _Run) -> _Cost:
    """Fused experts: a token's row once for each chosen expert; adapted ones add a merged copy of all weights, and
    the gradient of the down projection's share of it (peft's ParamWrapper)."""
    if experts is None:
        return _NOTHING
    adapted = experts.adapted and run.targets == "all-linear"
    rows, size, h, f = run.tokens * experts.chosen, run.wide, experts.hidden, experts.ffn
    saved = rows * size * (3 * f + h + (f + h if adapted else 0))
    merged = size * experts.weights if adapted else 0
    working = rows * size * (f + h) + merged / 3
    return _Cost(saved=saved + merged, working=working, forward=rows * size * (4 * f + 2 * h) + merged)


_NOTHING = _Cost(saved=0, working=0, forward=0)


def _loss(shape: Shape, run: _Run) -> float:
    """The last norm, the logits and their loss, and the 16-bit copy of an fp32 head that autocast keeps.

    A classifier's head is put on every token, of which one a row counts: what it reads, what it gives, and the
    gradients of both (GenericForSequenceClassification.forward in transformers/modeling_layers.py).
    """
    if run.labels:
        size = 2 if run.autocast else 4
        head = size * run.labels * shape.hidden if run.autocast else 0
        return run.tokens * (4 * shape.hidden + size * (2 * shape.hidden + 2 * run.labels)) + head
    logit = LOSS_BYTES + (2 if shape.softcaps else 0)
    head = 2 * shape.embedding if (run.quantised or run.saved_head) and run.autocast else 0
    return run.tokens * (4 * shape.hidden + shape.vocab * logit) + head


def _too_small(shape: Shape, run: _Run, ends: float) -> float:
    """What the loss leaves cached that the backward pass can't use. The allocator splits a free block for a smaller
    tensor, but never joins two for a larger one: scores that are larger than logits need memory of their own, as the
    loss needs in front of blocks that were cached while the forward pass ran."""
    keeps_scores = run.eager or shape.single_key
    return ends if keeps_scores and run.batch * shape.heads * run.length**2 > run.tokens * _classes(shape, run) else 0.0


def _classes(shape: Shape, run: _Run) -> int:
    """Logits of one token."""
    return run.labels or shape.vocab


def _step_bytes(optimizer: str, adapter: int, tensors: list[tuple[int, int]]) -> float:
    """What the optimizer's step takes for itself: torch's AdamW works on all tensors at once and holds a root of the
    second moments; bitsandbytes' kernels work in place; adafactor squares one gradient after the other."""
    if optimizer == "adamw_torch":
        return adapter
    return 8 * max(size for size, _ in tensors) if optimizer == "adafactor" else 0


def _evaluation(shape: Shape, spec: JobSpec, run: _Run) -> float:
    """Scoring one held-out row, or answering it with a cache of keys and values; gradients are gone by then. A
    classifier answers nothing."""
    one = replace(run, batch=1, length=run.evaluated)
    working = max(_block(shape, block, one).forward for block in shape.blocks if block.text)
    if run.labels:
        return max(working, _loss(shape, one))
    head = 2 * shape.embedding if run.quantised and run.autocast else 0
    scored = run.evaluated * shape.vocab * EVALUATED_LOGIT_BYTES + head
    if spec.evaluation.samples == 0:
        return max(scored, working)
    cached = (run.evaluated + spec.evaluation.max_new_tokens) * 2 * _kv(shape) * run.wide  # autocast is off there
    return max(scored, working + (shape.layers + 1) * cached)


def _notes(shape: Shape, spec: JobSpec, run: _Run, at_loss: bool) -> dict[str, str]:
    method = Method.QLORA if run.quantised else Method.LORA
    trained = sum(size * count for size, count in adapter_tensors(shape, spec, run.labels))
    optimizer = optimizer_name(spec, method)
    rows = f"{run.batch} x {run.length} tokens"
    weights = "fp32" if run.full else "bf16"
    if run.quantised:
        weights = f"nf4, {_count(shape.other_parameters)} in fp32" if shape.linear_parameters else "fp32: no nf4 here"
    freed = "" if at_loss else ", freed before the peak"
    return {
        "weights": f"{_count(shape.parameters)} parameters, {weights}",
        "adapter": f"{_count(trained)} trained, fp32",
        "gradients": "fp32",
        "optimizer": optimizer,
        "activations": f"{rows}, {'checkpointing' if run.checkpoints else 'no checkpointing'}",
        "logits": f"{thousands(run.labels)} labels{freed}"
        if run.labels
        else f"{thousands(shape.vocab)} words, fp32{freed}",
        "evaluation": f"rows of {run.evaluated} tokens, beyond what training holds",
        "context": "CUDA, cuBLAS",
        "allocator": "cached blocks that the loss can't use",
    }


def _saved_part(name: str) -> Literal["embedding", "head"] | None:
    """What a name in lora.modules_to_save stands for, where it is one of the model's ends."""
    last = name.rpartition(".")[2]
    if last in ("lm_head", "embed_out"):
        return "head"
    return "embedding" if last in ("embed_tokens", "wte", "embed_in", "word_embeddings") else None


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _q(shape: Shape) -> int:
    return shape.heads * shape.head_dim


def _kv(shape: Shape) -> int:
    return shape.kv_heads * shape.head_dim


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest number up to `most` for which a monotone condition holds, by doubling and halving; None if `least`
    is too much."""
    if not fits(least):
        return None
    low, high = least, 2 * least
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
